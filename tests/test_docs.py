"""What the pages say exists: keys of the configuration, files, links."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_gft.config import Config, all_keys
from megatron_gft.reports import configuration
from megatron_gft.rounds.settings import RoundsConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
# What a user names or a tool makes: not part of the repository.
MADE = ("tests/utils/", "data/", "runs/", "models/", "checkpoints/", "shards/", "RUN/", "problems/", "export/")
SECTIONS = "|".join(Config.model_fields)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_are_named_exist(page):
    named = re.findall(
        r"(?<![\w/.])((?:tools|launch|examples|tests|docs|megatron_gft|\.ci)/[\w./-]*\w)", page.read_text()
    )
    assert not [path for path in named if not (ROOT / path).exists() and not path.startswith(MADE)]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_keys_that_are_named_exist(page):
    named = re.findall(rf"(?<![\w./-])((?:{SECTIONS})\.[a-z_]+)(?=[=` ])", page.read_text())
    assert not [key for key in named if key not in [*all_keys(), *all_keys(RoundsConfig)] and not key.endswith(".py")]


def test_the_page_of_the_configuration_is_in_step():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == configuration.page(), "run: python -m megatron_gft.reports.configuration > docs/configuration.md"
    assert [key for key in all_keys() if f"| `{key}` |" not in page] == []


def test_help_of_training_lists_every_key():
    done = subprocess.run(
        [sys.executable, "-m", "megatron_gft.train", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [key for key in all_keys() if f"  {key}\n" not in done.stdout] == []
    assert "example: torchrun" in done.stdout


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_page_of_rounds_lists_every_key():
    named = set(re.findall(r"`([\w.]+)`", (ROOT / "docs" / "rounds.md").read_text()))
    leaves = {key: key.rpartition(".")[2] for key in all_keys(RoundsConfig)}
    assert not [key for key, leaf in leaves.items() if not {key, leaf, f"TOOL.{leaf}"} & named]
