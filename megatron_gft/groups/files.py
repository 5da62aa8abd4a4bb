"""Group files: one prompt with its responses, as text, one group a line (JSONL; parquet is read, too).

    {"id": "...", "prompt": "text" | [{"role", "content"}, ...], "answer": "gold" | null,
     "responses": [{"text", "source": "expert|teacher|self", "reward": 0.5 | null, "outcome": "correct|wrong|...",
                    "finish_reason": "stop|length", "model", "tokenizer", "token_ids", "logprobs", "sampling"}],
     "meta": {...}}

``tokenizer`` is the fingerprint of the tokenizer that made ``token_ids`` (see :mod:`megatron_gft.tokenizer`); without
it the ids are not trusted. Other fields of a group move into ``meta``, other fields of a response into ``extra``: a
tool that reads and writes groups loses nothing. Plain rows ``{question, answer}`` (GSM8K) or ``{problem, solution}``
are read as groups with one expert response; the gold answer is what follows ``####``, or the ``answer`` beside a
``solution``.

A file that begins with ``[`` is one JSON array of rows, read element by element; a place is then ``file:element``. Text
is UTF-8, or UTF-16 as some tools of Windows write it; byte-order marks are no part of it, wherever files were joined.

Parquet files are read, too, as the same rows in JSONL: a null field of a struct is absent, a map is an object. A prompt
of messages is in the column ``messages``; ``meta``, ``sampling`` and ``extra`` (further fields of a response or
message) are JSON text, as an earlier version wrote them. Cells that JSON cannot hold are read as text (dates and the
like) or as ``{"base64": "..."}`` (bytes).
"""

import codecs
import contextlib
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TextIO, cast

from megatron_gft.atomic import atomic_file, check_output
from megatron_gft.errors import InputError, refuse
from megatron_gft.groups.problems import ERROR, ProblemLog
from megatron_gft.groups.records import GroupRecord, parse_group, record_to_json
from megatron_gft.groups.rows import RawChunk, iter_rows
from megatron_gft.progress import ProgressBar

GROUP_FILE_SUFFIXES = (".jsonl", ".jsonl.gz")  # that can be written
_TEXT_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_ROWS_AT_ONCE = 1024
_PARTS_PER_READ = 16  # of many parts, chunks get smaller instead of reads larger
# A worker holds some 40 times the text while it tokenizes, and the last chunk is worked on alone: keep chunks small.
BYTES_PER_CHUNK = 256 << 10


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
    real = [os.path.realpath(name) for name in files]
    if twice := [name for name, path in zip(files, real, strict=True) if real.count(path) > 1]:
        raise InputError(f"{twice[0]}: input named twice -> name each file once")
    return files


def read_chunks(path: str | Path, rows_per_chunk: int = 256, *, part: int = 0, parts: int = 1) -> Iterator[RawChunk]:
    """Yield a group file (``.jsonl``, ``.json``, either with ``.gz``, ``.parquet``) in chunks of rows.

    Args:
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
        elif path.endswith(_TEXT_SUFFIXES):
            batches = _line_batches(path, read_rows, read_bytes)
        else:
            raise InputError(f"{path}: unknown kind of group file -> use .jsonl, .jsonl.gz or .parquet")
        first_row = 1
        for rows, fraction in batches:
            start = (part - (first_row - 1)) % parts
            if start < len(rows):
                mine = rows
                if parts > 1:
                    every = range(start, len(rows), parts)
                    mine = [rows[i] for i in every] if isinstance(rows, list) else rows.take([*every])
                yield RawChunk(path, first_row + start, mine, parts, fraction)
            first_row += len(rows)
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}) -> check the file") from error


def read_all(
    files: Sequence[str | Path],
    bar: ProgressBar,
    rows_per_chunk: int = 64,
    part_of: Callable[[str], int] = lambda name: 0,
    parts: int = 1,
) -> Iterator[RawChunk]:
    """Chunks of all files in order, as :func:`read_chunks`. ``bar.n`` is the bytes of those that were worked on."""
    before = 0
    for name in map(str, files):
        size = os.path.getsize(name)
        for chunk in read_chunks(name, rows_per_chunk, part=part_of(name), parts=parts):
            yield chunk
            bar.n = before + int(size * chunk.read_fraction)
        before += size
        bar.n = before


def _line_batches(path: str, max_rows: int, max_bytes: int) -> Iterator[tuple[list[bytes], float]]:
    size = max(os.path.getsize(path), 1)
    with open(path, "rb") as stored:
        batch: list[bytes] = []
        held = 0
        for line in _lines(gzip.GzipFile(fileobj=stored) if path.endswith(".gz") else stored, path):
            batch.append(line)
            held += len(line)
            if len(batch) == max_rows or held >= max_bytes:
                yield batch, stored.tell() / size
                batch, held = [], 0
        if batch:
            yield batch, 1.0


def _lines(file: Any, path: str) -> Iterator[bytes]:
    """Lines of a binary file, or the elements of its JSON array: UTF-8 without byte-order marks, none of them empty."""
    head = file.peek(64)
    wide = _WIDE.match(head) is not None
    encoding = json.detect_encoding(head[:4]) if wide else "utf-8-sig"
    if _ARRAY.match(head):
        text = io.TextIOWrapper(file, encoding, "strict" if wide else "surrogateescape", newline="")
        yield from (element.encode("utf-8", "surrogateescape") for element in _elements(text, path))
    elif wide:
        text = io.TextIOWrapper(file, encoding, newline="\n")
        yield from (line.lstrip("\ufeff").encode("utf-8") or b"\n" for line in text)
    else:
        yield from (line.removeprefix(codecs.BOM_UTF8) or b"\n" for line in file)


_WIDE = re.compile(rb"\xff\xfe|\xfe\xff|[{\[]\0|\0[{\[]")  # UTF-16, by its mark or by the first character
_ARRAY = re.compile(rb"(\xef\xbb\xbf|\xff\xfe|\xfe\xff)?[\0\s]*\[")
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")
_CHARACTERS_PER_READ = 1 << 16
_LONGEST_TOKEN = 12  # a pair of escapes: an error so near to the end of what was read may be no error of the text


def _elements(text: TextIO, path: str) -> Iterator[str]:
    """Texts of the elements of a JSON array (or of several, one behind the other). Behind one that is no JSON nothing
    can be told apart, so no policy may leave it out."""
    decode = json.JSONDecoder().raw_decode
    held, at, number, inside = "", 0, 1, False
    while True:
        at = _SPACE.match(held, at).end()  # type: ignore[union-attr]
        mark = held[at : at + 1]
        if mark and mark in ("],", "[")[not inside]:
            inside, at = mark != "]", at + 1
            continue
        try:
            _, end = decode(held, at)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deep")
            cut = reason.startswith("Unterminated string") or getattr(error, "pos", 0) >= len(held) - _LONGEST_TOKEN
            more = text.read(max(_CHARACTERS_PER_READ, len(held) - at)) if cut else ""
            if not more and not inside and at == len(held):
                return
            if not more:
                reason = "the array does not end" if at == len(held) else reason
                raise InputError(
                    f"{path}:{number}: element of a JSON array: {reason} -> correct the file, or write one object a "
                    "line (.jsonl), where a bad one costs no other"
                ) from None
            held, at = held[at:] + more, 0
            continue
        yield held[at:end]
        at, number = end, number + 1


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


def iter_group_file(path: str | Path) -> Iterator[tuple[GroupRecord, str]]:
    """Yield ``(record, "file:line")`` of each group of a file, streaming. Raises as :func:`iter_groups`."""
    return iter_groups(read_chunks(path, _ROWS_AT_ONCE))


def iter_groups(chunks: Iterable[RawChunk]) -> Iterator[tuple[GroupRecord, str]]:
    """Yield ``(record, "file:line")`` of each group.

    Raises:
        InputErrors: a row is not a group; the message lists the problems of that row.
    """
    problems = ProblemLog()
    for chunk in chunks:
        for item in parse_chunk(chunk, problems):
            refuse_problems(problems)
            yield item
        refuse_problems(problems)


def refuse_problems(problems: ProblemLog) -> None:
    """Forget the findings so far, unless some are errors: these are raised, and no policy is named, as only
    preprocessing has any."""
    errors = [problem for problem in problems.take() if problem.action == ERROR]
    refuse("bad rows -> correct or remove them", [str(problem) for problem in errors])


def output_problems(path: str | Path) -> list[str]:
    """What keeps a file of this name from being written as a group file."""
    if not str(path).endswith(GROUP_FILE_SUFFIXES):
        return [f"{path}: unknown kind of group file to write -> use {' or '.join(GROUP_FILE_SUFFIXES)}"]
    try:
        check_output(path)
    except InputError as error:
        return [str(error)]
    return []


def write_group_file(path: str | Path, records: Iterable[GroupRecord]) -> int:
    """Write groups to ``.jsonl`` or ``.jsonl.gz`` (whole or not at all); return how many."""
    count = 0
    for problem in output_problems(path):
        raise InputError(problem)
    with atomic_file(path) as temporary, open(temporary, "wb") as file, contextlib.ExitStack() as stack:
        lines: IO[bytes] = file
        if str(path).endswith(".gz"):  # no name and no time in the header: the same groups give the same bytes
            lines = cast(IO[bytes], stack.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0)))
        for record in records:
            lines.write(record_to_json(record).encode("utf-8") + b"\n")
            count += 1
    return count
