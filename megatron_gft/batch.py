"""From a step number to this rank's microbatches: choose groups, weigh responses, plan packs, read tokens.

Everything up to the plan is computed from lengths, sources and rewards alone, the same on every rank and the same
for every layout; only then are the tokens of this rank's packs read. Responses that cannot change the weights
(advantage exactly 0, source not selected) are never read, packed or run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from megatron_gft.config import Config
from megatron_gft.errors import InputError, InputErrors
from megatron_gft.gft import group_advantages, response_weights
from megatron_gft.hf_config import ModelShape
from megatron_gft.objectives import ALL_SOURCES
from megatron_gft.packing import Pack, build_pack, slice_for_context_parallel
from megatron_gft.parallel import Parallel
from megatron_gft.planning import FlopModel, GroupLengths, StepPlan, plan_step, step_groups, steps_per_epoch


class Groups(Protocol):
    """What training asks of a data set (``dataset.GroupDataset``): facts about groups without reading tokens."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    def group_facts(self, index: int) -> GroupFacts: ...


@dataclass(frozen=True)
class GroupFacts:
    """One group without its tokens: lengths in tokens (EOS included), source codes, rewards (NaN: not scored)."""

    name: str
    prompt: int
    responses: np.ndarray
    sources: np.ndarray
    rewards: np.ndarray


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step, equal on every rank, known before any forward.

    ``weights`` and ``advantages`` are per response of the step in order (float64, [N]); ``offsets`` gives the first
    response of each group. Responses that do not train have length 0 in ``lengths``. ``denominator`` is D.
    """

    groups: np.ndarray
    names: tuple[str, ...]
    offsets: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray
    weights: torch.Tensor
    advantages: torch.Tensor
    denominator: int
    dead_groups: int
    plan: StepPlan | None

    @property
    def loss_tokens(self) -> int:
        """Response tokens that are computed in this step, over all ranks."""
        return int(self.lengths.sum())


class StepSource:
    """Makes the steps of a run over one data set.

    Args:
        groups: the data set.
        whole_groups: groups per step.
        validation: expert-style evaluation of every response: advantage 1, nothing skipped.
    """

    def __init__(
        self,
        groups: Groups,
        config: Config,
        shape: ModelShape,
        parallel: Parallel,
        *,
        validation: bool = False,
    ):
        self.groups, self.config, self.parallel = groups, config, parallel
        self.validation = validation
        self.flop_model = FlopModel.from_shape(shape)
        self.source_codes = [ALL_SOURCES.index(source) for source in config.objective.sources or ALL_SOURCES]
        self.alignment = 2 * parallel.cp_size if parallel.cp_size > 1 else 1
        self.pad_multiple = parallel.cp_size * (parallel.tp_size if config.parallel.sequence_parallel else 1)
        if config.model.fp8:
            self.pad_multiple = int(np.lcm(self.pad_multiple, 16 * parallel.cp_size))  # FP8 GEMMs take rows by 16
        self.limit = config.data.max_tokens_per_pack // self.pad_multiple * self.pad_multiple
        self.overlong = {"dropped": 0, "truncated": 0}

    @property
    def steps_per_epoch(self) -> int:
        """The last one may hold fewer groups."""
        return steps_per_epoch(len(self.groups), self.config.data.groups_per_step)

    def indices(self, step: int) -> np.ndarray:
        """Groups of the 0-based step, counted over epochs; validation takes them in their own order."""
        size = self.config.data.groups_per_step
        if self.validation:
            return np.arange(step * size, min((step + 1) * size, len(self.groups)))
        return step_groups(
            step,
            num_groups=len(self.groups),
            groups_per_step=size,
            seed=self.config.train.seed,
            fingerprint=self.groups.fingerprint,
        )

    def batch(self, step: int) -> StepBatch:
        """Weigh and plan one step.

        Raises:
            InputErrors: responses that are too long, with ``data.overlong=error``.
            InputError: a reward is missing where the advantage needs one.
        """
        indices = self.indices(step)
        facts = [self.groups.group_facts(int(index)) for index in indices]
        lengths = self._usable_lengths(facts)
        sizes = [len(fact.responses) for fact in facts]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        sources = np.concatenate([fact.sources for fact in facts])
        rewards = np.concatenate([fact.rewards for fact in facts]).astype(np.float64)
        group_ids = np.repeat(np.arange(len(facts)), sizes)
        used = lengths > 0
        weights, advantages, denominator = self._weigh(rewards[used], lengths[used], group_ids[used])
        full_weights, full_advantages = torch.zeros(len(used)).double(), torch.zeros(len(used)).double()
        mask = torch.from_numpy(used)
        full_weights[mask], full_advantages[mask] = weights, advantages
        trained = np.where(full_advantages.numpy() != 0, lengths, 0)
        live = np.add.reduceat(trained > 0, offsets[:-1]) > 0
        return StepBatch(
            groups=indices,
            names=tuple(fact.name for fact in facts),
            offsets=offsets,
            lengths=trained,
            sources=sources,
            weights=full_weights,
            advantages=full_advantages,
            denominator=denominator,
            dead_groups=int((~live).sum()),
            plan=self._plan(facts, trained, offsets) if trained.any() else None,
        )

    def _weigh(self, rewards: np.ndarray, lengths: np.ndarray, group_ids: np.ndarray):
        objective = self.config.objective
        ids, counts = torch.from_numpy(group_ids), torch.from_numpy(lengths)
        advantages = group_advantages(
            torch.from_numpy(rewards),
            ids,
            mode="none" if self.validation else objective.advantage or "std",
            eps=objective.advantage_eps,
        )
        weights, denominator = response_weights(
            advantages,
            counts,
            ids,
            normalize="tokens" if self.validation else objective.normalize,
            zero_variance=objective.zero_variance,
        )
        return weights, advantages, denominator

    def _usable_lengths(self, facts: list[GroupFacts]) -> np.ndarray:
        """Trained tokens per response, flat: 0 where the source is not selected or the response is dropped."""
        kept, problems = [], []
        for fact in facts:
            room = self._room(fact.prompt)
            lengths = np.where(np.isin(fact.sources, self.source_codes), fact.responses, 0).astype(np.int64)
            if self.validation:
                lengths = fact.responses.astype(np.int64)
            too_long = lengths > room
            if too_long.any():
                if self.config.data.overlong == "error":
                    problems += [
                        f"group {fact.name}: response {k} has {lengths[k]} tokens after a prompt of {fact.prompt}, "
                        f"at most {max(room, 0)} fit"
                        for k in np.flatnonzero(too_long)
                    ]
                elif self.config.data.overlong == "truncate" and room > 0:
                    lengths[too_long] = room
                    self.overlong["truncated"] += int(too_long.sum())
                else:
                    lengths[too_long] = 0
                    self.overlong["dropped"] += int(too_long.sum())
            kept.append(lengths)
        if problems:
            raise InputErrors(
                f"data.max_tokens_per_pack={self.config.data.max_tokens_per_pack}: responses that do not fit -> raise "
                "it (or data.max_response_tokens), or set data.overlong to drop or truncate",
                problems,
            )
        return np.concatenate(kept)

    def _room(self, prompt: int) -> int:
        """Longest response after a prompt of this length: prompt + response - 1 rows fit one pack."""
        room = self.limit // self.alignment * self.alignment - prompt + 1
        limit = self.config.data.max_response_tokens
        return room if limit is None else min(room, limit)

    def _plan(self, facts: list[GroupFacts], lengths: np.ndarray, offsets: np.ndarray) -> StepPlan:
        groups = [
            GroupLengths(fact.prompt, tuple(lengths[offsets[g] : offsets[g + 1]].tolist()))
            for g, fact in enumerate(facts)
        ]
        return plan_step(
            groups,
            self.parallel.dp_size,
            self.config.data.max_tokens_per_pack,
            packing=self.config.data.packing,
            flop_model=self.flop_model,
            packs_multiple_of=self.parallel.pp_size if self.parallel.vp_size else 1,
            pad_multiple=self.pad_multiple,
            alignment=self.alignment,
        )

    def packs(self, batch: StepBatch) -> list[Pack]:
        """This rank's microbatches of a step, on its device; empty when nothing of the step trains."""
        if batch.plan is None:
            return []
        plans = batch.plan.packs[self.parallel.dp_rank]
        needed = {group for plan in plans for group, _ in plan.items}
        sizes = np.diff(batch.offsets)
        groups = [
            self._read(batch, group) if group in needed else {"responses": range(sizes[group])}
            for group in range(len(batch.groups))
        ]
        device = torch.cuda.current_device()
        packs = []
        for plan in plans:
            pack = build_pack(
                plan,
                groups,
                batch.weights,
                batch.advantages,
                pad_multiple=self.pad_multiple,
                segment_multiple=self.alignment,
            )
            packs.append(slice_for_context_parallel(pack, self.parallel.cp_size, self.parallel.cp_rank).to(device))
        return packs

    def _read(self, batch: StepBatch, group: int) -> Mapping[str, Any]:
        item = dict(self.groups[int(batch.groups[group])])
        lengths = batch.lengths[batch.offsets[group] : batch.offsets[group + 1]]
        item["responses"] = [tokens[:length] for tokens, length in zip(item["responses"], lengths, strict=True)]
        return item


def check_not_empty(groups: Groups | None, key: str) -> Groups:
    """The data set, or an error that names the key that should have given groups."""
    if groups is None or len(groups) == 0:
        raise InputError(f"{key}: no group to train on -> name shards with tools/preprocess_groups.py's output prefix")
    return groups
