"""Rows of group files as JSON values: lines of JSONL, and parquet cells as JSON would hold them."""

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from megatron_gft.groups.problems import FIX, ProblemLog, raise_errors
from megatron_gft.groups.records import RESPONSE_FIELDS, GroupRecord, parse_group

_SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class RawChunk:
    """Rows of a group file, not parsed yet; cheap to send to a worker process.

    ``rows`` holds lines of a JSONL file or elements of a JSON array (bytes), or a pyarrow RecordBatch.
    """

    path: str
    first_row: int  # 1-based line (JSONL), element (JSON array) or row (parquet)
    rows: Any
    step: int = 1  # rows from one to the next
    read_fraction: float = 1.0  # of the file, after this chunk

    def __len__(self) -> int:
        return len(self.rows)


def iter_rows(chunk: RawChunk, problems: ProblemLog) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield ``(row, "file:line")`` as JSON values, groups or not; note unreadable rows in ``problems``.

    A row with ``responses`` in parquet is a group (columns: :mod:`megatron_gft.groups.files`), and reads as in JSONL.
    """
    lines = isinstance(chunk.rows, list)
    rows = chunk.rows if lines else _parquet_rows(chunk.rows)
    readers = {} if lines else {field.name: read for field in chunk.rows.schema if (read := _reader(field.type))}
    for offset, row in enumerate(rows):
        place = f"{chunk.path}:{chunk.first_row + offset * chunk.step}"
        if not isinstance(row, bytes):
            value = _parquet_row(row, readers, place, problems)
        else:
            value = None if row.isspace() else parse_json_line(row, place, problems)
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
    problems.found(place, None, "invalid_json", f"a JSON {type(value).__name__}, not an object")
    return None


def _parse_doubtful_line(line: bytes, place: str, problems: ProblemLog) -> Any:
    """Name what is wrong with a line, mend what the policies say, and take what only Python's parser takes."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        if problems.found(place, None, "invalid_utf8", f"{error.reason} at byte {error.start}") != FIX:
            return None
        text = line.decode("utf-8", "replace")
    try:
        value = _object(json.loads(text), place, problems)
        if value is None or not _SURROGATE_ESCAPE.search(text):
            return value
        return _without_surrogates(json.dumps(value, ensure_ascii=False), place, problems)
    except (ValueError, RecursionError) as error:
        problems.found(place, None, "invalid_json", str(error) or type(error).__name__)
        return None


def _without_surrogates(text: str, place: str, problems: ProblemLog) -> Any:
    """The value of JSON ``text`` without halves of surrogate pairs, which JSON may spell and no UTF-8 text can hold;
    None when the problem removes the row."""
    half = _SURROGATE.search(text)
    if half is not None and problems.found(place, None, "invalid_utf8", f"lone surrogate {half.group()!a}") != FIX:
        return None
    return json.loads(_SURROGATE.sub("\ufffd", text))


def _parquet_rows(batch: Any) -> list[Any]:
    """Rows of a batch as dicts; one with cells that Python cannot hold stays a batch of one row."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # bad UTF-8, nanoseconds, dates beyond the year 9999
        if len(batch) == 1:
            return [batch]
        return [row for i in range(len(batch)) for row in _parquet_rows(batch.slice(i, 1))]


def _reader(kind: Any) -> Callable[[Any], Any] | None:
    """What turns a cell of a pyarrow type into what JSON would hold; None where it is so already.

    Numbers of 16 and 32 bits are as their own type spells them: 0.1, not 0.10000000149011612. A struct has every field
    that one of all rows has: null ones are left out. A map is an object, and keeps them.
    """
    import numpy
    from pyarrow import types

    if types.is_float32(kind) or types.is_float16(kind):
        narrow = numpy.float32 if types.is_float32(kind) else numpy.float16
        return lambda value: float(str(narrow(value)))
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _reader(kind.value_type)
    if types.is_map(kind):
        item = _reader(kind.item_type)
        return lambda pairs: {str(key): _read(item, value) for key, value in pairs}
    if types.is_struct(kind):
        fields = {field.name: _reader(field.type) for field in kind}
        return lambda row: {name: _read(fields[name], item) for name, item in row.items() if item is not None}
    if hasattr(kind, "value_type") and (inner := _reader(kind.value_type)):  # every kind of list
        return lambda items: [_read(inner, item) for item in items]
    return None


def _read(reader: Callable[[Any], Any] | None, value: Any) -> Any:
    return value if reader is None or value is None else reader(value)


def _parquet_row(row: Any, readers: Mapping[str, Any], place: str, problems: ProblemLog) -> dict[str, Any] | None:
    """One row as the same group in JSONL, None when a problem removes it. Cells that JSON cannot hold become text,
    bytes an object, lest they pass for somebody's text."""
    read = row if isinstance(row, dict) else _doubtful_row(row, place, problems)
    if read is None:
        return None
    try:
        read |= {name: _read(reader, read[name]) for name, reader in readers.items()}
        if "responses" in read:
            read = {name: value for name, value in read.items() if value is not None or name == "responses"}
            _unpack_group(read)
        return _without_surrogates(json.dumps(read, default=_json_twin, ensure_ascii=False), place, problems)
    except (ValueError, RecursionError) as error:
        problems.found(place, None, "invalid_json", f"in a column of JSON text: {error}")
        return None


def _json_twin(value: Any) -> Any:
    return {"base64": base64.b64encode(value).decode("ascii")} if isinstance(value, bytes) else str(value)


def _doubtful_row(batch: Any, place: str, problems: ProblemLog) -> dict[str, Any] | None:
    """The row of a batch that Python cannot hold: what is wrong is noted, and mended if the policy says so."""
    try:
        try:
            return batch.to_pylist()[0]
        except UnicodeDecodeError as error:
            if problems.found(place, None, "invalid_utf8", str(error)) != FIX:
                return None
            return _mended(batch.to_struct_array()[0])
    except (ValueError, OverflowError, NotImplementedError) as error:
        problems.found(place, None, "wrong_type", str(error))
        return None


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


def _unpack_group(row: dict[str, Any]) -> None:
    """Put the values of JSON text in the place of the text."""
    if "meta" in row:
        row["meta"] = _unpacked(row["meta"])
    for message in _objects(row.get("prompt")) + _objects(row.get("messages")):
        _add_extra(message, ("role", "content"))
    for response in _objects(row["responses"]):
        response["sampling"] = _unpacked(response.get("sampling"))
        _add_extra(response, RESPONSE_FIELDS)


def cell(row: dict[str, Any], column: str, absent: Any = None) -> Any:
    """Cell of a column; ``reward_model.ground_truth`` is a field in one, ``turns.-1`` an item of a list."""
    value: Any = row
    parts = [column] if column in row else column.split(".")
    for part in parts:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.removeprefix("-").isdecimal() and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        else:
            return absent
    return value


def _objects(items: Any) -> list[dict[str, Any]]:
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _unpacked(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _add_extra(item: dict[str, Any], own: Sequence[str]) -> None:
    """Put the fields of ``extra`` (JSON text) into ``item``; the columns of others than us are fields too."""
    extra = _unpacked(item.pop("extra", None)) or {}
    if not isinstance(extra, dict):
        raise ValueError(f"extra is {extra!r}, not an object")
    columns = {name: item.pop(name) for name in [name for name in item if name not in own]}
    item.update({name: value for name, value in columns.items() if value is not None} | extra)
