"""Group shards: tokens of groups on disk, mapped into memory.

    shard = GroupShard("data/train")
    group = shard[0]                     # prompt, responses, sources, rewards, logprobs
    shard.prompt_lengths, shard.response_lengths, shard.rewards      # bulk arrays, no token is read

Files and how they are written: :mod:`megatron_gft.shards.writer`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import struct
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_gft.errors import InputError
from megatron_gft.groups import SOURCES
from megatron_gft.shards.encoded import PROMPT_MODE, EncodedGroups
from megatron_gft.shards.manifest import (
    ShardManifest,
    TokenizerStamp,
    check_sets,
    check_sizes,
    content_fingerprint,
    expand_shards,
    read_manifest,
    verify_shard,
    verify_shards,
)
from megatron_gft.shards.writer import GroupShardWriter, tokenizer_stamp

__all__ = [
    "Group",
    "GroupShard",
    "GroupShardWriter",
    "TokenizerStamp",
    "check_sets",
    "expand_shards",
    "tokenizer_stamp",
    "verify_shard",
    "verify_shards",
]


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
    """

    prompt: np.ndarray
    responses: list[np.ndarray]
    sources: np.ndarray
    rewards: np.ndarray
    logprobs: list[np.ndarray] | None


class GroupShard:
    """Reads one shard. Opening maps files and compares their sizes with the manifest; no token is read.

    Args:
        prefix: of the shard's files.

    Raises:
        InputError: a file is missing, truncated or does not match the manifest.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix).removesuffix(".json")
        self.manifest: ShardManifest = read_manifest(self.prefix)
        check_sizes(self.prefix, self.manifest)
        self._data = _open_indexed(self.prefix, multimodal=True)
        counts, index = self.manifest.counts, self._data.index
        found = (len(index.document_indices) - 1, len(index.sequence_lengths) - counts.groups, index.dtype)
        if found != (counts.groups, counts.responses, np.int32):
            raise InputError(f"{self.prefix}.idx: holds {found}, the manifest says {counts} -> preprocess again")
        self._documents = index.document_indices  # int64 [G + 1]: first sequence of each group
        self._lengths = index.sequence_lengths  # int32 [S]
        self._pointers = index.sequence_pointers  # int64 [S]: bytes
        self._modes = index.sequence_modes  # int8 [S]
        self.rewards = self._sidecar(self.manifest.judgement.rewards_file, counts.responses, np.float32)

    def __reduce__(self) -> tuple[type[GroupShard], tuple[str]]:
        return GroupShard, (self.prefix,)  # data-loader workers open the files themselves

    def __len__(self) -> int:
        return self.manifest.counts.groups

    def _sidecar(self, name: str, size: int, dtype: type) -> np.ndarray:
        path = Path(self.prefix).with_name(name)
        try:
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError, SyntaxError, tokenize.TokenError) as error:  # numpy parses its header
            raise InputError(f"{path}: cannot be read ({error}) -> preprocess again") from error
        if values.shape != (size,) or values.dtype != dtype:
            raise InputError(f"{path}: {values.dtype} {values.shape}, expected {dtype.__name__} ({size},)")
        return values.view(np.ndarray)  # a plain array slices faster than numpy.memmap; it keeps the map alive

    def __getitem__(self, i: int) -> Group:
        first, end = self._bounds(i)
        with self._reading():
            return self._group(i, first, end)

    def _group(self, i: int, first: int, end: int) -> Group:
        lengths = self._lengths[first:end].tolist()
        # A copy, because Megatron unmaps the file when its dataset goes, whoever still looks at it.
        tokens = self._data.bin_reader.read(np.int32, sum(lengths), int(self._pointers[first])).copy()
        position = lengths[0]
        responses = []
        for length in lengths[1:]:
            responses.append(tokens[position : position + length])
            position += length
        response = first - i  # each earlier group has one prompt
        rewards = self.rewards[response : response + len(responses)].copy()
        logprobs = None if self._logprobs is None else self._group_logprobs(i, first, lengths)
        return Group(tokens[: lengths[0]], responses, self._modes[first + 1 : end].copy(), rewards, logprobs)

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

    def lengths(self, i: int) -> tuple[int, list[int]]:
        """Tokens of the prompt and of each response of group ``i``; reads no token."""
        first, end = self._bounds(i)
        prompt, *responses = self._lengths[first:end].tolist()
        return prompt, responses

    def meta(self, i: int) -> dict[str, Any]:
        """``{"id", "answer"}`` of group ``i``, and ``"models"`` of its responses when known."""
        self._bounds(i)
        with self._reading():
            return _parse_meta(self._metas[i].tobytes())

    @functools.cached_property
    def _metas(self) -> IndexedDataset:
        return _open_indexed(f"{self.prefix}.meta", multimodal=False)

    def outcomes(self, i: int) -> list[str | None]:
        """What the verifier said about each response of group ``i``."""
        first, end = self._bounds(i)
        codes = self.outcome_codes
        names = [*self.manifest.judgement.outcome_names, None]  # code -1
        chosen = [-1] * (end - first - 1) if codes is None else codes[first - i : end - i - 1].tolist()
        with self._reading():
            return [names[code] for code in chosen]

    def spans(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of groups int64 [N]: prompt lengths, position of the first response among all, number of responses."""
        with self._reading():
            first = self._documents[groups]
            return self._lengths[first], first - groups, self._documents[groups + 1] - first - 1

    def columns(self, responses: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lengths, sources and rewards of responses at these positions, of these groups (int64 [M] both)."""
        sequences = responses + groups + 1  # each group up to its own has one prompt
        with self._reading():
            return self._lengths[sequences], self._modes[sequences], self.rewards[responses]

    def encoded(self, first: int, end: int) -> EncodedGroups:
        """Groups ``first`` to ``end`` (exclusive) in the form they were written in; log-probs are left out."""
        end = min(end, len(self))
        with self._reading():
            begin, stop = int(self._documents[first]), int(self._documents[end])
            lengths, modes = self._lengths[begin:stop].copy(), self._modes[begin:stop].copy()
            sizes = np.diff(self._documents[first : end + 1]).astype(np.int32)
            _check_sequences(lengths, modes, sizes)
            tokens = self._data.bin_reader.read(np.int32, int(lengths.sum()), int(self._pointers[begin]))
            metas = [self._metas[i].tobytes() for i in range(first, end)]
            for meta in metas:
                _parse_meta(meta)
            return EncodedGroups(
                tokens.copy(),
                lengths,
                modes,
                sizes,
                self.rewards[begin - first : stop - end].copy(),
                [outcome for i in range(first, end) for outcome in self.outcomes(i)],
                None,
                metas,
            )

    # --- bulk arrays, for planning ----------------------------------------------------------------------------------

    @property
    def response_offsets(self) -> np.ndarray:
        """int64 [G + 1]: position of each group's first response among all responses."""
        return self._documents - np.arange(len(self) + 1)

    @property
    def response_counts(self) -> np.ndarray:
        """int64 [G]: responses of each group."""
        return np.diff(self._documents) - 1

    @functools.cached_property
    def prompt_lengths(self) -> np.ndarray:
        """int32 [G]: tokens of each prompt."""
        with self._reading():
            return self._lengths[self._documents[:-1]]

    @functools.cached_property
    def _is_response(self) -> np.ndarray:
        with self._reading():
            chosen = self._modes != PROMPT_MODE
            if int(chosen.sum()) != self.manifest.counts.responses:
                raise ValueError("another number of responses")
            return chosen

    @functools.cached_property
    def response_lengths(self) -> np.ndarray:
        """int32 [M]: tokens of each response, in shard order."""
        return self._lengths[self._is_response]

    @functools.cached_property
    def sources(self) -> np.ndarray:
        """int8 [M]: source code of each response."""
        return self._modes[self._is_response]

    @functools.cached_property
    def outcome_codes(self) -> np.ndarray | None:
        """int8 [M]: index into ``manifest.judgement.outcome_names``, -1 unknown; None without outcomes."""
        name = self.manifest.judgement.outcomes_file
        return None if name is None else self._sidecar(name, self.manifest.counts.responses, np.int8)

    @functools.cached_property
    def _logprobs(self) -> np.ndarray | None:
        name = self.manifest.logprobs
        return None if name is None else self._sidecar(name, self.manifest.counts.response_tokens, np.float32)

    @functools.cached_property
    def _prompt_tokens_before(self) -> np.ndarray:
        """int64 [G]: prompt tokens of all earlier groups; log-probs are stored of response tokens only."""
        prompts = self.prompt_lengths.astype(np.int64)
        return np.cumsum(prompts) - prompts

    def _group_logprobs(self, i: int, first: int, lengths: list[int]) -> list[np.ndarray]:
        position = int(self._pointers[first]) // np.dtype(np.int32).itemsize - int(self._prompt_tokens_before[i])
        views = []
        for length in lengths[1:]:
            views.append(self._logprobs[position : position + length])  # type: ignore[index]
            position += length
        return views

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of what training reads (tokens, rewards in force, log-probs), by the manifest."""
        return content_fingerprint(self.manifest)


def _parse_meta(text: bytes) -> dict[str, Any]:
    meta = json.loads(text)
    if not isinstance(meta["id"], str) or not isinstance(meta["answer"], str | None):
        raise ValueError("a group without id and answer")
    return meta


def _check_sequences(lengths: np.ndarray, modes: np.ndarray, sizes: np.ndarray) -> None:
    """Each group, of ``sizes`` sequences, is a prompt and then responses of known sources."""
    prompts = np.flatnonzero(modes == PROMPT_MODE)
    known = (modes >= PROMPT_MODE) & (modes < len(SOURCES))
    if not (np.array_equal(prompts, np.cumsum(sizes) - sizes) and known.all() and (lengths > 0).all()):
        raise ValueError("sequences that are no groups")


class _Indexed(IndexedDataset):
    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # Megatron's expects that opening the files went well
            super().__del__()


def _open_indexed(prefix: str, multimodal: bool) -> IndexedDataset:
    try:
        return _Indexed(prefix, multimodal=multimodal)
    except (AssertionError, IndexError, KeyError, ValueError, OSError, struct.error) as error:
        raise InputError(
            f"{prefix}.idx: damaged index ({error or type(error).__name__}) -> preprocess again"
        ) from error
