"""From a step number to this rank's microbatches: choose groups, weigh responses, plan packs, read tokens.

Everything up to the plan is computed from lengths, sources and rewards alone, the same on every rank and the same
for every layout; only then are the tokens of this rank's packs read. Responses that cannot change the weights
(advantage exactly 0, source not selected) are never read, packed or run.
"""

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from megatron_gft.config import Config, ObjectiveConfig
from megatron_gft.dataset import GroupSplit, LengthLimits, build_group_datasets
from megatron_gft.errors import InputError, refuse
from megatron_gft.gft import group_advantages, response_weights
from megatron_gft.group_order import step_groups, steps_per_epoch
from megatron_gft.hf.shape import ModelShape
from megatron_gft.objectives import SOURCE_CODES, SOURCES, Advantage, by_source
from megatron_gft.packing import Pack, build_pack, slice_for_context_parallel
from megatron_gft.parallel import Parallel
from megatron_gft.planning import FlopModel, GroupLengths, PackPlan, StepPlan, plan_step
from megatron_gft.runtime import prefetch
from megatron_gft.shards import Group, GroupShard, GroupTable
from megatron_gft.tokenizer import has_tokenizer, tokenizer_fingerprint

MAKE_LOGPROBS = "make them with tools/compute_logprobs.py, and name them in data.logprobs (objective.reference)"


class Groups(Protocol):
    """What training asks of a data set (``dataset.GroupDataset``): facts about groups without reading tokens."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Group: ...

    def table(self, indices: np.ndarray, *, ends: bool = False) -> GroupTable: ...

    def describe(self, index: int) -> str: ...


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step, equal on every rank, known before any forward.

    ``weights``, ``advantages`` and ``anchors`` (beta * u) are per response of the step in order (float64, [N]);
    ``offsets`` gives the first response of each group. Responses that do not train have length 0 in ``lengths``.
    ``denominator`` is D.
    """

    groups: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray
    weights: torch.Tensor
    advantages: torch.Tensor
    anchors: torch.Tensor
    denominator: int
    dead_groups: int
    plan: StepPlan | None

    @property
    def loss_tokens(self) -> int:
        """Response tokens that are computed in this step, over all ranks."""
        return int(self.lengths.sum())


def length_limits(config: Config, shape: ModelShape) -> LengthLimits:
    """What a pack and the model hold at most; a prompt and its response take one row less than their tokens, since the
    last one is only a label."""
    data, unit = config.data, math.lcm(*config.row_multiples)
    longest = min(data.max_tokens_per_pack // unit * unit, shape.max_sequence_length) + 1
    return LengthLimits(data.max_response_tokens, longest, data.overlong)


def open_groups(
    config: Config, shape: ModelShape, model_files: Path | None = None
) -> tuple[GroupSplit, GroupSplit | None]:
    """Training and validation data of a configuration, checked against the model. Collective.

    Args:
        model_files: folder with the model's tokenizer, where ``model.tokenizer`` names none; default: model.config's.

    Raises:
        InputError: missing or damaged shards, another tokenizer than the model's, responses that do not fit a pack.
    """
    data = config.data
    tokenizer = Path(config.model.tokenizer or model_files or config.model.folder)
    check = not data.allow_tokenizer_mismatch and (config.model.tokenizer is not None or has_tokenizer(tokenizer))
    splits = build_group_datasets(
        data.train,
        weights=data.train_weights,
        valid=data.valid,
        split=data.split,
        seed=config.train.seed,
        cache=data.cache,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer) if check else None,
        vocab_size=shape.vocab_size,
        limits=length_limits(config, shape),
        logprobs=((data.logprobs or "sampled") if config.q_sources else None, config.objective.reference),
    )
    _check_sources(config, splits.train.shards)
    _check_logprob_files(config, splits.train.shards)
    return splits.train, splits.valid


def _check_sources(config: Config, shards: Sequence[GroupShard]) -> None:
    """Raise InputError where the shards have responses, but none of a source that the objective trains on."""
    there = {name for shard in shards for name, number in shard.manifest.counts.by_source.items() if number}
    if there and config.objective.sources and there.isdisjoint(config.objective.sources):
        raise InputError(
            f"objective.sources: data.train has no response of {', '.join(config.objective.sources)} (but of "
            f"{', '.join(sorted(there))}), so nothing would be trained -> objective.sources=[{','.join(sorted(there))}]"
        )


def _check_logprob_files(config: Config, shards: Sequence[GroupShard]) -> None:
    """Raise InputErrors unless each shard has the log-probs that the objective reads of its responses, untempered."""
    roles = (("q", config.q_sources), ("p_ref", config.objective.kl_sources if config.objective.beta else []))
    lacking = [
        f"{shard.prefix}: has no log-probs {name!r}, so {role} of its {', '.join(read)} responses is unknown"
        for shard in shards
        for name, (role, sources) in zip(shard.names, roles, strict=True)
        if name not in shard.manifest.logprob_files
        and (read := [source for source in sources if shard.manifest.counts.by_source.get(source)])
    ]
    refuse(f"shards without log-probs that the objective reads -> {MAKE_LOGPROBS}", lacking)
    tempered = [
        f"{shard.prefix}: {row['source']} responses, temperature {row['sampling']['temperature']}"
        for shard in shards
        for row in (shard.manifest.provenance.get("responses", []) if shard.names[0] == "sampled" else [])
        if row["source"] in config.q_sources and (row["sampling"] or {}).get("temperature", 1) != 1
    ]
    refuse(f"q of samples is known at temperature 1 only -> sample at 1, or {MAKE_LOGPROBS}", tempered)


class StepLoader:
    """Makes the steps of a run over ``groups``; ``validation``: every response with advantage 1, in their own order."""

    def __init__(
        self, groups: Groups, config: Config, shape: ModelShape, parallel: Parallel, *, validation: bool = False
    ):
        self.groups, self.config, self.parallel, self.validation = groups, config, parallel, validation
        self.objective = config.objective
        if validation:
            self.objective = ObjectiveConfig(advantage="none", normalize="tokens")
        self.flop_model = FlopModel.from_shape(shape)
        self.source_codes = [SOURCES.index(source) for source in self.objective.sources or SOURCES]
        self.q_codes = [] if validation else [SOURCE_CODES[source] for source in config.q_sources]
        self.with_sampled = bool(self.q_codes)  # packs bring log q
        self.anchor_codes = [SOURCE_CODES[source] for source in self.objective.kl_sources if self.objective.beta]
        self.alignment, self.pad_multiple = config.row_multiples

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
            InputError: a reward is missing where the advantage needs one.
        """
        indices, objective = self.indices(step), self.objective
        table = self.groups.table(indices, ends=True) if objective.cut_off != "train" else self.groups.table(indices)
        group_ids = np.repeat(np.arange(len(indices)), table.response_counts)
        used = np.isin(table.sources, self.source_codes)
        counted = used & table.ended if objective.cut_off != "train" else used
        if objective.cut_off == "drop":
            used = counted
        lengths, sources = table.response_lengths.astype(np.int64), torch.from_numpy(table.sources).long()
        advantages, weightless = self._advantages(table, group_ids, used, indices, step)
        of_source = torch.tensor([objective.source_weights.get(source, 1.0) for source in SOURCES], dtype=torch.float64)
        if (mu := objective.mu(step)) is not None:
            of_source *= torch.tensor([mu if source == "expert" else 1 - mu for source in SOURCES])
        anchors = objective.beta * torch.from_numpy(np.isin(table.sources, self.anchor_codes)).double()
        counted &= ((of_source[sources] > 0) & (~weightless | (anchors > 0))).numpy()
        chosen, weights = torch.from_numpy(counted), torch.zeros(2, len(used), dtype=torch.float64)
        advantages, anchors = torch.where(chosen, advantages, 0.0), torch.where(chosen, anchors, 0.0)
        weights[:, chosen], denominator = response_weights(
            (torch.stack((advantages, anchors)) * of_source[sources])[:, chosen],
            torch.from_numpy(lengths)[chosen],
            torch.from_numpy(group_ids)[chosen],
            normalize=objective.normalize,
            zero_variance=objective.zero_variance,
            strata=sources[chosen] if objective.per_source_denominator else None,
        )
        trained = np.where(((advantages != 0) | (anchors != 0)).numpy(), lengths, 0)
        live = np.add.reduceat((advantages != 0).numpy(), table.offsets[:-1]) > 0
        return StepBatch(
            groups=indices,
            offsets=table.offsets,
            lengths=trained,
            sources=table.sources,
            weights=weights[0],
            advantages=advantages,
            anchors=weights[1],
            denominator=denominator,
            dead_groups=int((~live).sum()),
            plan=self._plan(table, trained) if trained.any() else None,
        )

    def _advantages(
        self, table: GroupTable, group_ids: np.ndarray, used: np.ndarray, indices: np.ndarray, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A of each response, float64 [N], and whether the objective gives it no weight whatever its group, bool."""
        objective = self.objective
        advantages = torch.zeros(len(used), dtype=torch.float64)
        modes: tuple[Advantage | None, ...] = by_source(objective.advantage or "std")
        for mode in dict.fromkeys(mode for mode in modes if mode is not None):
            rows = used & np.isin(table.sources, [code for code, other in enumerate(modes) if other == mode])
            rewards, ids = torch.from_numpy(table.rewards[rows]).double(), torch.from_numpy(group_ids[rows])
            options = {"eps": objective.advantage_eps, "baseline_shift": objective.baseline_shift}
            try:
                advantages[rows] = group_advantages(rewards, ids, mode=mode, **options)
            except InputError as error:
                unscored = np.unique(group_ids[rows & ~np.isfinite(table.rewards)])
                names = [self.groups.describe(int(indices[g])) for g in unscored]
                raise InputError(f"{error} (groups of step {step + 1}: {', '.join(names[:5])})") from None
        scaled = torch.where(advantages < 0, advantages * objective.negative_scale, advantages)
        by_reward = torch.tensor([mode == "reward" for mode in modes])[torch.from_numpy(table.sources).long()]
        return scaled, (scaled == 0) & ((advantages != 0) | by_reward)

    def _plan(self, table: GroupTable, lengths: np.ndarray) -> StepPlan:
        of_groups = zip(table.prompt_lengths.tolist(), np.split(lengths, table.offsets[1:-1]), strict=True)
        groups = [GroupLengths(prompt, tuple(responses.tolist())) for prompt, responses in of_groups]
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
        """This rank's microbatches of a step, on the host; empty when nothing of the step trains."""
        if batch.plan is None:
            return []
        plans = batch.plan.packs[self.parallel.dp_rank]
        needed = sorted({place for plan in plans for place, _ in plan.items})
        groups = {place: self.groups[int(batch.groups[place])] for place in needed}
        self._check_logprobs(batch, groups, plans)
        cp_size, cp_rank, packs = self.parallel.cp_size, self.parallel.cp_rank, []
        for plan in plans:
            pack = build_pack(
                plan,
                groups,
                batch.offsets,
                batch.weights,
                batch.advantages,
                batch.anchors if self.objective.beta else None,
                sampled=self.with_sampled,
                pad_multiple=self.pad_multiple,
                segment_multiple=self.alignment,
            )
            packs.append(slice_for_context_parallel(pack, cp_size, cp_rank).prepared(cp_rank))
        return packs

    def ahead(self, steps: Iterable[int]) -> Generator[tuple[StepBatch, list[Pack]], None, None]:
        """Batch and this rank's packs of each of the 0-based ``steps``, prepared in a thread while the caller works on
        the one before: planning takes 0.3 s of one core at 256 data-parallel ranks and 2048 groups a step, and reading
        waits for disks.

        Raises:
            InputError: as :meth:`batch`, when the step that is wrong is taken, not before.
        """

        def prepare(step: int) -> tuple[StepBatch, list[Pack]]:
            batch = self.batch(step)
            return batch, self.packs(batch)

        # The current device belongs to a thread.
        return prefetch(map(prepare, steps), torch.cuda.set_device, torch.cuda.current_device())

    def _check_logprobs(self, batch: StepBatch, groups: dict[int, Group], plans: Sequence[PackPlan]) -> None:
        """Raise InputError where a token's log-prob is read and unknown; ends may lack theirs, as servers' do."""
        for place, k in ((place, k) for plan in plans for place, chosen in plan.items for k in chosen):
            group, source = groups[place], int(groups[place].sources[k])
            reads = ((self.q_codes, "q", group.logprobs), (self.anchor_codes, "p_ref", group.reference))
            for role, known in ((role, known) for codes, role, known in reads if source in codes):
                values = np.full(len(group.responses[k]), np.nan) if known is None else known[k]
                ended = group.ended is None or bool(group.ended[k])
                if unknown := int(np.isnan(values[:-1] if ended else values).sum()):
                    raise InputError(
                        f"{self.groups.describe(int(batch.groups[place]))}: {role} is unknown for {unknown} of "
                        f"{len(values)} tokens of response {k} ({SOURCES[source]}) -> {MAKE_LOGPROBS}"
                    )
