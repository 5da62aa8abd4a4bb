"""Parts of ``tools/gpu_check.py`` that say how fast one GPU is, where it waits and what it holds.

On a CPU each runs with tiny sizes and proves only itself. Results are JSON-able; ``GOALS`` are of a GPU.
"""

import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tools.bench import head, step
from tools.bench.timing import default_device, interleaved_seconds
from tools.bench.workbench import RandomGroups, StepShape, Workbench, default_shape

ON_GPU = torch.cuda.is_available()
# On a GPU: 4 layers of an 8B model, the heads of 8B and 1.5B models, 0.23 billion parameters to save.
TINY = StepShape(1, 32, 4, 2, 48, 67, groups=4, prompt=12, response=9, responses=4, pack_rows=120)
SLICE, SAVED, PREFIXES, REPEATS = TINY, TINY, ((20, 6, 4, 0.9),), 2
HEADS = {"8B": head.HeadShape(32, 128, 16, 8), "1.5B": head.HeadShape(32, 160, 16, 8)}
if ON_GPU:
    SLICE, PREFIXES, REPEATS = dataclasses.replace(default_shape(), pack_rows=8192), step.PREFIX_SHAPES, 7
    SAVED = StepShape(2, 2048, 16, 4, 5632, 32000, 1, 4, 4, 2, 64)
    HEADS = {"8B": head.HeadShape(8192, 128256, 4096, 2048), "1.5B": head.HeadShape(8192, 151936, 1536, 2048)}


def machine() -> dict[str, Any]:
    """What this device reaches: bytes copied (read and written), and a bf16 product, of random numbers."""
    size, side = (2**32, 8192) if ON_GPU else (2**16, 64)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=default_device())
    target, a = torch.empty_like(source), torch.randn(side, side, device=default_device()).bfloat16()
    taken = interleaved_seconds({"copy": lambda: target.copy_(source), "product": lambda: a @ a}, warmup=2)
    copy, product = (sorted(taken[name])[3] or 1e-9 for name in ("copy", "product"))
    return {"copy, TB/s": 2 * size / copy / 1e12, "bf16 product, TFLOP/s": 2 * side**3 / product / 1e12}


def head_memory() -> dict[str, Any]:
    """p1: peak of the fused head beyond its inputs and two gradients, in chunks of logits."""
    variants = ("fused", "fused_main_grad")
    return {v: head.measure_memory(HEADS["8B"], v)["extra_bytes"] / HEADS["8B"].chunk_bytes for v in variants}


def waits() -> dict[str, Any]:
    """Where a step's host waits for the device (torch's own warnings), its CUDA calls, and the share of idle time."""
    with head.single_rank():
        bench = Workbench(SLICE, "objective.entropy=true")
        loader, batch = bench.plan(RandomGroups.equal(SLICE))
        prepared = [loader.packs(batch) for _ in range(3)]  # fresh ones: a layout keeps what it made once
        microbatches = len(prepared[0])

        def run() -> None:
            bench.step(prepared.pop(), batch.denominator)

        run()
        places = waiting_places(run)
        kinds = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * ON_GPU]
        with torch.profiler.profile(activities=kinds) as profiler:
            run()
            torch.cuda.synchronize()
    events = profiler.events() or []
    calls = Counter(e.name for e in events if e.name.startswith("cuda") and ("Sync" in e.name or "Memcpy" in e.name))
    counts = {"waits of a step": places.total(), "microbatches": microbatches, "idle share": idle_share(events)}
    return counts | {"places": dict(places), "calls": dict(calls)}


def waiting_places(run: Callable[[], None]) -> Counter[str]:
    """Where the host waits for the device in ``run``, by torch's warnings; one more says that they miss some."""
    warn = torch.cuda.set_sync_debug_mode if ON_GPU else str
    with warnings.catch_warnings(record=True, action="always") as caught:
        warn("warn")
        run()
        warn("default")
    found = [w for w in caught if "called a synchronizing" in str(w.message)]
    return Counter(f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in found)


def idle_share(events: Iterable[Any]) -> float:
    """Share of the time between the first and the last kernel in which the device ran none; NaN where a driver that
    keeps its counters to itself shows no kernel."""
    kind = torch.autograd.DeviceType.CUDA if ON_GPU else torch.autograd.DeviceType.CPU
    ran = [e.time_range for e in events if e.device_type == kind and not e.is_user_annotation]  # those span kernels
    spans = sorted((span.start, span.end) for span in ran)
    if not spans:
        return math.nan
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return 1 - busy / max(end - spans[0][0], 1e-9)


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "machine": machine,
    "head_memory": head_memory,
    "head_time_8B": partial(head.head_time, HEADS["8B"], repeats=REPEATS),
    "step": partial(step.step_ratio, SLICE, pairs=REPEATS),
    "waits": waits,
    "shared_prefix": partial(step.shared_prefix_step, SLICE, pairs=min(REPEATS, 3), shapes=PREFIXES),
    "head_time_1.5B": partial(head.head_time, HEADS["1.5B"], repeats=REPEATS),
}
# Largest values, by a pattern of the place in a part's result; negative: smallest ones.
GOALS = {
    "head_memory": {"fused.*": 1.1},
    "head_time_8B": {r"ratios\.fused / three_gemms": 1.10, r"ratios\.fused / megatron_unfused": 0.75},
    "head_time_1.5B": {r"ratios\.fused / three_gemms": 1.20},
    "step": {r"gft\.ratio_median": 1.003, r"gft / plain": 1.0, "peak / planned": 1.1},
    "waits": {"waits of a step": 3, "idle share": 0.05},
    "shared_prefix": {r"0\.attained": -0.90, r"[12]\.attained": -0.95, "gradient_error": 0.02},
}
