"""Group shards: tokens of groups on disk, mapped into memory.

    shard = GroupShard("data/train")
    group = shard[0]                     # prompt, responses, sources, rewards, logprobs
    table = shard.table([5, 3, 8])       # lengths, sources and rewards of groups, no token is read

Files and how they are written: :mod:`megatron_gft.shards.writer`.
"""

import contextlib
import functools
import itertools
import json
import re
import struct
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_gft.errors import InputError
from megatron_gft.groups import SOURCES
from megatron_gft.shards.encoded import PROMPT_MODE, UNKNOWN_OUTCOME, EncodedGroups, sequence_counts
from megatron_gft.shards.manifest import ShardManifest, check_files, read_manifest

_ID = re.compile(rb'{"id":("(?:[^"\\]|\\.)*"),"answer":')  # in a group's JSON as EncodedGroups has it


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One group as tokens, from the shard to the pack. Arrays are copies, but for the log-probs (read-only views of
    the file).

    Attributes:
        prompt: int32 [P].
        responses: K arrays int32 [R_k], EOS included unless cut off.
        sources: int8 [K], index into ``groups.SOURCES``.
        rewards: float32 [K], NaN = none.
        logprobs: K arrays float32 [R_k] (NaN = unknown, e.g. of EOS), or None when the shard has none.
        reference: those of the reference model, likewise.
        ended: bool [K], whether the last token is EOS; None where nobody knows.
    """

    prompt: np.ndarray
    responses: list[np.ndarray]
    sources: np.ndarray
    rewards: np.ndarray
    logprobs: list[np.ndarray] | None
    reference: list[np.ndarray] | None = None
    ended: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class GroupTable:
    """Lengths, sources and rewards of N groups with M responses in all; no token.

    Attributes:
        prompt_lengths: int32 [N].
        offsets: int64 [N + 1]: first response of each group among the M.
        response_lengths: int32 [M].
        sources: int8 [M].
        rewards: float32 [M], NaN = none.
        ended: bool [M], whether the last token is EOS; empty unless it was asked for.
    """

    prompt_lengths: np.ndarray
    offsets: np.ndarray
    response_lengths: np.ndarray
    sources: np.ndarray
    rewards: np.ndarray
    ended: np.ndarray = field(default_factory=lambda: np.empty(0, bool))

    @classmethod
    def of_groups(cls, groups: Sequence[tuple[int, np.ndarray, np.ndarray, np.ndarray]]) -> "GroupTable":
        """Of groups given one by one: (prompt length, response lengths, sources, rewards); all end."""
        prompts, lengths, sources, rewards = zip(*groups, strict=True)
        return cls(
            np.array(prompts, np.int32),
            np.concatenate([[0], np.cumsum([len(of_group) for of_group in lengths])]),
            np.concatenate(lengths).astype(np.int32),
            np.concatenate(sources).astype(np.int8),
            np.concatenate(rewards).astype(np.float32),
            np.ones(sum(map(len, lengths)), bool),
        )

    @classmethod
    def merge(cls, owner: np.ndarray, tables: Sequence["GroupTable"]) -> "GroupTable":
        """Several tables as one: group i is the next one of table number ``owner[i]`` (int [N]), counted over those
        numbers that occur."""
        if len(tables) == 1:
            return tables[0]
        names = ("prompt_lengths", "response_counts", "response_lengths", "sources", "rewards", "ended")
        prompts, counts, *columns = (np.concatenate([getattr(table, name) for table in tables]) for name in names)
        places = np.argsort(np.argsort(owner, kind="stable"))  # of each group, one table after another
        responses = _runs((np.cumsum(counts) - counts)[places], counts[places])
        offsets = np.concatenate([[0], np.cumsum(counts[places])])
        return cls(prompts[places], offsets, *(column[responses] if len(column) else column for column in columns))

    @property
    def response_counts(self) -> np.ndarray:
        """int64 [N]: responses of each group."""
        return np.diff(self.offsets)

    def select(self, keep: np.ndarray) -> "GroupTable":
        """The groups with those responses where ``keep`` (bool [M]) is true."""
        kept_before = np.concatenate([[0], np.cumsum(keep)])
        ended = self.ended[keep] if len(self.ended) else self.ended
        columns = (self.response_lengths[keep], self.sources[keep], self.rewards[keep], ended)
        return GroupTable(self.prompt_lengths, kept_before[self.offsets], *columns)


def _runs(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``[starts[0], starts[0] + 1, ... (counts[0] of them), starts[1], ...]``."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))


class GroupShard:
    """Reads one shard. Opening maps its files, hashes all but what is bulk in the manifest and checks that they are
    groups; :mod:`megatron_gft.shards.verification` hashes the rest.

    Args:
        names: of the log-probs that a group brings, sampled and reference; None: none.

    Raises:
        InputError: a file is missing, damaged or does not match the manifest.
    """

    def __init__(self, prefix: str | Path, names: tuple[str | None, str | None] = ("sampled", None)):
        self.names = names
        self.prefix = str(prefix).removesuffix(".json")
        self.manifest: ShardManifest = read_manifest(self.prefix)
        check_files(self.prefix, self.manifest)
        self._data = _open_indexed(self.prefix, multimodal=True)
        index, counts, judgement = self._data.index, self.manifest.counts, self.manifest.judgement
        self._documents = index.document_indices  # int64 [G + 1]: first sequence of each group
        self._lengths = index.sequence_lengths  # int32 [S]
        self._pointers = index.sequence_pointers  # int64 [S]: bytes
        self._modes = index.sequence_modes  # int8 [S]
        self._check_index()
        self.rewards = self._sidecar(judgement.rewards_file, counts.responses, np.float32)
        if np.isinf(self.rewards).any():
            raise InputError(f"{self.prefix}: infinite rewards in {judgement.rewards_file} -> preprocess again")
        codes = self._sidecar(judgement.outcomes_file, counts.responses, np.int8)
        if codes is not None and not -1 <= codes.min() <= codes.max() < len(judgement.outcome_names):
            raise InputError(f"{self.prefix}: unknown codes in {judgement.outcomes_file} -> preprocess again")
        for name in self.manifest.logprob_files.values():
            self._sidecar(name, counts.response_tokens, np.float32)  # mapped when it is used

    def _check_index(self) -> None:
        """The index describes groups, those that the manifest counts, and nothing but them."""
        counts, documents, modes = self.manifest.counts, self._documents, self._modes
        _check_layout(self.prefix, self._data.index, np.int32, counts.groups, 2)
        metas = _open_indexed(f"{self.prefix}.meta", multimodal=False)
        _check_layout(f"{self.prefix}.meta", metas.index, np.uint8, counts.groups, 1)
        if len(metas.index) != counts.groups:
            raise InputError(f"{self.prefix}.meta.idx: damaged index, {len(metas.index)} ids -> preprocess again")
        is_prompt = np.zeros(len(modes), dtype=bool)
        is_prompt[documents[:-1]] = True
        if not np.array_equal(modes == PROMPT_MODE, is_prompt) or not -1 <= modes.min() <= modes.max() < len(SOURCES):
            raise InputError(f"{self.prefix}.idx: modes that are no prompts and sources -> preprocess again")
        found = sequence_counts(self._lengths, modes, documents[:-1])
        told = counts.model_dump(include=set(found))
        if found != told:
            raise InputError(f"{self.prefix}.idx: holds {found}, the manifest says {told} -> preprocess again")

    def __reduce__(self) -> tuple[type["GroupShard"], tuple[Any, ...]]:
        return GroupShard, (self.prefix, self.names)  # data-loader workers open the files themselves

    def __len__(self) -> int:
        return self.manifest.counts.groups

    def _sidecar(self, name: str | None, size: int, dtype: type) -> Any:
        """The array of ``size`` values in a file, None without one."""
        if name is None:
            return None
        path = Path(self.prefix).with_name(name)
        try:
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError, OverflowError, SyntaxError, tokenize.TokenError) as error:  # its header
            raise InputError(f"{path}: cannot be read ({error}) -> preprocess again") from error
        if values.shape != (size,) or values.dtype != dtype:
            raise InputError(f"{path}: {values.dtype} {values.shape}, expected {dtype.__name__} ({size},)")
        return values.view(np.ndarray)  # a plain array slices faster than numpy.memmap; it keeps the map alive

    def _tokens(self, first: int, count: int) -> np.ndarray:
        """int32 [count]: tokens from sequence ``first`` on. A copy, because Megatron unmaps the file when its dataset
        goes, whoever still looks at it."""
        tokens = self._data.bin_reader.read(np.int32, count, int(self._pointers[first])).copy()
        if int(tokens.view(np.uint32).max()) > self.manifest.counts.max_token_id:  # unsigned: a negative one is large
            raise ValueError(f"{self.prefix}.bin has a token id outside 0 to {self.manifest.counts.max_token_id}")
        return tokens

    def __getitem__(self, i: int) -> Group:
        first, end = self._bounds(i)
        response = first - i  # each earlier group has one prompt
        with self._reading():
            lengths = self._lengths[first:end].tolist()
            tokens = self._tokens(first, sum(lengths))
            prompt, *responses = _pieces(tokens, lengths)
            before = int(self.response_starts[i])
            logprobs = [known if known is None else _pieces(known[before:], lengths[1:]) for known in self._logprobs]
            rewards = self.rewards[response : response + len(responses)].copy()
            ended = tokens[np.cumsum(lengths)[1:] - 1] == self.manifest.tokenizer.eos_id
            sources = self._modes[first + 1 : end].copy()
            return Group(prompt, responses, sources, rewards, logprobs[0], logprobs[1], ended)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Name the shard when an index that was damaged since it was written leads nowhere."""
        try:
            yield
        except InputError:
            raise
        except (IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.prefix}: damaged shard ({type(error).__name__}: {error}) -> see what is damaged with "
                f"tools/inspect_groups.py {self.prefix} --verify; copy it again or preprocess again"
            ) from error

    def _bounds(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"group {i} of {len(self)} in {self.prefix}")
        return int(self._documents[i]), int(self._documents[i + 1])

    def meta(self, i: int) -> dict[str, Any]:
        """``{"id", "answer"}`` of group ``i``, and ``"models"`` of its responses when known."""
        self._bounds(i)
        with self._reading():
            return _parse_meta(self._metas[i].tobytes())

    def ids(self) -> list[str]:
        """Of all groups, in order."""
        with self._reading():
            found = _ID.findall(Path(f"{self.prefix}.meta.bin").read_bytes())
            if len(found) == len(self):
                return json.loads(b"[" + b",".join(found) + b"]")
            return [self.meta(i)["id"] for i in range(len(self))]

    @property
    def prompt_lengths(self) -> np.ndarray:
        """int32 [G]."""
        return self._lengths[self._documents[:-1]]

    @functools.cached_property
    def _metas(self) -> IndexedDataset:
        return _open_indexed(f"{self.prefix}.meta", multimodal=False)

    def outcomes(self, i: int) -> list[str | None]:
        """What the verifier said about each response of group ``i``."""
        first, end = self._bounds(i)
        names = [*self.manifest.judgement.outcome_names, None]  # code -1
        with self._reading():
            return [names[code] for code in self._outcome_codes[first - i : end - i - 1].tolist()]

    def table(self, groups: np.ndarray | None = None, *, ends: bool = False) -> GroupTable:
        """Lengths, sources and rewards of groups (int64 [N], any order, repeats allowed; None = all); with ``ends``
        also whether responses end with EOS, which reads the last token of each unless all do."""
        groups = np.arange(len(self)) if groups is None else groups
        with self._reading():
            prompts, after = self._documents[groups], self._documents[groups + 1]
            counts = after - prompts - 1
            if counts.min(initial=1) < 1 or after.max(initial=0) > len(self._lengths):
                raise ValueError("groups that are none")
            responses = _runs(prompts - groups, counts)
            sequences = responses + np.repeat(groups + 1, counts)  # each group up to its own has one prompt
            ended = np.ones(len(responses) if ends else 0, bool)
            if ends and self.manifest.counts.truncated:
                last = self._pointers[sequences] + 4 * (self._lengths[sequences].astype(np.int64) - 1)
                tokens = [self._data.bin_reader.read(np.int32, 1, place)[0] for place in last.tolist()]
                ended = np.array(tokens, np.int32) == self.manifest.tokenizer.eos_id
            return GroupTable(
                self._lengths[prompts],
                np.concatenate([[0], np.cumsum(counts)]),
                self._lengths[sequences],
                self._modes[sequences],
                self.rewards[responses],
                ended,
            )

    def encoded(self, first: int, end: int) -> EncodedGroups:
        """Groups ``first`` to ``end`` (exclusive) in the form they were written in; log-probs are left out."""
        end = min(end, len(self))
        with self._reading():
            begin, stop = int(self._documents[first]), int(self._documents[end])
            lengths, modes = self._lengths[begin:stop].copy(), self._modes[begin:stop].copy()
            sizes = np.diff(self._documents[first : end + 1]).astype(np.int32)
            metas = [self._metas[i].tobytes() for i in range(first, end)]
            for meta in metas:
                _parse_meta(meta)
            return EncodedGroups(
                self._tokens(begin, int(lengths.sum())),
                lengths,
                modes,
                sizes,
                self.rewards[begin - first : stop - end].copy(),
                [outcome for i in range(first, end) for outcome in self.outcomes(i)],
                None,
                metas,
            )

    @functools.cached_property
    def _outcome_codes(self) -> np.ndarray:
        """int8 [M]: index into ``manifest.judgement.outcome_names``, -1 = unknown."""
        count = self.manifest.counts.responses
        codes = self._sidecar(self.manifest.judgement.outcomes_file, count, np.int8)
        return np.full(count, UNKNOWN_OUTCOME, np.int8) if codes is None else codes

    @functools.cached_property
    def _logprobs(self) -> list[np.ndarray | None]:
        """Those of ``names`` that the shard has, each float32 [response tokens]."""
        files, count = self.manifest.logprob_files, self.manifest.counts.response_tokens
        return [self._sidecar(files.get(name or ""), count, np.float32) for name in self.names]

    @functools.cached_property
    def response_starts(self) -> np.ndarray:
        """int64 [G + 1]: response tokens of all earlier groups, which is where a group's log-probs begin in a file."""
        before = np.append(self._pointers[self._documents[:-1]] // 4, self._lengths.sum(dtype=np.int64))
        return before - np.concatenate([[0], np.cumsum(self.prompt_lengths, dtype=np.int64)])


def _pieces(values: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    """Views of one piece after another, of these lengths."""
    ends = itertools.accumulate(lengths)
    return [values[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _parse_meta(text: bytes) -> dict[str, Any]:
    meta = json.loads(text)
    if not isinstance(meta["id"], str) or not isinstance(meta["answer"], str | None):
        raise ValueError("a group without id and answer")
    return meta


def _check_layout(prefix: str, index: Any, dtype: type, groups: int, fewest: int) -> None:
    """One sequence follows another through all of ``PREFIX.bin``, and ``groups`` documents have ``fewest`` or more."""
    lengths, pointers, documents = index.sequence_lengths, index.sequence_pointers, index.document_indices
    ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(dtype).itemsize
    size = Path(f"{prefix}.bin").stat().st_size
    rules = {
        f"its dtype is not {dtype.__name__}": index.dtype == dtype,
        "sequences without length": (lengths > 0).all(),
        "pointers that are not those of one sequence after another": np.array_equal(
            np.append(pointers, size), np.append(0, ends)
        ),
        f"documents that are not {groups} groups": len(documents) == groups + 1
        and documents[0] == 0
        and documents[-1] == len(lengths)
        and (np.diff(documents) >= fewest).all(),
    }
    for problem, holds in rules.items():
        if not holds:
            raise InputError(f"{prefix}.idx: damaged index, {problem} -> preprocess again")


class _Indexed(IndexedDataset):
    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # Megatron's expects that opening the files went well
            super().__del__()


def _open_indexed(prefix: str, multimodal: bool) -> IndexedDataset:
    try:
        return _Indexed(prefix, multimodal=multimodal)
    except OSError as error:  # such as too many open files
        raise InputError(f"{prefix}: cannot be opened ({error.strerror}) -> see to it, then start again") from error
    except (AssertionError, IndexError, KeyError, OverflowError, ValueError, struct.error) as error:
        raise InputError(
            f"{prefix}.idx: damaged index ({error or type(error).__name__}) -> preprocess again"
        ) from error
