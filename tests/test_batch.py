"""From a step number to microbatches: the same step at every layout, every live token once, nothing read in vain."""

import dataclasses

import numpy as np
import pytest
import torch
from group_shards import STAMP
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_cases import TinyGroups
from ranks import run_ranks

from megatron_gft.batch import StepLoader, open_groups
from megatron_gft.config import load_config
from megatron_gft.errors import InputError, InputErrors
from megatron_gft.hf.shape import model_shape_from_config
from megatron_gft.parallel import Parallel
from megatron_gft.shards import GroupShardWriter, GroupTable

SHAPE = model_shape_from_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 67,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
    },
    "config.json",
)
BASE = ["model.config=none", "data.groups_per_step=6", "data.max_tokens_per_pack=96"]


class UnscoredGroups(TinyGroups):
    """Rewards of groups 4 and 9 were never given."""

    def table(self, indices) -> GroupTable:
        table = super().table(indices)
        rewards = table.rewards.copy()
        for place, index in enumerate(indices):
            if index in (4, 9):
                rewards[table.offsets[place]] = np.nan
        return dataclasses.replace(table, rewards=rewards)


def rank_of(config, dp_size=1, dp_rank=0, cp_rank=0) -> Parallel:
    """A layout without process groups: planning and packing ask for sizes and ranks alone."""
    p = config.parallel
    groups = {name: None for name in ("tp", "pp", "dp_cp")}
    return Parallel(
        world_size=p.tp * p.pp * p.cp * dp_size,
        rank=0,
        **{f"{name}_group": group for name, group in groups.items()},
        **{"tp_size": p.tp, "tp_rank": 0, "pp_size": p.pp, "pp_rank": 0, "cp_size": p.cp, "cp_rank": cp_rank},
        **{"dp_size": dp_size, "dp_rank": dp_rank, "ep_size": 1, "ep_rank": 0, "etp_size": 1, "etp_rank": 0},
        expert_dp_rank=0,
        vp_size=p.vpp,
    )


def loader_of(overrides=(), groups=None, **options) -> StepLoader:
    config = load_config([], [*BASE, *overrides])
    validation = options.pop("validation", False)
    return StepLoader(groups or TinyGroups(), config, SHAPE, rank_of(config, **options), validation=validation)


def packs_of_all_ranks(overrides, groups, step, dp_size):
    """[(dp rank, context rank)] -> packs of a step."""
    config = load_config([], [*BASE, *overrides])
    packs = {}
    for dp_rank in range(dp_size):
        for cp_rank in range(config.parallel.cp):
            loader = loader_of(overrides, groups, dp_size=dp_size, dp_rank=dp_rank, cp_rank=cp_rank)
            packs[dp_rank, cp_rank] = loader.packs(loader.batch(step))
    return config, packs


LAYOUTS = [
    [],
    ["parallel.cp=2"],
    ["parallel.tp=2", "parallel.sequence_parallel=true"],
    ["parallel.cp=2", "parallel.tp=4", "parallel.sequence_parallel=true"],
    ["parallel.pp=2", "parallel.vpp=2"],
]


@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    packing=st.sampled_from(["packed", "shared_prefix", "auto"]),
    dp_size=st.integers(1, 5),
    seed=st.integers(0, 100),
    step=st.integers(0, 4),
    rows=st.integers(64, 200),
)
def test_every_live_token_is_learned_once_with_its_weight(layout, packing, dp_size, seed, step, rows):
    groups = TinyGroups(seed=seed)
    overrides = [*layout, f"data.packing={packing}", f"data.max_tokens_per_pack={rows}"]
    config, packs = packs_of_all_ranks(overrides, groups, step, dp_size)
    batch = loader_of(overrides, groups).batch(step)
    segment, unit = config.row_multiples
    assert len({len(of_rank) for of_rank in packs.values()}) == 1
    learned = {}
    for of_rank in packs.values():
        assert config.parallel.vpp is None or len(of_rank) % config.parallel.pp == 0
        for pack in of_rank:
            assert pack.layout.tokens <= rows and pack.layout.tokens % unit == 0
            assert all(length % segment == 0 for _, length, *_ in pack.layout.segments.tolist())
            for index in pack.response_index.unique().tolist():
                mine = pack.response_index == index
                learned.setdefault(index, []).extend(pack.labels[mine].tolist())
                np.testing.assert_allclose(pack.token_weights[mine], float(batch.weights[index]), rtol=1e-6)
                assert (pack.sources[mine] == int(batch.sources[index])).all()
    responses = [tokens.tolist() for index in batch.groups for tokens in groups[index].responses]
    live = {index for index, advantage in enumerate(batch.advantages) if advantage != 0}
    assert learned.keys() == live
    for index in live:
        assert sorted(learned[index]) == sorted(responses[index])


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_a_step_is_the_same_at_every_layout(layout):
    plain, other = loader_of(), loader_of(layout, dp_size=3, dp_rank=2)
    for step in (0, 4, 5, 12):
        one, two = plain.batch(step), other.batch(step)
        assert one.groups.tolist() == two.groups.tolist() and one.denominator == two.denominator
        assert torch.equal(one.weights, two.weights) and torch.equal(one.advantages, two.advantages)


def test_each_epoch_takes_every_group_once_and_the_last_step_is_smaller():
    groups = TinyGroups(count=20)
    loader = loader_of(groups=groups)
    assert loader.steps_per_epoch == 4
    epochs = [[int(g) for step in range(4 * e, 4 * e + 4) for g in loader.batch(step).groups] for e in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 2 and epochs[0] != epochs[1]
    last = loader.batch(3)
    assert len(last.groups) == 2
    assert last.denominator == sum(len(t) for g in last.groups for t in groups[g].responses)


def test_the_order_depends_on_seed_and_data():
    def first(overrides=(), groups=None):
        return loader_of(overrides, groups).batch(0).groups.tolist()

    changed = TinyGroups()
    changed.fingerprint = "other"
    assert first() == first(["parallel.tp=2"])
    assert first() != first(["train.seed=1"]) and first() != first(groups=changed)


def test_sources_that_are_not_selected_enter_nothing():
    groups = TinyGroups(dead=())
    batch = loader_of(["objective.advantage=none", "objective.sources=[teacher]"], groups).batch(0)
    chosen = [int(source) == 1 for source in batch.sources]
    lengths = [len(tokens) for index in batch.groups for tokens in groups[index].responses]
    assert batch.lengths.tolist() == [n if mine else 0 for n, mine in zip(lengths, chosen, strict=True)]
    assert batch.denominator == batch.loss_tokens == int(batch.lengths.sum())
    # the advantage of those that remain is computed among them
    two = loader_of(["objective.sources=[expert,teacher]", "objective.advantage=mean_only"], groups).batch(0)
    by_group = [two.advantages[a:b] for a, b in zip(two.offsets[:-1], two.offsets[1:], strict=True) if b - a > 1]
    assert all(abs(float(advantages.sum())) < 1e-12 and (advantages[2:] == 0).all() for advantages in by_group)


def test_a_missing_reward_names_its_groups_only_where_rewards_count():
    with pytest.raises(InputError) as error:
        for step in range(5):
            loader_of(groups=UnscoredGroups()).batch(step)
    assert "reward missing" in str(error.value) and "tools/score_groups.py" in str(error.value)
    assert str(error.value).endswith(("g4)", "g9)"))
    assert loader_of(["objective=sft"], UnscoredGroups()).batch(0).denominator > 0


def test_validation_takes_every_response_in_order_with_weight_one():
    loader = loader_of(groups=UnscoredGroups(count=8), validation=True)
    batches = [loader.batch(step) for step in range(2)]
    assert [batch.groups.tolist() for batch in batches] == [[0, 1, 2, 3, 4, 5], [6, 7]]
    for batch in batches:
        assert (batch.weights == 1).all() and batch.dead_groups == 0
        assert batch.denominator == batch.loss_tokens


def test_a_rank_reads_only_its_own_groups():
    class Watched(TinyGroups):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    groups, seen = Watched(), []
    for rank in range(3):
        read = []
        loader = loader_of(["data.packing=shared_prefix"], groups, dp_size=3, dp_rank=rank)
        batch = loader.batch(0)
        packs = loader.packs(batch)
        assert sorted(read) == sorted({int(batch.groups[place]) for pack in packs for place in pack.groups})
        seen += read
    assert len(seen) < 3 * len(batch.groups)


# --- shards -----------------------------------------------------------------------------------------------------------


def _open(config):
    return len(open_groups(config, SHAPE)[0])


@pytest.mark.parametrize(("objective", "source"), [("sft", "expert"), ("grpo", "self")])
def test_an_objective_without_a_response_to_train_on_is_refused(tmp_path, objective, source):
    """It would do its steps, export the weights it began with, and end well."""
    with GroupShardWriter(tmp_path / "shard", STAMP.model_copy(update={"vocab_size": 67})) as writer:
        writer.add_group([1] * 5, [[2] * 4, [3]], ["teacher", "teacher"], [1.0, 0.0], group_id="g")
    (tmp_path / "config.json").write_text("{}")
    paths = [f"data.train=[{tmp_path}/shard]", f"model.config={tmp_path}/config.json"]
    config = load_config([], [*BASE, *paths, f"objective={objective}"])
    message = f"no response of {source} .but of teacher.*-> objective.sources=.teacher."
    with pytest.raises(InputError, match=message):
        open_groups(config, SHAPE)
    named = load_config([], [*BASE, *paths, f"objective={objective}", "objective.sources=[teacher]"])
    if objective == "sft":
        assert len(open_groups(named, SHAPE)[0]) == 1


@pytest.mark.parametrize(
    ("response_tokens", "overrides", "fits"),
    [
        (60, ["data.max_tokens_per_pack=200"], True),  # 64 positions, which the model has
        (60, ["data.max_tokens_per_pack=63"], False),  # 60 + 4 rows
        (60, ["data.max_tokens_per_pack=64", "parallel.cp=4"], True),
        (
            60,
            ["data.max_tokens_per_pack=71", "parallel.cp=4", *LAYOUTS[2]],
            True,
        ),
        (60, ["data.max_tokens_per_pack=200", "data.max_response_tokens=59"], False),
        (61, ["data.max_tokens_per_pack=200"], False),  # RoPE would go on without a word; the model has not seen it
    ],
)
def test_what_does_not_fit_a_pack_or_the_model_is_refused_on_opening(tmp_path, response_tokens, overrides, fits):
    with GroupShardWriter(tmp_path / "shard", STAMP.model_copy(update={"vocab_size": 67})) as writer:
        writer.add_group([1] * 5, [[2] * response_tokens, [3]], ["expert", "self"], [1.0, 0.0], group_id="long")
    (tmp_path / "config.json").write_text("{}")
    paths = [f"data.train=[{tmp_path}/shard]", f"model.config={tmp_path}/config.json"]
    config = load_config([], [*BASE, *paths, *overrides])
    if fits:
        assert run_ranks(1, _open, config) == [1]
        return
    with pytest.raises(RuntimeError, match="over-long groups") as error:
        run_ranks(1, _open, config)
    assert InputErrors.__name__ in str(error.value) and "'long'" in str(error.value)
