"""One figure of one or several runs, from the ``metrics.jsonl`` in their folders.

Every panel shows one quantity over steps, one colour a run, one line style a source of responses; panels without data
are left out. Long curves are drawn twice: faint as they are, and as a running mean.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gft.atomic import atomic_file
from megatron_gft.errors import InputError
from megatron_gft.objectives import SOURCES

# Curves with more points than this also get a running mean over a 50th of them.
SMOOTH_ABOVE = 200
COLUMNS = 3
STYLES = ("-", "--", ":")
FORMATS = (".png", ".svg", ".pdf", ".html")
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>runs</title>
<style>body{font-family:sans-serif;margin:1em}svg{max-width:100%;height:auto}td,th{padding:2px 12px;text-align:right}
</style></head><body>{{ svg | safe }}
<table><tr><th></th>{% for run in runs %}<th>{{ run.name }} (step {{ run.records[-1].step }})</th>{% endfor %}</tr>
{% for key in keys %}
<tr><th>{{ key }}</th>{% for run in runs %}<td>{{ run.last(key) }}</td>{% endfor %}</tr>
{% endfor %}
</table></body></html>
"""


class Panel:
    """One set of axes: what it shows, and the keys of a record that it draws; ``{}`` stands for each source."""

    def __init__(self, title: str, key: str, log: bool = False, band: bool = False):
        self.title, self.log, self.band = title, log, band  # band: from {key}_low to {key}_high
        self.keys = tuple(key.format(source) for source in SOURCES) if "{}" in key else (key,)


PANELS = (
    Panel("loss", "loss"),
    Panel("validation: mean -log p", "valid/{}/positive/nll"),
    Panel("gradient norm", "grad_norm", log=True),
    Panel("mean -log p", "nll"),
    Panel("mean -log p, positive advantage", "{}/positive/nll"),
    Panel("mean -log p, negative advantage", "{}/negative/nll"),
    Panel("mean p, positive advantage", "{}/positive/probability"),
    Panel("mean p, negative advantage", "{}/negative/probability"),
    Panel("share of tokens with p <= tau", "rectified"),
    Panel("entropy", "entropy"),
    Panel("learning rate", "lr"),
    Panel("groups without signal", "dead_groups"),
    Panel("tokens per second", "tokens_per_second"),
    Panel("MFU", "mfu"),
    Panel("memory, GiB", "memory_gib"),
)


@dataclass(frozen=True)
class Run:
    """Name and records of one run, in order of steps."""

    name: str
    records: tuple[dict[str, Any], ...]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and finite values of a key, both [n]; empty when no record has it."""
        found = [(record["step"], record.get(key)) for record in self.records]
        pairs = [pair for pair in found if isinstance(pair[1], int | float) and math.isfinite(pair[1])]
        steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
        return steps, values

    def last(self, key: str) -> str:
        """The last finite value of a key, in five digits; empty when no record has it."""
        values = self.series(key)[1]
        return f"{values[-1]:.5g}" if len(values) else ""


def read_run(folder: str | Path) -> Run:
    """Read ``metrics.jsonl`` of a run folder, or the file itself.

    Raises:
        InputError: there is none, a line is no record, or it holds no step.
    """
    path = Path(folder)
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot read metrics ({error.strerror}) -> name the folder of a run") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not math.isfinite(record["step"]):
                raise ValueError
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            if number == len(lines):
                continue  # cut off: the run is writing it, or died
            raise InputError(f"{path}:{number}: not a record with a step -> is this a metrics.jsonl?") from None
        records.append(record)
    if not records:
        raise InputError(f"{path}: holds no finished step yet")
    return Run(path.parent.name if path.name == "metrics.jsonl" else path.stem, tuple(records))


def plot_runs(folders: Sequence[str | Path], output: str | Path) -> None:
    """Overlay runs in one figure at ``output`` (.png, .svg, .pdf, or a self-contained .html).

    Raises:
        InputError: unreadable runs, another suffix, matplotlib not installed.
    """
    output = Path(output)
    if output.suffix not in FORMATS:
        raise InputError(f"{output}: cannot write a figure as {output.suffix!r} -> one of {', '.join(FORMATS)}")
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for index, folder in enumerate(folders):
        if names.count(names[index]) > 1:  # runs of equal name are named by their whole path
            runs[index] = Run(str(folder), runs[index].records)
    figure = draw(runs)
    with atomic_file(output) as temporary:
        if output.suffix == ".html":
            temporary.write_text(_page(runs, figure), encoding="utf-8")
        else:
            figure.savefig(temporary, format=output.suffix[1:], dpi=120)


def draw(runs: Sequence[Run], panels: Sequence[Panel] = PANELS) -> Any:
    """Figure of ``runs`` with those of ``panels`` that have something to show.

    Raises:
        InputError: matplotlib is not installed.
    """
    panels = [panel for panel in panels if any(len(run.series(key)[0]) for run in runs for key in panel.keys)]
    try:
        from matplotlib.figure import Figure  # optional dependency
    except ImportError:
        raise InputError("plots need matplotlib -> pip install matplotlib") from None
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 3.2 * rows + 0.5), layout="constrained")
    for index, panel in enumerate(panels):
        _draw(figure.add_subplot(rows, COLUMNS, index + 1), panel, runs)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


def _draw(axes: Any, panel: Panel, runs: Sequence[Run]) -> None:
    axes.set_title(panel.title, fontsize=10)
    axes.grid(alpha=0.3)
    for number, run in enumerate(runs):
        for style, key in zip(STYLES, panel.keys, strict=False):
            steps, values = run.series(key)
            if not len(steps):
                continue
            label = run.name if len(panel.keys) == 1 else key.split("/")[-3]
            options = {"color": f"C{number}", "linestyle": style, "linewidth": 1.2}
            marker = "." if len(steps) < 20 else None
            if len(steps) > SMOOTH_ABOVE:
                axes.plot(steps, values, color=f"C{number}", alpha=0.2, linewidth=0.8)
                window = len(steps) // 50
                values = np.convolve(values, np.ones(window) / window, mode="valid")
                steps = steps[window - 1 :]
            axes.plot(steps, values, label=label, marker=marker, **options)
            if panel.band:
                low, high = (run.series(f"{key}_{side}")[1] for side in ("low", "high"))
                axes.fill_between(steps, low, high, color=f"C{number}", alpha=0.2)
    if panel.log and all((run.series(key)[1] > 0).all() for run in runs for key in panel.keys):
        axes.set_yscale("log")
    if len(panel.keys) > 1:
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axes.legend(unique.values(), unique.keys(), fontsize=8)


def svg(figure: Any) -> str:
    """The figure as an element of a page."""
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg")
    text = drawing.getvalue()
    return text[text.index("<svg") :]


def _page(runs: Sequence[Run], figure: Any) -> str:
    """The figure as inline SVG and a table of the last values; no link to anywhere."""
    from jinja2 import Environment

    keys = [key for panel in PANELS for key in panel.keys if any(map(methodcaller("last", key), runs))]
    page = Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    return page.render(svg=svg(figure), runs=runs, keys=keys)
