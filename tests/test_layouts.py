"""The loss and its gradients do not depend on how the work is cut: every layout against one rank, fp32.

The one-rank run is itself compared with the transformers model, response by response (:mod:`naive_twin`). Controls
at the end break the code on purpose and must be noticed.
"""

import dataclasses
import faulthandler

import numpy as np
import pytest
from layout_cases import GROUPS_PER_STEP, MODELS, TAU, Case, TinyGroups, gradient_errors, make_config, run_case
from naive_twin import load_twin, twin_step

from megatron_gft.group_order import step_groups
from megatron_gft.model import unwrap

LOSS, LATER_LOSSES, GRAD_NORM = 1e-6, 1e-5, 2e-6
GRADIENT = {"unfused": 1e-6, "fused": 5e-6}

TP2, TP4, SP = "parallel.tp=2", "parallel.tp=4", "parallel.sequence_parallel=true"
PP2, PP4, VPP2 = "parallel.pp=2", "parallel.pp=4", "parallel.vpp=2"
CP2, CP4, EP2, EP4, ETP1 = "parallel.cp=2", "parallel.cp=4", "parallel.ep=2", "parallel.ep=4", "parallel.etp=1"
SHARED, SMALL, MEDIUM = "data.packing=shared_prefix", "data.max_tokens_per_pack=64", "data.max_tokens_per_pack=160"
PLAIN = "optimizer.distributed=false"
OVERLAP = "optimizer.overlap_grad_reduce=true"
OVERLAP_ALL = f"{OVERLAP} optimizer.overlap_param_gather=true"
FULL, SELECTIVE = "model.recompute=full", "model.recompute=core_attention"

LAYOUTS = [
    # one rank: pack forms, pack sizes, recompute
    (1, "tied", f"{SMALL}"),
    (1, "tied", f"{SHARED}"),
    (1, "untied", f"{SHARED} {SMALL} {FULL}"),
    (1, "tied", f"{SHARED} {MEDIUM} {SELECTIVE} {PLAIN} {OVERLAP}"),
    (1, "window", f"{SHARED} {SMALL}"),
    # data parallel
    (2, "tied", f"{PLAIN}"),
    (2, "untied", f"{SHARED} {SMALL} {OVERLAP_ALL}"),
    (2, "tied", f"{SMALL} {OVERLAP_ALL}"),
    (4, "untied", f"{SHARED} {PLAIN} {OVERLAP}"),
    # tensor parallel; with tp 4 the last rank holds only padding of the vocabulary, and two ranks share a KV head
    (2, "tied", f"{TP2} {SMALL}"),
    (2, "untied", f"{TP2} {SHARED} {SELECTIVE}"),
    (2, "tied", f"{TP2} {SP} {SHARED} {MEDIUM}"),
    (2, "untied", f"{TP2} {SP} {SMALL} {FULL}"),
    (4, "tied", f"{TP4} {SHARED}"),
    (4, "untied", f"{TP4} {SP}"),
    # pipeline parallel
    (2, "tied", f"{PP2} {SMALL}"),
    (2, "untied", f"{PP2} {SHARED} {SMALL} {OVERLAP}"),
    (4, "tied", f"{PP4} {SHARED} {SMALL} {FULL}"),
    (2, "tied", f"{PP2} {VPP2} {SHARED} {SMALL}"),
    (2, "untied", f"{PP2} {VPP2} {MEDIUM} {PLAIN}"),
    (2, "untied", f"{PP2} {VPP2} {SMALL} {OVERLAP_ALL}"),
    (4, "deep", f"{PP4} {VPP2} {SMALL}"),
    (2, "tied", f"{PP2} {SMALL} parallel.layers_per_stage=[3,1]"),
    (2, "deep", f"{PP2} {VPP2} {SMALL} parallel.layers_per_stage=[2,3,1,2]"),
    # context parallel
    (2, "tied", f"{CP2} {MEDIUM}"),
    (2, "untied", f"{CP2} {SHARED} {SELECTIVE}"),
    (4, "tied", f"{CP4} {SHARED}"),
    (4, "untied", f"{CP4} {MEDIUM} {PLAIN}"),
    (2, "window", f"{CP2} {SHARED} {MEDIUM}"),
    # combined
    (4, "tied", f"{TP2} {PP2} {SMALL}"),
    (4, "untied", f"{TP2} {SP} {PP2} {VPP2} {SHARED} {SMALL}"),
    (4, "tied", f"{TP2} {CP2} {SP} {SHARED} {MEDIUM}"),
    (4, "untied", f"{TP2} {SP} {OVERLAP_ALL}"),
    (4, "tied", f"{PP2} {SHARED} {SMALL} {OVERLAP_ALL}"),
    (4, "untied", f"{CP2} {MEDIUM} {OVERLAP}"),
    (4, "tied", f"{PP2} {CP2} {MEDIUM}"),
    # experts, without auxiliary loss and drops
    (2, "qwen3_moe", f"{EP2} {SMALL}"),
    (2, "mixtral", f"{EP2} {SHARED} {SMALL} {OVERLAP}"),
    (2, "qwen3_moe", f"{TP2} {SP} {SHARED}"),
    (2, "mixtral", f"{TP2} {SP} {EP2} {ETP1}"),
    (4, "qwen3_moe", f"{EP2} {PP2} {SMALL}"),
    (4, "mixtral", f"{EP2} {CP2} {SHARED}"),
]
SOAK_LAYOUTS = [
    (world_size, model, f"{layout} {packing} {size}")
    for packing in (SHARED, "data.packing=packed", "data.packing=auto")
    for size in (SMALL, MEDIUM)
    for world_size, model, layout in (
        (4, "tied", f"{TP4} {SP}"),
        (4, "untied", f"{TP4}"),
        (4, "window", f"{TP2} {SP} {PP2} {FULL}"),
        (4, "deep", f"{PP2} {VPP2} {OVERLAP_ALL}"),
        (4, "deep", f"{PP4} {VPP2} {OVERLAP}"),
        (4, "deep", f"{PP2} parallel.vpp=4 {SELECTIVE} {TP2}"),
        (4, "window", f"{CP2} {TP2}"),
        (8, "tied", f"{TP2} {SP} {PP2} {CP2}"),
        (8, "untied", f"{TP2} {PP2} {OVERLAP_ALL}"),
        (8, "tied", f"{CP4} {OVERLAP} {PLAIN}"),
        (4, "qwen3_moe", f"{EP4} {OVERLAP_ALL}"),
        # etp 1: gloo gathers no tensors of unequal size, which expert-tensor with expert parallelism would need
        (8, "mixtral", f"{TP2} {SP} {EP2} {ETP1} {PP2} {VPP2}"),
        (8, "qwen3_moe", f"{TP2} {SP} {EP4} {ETP1} {FULL}"),
    )
    if not (CP4 in layout and size == SMALL)
]
GRPO = "objective=grpo objective.sources=[teacher,self]"
GRPO_KL = f"{GRPO} objective.beta=0.1 objective.reference=ref"
OBJECTIVES = [
    (2, f"{TP2} {SHARED}", "objective.normalize=sequences objective.zero_variance=skip"),
    (2, f"{PP2} {SMALL}", "objective.normalize=groups objective.advantage=rloo"),
    (
        2,
        f"{SMALL} {OVERLAP_ALL}",
        "objective.normalize=groups objective.zero_variance=skip objective.advantage=mean_only",
    ),
    (2, f"{CP2}", "objective.name=sft objective.normalize=sequences"),
    (2, f"{SHARED} {SMALL}", "objective.name=dft objective.sources=[expert,teacher]"),
    # between SFT and RL: p alone, p / q, the KL anchor
    (2, f"{TP2} {SHARED}", "objective=gft_scaled"),
    (2, f"{TP2} {SP} {SHARED}", GRPO),
    (2, f"{CP2} {SHARED}", GRPO_KL),
    (2, f"{PP2} {SMALL}", GRPO_KL),
    # one group a step: fewer packs than ranks, so some ranks only ever see padding
    (4, f"{PLAIN}", "data.groups_per_step=1"),
    (4, f"{SHARED} {OVERLAP_ALL}", "data.groups_per_step=1"),
    (4, f"{PP2} {SHARED}", "data.groups_per_step=1"),
    (4, f"{TP2} {SP} {SHARED}", "data.groups_per_step=1"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def reference(root):
    """reference(model, overrides) -> the run on one rank: unfused head, one pack, nothing shared or overlapped."""
    runs = {}

    def get(model, overrides=()):
        key = (model, tuple(overrides))
        if key not in runs:
            runs[key] = run_case(root, Case(model=model, overrides=("objective.fused_head=false", *overrides)))
        return runs[key]

    return get


def problems(run, expected, slack=1.0):
    """Every way in which a run differs from the reference beyond rounding; empty when it is the same."""
    found = []
    for step, (loss, other, scale) in enumerate(zip(run.losses, expected.losses, expected.scales, strict=True)):
        if not abs(loss - other) <= (LATER_LOSSES if step else LOSS) * scale:
            found.append(f"loss of step {step + 1}: {loss!r}, reference {other!r}")
    if not abs(run.evaluation - expected.evaluation) <= LATER_LOSSES * expected.scales[0]:
        found.append(f"loss after the last update: {run.evaluation!r}, reference {expected.evaluation!r}")
    if not abs(run.grad_norms[0] / expected.grad_norms[0] - 1) <= GRAD_NORM:
        found.append(f"gradient norm {run.grad_norms[0]}, reference {expected.grad_norms[0]}")
    if run.rectified != expected.rectified or run.denominators != expected.denominators:
        found.append("other tokens are rectified, or D differs")
    for head, gradients in run.gradients.items():
        names = {name.removesuffix(" (last stage's copy)") for name in gradients}
        if names != expected.gradients["unfused"].keys():
            found.append(f"{head}: other tensors have gradients")
            continue
        for name, error in gradient_errors(gradients, expected.gradients["unfused"]).items():
            if not error <= GRADIENT[head] * slack:
                found.append(f"{head} gradient of {name}: off by {error:.2e} of its norm")
    return found


@pytest.mark.parametrize("model", MODELS)
def test_no_token_is_near_tau_and_both_branches_occur(reference, model):
    run = reference(model)
    for p, rectified in zip(run.probabilities, run.rectified, strict=True):
        assert abs(p - TAU[model]).min() > 1e-4
        assert 0 < rectified < len(p)


@pytest.mark.parametrize("model", MODELS)
def test_one_rank_equals_the_naive_twin(root, reference, model):
    run = reference(model)
    config, groups = make_config(root / model, Case(model=model), root), TinyGroups()
    order = step_groups(
        0, num_groups=len(groups), groups_per_step=GROUPS_PER_STEP, seed=config.train.seed, fingerprint="tiny"
    )
    twin = twin_step(load_twin(root / model), [groups[index] for index in order], config.objective)
    assert run.denominators[0] == twin.denominator
    assert abs(run.losses[0] - twin.loss) <= LOSS * twin.scale
    assert run.scales[0] == pytest.approx(twin.scale, rel=1e-5)
    np.testing.assert_allclose(np.sort(run.probabilities[0]), np.sort(twin.probabilities), rtol=1e-5)
    expected = {name: gradient.numpy() for name, gradient in twin.gradients.items()}
    assert run.gradients["unfused"].keys() == expected.keys()
    for name, error in gradient_errors(run.gradients["unfused"], expected).items():
        assert error <= GRADIENT["unfused"], (name, error)


def check_layout(root, reference, world_size, model, layout, objective=""):
    expected = reference(model, tuple(objective.split()))
    case = Case(world_size=world_size, model=model, overrides=(*objective.split(), *layout.split()))
    # ratios of probabilities: terms larger than their sum
    slack = 2.0 if any(name in objective for name in ("grpo", "luffy", "chord")) else 1.0
    assert not problems(run_case(root, case), expected, slack)


@pytest.mark.parametrize(("world_size", "model", "layout"), LAYOUTS)
def test_same_at_every_layout(root, reference, world_size, model, layout):
    check_layout(root, reference, world_size, model, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "model", "layout"), SOAK_LAYOUTS)
def test_same_at_many_layouts(root, reference, world_size, model, layout):
    check_layout(root, reference, world_size, model, layout)


@pytest.mark.parametrize(("world_size", "layout", "objective"), OBJECTIVES)
def test_same_for_every_objective(root, reference, world_size, layout, objective):
    check_layout(root, reference, world_size, "tied", layout, objective)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["objective=gft_scaled", GRPO, GRPO_KL, "objective=luffy", "objective=chord_phi"])
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(2, TP2), (2, f"{PP2} {VPP2} {SHARED} {SMALL}"), (2, CP2), (4, f"{TP2} {SP} {CP2} {SHARED}"), (4, f"{TP2} {PP2}")],
)
def test_same_for_objectives_between_sft_and_rl(root, reference, world_size, layout, objective):
    check_layout(root, reference, world_size, "tied", layout, objective)


def test_no_ratio_is_near_a_clip_and_both_sides_occur(reference):
    for ratios in reference("tied", tuple(GRPO.split())).ratios:
        for edge in (0.8, 1.2):
            assert abs(ratios / edge - 1).min() > 1e-5 and (ratios < edge).any() and (ratios > edge).any()


# --- controls: each must be noticed ---------------------------------------------------------------------------------


def mean_over_each_pack(trainer):
    """The usual mistake: every microbatch divides by its own tokens, and microbatches are averaged."""
    right = trainer.runner._loss

    def wrong(pack, output, count, loss_sum):
        loss, tokens, metrics = right(pack, output, count, loss_sum)
        return loss / max(len(pack.labels), 1), tokens.new_ones(()), metrics

    trainer.runner._loss = wrong


def unmark_norms(trainer):
    """Gradients of norms are not summed over the ranks that each saw a part of the sequence."""
    for chunk in trainer.chunks:
        for name, parameter in chunk.named_parameters():
            if "norm" in name:
                parameter.sequence_parallel = False


def count_on_every_context_rank(trainer):
    """Each context-parallel rank reports the step's denominator."""
    trainer.runner.parallel = dataclasses.replace(trainer.runner.parallel, cp_rank=0)


def batch_pipeline_transfers(trainer):
    """Megatron's default for the interleaved schedule; two transfers between one pair of ranks are swapped."""
    faulthandler.disable()  # a rank that dies of it is expected: its stack would look like a crash of the suite
    config = unwrap(trainer.chunks[0]).config
    config.overlap_p2p_comm, config.batch_p2p_comm = False, True


@pytest.mark.parametrize(
    ("world_size", "layout", "sabotage", "evidence"),
    [
        (1, SMALL, mean_over_each_pack, "gradient of"),
        (2, "", mean_over_each_pack, "gradient of"),
        (2, f"{TP2} {SP}", unmark_norms, "norm.weight"),
        (2, CP2, count_on_every_context_rank, "gradient norm"),
    ],
)
def test_a_wrong_step_is_noticed(root, reference, world_size, layout, sabotage, evidence):
    overrides = ("objective.fused_head=false", *layout.split())
    case = Case(world_size=world_size, overrides=overrides, sabotage=sabotage)
    found = problems(run_case(root, case), reference("tied"))
    assert any(evidence in problem for problem in found), found


def test_batched_transfers_break_the_interleaved_schedule(root, reference):
    """Why the model sets ``overlap_p2p_comm`` itself: with packs of unequal length the job dies, with equal ones it
    goes on with other tensors."""
    case = Case(world_size=2, overrides=(PP2, VPP2, SMALL), sabotage=batch_pipeline_transfers)
    try:
        run = run_case(root, case, timeout=30)
    except RuntimeError:
        return
    assert problems(run, reference("tied"))


def test_the_fused_head_refuses_a_loss_that_is_divided_before_backward(root):
    case = Case(overrides=(SMALL,), sabotage=mean_over_each_pack, steps=(0,))
    with pytest.raises(RuntimeError, match="upstream gradient is not loss_scale"):
        run_case(root, case)
