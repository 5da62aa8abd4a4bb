"""Results of a study as tables, three plots, a JSON summary and a parquet file. Nothing that was run is left out."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gft.atomic import atomic_file, write_json
from megatron_gft.evaluation.intervals import pass_at_k
from megatron_gft.reading import read_json

DRAWS = 2000
PAIRS = (
    *(("gft", "sft"), ("gft", "dft"), ("gft_no_rectification", "gft"), ("gft_no_groups", "gft")),
    *(("gft_self_only", "gft"), ("rft", "gft"), ("dft_correct", "gft"), ("gft_scaled_0.25", "gft")),
    *(("gft_scaled_0", "gft"), ("dft_correct", "gft_scaled_0"), ("rounds/gft", "rounds/sft")),
    *(("rounds/dft_correct", "rounds/gft"), ("rounds/gft_scaled_0.25", "rounds/gft")),
)
COLLAPSED = 0.5  # a run that ends below this share of its base's accuracy
Result = dict[str, Any]


def read(folder: Path) -> dict[str, Result]:
    """All results of a study's folder by name."""
    files = sorted((folder / "results").rglob("*.json"))
    return {(result := read_result(file))["name"]: result for file in files}


def read_result(file: Path) -> Result:
    """One result; InputError names the file where it is damaged."""
    return read_json(file, "remove it, and run this again")


def bootstrap(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval of ``values`` [seeds, problems]; seeds and problems are both drawn anew, crossed.

    It is wider than independent noise alone would need (Owen, The pigeonhole bootstrap, 2007), never narrower.
    For a paired difference, give differences.
    """
    rng, (seeds, problems) = np.random.default_rng(0), values.shape
    means = np.empty(DRAWS)
    for draw in range(DRAWS):
        rows, columns = rng.integers(seeds, size=seeds), rng.integers(problems, size=problems)
        means[draw] = values[rows].mean(0)[columns].mean()
    return (float(values.mean()), *(float(bound) for bound in np.quantile(means, (0.025, 0.975))))


def by_problem(results: Sequence[Result], name: str, samples: int) -> np.ndarray:
    """Share of right answers [seeds, problems]."""
    return np.array([result[name] for result in results], dtype=float) / samples


def chosen_rate(results: dict[str, Result], place: str, lrs: Sequence[float], seeds: int) -> float | None:
    """The rate with most right samples of validation problems, over the seeds that are finished at all rates."""
    found = [[results.get(f"seed-{seed}/{place}/lr-{lr:g}") for lr in lrs] for seed in range(seeds)]
    totals = [[sum(one.get("valid", [0])) for one in row if one] for row in found if None not in row]
    return lrs[int(np.sum(totals, axis=0).argmax())] if totals else None


class Findings:
    """Results put together by arm, rate and seed."""

    def __init__(self, results: dict[str, Result]):
        self.results, self.sizes = results, results["prepare"]["sizes"]
        self.cells: dict[str, dict[float, dict[int, Result]]] = defaultdict(lambda: defaultdict(dict))
        self.tests: dict[str, dict[int, Result]] = defaultdict(dict)
        self.bases: dict[int, Result] = {}
        for name, result in results.items():
            if not name.startswith("seed-"):
                continue
            seed, *place, last = name.split("/")
            number, arm = int(seed.removeprefix("seed-")), "/".join(place)
            if last == "base":
                self.bases[number] = result
            elif last.startswith("test"):
                lrs = self.sizes["round_lrs" if arm.startswith("rounds/") else "lrs"]
                if arm == "base" or result["lr"] == chosen_rate(results, arm, lrs, self.sizes["seeds"]):
                    self.tests[arm][number] = result
            else:
                self.cells[arm][float(last.removeprefix("lr-"))][number] = result

    def validation(self, result: Result) -> float:
        """Share of right samples of validation problems; a failed run has none."""
        return float(np.mean(result.get("valid", [0.0]))) / self.sizes["valid_samples"]

    def collapsed(self, seed: int, result: Result) -> bool:
        """Failed, or below half of its base."""
        return bool(result.get("failed")) or self.validation(result) < COLLAPSED * self.validation(self.bases[seed])

    def difference(self, arm: str, other: str, name: str, samples: int) -> tuple[float, float, float] | None:
        """Paired by seed and problem, of the test results ``name``; None without a common seed."""
        found, against = self.tests[arm], self.tests[other]
        both = [seed for seed in found if name in found[seed] and name in against.get(seed, {})]
        mine, theirs = (by_problem([one[seed] for seed in both], name, samples) for one in (found, against))
        return bootstrap(mine - theirs) if both else None

    def pairs(self) -> str:
        """The comparisons of the predictions, of sampled accuracy and of the side skill."""
        lines = ["| | sampled | side skill |", "|---|---|---|"]
        for arm, other in PAIRS:
            sampled = self.difference(arm, other, "test", self.sizes["test_samples"])
            side = self.difference(arm, other, "side", 1)
            if sampled and side:
                lines.append(f"| {arm} - {other} | {_percent(sampled, '+')} | {_percent(side, '+')} |")
        return "\n".join(lines)

    def rows(self, arms: Sequence[str], against: str) -> list[dict[str, Any]]:
        """Measures of each arm on the test problems, and the paired difference to another one."""
        rows = []
        for arm in arms:
            found = {seed: result for seed, result in self.tests[arm].items() if "test" in result}
            if not found:
                continue
            n, results = self.sizes["test_samples"], list(found.values())
            right = by_problem(results, "test", n)
            row: dict[str, Any] = {"arm": arm, "lr": results[0].get("lr"), "seeds": len(found)}
            row["sampled"] = bootstrap(right)
            if arm != against and (difference := self.difference(arm, against, "test", n)):
                row["difference"] = difference
            row["greedy"] = bootstrap(by_problem(results, "greedy", 1))
            for k in (k for k in (1, 2, 4, 8, 16) if k <= n):
                at_k = np.array([pass_at_k(n, int(c), k) for c in range(n + 1)])
                row[f"pass@{k}"] = bootstrap(at_k[np.array([result["test"] for result in results])])
            row["larger"] = bootstrap(by_problem(results, "larger", self.sizes["larger_samples"]))
            row["side"] = bootstrap(by_problem(results, "side", 1))
            for name in ("entropy", "expert_nll", "rare"):
                values = [result[name] for result in results]
                row[name] = (float(np.mean(values)), min(values), max(values))
            rows.append(row)
        return rows


MEASURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "rate": lambda row: f"{row['lr']:g}" if row["lr"] else "-",
    "seeds": lambda row: str(row["seeds"]),
    "sampled": lambda row: _percent(row["sampled"]),
    "difference": lambda row: _percent(row["difference"], "+") if "difference" in row else "-",
    "greedy": lambda row: _percent(row["greedy"]),
    "pass@8": lambda row: _percent(row["pass@8"]) if "pass@8" in row else "-",
    "pass@16": lambda row: _percent(row["pass@16"]) if "pass@16" in row else "-",
    "larger numbers": lambda row: _percent(row["larger"]),
    "side skill": lambda row: _percent(row["side"]),
    "entropy": lambda row: "{:.2f} ({:.2f} to {:.2f})".format(*row["entropy"]),
    "NLL of experts": lambda row: "{:.2f}".format(row["expert_nll"][0]),
    "experts' style": lambda row: f"{100 * row['rare'][0]:.0f}",
}


def _percent(value: tuple[float, float, float], sign: str = "") -> str:
    mean, low, high = (100 * v for v in value)
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line an arm."""
    lines = ["| arm | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    lines += [f"| {row['arm']} | " + " | ".join(show(row) for show in MEASURES.values()) + " |" for row in rows]
    return "\n".join(lines)


def curve_table(findings: Findings, arms: Sequence[str]) -> str:
    """Validation accuracy of every rate: mean over seeds, and how many runs of them collapsed or failed."""
    lrs = sorted({lr for arm in arms for lr in findings.cells[arm]})
    lines = ["| arm | " + " | ".join(f"{lr:g}" for lr in lrs) + " |", "|---" * (len(lrs) + 1) + "|"]
    for arm in arms:
        cells = []
        for lr in lrs:
            of_seeds = findings.cells[arm].get(lr, {})
            values = [100 * findings.validation(result) for result in of_seeds.values()]
            lost = sum(findings.collapsed(seed, result) for seed, result in of_seeds.items())
            cells.append(f"{np.mean(values):.1f}" + (f" ({lost}/{len(values)} †)" if lost else "") if values else "-")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(folder: Path) -> Path | None:
    """``report/`` in a study's folder: tables.md, summary.json, results.parquet, three plots."""
    results = read(folder)
    if "prepare" not in results:
        return None
    findings, output = Findings(results), folder / "report"
    output.mkdir(exist_ok=True)
    arms = [arm for arm in findings.cells if not arm.startswith("rounds/")]
    arms.sort(key=lambda arm: ([*findings.sizes["arms"], arm].index(arm), arm))
    starts = [f"rounds/{start}" for start in findings.sizes["starts"] if f"rounds/{start}" in findings.cells]
    rows, after = findings.rows(["base", *arms], "base"), findings.rows(starts, "rounds/base")
    bases = [100 * findings.validation(result) for result in findings.bases.values()]
    parts = [
        f"{len(results)} results, {len(findings.bases)} bases (validation {', '.join(f'{v:.1f}' for v in bases)} %).",
        f"## Test problems, at the rate chosen on validation problems\n\n{table(rows)}",
        f"## Validation, every rate († collapsed below half of its base, or failed)\n\n{curve_table(findings, arms)}",
        f"## Paired differences\n\n{findings.pairs()}",
        f"## After rounds of GRPO (difference: to the rounds from the base)\n\n{table(after)}",
        f"## Validation after the rounds\n\n{curve_table(findings, starts)}",
    ]
    with atomic_file(output / "tables.md") as file:
        file.write_text("\n\n".join(parts) + "\n")
    write_json(output / "summary.json", {"sizes": findings.sizes, "arms": rows, "after_rounds": after})
    _parquet(results, output / "results.parquet")
    import matplotlib

    matplotlib.use("Agg")
    _plot_rates(findings, arms, output / "learning-rates.png")
    _plot_entropy(rows, output / "entropy-and-pass-at-k.png")
    _plot_after_rounds(findings, rows, after, output / "after-grpo.png")
    return output


def _parquet(results: dict[str, Result], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"name": name, "result": json.dumps(result, sort_keys=True)} for name, result in sorted(results.items())]
    for row, result in zip(rows, (results[row["name"]] for row in rows), strict=True):
        row |= {name: result.get(name) for name in ("seconds", "lr", "valid_entropy", "entropy", "expert_nll")}
        row |= {name: result.get(name) for name in ("valid", "test", "greedy", "larger", "side", "curve", "losses")}
    with atomic_file(path) as file:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, compression="zstd")


def _style(number: int) -> tuple[Any, str]:
    """Color and marker of an arm."""
    from matplotlib import pyplot

    styles = [(color, marker) for marker in "os" for color in pyplot.get_cmap("Dark2").colors]
    return styles[number % len(styles)]


def _plot_rates(findings: Findings, arms: list[str], path: Path) -> None:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5.5))
    for number, arm in enumerate(arms):
        (color, marker), lrs = _style(number), sorted(findings.cells[arm])
        for seed in findings.bases:
            points = [
                (lr, findings.validation(found[seed])) for lr in lrs if seed in (found := findings.cells[arm][lr])
            ]
            axis.plot(*zip(*points, strict=True), color=color, alpha=0.2, lw=0.8) if points else None
        means = [np.mean([findings.validation(result) for result in findings.cells[arm][lr].values()]) for lr in lrs]
        axis.plot(lrs, means, marker + "-", color=color, label=arm)
    if bases := [findings.validation(result) for result in findings.bases.values()]:
        axis.axhline(np.mean(bases), color="black", ls="--", label="base")
        axis.legend(fontsize=7, ncols=2)
    axis.set(xscale="log", xlabel="peak learning rate", ylabel="share of samples right, validation problems")
    _save(figure, path)


def _plot_entropy(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5))
    for number, row in enumerate(rows):
        color, marker = _style(number - 1)
        color = color if number else "black"  # the base
        x, y = row["entropy"][0], row["sampled"]
        left.errorbar(x, y[0], yerr=_bars(y), fmt=marker, color=color, label=row["arm"])
        ks = [k for k in (1, 2, 4, 8, 16) if f"pass@{k}" in row]
        right.plot(ks, [row[f"pass@{k}"][0] for k in ks], marker + "-", color=color, label=row["arm"])
    left.set(xlabel="entropy of a token, nats", ylabel="share of samples right, test problems")
    right.set(xscale="log", xlabel="k", ylabel="pass@k, test problems")
    if rows:
        right.legend(fontsize=7)
    _save(figure, path)


def _plot_after_rounds(findings: Findings, rows: list[dict[str, Any]], after: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5))
    before = {row["arm"]: row for row in rows}
    for number, row in enumerate(after):
        start = row["arm"].removeprefix("rounds/")
        both = [one for one in (before.get(start), row) if one]
        left.errorbar(
            range(2 - len(both), 2),
            [one["sampled"][0] for one in both],
            yerr=np.array([_bars(one["sampled"]) for one in both])[..., 0].T,
            fmt="o-",
            capsize=3,
            color=_style(number)[0],
            label=start,
        )
        if curves := [result["curve"] for result in findings.cells[row["arm"]].get(row["lr"], {}).values()]:
            shortest = min(map(len, curves))
            right.plot(np.mean([curve[:shortest] for curve in curves], 0), color=_style(number)[0], label=start)
    left.set(ylabel="share of samples right, test problems", xticks=[0, 1], xticklabels=["before", "after GRPO"])
    right.set(xlabel="round", ylabel="share of its samples right")
    if after:
        left.legend(fontsize=7)
    _save(figure, path)


def _bars(value: tuple[float, float, float]) -> list[list[float]]:
    return [[value[0] - value[1]], [value[2] - value[0]]]


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
