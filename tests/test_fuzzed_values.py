"""One value of one input changed at random: the command refuses it by file and key, or what it means is what it says.

Hypothesis draws the place and the value, the same ones on every run. A text where a number was, a key twice, a key
that is gone: nobody writes them on purpose, so none may pass in silence, and none may end in a traceback.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_damaged_inputs
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_damaged_inputs import COMMANDS, STEP, changed, run

from megatron_gft.atomic import sha256_file

folder = test_damaged_inputs.workspace
GONE = "(gone)"
VALUES = st.sampled_from(
    [None, True, False, 0, -1, 7, 1.5, float("nan"), 1e300, 10**12, "a", "", "3", [], [1], ["a"], {}, {"a": 1}, GONE]
)
PLACES = st.integers(0, 10**6)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in a tree of dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:2]) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def with_value(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    tree = copy.deepcopy(tree)
    inner = at(tree, path[:-1])
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return tree


def is_kind_of(value: Any, other: Any) -> bool:
    """Whether a person could mean ``value`` where ``other`` stood: nothing stands for all, numbers may be quoted."""
    if value is None or value is GONE or other is None:
        return True
    quoted = value == "3" and isinstance(other, int | float)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return quoted or (number if type(other) in (int, float) else type(value) is type(other))


@contextlib.contextmanager
def holding(path: Path, tree: Any) -> Iterator[None]:
    """The file with another content, which is no damage: the hashes of a checkpoint's files are right."""
    with changed(path, lambda _: path.write_text(written(tree, path))), contextlib.ExitStack() as stack:
        for folder in (path.parent, path.parent.parent):
            if (files := folder / "files.json").is_file() and path != files:
                stack.enter_context(changed(files, lambda _: None))
                listed = json.loads(files.read_text())
                listed[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
                files.write_text(json.dumps(listed))
        yield


def written(tree: Any, path: Path) -> str:
    rest = path.read_text().splitlines()[1:] if path.suffix == ".jsonl" else []
    return yaml.safe_dump(tree) if path.suffix == ".yaml" else "\n".join([json.dumps(tree), *rest])


def content(path: Path) -> Any:
    """Of lines the first one."""
    text = path.read_text()
    return yaml.safe_load(text) if path.suffix == ".yaml" else json.JSONDecoder().raw_decode(text)[0]


INPUTS = {
    "train": ("config.yaml", "hf/config.json", "train.json"),
    "to megatron": ("hf/config.json", "hf/tokenizer_config.json"),
    "sample": ("hf/config.json", "sampled.yaml", "prompts.jsonl", "hf/tokenizer_config.json"),
    "columns": ("sources.yaml",),
    "preprocess": ("groups.jsonl", "hf/tokenizer_config.json"),
    "import": ("rows.yaml", "rows.jsonl"),
    "resume": (STEP + "state.json", STEP + "files.json", STEP + "metadata.json", STEP + "hf/config.json"),
    "run to hf": (STEP + "metadata.json", STEP + "hf/config.json", STEP + "files.json"),
    "to hf": ("ckpt/hf_source.json", "ckpt/metadata.json", "ckpt/hf/config.json", "ckpt/files.json"),
    "inspect shards": ("train.json",),
    "plan": ("config.yaml", "hf/config.json"),
}
CASES = [(command, file) for command, files in INPUTS.items() for file in files]


def problem(folder: Path, command: str, file: str, path: tuple[Any, ...], value: Any) -> str | None:
    """What is wrong with how the command takes ``value`` there; None: nothing."""
    tree = content(folder / file)
    before = at(tree, path)
    with holding(folder / file, with_value(tree, path, value)):
        ended = run(folder, COMMANDS[command][0])
    names = [Path(file).name, *(str(key) for key in path if isinstance(key, str))]
    text = type(value) in (int, float) and file.endswith(".jsonl")  # of tables: a number is its text
    fine = (
        is_kind_of(value, before) or text
        if ended.code == 0
        else ended.is_message and any(n in ended.text for n in names)
    )
    return None if fine else f"{command}: {file} {path}: {before!r} -> {value!r}: {ended.code}\n{ended.text[-900:]}"


def examples(most: int) -> settings:
    return settings(max_examples=most, derandomize=True, database=None, deadline=None, phases=[Phase.generate])


def check(folder: Path, command: str, file: str, place: int, value: Any) -> None:
    every = [path for path in places(content(folder / file)) if "sampling" not in path]  # which is anybody's own
    assert (found := problem(folder, command, file, every[place % len(every)], value)) is None, found


@pytest.mark.parametrize(("command", "file"), CASES)
def test_a_changed_value(folder, command, file):
    examples(1)(given(PLACES, VALUES)(lambda place, value: check(folder, command, file, place, value)))()


@pytest.mark.slow
@pytest.mark.parametrize(("command", "file"), CASES)
def test_many_changed_values(folder, command, file):
    examples(10)(given(PLACES, VALUES)(lambda place, value: check(folder, command, file, place, value)))()
