#!/usr/bin/env python3
"""GPU tests and GPU benchmarks with this machine's own Python; leaves one JSON file. Installs nothing."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_gft.atomic import write_json
from megatron_gft.errors import InputError, command
from tools.bench.run import ON_GPU, run_benchmarks

REPOSITORY = Path(__file__).resolve().parents[1]


def run_tests(pytest_arguments: Sequence[str]) -> dict:
    """Outcome of every test marked ``gpu``, by its name, and pytest's exit code."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command_line = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}", *pytest_arguments]
        code = subprocess.run(command_line, cwd=REPOSITORY, env=environment).returncode
        cases = ElementTree.parse(report).iter("testcase") if report.is_file() else []
        outcomes = {}
        for case in cases:
            kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            messages = [child.get("message", "") for child in case if child.tag in ("failure", "error", "skipped")]
            outcomes[f"{case.get('classname')}::{case.get('name')}"] = {
                "outcome": kinds[0] if kinds else "passed",
                "message": messages[0][:500] if messages else "",
                "seconds": float(case.get("time", 0)),
            }
    return {"exit_code": code, "tests": outcomes}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run both parts; the exit code is 0 when every test and benchmark succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: make gpu-check PYTHON=python3")
    parser.add_argument("--output", type=Path, default=Path("gpu-check.json"), help="JSON file")
    parser.add_argument("--skip-tests", action="store_true", help="benchmarks only")
    parser.add_argument("--skip-benchmarks", action="store_true", help="tests only")
    parser.add_argument("--tests", nargs="*", default=[], metavar="ARG", help="more arguments for pytest")
    options = parser.parse_args(argv)
    missing = [name for name in ("torch", "megatron", "pydantic", "pytest") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{sys.executable}: cannot import {', '.join(missing)} -> set PYTHON to one that can")
    import torch

    if not torch.cuda.is_available():
        raise InputError("no CUDA device here -> make gpu-check is for a machine with a GPU; make test runs on a CPU")
    tests = {} if options.skip_tests else run_tests(options.tests)
    benchmarks = {} if options.skip_benchmarks else run_benchmarks(ON_GPU)
    write_json(options.output, {"tests": tests, "benchmarks": benchmarks})
    failed = [name for name, entry in benchmarks.get("results", {}).items() if "failed" in (entry["value"] or {})]
    print(f"wrote {options.output}; tests exit code {tests.get('exit_code')}; failed benchmarks: {failed or 'none'}")
    return int(tests.get("exit_code", 0) != 0 or bool(failed))


if __name__ == "__main__":
    sys.exit(main())
