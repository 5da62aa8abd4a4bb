"""Before and after: what the quickstart prints at its end and writes to ``summary.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_gft.atomic import write_json


def write_report(output: Path, seconds: dict[str, dict[str, Any]]) -> str:
    """Compare the two evaluations of a run folder; write ``summary.json`` and return the text to print."""
    sides = {side: json.loads((output / f"evaluation-{side}.json").read_text()) for side in ("before", "after")}
    summary = {side: _measures(result) for side, result in sides.items()}
    summary["seconds"] = seconds
    write_json(output / "summary.json", summary)
    return _text(output, summary)


def _measures(result: dict[str, Any]) -> dict[str, Any]:
    greedy, reference = result["greedy"], result["reference"]
    return {
        "model": result["model"],
        "accuracy": greedy["accuracy"],
        "accuracy_interval": greedy["interval"],
        "correct": greedy["correct"],
        "num_problems": result["num_problems"],
        "truncated": greedy["truncated"],
        "mean_tokens": greedy["mean_tokens"],
        "logprob_per_token": reference["logprob_per_token"],
        "logprob_per_token_interval": reference["logprob_per_token_interval"],
        "logprob_per_answer": reference["logprob_per_answer"],
        "logprob_per_answer_interval": reference["logprob_per_answer_interval"],
        "num_answers": reference["num_answers"],
    }


def _text(output: Path, summary: dict[str, Any]) -> str:
    lines = [f"\nHeld-out problems, greedy, n = {summary['before']['num_problems']}, with 95 % intervals"]
    for side in ("before", "after"):
        now = summary[side]
        low, high = now["accuracy_interval"]
        lines.append(
            f"  {side:6}  accuracy {100 * now['accuracy']:5.1f} % [{100 * low:.1f}, {100 * high:.1f}]   "
            f"log-prob of the reference answers {_with_interval(now, 'logprob_per_token')} a token, "
            f"{_with_interval(now, 'logprob_per_answer')} an answer   "
            f"({now['truncated']} responses cut off, {now['mean_tokens']:.0f} tokens on average)"
        )
    before, after = summary["before"], summary["after"]
    lines.append(
        f"  change  accuracy {100 * (after['accuracy'] - before['accuracy']):+.1f} points, "
        f"log-prob {after['logprob_per_token'] - before['logprob_per_token']:+.3f} a token: "
        f"{_verdict(before, after)}"
    )
    times = ", ".join(f"{name} {entry['wall']:.0f}" for name, entry in summary["seconds"].items())
    lines.append(f"Seconds: {times}; together {sum(entry['wall'] for entry in summary['seconds'].values()):.0f}")
    lines.append(f"Model: {after['model']}   curves: {output / 'curves.png'}   all results: {output / 'summary.json'}")
    return "\n".join(lines)


def _with_interval(measures: dict[str, Any], name: str) -> str:
    interval = measures[f"{name}_interval"]
    span = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return f"{measures[name]:.3f}{span}"


def _verdict(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Which of the two measures moved by more than their intervals overlap."""

    def moved(name: str) -> str:
        old, new = before[f"{name}_interval"], after[f"{name}_interval"]
        if old is None or new is None or (new[0] <= old[1] and old[0] <= new[1]):
            return "within the intervals"
        return "better" if after[name] > before[name] else "worse"

    return f"accuracy {moved('accuracy')}, log-prob {moved('logprob_per_token')}"
