"""Rows of group files as JSON values: lines of JSONL, and parquet cells as JSON would hold them."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_gft.groups.problems import FIX, ProblemLog
from megatron_gft.groups.records import GROUP_FIELDS, RESPONSE_FIELDS, parse_json_line, without_surrogates

_TEXT_TYPES = ("string", "large_string")  # of Arrow


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
