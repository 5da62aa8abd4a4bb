"""What rounds came to: a table for the terminal, ``curves.png``, and ``report.html`` with both."""

import io
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment
from rich.console import Console
from rich.table import Table

from megatron_gft.atomic import atomic_file
from megatron_gft.objectives import SOURCES
from megatron_gft.reading import read_json
from megatron_gft.reports.plotting import PANELS, Panel, Run, draw, read_run, svg

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{{ name }}</title>
<style>body{font-family:sans-serif;margin:1em}svg{max-width:100%;height:auto}td,th{padding:2px 12px;text-align:right}
</style></head><body><h1>{{ name }}</h1>
<table><tr><th>round</th>{% for cell in rows[0][1:] %}<th>{{ loop.index0 }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table>{{ svg | safe }}</body></html>
"""
OF_ROUNDS = (
    Panel("accuracy on held-out problems, with 95 %", "share of problems", "accuracy", band=True),
    Panel("mean reward of a round's responses", "reward", "{}/sampled/reward"),
)
ROUNDS_SHOWN = 6  # on the terminal: the newest
ROWS = {
    "accuracy": "accuracy",
    "tokens of an answer": "tokens",
    "entropy": "entropy",
    "groups": "groups",
    "groups of equal rewards": "equal_rewards",
    "settled prompts left out": "left_out",
    "tokens of a response": "response_tokens",
    **{f"reward, {source}": f"{source}/sampled/reward" for source in SOURCES},
}
Measures = dict[str, Any]


def measure(folder: Path) -> tuple[Measures, Measures, list[dict[str, Any]]]:
    """Of one round: what came before its training, what after, and the training's records."""
    samples, result, records = dict[str, Any](), dict[str, Any](), list[dict[str, Any]]()
    for manifest in map(read_json, sorted((folder / "shards").glob("train*.json"))):
        counts, stats = manifest["counts"], manifest["judgements"][-1]["stats"]
        for name, number in (("groups", counts["groups"]), ("equal_rewards", stats["zero_variance_groups"])):
            samples[name] = samples.get(name, 0) + number
        samples["response_tokens"] = counts["response_tokens"] / counts["responses"]
        samples |= {f"{name}/sampled/reward": mean for name, mean in stats["mean"].items() if mean is not None}
    if (summary := folder / "groups" / "groups.jsonl.summary.json").exists():
        samples["left_out"] = sum(
            count for why, count in read_json(summary)["dropped"].items() if why.startswith("all ")
        )
    if (folder / "train" / "metrics.jsonl").exists():
        records = list(read_run(folder / "train").records)
        entropies = [record["entropy"] for record in records if isinstance(record.get("entropy"), float)]
        result |= {"entropy": entropies[-1]} if entropies else {}
    if (file := folder / "evaluation.json").exists() and (greedy := json.loads(file.read_text()).get("greedy")):
        low, high = greedy["interval"]
        result |= {"accuracy": greedy["accuracy"], "accuracy_low": low, "accuracy_high": high}
        result["tokens"] = greedy["mean_tokens"]
    return samples, result, records


def write_report(page: Path, last: int, seconds: dict[str, dict[str, Any]]) -> str:
    """Read the rounds up to ``last``, which are beside ``page``; write this and the figure, return the table.
    ``seconds`` are those of each stage, by its name."""
    output = page.parent
    rows: dict[str, dict[int, str]] = {name: {} for name in ROWS}
    points, steps = list[dict[str, Any]](), 0
    for number in range(last + 1):
        samples, result, records = measure(output / f"round-{number:02d}")
        points += [{"step": steps, **samples}]
        points += [record | {"step": steps + record["step"]} for record in records]
        steps += int(records[-1]["step"]) if records else 0
        points += [{"step": steps, **result}]
        for name, key in ROWS.items():
            if (value := (samples | result).get(key)) is not None:
                rows[name][number] = f"{value:.3g}" if isinstance(value, float) else str(value)
        if "accuracy" in result:
            rows["accuracy"][number] += " [{accuracy_low:.3f}, {accuracy_high:.3f}]".format(**result)
        for name, entry in seconds.items():
            if name.startswith(f"{number:02d}-"):
                rows.setdefault(f"seconds: {name[3:]}", {})[number] = f"{entry['wall']:.0f}"
    figure = draw([Run(output.name, tuple(points))], (*OF_ROUNDS, *PANELS))
    with atomic_file(output / "curves.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    table = [[name, *(cells.get(number, "") for number in range(last + 1))] for name, cells in rows.items() if cells]
    text = Environment(autoescape=True).from_string(PAGE).render(name=output.name, rows=table, svg=svg(figure))
    with atomic_file(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    shown = range(max(0, last + 1 - ROUNDS_SHOWN), last + 1)
    drawn = Table("round", *map(str, shown), title=str(page), title_justify="left")
    for name, *cells in table:
        drawn.add_row(name, *(cells[number] for number in shown))
    console = Console(file=io.StringIO(), width=24 + 28 * len(shown))
    console.print(drawn)
    return console.file.getvalue()  # type: ignore[attr-defined]
