"""Whether shards are what was written: every byte by its sha256, and no group in two of them.

Opening a shard reads its index and sidecars. Tokens are many: the processes of a run share them, block by block, and
what was verified once is not read again while the file stays as it is.
"""

import contextlib
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_gft.atomic import write_json
from megatron_gft.errors import InputError, InputErrors, refuse
from megatron_gft.hf.shared_folder import gather_results, process_rank_and_count
from megatron_gft.progress import ProgressBar, total_bytes
from megatron_gft.reading import read_json
from megatron_gft.shards.manifest import BLOCK_BYTES, ShardManifest, file_problem, incomplete_sets, read_manifest
from megatron_gft.shards.reader import GroupShard

logger = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 20  # stays in a processor's cache from the hash to the maximum
_REMEDY = "copy them again or preprocess again"


@dataclass(frozen=True)
class _Block:
    """Bytes of a file that have one sha256; ``largest_token`` for those that are token ids."""

    path: Path
    place: str
    start: int
    bytes: int
    sha256: str
    largest_token: int | None

    def problem(self) -> str | None:
        """What is wrong with it."""
        digest, largest = hashlib.sha256(), 0
        try:
            data = np.memmap(self.path, np.uint8, "r", self.start, (self.bytes,)).view(np.ndarray)  # spares a copy
        except (OSError, ValueError) as error:  # the latter: shorter than it was
            return f"{self.path}: cannot be read ({error})"
        for start in range(0, self.bytes, _PIECE_BYTES):
            piece = data[start : start + _PIECE_BYTES]
            digest.update(piece.data)
            if self.largest_token is not None:  # unsigned: negative ids are large ones
                largest = max(largest, int(piece[: len(piece) // 4 * 4].view(np.uint32).max(initial=0)))
        if digest.hexdigest() != self.sha256:
            return f"{self.path}: content differs from the manifest{self.place}"
        if self.largest_token is not None and largest > self.largest_token:
            return f"{self.path}: has token id {largest}, the manifest says at most {self.largest_token}{self.place}"
        return None


def _blocks(prefix: str, manifest: ShardManifest, name: str) -> Iterator[_Block]:
    """The blocks of a file, or all of it where its manifest has no hashes of blocks."""
    entry, path = manifest.files[name], Path(prefix).with_name(name)
    largest = manifest.counts.max_token_id if name == manifest.tokens_file else None
    if entry.blocks is None:
        yield _Block(path, "", 0, entry.bytes, entry.sha256, largest)
        return
    for number, sha256 in enumerate(entry.blocks):
        start, end = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, entry.bytes)
        place = f" in block {number} of {len(entry.blocks)} (bytes {start} to {end})"
        yield _Block(path, place, start, end - start, sha256, largest)


def verify_shards(prefixes: Iterable[str | Path]) -> None:
    """Read every byte of shards and compare with their manifests; sets of shards must be complete.

    Raises:
        InputErrors: one line for each damaged manifest, damaged file or block, and incomplete set, of all shards.
    """
    problems, shards, names = list[str](), [], [*map(str, prefixes)]
    bulk = [path for prefix in names if (path := Path(f"{prefix}.bin")).is_file()]
    with ProgressBar(None, "verifying shards", total=total_bytes(bulk), unit="B") as bar:
        for prefix in names:
            try:
                manifest = read_manifest(prefix)
            except InputError as error:
                problems.append(str(error))
                continue
            shards.append((prefix, manifest))
            try:
                GroupShard(prefix)
            except InputErrors as error:
                problems += error.problems
            except InputError as error:
                problems.append(str(error))
            for name in manifest.bulk_files:
                if file_problem(Path(prefix).with_name(name), manifest.files[name], contents=False) is None:
                    problems += _problems(_blocks(prefix, manifest, name), bar)
    problems += incomplete_sets(shards)
    refuse(f"damaged or incomplete shards -> {_REMEDY}", problems)


def _problems(blocks: Iterable[_Block], bar: ProgressBar) -> list[str]:
    found = []
    for block in blocks:
        found.append(block.problem())
        bar.update(block.bytes)
    return [*filter(None, found)]


def verify_at_start(shards: Sequence[GroupShard], stamps: Path) -> None:
    """Compare what opening the shards did not read with their hashes, every process its share. Collective.

    Args:
        stamps: JSON file of the run that remembers which files were verified, by size, times and inode.

    Raises:
        InputErrors: on all processes, with shard, file and block of everything that differs.
    """
    started, (rank, processes) = time.perf_counter(), process_rank_and_count()
    files = [(shard, name) for shard in shards for name in shard.manifest.bulk_files]
    marks = gather_results(lambda: [_mark(shard, name) for shard, name in files])
    known = gather_results(lambda: _read_stamps(stamps) if rank == 0 else set())[0]
    # Processes that see the same inodes share the work; a machine with copies of its own reads all of them.
    peers = [other for other in range(processes) if marks[other] == marks[rank]]
    blocks = [
        block
        for (shard, name), mark in zip(files, marks[rank], strict=True)
        if mark not in known
        for block in _blocks(shard.prefix, shard.manifest, name)
    ]
    # Of blocks by size every so-manyth: shares differ by one block at most.
    mine = sorted(blocks, key=lambda block: -block.bytes)[peers.index(rank) :: len(peers)]
    size = sum(block.bytes for block in mine)
    with ProgressBar(None, "verifying shards", total=size, unit="B", show=rank == 0) as bar:
        found = gather_results(lambda: _problems(mine, bar))
    refuse(f"damaged shards -> {_REMEDY}", sorted(set(itertools.chain(*found))))
    if rank == 0 and (new := set(itertools.chain(*marks))) - known:
        with contextlib.suppress(OSError):  # the next start reads them again
            write_json(stamps, sorted(new))
    logger.info(
        "data.verify: %.3f GB are as written, %.3f GB unchanged since an earlier start (%.2f s, %d processes)",
        (size := sum(block.bytes for block in blocks)) / 1e9,
        (sum(shard.manifest.files[name].bytes for shard, name in files) - size) / 1e9,
        time.perf_counter() - started,
        processes,
    )


def _mark(shard: GroupShard, name: str) -> str:
    """What a file's content cannot change without."""
    path = Path(shard.prefix).with_name(name)
    found = path.stat()
    facts = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, shard.manifest.files[name].sha256)
    return " ".join(map(str, (path.absolute(), *facts)))


def _read_stamps(path: Path) -> set[str]:
    try:
        return set(read_json(path, kind=list[str]))
    except InputError:
        return set()  # everything is read again


def check_repeated_groups(shards: Sequence[GroupShard]) -> None:
    """No group is in two shards: neither trained twice nor validated on what was trained.

    The same id with another prompt is another group; that is only told, as a warning.

    Raises:
        InputError: names both shards and the id.
    """
    if len(shards) < 2:
        return
    owner = np.repeat(np.arange(len(shards)), [len(shard) for shard in shards])
    first = np.cumsum([0, *map(len, shards)])
    ids = np.concatenate([np.fromiter(map(hash, shard.ids()), np.int64, len(shard)) for shard in shards])
    lengths = np.concatenate([shard.prompt_lengths for shard in shards]).astype(np.int64)
    seen: dict[tuple[str, bytes], str] = {}
    for position in _in_several(ids ^ (lengths << 40), owner).tolist():
        shard, i = shards[owner[position]], position - int(first[owner[position]])
        group_id = shard.meta(i)["id"]
        other = seen.setdefault((group_id, shard[i].prompt.tobytes()), shard.prefix)
        if other != shard.prefix:
            raise InputError(
                f"{shard.prefix}: group {i} (id {group_id!r}) is in {other}, too, with the same prompt -> leave one of "
                "them out, or preprocess their group files together, which finds duplicates (duplicate_id)"
            )
    if len(shared := _in_several(ids, owner)) and os.environ.get("RANK", "0") == "0":
        one = int(shared[0])
        two = int(np.flatnonzero((ids == ids[one]) & (owner != owner[one]))[0])
        logger.warning(
            "%s and %s: the same ids with other prompts, such as %r -> give other problems ids of their own; the same "
            "problems are trained twice, or validated on",
            *(shards[owner[one]].prefix, shards[owner[two]].prefix),
            shards[owner[one]].meta(one - int(first[owner[one]]))["id"],
        )


def _in_several(keys: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Positions whose key (int64 [N]) several owners (int [N], ascending) have; equal keys one after another."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order[:1]] + 1))
    ends = np.append(starts[1:], len(keys))
    several = owner[order[starts]] != owner[order[ends - 1]]
    return order[np.repeat(several, ends - starts)]
