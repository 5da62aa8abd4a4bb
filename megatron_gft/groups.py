"""Group files: one prompt with its responses, as text, one group a line (JSONL or parquet).

    {"id": "...", "prompt": "text" | [{"role", "content"}, ...], "answer": "gold" | null,
     "responses": [{"text", "source": "expert|teacher|self", "reward": 0.5 | null, "outcome": "correct|wrong|...",
                    "finish_reason": "stop|length", "model", "tokenizer", "token_ids", "logprobs", "sampling"}],
     "meta": {...}}

``tokenizer`` is the fingerprint of the tokenizer that made ``token_ids`` (see :mod:`megatron_gft.tokenizer`); without
it the ids are not trusted. Other fields of a group move into ``meta``, other fields of a response into ``extra``: a
tool that reads and writes groups loses nothing. Plain rows ``{question, answer}`` (GSM8K) or ``{problem, solution}``
are read as groups with one expert response; the gold answer is what follows ``####``, or the ``answer`` beside a
``solution``.

In a parquet file a prompt of messages is in the column ``messages``; ``meta``, ``sampling`` and ``extra`` (further
fields of a response or message) are JSON text. Cells that JSON cannot hold are read as text (dates and the like) or as
``{"base64": "..."}`` (bytes).
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import functools
import glob
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from megatron_gft.atomic import atomic_file
from megatron_gft.data.group_records import (
    FINISH_REASONS,
    GROUP_FIELDS,
    RESPONSE_FIELDS,
    SOURCE_CODES,
    SOURCES,
    GroupRecord,
    ResponseRecord,
    gold_answer,
    parse_group,
    parse_json_line,
    record_from_json,
    record_to_dict,
    record_to_json,
    without_surrogates,
)
from megatron_gft.data.problems import ERROR, FIX, ProblemLog
from megatron_gft.errors import InputError, InputErrors

__all__ = [
    "FINISH_REASONS",
    "SOURCES",
    "SOURCE_CODES",
    "GroupRecord",
    "RawChunk",
    "ResponseRecord",
    "expand_inputs",
    "gold_answer",
    "iter_group_file",
    "iter_rows",
    "json_value",
    "parse_chunk",
    "read_chunks",
    "record_from_json",
    "record_to_dict",
    "record_to_json",
    "refuse_problems",
    "write_group_file",
]
GROUP_FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")  # that can be written
_PARQUET_BATCH = 1024
_TEXT_TYPES = ("string", "large_string")  # of Arrow
_PARTS_PER_READ = 16  # of many parts, chunks get smaller instead of reads larger
# A worker holds some 40 times the text while it tokenizes, and the last chunk is worked on alone: keep chunks small.
BYTES_PER_CHUNK = 256 << 10


@dataclass(frozen=True, slots=True)
class RawChunk:
    """Rows of a group file, not parsed yet; cheap to send to a worker process.

    ``rows`` holds lines of a JSONL file (bytes) or a pyarrow RecordBatch.
    """

    path: str
    first_row: int  # 1-based line (JSONL) or row (parquet)
    rows: Any
    step: int = 1  # rows from one to the next
    read_fraction: float = 1.0  # of the file, after this chunk

    def __len__(self) -> int:
        return len(self.rows)


def expand_inputs(patterns: Sequence[str | Path]) -> list[str]:
    """Files that the paths and globs name, each glob sorted.

    Raises:
        InputError: a path or glob names no file, or one file is named twice.
    """
    files: list[str] = []
    for pattern in map(str, patterns):
        found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) and not Path(pattern).exists() else [pattern]
        if not found or not all(Path(name).is_file() for name in found):
            raise InputError(f"{pattern}: no such group file -> check the path")
        files.extend(found)
    twice = sorted({name for name in files if files.count(name) > 1})
    if twice:
        raise InputError(f"{twice[0]}: input named twice -> name each file once")
    return files


def read_chunks(path: str | Path, rows_per_chunk: int = 256, *, part: int = 0, parts: int = 1) -> Iterator[RawChunk]:
    """Yield a group file (``.jsonl``, ``.json``, ``.jsonl.gz``, ``.parquet``) in chunks of rows.

    Args:
        path: of the file.
        rows_per_chunk: at most so many rows in a chunk; fewer when they are long (``BYTES_PER_CHUNK``).
        part, parts: give only every ``parts``-th row, beginning with row ``part`` (from 0).

    Raises:
        InputError: the file cannot be read or its format is unknown.
    """
    path = str(path)
    at_once = min(parts, _PARTS_PER_READ)
    read_rows, read_bytes = rows_per_chunk * at_once, BYTES_PER_CHUNK * at_once
    try:
        if path.endswith(".parquet"):
            batches = _parquet_batches(path, read_rows, read_bytes)
        elif path.endswith((".jsonl", ".json", ".jsonl.gz")):
            batches = _line_batches(path, read_rows, read_bytes)
        else:
            raise InputError(f"{path}: unknown kind of group file -> use .jsonl, .jsonl.gz or .parquet")
        first_row = 1
        for rows, fraction in batches:
            start = (part - (first_row - 1)) % parts
            if start < len(rows):
                mine = rows if parts == 1 else _every(rows, start, parts)
                yield RawChunk(path, first_row + start, mine, parts, fraction)
            first_row += len(rows)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}) -> check the file") from error


def _every(rows: Any, start: int, step: int) -> Any:
    return rows[start::step] if isinstance(rows, list) else rows.take(list(range(start, len(rows), step)))


def _line_batches(path: str, max_rows: int, max_bytes: int) -> Iterator[tuple[list[bytes], float]]:
    size = max(os.path.getsize(path), 1)
    with open(path, "rb") as stored:
        lines = gzip.GzipFile(fileobj=stored) if path.endswith(".gz") else stored
        batch: list[bytes] = []
        held = 0
        for number, line in enumerate(lines):
            if number == 0:  # a byte-order mark, as editors on Windows write it, is no part of the text
                line = line.removeprefix(codecs.BOM_UTF8) or b"\n"
            batch.append(line)
            held += len(line)
            if len(batch) == max_rows or held >= max_bytes:
                yield batch, stored.tell() / size
                batch, held = [], 0
        if batch:
            yield batch, 1.0


def _parquet_batches(path: str, max_rows: int, max_bytes: int) -> Iterator[tuple[Any, float]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError(f"{path}: reading parquet needs pyarrow -> pip install pyarrow") from error
    try:
        read = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=max_rows):
                rows = max(1, len(batch) * max_bytes // max(batch.nbytes, 1))
                for start in range(0, len(batch), rows):
                    chosen = range(start, min(start + rows, len(batch)))
                    # A slice would be pickled with the whole batch.
                    part = batch if len(chosen) == len(batch) else batch.take(list(chosen))
                    read += len(part)
                    yield part, read / file.metadata.num_rows
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable parquet file ({error}) -> check the file") from error


def parse_chunk(chunk: RawChunk, problems: ProblemLog) -> Iterator[tuple[GroupRecord, str]]:
    """Parse rows into groups; yield ``(record, "file:line")`` of the good ones, note the others in ``problems``."""
    for row, place in iter_rows(chunk, problems):
        record = parse_group(row, place, problems)
        if record is not None:
            yield record, place


def iter_rows(chunk: RawChunk, problems: ProblemLog) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield ``(row, "file:line")`` as JSON values, groups or not; note unreadable rows in ``problems``.

    A row with ``responses`` in parquet is a group as :func:`write_group_file` writes them, and reads as in JSONL.
    """
    rows = chunk.rows if isinstance(chunk.rows, list) else _parquet_rows(chunk.rows)
    for offset, row in enumerate(rows):
        place = f"{chunk.path}:{chunk.first_row + offset * chunk.step}"
        if isinstance(row, bytes):
            value = None if row.isspace() else parse_json_line(row, place, problems)
        else:
            value = _parquet_row(row, place, problems)
        if value is not None:
            yield value, place


def iter_group_file(path: str | Path) -> Iterator[tuple[GroupRecord, str]]:
    """Yield ``(record, "file:line")`` of each group of a file, streaming.

    Raises:
        InputErrors: a row is not a group; the message lists the problems of that row.
    """
    problems = ProblemLog()
    for chunk in read_chunks(path, _PARQUET_BATCH):
        for item in parse_chunk(chunk, problems):
            refuse_problems(problems)
            yield item
        refuse_problems(problems)


def refuse_problems(problems: ProblemLog) -> None:
    """Forget the findings so far, if none is an error.

    Raises:
        InputErrors: some are. It names no policy: this is for tools that have none, only preprocessing has.
    """
    errors = [problem for problem in problems.take() if problem.action == ERROR]
    if errors:
        raise InputErrors("bad rows -> correct or remove them", [str(problem) for problem in errors])


def write_group_file(path: str | Path, records: Iterable[GroupRecord]) -> int:
    """Write groups to ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` (whole or not at all); return how many.

    Raises:
        InputError: unknown suffix.
    """
    name, count = str(path), 0
    if name.endswith(".parquet"):
        return _write_parquet(path, records)
    if not name.endswith(GROUP_FILE_SUFFIXES):
        raise InputError(f"{path}: unknown kind of group file -> use {', '.join(GROUP_FILE_SUFFIXES)}")
    with atomic_file(path) as temporary:
        with _open_to_write(temporary, name.endswith(".gz")) as file:
            for record in records:
                file.write(record_to_json(record).encode("utf-8") + b"\n")
                count += 1
    return count


@contextlib.contextmanager
def _open_to_write(path: Path, compressed: bool) -> Iterator[IO[bytes]]:
    with open(path, "wb") as file:
        if compressed:  # no name and no time in the header: the same groups give the same bytes
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
                yield cast(IO[bytes], packed)
        else:
            yield file


# --- parquet -----------------------------------------------------------------------------------------------------


def json_value(value: Any) -> Any:
    """A cell as JSON can hold it; bytes become an object, lest they pass for somebody's text."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    return json.loads(json.dumps(value, default=_json_twin))


def _json_twin(value: Any) -> Any:
    return {"base64": base64.b64encode(value).decode("ascii")} if isinstance(value, bytes) else str(value)


class _UnreadableRow(Exception):
    """A row with cells that Python cannot hold, and why; ``batch`` is the row."""

    def __init__(self, batch: Any, error: Exception):
        super().__init__(str(error))
        self.batch, self.is_bad_text = batch, isinstance(error, UnicodeDecodeError)


def _parquet_rows(batch: Any) -> list[dict[str, Any] | _UnreadableRow]:
    """Rows of a batch, each as far as it can be read."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:  # bad UTF-8, nanoseconds, dates beyond the year 9999
        if len(batch) == 1:
            return [_UnreadableRow(batch, error)]
    return [row for i in range(len(batch)) for row in _parquet_rows(batch.slice(i, 1))]


def _mended_row(batch: Any) -> dict[str, Any]:
    """The only row of a batch, with U+FFFD for bytes that are not UTF-8."""
    cells = (column.cast(_bytes_type(column.type)).to_pylist()[0] for column in batch.columns)
    return {field.name: _as_text(cell, field.type) for field, cell in zip(batch.schema, cells, strict=True)}


def _bytes_type(kind: Any) -> Any:
    """An Arrow type with bytes in place of text."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([field.with_type(_bytes_type(field.type)) for field in kind])
    if pyarrow.types.is_list(kind):
        return pyarrow.list_(_bytes_type(kind.value_type))
    return pyarrow.binary() if str(kind) in _TEXT_TYPES else kind


def _as_text(cell: Any, kind: Any) -> Any:
    """A cell of ``_bytes_type(kind)`` as one of ``kind``."""
    if isinstance(cell, dict):
        return {field.name: _as_text(cell[field.name], field.type) for field in kind}
    if isinstance(cell, list):
        return [_as_text(item, kind.value_type) for item in cell]
    return cell.decode("utf-8", "replace") if isinstance(cell, bytes) and str(kind) in _TEXT_TYPES else cell


def _parquet_row(row: dict[str, Any] | _UnreadableRow, place: str, problems: ProblemLog) -> dict[str, Any] | None:
    """One row as the same group in JSONL; None when a problem removes it."""
    if isinstance(row, _UnreadableRow):
        kind = "invalid_utf8" if row.is_bad_text else "wrong_type"
        if problems.found(kind, place, None, str(row)) != FIX:
            return None
        try:
            row = _mended_row(row.batch)
        except (ValueError, OverflowError, NotImplementedError) as error:  # something else is wrong with it too
            problems.found("wrong_type", place, None, str(error))
            return None
    if "responses" not in row:
        return {name: json_value(value) for name, value in row.items()}
    messages = row.pop("messages", None)
    if row.get("prompt") is None and messages is not None:
        row["prompt"] = messages
    unpacked = functools.partial(_unpacked, place=place, problems=problems)
    try:
        row["meta"] = unpacked(row.get("meta"))
        for message in _objects(row.get("prompt")):
            _add_extra(message, ("role", "content"), unpacked)
        for response in _objects(row["responses"]):
            response["sampling"] = unpacked(response.get("sampling"))
            _add_extra(response, RESPONSE_FIELDS, unpacked)
    except _LostRow:
        return None
    except (ValueError, RecursionError) as error:
        problems.found("invalid_json", place, None, f"in a column of JSON text: {error}")
        return None
    return {name: value if name in GROUP_FIELDS else json_value(value) for name, value in row.items()}


def _objects(items: Any) -> list[dict[str, Any]]:
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


class _LostRow(Exception):
    """A problem, noted already, removes the row."""


def _unpacked(value: Any, place: str, problems: ProblemLog) -> Any:
    """The value of a cell of JSON text.

    Raises:
        ValueError: it is not JSON.
        _LostRow: a problem removes the row.
    """
    if not isinstance(value, str):
        return json_value(value)
    read = json.loads(value)
    mended = without_surrogates(read, value, place, problems)
    if mended is None and read is not None:
        raise _LostRow
    return mended


def _add_extra(item: dict[str, Any], own: Sequence[str], unpacked: Callable[[Any], Any]) -> None:
    """Put the fields of ``extra`` (JSON text) into ``item``; the columns of others than us are fields too."""
    extra = unpacked(item.pop("extra", None)) or {}
    if not isinstance(extra, dict):
        raise ValueError(f"extra is {extra!r}, not an object")
    columns = {name: json_value(item.pop(name)) for name in [name for name in item if name not in own]}
    item.update({name: value for name, value in columns.items() if value is not None} | extra)


def _write_parquet(path: str | Path, records: Iterable[GroupRecord]) -> int:
    import pyarrow
    import pyarrow.parquet as parquet

    text = pyarrow.string()
    response = [(name, text) for name in ("text", "source", "outcome", "finish_reason", "model", "tokenizer")]
    response += [("reward", pyarrow.float64()), ("token_ids", pyarrow.list_(pyarrow.int32()))]
    response += [("logprobs", pyarrow.list_(pyarrow.float64())), ("sampling", text), ("extra", text)]
    message = pyarrow.list_(pyarrow.struct([("role", text), ("content", text), ("extra", text)]))
    schema = pyarrow.schema(
        [("id", text), ("prompt", text), ("messages", message), ("answer", text), ("meta", text)]
        + [("responses", pyarrow.list_(pyarrow.struct(response)))]
    )
    count, stream = 0, iter(records)
    with atomic_file(path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        while batch := list(itertools.islice(stream, _PARQUET_BATCH)):
            writer.write_table(pyarrow.Table.from_pylist([_parquet_value(r) for r in batch], schema=schema))
            count += len(batch)
    return count


def _parquet_value(record: GroupRecord) -> dict[str, Any]:
    text, messages = (record.prompt, None) if isinstance(record.prompt, str) else (None, record.prompt)
    responses = []
    for response in record.responses:
        value = {name: getattr(response, name) for name in RESPONSE_FIELDS}
        value["sampling"] = None if response.sampling is None else json.dumps(response.sampling)
        value["extra"] = json.dumps(response.extra) if response.extra else None
        responses.append(value)
    return {
        "id": record.id,
        "prompt": text,
        "messages": None if messages is None else [_parquet_message(message) for message in messages],
        "answer": record.answer,
        "responses": responses,
        "meta": json.dumps(record.meta) if record.meta else None,
    }


def _parquet_message(message: dict[str, Any]) -> dict[str, Any]:
    extra = {name: value for name, value in message.items() if name not in ("role", "content")}
    return {"role": message["role"], "content": message["content"], "extra": json.dumps(extra) if extra else None}
