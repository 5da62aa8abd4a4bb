"""What whole-step measurements run on: a model's sizes, random groups, and the trainer's parts on one rank."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from megatron_gft.batch import StepBatch, StepLoader
from megatron_gft.config import Config, load_config
from megatron_gft.hf.shape import ModelShape, model_shape_from_config
from megatron_gft.model import build_model, unwrap
from megatron_gft.optimizer import apply_gradients, build_optimizer, reduce_gradients, wrap_data_parallel
from megatron_gft.packing import Pack
from megatron_gft.parallel import current_parallel, seed_everything
from megatron_gft.planning import GroupLengths
from megatron_gft.shards import Group, GroupTable
from megatron_gft.step import LossReport, StepRunner


@dataclass(frozen=True)
class StepShape:
    """A model and one step of equal groups: ``groups`` prompts of ``prompt`` tokens with ``responses`` responses of
    ``response`` tokens, in packs of at most ``pack_rows`` rows."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    groups: int
    prompt: int
    response: int
    responses: int
    pack_rows: int

    def hf_config(self) -> dict[str, Any]:
        """config.json of a Llama of these sizes, embeddings untied."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocab,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
        }

    def model(self) -> ModelShape:
        """Its shape."""
        return model_shape_from_config(self.hf_config(), "bench_step")

    def configure(self, *overrides: str) -> Config:
        """The configuration of this shape: bf16 on a GPU, fp32 on a CPU."""
        return load_config(
            [],
            [
                "model.config=none",
                f"model.precision={'bf16' if torch.cuda.is_available() else 'fp32'}",
                f"data.groups_per_step={self.groups}",
                f"data.max_tokens_per_pack={self.pack_rows}",
                "objective.entropy=false",
                *overrides,
            ],
        )


def default_shape() -> StepShape:
    """A slice of an 8B model with its vocabulary on a GPU; on a CPU what takes a second or two a step."""
    if torch.cuda.is_available():
        return StepShape(
            4, 4096, 32, 8, 14336, 128256, groups=16, prompt=120, response=200, responses=8, pack_rows=16384
        )
    return StepShape(2, 256, 4, 2, 704, 4096, groups=4, prompt=60, response=100, responses=8, pack_rows=2048)


class RandomGroups:
    """Random tokens in groups of the given lengths."""

    fingerprint = "bench"

    def __init__(self, lengths: Sequence[GroupLengths], vocab: int):
        rng = np.random.default_rng(0)
        self.lengths = lengths
        self.prompts = [rng.integers(0, vocab, group.prompt) for group in lengths]
        self.responses = [[rng.integers(0, vocab, n) for n in group.responses] for group in lengths]

    @classmethod
    def equal(cls, shape: StepShape) -> Self:
        """The groups of ``shape``."""
        group = GroupLengths(shape.prompt, (shape.response,) * shape.responses)
        return cls([group] * shape.groups, shape.vocab)

    def __len__(self) -> int:
        return len(self.lengths)

    def rewards(self, index: int) -> np.ndarray:
        """1 and 0 in turns."""
        return (np.arange(len(self.responses[index])) % 2 == 0).astype(np.float32)

    def sources(self, index: int) -> np.ndarray:
        """Expert, teacher, then the model's own."""
        return np.minimum(np.arange(len(self.responses[index])), 2).astype(np.int8)

    def __getitem__(self, index: int) -> Group:
        return Group(self.prompts[index], self.responses[index], self.sources(index), self.rewards(index), None)

    def table(self, indices: np.ndarray, *, ends: bool = False) -> GroupTable:
        return GroupTable.of_groups(
            [
                (self.lengths[i].prompt, np.array(self.lengths[i].responses), self.sources(i), self.rewards(i))
                for i in map(int, indices)
            ]
        )

    def describe(self, index: int) -> str:
        return f"group {index}"


class Workbench:
    """The trainer's parts around one model on one rank. Inside ``single_rank()`` only."""

    def __init__(self, shape: StepShape, *overrides: str):
        self.shape, self.model_shape = shape, shape.model()
        self.config = shape.configure(*overrides)
        self.parallel = current_parallel()
        seed_everything(1, self.parallel)
        config = self.config
        transformer, modules = build_model(
            self.model_shape, config.model, config.objective, config.parallel, self.parallel
        )
        self.chunks = wrap_data_parallel(modules, transformer, config.optimizer)
        self.optimizer = build_optimizer(self.chunks, config.optimizer, bf16=transformer.bf16)

    def plan(self, groups: RandomGroups, *overrides: str) -> tuple[StepLoader, StepBatch]:
        """The loader of a run over ``groups`` and its first step."""
        loader = StepLoader(groups, self.shape.configure(*overrides), self.model_shape, self.parallel)
        return loader, loader.batch(0)

    def packs(self, groups: RandomGroups, *overrides: str) -> tuple[list[Pack], StepBatch]:
        """Microbatches of the first step, on the device."""
        loader, batch = self.plan(groups, *overrides)
        return [pack.to(torch.device(torch.cuda.current_device())) for pack in loader.packs(batch)], batch

    def clear(self) -> None:
        """Zero the gradients, as before every step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def forward_backward(self, packs: list[Pack], denominator: int, coefficient: str = "rectified") -> LossReport:
        """Gradients of a step with one token coefficient."""
        for chunk in self.chunks:
            model = unwrap(chunk)
            model.head = dataclasses.replace(model.head, coefficient=coefficient)
        self.clear()
        return StepRunner(self.chunks, self.parallel).forward_backward(packs, denominator)

    def update(self) -> float:
        """Clip and Adam; the norm of the gradients."""
        norm = reduce_gradients(self.optimizer)
        apply_gradients(self.optimizer, norm, self.config.optimizer.clip_grad)
        return norm

    def step(self, packs: list[Pack], denominator: int, coefficient: str = "rectified") -> None:
        """Gradients and update."""
        self.forward_backward(packs, denominator, coefficient)
        self.update()

    def gradients(self) -> torch.Tensor:
        """All gradients, flat, on their device; float64 on a CPU."""
        parameters = [p for chunk in self.chunks for p in chunk.parameters()]
        together = torch.cat([p.main_grad.flatten() for p in parameters])
        return together if together.is_cuda else together.double()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found - expected).norm() / expected.norm())
