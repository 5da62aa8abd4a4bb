"""Figures of runs."""

import importlib.util
import json
import math
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from group_shards import write_shard

from megatron_gft.errors import InputError
from megatron_gft.metrics import write_environment
from megatron_gft.reports.plotting import PANELS, plot_runs, read_run, smoothed

ROOT = Path(__file__).resolve().parents[1]


def write_run(folder: Path, steps: int, slope: float = -0.01) -> Path:
    """Records as ``metrics.py`` writes them."""
    folder.mkdir(parents=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            record = {"step": step, "loss": slope * step, "grad_norm": 1.0 / step, "rectified": 0.2, "lr": 1e-6}
            record |= {"expert/positive/probability": 0.5, "self/negative/probability": 0.3, "tokens_per_second": 9e3}
            record |= {"seconds/step": 1.0, "seconds/data": 0.25}
            file.write(json.dumps(record) + "\n")
            if step % 5 == 0:
                file.write(json.dumps({"step": step, "valid/expert/positive/nll": 2.0 / step}) + "\n")
    return folder


@pytest.mark.parametrize(
    ("suffix", "magic", "least"), [("png", b"\x89PNG", 20_000), ("pdf", b"%PDF", 10_000), ("svg", b"<?xml", 10_000)]
)
def test_two_runs_in_one_figure(tmp_path, suffix, magic, least):
    runs = [write_run(tmp_path / "first", 300), write_run(tmp_path / "second", 10)]
    plot_runs(runs, tmp_path / "out" / f"runs.{suffix}")
    image = (tmp_path / "out" / f"runs.{suffix}").read_bytes()
    assert image.startswith(magic) and len(image) > least
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"runs.{suffix}"]
    if suffix == "svg":  # its text is drawn; what it says stands in a comment beside it
        words = {"optimizer step", "nats per token", "weighted nats", "share of tokens", "first", "second"}
        assert [word for word in words if f"<!-- {word} -->" not in image.decode()] == []


@pytest.mark.parametrize("count", [20, 21, 300])
def test_a_smoothed_curve_has_a_value_for_every_step(count):
    line = np.arange(count, dtype=float)
    assert smoothed(np.full(count, 3.0)) == pytest.approx(np.full(count, 3.0)), "the ends are not drawn to 0"
    assert smoothed(line)[10:-10] == pytest.approx(line[10:-10]), "it lies over the raw curve, not behind it"
    assert np.ptp(smoothed(line % 2)) < 0.5


def test_odd_names_of_runs_are_in_the_legend(tmp_path):
    names = ["_hidden", "a$b$c", "x" * 60, "<b>"]
    plot_runs([write_run(tmp_path / name, 3) for name in names], tmp_path / "runs.svg")
    legend = (tmp_path / "runs.svg").read_text().partition('id="legend_')[2]
    assert [name for name in ("_hidden", "a", "x" * 60, "&lt;b&gt;") if f"{name}" not in legend] == []


def test_the_report_of_a_run(tmp_path):
    """What its folder says beside the curves; what cannot be read is said, and the page is there all the same."""
    run = write_run(tmp_path / "run", 4)
    prefix = str(tmp_path / "groups")
    write_shard(Path(prefix), 3)
    (run / "config.yaml").write_text(f"{{model: {{config: m}}, data: {{train: [{prefix}]}}, train: {{output: <b>}}}}")
    write_environment(run, 4, "CPU")
    plot_runs([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"<td>torch</td><td>{version('torch')}</td>" in page and f"<td>{prefix}</td><td class=number>3</td>" in page
    assert "output: &lt;b&gt;" in page and "<b>" not in page
    assert "<td>data</td><td class=number>1.00 s</td><td class=number>25.0%</td>" in page
    assert "<td>other</td><td class=number>3.00 s</td><td class=number>75.0%</td>" in page
    (run / "environment.json").write_text("{")
    (run / "config-0002.yaml").write_text("{model: {config: m}, data: {train: [gone*]}}")
    plot_runs([run, write_run(tmp_path / "bare", 1)], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    said = ["environment.json", "data: gone*", "started 2 times", "train: [gone*]"]
    assert [word for word in said if word not in page] == [], "and of the other run nothing is known"


def test_html_is_self_contained_and_names_last_values(tmp_path):
    runs = [write_run(tmp_path / "a" / "<run>", 12), write_run(tmp_path / "b" / "<run>", 12, slope=1.0)]
    plot_runs(runs, tmp_path / "runs.html")
    page = (tmp_path / "runs.html").read_text()
    assert "<svg" in page and "<th>grad_norm</th><td class=number>0.083333</td><td class=number>0.083333</td>" in page
    assert "<th>loss</th><td class=number>-0.12</td><td class=number>12</td>" in page
    assert "src=" not in page and "<run>" not in page
    assert str(tmp_path / "a") in page, "runs of one name are told apart by their paths"


def test_series_leave_out_what_is_missing_or_not_finite(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.nan}, {"step": 3}, {"step": 4, "loss": 2.0}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"step": 5, "lo')
    steps, values = read_run(path).series("loss")
    assert steps.tolist() == [1, 4] and values.tolist() == [1.0, 2.0]


def test_panels_draw_keys_that_metrics_writes():
    """Names are spelled in ``metrics.py``; a renamed key would silently lose its panel."""
    source = (ROOT / "megatron_gft" / "metrics.py").read_text() + (ROOT / "megatron_gft" / "step.py").read_text()
    for panel in PANELS:
        for key in panel.keys:
            assert f'"{key.split("/")[-1]}"' in source, key


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read"), ("", "no finished step"), ("nonsense\n{}\n", ":1: not a record")]
)
def test_bad_runs_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        plot_runs([tmp_path], tmp_path / "x.png")


def test_tool(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("plot_run", ROOT / "tools" / "plot_run.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    run = write_run(tmp_path / "run", 3)
    assert tool.main([str(run), "--output", str(tmp_path / "x.svg")]) == 0
    assert (tmp_path / "x.svg").exists()
    assert tool.main([str(run), "--output", str(tmp_path / "x.gif")]) == 2
    assert ".png, .svg" in capsys.readouterr().err
