"""What runs on a GPU, on one without data (``fake_cuda.py``): devices, shapes, dtypes, and what the host waits for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import write_tiny_model

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or torch.backends.cuda.is_built(), reason="needs g++, and a torch that knows no CUDA"
)
HERE = Path(__file__).parent
FROM_ROOT = {"cwd": HERE.parent, "capture_output": True, "text": True}
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> str:
    """The device, compiled: three seconds."""
    path, root = tmp_path_factory.mktemp("fake") / "fake_cuda.so", Path(torch.__file__).parent
    command = ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}", str(HERE / "fake_cuda.cpp")]
    command += ["-o", str(path), f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model") / "hf", "llama_tied_linear", num_hidden_layers=4))


def on_fake_gpu(library: str, what: str, *arguments: str) -> dict:
    """Results of ``what`` by name."""
    command = [sys.executable, "-W", "ignore", str(HERE / "fake_cuda.py"), what, *arguments]
    done = subprocess.run(command, env=ENVIRONMENT | {"LD_PRELOAD": library}, timeout=600, **FROM_ROOT)
    assert done.returncode == 0, done.stderr[-6000:]
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def test_the_device_shows_what_waits_and_what_fails(library):
    waits = {"read": 1, "list": 4, "to the host": 1, "to the device": 1, "pageable beside": 1, "page-locked": 1}
    waits |= {"to the host beside": 0, "page-locked beside": 0, "made on the device": 0, "made on the host": 1}
    fails = {"mask": "DynamicOutputShapeException", "nonzero": "DynamicOutputShapeException"}
    fails |= {"two devices": "FakeTensorDeviceMismatchError", "two shapes": "RuntimeError"}
    assert on_fake_gpu(library, "operators") == waits | fails


# Ours, once a step: whether a rank is to stop. The loss comes along with Megatron's norm of the gradient.
OURS = {"_local_scalar_dense megatron_gft/runtime.py agreed": 1}
NORM = {"_local_scalar_dense optimizer/clip_grads.py get_grad_norm_fp32": 1}
FINALIZE = "_local_scalar_dense distributed/finalize_model_grads.py finalize_model_grads"  # a chunk: are there tokens
FAST = ("0/1 data.packing=shared_prefix", "1/2 parallel.tp=2 parallel.sequence_parallel=true")
OVERLAP = "optimizer.overlap_grad_reduce=true optimizer.overlap_param_gather=true"
SLOW = (
    "0/1 model.precision=fp32 model.recompute=core_attention",
    "0/1 objective.fused_head=false model.recompute=full",
    "0/1 objective.name=chord_phi objective.entropy=false",
    "1/2 parallel.tp=2 optimizer.grad_reduce_in_fp32=false",
    "1/2 parallel.cp=2",
    "0/2 parallel.cp=2 data.packing=shared_prefix",
    "0/2 parallel.pp=2",
    "1/2 parallel.pp=2",
    "0/2 parallel.pp=2 parallel.vpp=2",
    f"3/4 parallel.tp=2 parallel.pp=2 parallel.vpp=2 parallel.sequence_parallel=true {OVERLAP}",
    "1/2 optimizer.distributed=false data.max_tokens_per_pack=256",
)


@pytest.mark.parametrize("cases", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["fast", "slow"])
def test_a_step_waits_once_and_a_microbatch_never(library, model, tmp_path, cases):
    found = on_fake_gpu(library, "train", model, str(tmp_path), *cases)
    assert list(found) == list(cases)
    for case, result in found.items():
        assert isinstance(result, list), f"{case}: {result}"
        begins, microbatches, waits = result
        assert begins == 0 and microbatches >= 2, case
        assert waits.pop(FINALIZE, 0) <= (2 if "vpp" in case else 1), case  # later releases of Megatron do without
        assert waits == OURS | NORM, case


@pytest.mark.slow
def test_parts_of_the_gpu_check_run_at_a_gpus_sizes(library, tmp_path):
    parts = ["attention shared, window 5", "compare bf16 shared", "head_memory", "head_time_8B", "shared_prefix"]
    assert on_fake_gpu(library, "gpu_check", str(tmp_path / "found.json"), *parts) == dict.fromkeys(parts)


@pytest.mark.slow
def test_a_checkpoint_of_a_cpu_goes_on_there(library, model, tmp_path):
    command = [sys.executable, str(HERE / "device_run.py"), model, str(tmp_path / "0"), "train.max_steps=3"]
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=300)
    case = "0/1 train.epochs=5 data.allow_changed_data=true"  # other groups
    assert on_fake_gpu(library, "train", model, str(tmp_path), case)[case][0] == 3


INTERLEAVED = "parallel.pp=4 parallel.vpp=4"
PEAKS = (
    "examples/qwen2.5-math-1.5b/gpus-8.yaml 0/8 3 model.recompute=core_attention",
    "examples/qwen3-8b/gpus-8.yaml 0/8 3",
    "examples/llama3.1-8b/gpus-8.yaml 0/8 3 parallel.cp=2 model.recompute=full",
    f"examples/llama3.1-8b/gpus-8.yaml 0/8 8 {INTERLEAVED}",
    f"examples/llama3.1-8b/gpus-8.yaml 7/8 8 {INTERLEAVED}",
    "examples/llama3.1-70b/gpus-64.yaml 0/64 16",
)


@pytest.mark.slow
def test_the_plan_says_what_a_step_holds(library):
    """The fullest moment of a step with full packs, of those that run first and last in a pipeline."""
    held, far = on_fake_gpu(library, "peak", *PEAKS), []
    for case in PEAKS:
        recipe, place, _, *overrides = case.split()
        rank, world_size = map(int, place.split("/"))
        command = [sys.executable, "tools/plan.py", "--config", recipe, "--world-size", str(world_size), "--json"]
        options = ["model.backend=local", "data.packing=packed", *overrides]
        done = subprocess.run([*command, *options], env=ENVIRONMENT, check=True, **FROM_ROOT)
        stages = json.loads(done.stdout)["stages"]
        planned = stages[rank * len(stages) // world_size]["estimate"]["total_with_exact"]
        if not -0.015 < planned / held[case] - 1 < 0.02:  # too little is worse: a run that fits would not
            far.append(f"{case}: {planned / 2**30:.2f} GiB planned, {held[case] / 2**30:.2f} held")
    assert not far, "\n".join(far)
