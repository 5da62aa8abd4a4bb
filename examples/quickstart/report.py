"""Before and after: what the quickstart prints at its end and writes to ``summary.json``.

The same problems are answered twice, so the change has an interval of its own, from the differences problem by problem.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_gft.atomic import write_json
from megatron_gft.evaluation.intervals import mean_interval, ratio_interval

SIDES = ("before", "after")
MEASURES = {
    "greedy": ("accuracy", "interval", "correct", "num_responses", "truncated", "mean_tokens"),
    "reference": (
        "logprob_per_token",
        "logprob_per_token_interval",
        "logprob_per_answer",
        "logprob_per_answer_interval",
        "num_answers",
        "num_tokens",
    ),
}


def write_report(output: Path) -> str:
    """Compare the two evaluations of a run folder; write ``summary.json`` and return the text to print."""
    before, after = (json.loads((output / f"round-0{side}" / "evaluation.json").read_text()) for side in (0, 1))
    seconds = json.loads((output / "timings.json").read_text())["stages"]
    summary: dict[str, Any] = {"before": _measures(before), "after": _measures(after)}
    summary["change"] = paired_change(before, after)
    summary["seconds"] = seconds
    write_json(output / "summary.json", summary)
    return _text(output, summary)


def _measures(result: dict[str, Any]) -> dict[str, Any]:
    return {"model": result["model"]} | {name: result[part][name] for part in MEASURES for name in MEASURES[part]}


def paired_change(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """After minus before, problem by problem, with 95 % intervals; ``gained`` and ``lost`` count problems."""
    right = [[outcome == "correct" for outcome in side["greedy"]["by_problem"]] for side in (before, after)]
    steps = [int(new) - int(old) for old, new in zip(*right, strict=True)]
    answers = list(zip(*(side["reference"]["by_answer"] for side in (before, after)), strict=True))
    accuracy, accuracy_interval = mean_interval(steps)
    logprob, logprob_interval = ratio_interval(
        [new["logprob"] - old["logprob"] for old, new in answers], [old["tokens"] for old, _ in answers]
    )
    return {
        "accuracy": accuracy,
        "accuracy_interval": accuracy_interval,
        "gained": steps.count(1),
        "lost": steps.count(-1),
        "logprob_per_token": logprob,
        "logprob_per_token_interval": logprob_interval,
    }


def _text(output: Path, summary: dict[str, Any]) -> str:
    lines = [f"\nHeld-out problems, greedy, n = {summary['before']['num_responses']}, with 95 % intervals"]
    for side in SIDES:
        now = summary[side]
        lines.append(
            f"  {side:6}  accuracy {_percent(now['accuracy'], now['interval'])}   log-prob of the reference answers "
            f"{_number(now['logprob_per_token'], now['logprob_per_token_interval'])} a token   "
            f"({now['correct']} right, {now['truncated']} cut off, {now['mean_tokens']:.0f} tokens on average)"
        )
    change = summary["change"]
    lines.append(
        f"  change  accuracy {_percent(change['accuracy'], change['accuracy_interval'], '+')} points "
        f"({change['gained']} problems gained, {change['lost']} lost): {_verdict(change['accuracy_interval'])}; "
        f"log-prob {_number(change['logprob_per_token'], change['logprob_per_token_interval'], '+')} a token: "
        f"{_verdict(change['logprob_per_token_interval'])}"
    )
    seconds = summary["seconds"]
    times = ", ".join(f"{name} {entry['wall']:.0f}" for name, entry in seconds.items())
    lines.append(f"Seconds: {times}; together {sum(entry['wall'] for entry in seconds.values()):.0f}")
    model = summary["after"]["model"]
    lines.append(f"Model: {model}   curves: {output / 'report.html'}   all results: {output / 'summary.json'}")
    return "\n".join(lines)


def _number(value: float, interval: list[float] | None, sign: str = "") -> str:
    span = f" [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]" if interval else ""
    return f"{value:{sign}.3f}{span}"


def _percent(value: float, interval: list[float] | None, sign: str = "") -> str:
    span = f" [{100 * interval[0]:{sign}.1f}, {100 * interval[1]:{sign}.1f}]" if interval else ""
    return f"{100 * value:{sign}.1f}{'' if sign else ' %'}{span}"


def _verdict(interval: list[float] | None) -> str:
    """What a change with this interval says."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "no clear change"
    return "better" if interval[0] > 0 else "worse"
