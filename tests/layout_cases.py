"""Runs the trainer's own steps at one parallel layout and brings back what must not depend on the layout.

A :class:`Case` is a model, a world size and configuration overrides. :func:`run_case` forks its ranks, trains a few
steps with ``job.build_trainer`` and merges the ranks' results; gradients come back under Hugging Face names and
shapes, gathered over tensor, pipeline and expert parallel ranks, so any two cases compare tensor by tensor.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from memory_groups import MemoryGroups
from ranks import run_ranks
from tiny_models import write_tiny_model

from megatron_gft.config import Config, load_config
from megatron_gft.hf.files import scatter_rows
from megatron_gft.hf.mapping import HfMapping
from megatron_gft.hf.shape import read_model_shape
from megatron_gft.hf.weights import live_parameters
from megatron_gft.job import build_trainer
from megatron_gft.model import unwrap
from megatron_gft.parallel import initialize_parallel
from megatron_gft.shards import Group
from megatron_gft.step import STATISTICS, StepRunner
from megatron_gft.trainer import Trainer
from megatron_gft.validation import check

VOCAB_SIZE = 67  # odd: padded differently by every tensor-parallel size
GROUPS_PER_STEP, STEPS = 6, 5

_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # Positions matter within a few tokens; logits and activations of order 1, so that rounding stays near 1e-7. The
    # softmax does not see a bias that all keys share, so only positions keep that bias's gradient from cancelling.
    "rope_parameters": {"rope_theta": 10.0, "rope_type": "default"},
    "head_scale": 0.8,
    "trunk_scale": 0.4,
}
# Name here -> name in tiny_models.MODELS and what differs. Together: tied and untied, biases, norms of queries and
# keys, sliding window, experts of both kinds.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("qwen2", {**_SMALL, "embedding_std": 0.15}),
    "untied": ("qwen3", {**_SMALL, "head_dim": 8}),
    "window": ("mistral", {**_SMALL, "head_dim": 8, "sliding_window": 8}),
    "deep": ("llama_tied_linear", {**_SMALL, "tie_word_embeddings": False, "num_hidden_layers": 8}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_SMALL, "trunk_scale": 0.25, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24},
    ),
    "mixtral": ("mixtral", {**_SMALL, "head_dim": 8, "num_local_experts": 4}),
}

# Between two probabilities of the reference run, so that no rounding moves a token over it (asserted).
TAU = {
    "tied": 0.01551,
    "untied": 0.01543,
    "window": 0.01522,
    "deep": 0.01961,
    "qwen3_moe": 0.011,
    "mixtral": 0.02143,
}


class TinyGroups(MemoryGroups):
    """Random groups that hold the awkward cases: one response, one token, equal rewards, a long prompt; with log-probs
    of a sampling and of a reference model for objectives that read them.

    Args:
        dead: indices whose rewards are all equal.
        seed: the default was searched for: no gradient nearly cancels in it. With others those of the key bias and
            of norms come out small beside their terms, and float32 rounding is up to 2.3e-6 of them.
    """

    def __init__(self, count: int = GROUPS_PER_STEP * STEPS, *, dead: range | tuple[int, ...] = (3, 11), seed: int = 2):
        rng = np.random.default_rng(seed)
        items = []
        for index in range(count):
            size = 1 if index % 10 == 5 else int(rng.integers(2, 6))
            prompt = int(rng.integers(30, 40)) if index % 7 == 2 else int(rng.integers(1, 12))
            lengths = rng.integers(1, 14, size)
            rewards = rng.integers(0, 2, size).astype(float)
            if size > 1:
                rewards[0] = 1 - rewards[1]
            if index in dead:
                rewards[:] = 1.0 if size > 1 else 0.0
            prompt_tokens = rng.integers(0, VOCAB_SIZE, prompt)
            responses = [rng.integers(0, VOCAB_SIZE, length) for length in lengths]
            known = np.random.default_rng([seed, index])
            # around p, the end of some responses unknown, as of servers
            sampled = [known.normal(-4.2, 1.0, length).astype(np.float32) for length in lengths]
            for values in sampled[::2]:
                values[-1] = np.nan
            reference = [known.normal(-4.2, 0.5, length).astype(np.float32) for length in lengths]
            sources = np.array([0, 1, 2, 2, 2][:size])
            items.append(Group(prompt_tokens, responses, sources, rewards, sampled, reference))
        super().__init__(items, "tiny")


@dataclass(frozen=True)
class Case:
    """One run. ``sabotage`` breaks the code in the forked ranks, after the trainer is built."""

    world_size: int = 1
    overrides: tuple[str, ...] = ()
    model: str = "tied"
    steps: tuple[int, ...] = tuple(range(STEPS))
    groups: TinyGroups = field(default_factory=TinyGroups)
    sabotage: Callable[[Trainer], None] | None = None


@dataclass
class Run:
    """What came back: lists are per step, gradients those of step 1 by head ("unfused", "fused") and name.

    ``scales`` are sum|w c ce| / D, the size of what the loss sums over; ``probabilities`` p of every loss token;
    both only of runs on one rank, as ``ratios``, p / q. ``published`` is the loss as the paper writes it.
    ``evaluation`` is the loss of the first step's data after the last update, forward only.
    """

    losses: list[float]
    grad_norms: list[float]
    updated: list[bool]
    denominators: list[int]
    rectified: list[int]
    scales: list[float]
    probabilities: list[np.ndarray]
    gradients: dict[str, dict[str, np.ndarray]]
    evaluation: float = 0.0
    ratios: list[np.ndarray] = field(default_factory=list)
    published: list[float] = field(default_factory=list)


@functools.cache
def model_folder(root: Path, model: str) -> Path:
    """The tiny model's Hugging Face folder, written once a session."""
    name, changes = MODELS[model]
    return write_tiny_model(root / model, name, **changes)


def make_config(folder: Path, case: Case, output: Path) -> Config:
    """The case's configuration: fp32, one big pack, no sharing, unless it says otherwise."""
    return load_config(
        [],
        [
            f"model.config={folder}",
            "model.precision=fp32",
            "model.make_vocab_size_divisible_by=8",
            f"checkpoint.init_from=hf:{folder}",
            f"data.groups_per_step={GROUPS_PER_STEP}",
            "data.packing=packed",
            "data.max_tokens_per_pack=2048",
            f"objective.tau={TAU[case.model]}",
            "optimizer.lr=1e-4",
            "logging.tensorboard=false",
            "logging.progress_bar=false",
            f"train.output={output}",
            *case.overrides,
        ],
    )


class RecordingRunner(StepRunner):
    """Keeps p and w of every loss token, and the gradients of the first step under both heads."""

    def __init__(self, trainer: Trainer):
        super().__init__(trainer.chunks, trainer.parallel)
        self.trainer = trainer
        self.tokens: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        self.gradients: dict[str, dict[str, np.ndarray]] = {}

    def forward_backward(self, packs, denominator, *, forward_only=False):
        if packs and not self.gradients:
            self.gradients["unfused"] = {}
            self._set_head(fused=False)
            super().forward_backward(packs, denominator)
            self.gradients["unfused"] = hf_gradients(self.trainer)
            for chunk in self.trainer.chunks:
                chunk.zero_grad_buffer()
            self._set_head(fused=self.trainer.config.objective.fused_head)
        self.tokens = []
        report = super().forward_backward(packs, denominator, forward_only=forward_only)
        if packs and "fused" not in self.gradients and self.trainer.config.objective.fused_head:
            self.gradients["fused"] = hf_gradients(self.trainer)
        return report

    def _set_head(self, *, fused: bool) -> None:
        for chunk in self.chunks:
            model = unwrap(chunk)
            model.head = dataclasses.replace(model.head, fused=fused)

    def _loss(self, pack, output, count, loss_sum):
        self.tokens.append((pack.token_weights, output.logprobs, pack.sampled_logprobs))
        return super()._loss(pack, output, count, loss_sum)


def hf_gradients(trainer: Trainer) -> dict[str, np.ndarray]:
    """Gradients that this rank holds the first replica of, by Hugging Face name; collective."""
    gather_sharded_gradients(trainer)
    shape, p = read_model_shape(trainer.config.model.config), trainer.parallel
    mapping, found = HfMapping(shape), {}
    for name, parameter, entry, _ in live_parameters(trainer.chunks, mapping, p):
        tp_group = parallel_state.get_expert_tensor_parallel_group() if entry.is_expert else p.tp_group
        is_replica = p.expert_dp_rank > 0 if entry.is_expert else p.dp_rank > 0 or p.cp_rank > 0
        gradient = parameter.main_grad.detach().contiguous()
        parts = [torch.empty_like(gradient) for _ in range(tp_group.size())]
        dist.all_gather(parts, gradient, group=tp_group)
        if tp_group.rank() > 0 or is_replica:
            continue
        tensors = [torch.empty(size, dtype=gradient.dtype) for size in entry.source_shapes]
        rows = len(parameter) if entry.operation == "vocab" else None
        for rank, part in enumerate(parts[:1] if entry.operation == "copy" else parts):
            scatter_rows(tensors, mapping.shard(entry, rank, len(parts), rows), part, 0)
        is_copy = shape.share_embeddings_and_output_weights and name == "output_layer.weight"
        for source, tensor in zip(entry.sources, tensors, strict=True):
            found[f"{source} (last stage's copy)" if is_copy else source] = tensor.numpy()
    return found


def gather_sharded_gradients(trainer: Trainer) -> None:
    """With the distributed optimizer a rank has reduced its part of each buffer only; fetch the other parts."""
    if not trainer.config.optimizer.distributed:
        return
    for chunk in trainer.chunks:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            size = group.intra_distributed_optimizer_instance_size
            rank = group.intra_distributed_optimizer_instance_rank
            for bucket in group.buckets:
                mine = bucket.grad_data.view(size, -1)[rank].clone()
                dist.all_gather_into_tensor(
                    bucket.grad_data, mine, group=group.intra_distributed_optimizer_instance_group
                )


def exchange_of_shapes(*_: Any) -> None:
    raise AssertionError("pipeline ranks told each other a shape that they know")


def _train(folder: Path, output: Path, case: Case) -> Run:
    P2PCommunicator._communicate_shapes = exchange_of_shapes
    config = make_config(folder, case, output)
    shape = read_model_shape(folder)
    check(config, shape, case.world_size, training=False)
    p = config.parallel
    parallel = initialize_parallel(tp=p.tp, pp=p.pp, vpp=p.vpp, cp=p.cp, ep=p.ep, etp=p.etp)
    trainer = build_trainer(config, shape, parallel, case.groups, None)
    runner = trainer.runner = RecordingRunner(trainer)
    if case.sabotage is not None:
        case.sabotage(trainer)
    run = Run([], [], [], [], [], [], [], runner.gradients)
    for step in case.steps:
        batch = trainer.loader.batch(step)
        outcome = trainer.step(batch, trainer.loader.packs(batch), 0.0)
        run.losses.append(outcome.report.loss)
        run.grad_norms.append(outcome.grad_norm)
        run.updated.append(outcome.updated)
        run.denominators.append(batch.denominator)
        run.rectified.append(int(outcome.report.token_sums[..., 4].sum()))
        logprobs = torch.cat([logprobs for _, logprobs, _ in runner.tokens] or [torch.empty(0)]).double()
        weights = torch.cat([weights for weights, _, _ in runner.tokens] or [torch.empty(0)]).double()
        known = [(logprobs - q)[~q.isnan()] for _, logprobs, q in runner.tokens if q is not None]
        run.ratios.append(torch.cat(known or [torch.empty(0)]).exp().numpy())
        run.published.append(float(outcome.report.token_sums[..., len(STATISTICS)].sum()) / max(batch.denominator, 1))
        p = logprobs.exp()
        rectified = config.objective.coefficient == "rectified"
        c = torch.where(p > config.objective.tau, 1.0, p) if rectified else torch.ones_like(p)
        run.scales.append(float((weights.abs() * c * -logprobs).sum()) / max(batch.denominator, 1))
        run.probabilities.append(p.numpy())
    run.evaluation = evaluate(trainer, case.steps[0])
    trainer.close()
    return run


def evaluate(trainer: Trainer, step: int) -> float:
    """Loss of a step's data with the trained weights, forward only."""
    batch = trainer.loader.batch(step)
    for chunk in trainer.chunks:
        chunk.eval()
    report = StepRunner.forward_backward(
        trainer.runner, trainer.loader.packs(batch), batch.denominator, forward_only=True
    )
    return report.loss


def run_case(root: Path, case: Case, timeout: float = 120) -> Run:
    """Train the case; asserts that all ranks report the same losses, gradient norms and decisions."""
    folder = model_folder(root, case.model)
    runs = run_ranks(case.world_size, _train, folder, root / "output", case, timeout=timeout)
    first = runs[0]
    for run in runs[1:]:
        assert run.losses == first.losses and run.updated == first.updated and run.evaluation == first.evaluation
        assert run.rectified == first.rectified and run.denominators == first.denominators
        np.testing.assert_allclose(run.grad_norms, first.grad_norms, rtol=1e-6)
    merged: dict[str, dict[str, np.ndarray]] = {}
    for run in runs:
        for head, tensors in run.gradients.items():
            known = merged.setdefault(head, {})
            assert not known.keys() & tensors.keys(), "two ranks hold the first replica of a tensor"
            known.update(tensors)
    first.gradients = merged
    return first


def gradient_errors(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """||g - g'|| / ||g'|| per tensor; tensors below 1e-6 of the global norm are left out."""
    total = float(np.sqrt(sum(np.square(np.asarray(g, dtype=np.float64)).sum() for g in reference.values())))
    errors = {}
    for name, value in found.items():
        source = name.removesuffix(" (last stage's copy)")
        expected = np.asarray(reference[source], dtype=np.float64)
        norm = np.linalg.norm(expected)
        if norm >= 1e-6 * total:
            errors[name] = float(np.linalg.norm(np.asarray(value, dtype=np.float64) - expected) / norm)
    return errors
