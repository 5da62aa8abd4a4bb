"""The wheel, installed into a folder of its own, and the sdist: what they hold, and that the commands start."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the installed wheel; the copy that is built lies outside the repository, as a user's would."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [*PIP, "install", "--no-deps", "--no-build-isolation", "--target", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=200)
    return folder


def run(installed: Path, *command: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_command_starts_from_the_wheel(installed, tmp_path):
    scripts = sorted(path.name for path in (installed / "bin").iterdir())
    tools = {path.stem.partition("_")[0] for path in (ROOT / "megatron_gft" / "commands").glob("*.py")}
    others = {"gft-", "gft-launch", "gft-options"}  # __init__, the launch scripts' own, types of options
    assert {f"gft-{tool}" for tool in tools} - others == set(scripts)
    for script in scripts:
        assert "usage: " in run(installed, str(installed / "bin" / script), "--help", cwd=tmp_path)


def test_recipes_travel_with_the_wheel_and_plan_from_where_they_are(installed, tmp_path):
    folder = Path(run(installed, str(installed / "bin" / "gft-train"), "--recipes", cwd=tmp_path).strip())
    assert folder.is_relative_to(installed)
    for room in ("examples", "launch"):
        there = {path.relative_to(folder) for path in (folder / room).rglob("*") if path.suffix != ".pyc"}
        here = subprocess.run(["git", "ls-files", room], cwd=ROOT, capture_output=True, text=True, check=True)
        assert {Path(name) for name in here.stdout.split()} <= there
    plan = [str(installed / "bin" / "gft-plan"), "--config", "examples/qwen3-8b/gpus-8.yaml", "--world-size", "8"]
    assert "fits" in run(installed, *plan, cwd=folder)


def test_the_sdist_holds_every_file(tmp_path):
    build = "import sys, hatchling.build; print(hatchling.build.build_sdist(sys.argv[1]))"
    command = [sys.executable, "-c", build, str(tmp_path)]
    name = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()[-1]
    with tarfile.open(tmp_path / name) as archive:
        held = {member.partition("/")[2] for member in archive.getnames()}
    here = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(here.splitlines()) - held <= {".gitignore"}
