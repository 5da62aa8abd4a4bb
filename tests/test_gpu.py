"""On one GPU: the same numbers as on the CPU, with torch's own kernels and with Transformer Engine.

Every run is a program of its own (``device_run.py``), so that the CPU reference is Megatron on the CPU and not a
second formula.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import write_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

needs_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)

# 16 heads-times-channels, hidden and vocabulary sizes that FP8 and flash kernels take.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 512}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "hf", "qwen3", **SIZES)


def train(model: Path, output: Path, *overrides: str, cpu: bool = False) -> dict:
    """Losses and gradient norms of a run on the CPU or the GPU."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    if cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(Path(__file__).with_name("device_run.py")), str(model), str(output), *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory) -> dict:
    """Four float32 steps on the CPU."""
    result = train(model, tmp_path_factory.mktemp("cpu") / "run", "model.precision=fp32", cpu=True)
    assert result["device"] == "cpu" and len(result["loss"]) == 4
    return result


def relative(ours: list[float], theirs: list[float]) -> float:
    """Largest difference relative to the largest value."""
    pairs = list(zip(ours, theirs, strict=True))
    return max(abs(a - b) for a, b in pairs) / max(abs(b) for _, b in pairs)


@pytest.mark.parametrize("packing", ["packed", "shared_prefix"])
@pytest.mark.parametrize("head", ["true", "false"])
def test_fp32_equals_the_cpu(model, reference, tmp_path, packing, head):
    options = ("model.precision=fp32", "model.backend=local", f"data.packing={packing}", f"objective.fused_head={head}")
    result = train(model, tmp_path / "run", *options)
    assert "cpu" not in result["device"]
    assert relative(result["loss"], reference["loss"]) < 1e-4
    assert relative(result["grad_norm"], reference["grad_norm"]) < 1e-3


@pytest.mark.parametrize("packing", ["packed", "shared_prefix"])
@pytest.mark.parametrize("backend", ["local", pytest.param("transformer_engine", marks=needs_te)])
def test_bf16_is_close_to_fp32(model, reference, tmp_path, packing, backend):
    result = train(model, tmp_path / "run", f"model.backend={backend}", f"data.packing={packing}")
    assert relative(result["loss"], reference["loss"]) < 0.05
    assert relative(result["grad_norm"], reference["grad_norm"]) < 0.1


@needs_te
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_fp8_is_near_bf16(model, reference, tmp_path, recipe):
    result = train(model, tmp_path / "run", "model.backend=transformer_engine", f"model.fp8={recipe}")
    assert relative(result["loss"], reference["loss"]) < 0.2


@pytest.mark.parametrize("recompute", ["core_attention", "full"])
def test_recompute_changes_nothing(model, reference, tmp_path, recompute):
    options = ("model.precision=fp32", "model.backend=local", f"model.recompute={recompute}")
    result = train(model, tmp_path / "run", *options)
    assert relative(result["loss"], reference["loss"]) < 1e-4


@pytest.mark.parametrize("backend", ["local", pytest.param("transformer_engine", marks=needs_te)])
@pytest.mark.parametrize("background", ["true", "false"])
def test_resume_on_the_gpu(model, tmp_path, backend, background):
    options = (f"model.backend={backend}", f"checkpoint.async_save={background}", "optimizer.overlap_grad_reduce=true")
    whole = train(model, tmp_path / "whole", *options)
    train(model, tmp_path / "run", *options, "train.max_steps=2")
    resumed = train(model, tmp_path / "run", *options)
    assert relative(resumed["loss"], whole["loss"]) < 1e-3


@needs_te
def test_checkpoint_crosses_layer_specs(model, tmp_path):
    """Saved by one backend, continued by the other: weights, Adam's state and data position."""
    whole = train(model, tmp_path / "whole", "model.backend=local")
    for first, second in (("local", "transformer_engine"), ("transformer_engine", "local")):
        train(model, tmp_path / first, f"model.backend={first}", "train.max_steps=2")
        crossed = train(model, tmp_path / first, f"model.backend={second}")
        assert relative(crossed["loss"], whole["loss"]) < 0.05


def test_memory_is_reported(model, tmp_path):
    train(model, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < record["memory_gib"] < torch.cuda.mem_get_info()[1] / 2**30 for record in records)
    assert all(0 < record["mfu"] < 1 for record in records)
