"""Small files that others wrote: read whole, or refused with one message that names the file and the likely cause."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from megatron_gft.errors import InputError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the text begins that stands in a clone for a large file which Git LFS has not fetched."""


def lfs_hint(path: str | os.PathLike) -> str:
    """What to append to the message about a file that cannot be read; empty unless it is a Git LFS pointer."""
    try:
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) != LFS_POINTER:
                return ""
    except OSError:
        return ""
    return f"; {Path(path).name} is a Git LFS pointer, the file itself was not downloaded -> git lfs pull"


def read_text(path: str | os.PathLike, cure: str = "copy the file again") -> str:
    """A UTF-8 file, line ends as they are; InputError when it is missing, cannot be read or is something else."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}) -> {cure}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error}) -> {cure}") from None


def read_json(path: str | os.PathLike, cure: str = "copy the file again", kind: Any = dict) -> Any:
    """What a JSON file holds.

    Args:
        cure: what a user does about a damaged file of this kind.
        kind: its type, which pydantic checks strictly and deeply.

    Raises:
        InputError: it is missing or cannot be read, is not UTF-8 or JSON, has a key twice, or holds something else.
    """
    text = read_text(path, cure)
    try:
        value = json.loads(text, object_pairs_hook=_without_twins)
        if kind is not dict:
            return pydantic.TypeAdapter(kind).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        raise InputError(f"{path}: {'; '.join(map(' -> '.join, wrong_values(error)))} -> {cure}") from None
    except (ValueError, RecursionError) as error:  # also: a number of thousands of digits
        raise InputError(f"{path}: not valid JSON ({error}){lfs_hint(path)} -> {cure}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds {type(value).__name__}, not an object -> {cure}")
    return value


def wrong_values(error: pydantic.ValidationError) -> Iterator[tuple[str, str]]:
    """(``key is value``, ``it must be ...``) of all that pydantic found."""
    for found in error.errors():
        key = ".".join(map(str, found["loc"])) or "all of it"
        expected = found["msg"].replace("Input should be", "it must be").replace("dictionary", "object")
        missing = found["type"] == "missing"
        yield (f"{key} is missing", "add it") if missing else (f"{key} is {str(repr(found['input']))[:60]}", expected)


class YamlLoader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-6`` as a string; people who write learning rates mean a number. It reads 010 as 8 and 1:30
    as 90, and takes the last of a key given twice: errors here."""

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        kind = "int" if node.tag.endswith("int") else "float"
        number = getattr(super(), f"construct_yaml_{kind}")(node)
        plain = node.value.replace("_", "")
        if ":" in plain or (re.match(r"[-+]?0\d", plain) and float(plain) != number):
            raise yaml.constructor.ConstructorError(
                problem=f"{node.value} is {number} in YAML -> write that, or quote it", problem_mark=node.start_mark
            )
        return number

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag in ("int", "float"):
    YamlLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", YamlLoader.construct_number)
YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file; InputError when it cannot be read, or holds something else."""
    text = read_text(path, "pass --config FILE")
    try:
        value = yaml.load(text, Loader=YamlLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no such date, a huge number
        raise InputError(f"{path}: not valid YAML: {error}{lfs_hint(path)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a configuration is a mapping of sections, this is {type(value).__name__}")
    return value


def absence(path: str | os.PathLike) -> str:
    """What to say of a path that is not there: where it was looked for, or how to get what it names on the hub."""
    if re.fullmatch(r"(?!examples/)[\w.-]+/[\w.-]+", name := str(path)) and not Path(name).parent.exists():
        local = f"models/{name.partition('/')[2]}"
        return f"no such folder, perhaps a name on the Hugging Face hub -> hf download {name} --local-dir {local}"
    where = "" if Path(path).is_absolute() else f", seen from {os.getcwd()}"
    return f"{'no such file in it' if Path(path).is_dir() else f'no such folder or file{where}'} -> check the path"


def _without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """JSON does not say which of two values counts: each reader takes another one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in found if names.count(name) > 1)!r} stands there twice")
    return found
