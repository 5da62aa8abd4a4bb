"""Rounds as stages: which command reads what, in which order, and what is checked and pruned between them.

RUN/round-00/evaluation.json     the model as it was
RUN/round-01/groups/             responses of that model; scored/, shards/, train/, model/ (the export),
                                 evaluation.json (of the export)
RUN/round-02/groups/             responses of round-01/model ...
"""

import functools
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_gft.atomic import working_folder
from megatron_gft.checkpoints.history import STATE_FILE, find_checkpoint
from megatron_gft.config import load_config
from megatron_gft.errors import InputError, InputErrors
from megatron_gft.hf.mapping import parameter_count
from megatron_gft.hf.shape import read_model_shape
from megatron_gft.reading import read_json
from megatron_gft.rounds.report import write_report
from megatron_gft.rounds.servers import serving
from megatron_gft.rounds.settings import OwnStage, RoundsConfig, ToolSettings, fill, filled
from megatron_gft.rounds.stages import Pipeline, Stage, prune, say, server_log
from megatron_gft.sampling.settings import model_fingerprint

SEED_STRIDE = 1_000_000
GROUPS = "groups.jsonl"
LOGPROBS = "round"  # the name of q in the shards
ON_RANKS = ("train", "logprobs")
OF_TRAINING_ALONE = ("data.train=", "data.logprobs=", "checkpoint.init_", "train.output=")
TOOLS = Path(__file__).resolve().parents[2] / "tools"
SCRIPTS = {
    "generate": "generate_groups.py",
    "score": "score_groups.py",
    "preprocess": "preprocess_groups.py",
    "logprobs": "compute_logprobs.py",
    "export": "convert_checkpoint.py",
    "evaluate": "evaluate.py",
}
# What tells one model folder from another without reading all its weights.
MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json")


class Rounds:
    """The stages of a run. Making one raises InputErrors with what of the settings can be known to be wrong."""

    beside = 0  # further models that are trained and kept, to compare with

    def __init__(self, settings: RoundsConfig):
        self.settings, self.output = settings, Path(settings.output)
        settings.check(self.names(1))
        self.training = load_config(settings.train.config, self._training(1))

    def folder(self, number: int) -> Path:
        """Of a round, from 1; 0 is what was before."""
        return self.output / f"round-{number:02d}"

    def model(self, number: int) -> Path:
        """The Hugging Face folder that a round begins with."""
        return Path(self.settings.model) if number == 1 else self.folder(number - 1) / "model"

    def names(self, number: int) -> dict[str, str]:
        """What ``{name}`` stands for in a round."""
        s = self.settings
        names = {name: str(value) for name, value in s.values.items()} | {
            "output": str(self.output),
            "folder": str(self.folder(number)),
            "round": str(number),
            "seed": str(s.seed + SEED_STRIDE * (max(number, 1) - 1)),
            "python": sys.executable,
            "threads": str(s.threads),
            "processes": str(s.train.processes),
            "url": s.serve.url if s.serve else "",
        }
        return names | {"model": str(self.model(number)) if number else s.model, "start": s.model}

    def stages(self) -> list[Stage]:
        """All of them, in order."""
        made = [self._own(stage) for stage in self.settings.before]
        return made + [stage for number in range(self.settings.rounds + 1) for stage in self._round(number)]

    def _own(self, own: OwnStage) -> Stage:
        names = self.names(1)
        outputs, inputs = ([Path(filled(file, names)) for file in files] for files in (own.outputs, own.inputs))
        command = fill(own.command, names)
        return Stage(
            own.name,
            tuple(command),
            tuple(outputs),
            outputs[0].parent / "stages" if own.shared else self.output / "stages",
            inputs=tuple(inputs),
            threads=self.settings.threads,
            identity=tuple(command[1:]),
        )

    def _round(self, number: int) -> Iterator[Stage]:
        """The stages of a round; of round 0 its evaluation."""
        s, folder, names = self.settings, self.folder(number), self.names(number)
        if number:
            yield from self._sampled(number)
            yield from self._trained(number)
        if s.evaluate:
            asked, result = s.problems.held_out or "", folder / "evaluation.json"
            arguments = ["--model", str(self.model(number + 1)), "--problems", filled(asked, names)]
            inputs = (*self._outside([asked], names), *(() if number else self._model_files()))
            needs = (f"{number:02d}-export",) if number else self._before()
            yield self._tool("evaluate", number, [*arguments, "--output", str(result)], result, needs, inputs)

    def _sampled(self, number: int) -> Iterator[Stage]:
        """From prompts to shards."""
        s, folder, names = self.settings, self.folder(number), self.names(number)
        groups, scored = folder / "groups" / GROUPS, folder / "scored" / GROUPS
        earlier = [str(self.folder(k) / "scored" / GROUPS) for k in range(1, number)]
        asked = [filled(file, names) for file in s.problems.train]
        arguments = ["--input", *asked, "--output", str(groups), "--seed", names["seed"]]
        for source in s.generate.sources:
            arguments += ["--source", filled(source, names, quote=True)]
        arguments += ["--draw", str(s.problems.draw)] if s.problems.draw else []
        arguments += ["--settled", *earlier] if s.problems.drop_settled and earlier else []
        inputs = (*self._outside(s.problems.train, names), *(self._model_files() if number == 1 else ()))
        needs = (f"{number - 1:02d}-export",) if number > 1 else self._before()
        yield self._tool("generate", number, arguments, groups.parent, needs, inputs, resumes=True)
        arguments = ["--input", str(groups), "--output", str(scored)]
        yield self._tool("score", number, arguments, scored.parent, (f"{number:02d}-generate",))
        tokens = ["--tokenizer", names["model"], "--model", names["model"]]
        arguments = ["--input", str(scored), *tokens, "--output-prefix", str(folder / "shards" / "train")]
        yield self._tool("preprocess", number, arguments, folder / "shards", (f"{number:02d}-score",))

    def _trained(self, number: int) -> Iterator[Stage]:
        """From shards to the next model."""
        s, folder, training = self.settings, self.folder(number), self._training(number)
        recipes = tuple(map(Path, s.train.config))
        files = [word for file in s.train.config for word in ("--config", file)]
        needs = (f"{number:02d}-preprocess",)
        if s.logprobs:
            own = [text for text in training if not text.startswith(OF_TRAINING_ALONE)]
            arguments = [*files, "--name", LOGPROBS, *own, f"data.train=[{folder / 'shards' / 'train'}*]"]
            arguments += [f"checkpoint.init_from=hf:{self.model(number)}", f"train.output={folder / 'logprobs'}"]
            yield self._tool("logprobs", number, arguments, folder / "shards", needs, recipes)
            needs = (f"{number:02d}-logprobs",)
        yield self._tool("train", number, [*files, *training], folder / "train", needs, recipes, resumes=True)
        arguments = ["megatron-to-hf", "--checkpoint", str(folder / "train"), "--output", str(folder / "model")]
        yield self._tool("export", number, arguments, folder / "model", (f"{number:02d}-train",))

    def _training(self, number: int) -> list[str]:
        """What a round says to training: first what follows from it."""
        s, names = self.settings, self.names(number)
        carried = s.carry_optimizer and number > 1
        start = str(self.folder(number - 1) / "train") if carried else f"hf:{names['model']}"
        return [
            f"model.config={names['model']}",
            f"checkpoint.init_from={start}",
            *(["checkpoint.init_optimizer=true"] if carried else []),
            f"data.train=[{self.folder(number) / 'shards' / 'train'}*]",
            *([f"data.logprobs={LOGPROBS}"] if s.logprobs else []),
            f"train.output={self.folder(number) / 'train'}",
            f"train.seed={names['seed']}",
            *fill(s.train.arguments, names),
        ]

    def _tool(
        self,
        kind: str,
        number: int,
        arguments: list[str],
        output: Path,
        needs: tuple[str, ...],
        inputs: tuple[Path, ...] = (),
        resumes: bool = False,
    ) -> Stage:
        s, names, name = self.settings, self.names(number), f"{number:02d}-{kind}"
        section: ToolSettings = getattr(s, kind)
        if kind != "train":
            arguments = [*arguments, *fill(section.arguments, names)]
        identity, serve = (kind, *arguments), None
        if s.serve and kind == "generate":
            log = server_log(self.output / "logs" / f"{name}.log")
            serve = functools.partial(serving, s.serve, fill(s.serve.command or "", names), self.model(number), log)
            identity = (kind, *(text.replace(s.serve.url, "") for text in arguments))
        return Stage(
            name,
            (*(fill(section.command or "", names) or self._program(kind)), *arguments),
            (output,),
            self.output / "stages",
            needs,
            inputs,
            resumes,
            max(1, s.threads // s.train.processes) if kind in ON_RANKS else s.threads,
            manifests_change=kind == "preprocess",
            adds=kind == "logprobs",
            identity=identity,
            serve=serve,
            check=functools.partial(self.refuse_stale, number) if kind == "train" else None,
            unfinished=functools.partial(steps_left, output) if kind == "train" else str,
        )

    def _program(self, kind: str) -> list[str]:
        processes = self.settings.train.processes
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        ranks = ranks if processes > 1 and kind in ON_RANKS else []
        if kind == "train":
            return [sys.executable, *ranks, "-m", "megatron_gft.train"]
        script = TOOLS / SCRIPTS[kind]
        if script.exists():
            return [sys.executable, *ranks, os.path.relpath(script)]
        installed = {"logprobs": "gft-logprobs", "export": "gft-convert"}.get(kind, f"gft-{kind}")
        program = str(Path(sys.executable).with_name(installed))
        return [sys.executable, *ranks, program] if ranks else [program]

    def _before(self) -> tuple[str, ...]:
        return tuple(stage.name for stage in self.settings.before)

    def _outside(self, files: list[str], names: dict[str, str]) -> tuple[Path, ...]:
        """Those that no stage before the rounds makes."""
        made = [Path(filled(file, names)) for stage in self.settings.before for file in stage.outputs]
        paths = [Path(filled(file, names)) for file in files if file]
        return tuple(path for path in paths if path.is_file() and not any(path.is_relative_to(own) for own in made))

    def _model_files(self) -> tuple[Path, ...]:
        return self._outside([f"{self.settings.model}/{name}" for name in MODEL_FILES], self.names(1))

    def refuse_stale(self, number: int) -> None:
        """Raise InputErrors where self responses of a round are of too old models, by the lineage in the manifests."""
        if (limit := self.settings.max_staleness) is None:
            return
        rounds = {str(self.model(k)): k for k in range(1, number + 1)}
        found = []
        for file in sorted((self.folder(number) / "shards").glob("train*.json")):
            for row in read_json(file)["provenance"]["responses"]:
                if row["source"] == "self" and (problem := self._staleness(row, rounds, number, limit)):
                    found.append(f"{file}: {row['count']} self responses by {row['model']}: {problem}")
        if found:
            cure = "take these responses out of problems.train, or set max_staleness (null: any model)"
            raise InputErrors(f"round {number} would train on old responses -> {cure}", found)

    def _staleness(self, row: dict, rounds: dict[str, int], number: int, limit: int) -> str | None:
        if row["model"] not in rounds:
            return "no model of this run"
        if (age := number - rounds[row["model"]]) > limit:
            return f"{age} rounds old, max_staleness={limit}"
        sampled, folder = (row["sampling"] or {}).get("checkpoint"), Path(row["model"])
        if sampled and folder.exists() and sampled != model_fingerprint(folder):
            return f"its weights were others ({sampled[:12]})"
        return None

    def check_disk(self) -> None:
        """Raise InputError where exports and checkpoints of the rounds would not find room."""
        s, p = self.settings, parameter_count(read_model_shape(self.settings.model))
        weights, state = (2, 14) if self.training.model.precision == "bf16" else (4, 12)
        exports, runs = (min(s.rounds, (n or s.rounds) + 1) + self.beside for n in (s.keep_exports, s.keep_checkpoints))
        checkpoints = runs * self.training.checkpoint.keep_last + 1
        needed = p * (weights * exports + state * checkpoints)
        there = sum(path.stat().st_size for path in self.output.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.output).free
        if needed > free + there:
            raise InputError(
                f"{self.output}: {s.rounds} rounds need about {needed / 2**30:.3g} GiB ({exports} exports, "
                f"{checkpoints} checkpoints), {there / 2**30:.3g} are there, {free / 2**30:.3g} free -> keep_exports=1 "
                "keep_checkpoints=1, checkpoint.keep_last=1 in train.arguments, fewer rounds, or another output"
            )

    def run(self) -> None:
        """Run all stages; after each round prune, report.

        Raises:
            StageFailed, InputError: what a stage says.
        """
        stages, page = self.stages(), self.output / "report.html"
        self.output.mkdir(parents=True, exist_ok=True)
        with working_folder(self.output / "rounds"):  # ours alone
            pipeline = Pipeline(self.output / "logs", len(stages), self.output / "timings.json")
            for index, stage in enumerate(stages):
                if index == len(self.settings.before):  # now the model is there
                    self.check_disk()
                pipeline.run(stage)
                number, _, kind = stage.name.partition("-")
                if kind == ("evaluate" if self.settings.evaluate else "export") and int(number):
                    self._prune(stages, int(number))
                    if not page.exists() or page.stat().st_mtime < stage.stamp.stat().st_mtime:
                        say(write_report(page, int(number), pipeline.seconds))

    def _prune(self, stages: list[Stage], finished: int) -> None:
        by_name = {stage.name: stage for stage in stages}
        for kind, keep, folder in (
            ("export", self.settings.keep_exports, "model"),
            ("train", self.settings.keep_checkpoints, "train/checkpoints"),
        ):
            for number in range(1, finished + 1 - (keep or finished)):
                prune(by_name[f"{number:02d}-{kind}"], self.folder(number) / folder)

    def show(self) -> None:
        """Print the stages with their commands, and which ones stand."""
        stages = self.stages()
        pipeline = Pipeline(self.output / "logs", len(stages), self.output / "timings.json")
        for index, stage in enumerate(stages, 1):
            stands = " (stands)" if pipeline.stands(stage) else ""
            print(f"[{index}/{len(stages)}] {stage.name}{stands}\n{stage.shown()}")


def steps_left(run: Path) -> str:
    """Training that is asked to stop saves, and ends well."""
    if (newest := find_checkpoint(run / "checkpoints", "latest")) is None:
        return "it stopped before its first checkpoint"
    state = read_json(newest / STATE_FILE)
    step, total = state["step"], state.get("total_steps", 0)
    return f"it stopped at step {step} of {total}" if step < total else ""
