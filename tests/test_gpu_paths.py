"""What only a GPU runs, as far as a CPU can show it."""

import contextlib

import megatron.core.optimizer as optimizers
import pytest
import torch
from allocated import Allocated
from megatron.core.optimizer import distrib_optimizer

from megatron_gft import cpu
from tools.bench import head


def test_a_gpu_without_transformer_engine_takes_the_same_adam(monkeypatch):
    """Megatron's distributed optimizer cannot load a checkpoint into torch's own."""
    cpu.install()
    monkeypatch.setattr(optimizers, "Adam", torch.optim.AdamW)
    monkeypatch.setattr(optimizers, "USING_PYTORCH_OPTIMIZER", True)
    monkeypatch.setattr(distrib_optimizer, "Adam", torch.optim.Adam)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cpu.install()
    assert optimizers.Adam is distrib_optimizer.Adam is cpu.FusedAdam
    assert distrib_optimizer.HAVE_APEX_OR_TE and not optimizers.USING_PYTORCH_OPTIMIZER


@pytest.mark.parametrize("fused", [False, True])
def test_adam_is_torchs_own_step_by_step(monkeypatch, fused):
    monkeypatch.setattr(cpu, "adam", lambda *a, adam=cpu.adam, **k: adam(*a, **k | {"fused": fused}))  # True on a GPU
    start = [torch.randn(4, 3), torch.randn(7)]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    runs = []
    for make in (cpu.FusedAdam, torch.optim.AdamW):
        weights = [torch.nn.Parameter(value.clone()) for value in start]
        adam = make(weights, **settings)
        for step in range(3):
            for weight in weights:
                weight.grad = torch.cos(weight.detach() * (step + 1))
            adam.step()
        runs.append(weights)
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0 if not fused else 1e-6, atol=0 if not fused else 1e-7)


@pytest.mark.parametrize("variant", ["fused", "fused_main_grad"])
def test_peak_of_the_head_in_bf16_is_one_chunk_of_logits(monkeypatch, variant):
    """Not the gradient that autograd makes of the weight's later: here twice a chunk, and as it is in Megatron."""
    allocated = Allocated()
    monkeypatch.setattr(head.HeadShape, "dtype", torch.bfloat16)
    monkeypatch.setattr(head, "reset_peak", allocated.reset)
    monkeypatch.setattr(head, "peak", lambda: allocated.most)
    monkeypatch.setattr(head, "single_rank", contextlib.nullcontext)
    shape = head.HeadShape(tokens=64, vocab=65536, hidden=64, chunk_tokens=32)
    with allocated:
        found = head.measure_memory(shape, variant)
    # on a CPU blocks of the eager passes, and of the product in half precision, come on top
    assert 1 <= found["extra_bytes"] / shape.chunk_bytes <= 1.75
    assert found["peak_bytes"] - found["gradient_bytes"] >= 2 * shape.chunk_bytes
