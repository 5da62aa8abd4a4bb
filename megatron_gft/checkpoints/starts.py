"""Every start of a run keeps its configuration; a run that goes on trains the same function, unless told otherwise."""

from pathlib import Path
from typing import Any

from megatron_gft.config import Config
from megatron_gft.errors import InputErrors
from megatron_gft.reading import read_yaml

CONFIG_FILE = "config.yaml"
"""Of the first start in the run folder, and in each checkpoint that of the start that wrote it."""

DATA_KEYS = (
    *("data.train", "data.train_weights", "data.valid", "data.split", "data.groups_per_step", "train.seed"),
    *("data.overlong", "data.max_response_tokens", "data.max_tokens_per_pack"),
)
"""What the order and the content of the steps come from, beside the shards."""

# How the loss is computed and what is measured on the way; all else of the objective says which loss it is.
_SAME_LOSS = {"objective.fused_head", "objective.head_chunk_tokens", "objective.entropy"}
_OF_THE_PRESET = {"objective.coefficient", "objective.advantage", "objective.sources"}

Changes = dict[str, tuple[Any, Any]]
"""Both values, earlier one first, by ``section.key``."""


def config_files(run_folder: Path) -> list[Path]:
    """The configurations of all starts, in their order: ``config.yaml``, ``config-0002.yaml``, ..."""
    numbered = [path for path in run_folder.glob("config-*.yaml") if _number(path)]
    return [path for path in (run_folder / CONFIG_FILE, *sorted(numbered, key=_number)) if path.is_file()]


def _number(path: Path) -> int:
    digits = path.stem.removeprefix("config-")
    return int(digits) if digits.isdecimal() else 0


def keep_config(config: Config, run_folder: Path) -> list[str]:
    """Write the configuration of this start; a line for each value that is another one than in the last start's."""
    if not (files := config_files(run_folder)):
        config.write(run_folder / CONFIG_FILE)
        return []
    last = files[-1]
    config.write(run_folder / f"config-{max(_number(last), 1) + 1:04d}.yaml")
    return [f"{key}: {now!r}, in {last.name} {before!r}" for key, (before, now) in changes(last, config).items()]


def changes(file: Path, config: Config) -> Changes:
    """What ``config`` has otherwise than a stored configuration. A key that was not there yet had its default."""
    stored = read_yaml(file)
    found: Changes = {}
    for name, section in config:
        now, before = section.model_dump(mode="json"), stored.get(name)
        for key, field in type(section).model_fields.items():
            default = field.get_default(call_default_factory=True)
            pair = before.get(key, default) if isinstance(before, dict) else default, now[key]
            found |= {f"{name}.{key}": pair} if pair[0] != pair[1] else {}
    return found


def check_same_function(config: Config, checkpoint: Path, run_folder: Path) -> tuple[Changes, list[str]]:
    """A run that goes on from ``checkpoint`` minimises the function that it was minimising.

    Returns:
        What is different from the configuration of the start that wrote the checkpoint (earlier versions kept none
        there: from the last start's), and what to say of it.

    Raises:
        InputErrors: another function, that ``checkpoint.allow_changes`` does not allow.
    """
    file = next((path for path in (checkpoint / CONFIG_FILE, *config_files(run_folder)[::-1]) if path.is_file()), None)
    if file is None:
        return {}, [f"{checkpoint}: has no {CONFIG_FILE}, so the settings are not compared with those it was made with"]
    changed = changes(file, config)
    others = [key for key in changed if key.startswith("objective.") and key not in _SAME_LOSS]
    if _OF_THE_PRESET.isdisjoint(others):
        others = [key for key in others if key != "objective.name"]  # a preset's name computes nothing
    allowed = set(config.checkpoint.allow_changes)
    allowed |= _OF_THE_PRESET if "objective.name" in allowed else set()
    lines = {key: f"{key}: {changed[key][0]!r} in {file}, {changed[key][1]!r} now" for key in others}
    if refused := [key for key in others if key not in allowed]:
        raise InputErrors(
            f"{checkpoint} was trained with another objective -> restore its settings, set another train.output, "
            f"or go on with the new ones: checkpoint.allow_changes=[{','.join(others)}]",
            [lines[key] for key in refused],
        )
    said = [f"allowed by checkpoint.allow_changes: {line}" for line in lines.values()]
    if "checkpoint.init_from" in changed:
        said.append(f"checkpoint.init_from={config.checkpoint.init_from}: not read, the run goes on from {checkpoint}")
    return changed, said
