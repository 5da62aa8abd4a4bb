"""One step: every objective against formulas in loops, dead groups and dead steps at every kind of layout, bf16."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from layout_cases import GROUPS_PER_STEP, Case, TinyGroups, gradient_errors, make_config, model_folder, run_case
from naive_twin import load_twin, twin_step
from ranks import run_ranks

from megatron_gft.batch import StepLoader
from megatron_gft.group_order import step_groups
from megatron_gft.hf.shape import read_model_shape
from megatron_gft.hf.weights import load_hf_weights
from megatron_gft.model import LossOutput, build_model
from megatron_gft.objectives import HeadSettings
from megatron_gft.optimizer import build_optimizer, reduce_gradients, wrap_data_parallel
from megatron_gft.pack_layout import PackLayout
from megatron_gft.packing import Pack
from megatron_gft.parallel import initialize_parallel, seed_everything
from megatron_gft.step import STATISTICS, LossReport, StepRunner, pack_token_sums

SHARED, SMALL = "data.packing=shared_prefix", "data.max_tokens_per_pack=64"
OVERLAP = "optimizer.overlap_grad_reduce=true"
OVERLAP_ALL = f"{OVERLAP} optimizer.overlap_param_gather=true"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("steps")


def groups_of_step(groups: TinyGroups, step: int, seed: int = 1234) -> list[int]:
    order = step_groups(
        step, num_groups=len(groups), groups_per_step=GROUPS_PER_STEP, seed=seed, fingerprint=groups.fingerprint
    )
    return [int(index) for index in order]


# --- every objective --------------------------------------------------------------------------------------------------

OBJECTIVES = [
    "",
    "objective.normalize=sequences",
    "objective.normalize=groups objective.zero_variance=skip",
    "objective.zero_variance=skip",
    "objective.advantage=population objective.normalize=groups",
    "objective.advantage=mean_only",
    "objective.advantage=rloo objective.zero_variance=skip objective.normalize=sequences",
    "objective.coefficient=none",
    "objective.name=sft",
    "objective.name=sft objective.sources=[expert,teacher] objective.normalize=groups",
    "objective.name=dft",
    "objective.coefficient=probability objective.sources=[teacher,self]",
    "objective.tau=0",
    "objective.tau=1",
    # each preset that is not named above, and what stands beside presets
    "objective=rft",
    pytest.param("objective=dft_correct objective.normalize=groups", marks=pytest.mark.slow),
    pytest.param("objective=gft_scaled objective.normalize=groups", marks=pytest.mark.slow),
    "objective=gft_scaled objective.negative_scale=0 objective.zero_variance=skip",
    pytest.param("objective=asymre objective.sources=[teacher,self]", marks=pytest.mark.slow),
    "objective=grpo objective.ratio_dual_clip=3",
    pytest.param("objective=dapo objective.normalize=groups", marks=pytest.mark.slow),
    pytest.param("objective=cispo objective.eps_high=0.5", marks=pytest.mark.slow),
    pytest.param("objective=psft", marks=pytest.mark.slow),
    "objective=luffy objective.source_weights.expert=0.5",
    pytest.param("objective=chord_phi", marks=pytest.mark.slow),
    "objective=chord_phi objective.mu_peak=0.7 objective.normalize=sequences objective.beta=0.2 objective.reference=r",
    pytest.param("objective=dapo objective.beta=0.3 objective.reference=r", marks=pytest.mark.slow),
    "objective=rft objective.beta=0.3 objective.reference=r objective.kl_sources=[teacher,self]",
]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objective_equals_the_formulas(root, objective):
    folder = model_folder(root, "tied")
    # dead groups in the first step too
    groups = TinyGroups(dead=tuple(groups_of_step(TinyGroups(), 0)[:2]))
    case = Case(overrides=(SHARED, *objective.split()), groups=groups, steps=(0,))
    config = make_config(folder, case, root)
    twin = twin_step(load_twin(folder), [groups[i] for i in groups_of_step(groups, 0)], config.objective)
    run = run_case(root, case)
    assert run.denominators == [twin.denominator]
    assert abs(run.losses[0] - twin.loss) <= 1e-6 * twin.scale
    reads_p_alone = config.q_sources == [] and not config.objective.beta
    assert abs((run.losses if reads_p_alone else run.published)[0] - twin.published) <= 3e-6 * max(twin.scale, 1)
    expected = {name: gradient.numpy() for name, gradient in twin.gradients.items()}
    for gradients in run.gradients.values():
        assert max(gradient_errors(gradients, expected).values()) <= 5e-6


# --- steps in which nothing can be learned ----------------------------------------------------------------------------

DEAD_LAYOUTS = [
    (1, ""),
    (2, "optimizer.distributed=false"),
    (2, f"{SMALL} {OVERLAP_ALL}"),
    (2, f"parallel.tp=2 parallel.sequence_parallel=true {OVERLAP}"),
    (2, f"parallel.pp=2 {SMALL} {OVERLAP_ALL}"),
    (2, f"parallel.pp=2 parallel.vpp=2 {SMALL} {OVERLAP_ALL}"),
    (2, f"parallel.cp=2 {OVERLAP_ALL}"),
]


@pytest.mark.parametrize("policy", ["keep", "skip"])
@pytest.mark.parametrize(("world_size", "layout"), DEAD_LAYOUTS)
def test_dead_steps_train_alike_at_every_layout(root, world_size, layout, policy):
    """Steps 0 and 2 hold dead groups only: the very first one, and one between live ones."""
    plain = TinyGroups()
    dead = (*groups_of_step(plain, 0), *groups_of_step(plain, 2))
    objective, steps = f"objective.zero_variance={policy}", (0, 1, 2, 3)
    groups = TinyGroups(dead=dead)
    run = run_case(
        root, Case(world_size=world_size, overrides=(objective, *layout.split()), groups=groups, steps=steps)
    )
    assert run.losses[0] == run.losses[2] == 0.0 and run.grad_norms[0] == run.grad_norms[2] == 0.0
    assert run.updated == [policy == "keep", True, policy == "keep", True]
    computed = steps if policy == "keep" else (1, 3)
    reference = run_case(root, Case(overrides=(objective,), groups=groups, steps=computed))
    expected = dict(zip(computed, zip(reference.losses, reference.scales, strict=True), strict=True))
    for step in steps:
        loss, scale = expected.get(step, (0.0, 0.0))
        assert (run.denominators[step] > 0) == (step in computed)
        assert abs(run.losses[step] - loss) <= 1e-5 * scale


def test_keep_moves_by_momentum_where_skip_stands_still(root):
    groups = TinyGroups(dead=tuple(groups_of_step(TinyGroups(), 1)))
    sums = {}
    for policy in ("keep", "skip"):
        overrides = (f"objective.zero_variance={policy}", "optimizer.lr=1e-2")
        run = run_case(root, Case(overrides=overrides, groups=groups, steps=(0, 1, 2)))
        sums[policy] = [loss * denominator for loss, denominator in zip(run.losses, run.denominators, strict=True)]
    assert sums["keep"][0] == pytest.approx(sums["skip"][0], rel=1e-6)
    assert sums["keep"][2] != pytest.approx(sums["skip"][2], rel=1e-2)


def test_dead_groups_are_never_read_nor_packed(root):
    class Watched(TinyGroups):
        def __getitem__(self, index):
            self.read.add(index)
            return super().__getitem__(index)

    groups = Watched(dead=tuple(groups_of_step(TinyGroups(), 0)[::2]))
    folder = model_folder(root, "tied")
    config = make_config(folder, Case(), root)

    def plan():
        groups.read = set()
        loader = StepLoader(groups, config, read_model_shape(folder), initialize_parallel())
        batch = loader.batch(0)
        packs = loader.packs(batch)
        return groups.read, batch.dead_groups, [pack.groups for pack in packs], batch.denominator

    [(read, dead, packed, denominator)] = run_ranks(1, plan)
    order = groups_of_step(groups, 0)
    rewards = [groups.items[index].rewards for index in order]
    live = {place for place, r in enumerate(rewards) if (r[0] != 0 if len(r) == 1 else len(set(r)) > 1)}
    assert dead == GROUPS_PER_STEP - len(live) >= 3
    assert read == {order[place] for place in live}
    assert {place for pack in packed for place in pack} == live
    assert denominator == sum(len(tokens) for index in order for tokens in groups.items[index].responses)


# --- one step by hand -------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """The first step of the tiny groups at the layout of ``overrides``, built on this rank, not yet run."""

    folder: Path
    overrides: tuple[str, ...]
    runner_class: type[StepRunner] = StepRunner

    def __post_init__(self):
        self.config = make_config(self.folder, Case(overrides=self.overrides), self.folder)
        shape, p = read_model_shape(self.folder), self.config.parallel
        self.parallel = initialize_parallel(tp=p.tp, pp=p.pp, cp=p.cp)
        seed_everything(1, self.parallel)
        self.transformer, chunks = build_model(shape, self.config.model, self.config.objective, p, self.parallel)
        load_hf_weights(chunks, shape, self.folder, self.parallel)
        self.chunks = wrap_data_parallel(chunks, self.transformer, self.config.optimizer)
        loader = StepLoader(TinyGroups(), self.config, shape, self.parallel)
        self.batch = loader.batch(0)
        self.packs = loader.packs(self.batch)
        self.runner = self.runner_class(self.chunks, self.parallel)

    def run(self, **options) -> LossReport:
        return self.runner.forward_backward(self.packs, self.batch.denominator, **options)


def _rows_in_head(folder: Path, overrides: tuple[str, ...]):
    """Rows that the vocabulary matrix is multiplied with in one step, and rows and loss tokens of the step."""
    step = Step(folder, overrides)
    vocabulary = next(p for name, p in step.chunks[0].named_parameters() if "word_embeddings" in name)
    rows = []

    class Products(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.mm, torch.matmul, torch.addmm, torch.nn.functional.linear):
                for one, other in zip(args, args[1:], strict=False):
                    if isinstance(other, torch.Tensor) and other.data_ptr() == vocabulary.data_ptr():
                        rows.append(one.shape[0])
            return function(*args, **(kwargs or {}))

    with Products():
        step.run(forward_only=True)
    return sum(rows), sum(len(pack.tokens) for pack in step.packs), step.batch.loss_tokens


@pytest.mark.parametrize("fused", ["true", "false"])
@pytest.mark.parametrize("packing", ["packed", "shared_prefix"])
def test_prompt_rows_never_reach_the_head(root, packing, fused):
    overrides = (f"data.packing={packing}", f"objective.fused_head={fused}", "objective.head_chunk_tokens=16")
    [(in_head, rows, loss_tokens)] = run_ranks(1, _rows_in_head, model_folder(root, "tied"), overrides)
    assert in_head == loss_tokens < rows


# --- bf16 -------------------------------------------------------------------------------------------------------------


# Of sum|w c ce| / D, and of the gradient norm. Measured: at most 1e-3 and 5e-3.
HALF_LOSS, HALF_NORM = 5e-3, 2e-2


class Recording(StepRunner):
    """Keeps log p of every loss row, pack by pack."""

    def _loss(self, pack, output, count, loss_sum):
        self.logprobs = [*getattr(self, "logprobs", []), output.logprobs]
        return super()._loss(pack, output, count, loss_sum)


def _one_step(folder: Path, overrides: tuple[str, ...]):
    """(loss, gradient norm, rectified tokens, log p of each loss row as this rank has them, tau)."""
    step = Step(folder, overrides, Recording)
    optimizer = build_optimizer(step.chunks, step.config.optimizer, bf16=step.transformer.bf16)
    report = step.run()
    rectified = int(report.token_sums[..., STATISTICS.index("rectified")].sum())
    logprobs = torch.cat(step.runner.logprobs)
    return report.loss, reduce_gradients(optimizer), rectified, logprobs, step.config.objective.tau


@pytest.mark.parametrize("fused", ["true", "false"])
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, ""),
        (1, SHARED),
        (2, "parallel.tp=2 parallel.sequence_parallel=true"),
        (2, "parallel.cp=2"),
        (4, "parallel.tp=4"),
    ],
)
def test_half_precision_stays_near_single(root, world_size, layout, fused):
    folder = model_folder(root, "tied")
    overrides = (f"objective.fused_head={fused}", *layout.split())
    expected = run_case(root, Case(steps=(0,)))
    ranks = run_ranks(world_size, _one_step, folder, ("model.precision=bf16", *overrides))
    loss, norm, rectified, logprobs, tau = ranks[0]
    assert abs(loss - expected.losses[0]) <= HALF_LOSS * expected.scales[0]
    assert abs(norm / expected.grad_norms[0] - 1) <= HALF_NORM
    # the branch is taken on float32 log-probabilities, which all tensor-parallel ranks share bit for bit
    assert logprobs.dtype == torch.float32
    if "cp" in layout:
        assert rectified == sum(int((other[3].double().exp() <= tau).sum()) for other in ranks)
        return
    assert all(torch.equal(other[3], logprobs) for other in ranks)
    assert rectified == int((logprobs.double().exp() <= tau).sum())


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_token_sums_are_sums_by_source_and_sign():
    rng = torch.Generator().manual_seed(0)
    count, tau = 50, 0.3
    logprobs = -torch.rand(count, generator=rng) * 3
    weights, advantages = (torch.randn(count, generator=rng) for _ in range(2))
    sources = torch.randint(0, 3, (count,), generator=rng, dtype=torch.int8)
    entropy = torch.rand(count, generator=rng)
    pack = Pack(
        tokens=torch.zeros(1, dtype=torch.int64),
        position_ids=torch.zeros(1, dtype=torch.int64),
        layout=PackLayout(segments=torch.tensor([[0, 1, 0, 0]])),
        loss_rows=torch.zeros(count, dtype=torch.int64),
        labels=torch.zeros(count, dtype=torch.int64),
        token_weights=weights,
        sources=sources,
        advantages=advantages,
        response_index=torch.zeros(count, dtype=torch.int32),
        groups=(0,),
    )
    output = LossOutput(torch.zeros(()), logprobs, entropy)
    token_sums = pack_token_sums(pack, output, HeadSettings(tau))
    for source in range(3):
        for sign in range(2):
            rows = [i for i in range(count) if sources[i] == source and (advantages[i] < 0) == (sign == 1)]
            p = [float(logprobs[i].double().exp()) for i in rows]
            expected = [
                len(rows),
                sum(-float(weights[i] * logprobs[i]) * (1 if q > tau else q) for i, q in zip(rows, p, strict=True)),
                sum(-float(logprobs[i]) for i in rows),
                sum(p),
                sum(q <= tau for q in p),
                sum(abs(float(advantages[i])) for i in rows),
                sum(float(entropy[i]) for i in rows),
            ]
            np.testing.assert_allclose(token_sums[source, sign, : len(STATISTICS)], expected, rtol=1e-6)
    report = LossReport(token_sums, 7)
    assert report.loss == pytest.approx(float(token_sums[..., 1].sum()) / 7)
    assert dataclasses.replace(report, denominator=0).loss == 0.0


def test_a_report_waits_for_sums_that_are_still_on_their_way():
    sums = torch.full((3, 2, 14), torch.nan)  # page-locked memory before the copy

    class Arrival:
        def synchronize(self):
            sums.fill_(0.5)

    assert LossReport(sums, 3, Arrival()).loss == 1.0  # 6 places of 0.5 each, by 3


def _timed(folder: Path, overrides: tuple[str, ...]):
    step = Step(folder, overrides)
    step.run(forward_only=True)  # a validation
    step.run()
    return len(step.runner.timer.spans), len(step.packs)


def test_a_steps_forward_time_has_no_validation_in_it(root):
    [(spans, packs)] = run_ranks(1, _timed, model_folder(root, "tied"), (SMALL,))
    assert spans == packs > 1


def _poisoned(folder: Path, overrides: tuple[str, ...]):
    step = Step(folder, overrides)
    step.packs[1].token_weights[0] = torch.nan
    return step.run().loss, step.runner.nonfinite_packs(), step.parallel.is_last_stage


@pytest.mark.parametrize("stages", [1, 2])
def test_a_loss_that_is_not_finite_names_its_pack(root, stages):
    overrides = (SMALL, f"parallel.pp={stages}")
    for loss, packs, is_last_stage in run_ranks(stages, _poisoned, model_folder(root, "tied"), overrides):
        assert np.isnan(loss)  # every rank knows, so all decide alike
        assert packs == ([1] if is_last_stage else [])
