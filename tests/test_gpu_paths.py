"""What only a GPU runs, as far as a CPU can show it."""

import megatron.core.optimizer as optimizers
import pytest
import torch
from megatron.core.optimizer import distrib_optimizer

from megatron_gft import cpu


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
