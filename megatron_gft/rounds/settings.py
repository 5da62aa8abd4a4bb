"""The YAML of ``tools/run_rounds.py``: what a round samples from, what it runs, what is kept. See docs/rounds.md."""

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_gft.config import Section, load_config
from megatron_gft.errors import InputError, InputErrors, refuse
from megatron_gft.reading import absence
from megatron_gft.sampling.sources import load_sources

OURS = ("model.config", "checkpoint.init_from", "checkpoint.init_optimizer", "data.train", "train.output")
"""Keys of training that follow from the round."""


class ToolSettings(Section):
    """One of the tools as a stage."""

    command: str | None = Field(
        None, description="what the arguments are put behind; default: the tool, on this machine"
    )
    arguments: str = Field("", description="further arguments of the tool, as one would type them")


class GenerateSettings(ToolSettings):
    """What a round samples."""

    sources: list[str] = Field(min_length=1, description="as tools/generate_groups.py takes them behind --source")


class TrainSettings(ToolSettings):
    """How a round trains."""

    config: list[str] = Field(min_length=1, description="recipes: configuration files of training")
    processes: PositiveInt = Field(1, description="training processes on this machine, where command is not set")


class ServeSettings(Section):
    """A server with the OpenAI interface, asked by sources of kind openai."""

    url: str = Field(description="base with the version; sources name it as {url}")
    command: str | None = Field(None, description="starts it for each generate stage; null: somebody else did")
    timeout: PositiveFloat = Field(1800.0, description="seconds until it answers")


class ProblemSettings(Section):
    """What is asked."""

    train: list[str] = Field(min_length=1, description="files of prompts")
    held_out: str | None = Field(None, description="file of problems to evaluate on")
    draw: PositiveInt | None = Field(None, description="prompts of one round, drawn by its seed; default: all")
    drop_settled: bool = Field(False, description="leave out prompts that were all right, or all wrong, in two rounds")


class OwnStage(Section):
    """A command of the user's."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")]
    command: str
    outputs: list[str] = Field(min_length=1, description="files and folders that it makes")
    inputs: list[str] = Field(default_factory=list, description="files that, changed, make it run again")
    shared: bool = Field(False, description="made once for all runs that name these outputs")


class RoundsConfig(Section):
    """One run of rounds."""

    output: str = Field("runs/rounds", description="folder of the run")
    rounds: PositiveInt = 1
    seed: NonNegativeInt = Field(1, description="of the first round; round r has this + 1 000 000 (r - 1)")
    model: str = Field(description="Hugging Face folder that the first round samples from and trains")
    threads: PositiveInt = Field(1, description="OMP_NUM_THREADS of a stage; training processes share them")
    values: dict[str, str | int | float] = Field(default_factory=dict, description="own names for {name} in commands")
    problems: ProblemSettings
    before: list[OwnStage] = Field(default_factory=list, description="stages before the first round")
    serve: ServeSettings | None = None
    generate: GenerateSettings
    score: ToolSettings = Field(default_factory=ToolSettings)
    preprocess: ToolSettings = Field(default_factory=ToolSettings)
    logprobs: ToolSettings | None = Field(
        None, description="q by the round's model; null: no stage, q is what was sampled"
    )
    train: TrainSettings
    export: ToolSettings = Field(default_factory=ToolSettings)
    evaluate: ToolSettings | None = Field(None, description="null: no stage")
    max_staleness: NonNegativeInt | None = Field(
        0, description="rounds that the model of self responses may lie behind; null: any model"
    )
    carry_optimizer: bool = Field(
        False, description="Adam's state goes on from round to round; it must have been saved"
    )
    keep_exports: PositiveInt | None = Field(None, description="newest exports that stay; null: all")
    keep_checkpoints: PositiveInt | None = Field(None, description="newest rounds whose checkpoints stay; null: all")

    def check(self, names: Mapping[str, str]) -> None:
        """Raise InputErrors with all that can be known before the first stage; ``names`` are the first round's."""
        refuse("rounds", [*self._problems(names), *self._training(names), *self._files(names)])

    def _problems(self, names: Mapping[str, str]) -> Iterator[str]:
        if self.evaluate and not self.problems.held_out:
            yield "evaluate: nothing to evaluate on -> set problems.held_out, or evaluate=null"
        for place, text in self._texts():
            try:
                fill(text, names)
            except InputError as error:
                yield f"{place}: {error}"
            except ValueError as error:  # of shlex: no closing quotation
                yield f"{place}: {error} -> quote it as in a shell"
        try:
            kinds = {source.kind for source in load_sources([filled(text, names) for text in self.generate.sources])}
        except InputError as error:
            yield f"generate.sources: {error}"
        else:
            if self.serve and "openai" not in kinds:
                yield "serve: no source asks it -> generate.sources: kind=openai url={url} model={model} ..."

    def _texts(self) -> Iterator[tuple[str, str]]:
        for name, section in self:
            for key in ("command", "arguments"):
                if text := getattr(section, key, None):
                    yield f"{name}.{key}", text
        for stage in self.before:
            for text in (stage.command, *map(shlex.quote, (*stage.inputs, *stage.outputs))):
                yield f"stage {stage.name}", text

    def _training(self, names: Mapping[str, str]) -> Iterator[str]:
        try:
            overrides = fill(self.train.arguments, names)
            fixed = {key for key in OURS if any(text.startswith(f"{key}=") for text in overrides)}
            yield from (f"train.arguments: {key} follows from the round -> leave it out" for key in sorted(fixed))
            load_config(self.train.config, [f"model.config={names['model']}", *overrides])
        except InputErrors as error:
            yield from (f"train: {problem}" for problem in error.problems)
        except ValueError as error:  # of fill, too: said before
            if not str(error).startswith("{"):
                yield f"train: {error}"

    def _files(self, names: Mapping[str, str]) -> Iterator[str]:
        if len({stage.name for stage in self.before}) < len(self.before):
            yield "before: two stages of one name -> name them differently"
        read = [("model", self.model), *(("problems.train", file) for file in self.problems.train)]
        read += [("problems.held_out", file) for file in [self.problems.held_out] if file]
        read += [(f"stage {stage.name}", file) for stage in self.before for file in stage.inputs]
        made = [Path(filled(file, names)) for stage in self.before for file in stage.outputs]
        for place, text in read:
            path = Path(filled(text, names))
            if not path.exists() and not any(path.is_relative_to(folder) for folder in made):
                yield f"{place}={path}: {absence(path)}"


def filled(text: str, names: Mapping[str, str], quote: bool = False) -> str:
    """``text`` with every known ``{name}`` replaced; ``{prompt}`` is the tools' own.

    Raises:
        InputError: of an unknown name.
    """

    def value(match: re.Match) -> str:
        if match[1] == "prompt":
            return match[0]
        if match[1] not in names:
            raise InputError(f"{match[0]} is no name here -> one of {', '.join(names)}; or set values.{match[1]}")
        return shlex.quote(names[match[1]]) if quote else names[match[1]]

    return re.sub(r"\{(\w+)\}", value, text)


def fill(text: str, names: Mapping[str, str]) -> list[str]:
    """The words of a command line, split as a shell does, then :func:`filled`."""
    return [filled(word, names) for word in shlex.split(text)]
