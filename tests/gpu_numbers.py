"""Parts of ``tools/gpu_check.py`` that show that a device computes what it should. On a CPU: tiny sizes, float32.

Each returns ``{"what": error}``; errors are ||ours - reference|| / ||reference||, and the worst of several.
"""

import json
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_gft import cpu, row_kernels
from megatron_gft.atomic import write_json
from megatron_gft.attention import CoreAttention, masked_attention
from megatron_gft.checkpoints.checkpointer import Checkpointer, RunState
from megatron_gft.config import Config
from megatron_gft.head_rows import EAGER, RowResult, VocabShard
from megatron_gft.hf.files import ModelFiles
from megatron_gft.job import build_trainer
from megatron_gft.model import unwrap
from megatron_gft.optimizer import gathered_parameters
from megatron_gft.pack_layout import PackLayout
from megatron_gft.parallel import current_parallel
from megatron_gft.planning import GroupLengths
from megatron_gft.sizing.memory import static_memory
from tools.bench.head import peak, reset_peak, single_rank
from tools.bench.one_gpu import ON_GPU, SAVED, TINY
from tools.bench.timing import default_device
from tools.bench.workbench import RandomGroups, StepShape, Workbench, relative_error

REFERENCE = Path(__file__).with_name("gpu_reference.json")
# Ragged groups, head size 32.
COMPARED = StepShape(2, 128, 4, 2, 256, 503, groups=6, prompt=0, response=0, responses=0, pack_rows=256)
STEPS = ("model.backend=local", "optimizer.lr=1e-3", "data.packing=packed")
CASES = {
    "fp32 packed": "data.packing=packed",
    "fp32 shared": "data.packing=shared_prefix",
    "fp32 unfused": "objective.fused_head=false",
}
if ON_GPU:
    CASES |= {
        "bf16 packed": "data.packing=packed",
        "bf16 shared": "data.packing=shared_prefix",
        "bf16 full recompute": "model.recompute=full",
        "bf16 gradients in bf16": "optimizer.grad_reduce_in_fp32=false",
    }

# Rows of start, length, start and length of the prefix.
SEGMENTS = {
    "plain": [(0, 128, 0, 0)],
    "shared": [(0, 100, 0, 0), (100, 37, 0, 100), (137, 1, 0, 100), (138, 90, 0, 0)],
}

# What the run's own metrics say.
TOLD = ("mfu", "run/mfu", "goodput", "memory_gib", "seconds/step", "seconds/save", "idle_share/stage_0")


def worst(errors: Iterable[float]) -> float:
    """The largest one; NaN where one is."""
    return float(np.max(list(errors)))


def attention(pack: str, window: int | None) -> dict[str, Any]:
    """Shared prefixes and grouped queries, with and without a window, against masked attention in float32."""
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    layout = PackLayout(segments=torch.tensor(SEGMENTS[pack]))
    index = layout.varlen(0, default_device())
    q, k, v, up = (torch.randn(layout.tokens, h, 64, device=default_device()).to(dtype) for h in (8, 2, 2, 8))
    module = CoreAttention.__new__(CoreAttention)
    torch.nn.Module.__init__(module)
    module.window, module.scale, module.cp_group = window, 64**-0.5, None
    results = []
    for run, kind in ((partial(module._attend, layout=layout), dtype), (None, torch.float32)):
        inputs = [t.detach().to(kind).requires_grad_() for t in (q, k, v)]
        out = run(*inputs) if run else masked_attention(*inputs, index, 64**-0.5, window)
        out = out.reshape(up.shape)
        results.append((out, *torch.autograd.grad(out, inputs, up.to(out.dtype))))
    return {"error": worst(relative_error(a.float(), b) for a, b in zip(*results, strict=True))}


def kernels(dtype: torch.dtype) -> dict[str, Any]:
    """The head's Triton kernels against the eager passes in float64: a shard with padding, odd sizes."""
    rows, columns = (1024, 65537) if ON_GPU else (3, 2051)
    shard = VocabShard(100, columns, columns - 3, None)
    labels = torch.randint(50, 100 + columns, (rows,), device=default_device())
    logits = (torch.randn(rows, columns, device=default_device()) * 3).to(dtype)
    wide, weights = logits.double(), torch.randn(rows, device=default_device())
    expected = EAGER.statistics(wide, labels, shard, True)
    ours = row_kernels.row_statistics(logits, labels, shard.start, shard.valid, entropy=True)
    finite = expected.isfinite()
    assert torch.equal(finite, ours.isfinite()), "labels of other ranks"
    found = {"statistics": relative_error(ours[finite], expected[finite])}
    logprobs = torch.where(finite[2], expected[2] - expected[0] - expected[1].log(), -9.0)
    result = RowResult(logprobs, None, 1 / expected[1])
    EAGER.gradient_(wide, labels, shard, expected, result, weights.double())
    factor, of_label = result.scale.float() * weights, weights * torch.expm1(logprobs).float()
    row_kernels.row_gradient_(logits, labels, shard.start, shard.valid, ours[0], factor, of_label)
    return found | {"gradient": relative_error(logits, wide)}


def compare(name: str) -> dict[str, Any]:
    """Losses, norms and gradients of three steps against those of a CPU in float32 (``REFERENCE``)."""
    expected, found = json.loads(REFERENCE.read_text()), {}
    ours = reference_steps(f"model.precision={name[:4]}", CASES[name])
    for key in ("losses", "norms"):
        found[key] = worst(abs(a - b) / abs(b) for a, b in zip(ours[key], expected[key], strict=True))
    # the projection is about as long as the gradient
    pairs = [(ours["gradients"][parameter], known) for parameter, known in expected["gradients"].items()]
    return found | {"gradients": worst(abs(a[0] - b[0]) / b[1] for a, b in pairs)}


def reference_steps(*overrides: str) -> dict[str, Any]:
    """Three steps of a tiny model whose weights and data depend on no random generator of torch.

    Of each step loss and norm; of each gradient of the first one a projection on random signs, and its norm.
    """
    random = np.random.RandomState(7)
    lengths = [GroupLengths(int(random.randint(5, 60)), tuple(random.randint(1, 80, 4).tolist())) for _ in range(6)]
    result: dict[str, Any] = {"losses": [], "norms": [], "gradients": {}}
    with single_rank():
        bench = Workbench(COMPARED, *STEPS, *overrides)
        parameters = dict(unwrap(bench.chunks[0]).named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(values * 0.05 if parameter.dim() > 1 else 1 + values * 0.1))
        bench.optimizer.reload_model_params()
        packs, batch = bench.packs(RandomGroups(lengths, COMPARED.vocab), *STEPS, *overrides)
        for number in range(3):
            result["losses"].append(bench.forward_backward(packs, batch.denominator).loss)
            for name, parameter in parameters.items() if number == 0 else ():
                gradient = parameter.main_grad.double().cpu().flatten()  # type: ignore[union-attr]
                signs = np.random.RandomState(zlib.crc32(name.encode())).randint(0, 2, len(gradient)) * 2 - 1
                projection = float((gradient * torch.from_numpy(signs)).sum())
                result["gradients"][name] = (projection, float(gradient.norm()))
            result["norms"].append(bench.update())
    return result


def run_config(folder: Path, shape: StepShape, *overrides: str) -> Config:
    """The configuration of a run in ``folder`` whose config.json lies there."""
    (folder / "config.json").write_text(json.dumps(shape.hf_config()))
    quiet = ("logging.tensorboard=false", "logging.progress_bar=false", "model.backend=local")
    return shape.configure(f"model.config={folder}", f"train.output={folder / 'run'}", *quiet, *overrides)


def save() -> dict[str, Any]:
    """A checkpoint in the background: how long it stops a step, what it writes and takes of the device."""
    with single_rank(), tempfile.TemporaryDirectory() as name:
        folder, bench = Path(name), Workbench(SAVED)
        packs, batch = bench.packs(RandomGroups.equal(SAVED))
        bench.forward_backward(packs, batch.denominator)
        bench.update()
        parts = (bench.chunks, bench.optimizer, bench.parallel)
        settings = {"config": run_config(folder, SAVED), "model_files": ModelFiles(folder)}
        keeper = Checkpointer(folder / "checkpoints", *parts, **settings)
        static, before, started = static_memory(bench.chunks, bench.optimizer), reset_peak(), time.perf_counter()
        with gathered_parameters(bench.chunks):
            keeper.save(RunState(step=1))
        stopped, extra = time.perf_counter() - started, peak() - before
        assert not keeper.wait()
        whole = time.perf_counter() - started
        written = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    sizes = {"bytes written a parameter": written, "device bytes a parameter, at the peak": extra}
    sizes = {what: size / static.parameters for what, size in sizes.items()}
    return {"seconds stopped": stopped, "seconds in all": whole, **sizes}


def resume() -> dict[str, Any]:
    """The trainer itself: four steps, and two and two with a resume, saved in the background with overlap."""
    losses, records = {}, []
    with tempfile.TemporaryDirectory() as name:
        for run, steps in (("whole", 4), ("cut", 2), ("cut", 4)):
            folder = Path(name) / run
            folder.mkdir(exist_ok=True)
            options = ("optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true")
            options += ("checkpoint.save_every=2", f"train.max_steps={steps}", "data.groups_per_step=2")
            groups = RandomGroups([GroupLengths(12, (9, 5, 7, 3))] * 8, TINY.vocab)
            with single_rank():
                trainer = build_trainer(
                    run_config(folder, TINY, *options), TINY.model(), current_parallel(), groups, None
                )
                assert trainer.run() == 0
                trainer.close()
            lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines]
            losses[run] = [record["loss"] for record in records]
    differences = [abs(a / b - 1) for a, b in zip(losses["cut"], losses["whole"], strict=True)]
    told = {key: value for key, value in records[-1].items() if key in TOLD}
    return {"losses": worst(differences), "last step": told}


# A part each: one that fails hides no other.
PARTS: dict[str, Callable[[], dict[str, Any]]]
PARTS = {f"attention {p}, window {w}": partial(attention, p, w) for p in SEGMENTS for w in (None, 5)}
GOALS = {name: {"error": 2e-2 if ON_GPU else 1e-5} for name in PARTS} | {"resume": {"losses": 1e-3}}
# What float32, bf16 and Triton's interpreter, which truncates to bf16, can reach.
for dtype, goal in {torch.float32: 1e-5, torch.bfloat16: 1e-2}.items():
    PARTS[f"kernels {dtype}"] = partial(kernels, dtype)
    GOALS[f"kernels {dtype}"] = {"statistics": 1e-5, "gradient": goal}
for name in CASES:
    PARTS[f"compare {name}"] = partial(compare, name)
    reached = (1e-4, 1e-3, 1e-3) if name.startswith("fp32") else (0.02, 0.05, 0.05)
    GOALS[f"compare {name}"] = dict(zip(("losses", "norms", "gradients"), reached, strict=True))
PARTS |= {"resume": resume, "save": save}

# On a CPU, after a change that changes these numbers: PYTHONPATH=. python tests/gpu_numbers.py
if __name__ == "__main__":
    cpu.install()
    write_json(REFERENCE, reference_steps("model.precision=fp32"))
