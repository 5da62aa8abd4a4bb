"""Prompts to sample from: rows of JSONL or parquet files, or of a Hugging Face dataset folder.

A row gives a prompt (text or messages), a gold answer if it has one, an id, and whatever else it holds (an expert's
solution in some column). A row that is already a group keeps its responses, so a group file can be enlarged.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_gft.data.group_records import ResponseRecord, gold_answer, parse_json_line
from megatron_gft.data.problems import ProblemLog, raise_errors
from megatron_gft.errors import InputError
from megatron_gft.groups import RawChunk, iter_group_file, read_chunks
from megatron_gft.sampling.settings import Prompt

PROMPT_COLUMNS = ("prompt", "question", "problem", "messages")
_SPLITS = ("train", "test", "valid", "dev")  # names of data files in a dataset folder begin with their split
_ROWS_PER_CHUNK = 512


@dataclass(frozen=True)
class PromptColumns:
    """Where things are in a row; ``None`` finds them by the usual names.

    Args:
        prompt: column of the prompt; default: the first present of ``prompt, question, problem, messages``.
        answer: column of the gold answer; default ``answer``. Of a solution with ``####`` only the answer is taken.
        id: column of the id; default ``id``, else a hash of the prompt.
        template: text with ``{prompt}`` in it, put around every text prompt.
    """

    prompt: str | None = None
    answer: str | None = None
    id: str | None = None
    template: str | None = None


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


def iter_prompts(path: str | Path, columns: PromptColumns, split: str = "train") -> Iterator[PromptRow]:
    """Rows of a file or dataset folder, in order.

    Raises:
        InputError: nothing readable there, or a row without a usable prompt (``file:line``).
    """
    for file in prompt_files(path, split):
        rows = _rows(file)
        first = next(rows, None)
        if first is not None and first[1].get("responses"):
            for record, place in iter_group_file(file):
                yield PromptRow(record.id, record.prompt, record.answer, place, {}, record.responses, record.meta)
        elif first is not None:
            for place, row in itertools.chain([first], rows):
                yield _prompt_row(row, place, columns)


def prompt_files(path: str | Path, split: str = "train") -> list[str]:
    """Data files of ``path``: itself, or those of ``split`` in a dataset folder (hub layout or ``save_to_disk``).

    Raises:
        InputError: no such file, or no data files of the split in the folder.
    """
    path = Path(path)
    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder of prompts -> check the path")
    folder = path / split if (path / split).is_dir() else path
    if (folder / "state.json").is_file():
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [str(folder / part["filename"]) for part in state["_data_files"]]
    for suffix in (".parquet", ".jsonl", ".arrow"):
        files = sorted(glob.glob(str(folder / f"*{suffix}")) + glob.glob(str(folder / "data" / f"*{suffix}")))
        of_splits = [file for file in files if Path(file).name.startswith(_SPLITS)]
        found = [file for file in of_splits if Path(file).name.startswith(split)] if of_splits else files
        if found:
            return found
    raise InputError(f"{path}: no parquet, jsonl or arrow files of the split {split!r} in this folder -> set --split")


def _rows(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, row) of one data file."""
    if file.endswith(".arrow"):
        yield from _arrow_rows(file)
        return
    problems = ProblemLog()
    for chunk in read_chunks(file, _ROWS_PER_CHUNK):
        for offset, row in enumerate(_chunk_rows(chunk)):
            place = f"{file}:{chunk.first_row + offset}"
            if isinstance(row, bytes):
                if row.isspace():
                    continue
                row = parse_json_line(row, place, problems)
                raise_errors(problems.take())
            yield place, row


def _chunk_rows(chunk: RawChunk) -> list[Any]:
    return chunk.rows if isinstance(chunk.rows, list) else chunk.rows.to_pylist()


def _arrow_rows(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow

    number = 0
    try:
        with pyarrow.memory_map(file) as source, pyarrow.ipc.open_stream(source) as reader:
            for batch in reader:
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}:{number}", row
    except pyarrow.ArrowException as error:
        raise InputError(f"{file}: not a readable arrow file ({error}) -> check the dataset folder") from error


def _prompt_row(row: dict[str, Any], place: str, columns: PromptColumns) -> PromptRow:
    name = columns.prompt or next((c for c in PROMPT_COLUMNS if row.get(c) is not None), None)
    if name is None or name not in row:
        wanted = columns.prompt or ", ".join(PROMPT_COLUMNS)
        raise InputError(f"{place}: no column {wanted} (there are {', '.join(row)}) -> set --prompt-column")
    prompt = _checked_prompt(row[name], place, name)
    if columns.template is not None and isinstance(prompt, str):
        prompt = columns.template.replace("{prompt}", prompt)
    answer_column = columns.answer or "answer"
    if columns.answer and columns.answer not in row:
        raise InputError(f"{place}: no column {columns.answer} -> set --answer-column")
    answer = row.get(answer_column)
    if answer is not None:
        answer = gold_answer(str(answer)) or str(answer)
    id_column = columns.id or "id"
    if columns.id and row.get(columns.id) is None:
        raise InputError(f"{place}: no column {columns.id} -> set --id-column")
    group_id = row.get(id_column)
    if group_id is None or group_id == "":
        group_id = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:16]
    used = {name, answer_column, id_column, "responses"}
    meta = {key: _jsonable(value) for key, value in row.items() if key not in used and value is not None}
    return PromptRow(str(group_id), prompt, answer, place, row, meta=meta)


def _jsonable(value: Any) -> Any:
    """A cell as JSON can hold it: dates and the like become text."""
    return value if isinstance(value, (str, int, float)) else json.loads(json.dumps(value, default=str))


def _checked_prompt(value: Any, place: str, name: str) -> Prompt:
    if isinstance(value, str) and value.strip():
        return value
    if (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    ):
        return value
    raise InputError(f"{place}: {name} is neither text nor messages with role and content ({str(value)[:60]!r})")
