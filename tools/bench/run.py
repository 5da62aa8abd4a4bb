"""Measure what this project claims, as ratios within one run; device chosen automatically; JSON out."""

import argparse
import importlib
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_gft.atomic import write_json
from megatron_gft.errors import InputError, command

BENCHMARKS = {
    "head_time": "tools.bench.head:head_time",
    "head_memory": "tools.bench.head:head_memory",
    "kernels": "tools.bench.kernels:kernels",
    "planner": "tools.bench.packing:bench_planner",
    "step_ratio": "tools.bench.step:step_ratio",
    "logprob_throughput": "tools.bench.step:logprob_throughput",
    "shared_prefix_step": "tools.bench.step:shared_prefix_step",
    "padded_batches": "tools.bench.step:padded_batches",
    "preprocess": "tools.bench.data:bench_preprocess",
    "start_up": "tools.bench.start_up:start_up",
}


def run_benchmarks(names: Sequence[str]) -> dict[str, Any]:
    """Run the named benchmarks one after the other; a failure is recorded under its name, not hidden."""
    from megatron_gft import cpu
    from tools.bench.timing import environment

    cpu.install()
    results: dict[str, Any] = {"schema": 1, "commit": commit(), "environment": environment(), "results": {}}
    for name in tqdm(names, desc="benchmarks", unit="benchmark"):
        module, function = BENCHMARKS[name].split(":")
        started = time.monotonic()
        try:
            value: Any = getattr(importlib.import_module(module), function)()
        except Exception as error:  # the others are still worth having
            value = {"failed": f"{type(error).__name__}: {error}"}
        results["results"][name] = {"value": value, "wall_seconds": time.monotonic() - started}
    return results


def commit() -> str:
    """What ``git describe`` calls this; "unknown" in a copy without history, and where there is no git."""
    command, options = ["git", "describe", "--always", "--dirty"], {"capture_output": True, "text": True}
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, **options).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run benchmarks; the exit code is 1 when one of them failed."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/bench.py head_time step_ratio --output bench.json",
    )
    parser.add_argument("names", nargs="*", help=f"default: all of {', '.join(BENCHMARKS)}")
    parser.add_argument("--output", type=Path, help="JSON file; default: standard output")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        raise InputError(f"benchmark {unknown[0]!r} is not known -> one of {', '.join(BENCHMARKS)}")
    results = run_benchmarks(options.names or list(BENCHMARKS))
    if options.output:
        write_json(options.output, results)
    else:
        print(json.dumps(results, indent=1))
    return int(any("failed" in (entry["value"] or {}) for entry in results["results"].values()))
