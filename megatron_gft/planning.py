"""What a step computes and where: its packs on every data-parallel rank.

Pure functions of lengths, numpy only: every rank computes the same plan by itself, and `plan.py` can show it
without a GPU. The packs depend on the layout, the sums over them do not (nor does `group_order.py`).

A *pack* is one microbatch. In the ``packed`` form each response carries its prompt: P + R - 1 rows (the last
response token is only ever a label). In the ``shared_prefix`` form the prompt of several responses is computed once:
P + sum(R_k - 1) rows. A group may be cut into parts over packs; a part of one response is the same in both forms.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np

from megatron_gft.balancing import Balancer, Item, cost, tokens
from megatron_gft.errors import InputError, refuse
from megatron_gft.hf.shape import ModelShape

Packing = Literal["packed", "shared_prefix", "auto"]
Count = Any  # an int, or an int64 array of them

# A plan this well balanced is taken at once; otherwise more packs per rank, and smaller parts, are tried.
GOOD_BALANCE = 0.99
# Numbers of packs per rank that are tried beyond the smallest feasible one.
EXTRA_PACK_COUNTS = 1
# Numbers of packs that have no room for everything are passed over in steps of this part of them.
PACK_COUNT_STRIDE = 64
# A group that costs more than an average pack is cut beforehand only if its prompt is at most this share of it.
MAX_PROMPT_SHARE = 0.25
# ``auto`` shares a prompt only where that saves more than this: kernels are less efficient on prefix segments.
AUTO_MIN_SAVING = 0.03


@dataclass(frozen=True)
class GroupLengths:
    """Tokens of one group: ``prompt`` >= 1, and one length per response, end marker included.

    A response of length 0 is not computed (dead group, source not selected); it keeps its index.
    """

    prompt: int
    responses: tuple[int, ...]


@dataclass(frozen=True)
class FlopModel:
    """Floating-point operations of forward and backward (backward = 2x forward), without recomputation.

    Attributes:
        linear_per_token: all matrices of the trunk, per row.
        attention_per_pair: scores and values of all layers, per visible (query, key) pair.
        head_per_row: output layer, per row that carries loss.
        window: tokens that a query sees, itself included; None = all before it.
    """

    linear_per_token: float
    attention_per_pair: float
    head_per_row: float
    window: int | None = None

    @classmethod
    def from_shape(cls, shape: ModelShape) -> Self:
        """Count a decoder with grouped-query attention and gated MLPs, or ``moe_router_topk`` gated experts."""
        heads = shape.num_attention_heads * shape.kv_channels
        attention = shape.hidden_size * (2 * heads + 2 * shape.num_query_groups * shape.kv_channels)
        mlp = 3 * shape.hidden_size * shape.ffn_hidden_size
        if shape.num_moe_experts is not None:
            width = (shape.moe_router_topk or 1) * (shape.moe_ffn_hidden_size or shape.ffn_hidden_size)
            mlp = 3 * shape.hidden_size * width + shape.hidden_size * shape.num_moe_experts
        return cls(
            linear_per_token=6.0 * shape.num_layers * (attention + mlp),
            attention_per_pair=12.0 * shape.num_layers * heads,
            head_per_row=6.0 * shape.hidden_size * shape.vocab_size,
            window=None if shape.window_size is None else shape.window_size[0] + 1,
        )

    def pairs(self, length: Count, prefix: Count = 0) -> Count:
        """Visible pairs of a causal segment of ``length`` queries that continues ``prefix`` rows."""
        return self._triangle(prefix + length) - self._triangle(prefix)

    def _triangle(self, length: Count) -> Count:
        full = length if self.window is None else np.minimum(length, self.window)
        return full * (full + 1) // 2 + (length - full) * full

    def flops(self, tokens: Count, pairs: Count, loss_rows: Count) -> Any:
        """Cost of ``tokens`` rows with ``pairs`` visible pairs, of which ``loss_rows`` reach the head."""
        return self.linear_per_token * tokens + self.attention_per_pair * pairs + self.head_per_row * loss_rows


# Relative costs of a 7B decoder (hidden 3584, 28 layers); only ratios matter to a plan.
DEFAULT_FLOP_MODEL = FlopModel(linear_per_token=3.9e10, attention_per_pair=1.2e6, head_per_row=3.3e9)


@dataclass(frozen=True)
class PackPlan:
    """One microbatch of one data-parallel rank: ``tokens`` rows, padding included, of which ``loss_rows`` carry loss.

    ``items`` are (group, (response, ...)), both as indices into the lengths that were planned; the responses of an item
    share one prompt. Empty: padding only.
    """

    items: tuple[tuple[int, tuple[int, ...]], ...]
    tokens: int
    flops: float
    loss_rows: int


@dataclass(frozen=True)
class StepPlan:
    """The packs of one optimizer step.

    Attributes:
        packs: [dp_size][packs per rank]; all ranks work on packs[rank][i] at the same time.
        tokens: rows of all packs, padding included; ``padding`` of them hold no token of the data.
        fill: tokens / (packs * max_tokens_per_pack).
        balance: sum over i of the mean cost / sum over i of the maximal cost of microbatch i over the ranks:
            the share of time in which a rank works when the ranks keep step.
    """

    packs: tuple[tuple[PackPlan, ...], ...]
    tokens: int
    padding: int
    flops: float
    fill: float
    balance: float

    @property
    def packs_per_rank(self) -> int:
        return len(self.packs[0])


@dataclass(frozen=True)
class _Segments:
    """Rows of a pack, and cost, that prompts and responses of a step take."""

    lengths: Sequence[GroupLengths]
    flop_model: FlopModel
    alignment: int

    def segment(self, length: Count, prefix: Count = 0, loss_rows: Count = 0) -> tuple[Any, Any]:
        """Rows and cost of segments of ``length`` tokens that continue ``prefix``."""
        rows = -(-length // self.alignment) * self.alignment
        return rows, self.flop_model.flops(rows, self.flop_model.pairs(rows, prefix), loss_rows)

    def by_group(self, cost: Callable[[Any, Any], tuple[Any, ...]]) -> list[list[Any]]:
        """[group][response] -> what ``cost`` says of prompt and response, which it gets as int64 [all responses]."""
        counts = [len(group.responses) for group in self.lengths]
        own = np.array([length for group in self.lengths for length in group.responses], np.int64)
        columns = cost(np.repeat(np.array([group.prompt for group in self.lengths], np.int64), counts), own)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [list(itertools.islice(rows, count)) for count in counts]

    @functools.cached_property
    def prompts(self) -> list[tuple[int, float]]:
        """Rows and cost of each group's prompt as a segment of its own."""
        return [self.segment(lengths.prompt) for lengths in self.lengths]

    @functools.cached_property
    def tails(self) -> list[list[tuple[int, float]]]:
        """[group][response] -> rows and cost that it adds to a pack that holds its prompt; 0 where it has no token."""
        return self.by_group(lambda prompt, own: tuple((own > 0) * x for x in self.segment(own - 1, prompt, own)))

    @functools.cached_property
    def alone(self) -> list[list[Item]]:
        """[group][response] -> the response with a prompt of its own."""
        costs = self.by_group(lambda prompt, own: (*self.segment(prompt + own - 1, 0, own), own))
        return [[Item(g, (k,), *of_one) for k, of_one in enumerate(of_group)] for g, of_group in enumerate(costs)]

    def item(self, group: int, responses: tuple[int, ...]) -> Item:
        """One or several responses of a group, placed together; several share the prompt."""
        if len(responses) == 1:
            return self.alone[group][responses[0]]
        tails, lengths = self.tails[group], self.lengths[group].responses
        rows, flops = zip(self.prompts[group], *[tails[k] for k in responses], strict=True)
        return Item(group, responses, sum(rows), sum(flops), sum([lengths[k] for k in responses]))

    def singles(self, capacity: int, unit: int) -> list[Item]:
        """Every response by itself.

        Raises:
            InputErrors: an empty prompt, or a response that does not fit ``capacity``.
        """
        empty = [group for group, lengths in enumerate(self.lengths) if lengths.prompt < 1]
        problems = [f"group {group} of the step: prompt has no token -> give it one" for group in empty]
        items = [item for of_group in self.alone for item in of_group if item.loss_rows]
        problems += (
            f"group {item.group} of the step, response {item.responses[0]}: {self.lengths[item.group].prompt} prompt + "
            f"{item.loss_rows} response tokens make {item.tokens} rows, max_tokens_per_pack allows {capacity} -> raise "
            f"data.max_tokens_per_pack to {-(-item.tokens // unit) * unit} or drop it"
            for item in items
            if item.tokens > capacity
        )
        refuse("step plan", problems)
        return items


@dataclass(frozen=True)
class _Planner:
    """Everything that stays the same while arrangements of one step are tried."""

    segments: _Segments
    dp_size: int
    capacity: int  # rows of a pack, a multiple of unit
    unit: int  # a pack's rows are padded to a multiple of this
    multiple: int  # of packs per rank
    min_saving: float  # share of the cost of a group's responses below which their prompt is not shared; 1 = never

    @functools.cached_property
    def balancer(self) -> Balancer:
        """Bins with this planner's capacity and costs."""
        return Balancer(self.capacity, self.segments.item, self.segments.tails)

    def joined(self, items: Sequence[Item]) -> list[Item]:
        """The items in order; those of one group as one on one prompt where that saves."""
        if self.min_saving >= 1 or len({item.group for item in items}) == len(items):  # only a shortcut
            return sorted(items)
        joined = []
        for group, of_group in itertools.groupby(sorted(items), key=lambda item: item.group):
            members = list(of_group)
            together = self.segments.item(group, tuple(sorted(k for member in members for k in member.responses)))
            saves = together.flops < (1 - self.min_saving) * cost(members)
            joined += [together] if len(members) > 1 and saves else members
        return joined

    def parts(self, items: Sequence[Item], average: float) -> list[Item]:
        """Items cut down to a pack's rows, and to an average pack's cost where the prompt is a small part of it."""
        parts, waiting = [], list(items)
        while waiting:
            item = waiting.pop()
            dear = item.flops > average and self.segments.prompts[item.group][1] <= MAX_PROMPT_SHARE * item.flops
            if len(item.responses) > 1 and (item.tokens > self.capacity or dear):
                waiting += self.balancer.halves(item)
            else:
                parts.append(item)
        return parts

    def arrange(self, singles: Sequence[Item]) -> list[PackPlan]:
        """Pack plans, dearest first, in the number of packs per rank that keeps the ranks busiest."""
        items = self.joined(singles)
        smallest = max(1, math.ceil(tokens(items) / (self.capacity * self.dp_size)))
        per_rank = math.ceil(smallest / self.multiple) * self.multiple
        best, found = list[PackPlan](), 0
        while found <= EXTRA_PACK_COUNTS:
            parts = self.parts(items, cost(items) / (per_rank * self.dp_size))
            bins = self.balancer.spread(parts, per_rank, self.dp_size)
            if bins is None:  # of many packs a few more cost nothing, trying each number does
                per_rank += self.multiple * max(1, per_rank // (PACK_COUNT_STRIDE * self.multiple))
                continue
            per_rank += self.multiple
            found += 1
            packs = [self.pack(items) for items in bins]
            packs.sort(key=lambda pack: -pack.flops)
            if not best or self.busy_time(packs) < self.busy_time(best):
                best = packs
            if self.balance(best) >= GOOD_BALANCE or len(packs) >= 2 * len(singles):
                break
        return best

    def pack(self, items: Sequence[Item]) -> PackPlan:
        """The plan of one pack; parts of one group that met again share their prompt again."""
        items = self.joined(items)
        used = tokens(items)
        padded = max(self.unit, -(-used // self.unit) * self.unit)
        return PackPlan(
            items=tuple((item.group, item.responses) for item in items),
            tokens=padded,
            flops=cost(items) + self.segments.segment(padded - used)[1],
            loss_rows=sum(item.loss_rows for item in items),
        )

    def microbatches(self, packs: Sequence[PackPlan]) -> list[Sequence[PackPlan]]:
        """Packs that run at the same time, one per rank."""
        return [packs[i : i + self.dp_size] for i in range(0, len(packs), self.dp_size)]

    def busy_time(self, packs: Sequence[PackPlan]) -> float:
        """Cost of the slowest rank, summed over microbatches: what the step takes. Packs come dearest first."""
        return sum(pack.flops for pack in packs[:: self.dp_size])

    def balance(self, packs: Sequence[PackPlan]) -> float:
        """As in :class:`StepPlan`."""
        mean = [sum(pack.flops for pack in microbatch) / self.dp_size for microbatch in self.microbatches(packs)]
        return sum(mean) / self.busy_time(packs)

    def step_plan(self, packs: Sequence[PackPlan], max_tokens_per_pack: int) -> StepPlan:
        """Deal the microbatches out to ranks, forth and back, so that rank totals even out too."""
        dealt = [run if i % 2 == 0 else run[::-1] for i, run in enumerate(self.microbatches(packs))]
        rows = sum(pack.tokens for pack in packs)
        items = itertools.chain.from_iterable(pack.items for pack in packs)
        data = sum(pack.loss_rows for pack in packs)  # without a response's last token, which is only a label
        data += sum(self.segments.lengths[group].prompt - len(responses) for group, responses in items)
        return StepPlan(
            packs=tuple(tuple(run[rank] for run in dealt) for rank in range(self.dp_size)),
            tokens=rows,
            padding=rows - data,
            flops=sum(pack.flops for pack in packs),
            fill=rows / (len(packs) * max_tokens_per_pack),
            balance=self.balance(packs),
        )


def plan_step(
    lengths: Sequence[GroupLengths],
    dp_size: int,
    max_tokens_per_pack: int,
    *,
    packing: Packing = "packed",
    flop_model: FlopModel = DEFAULT_FLOP_MODEL,
    packs_multiple_of: int = 1,
    pad_multiple: int = 1,
    alignment: int = 1,
) -> StepPlan:
    """Plan the packs of one optimizer step.

    Invariants:
        1. Every response of non-zero length is in exactly one pack, once.
        2. Every rank has the same number of packs, at least one, a multiple of ``packs_multiple_of``; packs without
           items (padding only) are explicit.
        3. No pack has more than ``max_tokens_per_pack`` rows, padding included; rows are a multiple of
           ``pad_multiple`` and of ``alignment``, rows of each segment a multiple of ``alignment``.
        4. The plan depends on nothing but the arguments.
        5. Ranks' costs are balanced per microbatch (``StepPlan.balance``), heavier microbatches come first.

    Args:
        max_tokens_per_pack: rows of one microbatch, before context-parallel slicing.
        packing: ``auto`` shares prompts where that is cheaper by ``flop_model``.
        packs_multiple_of: of packs per rank (interleaved pipelines need a multiple of the pipeline size).
        pad_multiple: rows of a pack are a multiple of this (tensor x context size with sequence parallelism, FP8).
        alignment: rows of a segment are a multiple of this (2 * context-parallel size).

    Raises:
        InputErrors: responses that do not fit a pack, empty prompts.
        InputError: ``max_tokens_per_pack`` is below the padding unit.
    """
    unit = math.lcm(pad_multiple, alignment)
    capacity = max_tokens_per_pack // unit * unit
    if capacity == 0:
        raise InputError(
            f"data.max_tokens_per_pack: {max_tokens_per_pack} is below {unit}, to a multiple of which packs are "
            f"padded in this layout -> at least {unit}"
        )
    segments = _Segments(lengths, flop_model, alignment)
    planner = _Planner(segments, dp_size, capacity, unit, packs_multiple_of, min_saving=1.0)
    singles = segments.singles(capacity, unit)
    candidates = []
    if packing != "packed":
        sharing = replace(planner, min_saving=AUTO_MIN_SAVING if packing == "auto" else 0.0)
        candidates.append(sharing.arrange(singles))
    # No arrangement of the packed form beats its average; where sharing does, there is nothing to compare.
    packed_time = cost(singles) / dp_size
    if packing == "packed" or (packing == "auto" and packed_time < planner.busy_time(candidates[0])):
        candidates.append(planner.arrange(singles))
    return planner.step_plan(min(candidates, key=planner.busy_time), max_tokens_per_pack)
