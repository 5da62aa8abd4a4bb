"""``tools/gpu_check.py`` without a GPU: every part runs, a failing one hides nothing, and time ends it with a table."""

import argparse
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import gpu_numbers
import pytest
import torch

from megatron_gft.errors import InputError
from tools import gpu_check
from tools.bench import one_gpu, run

TOOL = Path(gpu_check.__file__)


def check(*arguments, output, **options):
    """Exit code, standard output and JSON of the tool on the CPU."""
    command = [sys.executable, str(TOOL), "--dry-run", "--output", str(output), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "CUDA_VISIBLE_DEVICES": ""
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, **options)
    return done, json.loads(output.read_text()) if output.exists() else {}


def test_the_dry_run_runs_every_part(tmp_path):
    done, facts = check(output=tmp_path / "check.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [*facts["parts"]] == [*gpu_numbers.PARTS, *one_gpu.PARTS] and len(facts["parts"]) == 18
    assert facts["ended"] == "all parts ran"
    numbers = {name: dict(gpu_check.leaves(part["found"])) for name, part in facts["parts"].items()}
    assert all(found and all(map(math.isfinite, found.values())) for found in numbers.values())
    # the committed numbers of a CPU are those of this code
    compared = [numbers[f"compare fp32 {form}"] for form in ("packed", "shared", "unfused")]
    assert max(value for found in compared for value in found.values()) < 1e-4
    assert "| compare fp32 shared | gradients |" in done.stdout and "met: <= 0.0001 |" in done.stdout
    assert numbers["step"]["gft / plain"] > 0 and numbers["save"]["bytes written a parameter"] > 12


def test_time_ends_it_with_what_is_known(tmp_path):
    done, facts = check("--seconds", "0", output=tmp_path / "check.json")
    assert done.returncode == 1 and facts["ended"] == "ended after 0 s, in the middle of a part"
    assert facts["ended"] in done.stdout


def test_a_failing_part_hides_nothing(tmp_path, capsys):
    report = gpu_check.Report(tmp_path / "check.json")
    report.goals = {"speed": {"ratio": 1.1, r"\d\.attained": -0.9}}

    def fails():
        raise SystemExit("no device")

    report.run("before", lambda: {"value": 1.5, "shape": {"rows": 3}, "text": "x"})
    report.run("broken", fails)
    report.run("speed", lambda: {"ratio": 1.0, "rows": [{"attained": 0.95}, {"attained": 0.5}, {"attained": math.nan}]})
    assert report.end() == 1
    table = capsys.readouterr().out
    for row in (
        "| before | value | 1.5 |  |",
        "| broken | SystemExit: no device |  | MISSED: it failed |",
        "| speed | ratio | 1 | met: <= 1.1 |",
        "| speed | rows.0.attained | 0.95 | met: >= 0.9 |",
        "| speed | rows.1.attained | 0.5 | MISSED: >= 0.9 |",
        "| speed | rows.2.attained | nan | MISSED: >= 0.9 |",
    ):
        assert row in table
    assert "rows |" not in table.split("speed")[0] and "3 missed" in table
    facts = json.loads((tmp_path / "check.json").read_text())
    assert facts["parts"]["before"]["found"]["shape"] == {"rows": 3} and "fails" in facts["parts"]["broken"]["trace"]


def wheel(folder, name, content):
    """A wheel of one module, by hand."""
    import zipfile

    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", content)
        file.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{name}-1.0.dist-info/RECORD", "")


def test_what_is_missing_comes_from_wheels_or_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    wheel(tmp_path, "lost_one", "value = 7")
    wheel(tmp_path, "yaml", "value = 8")  # there already: it stays in use
    gpu_check.install(tmp_path, str(tmp_path / "site"))
    assert __import__("lost_one").value == 7 and not hasattr(__import__("yaml"), "value")
    monkeypatch.setattr(gpu_check, "_check", lambda options: __import__("lost_two"))
    assert gpu_check.main([]) == 2
    assert "No module named 'lost_two' -> WHEELS=DIR" in capsys.readouterr().err


@pytest.mark.parametrize("there", [None, "notes.txt", "torn-1.0-py3-none-any.whl"])
def test_a_wrong_folder_of_wheels_is_named(tmp_path, capfd, there):
    folder = tmp_path / "wheels"
    if there:
        folder.mkdir()
        (folder / there).write_text("no wheel")
    assert gpu_check.main(["--wheels", str(folder)]) == 2
    told = capfd.readouterr().err
    assert f"error: WHEELS={folder}: " in told and "Traceback" not in told
    assert ("pip refuses them" if there and "torn" in there else "no *.whl there") in told


def test_torchs_notice_of_its_debug_mode_is_no_wait(monkeypatch):
    notice = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    monkeypatch.setattr(one_gpu, "ON_GPU", True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: warnings.warn(notice, stacklevel=1))
    places = one_gpu.waiting_places(lambda: warnings.warn("called a synchronizing CUDA operation", stacklevel=1))
    assert places.total() == 1 and "test_gpu_check.py" in next(iter(places))


def test_a_span_over_kernels_does_not_fill_the_gaps_between_them():
    def event(start, end, annotation=False, kind=torch.autograd.DeviceType.CPU):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(time_range=span, device_type=kind, is_user_annotation=annotation)

    kernels = [event(0, 10), event(5, 20), event(60, 100)]
    others = [event(0, 100, annotation=True), event(0, 100, kind=torch.autograd.DeviceType.CUDA)]
    assert one_gpu.idle_share(others + kernels) == 0.4
    assert math.isnan(one_gpu.idle_share(others[:1]))  # where the driver shows no kernel, the waits are still told


def test_a_machine_without_git_is_measured_all_the_same(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run.commit() == "unknown"


@pytest.fixture
def armed(monkeypatch):
    """``_check`` of two parts in this process; the list takes what its timer is told."""
    armed = []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(gpu_check.threading, "Timer", lambda *_: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(gpu_check.faulthandler, "dump_traceback_later", lambda s, exit: armed.append((s, exit)))
    monkeypatch.setattr(gpu_numbers, "PARTS", {"resume": dict, "save": dict})
    monkeypatch.setattr(one_gpu, "PARTS", {})
    return armed


def options(tmp_path, only=None):
    return argparse.Namespace(output=tmp_path / "check.json", seconds=1e6, only=only, dry_run=True)


def test_a_part_that_takes_the_timer_does_not_disarm_the_check(tmp_path, armed):
    """A trainer's watchdog is the same timer of C, and is stopped at its end."""
    assert gpu_check._check(options(tmp_path)) == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "a dry run on a machine with a GPU"
    assert len(armed) == 2 and all(20 < seconds <= 1e6 + 20 and leaves for seconds, leaves in armed)


def test_a_device_that_an_earlier_part_broke_is_reported(tmp_path, armed, monkeypatch):
    """After an illegal access CUDA fails every call, freeing memory too."""

    def broken():
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    assert gpu_check._check(options(tmp_path)) == 1
    parts = json.loads((tmp_path / "check.json").read_text())["parts"]
    assert [part["failed"] for part in parts.values()] == ["RuntimeError: an illegal memory access"] * 2


def test_ctrl_c_ends_it_with_what_is_known(tmp_path, armed, monkeypatch):
    def pressed():
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_numbers, "PARTS", {"attention": dict, "resume": pressed, "save": pressed})
    assert gpu_check._check(options(tmp_path)) == 1
    facts = json.loads((tmp_path / "check.json").read_text())
    assert [*facts["parts"]] == ["attention", "resume"] and facts["ended"] == "interrupted in resume"


def test_an_unknown_part_is_named(tmp_path, armed):
    with pytest.raises(InputError, match="--only sav: no such part -> of resume, save"):
        gpu_check._check(options(tmp_path, ["resume", "sav"]))
    assert not armed
