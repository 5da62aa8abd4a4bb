"""Groups as Megatron datasets: blends with weights, train/valid splits, nothing tokenized on the fly.

    data = build_group_datasets(["data/math*", "data/code"], weights=[0.7, 0.3], split="98,2", seed=1)
    group = data.train[0]                     # prompt, responses, sources, rewards, logprobs
    table = data.train.table([5, 3, 8])       # lengths, sources and rewards for planning, no token is read

Blends and splits are those of ``BlendedMegatronDatasetBuilder``. Its known traps are out of reach: the key of its
cache holds the content of the shards, not their paths alone; empty parts of a split and sizes it would only assert
are refused before it runs.
"""

import hashlib
import itertools
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

from megatron_gft.errors import InputError, InputErrors, refuse
from megatron_gft.shards import Group, GroupShard, GroupTable, check_sets, expand_shards
from megatron_gft.shards.limited import LengthLimits, LimitedCounts, LimitedGroups
from megatron_gft.shards.verification import check_repeated_groups
from megatron_gft.validation import split_problem

_ALL = "all shards"  # the one entry of a blend without weights
_EVERYTHING = "100,0,0"  # a split


@dataclass
class GroupDatasetConfig(BlendedMegatronDatasetConfig):
    """Megatron's configuration and what it reads."""

    entries: dict[str, LimitedGroups] = field(default_factory=dict, repr=False)  # by the path in the blend
    content: str = ""  # hash of what the entries hold; part of the key of Megatron's cache


class GroupDataset(MegatronDataset):
    """Groups of one entry in one split, as Megatron's builder makes them; ``order`` (int [N]) are groups of the entry:
    with ``num_samples`` in shuffled passes until there are so many; without, each once, in order."""

    def __init__(
        self,
        dataset: LimitedGroups,
        dataset_path: str | None,
        indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: GroupDatasetConfig,
    ):
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        self.order = indices if num_samples is None else _passes(indices, num_samples, config.random_seed)

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: LimitedGroups) -> int:
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GroupDatasetConfig) -> LimitedGroups:
        return config.entries[dataset_path]

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
    """One split of the blend that Megatron built: its groups in order, and bulk access for planning.

    Attributes:
        name: ``train`` or ``valid``.
        fingerprint: sha256 of the content of the shards, weights, split, limits and seed. Paths are not part of it.
        limited: what the length limits changed in the entries of this split.
    """

    def __init__(self, name: str, dataset: GroupDataset | BlendedDataset, content: str):
        parts = dataset.datasets if isinstance(dataset, BlendedDataset) else [dataset]
        self.name = name
        self.fingerprint = hashlib.sha256(f"{content} {name}".encode()).hexdigest()
        self._entries: list[LimitedGroups] = [part.dataset for part in parts]
        self.limited = sum((entry.limited for entry in self._entries), LimitedCounts())
        # Entry of each group of the split, and its place in the entry.
        if isinstance(dataset, BlendedDataset):
            self._owner = np.array(dataset.dataset_index)
            self._group = np.empty(len(self._owner), np.int64)
            for number, part in enumerate(parts):
                mine = self._owner == number
                self._group[mine] = part.order[dataset.dataset_sample_index[mine]]
        else:
            self._owner, self._group = np.zeros(len(dataset), np.int16), dataset.order

    @property
    def shards(self) -> list[GroupShard]:
        return [shard for entry in self._entries for shard in entry.shards]

    def __len__(self) -> int:
        return len(self._group)

    def __getitem__(self, i: int) -> Group:
        if not 0 <= i < len(self):
            raise IndexError(f"group {i} of {len(self)} in the {self.name} split")
        return self._entries[self._owner[i]][int(self._group[i])]

    def describe(self, i: int) -> str:
        """Shard, position and id of group ``i``, for messages."""
        return self._entries[self._owner[i]].describe(int(self._group[i]))

    def table(self, indices: Sequence[int] | np.ndarray | None = None, *, ends: bool = False) -> GroupTable:
        """Lengths, sources and rewards of groups (all when None), in this order; ``ends`` as in a shard."""
        indices = np.arange(len(self)) if indices is None else np.asarray(indices, dtype=np.int64)
        owner, groups = self._owner[indices], self._group[indices].astype(np.int64)
        tables = [self._entries[number].table(groups[owner == number], ends=ends) for number in np.unique(owner)]
        return GroupTable.merge(owner, tables)


class GroupDatasets(NamedTuple):
    """What :func:`build_group_datasets` returns; None where the split asks for nothing."""

    train: GroupSplit
    valid: GroupSplit | None


def build_group_datasets(
    train: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    valid: Sequence[str] = (),
    split: str = "100,0",
    seed: int = 1234,
    cache: str | None = None,
    tokenizer_fingerprint: str | None = None,
    vocab_size: int | None = None,
    limits: LengthLimits | None = None,
    logprobs: tuple[str | None, str | None] = ("sampled", None),
) -> GroupDatasets:
    """Open shards and build the splits. With torch.distributed initialised, all ranks must call it.

    Args:
        train: shard prefixes or globs; each entry is one part of the blend.
        weights: share of each entry in the blend, which then has as many groups as all entries together: an entry
            below its size leaves groups out, one above repeats them. None: every group once.
        valid: shards to validate on, none of them in ``train``; the split must then give everything to train.
        split: train and valid shares of every entry, contiguous in the order of its groups; a third one must be 0.
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
    entries = _open_entries(train, tokenizer_fingerprint, vocab_size, logprobs)
    held_out = [*itertools.chain(*_open_entries(valid, tokenizer_fingerprint, vocab_size, logprobs))]
    split = _three_shares(split)
    _check(entries, held_out, weights, split)
    if weights is None or len(entries) == 1:
        weights, entries = None, [[*itertools.chain(*entries)]]
    train_groups = {_ALL if weights is None else f"entry {n}": _limited(e, limits) for n, e in enumerate(entries)}
    valid_groups = {_ALL: _limited(held_out, limits)} if held_out else {}
    limits_bite = any(groups.limited != LimitedCounts() for groups in [*train_groups.values(), *valid_groups.values()])
    content = [
        [[shard.manifest.fingerprint for shard in shards] for shards in [*entries, held_out]],
        None if weights is None else list(weights),
        split,  # with its third share
        seed,
        {"max_prompt_tokens": None, **asdict(limits)} if limits_bite else None,  # as earlier versions spelled it
    ]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    splits = _build(train_groups, weights, split, seed, cache, fingerprint)
    if held_out:
        splits["valid"] = _build(valid_groups, None, _EVERYTHING, seed, cache, fingerprint)["train"]
    given = {name: None if data is None else GroupSplit(name, data, fingerprint) for name, data in splits.items()}
    return GroupDatasets(**given)  # type: ignore[arg-type]


def _open_entries(
    patterns: Sequence[str], tokenizer_fingerprint: str | None, vocab_size: int | None, logprobs: tuple
) -> list[list[GroupShard]]:
    """Shards of each entry, checked against the model."""
    entries = [[GroupShard(prefix, logprobs) for prefix in expand_shards(pattern)] for pattern in patterns]
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
    refuse("shards do not fit the model -> preprocess again with the model's tokenizer", problems)
    return entries


def _check(
    entries: list[list[GroupShard]], held_out: list[GroupShard], weights: Sequence[float] | None, split: str
) -> None:
    """No shard or group twice, one tokenizer, a weight each, one way to validate."""
    if not entries:
        raise InputError("data.train: no shards -> set at least one prefix or glob")
    by_content: dict[str, str] = {}  # neither another spelling of a path nor a copy passes
    by_tokenizer: dict[str, str] = {}
    shards = [*itertools.chain(*entries), *held_out]
    for shard in shards:
        content = shard.manifest.fingerprint
        if content in by_content:
            raise InputError(
                f"{shard.prefix}: the same groups as {by_content[content]} in data.train or data.valid -> "
                "name each shard once; data.train_weights repeat an entry, data.split sets groups apart for validation"
            )
        by_content[content] = shard.prefix
        by_tokenizer.setdefault(shard.manifest.tokenizer.fingerprint, shard.prefix)
    if len(by_tokenizer) > 1:  # whatever the model's is
        found = [f"{prefix}: tokenizer {fingerprint[:12]}" for fingerprint, prefix in by_tokenizer.items()]
        raise InputErrors("shards of different tokenizers -> preprocess them with one", found)
    check_repeated_groups(shards)
    if weights is not None and not (len(weights) == len(entries) and min(weights) > 0 and math.isfinite(sum(weights))):
        raise InputError(
            f"data.train_weights: {list(weights)} for {len(entries)} entries -> one positive, finite weight each"
        )
    if held_out and float(split.split(",")[1]):
        raise InputError(f"data.split: {split!r} beside data.valid -> set 100,0, or leave data.valid empty")


def _three_shares(split: str) -> str:
    """As Megatron's builder, earlier versions, and therefore fingerprints of data spell it."""
    if problem := split_problem(split):
        raise InputError(problem)
    return split if split.count(",") == 2 else f"{split},0"


def _limited(shards: list[GroupShard], limits: LengthLimits) -> LimitedGroups:
    """The shards under limits that leave something, else InputError names those that leave nothing."""
    groups = LimitedGroups(shards, limits)
    if len(groups):
        return groups
    given = limits.given()
    guilty = [n for n, v in given.items() if not len(LimitedGroups(shards, LengthLimits(**{n: v}, policy="drop")))]
    named = ", ".join(f"{name}={given[name]}" for name in guilty or given)
    others = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
    raise InputError(
        f"{shards[0].prefix}{others}: {named} leaves none of {groups.limited.dropped_groups} groups -> raise the limit "
        "(that of a prompt with its response: data.max_tokens_per_pack), or set data.overlong to truncate"
    )


def _build(
    entries: dict[str, LimitedGroups],
    weights: Sequence[float] | None,
    split: str,
    seed: int,
    cache: str | None,
    content: str,
) -> dict[str, GroupDataset | BlendedDataset | None]:
    """Let Megatron build the splits: with weights it needs sizes, without it takes every group once. InputErrors when
    an entry has no group in a split that the shares ask for."""
    config = GroupDatasetConfig(
        random_seed=seed,
        sequence_length=0,  # groups are not cut to a length
        blend=([*entries], None if weights is None else list(weights)),
        split=split,
        path_to_cache=cache if cache and torch.distributed.is_initialized() else None,
        entries=entries,
        content=content,
    )
    sizes, problems = [0, 0, 0], []
    for kind, bounds in zip(Split, config.split_matrix, strict=True):
        for name, groups in entries.items() if bounds else ():
            first, end = (int(round(bound * len(groups))) for bound in bounds)  # the rounding of Megatron's builder
            sizes[kind.value] += end - first
            if first == end:
                dropped = groups.limited.dropped_groups
                after = f" ({dropped} more were dropped as over-long)" if dropped else ""
                problems.append(f"{name}: no group of {len(groups)}{after} for {kind.name}")
    refuse(f"data.split: {split!r} leaves splits empty -> give them a larger share, or 0", problems)
    wanted = sizes if weights is not None else [None] * len(sizes)
    built = BlendedMegatronDatasetBuilder(GroupDataset, wanted, lambda: True, config).build()
    return dict(zip(GroupDatasets._fields, built[:2], strict=True))
