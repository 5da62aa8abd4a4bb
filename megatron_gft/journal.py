"""Append-only record of finished work, so that a killed run continues with nothing lost and nothing done twice.

One line is the checksum of a JSON value, a space, the value: ``{"key": ..., "value": ...}``; the first value is a
header that says what the journal is for. A line goes to the file in one ``write``, so a killed process loses no
line that it appended; ``fsync`` every so often bounds what a power cut can take. When a journal is opened, a torn
last line is cut off and a line whose checksum is wrong is left out and counted: its work is simply done again. A file
that is anything else is refused untouched.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_gft.atomic import writing
from megatron_gft.errors import InputError

CHECKSUM_CHARS = 16
SYNC_SECONDS = 1.0


class Journal:
    """A file of ``key -> value`` records, created when absent; opening it reads what is there and takes the lock.

    Attributes:
        header: what the journal is for, as the file has it; the caller decides whether it fits.
        damaged: lines left out because their checksum was wrong.
        torn: bytes cut off at the end.

    Raises:
        InputError: another process has the journal open, the file is not a journal, or it cannot be written (here and
            in every method that writes).
    """

    def __init__(self, path: str | os.PathLike, header: Mapping[str, Any]):
        self.path = Path(path)
        self._offsets: dict[str, int] = {}
        self.damaged = self.torn = self._end = 0
        with self._writing(), contextlib.ExitStack() as on_failure:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            on_failure.callback(os.close, self._file)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{path}: in use by another run -> wait for it, or choose another output") from None
            found = self._load(_line({"header": dict(header)}))
            if found is None:
                self._write({"header": dict(header)})
            self.header: dict[str, Any] = dict(header) if found is None else found
            self.sync()
            on_failure.pop_all()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, key: str) -> Any:
        """Read a value back from the file (checksum verified again)."""
        offset = self._offsets[key]
        with open(self._file, "rb", closefd=False) as file:
            file.seek(offset)
            record = _decode(file.readline())
        if record is None or record.get("key") != key:
            raise InputError(f"{self.path}: record at byte {offset} was damaged since it was read -> run again")
        return record["value"]

    def append(self, key: str, value: Any) -> None:
        """Add a record; a key is written once only."""
        if key in self._offsets:
            raise ValueError(f"journal already holds {key!r}")
        offset = self._write({"key": key, "value": value})
        self._offsets[key] = offset
        if time.monotonic() - self._synced_at > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Force what was appended to the disk."""
        with self._writing():
            os.fsync(self._file)
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Sync and release the lock."""
        if self._file >= 0:
            try:
                self.sync()
            finally:
                os.close(self._file)
                self._file = -1

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing(self.path, "what is in there is kept")

    def _write(self, record: Mapping[str, Any]) -> int:
        line, offset = _line(record), self._end
        with self._writing():
            try:
                written = os.write(self._file, line)
                while written < len(line):  # next time the system says why
                    written += os.write(self._file, line[written:])
            except OSError:
                os.ftruncate(self._file, offset)  # no half line that the next append would be glued to
                raise
        self._end += len(line)
        return offset

    def _load(self, header_line: bytes) -> dict[str, Any] | None:
        """Index the records; cut off a torn end: of the first line only what begins as ``header_line``, which this run
        would write. The header, or ``None`` for a new file."""
        header = None
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                is_torn = not line.endswith(b"\n")
                record = None if is_torn else _decode(line)
                is_ours = header_line.startswith(line) if is_torn else record is not None and "header" in record
                if number == 0 and not is_ours:
                    raise InputError(f"{self.path}:1: not a journal of this program -> choose another output")
                if is_torn:
                    self.torn = len(line)
                    break
                if number == 0:
                    header = record["header"] if record else None
                elif record is None:
                    self.damaged += 1
                elif "key" not in record:
                    raise InputError(
                        f"{self.path}:{number + 1}: a second journal begins here -> keep the lines above, or those "
                        "from here on"
                    )
                else:
                    self._offsets.setdefault(record["key"], self._end)
                self._end += len(line)
        if self.torn:
            os.ftruncate(self._file, self._end)
        return header


def _line(record: Mapping[str, Any]) -> bytes:
    payload = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return _checksum(payload) + b" " + payload + b"\n"


def _checksum(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=CHECKSUM_CHARS // 2).hexdigest().encode()


def _decode(line: bytes) -> dict[str, Any] | None:
    """The JSON value of a line, or ``None`` when the checksum does not fit."""
    checksum, payload = line[:CHECKSUM_CHARS], line[CHECKSUM_CHARS + 1 : -1]
    if checksum != _checksum(payload) or line[CHECKSUM_CHARS : CHECKSUM_CHARS + 1] != b" ":
        return None
    return json.loads(payload.decode("utf-8", "surrogatepass"))
