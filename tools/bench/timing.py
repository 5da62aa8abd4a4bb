"""Interleaved timing: the runs of one comparison take turns, there and back, so that drift hits all alike.

Seconds are process CPU time without CUDA (other processes do not count) and CUDA events with it.
"""

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch


def default_device() -> torch.device:
    """The GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment() -> dict[str, Any]:
    """Hardware and versions, to be kept beside every number."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "megatron_core": importlib.metadata.version("megatron-core"),
        "python": platform.python_version(),
        "clock": "cuda events" if on_gpu else "process CPU seconds",
    }


def _processor() -> str:
    """Name of the CPU, which ``platform`` does not know on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def seconds(run: Callable[[], Any]) -> float:
    """Duration of one call."""
    if not torch.cuda.is_available():
        start = time.process_time()
        run()
        return time.process_time() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def interleaved_seconds(
    runs: Mapping[str, Callable[[], Any]], *, repeats: int = 7, warmup: int = 1
) -> dict[str, list[float]]:
    """Durations of every run, ``repeats`` rounds in which each run has one turn, after ``warmup`` rounds.

    Every other round goes backwards: in "a b b a" a steady drift of the machine cancels.
    """
    durations: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(warmup + repeats):
        for name in list(runs) if round_number % 2 else reversed(list(runs)):
            taken = seconds(runs[name])
            if round_number >= warmup:
                durations[name].append(taken)
    return durations


def summary(durations: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Per run: fastest and median seconds; the ratio to ``baseline`` of the fastest, and the median of the rounds'
    ratios with their quartiles.
    """
    result = {}
    for name, values in durations.items():
        ratios = [value / base for value, base in zip(values, durations[baseline], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        result[name] = {
            "seconds_min": min(values),
            "seconds_median": statistics.median(values),
            "ratio_of_min": min(values) / min(durations[baseline]),
            "ratio_median": middle,
            "ratio_quartile_low": low,
            "ratio_quartile_high": high,
        }
    return result
