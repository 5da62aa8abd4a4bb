"""Shards or group files behind one face for ``tools/inspect_groups.py``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_gft.data.encoded_groups import PROMPT_MODE
from megatron_gft.data.encoding import ChunkEncoder, EncodingOptions
from megatron_gft.data.inspection import LENIENT, PackingQuestion, inspect_group_files, inspect_shards
from megatron_gft.data.inspection_view import GroupView, view_group
from megatron_gft.errors import InputError
from megatron_gft.groups import RawChunk, expand_inputs, read_chunks
from megatron_gft.shards import Group, GroupShard, expand_shards, verify_shard
from megatron_gft.tokenizer import NO_TEMPLATE, Tokenizer, load_tokenizer

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


class InspectedSource(Protocol):
    """Something to look into."""

    def verify(self) -> list[str]:
        """Check every byte; names of what was checked."""

    def group(self, number: int) -> GroupView:
        """Group ``number``, decoded."""

    def report(self, max_tokens_per_pack: int | None, groups_per_step: int) -> dict[str, Any]:
        """Statistics and problems."""


def open_source(inputs: Sequence[str], tokenizer: str | None, chat_template: str | None) -> InspectedSource:
    """Group files when all inputs are named like them, else shards.

    Raises:
        InputError: missing inputs, both kinds at once, or a tokenizer that did not make the shards.
    """
    are_files = [name.endswith(FILE_SUFFIXES) for name in inputs]
    if all(are_files):
        loaded = None if tokenizer is None else load_tokenizer(tokenizer, chat_template)
        return _Files(expand_inputs(inputs), loaded)
    if any(are_files):
        raise InputError("group files and shards at once -> inspect them one by one")
    prefixes = expand_shards(inputs)
    # The template is already in the tokens of a shard.
    loaded = None if tokenizer is None else load_tokenizer(tokenizer, NO_TEMPLATE, add_bos=False)
    return _Shards([GroupShard(prefix) for prefix in prefixes], loaded)


def _packing(max_tokens_per_pack: int | None, groups_per_step: int) -> PackingQuestion | None:
    return None if max_tokens_per_pack is None else PackingQuestion(max_tokens_per_pack, groups_per_step)


@dataclass
class _Shards:
    shards: list[GroupShard]
    tokenizer: Tokenizer | None

    def verify(self) -> list[str]:
        for shard in self.shards:
            verify_shard(shard.prefix)
        return [shard.prefix for shard in self.shards]

    def report(self, max_tokens_per_pack: int | None, groups_per_step: int) -> dict[str, Any]:
        return inspect_shards([s.prefix for s in self.shards], _packing(max_tokens_per_pack, groups_per_step))

    def group(self, number: int) -> GroupView:
        total = sum(map(len, self.shards))
        if self.tokenizer is None:
            raise InputError("--group needs --tokenizer, the one that made the shard")
        if not 0 <= number < total:
            raise InputError(f"--group {number}: there are groups 0 to {total - 1}")
        for shard in self.shards:
            if number < len(shard):
                break
            number -= len(shard)
        if shard.manifest.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise InputError(f"{shard.prefix}: made with another tokenizer than {self.tokenizer.path}")
        meta = shard.meta(number)
        title = f"{shard.prefix} group {number}, id {meta['id']}"
        return view_group(shard[number], self.tokenizer, title, meta["answer"], shard.outcomes(number))


@dataclass
class _Files:
    files: list[str]
    tokenizer: Tokenizer | None

    def verify(self) -> list[str]:
        raise InputError("--verify: group files have no manifest to compare with -> give shards")

    def report(self, max_tokens_per_pack: int | None, groups_per_step: int) -> dict[str, Any]:
        return inspect_group_files(self.files, self.tokenizer, _packing(max_tokens_per_pack, groups_per_step))

    def group(self, number: int) -> GroupView:
        if self.tokenizer is None:
            raise InputError("--group needs --tokenizer")
        chunk = self._row(number)
        encoded = ChunkEncoder(self.tokenizer, EncodingOptions(LENIENT)).encode(chunk)
        place = f"{chunk.path}:{chunk.first_row}"
        if not len(encoded.groups):
            raise InputError(f"{place}: not a usable group: " + "; ".join(map(str, encoded.problems)))
        groups = encoded.groups
        parts = np.split(groups.tokens, np.cumsum(groups.sequence_lengths)[:-1])
        logprobs = None
        if groups.logprobs is not None:
            logprobs = np.split(groups.logprobs, np.cumsum(groups.sequence_lengths[1:])[:-1])
        sources = groups.sequence_modes[groups.sequence_modes != PROMPT_MODE]
        group = Group(parts[0], parts[1:], sources, groups.rewards, logprobs)
        title = f"{place} group {number}, id {encoded.ids[0]}"
        answer = json.loads(groups.metas[0])["answer"]
        return view_group(group, self.tokenizer, title, answer, groups.outcomes)

    def _row(self, number: int) -> RawChunk:
        """Row ``number`` (from 0, blank lines counted) over all files."""
        before = 0
        for name in self.files:
            for chunk in read_chunks(name, 1):
                if before == number:
                    return chunk
                before += 1
        raise InputError(f"--group {number}: there are groups 0 to {before - 1}")
