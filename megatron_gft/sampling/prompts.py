"""Prompts to sample from: rows of JSONL or parquet files, or of a Hugging Face dataset folder.

A row gives a prompt (text or messages), a gold answer if it has one, an id, and whatever else it holds (an expert's
solution in some column). A row with ``responses`` is one of a group file: it keeps them, so a group file can be
enlarged, and so can be a file in which some groups have none yet.
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from megatron_gft.errors import InputError
from megatron_gft.groups import cell, iter_rows, read_chunks, refuse_problems
from megatron_gft.groups.problems import ProblemLog
from megatron_gft.groups.records import PROMPT, ResponseRecord, gold_answer, has_text, number_text, parse_group
from megatron_gft.sampling.settings import Prompt

PROMPT_COLUMNS = ("prompt", "question", "problem", "messages")
_SUFFIXES = (".parquet", ".jsonl")
_FILE_NUMBER = re.compile(r"[-._]?(part|shard)?[-._]?\d+([-._]of[-._]\d+)?(-[0-9a-f]{16})?$")
_ROWS_PER_CHUNK = 512
_ABSENT = object()


@dataclass(frozen=True)
class PromptColumns:
    """Where things are in a row; ``None`` finds them by the usual names. Rows of a group file allow only ``None``.

    Args:
        prompt: column (see :func:`megatron_gft.groups.cell`); default: the first present of ``PROMPT_COLUMNS``.
        answer: column of the gold answer; default ``answer``. Of a solution with ``####`` only the answer is taken.
        id: column; default ``id``, else a hash of the prompt.
        template: text with ``{prompt}`` in it, put around every text prompt.
        duplicates: what becomes of a row whose id an earlier one has (without ids: the same prompt again): ``error``
            gives it as it is, and a generation run refuses it, ``drop`` leaves it out, ``number`` appends #2, #3, ...
            to its id.

    Raises:
        InputError: a template without ``{prompt}``.
    """

    prompt: str | None = None
    answer: str | None = None
    id: str | None = None
    template: str | None = None
    duplicates: Literal["error", "drop", "number"] = "error"

    def __post_init__(self) -> None:
        if self.template is not None and "{prompt}" not in self.template:
            raise InputError(
                f"--prompt-template {self.template!r}: all prompts would be this text -> put {{prompt}} in it"
            )


@dataclass(frozen=True)
class PromptRow:
    """One prompt; ``columns`` is the row it came from, ``responses`` those that the row has already."""

    id: str
    prompt: Prompt
    answer: str | None
    place: str
    columns: dict[str, Any]
    responses: list[ResponseRecord] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """Short hash of the prompt, so that a journal never mixes up two prompts with one id."""
        return hashlib.blake2b(json.dumps(self.prompt, sort_keys=True).encode(), digest_size=6).hexdigest()


@dataclass(frozen=True)
class PromptSet:
    """Prompts of files or dataset folders: iterating reads their rows, in order.

    Args:
        split: of a folder among the inputs.
        limit: at most so many prompts; no row behind them is looked at.
        only: ids of the prompts that are given; default: all.

    Raises:
        InputError: a limit below 1; while reading, nothing readable there, or a row without a usable prompt
            (``file:line``).
    """

    inputs: Sequence[str | Path]
    columns: PromptColumns = PromptColumns()
    split: str = "train"
    limit: int | None = None
    only: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit {self.limit}: no prompts would be left -> at least 1, or leave it out for all")

    def __iter__(self) -> Iterator[PromptRow]:
        return self.rows(Counter())

    def rows(self, seen: Counter[str]) -> Iterator[PromptRow]:
        """The prompts; counts in ``seen`` how often each id came, unless duplicates are kept."""
        rows = (row for file in self.files() for row in _rows_of_file(file, self.columns))
        if self.columns.duplicates != "error":
            rows = (own for row in rows if (own := _with_own_id(row, seen, self.columns.duplicates)) is not None)
        first = itertools.islice(rows, self.limit)
        return first if self.only is None else (row for row in first if row.id in self.only)

    def files(self) -> list[str]:
        """The data files, in order."""
        return [file for path in self.inputs for file in prompt_files(path, self.split)]


def _rows_of_file(file: str, columns: PromptColumns) -> Iterator[PromptRow]:
    problems = ProblemLog()
    for chunk in read_chunks(file, _ROWS_PER_CHUNK):
        for value, place in iter_rows(chunk, problems):
            refuse_problems(problems)
            yield _group_row(value, place, columns) if "responses" in value else _prompt_row(value, place, columns)
        refuse_problems(problems)


def _with_own_id(row: PromptRow, seen: Counter[str], duplicates: str) -> PromptRow | None:
    seen[row.id] += 1
    number = seen[row.id]
    if number == 1:
        return row
    if duplicates == "drop":
        return None
    while (name := f"{row.id}#{number}") in seen:
        number += 1
    seen[name] += 1
    return replace(row, id=name)


def prompt_files(path: str | Path, split: str = "train") -> list[str]:
    """Data files of ``path``: itself, or those of ``split`` in a dataset folder, laid out as on the hub.

    The split is a folder, or a whole word in the names of files (``train-00000-of-00002.parquet``,
    ``gsm8k-test.jsonl``).

    Raises:
        InputError: no such file, no data files of the split in the folder, or those of several splits.
    """
    path = Path(path)
    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder of prompts -> check the path")
    own_folder = (path / split).is_dir()
    folders = [path / split] if own_folder else [path, path / "data"]
    files = [file for suffix in _SUFFIXES for folder in folders for file in sorted(folder.glob("*" + suffix))]
    found = files if own_folder else _of_split(files, split)
    if not found:
        raise _no_files(path, split, files)
    labels = sorted({_label(file) for file in found})
    if len(labels) > 1 and not own_folder:
        raise InputError(
            f"{path}: the split {split!r} may be {' or '.join(labels)} -> set --split to one of them, or name files"
        )
    return [str(file) for file in found if file.suffix == found[0].suffix]  # not the same rows in two formats


def _no_files(path: Path, split: str, files: Sequence[Path]) -> InputError:
    there = ", ".join(sorted({_label(file) for file in files})) or "none"
    inside = ", ".join(sorted(item.name for item in path.iterdir() if item.is_dir())) or "none"
    return InputError(
        f"{path}: no parquet or jsonl files of the split {split!r} in this folder (files: {there}; folders: {inside}) "
        "-> set --split, or name files or another folder (a saved dataset: write it with to_parquet)"
    )


def _of_split(files: Sequence[Path], split: str) -> list[Path]:
    """Files whose names are the split, else those whose names say it."""
    word = re.compile(rf"(^|[-._]){re.escape(split)}($|[-._])")
    return [file for file in files if _label(file) == split] or [file for file in files if word.search(_label(file))]


def _label(file: Path) -> str:
    """Name of a data file without its number: in the layouts of the hub, the split."""
    return _FILE_NUMBER.sub("", file.stem) or file.name


def _group_row(value: dict[str, Any], place: str, columns: PromptColumns) -> PromptRow:
    options = [name for name in ("prompt", "answer", "id", "template") if getattr(columns, name) is not None]
    if options:
        raise InputError(
            f"{place}: a group (it has 'responses'), for which the options of columns and the template do nothing "
            f"(given: {', '.join(options)}) -> leave them out"
        )
    if not value["responses"]:
        return _prompt_row(value, place, columns)
    problems = ProblemLog()
    record = parse_group(value, place, problems)
    refuse_problems(problems)
    assert record is not None  # under the default policies only an error loses a group
    return PromptRow(record.id, record.prompt, record.answer, place, {}, record.responses, record.meta)


def _prompt_row(row: dict[str, Any], place: str, columns: PromptColumns) -> PromptRow:
    name = _prompt_column(row, place, columns.prompt)
    prompt = _checked_prompt(cell(row, name), place, name)
    if columns.template is not None and isinstance(prompt, str):
        prompt = columns.template.replace("{prompt}", prompt)
    if columns.answer and cell(row, columns.answer, _ABSENT) is _ABSENT:
        raise InputError(f"{place}: no column {columns.answer} -> set --answer-column, or give the row one (or null)")
    answer_column, id_column = columns.answer or "answer", columns.id or "id"
    answer = scalar_text(cell(row, answer_column), place, answer_column)
    group_id = scalar_text(cell(row, id_column), place, id_column)
    if columns.id and not group_id:
        raise InputError(f"{place}: no id in column {columns.id} -> set --id-column")
    return PromptRow(
        group_id or hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:16],
        prompt,
        answer and (gold_answer(answer) or answer),
        place,
        row,
        meta=_meta(row, {name, answer_column, id_column, "responses"}),
    )


def _prompt_column(row: dict[str, Any], place: str, name: str | None) -> str:
    found = name or next((column for column in PROMPT_COLUMNS if row.get(column) is not None), None)
    if found is not None and cell(row, found, _ABSENT) is not _ABSENT:
        return found
    wanted = name or ", ".join(PROMPT_COLUMNS)
    raise InputError(f"{place}: no column {wanted} (there are {', '.join(row)}) -> set --prompt-column")


def _meta(row: dict[str, Any], used: set[str]) -> dict[str, Any]:
    """What is in no column that was used; a ``meta`` among it is opened, as in a group file."""
    meta = {key: value for key, value in row.items() if key not in used and number_text(value) is not None}
    return meta.pop("meta") | meta if isinstance(meta.get("meta"), dict) else meta


def scalar_text(value: Any, place: str, column: str) -> str | None:
    """Text of a cell that holds text or a number; ``None`` of an empty one (null, NaN, an infinity).

    Raises:
        InputError: it holds something else.
    """
    value = number_text(value)
    if value is None or isinstance(value, str):
        return value
    raise InputError(
        f"{place}: column {column!r} holds {str(value)[:60]!r} ({type(value).__name__}), neither text nor a number "
        "-> make it text, or choose another column"
    )


def _checked_prompt(value: Any, place: str, name: str) -> Prompt:
    try:
        prompt = PROMPT.validate_python(value)
        if has_text(prompt):
            return prompt
        reason = "no text in it"
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
    raise InputError(
        f"{place}: {name} is neither text nor messages with a text as role and as content, to answer "
        f"({str(value)[:60]!r}: {reason}) -> correct it or set --prompt-column"
    )
