"""One figure of one or several runs, from the ``metrics.jsonl`` in their folders.

Every panel shows one quantity over steps, one colour a run, one line style a source of responses; panels without data
are left out. Long curves are drawn twice: faint as they are, and as a running mean.
"""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gft.atomic import atomic_file
from megatron_gft.errors import InputError
from megatron_gft.objectives import ALL_SOURCES

# Curves with more points than this also get a running mean over a 50th of them.
SMOOTH_ABOVE = 200
COLUMNS = 3
STYLES = ("-", "--", ":")
FORMATS = (".png", ".svg", ".pdf", ".html")


@dataclass(frozen=True)
class Panel:
    """One set of axes: what it shows, and the keys of a record that it draws."""

    title: str
    keys: tuple[str, ...]
    log: bool = False


def _by_source(title: str, name: str, prefix: str = "") -> Panel:
    return Panel(title, tuple(f"{prefix}{source}/positive/{name}" for source in ALL_SOURCES))


PANELS = (
    Panel("loss", ("loss",)),
    Panel("validation: mean -log p", tuple(f"valid/{source}/positive/nll" for source in ALL_SOURCES)),
    Panel("gradient norm", ("grad_norm",), log=True),
    Panel("mean -log p", ("nll",)),
    _by_source("mean p, positive advantage", "probability"),
    Panel("mean p, negative advantage", tuple(f"{source}/negative/probability" for source in ALL_SOURCES)),
    Panel("share of tokens with p <= tau", ("rectified",)),
    Panel("entropy", ("entropy",)),
    Panel("learning rate", ("lr",)),
    Panel("groups without signal", ("dead_groups",)),
    Panel("tokens per second", ("tokens_per_second",)),
    Panel("MFU", ("mfu",)),
    Panel("memory, GiB", ("memory_gib",)),
)


@dataclass(frozen=True)
class Run:
    """Name and records of one run, in order of steps."""

    name: str
    records: tuple[dict[str, Any], ...]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and finite values of a key, both [n]; empty when no record has it."""
        pairs = [(record["step"], record[key]) for record in self.records if math.isfinite(record.get(key, math.nan))]
        steps, values = zip(*pairs, strict=True) if pairs else ((), ())
        return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)


def read_run(folder: str | Path) -> Run:
    """Read ``metrics.jsonl`` of a run folder, or the file itself.

    Raises:
        InputError: there is none, a line is no record, or it holds no step.
    """
    path = Path(folder)
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot read metrics ({error.strerror}) -> name the folder of a run") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["step"] + 0
        except (ValueError, KeyError, TypeError):
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
    runs = _distinct([read_run(folder) for folder in folders], folders)
    figure = _figure(runs)
    with atomic_file(output) as temporary:
        if output.suffix == ".html":
            temporary.write_text(_page(runs, figure), encoding="utf-8")
        else:
            figure.savefig(temporary, format=output.suffix[1:], dpi=120)


def _distinct(runs: list[Run], folders: Sequence[str | Path]) -> list[Run]:
    """Runs of equal name are named by their whole path."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else Run(str(folder), run.records)
        for run, folder in zip(runs, folders, strict=True)
    ]


def _figure(runs: Sequence[Run]) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # optional dependency
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib -> pip install matplotlib") from None
    panels = [panel for panel in PANELS if any(len(run.series(key)[0]) for run in runs for key in panel.keys)]
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 3.2 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
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
    if panel.log and all((run.series(key)[1] > 0).all() for run in runs for key in panel.keys):
        axes.set_yscale("log")
    if len(panel.keys) > 1:
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axes.legend(unique.values(), unique.keys(), fontsize=8)


def _page(runs: Sequence[Run], figure: Any) -> str:
    """The figure as inline SVG and a table of the last values; no link to anywhere."""
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg")
    svg = drawing.getvalue()
    keys = [key for panel in PANELS for key in panel.keys if any(len(run.series(key)[0]) for run in runs)]
    rows = []
    for key in keys:
        cells = "".join(
            f"<td>{values[-1]:.5g}</td>" if len(values := run.series(key)[1]) else "<td></td>" for run in runs
        )
        rows.append(f"<tr><th>{html.escape(key)}</th>{cells}</tr>")
    names = "".join(f"<th>{html.escape(run.name)} (step {run.records[-1]['step']})</th>" for run in runs)
    style = (
        "body{font-family:sans-serif;margin:1em}svg{max-width:100%;height:auto}td,th{padding:2px 12px;text-align:right}"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>runs</title><style>{style}</style></head>'
        f"<body>{svg[svg.index('<svg') :]}<table><tr><th></th>{names}</tr>{''.join(rows)}</table></body></html>\n"
    )
