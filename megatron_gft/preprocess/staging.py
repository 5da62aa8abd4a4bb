"""Shards on their way: a hidden folder beside the output where finished shards wait until all of a run are there.

An interrupted run leaves its staging folder; the same run continues after its last finished shard. Publishing moves
the shards to their names, each manifest last; it too continues where it was interrupted. A reader finds a shard only
when it is whole, and a set of shards only when it is complete (``ShardSet``).
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from megatron_gft.atomic import fsync_path, sha256_json, write_json
from megatron_gft.errors import InputError
from megatron_gft.groups.problems import Problem, report_lines
from megatron_gft.reading import read_json
from megatron_gft.shards import GroupShard, TokenizerStamp
from megatron_gft.shards.manifest import ShardSet, empty_part_path, manifest_path, read_manifest, write_manifest

_NEXT_REPORT = "next.report"  # of the shard that is being written


class Staging:
    """The staging folder of one output prefix; holds a lock while open.

    Args:
        plan: hash of everything that decides the shards' content; another plan starts anew.
        first_index: number of the first shard, unless the folder knows one already.

    Attributes:
        done: names of finished shards, in order.
        next_chunk: first chunk of the input that is in none of them.
        publishing: whether all shards were finished and only their publication remains.

    Raises:
        InputError: another process writes there, or an unpublished run of another plan is finished there.
    """

    def __init__(self, prefix: Path, plan: str, first_index: int):
        self.prefix, self.first_index = prefix, first_index
        self.done: list[str] = []
        self.next_chunk = 0
        self.folder = prefix.with_name(f".{prefix.name}.staging")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        run = self._read_json("run.json")
        self.publishing = self.waits_to_publish(prefix)
        if run is None or run.get("plan") != plan:
            if self.publishing:
                self.close()
                raise InputError(
                    f"{self.folder}: a finished run with other inputs or options waits to be published -> run it again "
                    "as it was, or remove that folder"
                )
            (self.folder / "run.json").unlink(missing_ok=True)  # first: without it nothing in the folder counts
            self._clear(keep=set())
            empty_part_path(prefix).unlink(missing_ok=True)
            write_json(self.folder / "run.json", {"plan": plan, "first_index": first_index})
        else:
            self.first_index = run["first_index"]
        while (state := self._read_json(f"{self.next_prefix.name}.state")) is not None:
            self.done.append(self.next_prefix.name)
            self.next_chunk = state["next_chunk"]
        if not self.publishing:
            names = {"run.json", *(f"{name}.{kind}" for name in self.done for kind in ("json", "state", "report"))}
            self._clear(names.union(*(read_manifest(self.folder / name).files for name in self.done)))

    @staticmethod
    def waits_to_publish(prefix: Path) -> bool:
        """Whether a run was interrupted while it published its shards."""
        folder = prefix.with_name(f".{prefix.name}.staging")
        return (folder / "run.json").exists() and (folder / "publish.json").exists()

    def _take_lock(self) -> IO[str]:
        lock = open(self.folder / "lock", "w")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked workers do not inherit this kind
        except OSError as error:
            lock.close()
            raise InputError(f"{self.folder}: another process writes {self.prefix} -> wait for it") from error
        return lock

    def close(self) -> None:
        """Give the lock back; finished shards stay for the next run."""
        self._lock.close()
        if not self.done and not self.publishing:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _read_json(self, name: str) -> Any:
        try:
            return read_json(self.folder / name)
        except InputError:
            return None

    def _clear(self, keep: set[str]) -> None:
        for path in self.folder.iterdir():
            if path.name not in keep and path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    @property
    def next_prefix(self) -> Path:
        """Where the next shard is written."""
        return self.folder / shard_name(self.prefix, self.first_index + len(self.done))

    def note(self, problems: Iterable[Problem]) -> None:
        """Add to the report of the shard that is being written."""
        with open(self.folder / _NEXT_REPORT, "a", encoding="ascii") as report:
            report.write(report_lines(problems))

    def add(self, next_chunk: int) -> None:
        """Remember the shard that was written to :attr:`next_prefix`, and its report."""
        self.note([])  # there is a report even of nothing
        fsync_path(self.folder / _NEXT_REPORT)
        name = self.next_prefix.name
        os.replace(self.folder / _NEXT_REPORT, self.folder / f"{name}.report")
        write_json(self.folder / f"{name}.state", {"next_chunk": next_chunk})
        self.done.append(name)

    def finish(self) -> None:
        """All shards are there."""
        set_id = sha256_json([read_manifest(self.folder / name).fingerprint for name in self.done])[:16]
        write_json(self.folder / "publish.json", {"set": set_id})
        self.publishing = True

    @property
    def report_path(self) -> Path:
        """The report that :meth:`publish` writes."""
        name = shard_name(self.prefix, self.first_index)
        return self.prefix.with_name(f"{name}.report.ndjson")  # no glob over group files finds it

    def publish(self) -> list[str]:
        """Move everything to its name; return the shards' prefixes. The folder is gone afterwards."""
        set_id = self._read_json("publish.json")["set"]
        prefixes = []
        for number, staged in enumerate(self.done):
            final = self.prefix.with_name(staged)
            prefixes.append(str(final))
            part = ShardSet(id=set_id, index=number, count=len(self.done))
            if manifest_path(final).exists():
                if read_manifest(final).shard_set != part:
                    raise InputError(f"{final}: another run made this shard meanwhile -> remove one of the two")
                continue  # published before an interruption
            manifest = read_manifest(self.folder / staged)
            for name in manifest.files:
                if (self.folder / name).exists():
                    os.replace(self.folder / name, final.with_name(name))
            fsync_path(final.parent)
            write_manifest(self.folder / staged, manifest.model_copy(update={"shard_set": part}))
            os.replace(manifest_path(self.folder / staged), manifest_path(final))
            fsync_path(final.parent)
        self.write_report()
        self.done.clear()
        self.publishing = False
        (self.folder / "run.json").unlink()  # first: without it nothing in the folder counts
        shutil.rmtree(self.folder)
        return prefixes

    def publish_empty(self, provenance: dict[str, Any]) -> None:
        """Say in ``PREFIX.empty`` that this part of the input gave no group: it is not missing."""
        self.write_report()
        write_json(self.folder / "empty", provenance)
        os.replace(self.folder / "empty", empty_part_path(self.prefix))
        fsync_path(self.prefix.parent)

    def write_report(self) -> None:
        """Write what was found in the input, beside the shards."""
        whole = self.folder / "report"
        with open(whole, "wb") as report:
            for name in [*(f"{name}.report" for name in self.done), _NEXT_REPORT]:
                if (self.folder / name).exists():
                    with open(self.folder / name, "rb") as lines:
                        shutil.copyfileobj(lines, report)
        fsync_path(whole)
        os.replace(whole, self.report_path)
        fsync_path(self.prefix.parent)


def shard_name(prefix: Path, index: int) -> str:
    """``PREFIX`` for 0, then ``PREFIX-00001``, ..."""
    return prefix.name if index == 0 else f"{prefix.name}-{index:05d}"


def existing_shards(prefix: Path) -> list[GroupShard]:
    """Shards 0, 1, ... of the prefix."""
    shards: list[GroupShard] = []
    while manifest_path(name := prefix.with_name(shard_name(prefix, len(shards)))).exists():
        shards.append(GroupShard(name))
    return shards


def check_existing(prefix: Path, shards: Sequence[GroupShard], append: bool, stamp: TokenizerStamp) -> None:
    """There are none, or they are of the same tokenizer and ``append`` is set; none is after a gap."""
    taken = re.compile(re.escape(prefix.name) + r"-(\d{5,})\.json")
    names = os.listdir(prefix.parent) if prefix.parent.is_dir() else []
    later = sorted(name for name in names if (match := taken.fullmatch(name)) and int(match[1]) >= len(shards))
    if later:
        raise InputError(
            f"{prefix.with_name(later[0])}: left of an earlier run, a shard before it is missing -> remove all shards "
            "of the prefix, or choose another"
        )
    if shards and not append:
        raise InputError(f"{shards[0].prefix}: the shard exists already -> append, choose another prefix, or remove it")
    for shard in shards:
        if shard.manifest.tokenizer != stamp:
            raise InputError(
                f"{shard.prefix}: made with another tokenizer, chat template or choice of BOS -> append with the same"
            )
