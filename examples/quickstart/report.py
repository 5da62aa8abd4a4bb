"""Before, after, and SFT beside: what the quickstart prints at its end and writes to ``summary.json``.

Every model answers the same problems, so a change has an interval of its own, from the differences problem by problem.
"""

import html
import json
import re
from pathlib import Path
from typing import Any

from megatron_gft.atomic import atomic_file, write_json
from megatron_gft.evaluation.intervals import mean_interval, ratio_interval

FOLDERS = {"before": "round-00", "after": "round-01", "sft": "sft"}
CHANGES = {"change": ("before", "after"), "sft_change": ("before", "sft"), "after_minus_sft": ("sft", "after")}
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


def write_report(output: Path, objective: str) -> str:
    """Compare the evaluations of a run folder: ``summary.json``, and a text, printed and put into ``report.html``.

    Args:
        objective: what the round trained with; a run of SFT has no SFT beside it.
    """
    files = {side: output / folder / "evaluation.json" for side, folder in FOLDERS.items()}
    results = {side: json.loads(file.read_text()) for side, file in files.items() if side != objective}
    summary: dict[str, Any] = {side: _measures(result) for side, result in results.items()}
    for name, (old, new) in CHANGES.items():
        if {old, new} <= results.keys():
            summary[name] = paired_change(results[old], results[new])
    summary["seconds"] = json.loads((output / "timings.json").read_text())["stages"]
    write_json(output / "summary.json", summary)
    text, page = _text(output, summary, objective), output / "report.html"
    own = f"<pre>{html.escape(text)}</pre></body>"
    shown = re.sub(r"(<pre>.*?</pre>)?</body>", lambda _: own, page.read_text(encoding="utf-8"), flags=re.DOTALL)
    with atomic_file(page) as temporary:
        temporary.write_text(shown, encoding="utf-8")
    return text


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


def _text(output: Path, summary: dict[str, Any], objective: str) -> str:
    names = {"before": "before", "after": objective, "sft": "sft"}
    lines = [f"\nHeld-out problems, greedy, n = {summary['before']['num_responses']}, with 95 % intervals"]
    for side in (side for side in names if side in summary):
        now = summary[side]
        lines.append(
            f"  {names[side]:11}  accuracy {_percent(now['accuracy'], now['interval'])}   log-prob of the reference "
            f"answers {_number(now['logprob_per_token'], now['logprob_per_token_interval'])} a token   "
            f"({now['correct']} right, {now['truncated']} cut off, {now['mean_tokens']:.0f} tokens on average)"
        )
    lines.append("Changes, problem by problem")
    for name, (old, new) in ((name, sides) for name, sides in CHANGES.items() if name in summary):
        change = summary[name]
        points = _percent(change["accuracy"], change["accuracy_interval"], "+")
        logprob = _number(change["logprob_per_token"], change["logprob_per_token_interval"], "+")
        lines.append(
            f"  {f'{names[old]} -> {names[new]}':21}  accuracy {points} points ({change['gained']} problems gained, "
            f"{change['lost']} lost): {_verdict(change['accuracy_interval'])}; "
            f"log-prob {logprob} a token: {_verdict(change['logprob_per_token_interval'])}"
        )
    seconds = summary["seconds"]
    times = ", ".join(f"{name} {entry['wall']:.0f}" for name, entry in seconds.items())
    lines.append(f"Seconds: {times}; together {sum(entry['wall'] for entry in seconds.values()):.0f}")
    model = summary["after"]["model"]
    lines.append(f"Model: {model}   curves and this: {output / 'report.html'}   all results: {output / 'summary.json'}")
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
        return "no clear change, the interval includes 0"
    return "better" if interval[0] > 0 else "worse"
