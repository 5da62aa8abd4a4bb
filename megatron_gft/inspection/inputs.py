"""Shards or group files behind one face for ``tools/inspect_groups.py``."""

from __future__ import annotations

import contextlib
import functools
import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_gft.errors import InputError
from megatron_gft.groups import GROUP_FILE_SUFFIXES, expand_inputs, read_chunks
from megatron_gft.inspection.characters import LENIENT
from megatron_gft.inspection.packing_estimate import PackingQuestion
from megatron_gft.inspection.statistics import inspect_group_files, inspect_shards
from megatron_gft.inspection.views import GroupView, view_group
from megatron_gft.preprocess.encode import ChunkEncoder, EncodedChunk, EncodingOptions
from megatron_gft.shards import Group, GroupShard, expand_shards, verify_shard, verify_shards
from megatron_gft.shards.encoded import PROMPT_MODE
from megatron_gft.shards.manifest import manifest_path
from megatron_gft.tokenizer import NO_TEMPLATE, Tokenizer, load_tokenizer

SHARD_FILE_SUFFIXES = (".bin", ".idx", ".npy")
PREPROCESSING_REPORT = ".report.ndjson"  # lies beside the shards; a glob that the shell expanded names it, too


class InspectedSource(Protocol):
    """Something to look into."""

    def verify(self) -> list[str]:
        """Check every byte; names of what was checked."""

    def groups(self, numbers: Sequence[int]) -> list[GroupView]:
        """Groups by number, decoded; numbers count what the report counts, from 0."""

    def report(self, max_tokens_per_pack: int | None, groups_per_step: int) -> dict[str, Any]:
        """Statistics and problems."""


def open_source(inputs: Sequence[str], tokenizer: str | None, chat_template: str | None) -> InspectedSource:
    """Group files when all inputs are named like them, else shards, which any of their files may stand for.

    Raises:
        InputError: missing inputs, both kinds at once, or no tokenizer where one is named.
    """
    inputs = [name for name in inputs if not name.endswith(PREPROCESSING_REPORT)] or inputs
    files = [name for name in inputs if _is_group_file(name)]
    shards = [name for name in inputs if name not in files]
    if not shards:
        loaded = None if tokenizer is None else load_tokenizer(tokenizer, chat_template)
        return _Files(expand_inputs(inputs), loaded)
    if files:
        raise InputError(f"{files[0]} and {shards[0]}: a group file and a shard at once -> inspect them one by one")
    prefixes = expand_shards(list(dict.fromkeys(map(_shard_prefix, shards))))
    # The template is already in the tokens of a shard.
    loaded = None if tokenizer is None else load_tokenizer(tokenizer, NO_TEMPLATE, add_bos=False)
    return _Shards(prefixes, loaded)


def _is_group_file(name: str) -> bool:
    """By its name; a ``.json`` with tokens or an index beside it is a manifest, whatever became of its text."""
    if not name.endswith(".json"):
        return name.endswith(GROUP_FILE_SUFFIXES)
    if glob.has_magic(name) and not Path(name).exists():
        return bool(found := glob.glob(name)) and all(map(_is_group_file, found))
    return not any(Path(name).with_suffix(suffix).exists() for suffix in (".bin", ".idx"))


def _shard_prefix(name: str) -> str:
    """Prefix of a shard, of which ``name`` may be any file: a glob that the shell expanded names them all.

    Raises:
        InputError: the file belongs to no shard.
    """
    if not name.endswith(SHARD_FILE_SUFFIXES) or not Path(name).is_file():
        return name.removesuffix(".json")
    prefix = name
    while "." in Path(prefix).name.lstrip("."):
        prefix = prefix.rpartition(".")[0]
        if manifest_path(prefix).is_file():
            return prefix
    raise InputError(f"{name}: no manifest of a shard is beside it -> give prefixes of shards, in quotes with a glob")


def _packing(max_tokens_per_pack: int | None, groups_per_step: int) -> PackingQuestion | None:
    return None if max_tokens_per_pack is None else PackingQuestion(max_tokens_per_pack, groups_per_step)


def _no_such_group(number: int, total: int) -> InputError:
    numbers = f"there are groups 0 to {total - 1}" if total else "there is no usable group"
    return InputError(f"--group {number}: {numbers} -> see the report (without --group)")


@contextlib.contextmanager
def _naming_damage(prefixes: Sequence[str]) -> Iterator[None]:
    """While what these shards hold is used: an exception that damaged bytes caused becomes what verification says.

    Raises:
        InputErrors: names the damaged files of the first such shard.
    """
    try:
        yield
    except InputError:
        raise
    except Exception:  # tokens and codes out of range raise anything; where no byte is damaged, it is a bug of ours
        for prefix in prefixes:
            verify_shard(prefix)
        raise


@dataclass
class _Shards:
    prefixes: list[str]
    tokenizer: Tokenizer | None

    @functools.cached_property
    def _shards(self) -> list[GroupShard]:
        return [GroupShard(prefix) for prefix in self.prefixes]

    def verify(self) -> list[str]:
        verify_shards(self.prefixes)
        return self.prefixes

    def report(self, max_tokens_per_pack: int | None, groups_per_step: int) -> dict[str, Any]:
        with _naming_damage(self.prefixes):
            return inspect_shards(self.prefixes, _packing(max_tokens_per_pack, groups_per_step))

    def groups(self, numbers: Sequence[int]) -> list[GroupView]:
        with _naming_damage(self.prefixes):
            return [self._group(number) for number in numbers]

    def _group(self, number: int) -> GroupView:
        if self.tokenizer is None:
            raise InputError("--group needs --tokenizer, the one that made the shard")
        total = sum(map(len, self._shards))
        if not 0 <= number < total:
            raise _no_such_group(number, total)
        for shard in self._shards:
            if number < len(shard):
                break
            number -= len(shard)
        if shard.manifest.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise InputError(f"{shard.prefix}: made with another tokenizer than {self.tokenizer.path} -> give that one")
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

    def groups(self, numbers: Sequence[int]) -> list[GroupView]:
        """In one pass; only the encoder knows which rows become groups, so all before the last one are encoded."""
        if self.tokenizer is None:
            raise InputError("--group needs --tokenizer, to tokenize the group")
        encoder = ChunkEncoder(self.tokenizer, EncodingOptions(LENIENT))
        views: dict[int, GroupView] = {}
        total = 0
        for chunk in (chunk for name in self.files for chunk in read_chunks(name)):
            encoded = encoder.encode(chunk)
            for number in numbers:
                if total <= number < total + len(encoded.groups):
                    views[number] = self._view(encoded, number - total, number)
            total += len(encoded.groups)
            if len(views) == len(set(numbers)):
                return [views[number] for number in numbers]
        raise _no_such_group(next(number for number in numbers if number not in views), total)

    def _view(self, encoded: EncodedChunk, index: int, number: int) -> GroupView:
        assert self.tokenizer is not None
        groups = encoded.groups.select(np.arange(len(encoded.groups)) == index)
        parts = np.split(groups.tokens, np.cumsum(groups.sequence_lengths)[:-1])
        logprobs = None
        if groups.logprobs is not None:
            logprobs = np.split(groups.logprobs, np.cumsum(groups.sequence_lengths[1:])[:-1])
        sources = groups.sequence_modes[groups.sequence_modes != PROMPT_MODE]
        group = Group(parts[0], parts[1:], sources, groups.rewards, logprobs)
        title = f"{encoded.places[index]} group {number}, id {encoded.ids[index]}"
        answer = json.loads(groups.metas[0])["answer"]
        return view_group(group, self.tokenizer, title, answer, groups.outcomes)
