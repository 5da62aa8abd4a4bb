"""Folders that come from elsewhere: nothing outside them is read, and nothing in them is run."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field

from megatron_gft.errors import InputError, InputErrors, refuse
from megatron_gft.reading import absence, lfs_hint, read_json, read_text, wrong_values

MODEL_FILES = tuple("*.json *.jinja *.model *.tiktoken *.txt *.safetensors *.bin *.py *chat_templates".split())
JSON_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json"),
)
TEXT_FILES = ("chat_template.jinja", "merges.txt", "vocab.txt")


def is_inner_name(name: object) -> bool:
    """Whether this names something below a folder: no way up, no root, nothing that a terminal would obey."""
    return isinstance(name, str) and all(
        part not in ("", ".", "..") and part.isprintable() and "\\" not in part for part in name.split("/")
    )


def file_problem(path: Path, *folders: Path) -> str | None:
    """Why ``path`` is not read: a link that leaves all ``folders`` (and the blobs of the hub's cache), or no file."""
    roots = [Path(os.path.realpath(folder)) for folder in folders]
    roots += [root.parents[1] / "blobs" for root in roots if root.parent.name == "snapshots"]
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(root) for root in roots):
        return f"{path}: a link out of its folder, to {target} -> put the file itself there"
    if target.exists() and not (target.is_file() or target.is_dir()):
        return f"{path}: neither a file nor a folder -> remove it"
    return None


def check_folder(folder: Path, patterns: Iterable[str]) -> None:
    """Raise InputErrors for links out of the folder, FIFOs, devices and sockets among what matches, and below it."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    special = (path for match in found for path in _files(match) if path.is_symlink() or not path.is_file())
    refuse(f"{folder}: holds what is not read", filter(None, (file_problem(path, folder) for path in special)))


def _files(path: Path) -> Iterator[Path]:
    yield path
    if not path.is_symlink():
        for folder, folders, names in os.walk(path):  # which follows no links
            yield from (Path(folder) / name for name in [*folders, *names])


def from_folder(
    loader: Any, folder: str | Path, problem: str, remedy: str, trust_remote_code: bool, **options: Any
) -> Any:
    """``loader.from_pretrained(folder)``, which asks nothing and runs no code of the folder unless it is trusted.

    Whatever transformers raises becomes an InputError with ``problem`` and ``remedy``; a damaged file is named.
    """
    check_folder(Path(folder), MODEL_FILES)
    check_keys(Path(folder))
    try:
        return loader.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code, **options
        )
    except Exception as error:  # of a damaged file, whatever its reader raises: of pickle, struct, safetensors, ...
        if "trust_remote_code" in str(error):
            problem, error = f"{problem} without its own code", ValueError("auto_map names Python files")
            remedy = "read them; to run them: --trust-remote-code (in a source: trust_remote_code=true)"
        else:
            refuse_damage(folder)
        raise InputError(f"{folder}: {problem} ({error or type(error).__name__}) -> {remedy}") from error


def refuse_damage(folder: str | os.PathLike) -> None:
    """Raise InputError for the first damaged file of a model folder that a library could not read, if one is found."""
    from safetensors import SafetensorError, safe_open
    from tokenizers import Tokenizer

    if not Path(folder).exists():
        raise InputError(f"{folder}: {absence(folder)}")
    check_keys(Path(folder))
    for path in sorted(Path(folder).glob("*")):
        if path.name in JSON_FILES:
            read_json(path)
        if path.name == "tokenizer.json":
            try:
                Tokenizer.from_file(str(path))
            except Exception as error:  # of the library's own, without a type
                raise InputError(f"{path}: not a tokenizer ({error}) -> copy the file again") from error
        if path.suffix == ".safetensors":
            try:
                safe_open(path, "numpy").keys()
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path}: damaged or truncated ({error}){lfs_hint(path)} -> copy it again") from error
        if path.name in TEXT_FILES:
            read_text(path)


class Strict(pydantic.BaseModel):
    """Values have the type that they should have: "16", 16.0 and true are no integer, "false" is no bool."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, allow_inf_nan=False, defer_build=True)


def _keys(kinds: Mapping[str, Any]) -> Any:
    fields: dict[str, Any] = {key: (kind, None) for keys, kind in kinds.items() for key in keys.split()}
    return pydantic.create_model("Keys", __base__=Strict, **fields)


_Text, _Switch, _Object = str | None, bool | None, dict[str, Any] | None
_TokenKey = Literal["__type", "id", "content", "lstrip", "rstrip", "normalized", "single_word", "special"]
_Id = Annotated[int, Field(ge=-1, lt=2**31)]
_Dtype = Annotated[str, Field(pattern=r"^(auto|bfloat16|float\d\w*)$")]
_Code = dict[str, str | list[str | None]]

ConfigKeys = _keys(  # what transformers reads of any model
    {
        "model_type transformers_version": _Text,
        "architectures layer_types": list[str] | None,
        "rope_scaling rope_parameters quantization_config text_config per_layer_config": _Object,
        "tie_word_embeddings use_cache": _Switch,
        "bos_token_id eos_token_id pad_token_id": _Id | Annotated[list[_Id], Field(min_length=1)] | None,
        "dtype torch_dtype": _Dtype | None,
        "num_labels": Annotated[int, Field(gt=0, le=10**6)],  # transformers makes a label of each
        "id2label": dict[Annotated[str, Field(pattern=r"^\d{1,6}$")], str] | None,
        "label2id": dict[str, int] | None,
        "auto_map": _Code,
    }
)
TokenizerKeys = _keys(
    {
        "tokenizer_class backend": _Text,
        "bos_token eos_token pad_token unk_token": str | Annotated[dict[_TokenKey, Any], Field(min_length=1)] | None,
        "add_bos_token add_eos_token": _Switch,
        "model_max_length": float | None,
        "added_tokens_decoder": dict[str, dict[str, Any]],
        "chat_template": str | dict[str, str] | list[dict[str, str]] | None,
        "auto_map": _Code,
    }
)


def check_keys(folder: Path) -> None:
    """Raise InputErrors for each key of another type in config.json and tokenizer_config.json, where they are."""
    for name, kind in (("config.json", ConfigKeys), ("tokenizer_config.json", TokenizerKeys)):
        problems: list[str] = []
        if (folder / name).is_file() and typed(kind, read_json(folder / name), problems) is None:
            raise InputErrors(str(folder / name), problems)


Values = TypeVar("Values", bound=Strict)


def typed(kind: type[Values], values: Mapping[str, Any], problems: list[str], place: str = "") -> Values | None:
    """``values`` as ``kind``; None when some have another type or are out of range, each of them in ``problems``.
    ``place``: key of config.json that the values stand under, followed by a dot."""
    try:
        return kind.model_validate(dict(values))
    except pydantic.ValidationError as error:
        problems += [f"{place}{what} -> {expected}" for what, expected in wrong_values(error)]
        return None
