"""Rows of group files as JSON values: lines of JSONL, and parquet cells as JSON would hold them."""

from __future__ import annotations

import base64
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from pydantic_core import from_json

from megatron_gft.groups.problems import FIX, ProblemLog, raise_errors
from megatron_gft.groups.records import GROUP_FIELDS, RESPONSE_FIELDS, GroupRecord, parse_group

_SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


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


def iter_rows(chunk: RawChunk, problems: ProblemLog) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield ``(row, "file:line")`` as JSON values, groups or not; note unreadable rows in ``problems``.

    A row with ``responses`` in parquet is a group (columns: :mod:`megatron_gft.groups.files`), and reads as in JSONL.
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


def record_from_json(text: str | bytes, place: str = "<text>") -> GroupRecord:
    """Parse one line of a group file.

    Raises:
        InputErrors: it is not a group; ``place`` is named.
    """
    problems = ProblemLog()
    line = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    value = parse_json_line(line, place, problems)
    record = None if value is None else parse_group(value, place, problems)
    raise_errors(problems.take())
    if record is None:  # every way to lose a record is an error under the default policies
        raise AssertionError(f"{place}: lost without a problem")
    return record


def parse_json_line(line: bytes, place: str, problems: ProblemLog) -> Any:
    """The object of a line, or None when a problem removes it."""
    try:
        value = from_json(line)  # twice as fast as json, and refuses all that needs a closer look
    except ValueError:
        return _parse_doubtful_line(line, place, problems)
    return _object(value, place, problems)


def _object(value: Any, place: str, problems: ProblemLog) -> dict[str, Any] | None:
    if isinstance(value, dict):
        return value
    problems.found("invalid_json", place, None, f"a JSON {type(value).__name__}, not an object")
    return None


def _parse_doubtful_line(line: bytes, place: str, problems: ProblemLog) -> Any:
    """Name what is wrong with a line, mend what the policies say, and take what only Python's parser takes."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        if problems.found("invalid_utf8", place, None, f"{error.reason} at byte {error.start}") != FIX:
            return None
        text = line.decode("utf-8", "replace")
    try:
        checked = _object(json.loads(text), place, problems)
        return None if checked is None else _without_surrogates(checked, text, place, problems)
    except (ValueError, RecursionError) as error:
        problems.found("invalid_json", place, None, str(error) or type(error).__name__)
        return None


def _without_surrogates(value: Any, text: str, place: str, problems: ProblemLog) -> Any:
    """The value of JSON ``text`` without halves of surrogate pairs, which JSON may spell and no UTF-8 text can hold.

    Returns:
        The value, mended where the policy says so; None when the problem removes the row.
    """
    if not _SURROGATE_ESCAPE.search(text):
        return value
    plain = json.dumps(value, ensure_ascii=False)
    half = _SURROGATE.search(plain)
    if half is None:
        return value
    if problems.found("invalid_utf8", place, None, f"lone surrogate {half.group()!a}") != FIX:
        return None
    return json.loads(_SURROGATE.sub("\ufffd", plain))


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
        rows = batch.to_pylist()
        _shorten_decimals(rows, batch.schema)
        return rows
    except (ValueError, OverflowError) as error:  # bad UTF-8, nanoseconds, dates beyond the year 9999
        if len(batch) == 1:
            return [_UnreadableRow(batch, error)]
    return [row for i in range(len(batch)) for row in _parquet_rows(batch.slice(i, 1))]


def _shorten_decimals(rows: list[dict[str, Any]], schema: Any) -> None:
    """Numbers of 16 and 32 bits as their own type spells them: 0.1, not 0.10000000149011612."""
    narrow = {"float": numpy.float32, "halffloat": numpy.float16}
    for field in schema:
        if kind := narrow.get(str(field.type)):
            for row in rows:
                if row[field.name] is not None:
                    row[field.name] = float(str(kind(row[field.name])))


def _mended(cell: Any) -> Any:
    """Value of a pyarrow scalar, with U+FFFD for bytes of its texts that are not UTF-8."""
    import pyarrow

    if not cell.is_valid:
        return None
    if isinstance(cell, pyarrow.StructScalar):
        return {name: _mended(item) for name, item in cell.items()}
    if type(cell) in (pyarrow.ListScalar, pyarrow.LargeListScalar):
        return [_mended(item) for item in cell]
    if isinstance(cell, pyarrow.StringScalar):
        return cell.as_buffer().to_pybytes().decode("utf-8", "replace")
    return cell.as_py()


def _parquet_row(read: dict[str, Any] | _UnreadableRow, place: str, problems: ProblemLog) -> dict[str, Any] | None:
    """One row as the same group in JSONL; None when a problem removes it."""
    if isinstance(read, dict):
        row = read
    else:
        kind = "invalid_utf8" if read.is_bad_text else "wrong_type"
        if problems.found(kind, place, None, str(read)) != FIX:
            return None
        try:
            row = _mended(read.batch.to_struct_array()[0])
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
    mended = _without_surrogates(read, value, place, problems)
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
