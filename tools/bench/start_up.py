"""What a user waits for before anything happens: ``--help`` of every tool, and preprocessing of a few rows."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_gft.groups import write_group_file
from tools.bench.data import synthetic_records, synthetic_tokenizer

TOOLS = Path(__file__).resolve().parents[1]
ROWS = 4


def start_up(tools: Sequence[str] | None = None, *, repeats: int = 3) -> dict[str, Any]:
    """CPU and wall seconds of ``TOOL --help``, and of ``preprocess_groups.py`` on :data:`ROWS` rows: the fastest run.

    So few rows cost nothing beside starting. ``tools`` are file names under ``tools/``; all by default.

    Goals: at most 0.3 CPU seconds of every ``--help``, at most 4.2 of preprocessing.
    """
    tools = sorted(path.name for path in TOOLS.glob("*.py")) if tools is None else tools
    with tempfile.TemporaryDirectory() as name:
        records = synthetic_records(ROWS, 2)
        write_group_file(f"{name}/groups.jsonl", records)
        tokenizer = synthetic_tokenizer(Path(name) / "tokenizer", records, vocab_size=300)
        files = ["--input", f"{name}/groups.jsonl", "--tokenizer", str(tokenizer), "--output-prefix"]
        options = ["--chat-template", "none", "--quiet"]
        rows = [_measure(["preprocess_groups.py", *files, f"{name}/{i}", *options]) for i in range(repeats + 1)]
    return {
        "help": {tool: _fastest([_measure([tool, "--help"]) for _ in range(repeats + 1)]) for tool in tools},
        "preprocess_first_row": _fastest(rows),
    }


def _measure(command: Sequence[str]) -> dict[str, float]:
    """One run of a tool and what it starts; its failure is ours."""
    started = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, str(TOOLS / command[0]), *command[1:]], cwd=TOOLS.parent, **quiet)
    _, process.returncode, usage = os.wait4(process.pid, 0)  # of this process alone, as getrusage is not
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: failed with status {process.returncode}")
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "wall_seconds": time.perf_counter() - started}


def _fastest(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {clock: min(run[clock] for run in runs[1:]) for clock in ("cpu_seconds", "wall_seconds")}
