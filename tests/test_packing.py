"""Packs against the sequences they stand for: what each loss row sees and predicts, in both forms and on every rank."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_groups import pack_of

from megatron_gft.packing import slice_for_context_parallel
from megatron_gft.planning import GroupLengths, PackPlan, plan_step
from megatron_gft.shards import Group

PAD = 0
FIELDS = ("labels", "response_index", "sources", "token_weights", "advantages")


def make_groups(lengths, seed=0):
    """Groups with random tokens, none of them ``PAD``."""
    rng = np.random.default_rng(seed)

    def tokens(n):
        return rng.integers(1, 99, n).astype(np.int32)

    return [
        group_of(tokens(group.prompt), [tokens(r) for r in group.responses], rng.integers(0, 3, len(group.responses)))
        for group in lengths
    ]


def group_of(prompt, responses, sources) -> Group:
    count = len(responses)
    arrays = [np.array(tokens, np.int32) for tokens in (prompt, *responses)]
    return Group(arrays[0], arrays[1:], np.array(sources, np.int8), np.full(count, np.nan, np.float32), None)


def visible_rows(pack):
    """For each row, the rows it sees, in order: the rule of PackLayout."""
    seen = []
    for start, length, prefix_start, prefix_length in pack.layout.segments.tolist():
        prefix = [*range(prefix_start, prefix_start + prefix_length)]
        seen += [prefix + [*range(start, start + i + 1)] for i in range(length)]
    return seen


def training_examples(pack):
    """What the pack trains: (response, context tokens, context positions, label, weight, advantage, source)."""
    seen = visible_rows(pack)
    examples = []
    for n, row in enumerate(pack.loss_rows.tolist()):
        context = seen[row]
        examples.append(
            (
                int(pack.response_index[n]),
                tuple(pack.tokens[context].tolist()),
                tuple(pack.position_ids[context].tolist()),
                int(pack.labels[n]),
                float(pack.token_weights[n]),
                float(pack.advantages[n]),
                int(pack.sources[n]),
            )
        )
    return sorted(examples)


def expected_examples(groups, live, weights, advantages):
    """The same from the responses one by one."""
    examples, index = [], 0
    for group, lengths in zip(groups, live, strict=True):
        for k, response in enumerate(group.responses):
            if lengths.responses[k]:
                for i, label in enumerate(response):
                    context = (*group.prompt.tolist(), *response[:i].tolist())
                    positions = tuple(range(len(context)))
                    values = (float(weights[index]), float(advantages[index]), int(group.sources[k]))
                    examples.append((index, context, positions, int(label), *values))
            index += 1
    return sorted(examples)


@st.composite
def steps(draw):
    """Lengths of a step, and the same with some responses switched off."""
    group = st.tuples(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=1, max_size=4))
    full = [GroupLengths(p, tuple(r)) for p, r in draw(st.lists(group, min_size=1, max_size=5))]
    live = [
        dataclasses.replace(g, responses=tuple(r if draw(st.integers(0, 4)) else 0 for r in g.responses)) for g in full
    ]
    return full, live


@settings(max_examples=120, deadline=None)
@given(
    step=steps(),
    packing=st.sampled_from(["packed", "shared_prefix", "auto"]),
    cp_size=st.sampled_from([1, 2, 4]),
    pad_multiple=st.sampled_from([1, 16]),
)
def test_packs_train_every_response_as_if_it_were_alone(step, packing, cp_size, pad_multiple):
    full, live = step
    groups = make_groups(full)
    count = sum(len(group.responses) for group in full)
    weights, advantages = np.arange(1.0, count + 1), np.linspace(-1, 1, count, dtype=np.float32)
    alignment = 1 if cp_size == 1 else 2 * cp_size
    multiples = dict(pad_multiple=pad_multiple)
    plan = plan_step(live, 2, 96, packing=packing, alignment=alignment, **multiples)
    packs = [
        pack_of(p, groups, weights, advantages, segment_multiple=alignment, **multiples)
        for rank in plan.packs
        for p in rank
    ]
    examples = sorted(example for pack in packs for example in training_examples(pack))
    assert examples == expected_examples(groups, live, weights, advantages)
    for pack, planned in zip(packs, (p for rank in plan.packs for p in rank), strict=True):
        assert len(pack.tokens) == len(pack.position_ids) == planned.tokens
        assert len(pack.loss_rows) == planned.loss_rows
        check_slices(pack, cp_size)


def check_slices(pack, cp_size):
    """The ranks' slices are the pack: each row once, each loss row once and where its row is."""
    slices = [slice_for_context_parallel(pack, cp_size, rank) for rank in range(cp_size)]
    assert {len(part.tokens) for part in slices} == {len(pack.tokens) // cp_size}
    order = slices[0].layout.ungather_index(torch.device("cpu"))
    for name in ("tokens", "position_ids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in slices])[order], getattr(pack, name))
    found = []
    for rank, part in enumerate(slices):
        assert part.layout.cp_size == cp_size and part.layout.tokens == len(pack.tokens)
        held = part.layout.rows(rank)
        found += zip(held[part.loss_rows].tolist(), *(getattr(part, name).tolist() for name in FIELDS), strict=True)
    fields = (getattr(pack, name).tolist() for name in FIELDS)
    assert sorted(found) == sorted(zip(pack.loss_rows.tolist(), *fields, strict=True))


def test_shared_prefix_pack_by_hand():
    groups = [group_of([1, 2, 3], [[4, 5], [6], [7, 8, 9]], [0, 1, 2])]
    plan = PackPlan(((0, (0, 1, 2)),), tokens=8, flops=0.0, loss_rows=6)
    pack = pack_of(plan, groups, [1.0, 2.0, 3.0], [0.1, 0.2, 0.3], pad_multiple=8)
    assert pack.tokens.tolist() == [1, 2, 3, 4, 7, 8, PAD, PAD]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 3, 4, 0, 0]
    assert pack.layout.segments.tolist() == [[0, 3, 0, 0], [3, 1, 0, 3], [4, 2, 0, 3], [6, 2, 0, 0]]
    assert pack.loss_rows.tolist() == [2, 3, 2, 2, 4, 5]
    assert pack.labels.tolist() == [4, 5, 6, 7, 8, 9]
    assert pack.token_weights.tolist() == [1, 1, 2, 3, 3, 3]
    assert pack.response_index.tolist() == [0, 0, 1, 2, 2, 2]
    assert pack.sources.tolist() == [0, 0, 1, 2, 2, 2]
    assert pack.groups == (0,)


def test_packed_pack_by_hand():
    groups = [group_of([1], [[2, 3]], [0]), group_of([4, 5], [[6], [7, 8]], [1, 2])]
    plan = PackPlan(((0, (0,)), (1, (1,))), tokens=8, flops=0.0, loss_rows=4)
    pack = pack_of(plan, groups, [1.0, 2.0, 3.0], [0.0] * 3, segment_multiple=4)
    assert pack.tokens.tolist() == [1, 2, PAD, PAD, 4, 5, 7, PAD]
    assert pack.position_ids.tolist() == [0, 1, 0, 0, 0, 1, 2, 0]
    assert pack.layout.segments.tolist() == [[0, 4, 0, 0], [4, 4, 0, 0]]
    assert pack.loss_rows.tolist() == [0, 1, 5, 6]
    assert pack.labels.tolist() == [2, 3, 7, 8]
    assert pack.response_index.tolist() == [0, 0, 2, 2]
    halves = [slice_for_context_parallel(pack, 2, rank) for rank in range(2)]
    assert [half.tokens.tolist() for half in halves] == [[1, PAD, 4, PAD], [2, PAD, 5, 7]]
    assert [half.loss_rows.tolist() for half in halves] == [[0], [0, 2, 3]]


def test_empty_pack_is_padding_without_loss():
    plan = PackPlan((), tokens=8, flops=0.0, loss_rows=0)
    pack = pack_of(plan, [], [], [], pad_multiple=8)
    assert pack.tokens.tolist() == [PAD] * 8 and pack.layout.segments.tolist() == [[0, 8, 0, 0]]
    for name in ("loss_rows", *FIELDS):
        assert getattr(pack, name).shape == (0,)
    assert pack.groups == ()


def test_dtypes_are_those_that_the_model_takes():
    groups = make_groups([GroupLengths(3, (2, 4))])
    plan = plan_step([GroupLengths(3, (2, 4))], 1, 64, packing="shared_prefix").packs[0][0]
    pack = pack_of(plan, groups, np.ones(2), np.ones(2))
    kinds = {field.name: getattr(pack, field.name).dtype for field in dataclasses.fields(pack)[:2]}
    assert set(kinds.values()) == {torch.int64} and pack.token_weights.dtype == torch.float32
    assert (pack.loss_rows.dtype, pack.labels.dtype) == (torch.int64, torch.int64)
    assert (pack.sources.dtype, pack.response_index.dtype) == (torch.int8, torch.int32)
    moved = pack.to("meta")
    assert moved.tokens.is_meta and moved.advantages.is_meta and moved.layout is pack.layout


def test_a_plan_of_other_groups_is_refused():
    plan = plan_step([GroupLengths(3, (2, 5))], 1, 64).packs[0][0]
    with pytest.raises(ValueError, match="plan says"):
        pack_of(plan, make_groups([GroupLengths(3, (2, 4))]), np.ones(2), np.ones(2))
