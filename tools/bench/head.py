"""Measurements of the fused head as ratios: against its three GEMMs, Megatron's cross entropies, and torch's.

Run as a module it is the fresh process in which :func:`head_memory` measures one variant.
"""

import contextlib
import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_gft import cpu, head_rows
from megatron_gft.gft import token_coefficient
from megatron_gft.objectives import Coefficient
from megatron_gft.vocab_parallel import linear_gft_loss
from tools.bench.timing import default_device, interleaved_seconds, summary

TAU = 0.1


@dataclass(frozen=True)
class HeadShape:
    """Rows that carry loss, vocabulary, hidden size and rows of a chunk; bf16 on a GPU, float32 on a CPU."""

    tokens: int
    vocab: int
    hidden: int
    chunk_tokens: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32

    @property
    def chunk_bytes(self) -> int:
        return min(self.chunk_tokens, self.tokens) * self.vocab * self.dtype.itemsize


def default_shape() -> HeadShape:
    """An 8B model's head on a GPU; on a CPU what takes seconds, in two chunks."""
    if torch.cuda.is_available():
        return HeadShape(tokens=8192, vocab=128256, hidden=4096, chunk_tokens=4096)
    return HeadShape(tokens=1024, vocab=32000, hidden=1024, chunk_tokens=512)


class Workload:
    """Inputs of one shape; each method is one forward and backward of the head by another implementation."""

    def __init__(self, shape: HeadShape, seed: int = 0):
        self.shape = shape
        generator, dtype = torch.Generator(default_device()).manual_seed(seed), shape.dtype
        options: dict[str, Any] = {"generator": generator, "device": default_device()}

        def normal(*size: int, scale: float) -> torch.Tensor:
            return torch.randn(*size, **options).mul_(scale).to(dtype).requires_grad_()

        self.hidden = normal(shape.tokens, shape.hidden, scale=1.0)
        self.weight = normal(shape.vocab, shape.hidden, scale=shape.hidden**-0.5)
        self.labels = torch.randint(0, shape.vocab, (shape.tokens,), **options)
        self.token_weights = torch.randn(shape.tokens, **options)
        self.made: Callable[[], Any] = lambda: None  # called when the fused head has made its gradients

    def clear(self) -> None:
        """Forget the gradients of the last run."""
        self.hidden.grad = self.weight.grad = None

    def three_gemms(self) -> Callable[[], None]:
        """Logits, hidden gradient and weight gradient into buffers that exist already: nothing can be faster."""
        x, w = self.hidden.detach(), self.weight.detach()
        logits, dx, dw = x.new_empty(len(x), len(w)), torch.empty_like(x), torch.empty_like(w)

        def run() -> None:
            torch.mm(x, w.t(), out=logits)
            torch.mm(logits, w, out=dx)
            torch.mm(logits.t(), x, out=dw)

        return run

    def fused(self, coefficient: Coefficient = "rectified", **options: Any) -> None:
        """:func:`linear_gft_loss`."""
        self.clear()
        loss, _, _ = linear_gft_loss(
            self.hidden,
            self.weight,
            self.labels,
            self.token_weights,
            tau=TAU,
            coefficient=coefficient,
            chunk_tokens=self.shape.chunk_tokens,
            **options,
        )
        self.made()
        loss.backward()

    def fused_main_grad(self) -> None:
        """The same with the weight gradient added to a float32 buffer in forward, as under Megatron's DDP."""
        if not hasattr(self.weight, "main_grad"):
            self.weight.main_grad = torch.zeros(self.weight.shape, dtype=torch.float32, device=self.weight.device)  # type: ignore[attr-defined]
        self.fused(accumulate_into_main_grad=True)

    def fused_eager(self) -> None:
        """:func:`linear_gft_loss` with the eager row passes, where it would take the Triton kernels."""
        with mock.patch.object(head_rows, "kernels", return_value=None):
            self.fused()

    def liger(self) -> None:
        """liger-kernel's fused linear layer and cross entropy over a tensor-parallel group."""
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyTPFunction

        self.clear()
        self._backward(
            LigerFusedLinearScaledCrossEntropyTPFunction.apply(self.hidden, self.weight, self.labels, dist.group.WORLD)
        )

    def torch_cross_entropy(self) -> None:
        """``torch.nn.functional.cross_entropy`` on all logits."""
        self.clear()
        logits = torch.nn.functional.linear(self.hidden, self.weight)
        self._backward(torch.nn.functional.cross_entropy(logits.float(), self.labels, reduction="none"))

    def megatron_unfused(self) -> None:
        """Megatron's linear layer and vocab-parallel cross entropy."""
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        self.clear()
        self._backward(vocab_parallel_cross_entropy(self._megatron_logits()[:, None], self.labels[:, None])[:, 0])

    def megatron_fused(self) -> None:
        """Megatron's linear layer and its compiled ("native") cross entropy; its gradient is rounded to bf16."""
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

        self.clear()
        self._backward(
            fused_vocab_parallel_cross_entropy(
                self._megatron_logits()[:, None], self.labels[:, None], dist.group.WORLD
            )[:, 0]
        )

    def _megatron_logits(self) -> torch.Tensor:
        from megatron.core.tensor_parallel import linear_with_grad_accumulation_and_async_allreduce

        return linear_with_grad_accumulation_and_async_allreduce(
            self.hidden,
            self.weight,
            None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=False,
            sequence_parallel=False,
        )

    def _backward(self, cross_entropy: torch.Tensor) -> None:
        c = token_coefficient(-cross_entropy, TAU, "rectified")
        (self.token_weights * c * cross_entropy).sum().backward()


@contextlib.contextmanager
def single_rank() -> Iterator[None]:
    """Megatron in one rank for the time of the block."""
    cpu.install()
    from megatron_gft.parallel import destroy_parallel, initialize_parallel

    assert not dist.is_initialized(), "measure in a process of its own"
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    initialize_parallel()
    try:
        yield
    finally:
        destroy_parallel()


def head_time(shape: HeadShape | None = None, *, repeats: int = 7) -> dict[str, Any]:
    """Forward and backward of the head by every implementation, relative to the three GEMMs alone.

    Goals: fused <= 1.08 on a CPU; on a GPU <= 1.10 (1.20 at h 1536), and at h 4096 <= 0.75 of Megatron's output layer
    with its unfused cross entropy.
    """
    shape = shape or default_shape()
    work = Workload(shape)
    runs: dict[str, Callable[[], Any]] = {
        "three_gemms": work.three_gemms(),
        "fused": work.fused,
        "fused_sft": lambda: work.fused("none"),
        "fused_entropy": lambda: work.fused(entropy=True),
        "fused_main_grad": work.fused_main_grad,
        "torch_cross_entropy": work.torch_cross_entropy,
        "megatron_unfused": work.megatron_unfused,
        "megatron_fused": work.megatron_fused,
    }
    if torch.cuda.is_available():  # without a GPU the eager passes are those of "fused"
        runs["fused_eager"] = work.fused_eager
        runs |= {"liger": work.liger} if importlib.util.find_spec("liger_kernel") else {}
    failed = {}
    with single_rank():
        for name in ("torch_cross_entropy", "megatron_unfused", "megatron_fused", "liger"):
            try:
                runs.get(name, work.clear)()
            except Exception as error:  # of others' kernels and compilers anything; ours is still worth measuring
                failed[name] = f"{type(error).__name__}: {error}"
                del runs[name]
        durations = interleaved_seconds(runs, repeats=repeats)
    result = summary(durations, "three_gemms")
    ratios = {"fused / three_gemms": result["fused"]["ratio_median"]}
    for other in ("fused_sft", "torch_cross_entropy", "megatron_unfused", "megatron_fused", "fused_eager", "liger"):
        if other not in runs:
            continue
        ratios[f"fused / {other}"] = summary(durations, other)["fused"]["ratio_median"]
    return {
        "shape": dataclasses.asdict(shape),
        "dtype": str(shape.dtype),
        "repeats": repeats,
        "ratios": ratios,
        "failed": failed,
        "runs": result,
    }


MEMORY_VARIANTS = ("fused", "fused_main_grad", "torch_cross_entropy", "megatron_unfused", "megatron_fused")


def head_memory(shape: HeadShape | None = None, variants: tuple[str, ...] = MEMORY_VARIANTS) -> dict[str, Any]:
    """Peak memory beyond inputs and the two gradients, in chunk buffers; each variant in a process of its own.

    Resident memory on a CPU (the GEMM library's own buffers included), allocated memory on a GPU. Goal: fused
    <= 1.1 chunk buffers.
    """
    shape = shape or default_shape()
    results = {}
    for variant in variants:
        request = json.dumps({"shape": dataclasses.asdict(shape), "variant": variant})
        command = [sys.executable, "-m", "tools.bench.head", request]
        child = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        if child.returncode:
            raise RuntimeError(f"measuring {variant} failed:\n{child.stderr[-4000:]}")
        results[variant] = json.loads(child.stdout.splitlines()[-1])
    ratios = {f"{variant} extra / chunk": run["extra_bytes"] / shape.chunk_bytes for variant, run in results.items()}
    return {
        "shape": dataclasses.asdict(shape),
        "chunk_bytes": shape.chunk_bytes,
        "ratios": ratios,
        "runs": results,
    }


def measure_memory(shape: HeadShape, variant: str) -> dict[str, int]:
    """Bytes of one run in this process: peak over what was held before; until the gradients are made, without them."""
    with single_rank():
        # A tiny run first: libraries load and keep what they keep.
        getattr(Workload(HeadShape(tokens=8, vocab=64, hidden=16, chunk_tokens=4)), variant)()
        work = Workload(shape)
        if variant == "fused_main_grad":
            work.weight.main_grad = torch.zeros(shape.vocab, shape.hidden, device=work.weight.device)  # type: ignore
        peaks, before = [], reset_peak()
        # In backward autograd makes a gradient in the weight's dtype of it: a copy, or a placeholder as of Megatron's.
        work.made = lambda: peaks.append(peak())
        getattr(work, variant)()
        peaks.append(peak())
    gradients = work.hidden.nbytes
    if variant != "fused_main_grad":  # there it was held before
        gradients += work.weight.numel() * (4 if variant == "fused" else work.weight.element_size())
    return {"peak_bytes": peaks[-1] - before, "gradient_bytes": gradients, "extra_bytes": peaks[0] - before - gradients}


def reset_peak() -> int:
    """Bytes held now; the peak counts from here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: reset VmHWM to VmRSS
    return _status_bytes("VmRSS")


def peak() -> int:
    """Most bytes held since :func:`reset_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = json.loads(sys.argv[1])
    print(json.dumps(measure_memory(HeadShape(**wanted["shape"]), wanted["variant"])))
