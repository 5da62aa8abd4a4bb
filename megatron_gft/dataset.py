"""Groups as Megatron datasets: blends with weights, train/valid/test splits, nothing tokenized on the fly.

    data = build_group_datasets(["data/math*", "data/code"], weights=[0.7, 0.3], split="98,2,0", seed=1)
    group = data.train[0]                     # prompt, responses, sources, rewards, logprobs
    table = data.train.table([5, 3, 8])       # lengths, sources and rewards for planning, no token is read

Blends and splits are those of ``BlendedMegatronDatasetBuilder``. Its known traps are out of reach: the key of its
cache holds the content of the shards, not their paths alone; empty parts of a split and sizes it would only assert
are refused before it runs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from megatron_gft.errors import InputError, InputErrors
from megatron_gft.shards import Group, GroupShard, check_sets, expand_shards
from megatron_gft.shards.limited import GroupSource, GroupTable, LengthLimits, LimitedCounts

__all__ = ["GroupDataset", "GroupDatasets", "GroupSplit", "LengthLimits", "build_group_datasets"]
_ALL = "all shards"  # the one source of a blend without weights


@dataclass
class GroupDatasetConfig(BlendedMegatronDatasetConfig):
    """Megatron's configuration and what it reads.

    Attributes:
        sources: opened shards by the path that Megatron passes around.
        content: hash of what the sources hold; part of the key of Megatron's cache.
    """

    sources: dict[str, GroupSource] = field(default_factory=dict, repr=False)
    content: str = ""


class GroupDataset(MegatronDataset):
    """Groups of one source in one split; see ``MegatronDataset`` for the arguments.

    With ``num_samples`` the groups come in shuffled passes until there are so many; without, each once, in order.
    """

    def __init__(
        self,
        dataset: GroupSource,
        dataset_path: str | None,
        indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: GroupDatasetConfig,
    ):
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        self.order = indices if num_samples is None else _passes(indices, num_samples, config.random_seed)

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: GroupSource) -> int:
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GroupDatasetConfig) -> GroupSource:
        return config.sources[dataset_path]

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*MegatronDataset._key_config_attributes(), "content"]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, idx: int) -> Group:  # type: ignore[override]
        return self.dataset[int(self.order[idx])]


def _passes(indices: np.ndarray, count: int, seed: int) -> np.ndarray:
    """``count`` of ``indices``, pass after pass in shuffled order."""
    if not len(indices):
        return indices
    passes = -(-count // len(indices))
    random = np.random.RandomState(seed)  # its permutations are the same in every numpy
    return np.concatenate([random.permutation(indices) for _ in range(passes)])[:count]


class GroupSplit(torch.utils.data.Dataset):
    """One split of the blend: the dataset that Megatron built, and bulk access for planning.

    Attributes:
        name: ``train``, ``valid`` or ``test``.
        fingerprint: sha256 of the content of the shards, weights, split, limits and seed. Paths are not part of it.
        limited: what the length limits changed in the sources of this split.
    """

    def __init__(self, name: str, dataset: GroupDataset | BlendedDataset, fingerprint: str, limited: LimitedCounts):
        self.name, self.fingerprint, self.limited = name, fingerprint, limited
        self._dataset = dataset
        self._parts = dataset.datasets if isinstance(dataset, BlendedDataset) else [dataset]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, i: int) -> Group:
        if not 0 <= i < len(self):
            raise IndexError(f"group {i} of {len(self)} in the {self.name} split")
        source, group = self._place(i)
        return source[group]

    def _place(self, i: int) -> tuple[GroupSource, int]:
        part, groups = self._places(np.array([i]))
        return self._parts[int(part[0])].dataset, int(groups[0])

    def _places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Part and position in the part's source of each index."""
        if not isinstance(self._dataset, BlendedDataset):
            return np.zeros(len(indices), np.int64), self._parts[0].order[indices].astype(np.int64)
        part, sample = self._dataset.dataset_index[indices], self._dataset.dataset_sample_index[indices]
        groups = np.empty(len(indices), np.int64)
        for number in np.unique(part):
            mine = part == number
            groups[mine] = self._parts[number].order[sample[mine]]
        return part, groups

    def describe(self, i: int) -> str:
        """Shard, position and id of group ``i``, for messages."""
        source, group = self._place(i)
        return source.describe(group)

    def group_lengths(self, i: int) -> tuple[int, list[int]]:
        """Tokens of the prompt and of each response of group ``i``; reads no token."""
        table = self.table([i])
        return int(table.prompt_lengths[0]), table.response_lengths.tolist()

    def table(self, indices: Sequence[int] | np.ndarray | None = None) -> GroupTable:
        """Lengths, sources and rewards of groups (all when None), in the order of ``indices``; reads no token."""
        indices = np.arange(len(self)) if indices is None else np.asarray(indices, dtype=np.int64)
        part, groups = self._places(indices)
        if len(self._parts) == 1:
            return self._parts[0].dataset.table(groups)
        tables = [(np.flatnonzero(part == n), self._parts[n].dataset) for n in np.unique(part)]
        return _interleave([(places, source.table(groups[places])) for places, source in tables], len(indices))


def _interleave(tables: list[tuple[np.ndarray, GroupTable]], count: int) -> GroupTable:
    """Tables of disjoint places among ``count`` groups as one table."""
    prompts, sizes = np.empty(count, np.int32), np.empty(count, np.int64)
    for places, table in tables:
        prompts[places] = table.prompt_lengths
        sizes[places] = np.diff(table.offsets)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    owner = np.empty(count, np.int64)
    for number, (places, _) in enumerate(tables):
        owner[places] = number
    of_response = np.repeat(owner, sizes)
    columns = []
    for name in ("response_lengths", "sources", "rewards"):
        values = np.empty(offsets[-1], getattr(tables[0][1], name).dtype)
        for number, (_, table) in enumerate(tables):
            values[of_response == number] = getattr(table, name)  # places ascend, so the order is the table's
        columns.append(values)
    return GroupTable(prompts, offsets, *columns)


class GroupDatasets(NamedTuple):
    """What :func:`build_group_datasets` returns; None where the split asks for nothing."""

    train: GroupSplit
    valid: GroupSplit | None
    test: GroupSplit | None


def build_group_datasets(
    train: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    valid: Sequence[str] = (),
    split: str = "100,0,0",
    seed: int = 1234,
    cache: str | None = None,
    tokenizer_fingerprint: str | None = None,
    vocab_size: int | None = None,
    limits: LengthLimits | None = None,
) -> GroupDatasets:
    """Open shards and build the splits. With torch.distributed initialised, all ranks must call it.

    Args:
        train: shard prefixes or globs; each entry is one part of the blend.
        weights: share of each entry in the blend, which then has as many groups as all entries together: an entry
            below its size leaves groups out, one above repeats them. None: every group once.
        valid: shards to validate on, none of them in ``train``; the split must then give everything to train.
        split: train, valid and test shares of every entry, contiguous in the order of its groups.
        seed: of the choice and order within a weighted entry.
        cache: folder for Megatron's blend indices; used only with torch.distributed (which Megatron needs for it).
        tokenizer_fingerprint: of the model's tokenizer; None skips the check.
        vocab_size: rows of the model's embedding; None skips the check.
        limits: longest prompts and responses, and what to do with longer ones.

    Raises:
        InputError: missing, damaged, repeated or mixed shards, another tokenizer, an impossible split, over-long
            groups, or limits that leave no group.
    """
    limits = limits or LengthLimits()
    entries = _open_entries([*train], tokenizer_fingerprint, vocab_size)
    valid_entries = _open_entries([*valid], tokenizer_fingerprint, vocab_size)
    if not entries:
        raise InputError("data.train: no shards -> set at least one prefix or glob")
    _check_distinct(entries + valid_entries)
    _check_tokenizers(entries + valid_entries)
    if weights is not None:
        _check_weights(weights, len(entries))
    if weights is None or len(entries) == 1:
        weights, entries = None, [[shard for entry in entries for shard in entry]]
    sources = {_ALL if weights is None else f"entry {n}": _source(e, limits) for n, e in enumerate(entries)}
    merged_valid = [shard for entry in valid_entries for shard in entry]
    valid_sources = {_ALL: _source(merged_valid, limits)} if merged_valid else {}
    prints = [[shard.fingerprint for shard in entry] for entry in [*entries, merged_valid]]
    limits_bite = any(any(asdict(source.limited).values()) for source in [*sources.values(), *valid_sources.values()])
    content = [prints, weights and list(weights), split, seed, asdict(limits) if limits_bite else None]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    config = _config(sources, weights, split, seed, cache, fingerprint)
    sizes = _split_sizes(config, sources, split)
    if valid_sources and sizes[1:] != [0, 0]:
        raise InputError(f"data.split: {split!r} beside data.valid -> set 100,0,0, or leave data.valid empty")
    splits = _build(config, sizes, weights is not None)
    if valid_sources:
        valid_config = _config(valid_sources, None, "100,0,0", seed, cache, fingerprint)
        splits[1] = _build(valid_config, _split_sizes(valid_config, valid_sources, "100,0,0"), weighted=False)[0]
    named = []
    for name, dataset in zip(("train", "valid", "test"), splits, strict=True):
        parts = valid_sources if name == "valid" and valid_sources else sources
        limited = sum((source.limited for source in parts.values()), LimitedCounts())
        digest = hashlib.sha256(f"{fingerprint} {name}".encode()).hexdigest()
        named.append(None if dataset is None else GroupSplit(name, dataset, digest, limited))
    return GroupDatasets(*named)  # type: ignore[arg-type]


def _open_entries(
    patterns: list[str], tokenizer_fingerprint: str | None, vocab_size: int | None
) -> list[list[GroupShard]]:
    """Shards of each entry, checked against the model."""
    entries = [[GroupShard(prefix) for prefix in expand_shards(pattern)] for pattern in patterns]
    shards = [shard for entry in entries for shard in entry]
    check_sets((shard.prefix, shard.manifest) for shard in shards)
    problems = []
    for shard in shards:
        stamp = shard.manifest.tokenizer
        if tokenizer_fingerprint is not None and stamp.fingerprint != tokenizer_fingerprint:
            problems.append(
                f"{shard.prefix}: made with tokenizer {stamp.fingerprint[:12]}, the model's is "
                f"{tokenizer_fingerprint[:12]}"
            )
        if vocab_size is not None and shard.manifest.counts.max_token_id >= vocab_size:
            problems.append(
                f"{shard.prefix}: has token id {shard.manifest.counts.max_token_id}, the model has {vocab_size} ids"
            )
    if problems:
        raise InputErrors("shards do not fit the model -> preprocess again with the model's tokenizer", problems)
    return entries


def _check_distinct(entries: list[list[GroupShard]]) -> None:
    """No shard is in the data twice, for training or for training and validation: by its content, so that neither
    another spelling of its path nor a copy passes."""
    by_print: dict[str, str] = {}
    for shard in (shard for entry in entries for shard in entry):
        if shard.fingerprint in by_print:
            raise InputError(
                f"{shard.prefix}: the same groups as {by_print[shard.fingerprint]} in data.train or data.valid -> name "
                "each shard once; data.train_weights repeat an entry, data.split sets groups apart for validation"
            )
        by_print[shard.fingerprint] = shard.prefix


def _check_weights(weights: Sequence[float], entries: int) -> None:
    if len(weights) != entries or not min(weights) > 0 or not math.isfinite(sum(weights)):
        raise InputError(
            f"data.train_weights: {list(weights)} for {entries} entries -> one positive, finite weight each"
        )


def _source(shards: list[GroupShard], limits: LengthLimits) -> GroupSource:
    """The shards as one source, in which the limits leave something.

    Raises:
        InputError: names the limits that leave nothing.
    """
    source = GroupSource(shards, limits)
    if len(source):
        return source
    given = {name: value for name, value in asdict(limits).items() if name != "policy" and value is not None}
    guilty = [n for n, v in given.items() if not len(GroupSource(shards, LengthLimits(**{n: v}, policy="drop")))]
    named = ", ".join(f"{name}={given[name]}" for name in guilty or given)
    others = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
    raise InputError(
        f"{shards[0].prefix}{others}: {named} leaves none of {source.limited.dropped_groups} groups -> raise the limit "
        "(that of a prompt with its response: data.max_tokens_per_pack), or set data.overlong to truncate"
    )


def _check_tokenizers(entries: list[list[GroupShard]]) -> None:
    """A blend has one tokenizer, whatever the model's is."""
    by_print: dict[str, str] = {}
    for shard in (shard for entry in entries for shard in entry):
        by_print.setdefault(shard.manifest.tokenizer.fingerprint, shard.prefix)
    if len(by_print) > 1:
        found = [f"{prefix}: tokenizer {print_[:12]}" for print_, prefix in by_print.items()]
        raise InputErrors("shards of different tokenizers -> preprocess them with one", found)


def _config(
    sources: dict[str, GroupSource],
    weights: Sequence[float] | None,
    split: str,
    seed: int,
    cache: str | None,
    content: str,
) -> GroupDatasetConfig:
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or shares[0] <= 0 or not np.isfinite(sum(shares)):
        raise InputError(f"data.split: {split!r} -> three shares train,valid,test such as 98,2,0, train > 0")
    return GroupDatasetConfig(
        random_seed=seed,
        sequence_length=0,  # groups are not cut to a length
        blend=([*sources], None if weights is None else list(weights)),
        split=split,
        path_to_cache=cache if cache and torch.distributed.is_initialized() else None,
        sources=sources,
        content=content,
    )


def _split_sizes(config: GroupDatasetConfig, sources: dict[str, GroupSource], split: str) -> list[int]:
    """Groups of each split over all sources, by the rounding of Megatron's builder.

    Raises:
        InputErrors: a source has no group in a split that the shares ask for.
    """
    sizes, problems = [], []
    for kind, bounds in zip(Split, config.split_matrix, strict=True):
        counts = []
        for name, source in sources.items():
            first, end = (0.0, 0.0) if bounds is None else bounds
            counts.append(int(round(end * len(source))) - int(round(first * len(source))))
            if bounds is not None and counts[-1] < 1:
                dropped = source.limited.dropped_groups
                after = f" ({dropped} more were dropped as over-long)" if dropped else ""
                problems.append(f"{name}: no group of {len(source)}{after} for {kind.name}")
        sizes.append(sum(counts))
    if problems:
        raise InputErrors(f"data.split: {split!r} leaves splits empty -> give them a larger share, or 0", problems)
    return sizes


def _build(config: GroupDatasetConfig, sizes: list[int], weighted: bool) -> list[GroupDataset | BlendedDataset | None]:
    """Let Megatron build the splits: with weights it needs sizes, without it takes every group once."""
    wanted = [size if weighted else None for size in sizes]
    builder = BlendedMegatronDatasetBuilder(GroupDataset, wanted, lambda: True, config)
    return list(builder.build())
