"""What the pages say exists: keys of the configuration, files, links; and every command that they give."""

import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_gft.commands.train import read_command_line
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


PROGRAMS = "python|torchrun|make|pip|bash|sbatch|srun|gft-[a-z]+|source|git|pytest|apt-get|cd|tools/\\w+\\.py"
COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:[./]+venv/bin/)?(?:{PROGRAMS})(?![\w.])")
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
MAKEFILE = (ROOT / "Makefile").read_text()
UNCHECKED = ("source", "git", "apt-get")  # not ours
ANY_CONFIG = "examples/qwen2.5-math-1.5b/gpus-1.yaml"


def commands(page: Path) -> Iterator[str]:
    """Lines of bash blocks, indented commands, and commands within sentences."""
    text = page.read_text().replace("\\\n", " ")
    for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        yield from filter(None, map(str.strip, block.splitlines()))
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = [*re.findall(r"^    (\S.*)$", rest, flags=re.MULTILINE), *re.findall(r"`([^`\n]+)`", rest)]
    yield from (span for span in spans if COMMAND.match(span) and (" " in span or span.startswith(("gft", "make"))))


GIVEN = sorted({command for page in PAGES if page.name != "CHANGELOG.md" for command in commands(page)})


class Parsed(BaseException):
    """The command line is sound; what it asks for is not done."""


def parse(tool: Path, words: list[str], monkeypatch) -> None:
    """Let a tool read its arguments, and no more."""
    whole = bool(words) and "..." not in words  # else it is only named, or a part is left out
    read = argparse.ArgumentParser.parse_args

    def parse_args(parser, argv=None, namespace=None):
        if whole:
            read(parser, argv, namespace)
        else:
            assert not [word for word in words if word.startswith("--") and word not in parser._option_string_actions]
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [str(tool), *words])
    monkeypatch.syspath_prepend(str(tool.parent))
    spec = importlib.util.spec_from_file_location(tool.stem, tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises((Parsed, SystemExit)) as ended:
        module.main(words)
    assert ended.type is Parsed or ended.value.code == 0, "--help ends with 0, a wrong flag with 2"


def check_overrides(words: list[str]) -> None:
    assert not [word for word in words if "=" in word and word.partition("=")[0] not in all_keys()]


def check(words: list[str], monkeypatch) -> None:
    """What a command names is there: program, flags, keys, targets, files."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "make":
        targets = [word for word in rest if "=" not in word]
        variables = [word.partition("=")[0] for word in rest if "=" in word]
        assert all(f"\n{target}:" in MAKEFILE for target in targets)
        assert all(re.search(rf"\$\([a-z ]*{name}\)|^{name} \?=", MAKEFILE, re.MULTILINE) for name in variables)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(rest)
        module = ["python", "-m" if options.module else "launch/", options.training_script]
        check([*module, *options.training_script_args], monkeypatch)
    elif program in ("srun", "cd", "sbatch", "bash"):
        if "--wrap" in rest:
            return check(shlex.split(rest[rest.index("--wrap") + 1]), monkeypatch)
        if inner := re.fullmatch(r"\$\((.*)\)", " ".join(rest)):
            return check(inner[1].split(), monkeypatch)
        if program == "srun":
            return check(rest, monkeypatch)
        check_overrides([word for word in rest if not word.startswith("--")])
    elif program == "pip":
        assert all((ROOT / name).exists() for flag, name in zip(rest, rest[1:], strict=False) if flag == "-r")
    elif program == "pytest":
        assert f'"{rest[rest.index("-m") + 1]}:' in (ROOT / "pyproject.toml").read_text()
    elif program not in UNCHECKED:
        check_tool(program, rest, monkeypatch)


def check_tool(program: str, words: list[str], monkeypatch) -> None:
    """A script, a module under python, or a program of the installed package."""
    words = ["8" if word == "N" else ANY_CONFIG if word in ("FILE", "run.yaml") else word for word in words]
    module = SCRIPTS[program].partition(":")[0] if program in SCRIPTS else words[1] if words[0] == "-m" else ""
    if words[0:1] == ["launch/"]:
        check_overrides(words[2:])
    elif module.endswith(".train"):
        words = words[2:] if program == "python" else words
        monkeypatch.chdir(ROOT)
        if words not in ([], ["--recipes"]):
            read_command_line(words)
    elif program in SCRIPTS:
        parse(ROOT / f"{module.replace('.', '/')}.py", words, monkeypatch)
    elif module:
        assert importlib.util.find_spec(module)
    else:
        tool, *words = [program, *words][program == "python" :]
        parse(ROOT / tool, words, monkeypatch)


@pytest.mark.parametrize("command", GIVEN)
def test_commands_that_are_given_are_sound(command, monkeypatch):
    """Every flag, key, target and file of it exists. Those that need no GPU, no server and no model of the reader's are
    run: by the tests of the tools, below, and as make targets."""
    command = re.sub(r"\[[^\[\]]*\.\.\.\]", "", command)  # of a usage line: [RUN ...]
    words = shlex.split(command, comments=True)
    if words:
        check(words, monkeypatch)


RUNNABLE = [line for line in GIVEN if re.match(r"python tools/(plan.py --config examples|\w+\.py --help)", line)]


@pytest.mark.slow  # the tools' own tests run them with other arguments
@pytest.mark.parametrize("command", RUNNABLE)
def test_commands_that_need_nothing_run(command):
    line = [sys.executable, *shlex.split(command, comments=True)[1:]]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow  # the parts have tests of their own; this is the page, word for word
@pytest.mark.timeout(900)
def test_docs_start_leads_to_a_trained_export(tmp_path):
    from tiny_models import write_tiny_model  # imports transformers, which most tests do without

    write_tiny_model(tmp_path / "model", "llama3", num_hidden_layers=2, vocab_size=257)  # as many as its tokenizer
    rows = [
        {"question": f"{n} pens in {m} boxes?", "answer": f"#### {n * m}"} for n in range(2, 6) for m in range(2, 6)
    ]
    for name, part in (("problems", rows[:12]), ("heldout", rows[12:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    text = (ROOT / "docs" / "start.md").read_text()
    (settings,) = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "run.yaml").write_text(settings.replace("{config: model}", "{config: model, precision: fp32}"))
    script = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    script = script.replace("max_tokens=512", "max_tokens=8").replace(
        "tools/evaluate.py", "tools/evaluate.py --max-tokens 8"
    )
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    line = ["bash", "-ec", script]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (tmp_path / "groups.html").exists() and "greedy accuracy" in done.stdout
    assert [path.name for path in (tmp_path / "runs/first/export").iterdir()] == ["step-00000002"]
