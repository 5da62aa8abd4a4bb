"""One arm again through the tools, as a user would type it: generate, score, preprocess, train under torchrun on two
tensor-parallel ranks, export, evaluate. Its own samples, so its numbers agree with the sweep's within noise only.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.study.countdown import write_rows
from examples.study.lab import MAX_TOKENS, TRAIN_CONFIG

ROOT = Path(__file__).resolve().parents[2]
VERIFIER = "examples.study.countdown:judge"
RANKS = 2


def write_problems(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows as ``generate_groups.py`` and ``evaluate.py`` read them: prompt, the expert's solution, teachers."""
    problems = []
    for row in rows:
        expert, *teachers = (response["text"] for response in row["responses"] if response["source"] != "self")
        columns = {f"teacher_{number}": text for number, text in enumerate(teachers)}
        problems.append({"id": row["id"], "prompt": row["prompt"], "answer": "", "solution": expert, **columns})
    return write_rows(path, problems)


def commands(folder: Path, base: Path, model: Path, *, teachers: int, selves: int, settings: Sequence[str]) -> list:
    """What follows ``python``, stage by stage; ``folder`` holds tune.jsonl and test.jsonl."""
    sampled = f"kind=transformers source=self model={base} chat_template=none temperature=1 max_tokens={MAX_TOKENS}"
    sources = ["kind=column source=expert column=solution", f"{sampled} k={selves} batch_size=256"]
    sources[1:1] = [f"kind=column source=teacher column=teacher_{number}" for number in range(teachers)]
    groups, scored, shard = folder / "groups.jsonl", folder / "scored.jsonl", folder / "shards" / "tune"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    return [
        ["tools/generate_groups.py", "--input", f"{folder}/tune.jsonl", "--output", str(groups), "--quiet"]
        + [word for source in sources for word in ("--source", source)],
        ["tools/score_groups.py", "--input", str(groups), "--output", str(scored), "--verifier", VERIFIER, "--quiet"],
        ["tools/preprocess_groups.py", "--input", str(scored), "--tokenizer", str(model), "--chat-template", "none"]
        + ["--policy", "empty_response=drop", "--output-prefix", str(shard), "--quiet"],
        [*torchrun, "-m", "megatron_gft.train", "--config", str(TRAIN_CONFIG), *settings, f"data.train=[{shard}]"]
        + [f"model.config={model}", f"parallel.tp={RANKS}", f"train.output={folder}/run"],
    ]


def evaluate_command(folder: Path, export: Path, samples: int) -> list[str]:
    """The last stage."""
    measured = [*("--samples", str(samples), "--pass-at", "1", str(samples)), "--no-reference", "--quiet"]
    shared = ["--chat-template", "none", "--verifier", VERIFIER, "--max-tokens", str(MAX_TOKENS), "--batch-size", "256"]
    place = ["--model", str(export), "--problems", f"{folder}/test.jsonl", "--output", f"{folder}/evaluation.json"]
    return ["tools/evaluate.py", *place, *shared, *measured]


def run_tool(command: Sequence[str], log: Path) -> None:
    """A command, from the root of the repository.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    with log.open("a") as file:
        file.write(f"$ python {shlex.join(command)}\n{done.stdout}{done.stderr}\n")
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")


def through_the_tools(folder: Path, base: Path, model: Path, *, samples: int, **options: Any) -> dict[str, Any]:
    """All stages; what the last one measured."""
    for command in commands(folder, base, model, **options):
        run_tool(command, folder / "log.txt")
    run_tool(evaluate_command(folder, max(folder.glob("run/export/step-*")), samples), folder / "log.txt")
    found = json.loads((folder / "evaluation.json").read_text())
    return {"greedy": found["greedy"]["accuracy"], "pass_at_k": found["pass_at_k"]}
