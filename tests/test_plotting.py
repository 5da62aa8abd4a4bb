"""Figures of runs."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest

from megatron_gft.errors import InputError
from megatron_gft.reports.plotting import PANELS, plot_runs, read_run

ROOT = Path(__file__).resolve().parents[1]


def write_run(folder: Path, steps: int, slope: float = -0.01) -> Path:
    """Records as ``metrics.py`` writes them."""
    folder.mkdir(parents=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            record = {"step": step, "loss": slope * step, "grad_norm": 1.0 / step, "rectified": 0.2, "lr": 1e-6}
            record |= {"expert/positive/probability": 0.5, "self/negative/probability": 0.3, "tokens_per_second": 9e3}
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


def test_html_is_self_contained_and_names_last_values(tmp_path):
    runs = [write_run(tmp_path / "a" / "<run>", 12), write_run(tmp_path / "b" / "<run>", 12, slope=1.0)]
    plot_runs(runs, tmp_path / "runs.html")
    page = (tmp_path / "runs.html").read_text()
    assert "<svg" in page and "<th>grad_norm</th><td>0.083333</td><td>0.083333</td>" in page
    assert "<th>loss</th><td>-0.12</td><td>12</td>" in page
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
