"""One figure of one or several runs, from the ``metrics.jsonl`` in their folders.

Every panel shows one quantity over steps, one colour a run, one line style a source of responses; panels without data
are left out. Curves of many points are drawn twice: faint as they are, and as a running mean. As HTML it is the report
of the runs (see :mod:`megatron_gft.reports.run_facts`), which training writes of its own run at the end.
"""

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

# Curves of as many points also get a running mean, over a 20th of them.
SMOOTH_FROM = 20
COLUMNS = 3
STYLES = ("-", "--", ":")
FORMATS = (".png", ".svg", ".pdf", ".html")
LONG_NAME = 40  # characters: then names stand one below the other


class Panel:
    """One set of axes: what it shows, its unit, and the keys of a record; ``{}`` stands for each source."""

    def __init__(self, title: str, unit: str, key: str, log: bool = False, band: bool = False):
        self.title, self.unit, self.log, self.band = title, unit, log, band  # band: from {key}_low to {key}_high
        self.keys = tuple(key.format(source) for source in SOURCES) if "{}" in key else (key,)


PER_TOKEN = "nats per token"
PANELS = (
    Panel("loss", "weighted nats", "loss"),
    Panel("validation: mean -log p", PER_TOKEN, "valid/{}/positive/nll"),
    Panel("gradient norm", "L2 norm, not clipped", "grad_norm", log=True),
    Panel("mean -log p", PER_TOKEN, "nll"),
    Panel("mean -log p, positive advantage", PER_TOKEN, "{}/positive/nll"),
    Panel("mean -log p, negative advantage", PER_TOKEN, "{}/negative/nll"),
    Panel("mean p, positive advantage", "probability", "{}/positive/probability"),
    Panel("mean p, negative advantage", "probability", "{}/negative/probability"),
    Panel("tokens with p <= tau", "share of tokens", "rectified"),
    Panel("entropy", PER_TOKEN, "entropy"),
    Panel("learning rate", "per step", "lr"),
    Panel("groups without signal", "groups per step", "dead_groups"),
    Panel("throughput", "tokens per second", "tokens_per_second"),
    Panel("throughput, whole run", "tokens per second and GPU", "run/tokens_per_second_per_device"),
    Panel("time", "seconds per step", "seconds/step"),
    Panel("MFU", "share of the peak", "mfu"),
    Panel("MFU, whole run", "share of the peak", "run/mfu"),
    Panel("goodput", "useful share of the time", "goodput"),
    Panel("memory of rank 0", "GiB", "memory_gib"),
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
        if output.suffix != ".html":
            figure.savefig(temporary, format=output.suffix[1:], dpi=120)
            return
        from megatron_gft.reports.run_facts import page, run_facts  # imports Megatron, to read shards' manifests

        keys = [key for panel in PANELS for key in panel.keys if any(map(methodcaller("last", key), runs))]
        facts = [(run, run_facts(Path(folder), run.records)) for run, folder in zip(runs, folders, strict=True)]
        temporary.write_text(page(svg=svg(figure), runs=facts, keys=keys), encoding="utf-8")


def draw(runs: Sequence[Run], panels: Sequence[Panel] = PANELS) -> Any:
    """Figure of ``runs`` with those of ``panels`` that have something to show."""
    panels = [panel for panel in panels if any(len(run.series(key)[0]) for run in runs for key in panel.keys)]
    try:
        from matplotlib.figure import Figure  # optional dependency
    except ImportError:
        raise InputError("plots need matplotlib -> pip install matplotlib") from None
    columns = 1 if max(len(run.name) for run in runs) > LONG_NAME else 4
    rows = max(1, -(-len(panels) // COLUMNS))
    lines = -(-len(runs) // columns)
    height = 3.2 * rows + 0.3 * lines + 0.4  # inches; panels are alike: constrained layout would only cost a second
    figure = Figure(figsize=(5 * COLUMNS, height))
    figure.subplots_adjust(0.065, 0.5 / height, 0.985, 1 - (0.3 * lines + 0.5) / height, 0.3, 0.45)
    for index, panel in enumerate(panels):
        _draw(figure.add_subplot(rows, COLUMNS, index + 1), panel, runs)
    handles = [_line(color=f"C{number}") for number in range(len(runs))]
    # A name that begins with "_" would be left out, and "$" would begin a formula.
    names = ["\u200b" * run.name.startswith("_") + run.name.replace("$", r"\$") for run in runs]
    figure.legend(handles, names, loc="upper center", ncols=columns)
    return figure


def _draw(axes: Any, panel: Panel, runs: Sequence[Run]) -> None:
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.set_ylabel(panel.unit, fontsize=8)
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    for number, run in enumerate(runs):
        for style, key in zip(STYLES, panel.keys, strict=False):
            steps, values = run.series(key)
            if not len(steps):
                continue
            label = run.name if len(panel.keys) == 1 else key.split("/")[-3]
            options = {"color": f"C{number}", "linestyle": style, "linewidth": 1.4}
            marker = "." if len(steps) < SMOOTH_FROM else None
            if len(steps) >= SMOOTH_FROM:
                axes.plot(steps, values, color=f"C{number}", alpha=0.3, linewidth=0.8)
                values = smoothed(values)
            axes.plot(steps, values, label=label, marker=marker, **options)
            if panel.band:
                low, high = (run.series(f"{key}_{side}")[1] for side in ("low", "high"))
                axes.fill_between(steps, low, high, color=f"C{number}", alpha=0.2)
    if panel.log and all((run.series(key)[1] > 0).all() for run in runs for key in panel.keys):
        axes.set_yscale("log")
    if len(panel.keys) > 1:
        _name_sources(axes)


def _line(**look: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **look)


def _name_sources(axes: Any) -> None:
    """The line styles, in no run's colour."""
    styles = {label: line.get_linestyle() for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    axes.legend([_line(color="0.3", linestyle=style) for style in styles.values()], styles, fontsize=8)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean of a curve [n] over a 20th of it, around each point; at the ends over what is there."""
    window = np.ones(max(3, len(values) // SMOOTH_FROM // 2 * 2 + 1))
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def svg(figure: Any) -> str:
    """The figure as an element of a page."""
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg")
    text = drawing.getvalue()
    return text[text.index("<svg") :]
