"""Objectives between SFT and RL: formulas against the published losses, and what lies beside tokens on the way."""

import dataclasses
import math
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import naive_twin
import numpy as np
import pytest
import torch
from group_shards import STAMP
from layout_cases import VOCAB_SIZE, Case, TinyGroups, gradient_errors, make_config, model_folder, run_case
from memory_groups import MemoryGroups
from naive_twin import load_twin, twin_step
from test_batch import BASE, SHAPE, loader_of
from test_step import groups_of_step

from megatron_gft import gft
from megatron_gft.atomic import sha256_file
from megatron_gft.batch import StepLoader, open_groups
from megatron_gft.commands.train import read_command_line
from megatron_gft.config import load_config
from megatron_gft.errors import InputError, InputErrors
from megatron_gft.model import LossOutput
from megatron_gft.objectives import OBJECTIVES, SOURCES, HeadSettings, by_source
from megatron_gft.shards import Group, GroupShard, GroupShardWriter
from megatron_gft.shards.manifest import FileEntry, write_manifest
from megatron_gft.step import MORE_STATISTICS, pack_token_sums
from megatron_gft.validation import check

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ("objective.beta=0.3", "objective.reference=ref")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("objectives")


# --- formulas ---------------------------------------------------------------------------------------------------------


def rows(count: int = 240, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, gft.RowFacts]:
    """log p, A * u and facts of rows on all sides of every clip, none within 1e-3 of one, some log-probs unknown."""
    g = torch.Generator().manual_seed(3)
    logprobs = -4 * torch.rand(count, generator=g, dtype=torch.float64)
    edges = torch.tensor([0.5, 0.95, 1.1, 1.25, 1.6, 3.5, 6.0], dtype=torch.float64)
    sampled = logprobs - edges[torch.arange(count) % 7].log()
    sampled[::11] = torch.nan
    reference = logprobs + torch.randn(count, generator=g, dtype=torch.float64)
    reference[::13] = torch.nan
    advantages = torch.randn(count, generator=g, dtype=torch.float64)
    advantages[::17] = 0
    u = torch.rand(count, generator=g, dtype=torch.float64) + 0.1
    anchors = 0.3 * u * (torch.arange(count) % 3 == 2)
    logprobs[:4] = torch.tensor([-1e-9, -40.0, -90.0, -0.1])
    sampled[1:3] = torch.tensor([-41.0, -89.5])
    reference[:4] = logprobs[:4] + 0.5  # ratios beyond e^20 are bounded, which no paper writes
    sources = (torch.arange(count) % 3).to(torch.int8)
    facts = [advantages, sources, sampled, reference, anchors]
    facts = [value.to(dtype) if value.is_floating_point() else value for value in facts]
    return logprobs.to(dtype), (advantages * u).to(dtype), gft.RowFacts(*facts)


HEADS = [
    *((f"objective={name}", *REFERENCE) for name in OBJECTIVES),
    ("objective=grpo", "objective.ratio_dual_clip=3", "objective.eps_low=0.4", *REFERENCE),
    ("objective=cispo", "objective.eps_high=0.2", *REFERENCE),
    ("objective=luffy", "objective.shaping=0.5", *REFERENCE),
    ("objective.coefficient={expert: none, teacher: rectified, self: truncated_ratio}", *REFERENCE),
]


@pytest.mark.parametrize("options", HEADS, ids=lambda options: " ".join(options[:-2]))
def test_gradient_and_value_are_those_of_the_published_loss(options):
    objective = load_config([], ["model.config=m", *options]).objective
    settings = HeadSettings(
        tau=objective.tau,
        coefficient=by_source(objective.coefficient),
        eps_low=objective.eps_low,
        eps_high=objective.eps_high,
        ratio_dual_clip=objective.ratio_dual_clip,
        shaping=objective.shaping,
    )
    logprobs, token_weights, facts = rows()
    trained = torch.isin(facts.sources, torch.tensor([SOURCES.index(source) for source in objective.sources]))
    twin = logprobs.clone().requires_grad_()
    losses = [
        naive_twin.published_loss(objective, SOURCES[source], p, float(q), float(w))
        + naive_twin.anchor_loss(p, float(ref), float(anchor))
        for p, source, q, ref, w, anchor in zip(
            twin, facts.sources, facts.sampled_logprobs, facts.reference_logprobs, token_weights, facts.anchor_weights,
            strict=True,
        )
        if SOURCES[source] in objective.sources
    ]  # fmt: skip
    torch.stack(losses).sum().backward()
    weights = gft.row_weights(logprobs, token_weights, settings, facts)
    torch.testing.assert_close(-weights[trained], twin.grad[trained], rtol=1e-12, atol=1e-12)
    values = gft.published_losses(logprobs, token_weights, settings, facts)[trained]
    torch.testing.assert_close(values, torch.stack(losses).detach(), rtol=1e-12, atol=1e-12)
    # chunk by chunk, and in single precision, as in the head
    parts = [slice(0, 7), slice(7, 240)]
    cut = [gft.row_weights(logprobs[part], token_weights[part], settings, facts.at(part)) for part in parts]
    assert torch.equal(torch.cat(cut), weights)
    single = gft.row_weights(*rows(dtype=torch.float32)[:2], settings, rows(dtype=torch.float32)[2])
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double()[4:], weights[4:], rtol=1e-4, atol=1e-5)


def test_log_ratios_are_bounded_and_unknown_ones_count_as_none():
    logprobs = torch.tensor([-500.0, -0.0, -3.0])
    other = torch.tensor([-0.0, -500.0, torch.nan])
    assert gft.log_ratio(logprobs, other).tolist() == [-20, 20, 0]
    assert gft.log_ratio(logprobs, None).tolist() == [0, 0, 0]


@pytest.mark.parametrize("shift", [-0.1, 0.0, 0.25])
def test_rewards_and_shifts_as_advantages(shift):
    rewards, ids = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5, -1.0]), torch.tensor([0, 0, 1, 1, 2, 0])
    assert gft.group_advantages(rewards, ids, mode="reward", baseline_shift=shift).tolist() == rewards.tolist()
    shifted = gft.group_advantages(rewards.double(), ids, mode="mean_only", baseline_shift=shift)
    assert shifted.tolist() == pytest.approx([1 - shift, -shift, -shift, -shift, 0.5, -1 - shift], abs=1e-15)


def test_each_stratum_has_its_own_denominator():
    advantages = torch.tensor([1.0, 1.0, -2.0, 2.0, 0.0], dtype=torch.float64)
    lengths, ids = torch.tensor([4, 6, 3, 5, 2]), torch.tensor([0, 1, 0, 1, 2])
    strata = torch.tensor([0, 0, 2, 2, 2])
    weights, denominator = gft.response_weights(torch.stack((advantages, advantages * 0)), lengths, ids, strata=strata)
    assert denominator == 20 and (weights[1] == 0).all()
    losses = torch.arange(1.0, 6, dtype=torch.float64)
    total = (weights[0] * lengths * losses).sum() / denominator
    expected = sum((advantages * lengths * losses)[strata == s].sum() / lengths[strata == s].sum() for s in (0, 2))
    assert total == pytest.approx(float(expected), rel=1e-14)
    # an empty or dead stratum
    weights, denominator = gft.response_weights(
        advantages * (strata == 0), lengths, ids, strata=strata, zero_variance="skip"
    )
    assert denominator == 10 and weights.tolist() == [1, 1, 0, 0, 0]


# --- a user's own coefficient -----------------------------------------------------------------------------------------

USER = {
    "good": "return torch.sigmoid(logprobs + (0 if q is None else logprobs - q)) * (1 + advantages.sign()) + sources",
    "integers": "return (logprobs > -1).long()",
    "shape": "return logprobs.sum()",
    "none": "return None",
    "nan": "return torch.log(logprobs)",
    "others": "return logprobs / logprobs.mean()",
    "fails": "return logprobs + nothing",
}
WRONG = {
    "shape": r"returns torch.Size",
    "none": "returns NoneType",
    "nan": "returns NaN or infinity",
    "others": "depends on other rows",
    "fails": "fails with NameError: name 'nothing'",
    "absent": "has no attribute 'absent'",
    "number": "a int -> name a function",
}


@pytest.fixture(scope="module")
def user_module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    body = [f"def {name}(logprobs, q, advantages, sources):\n    {line}" for name, line in USER.items()]
    (folder / "their_coefficients.py").write_text("import torch\nnumber = 3\n\n" + "\n\n\n".join(body) + "\n")
    (folder / "their_broken_module.py").write_text("1 / 0\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield "their_coefficients"


@pytest.mark.parametrize("with_q", [False, True])
def test_a_users_coefficient_is_tried_first(user_module, with_q):
    for name in ("good", "integers"):
        gft.check_user_coefficient(f"{user_module}:{name}", with_q=with_q)
    for name, message in WRONG.items():
        with pytest.raises(InputError, match=message):
            gft.check_user_coefficient(f"{user_module}:{name}", with_q=with_q)
    for name, message in {"their_broken_module:f": "division by zero", "no_such_module:f": "No module named"}.items():
        with pytest.raises(InputError, match=message):
            gft.check_user_coefficient(name, with_q=with_q)


def test_a_users_coefficient_weighs_rows_and_ends_without_q_count_as_one(user_module):
    logprobs, token_weights, facts = rows()
    settings = HeadSettings(coefficient=(f"{user_module}:good", None, "none"))
    c = gft.row_coefficient(logprobs, settings, facts)
    q, expert = facts.sampled_logprobs, facts.sources == 0
    expected = torch.sigmoid(2 * logprobs - q) * (1 + facts.advantages.sign())
    torch.testing.assert_close(c, torch.where(expert & ~q.isnan(), expected, 1.0))
    without = gft.row_coefficient(logprobs, settings, dataclasses.replace(facts, sampled_logprobs=None))
    torch.testing.assert_close(without[expert], (torch.sigmoid(logprobs) * (1 + facts.advantages.sign()))[expert])


@pytest.mark.parametrize("layout", ["", "parallel.tp=2 data.packing=shared_prefix"])
def test_a_users_coefficient_trains(root, user_module, layout):
    """The same gradients under both heads."""
    world_size = 2 if layout else 1
    overrides = ("objective.coefficient=their_coefficients:good", *layout.split())
    run = run_case(root, Case(world_size=world_size, overrides=overrides, steps=(0, 1)))
    assert run.updated == [True, True] and all(map(math.isfinite, run.losses))
    assert run.gradients["fused"].keys() == run.gradients["unfused"].keys()
    assert max(gradient_errors(run.gradients["fused"], run.gradients["unfused"]).values()) <= 5e-6


# --- which responses train --------------------------------------------------------------------------------------------


class Fewer(MemoryGroups):
    """Groups without the responses that ``wrong`` names, and without groups of which none is left."""

    def __init__(self, groups: MemoryGroups, wrong):
        kept = [(g, [k for k in range(len(g.responses)) if not wrong(g, k)]) for g in groups.items]
        items = [
            Group(g.prompt, [g.responses[k] for k in ks], g.sources[ks], g.rewards[ks], None) for g, ks in kept if ks
        ]
        super().__init__(items, "fewer")


@pytest.mark.parametrize(
    ("correct", "plain", "normalize"),
    [("rft", "sft", "tokens"), ("rft", "sft", "groups"), ("dft_correct", "dft", "sequences")],
)
def test_correct_only_is_sft_on_the_file_without_wrong_rows(root, correct, plain, normalize):
    groups = TinyGroups()
    whole = ("data.groups_per_step=30", f"objective.normalize={normalize}", "data.packing=shared_prefix")
    ours = run_case(root, Case(overrides=(*whole, f"objective={correct}"), groups=groups, steps=(0,)))
    without = Fewer(groups, lambda group, k: group.rewards[k] == 0)
    options = (*whole, f"objective={plain}", "objective.sources=[expert,teacher,self]")
    theirs = run_case(root, Case(overrides=options, groups=without, steps=(0,)))
    assert ours.denominators == theirs.denominators
    assert abs(ours.losses[0] - theirs.losses[0]) <= 1e-6 * theirs.scales[0]
    assert max(gradient_errors(ours.gradients["fused"], theirs.gradients["fused"]).values()) <= 5e-6


def test_negatives_scaled_to_nothing_enter_neither_compute_nor_d():
    groups = TinyGroups()
    gone, full = (loader_of([f"objective.negative_scale={s}"], groups).batch(0) for s in (0, 1))
    assert (gone.lengths[(full.advantages < 0).numpy()] == 0).all()
    kept = (full.advantages >= 0).numpy()
    lengths = [len(tokens) for index in full.groups for tokens in groups[index].responses]
    assert gone.denominator == int(np.array(lengths)[kept].sum()) < full.denominator
    assert torch.equal(gone.advantages[kept], full.advantages[kept])


class CutOff(TinyGroups):
    """Every third response has no end."""

    def __init__(self):
        super().__init__()
        self.items = [
            dataclasses.replace(g, ended=np.arange(len(g.responses)) % 3 != 1, logprobs=None) for g in self.items
        ]


@pytest.mark.parametrize("policy", ["train", "no_loss", "drop"])
def test_responses_without_an_end(root, policy):
    groups = CutOff()
    options = (f"objective.cut_off={policy}", "objective.normalize=groups")
    batch = loader_of(options, groups).batch(0)
    cut = np.array([not end for index in batch.groups for end in groups[index].ended])
    assert (batch.lengths[cut] > 0).any() == (policy == "train")
    whole = loader_of(groups=groups).batch(0)
    same_statistics = torch.equal(batch.advantages[~cut], whole.advantages[~cut])
    assert same_statistics == (policy != "drop")
    case = Case(overrides=options, groups=groups, steps=(0,))
    run = run_case(root, case)
    folder = model_folder(root, "tied")
    objective = make_config(folder, case, root).objective
    twin = twin_step(load_twin(folder), [groups[i] for i in groups_of_step(groups, 0)], objective)
    assert run.denominators == [twin.denominator]
    assert abs(run.losses[0] - twin.loss) <= 1e-6 * twin.scale
    expected = {name: gradient.numpy() for name, gradient in twin.gradients.items()}
    assert max(gradient_errors(run.gradients["fused"], expected).values()) <= 5e-6


@pytest.mark.parametrize("zero_variance", ["keep", "skip"])
def test_dead_groups_get_exactly_the_gradient_of_the_anchor(root, zero_variance):
    groups = TinyGroups()
    groups.items = [dataclasses.replace(group, rewards=0 * group.rewards) for group in groups.items]
    options = ("objective=grpo", *REFERENCE, f"objective.zero_variance={zero_variance}")
    case = Case(overrides=options, groups=groups, steps=(0,))
    run = run_case(root, case)
    folder = model_folder(root, "tied")
    objective = make_config(folder, case, root).objective
    chosen = [groups[i] for i in groups_of_step(groups, 0)]
    twin = twin_step(load_twin(folder), chosen, objective)
    assert (
        run.updated == [True] and run.losses == [0.0] and run.denominators == [twin.denominator] and twin.published > 0
    )
    assert run.published[0] == pytest.approx(twin.published, rel=1e-5)
    expected = {name: gradient.numpy() for name, gradient in twin.gradients.items()}
    for gradients in run.gradients.values():
        assert max(gradient_errors(gradients, expected).values()) <= 5e-6


def test_mu_rises_falls_and_stays():
    options = ["model.config=m", "objective=chord_phi", "objective.mu_peak=0.8"]
    assert load_config([], options).objective.mu(7) == 0.8
    schedule = ["objective.mu_valley=0.2", "objective.mu_warmup_steps=4", "objective.mu_decay_steps=10"]
    mu = load_config([], [*options, *schedule]).objective.mu
    assert [mu(step) for step in (0, 2, 4, 9, 14, 99)] == pytest.approx([0, 0.4, 0.8, 0.5, 0.2, 0.2])
    batch = loader_of(["objective=chord_phi", "objective.mu_peak=0.8", *schedule]).batch(0)
    assert (batch.lengths[batch.sources == 0] == 0).all() and batch.loss_tokens > 0  # mu = 0
    assert load_config([], ["model.config=m"]).objective.mu(3) is None


# --- log-probs from shards to rows ------------------------------------------------------------------------------------


def write_shard(prefix: Path, *, unknown_at: int | None = None, temperature: float | None = None, eos: bool = True):
    """Groups of an expert without and two samples with log-probs of all tokens but EOS (id 2)."""
    rng = np.random.default_rng(0)
    row = {"model": "m", "source": "self", "sampling": {"temperature": temperature}, "count": 8}
    provenance = {"responses": [] if temperature is None else [row]}
    stamp = STAMP.model_copy(update={"vocab_size": VOCAB_SIZE})
    with GroupShardWriter(prefix, stamp, provenance=provenance) as writer:
        for index in range(4):
            responses = [[*rng.integers(3, VOCAB_SIZE, n).tolist(), 2] for n in (4, 5, 3)]
            logprobs = [None] + [(-rng.random(len(r) - 1)).tolist() for r in responses[1:]]
            if index == 2 and unknown_at is not None:
                logprobs[1] = logprobs[1][:unknown_at]
            if index == 3 and not eos:
                responses[2] = responses[2][:-1]
                logprobs[2] = logprobs[2][:-1]
            writer.add_group(
                [5, 6, 7], responses, ["expert", "self", "self"], [1.0, 1.0, 0.0], group_id=f"g{index}",
                logprobs=logprobs,
            )  # fmt: skip


def add_sidecar(prefix: Path, name: str, value: float) -> None:
    """A second file of log-probs, as a tool that computes them will write it."""
    shard = GroupShard(prefix)
    path = prefix.with_name(f"{prefix.name}.logprobs-{name}.npy")
    np.save(path, np.full(shard.manifest.counts.response_tokens, value, np.float32))
    files = {**shard.manifest.files, path.name: FileEntry(bytes=path.stat().st_size, sha256=sha256_file(path))}
    names = {**shard.manifest.logprob_files, name: path.name}
    write_manifest(prefix, shard.manifest.model_copy(update={"files": files, "logprobs": names}))


def shard_config(prefix: Path, *options: str):
    (prefix.parent / "config.json").write_text("{}")
    paths = [f"data.train=[{prefix}]", f"model.config={prefix.parent}/config.json"]
    return load_config([], [*BASE, *paths, "data.groups_per_step=4", *options])


def packs_of(prefix: Path, *options: str):
    config = shard_config(prefix, *options)
    groups, _ = open_groups(config, SHAPE)
    loader = StepLoader(groups, config, SHAPE, loader_of().parallel)
    return loader.packs(loader.batch(0)), groups


def test_sampling_log_probs_come_to_their_rows(tmp_path):
    write_shard(tmp_path / "shard")
    packs, groups = packs_of(tmp_path / "shard", "objective=grpo")
    known = {}
    for index in range(len(groups)):
        group = groups[index]
        for response, values in list(zip(group.responses, group.logprobs, strict=True))[1:]:
            known[tuple(response)] = values
    seen = 0
    for pack in packs:
        for index in pack.response_index.unique():
            mine = pack.response_index == index
            q, labels = pack.sampled_logprobs[mine].numpy(), pack.labels[mine].tolist()
            np.testing.assert_array_equal(q, known[tuple(labels)])
            assert np.isnan(q[-1]) and not np.isnan(q[:-1]).any()
            seen += 1
    assert seen == 8 and pack.sampled_logprobs.dtype == torch.float32
    assert packs_of(tmp_path / "shard", "objective=gft")[0][0].sampled_logprobs is None
    # expert rows need q only where their own coefficient does
    luffy = packs_of(tmp_path / "shard", "objective=luffy", "objective.sources=[expert,self]")[0]
    assert all(pack.sampled_logprobs is not None for pack in luffy)


def test_named_log_probs_are_q_and_reference(tmp_path):
    write_shard(tmp_path / "shard", unknown_at=1)
    before = GroupShard(tmp_path / "shard").manifest.fingerprint
    add_sidecar(tmp_path / "shard", "start", -2.5)
    add_sidecar(tmp_path / "shard", "other", -1.5)
    options = ["objective=psft", "data.logprobs=start", "objective.sources=[expert,self]"]
    packs, _ = packs_of(tmp_path / "shard", *options, "objective.beta=0.1", "objective.reference=other")
    for pack in packs:
        assert (pack.sampled_logprobs == -2.5).all() and (pack.reference_logprobs == -1.5).all()
        assert torch.equal(pack.anchor_weights > 0, pack.sources == 2)
    assert GroupShard(tmp_path / "shard").manifest.fingerprint == before  # the order of groups stays
    shard = pickle.loads(pickle.dumps(GroupShard(tmp_path / "shard", ("other", "start"))))
    assert (shard[1].logprobs[0] == -1.5).all() and (shard[1].reference[0] == -2.5).all()


def test_statistics_of_q_are_of_rows_that_read_it():
    """Three experts, whose coefficient reads p alone, and four samples: one end without q, one ratio clipped."""
    sources, n = torch.tensor([0, 0, 0, 2, 2, 2, 2], dtype=torch.int8), 7
    q = torch.tensor([torch.nan, -1.0, torch.nan, -1.0, -1.5, -2.5, torch.nan])
    pack = SimpleNamespace(
        token_weights=torch.ones(n), advantages=torch.ones(n), sources=sources,
        facts=gft.RowFacts(torch.ones(n), sources, q),
    )  # fmt: skip
    output = LossOutput(torch.zeros(()), torch.full((n,), -1.5), None)
    sums = pack_token_sums(pack, output, HeadSettings(coefficient=("shaped", None, "clipped_ratio")))[2, 0]
    found = dict(zip(MORE_STATISTICS, sums[-len(MORE_STATISTICS) :].tolist(), strict=True))
    assert found["unknown_q"] == 1 and found["known_q"] == 3 and found["clipped"] == 1
    assert found["sampling_gap"] == pytest.approx(0.5 + 0.0 + 1.0)
    assert found["published_loss"] == pytest.approx(-(math.exp(-0.5) + 1 + 1.2 + 1))
    everything = pack_token_sums(pack, output, HeadSettings(coefficient=("shaped", None, "clipped_ratio")))
    assert everything[0, 0, -len(MORE_STATISTICS) + 1 :].tolist() == [0] * (len(MORE_STATISTICS) - 1)


MAKE = "tools/compute_logprobs.py"


@pytest.mark.parametrize(
    ("shard", "options", "parts"),
    [
        ({"unknown_at": 2}, ["objective=grpo"], ["(id 'g2')", "q is unknown for 3 of 6", "response 1", MAKE]),
        ({"eos": False}, ["objective=grpo"], ["(id 'g3')", "q is unknown for 1 of 3", "response 2 (self)", MAKE]),
        ({}, ["objective=psft"], ["response 0 (expert)", "q is unknown for 4 of 5", MAKE]),
        ({}, ["objective=grpo", "data.logprobs=old"], ["shard: has no log-probs 'old'", "q of its self", MAKE]),
        ({}, ["objective=grpo", *REFERENCE], ["shard: has no log-probs 'ref'", "p_ref of its self", MAKE]),
        ({}, ["objective=sft", "data.logprobs=old"], []),
        ({}, ["objective=gft", "objective.reference=ref"], []),
        ({"temperature": 0.7}, ["objective=grpo"], ["self responses, temperature 0.7", "sample at 1", MAKE]),
        ({"temperature": 0.7}, ["objective=gft"], []),
        ({"temperature": 1.0}, ["objective=grpo"], []),
        ({"temperature": 0.7}, ["objective=sft"], []),
    ],
)  # fmt: skip
def test_unknown_log_probs_are_refused_with_shard_group_and_tool(tmp_path, shard, options, parts):
    write_shard(tmp_path / "shard", **shard)
    if not parts:
        packs_of(tmp_path / "shard", *options)
        return
    with pytest.raises(InputError) as error:
        packs_of(tmp_path / "shard", *options)
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_ends_are_read_only_where_somebody_asks(tmp_path):
    write_shard(tmp_path / "shard", eos=False)
    groups = open_groups(shard_config(tmp_path / "shard"), SHAPE)[0]
    assert len(groups.table([0, 3]).ended) == 0
    assert groups.table([3, 0], ends=True).ended.tolist() == [True, True, False, True, True, True]
    cut = shard_config(tmp_path / "shard", "data.max_response_tokens=5", "data.overlong=truncate")
    assert open_groups(cut, SHAPE)[0].table([0], ends=True).ended.tolist() == [True, False, True]
    limits = ("data.max_response_tokens=5", "data.overlong=drop")
    dropped = shard_config(tmp_path / "shard", "objective=grpo", *limits)
    group = open_groups(dropped, SHAPE)[0][3]
    assert group.ended.tolist() == [True, False] and len(group.logprobs) == 2


# --- configuration and pages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["objective.beta=0.1"], ["objective.reference"]),
        (["objective=luffy", "objective.coefficient={self: ratio}"], ["none for expert, teacher"]),
        (["objective.advantage={self: std}"], ["objective.advantage", "none for expert, teacher"]),
        (["objective=rft", "objective.baseline_shift=-0.1"], ["has no baseline"]),
        (["objective=rft", "objective.sources=[expert]"], []),
        (["objective=dapo", "objective.cut_off=no_loss", "objective.ratio_dual_clip=3"], []),
    ],
)
def test_settings_that_contradict_each_other(options, parts):
    config = load_config([], ["model.config=m", *options])
    if not parts:
        check(config, SHAPE, 1, training=False)
        return
    with pytest.raises(InputErrors) as error:
        check(config, SHAPE, 1, training=False)
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_every_preset_is_explained(capsys):
    with pytest.raises(SystemExit):
        read_command_line(["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "objectives.md").read_text())
    for name, preset in OBJECTIVES.items():
        for part in (name, preset.formula, preset.paper, preset.use):
            assert part in text and part in page, (name, part)
