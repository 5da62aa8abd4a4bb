#!/usr/bin/env python3
"""One call on one GPU: is what it computes right, how fast is it, where does it wait? One process, at most 7 minutes,
this machine's own Python and torch. Every part stands by itself; a table and a JSON file come out whatever fails."""

import argparse
import faulthandler
import gc
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_gft.atomic import write_json
from megatron_gft.errors import InputError, command

STARTED = time.monotonic()


def install(wheels: Path, folder: str) -> None:
    """Put a folder of wheels into ``folder``, where Python looks last: what is installed already stays in use."""
    if not (files := sorted(map(str, wheels.glob("*.whl")))):
        raise InputError(f"WHEELS={wheels}: no *.whl there -> the folder that holds them, or none")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    if subprocess.run([*pip, "--target", folder, *files]).returncode:
        python = f"{sys.executable} ({sys.version.split()[0]})"
        raise InputError(f"WHEELS={wheels}: pip refuses them, see above -> wheels for {python}, which needs pip")
    sys.path.append(folder)
    importlib.invalidate_caches()


def leaves(result: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a nested result, each with its place: ``ratios.fused / three_gemms``."""
    items = result.items() if isinstance(result, dict) else enumerate(result) if isinstance(result, list) else ()
    for key, value in items:
        at = f"{place}.{key}" if place else str(key)
        yield from [(at, value)] if isinstance(value, int | float) else leaves(value, at)


class Report:
    """What is known so far; printed and written at the end, or by the watchdog in the middle of a part.

    ``goals`` are largest values (negative: smallest ones) by part and by a pattern of the place.
    """

    def __init__(self, output: Path):
        self.output, self.ending = output, threading.Lock()
        self.facts: dict[str, Any] = {"schema": 2, "parts": {}}
        self.goals: dict[str, dict[str, float]] = {}

    def run(self, name: str, part: Callable[[], dict[str, Any]]) -> None:
        """One part; its failure is its own."""
        entry: dict[str, Any] = {"failed": "did not end"}
        self.facts["parts"][name] = entry
        started = time.monotonic()
        try:
            entry["found"] = part()
            del entry["failed"]
        except BaseException as error:  # Megatron's CheckpointException is one; the others are still worth having
            entry |= {"failed": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-3000:]}
            if isinstance(error, KeyboardInterrupt):
                raise
        entry["seconds"] = time.monotonic() - started
        print(f"{name}: {entry.get('failed', 'done')} ({entry['seconds']:.1f} s)", file=sys.stderr, flush=True)

    def end(self, reason: str = "all parts ran") -> int:
        """Table and file; 1 where a part failed or a goal was missed."""
        self.ending.acquire()  # by the watchdog or at the end, once
        self.facts |= {"ended": reason, "seconds": time.monotonic() - STARTED}
        write_json(self.output, json.loads(json.dumps(self.facts)))
        rows = [row for name, entry in self.facts["parts"].items() for row in self._rows(name, entry)]
        for row in sorted(rows, key=lambda row: bool(row[-1])):  # those with a goal last: logs keep their end
            print("| " + " | ".join(row) + " |")
        missed = sum(row[-1].startswith("MISSED") for row in rows)
        print(f"{reason}; {missed} missed; {self.facts['seconds']:.0f} s; {self.output}", flush=True)
        return int(bool(missed) or reason != "all parts ran")

    def _rows(self, part: str, entry: dict[str, Any]) -> Iterator[tuple[str, ...]]:
        if "failed" in entry:
            yield part, entry["failed"][:300], "", "MISSED: it failed"
        for place, value in leaves(entry.get("found", {})):
            patterns = self.goals.get(part, {})
            goal = next((patterns[p] for p in patterns if re.fullmatch(rf"(.*\.)?{p}", place)), None)
            if goal is not None:
                met = "met" if (value <= goal if goal > 0 else value >= -goal) else "MISSED"
                yield part, place, f"{value:.5g}", f"{met}: {'<=' if goal > 0 else '>='} {abs(goal):g}"
            elif not re.search(r"(shape|model)\.|_min$|quartile|ratio_of|repeats|pairs", place):
                yield part, place, f"{value:.5g}", ""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; the exit code is 0 when every part ran and every goal was met."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: make gpu-check WHEELS=wheels PYTHON=python3")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of what this machine's Python lacks")
    parser.add_argument("--output", type=Path, default=Path("gpu-check.json"), help="JSON file")
    parser.add_argument("--only", nargs="*", metavar="PART", help="these parts")
    parser.add_argument("--seconds", type=float, default=420, help="the check ends itself after so long")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU: every part with tiny sizes, to try the check")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if options.wheels:
            install(options.wheels, folder)
        try:
            return _check(options)
        except ImportError as error:
            need = f"{error} -> WHEELS=DIR with wheels of what is missing, or set PYTHON to one that has it"
            raise InputError(f"{sys.executable} ({sys.version.split()[0]}): {need}") from None


def _check(options: argparse.Namespace) -> int:
    if options.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first asks for a device
    import torch

    if not torch.cuda.is_available():
        if not options.dry_run:
            raise InputError("no CUDA device here -> run it on a machine with a GPU; --dry-run tries it on a CPU")
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    report = Report(options.output)

    def give_up() -> None:
        os._exit(report.end(f"ended after {options.seconds:g} s, in the middle of a part"))

    watchdog = threading.Timer(options.seconds - (time.monotonic() - STARTED), give_up)
    watchdog.daemon = True
    watchdog.start()
    from megatron_gft import cpu

    cpu.install()
    sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))
    import gpu_numbers

    from tools.bench import one_gpu, run
    from tools.bench.timing import environment

    report.facts |= {"commit": run.commit(), "environment": environment()}
    report.goals = gpu_numbers.GOALS | (one_gpu.GOALS if torch.cuda.is_available() else {})
    parts = gpu_numbers.PARTS | one_gpu.PARTS
    if unknown := set(options.only or ()) - set(parts):
        raise InputError(f"--only {min(unknown)}: no such part -> of {', '.join(parts)}")
    for name in options.only or parts:
        # C code may hold the lock that the watchdog needs. Again each time: a trainer's watchdog takes this timer.
        faulthandler.dump_traceback_later(max(options.seconds - (time.monotonic() - STARTED), 0) + 20, exit=True)
        try:
            report.run(name, partial(_alone, parts[name]))
        except KeyboardInterrupt:
            return report.end(f"interrupted in {name}")
    return report.end()


def _alone(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The part, without what those before it left on the device. After an illegal access CUDA refuses that too."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    return part()


if __name__ == "__main__":
    sys.exit(main())
