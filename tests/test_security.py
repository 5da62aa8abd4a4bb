"""Files, servers and verifiers of others: no code runs, nothing outside is read, nothing takes for ever."""

from __future__ import annotations

import ast
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_tokenizers import byte_level_folder

from megatron_gft.commands import evaluate, inspect, preprocess
from megatron_gft.errors import EXIT_BAD_INPUT

ROOT = Path(__file__).resolve().parents[1]

# --- Python code in model folders -----------------------------------------------------------------------------------

LOADERS = {"from_pretrained", "from_config", "pipeline"}


def test_every_load_says_whether_code_is_trusted():
    """Without the argument transformers asks on a terminal and takes ``yes |`` for an answer."""
    silent = []
    for path in (path for folder in ("megatron_gft", "tools", "examples") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in LOADERS:
                given = {word.arg: word.value for word in node.keywords}.get("trust_remote_code")
                by_user = isinstance(given, ast.Name) and given.id == "trust_remote_code"
                if not (by_user or (isinstance(given, ast.Constant) and given.value is False)):
                    silent.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not silent


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder whose tokenizer, configuration and model are said to be Python code, which leaves a mark."""
    folder = byte_level_folder(tmp_path_factory.mktemp("hostile") / "model")
    mark = folder / "mark"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    name = folder / "tokenizer_config.json"
    settings = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    name.write_text(json.dumps(json.loads(name.read_text()) | settings))
    group = {"id": "a", "prompt": "p", "answer": "1", "responses": [{"text": "x", "source": "self"}]}
    (folder / "groups.jsonl").write_text(json.dumps(group) + "\n")
    return folder


def arguments_of(tool, folder):
    groups = str(folder / "groups.jsonl")
    return {
        preprocess: ["--input", groups, "--tokenizer", str(folder), "--output-prefix", str(folder / "out" / "x")],
        inspect: [groups, "--tokenizer", str(folder)],
        evaluate: ["--model", str(folder), "--problems", groups, "--workers", "1", "--no-greedy", "--device", "cpu"],
    }[tool]


@pytest.mark.parametrize("tool", [preprocess, inspect, evaluate], ids=lambda tool: tool.__name__.split(".")[-1])
def test_no_tool_runs_the_code_of_a_folder(hostile, tool, capfd, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert tool.main(arguments_of(tool, hostile)) == EXIT_BAD_INPUT
    said = capfd.readouterr().err
    assert not (hostile / "mark").exists()
    assert "auto_map" in said and "--trust-remote-code" in said and "Traceback" not in said


def test_no_code_runs_on_a_terminal_either(hostile):
    """Neither asks nor waits with a terminal as stdin that says nothing."""
    master, terminal = pty.openpty()
    program = "import sys; from megatron_gft.commands.inspect import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *arguments_of(inspect, hostile)]
    done = subprocess.run(command, stdin=terminal, capture_output=True, text=True, timeout=60, cwd=ROOT)
    os.close(master)
    os.close(terminal)
    assert done.returncode == EXIT_BAD_INPUT and "--trust-remote-code" in done.stderr
    assert not (hostile / "mark").exists()


def test_the_code_runs_where_the_user_says_so(hostile, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    assert inspect.main([*arguments_of(inspect, hostile), "--trust-remote-code"]) == EXIT_BAD_INPUT  # it has no class T
    assert (hostile / "mark").exists()
    (hostile / "mark").unlink()
