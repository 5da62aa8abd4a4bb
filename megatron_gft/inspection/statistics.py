"""What is in group files or shards: counts, lengths, rewards, duplicates, problems, and how well it will pack.

Shards and files go through the same code: both become :class:`EncodedGroups`, a file by way of a tokenizer (without
one, lengths are in characters).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_gft.errors import InputError, InputErrors
from megatron_gft.groups import SOURCES, expand_inputs, read_chunks
from megatron_gft.inspection.characters import LENIENT, CharacterEncoder
from megatron_gft.inspection.packing_estimate import PackingQuestion, estimate_packing
from megatron_gft.preprocess.encode import ChunkEncoder, EncodingOptions, id_digest
from megatron_gft.shards import GroupShard, check_sets
from megatron_gft.shards.encoded import PROMPT_MODE, EncodedGroups
from megatron_gft.tokenizer import Tokenizer

GROUPS_PER_SLICE = 2048
EXAMPLES_PER_KIND = 5
HISTOGRAM_BINS = 24


@dataclass
class _Facts:
    """Columns over all groups and responses, and findings by kind."""

    eos_id: int
    bos_id: int | None
    prompt_lengths: list[np.ndarray] = field(default_factory=list)
    response_counts: list[np.ndarray] = field(default_factory=list)
    response_lengths: list[np.ndarray] = field(default_factory=list)
    sources: list[np.ndarray] = field(default_factory=list)
    rewards: list[np.ndarray] = field(default_factory=list)
    truncated: list[np.ndarray] = field(default_factory=list)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    zero_variance: int = 0
    _seen: set[bytes] = field(default_factory=set)

    def add(self, groups: EncodedGroups, place: str) -> None:
        """Take in a slice of groups; ``place`` names it in examples."""
        if not len(groups):
            return
        modes, sizes = groups.sequence_modes, groups.group_sizes.astype(np.int64)
        is_response = modes != PROMPT_MODE
        ends = np.cumsum(groups.sequence_lengths, dtype=np.int64)
        sources, lengths = modes[is_response], groups.sequence_lengths[is_response]
        truncated = groups.tokens[ends[is_response] - 1] != self.eos_id
        starts = np.cumsum(sizes - 1) - (sizes - 1)
        owner = np.repeat(np.arange(len(sizes)), sizes - 1)
        equal = np.minimum.reduceat(groups.rewards, starts) == np.maximum.reduceat(groups.rewards, starts)
        equal &= sizes > 2
        names = groups.outcomes
        wrong = np.array(
            [o == "wrong" if o else r <= 0 for o, r in zip(names, groups.rewards, strict=True)], dtype=bool
        )
        is_expert = sources == SOURCES.index("expert")
        self._note("truncated", owner[truncated], groups, place)
        self._note("no_expert", np.flatnonzero(np.add.reduceat(is_expert.astype(int), starts) == 0), groups, place)
        self._note("equal_rewards", np.flatnonzero(equal), groups, place)
        self._note("expert_wrong", owner[is_expert & wrong], groups, place)
        self._note("special_tokens", self._inner_specials(groups, ends, is_response, owner), groups, place)
        self._find_duplicates(groups, ends, place)
        self.zero_variance += int(equal.sum())
        self.outcomes.update((SOURCES[s], o) for s, o in zip(sources.tolist(), names, strict=True) if o is not None)
        self.prompt_lengths.append(groups.sequence_lengths[~is_response])
        self.response_counts.append(sizes - 1)
        for column, values in (
            (self.response_lengths, lengths),
            (self.sources, sources),
            (self.rewards, groups.rewards),
            (self.truncated, truncated),
        ):
            column.append(values)

    def _inner_specials(
        self, groups: EncodedGroups, ends: np.ndarray, is_response: np.ndarray, owner: np.ndarray
    ) -> np.ndarray:
        """Groups of responses that have BOS anywhere or EOS before their end."""
        bad = groups.tokens == self.eos_id
        bad[ends[is_response] - 1] = False
        if self.bos_id is not None and self.bos_id != self.eos_id:
            bad |= groups.tokens == self.bos_id
        per_sequence = np.add.reduceat(bad.astype(int), ends - groups.sequence_lengths)
        return owner[per_sequence[is_response] > 0]

    def _find_duplicates(self, groups: EncodedGroups, ends: np.ndarray, place: str) -> None:
        sequence = 0
        same_id, same_text = [], []
        for g, size in enumerate(groups.group_sizes.tolist()):
            bounds = ends[sequence : sequence + size].tolist()
            responses = [groups.tokens[a:b].tobytes() for a, b in zip(bounds, bounds[1:], strict=False)]
            same_text += [g] * (len(responses) - len(set(responses)))
            digest = id_digest(json.loads(groups.metas[g])["id"])
            same_id += [g] if digest in self._seen else []
            self._seen.add(digest)
            sequence += size
        self._note("duplicate_response", np.array(same_text, dtype=int), groups, place)
        self._note("duplicate_id", np.array(same_id, dtype=int), groups, place)

    def _note(self, kind: str, owners: np.ndarray, groups: EncodedGroups, place: str) -> None:
        if len(owners):
            self.problems[kind] += len(owners)
            shown = self.examples.setdefault(kind, [])
            for g in owners[: EXAMPLES_PER_KIND - len(shown)].tolist():
                shown.append(f"{place} id {json.loads(groups.metas[g])['id']!r}")

    def column(self, name: str) -> np.ndarray:
        parts = getattr(self, name)
        return np.concatenate(parts) if parts else np.empty(0)


def inspect_shards(prefixes: Sequence[str], packing: PackingQuestion | None = None) -> dict[str, Any]:
    """Report on shards (JSON object).

    Raises:
        InputError: a shard is missing or damaged, or the shards are of different tokenizers.
    """
    shards = [GroupShard(prefix) for prefix in prefixes]
    stamps = {shard.manifest.tokenizer.fingerprint: shard for shard in shards}
    if len(stamps) > 1:
        names = ", ".join(shard.prefix for shard in stamps.values())
        raise InputError(f"{names}: of different tokenizers -> inspect them one by one")
    stamp = shards[0].manifest.tokenizer
    facts = _Facts(stamp.eos_id, stamp.bos_id)
    for shard in shards:
        for first in range(0, len(shard), GROUPS_PER_SLICE):
            facts.add(shard.encoded(first, first + GROUPS_PER_SLICE), shard.prefix)
    report = _report(facts, "tokens", packing)
    report["problems"] = dict(sorted(facts.problems.items()))
    report["examples"] = facts.examples
    report["inputs"] = [shard.prefix for shard in shards]
    report["incomplete_sets"] = _incomplete_sets(shards)
    report["tokenizer"] = stamp.model_dump()
    report["shards"] = [
        {
            "prefix": shard.prefix,
            "groups": len(shard),
            "fingerprint": shard.fingerprint,
            "verifier": shard.manifest.judgement.verifier,
            "provenance": shard.manifest.provenance,
        }
        for shard in shards
    ]
    return report


def _incomplete_sets(shards: Sequence[GroupShard]) -> list[str]:
    """One shard of several may be looked at alone; the report says that it is not all."""
    try:
        check_sets((shard.prefix, shard.manifest) for shard in shards)
        return []
    except InputErrors as error:
        return error.problems


def inspect_group_files(
    patterns: Sequence[str], tokenizer: Tokenizer | None = None, packing: PackingQuestion | None = None
) -> dict[str, Any]:
    """Report on group files (JSON object); lengths in tokens with a tokenizer, in characters without.

    Raises:
        InputError: a file cannot be read. Bad rows are counted, not raised.
    """
    files = expand_inputs(patterns)
    encoder = CharacterEncoder() if tokenizer is None else ChunkEncoder(tokenizer, EncodingOptions(LENIENT))
    facts = _Facts(encoder.tokenizer.eos_id, encoder.tokenizer.bos_id)
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for name in files:
        for chunk in read_chunks(name):
            encoded = encoder.encode(chunk)
            facts.add(encoded.groups, name)
            for problem in encoded.problems:
                counts[problem.kind] += 1
                if counts[problem.kind] <= EXAMPLES_PER_KIND:
                    examples.setdefault(problem.kind, []).append(str(problem))
    if facts.problems["duplicate_id"]:  # seen over all chunks; the encoder sees one at a time
        counts["duplicate_id"] = facts.problems["duplicate_id"]
        examples["duplicate_id"] = facts.examples["duplicate_id"]
    report = _report(facts, "characters" if tokenizer is None else "tokens", packing)
    report["problems"] = dict(sorted(counts.items()))
    report["examples"] = examples
    report["inputs"] = files
    return report


def _report(facts: _Facts, unit: str, packing: PackingQuestion | None) -> dict[str, Any]:
    prompts, counts = facts.column("prompt_lengths"), facts.column("response_counts")
    lengths, sources = facts.column("response_lengths"), facts.column("sources")
    rewards, truncated = facts.column("rewards"), facts.column("truncated").astype(bool)
    by_source = {}
    for code, name in enumerate(SOURCES):
        mine = sources == code
        known = rewards[mine & ~np.isnan(rewards)] if len(rewards) else rewards
        if mine.any():
            by_source[name] = {
                "responses": int(mine.sum()),
                "length": _summary(lengths[mine]),
                "mean_reward": float(known.mean(dtype=np.float64)) if len(known) else None,
                "rewarded": len(known),
                "truncated": int(truncated[mine].sum()),
                "outcomes": {o: n for (s, o), n in sorted(facts.outcomes.items()) if s == name},
            }
    groups = len(prompts)
    report: dict[str, Any] = {
        "unit": unit,
        "groups": groups,
        "responses": len(lengths),
        "prompt_length": _summary(prompts),
        "response_length": _summary(lengths),
        "responses_per_group": _summary(counts),
        "total_prompt_length": int(prompts.sum()),
        "total_response_length": int(lengths.sum()),
        "by_source": by_source,
        "rewards": _summary(rewards[~np.isnan(rewards)] if len(rewards) else rewards),
        "missing_rewards": int(np.isnan(rewards).sum()) if len(rewards) else 0,
        "zero_variance_groups": facts.zero_variance,
        "zero_variance_share": facts.zero_variance / groups if groups else 0.0,
    }
    if packing is not None and groups:
        report["packing"] = estimate_packing(prompts, counts, lengths, packing)
    return report


def _summary(values: np.ndarray) -> dict[str, Any] | None:
    """Mean, quantiles and a histogram; None without values."""
    if not len(values):
        return None
    values = values.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    span = (low, high if high > low else low + max(1.0, abs(low) * 1e-6))  # wide enough for bins of large values
    counts, edges = np.histogram(values, bins=HISTOGRAM_BINS, range=span)
    median, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99]).tolist()
    return {
        "mean": float(values.mean()),
        "min": low,
        "median": median,
        "p90": p90,
        "p99": p99,
        "max": high,
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }
