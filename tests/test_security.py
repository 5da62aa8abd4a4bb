"""Files, servers and verifiers of others: no code runs, nothing outside is read, nothing takes for ever."""

from __future__ import annotations

import ast
import contextlib
import gzip
import io
import json
import os
import pickle
import pty
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from group_shards import write_shard
from openai_server import FaultyServer
from tiny_language_model import language_model_folder
from tiny_tokenizers import byte_level_folder

from megatron_gft.checkpoints.torch_dist import TorchDistReader
from megatron_gft.checkpoints.verification import write_file_hashes
from megatron_gft.commands import convert, evaluate, inspect, preprocess
from megatron_gft.errors import EXIT_BAD_INPUT, InputError, command, shown
from megatron_gft.sampling.openai_client import OpenAIBackend
from megatron_gft.sampling.settings import SampleRequest, SamplingParams
from megatron_gft.sampling.sources import OpenAISource
from megatron_gft.shards.manifest import ShardManifest, manifest_text

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
    program = "import sys; from megatron_gft.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1])"
    command = [sys.executable, "-c", program, str(hostile)]
    done = subprocess.run(command, stdin=terminal, capture_output=True, text=True, timeout=60, cwd=ROOT)
    os.close(master)
    os.close(terminal)
    assert done.returncode and "--trust-remote-code" in done.stderr
    assert not (hostile / "mark").exists()


def test_the_code_runs_where_the_user_says_so(hostile, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    assert inspect.main([*arguments_of(inspect, hostile), "--trust-remote-code"]) == EXIT_BAD_INPUT  # it has no class T
    assert (hostile / "mark").exists()
    (hostile / "mark").unlink()


# --- pickles in checkpoints -----------------------------------------------------------------------------------------


class Evil:
    """Pickles as a call of ``open(mark, "w")``."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory):
    from megatron_gft.conversion.convert import hf_to_megatron

    folder = tmp_path_factory.mktemp("converted") / "checkpoint"
    hf_to_megatron(tiny("llama3"), folder, verify="off")
    return folder


@pytest.fixture
def checkpoint(converted, tmp_path):
    return Path(shutil.copytree(converted, tmp_path / "checkpoint"))


def open_for_training(folder):
    from megatron_gft.checkpoints.compat import loadable_sharded_state_dict

    return loadable_sharded_state_dict({}, folder)


def put_metadata(folder, protocol=4, **changes):
    metadata = TorchDistReader(folder).metadata
    for name, value in changes.items():
        setattr(metadata, name, value)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=protocol))


def put_object(folder, key, content):
    """Store ``content`` as torch's checkpoints store an object that is no tensor."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    metadata = TorchDistReader(folder).metadata
    (folder / "object.distcp").write_bytes(content)
    put_metadata(
        folder,
        state_dict_metadata=metadata.state_dict_metadata | {key: BytesStorageMetadata()},
        storage_data=metadata.storage_data | {MetadataIndex(key): _StorageInfo("object.distcp", 0, len(content))},
    )


def saved(value, **options):
    torch.save(value, file := io.BytesIO(), **options)
    return file.getvalue()


def spelled(value):
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


LEGACY = {"_use_new_zipfile_serialization": False}
STATE = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"
WEIGHT = "decoder.final_layernorm.weight"
HOSTILE = {  # what of a checkpoint -> (made hostile, the file that is named)
    "metadata-protocol-0": (lambda f, e: (f / ".metadata").write_bytes(pickle.dumps(e, protocol=0)), ".metadata"),
    "metadata-protocol-2": (lambda f, e: (f / ".metadata").write_bytes(pickle.dumps([e], protocol=2)), ".metadata"),
    "metadata-inner": (lambda f, e: put_metadata(f, planner_data={"a": [e]}), ".metadata"),
    "metadata-plans": (lambda f, e: put_metadata(f, all_local_plans=[e], protocol=5), ".metadata"),
    "common": (lambda f, e: (f / "common.pt").write_bytes(saved({"args": e})), "common.pt"),
    "common-legacy": (lambda f, e: (f / "common.pt").write_bytes(saved({"args": e}, **LEGACY)), "common.pt"),
    "common-bare": (lambda f, e: (f / "common.pt").write_bytes(pickle.dumps(e)), "common.pt"),
    "object": (lambda f, e: put_object(f, STATE, saved([e])), f"object.distcp: {STATE}"),
    "object-legacy": (lambda f, e: put_object(f, "common_state/shard_0_1", saved(e, **LEGACY)), "common_state"),
    "object-for-weight": (lambda f, e: put_object(f, WEIGHT, saved([e])), f"object.distcp: {WEIGHT}"),
    "fp8-state": (lambda f, e: put_object(f, STATE, saved([spelled({"recipe": e})])), f"object.distcp: {STATE}"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_no_pickle_of_a_checkpoint_runs_code(checkpoint, tmp_path, what):
    make, named = HOSTILE[what]
    make(checkpoint, Evil(tmp_path / "mark"))
    with pytest.raises(InputError, match="would call|damaged") as raised:
        open_for_training(checkpoint)
    assert named in str(raised.value) and not (tmp_path / "mark").exists()
    if what not in ("common-bare", "object-legacy", "common-legacy"):
        assert "open" in str(raised.value)


def test_a_tool_refuses_such_a_checkpoint_in_one_message(checkpoint, tmp_path, capsys):
    put_metadata(checkpoint, planner_data=Evil(tmp_path / "mark"))
    (checkpoint / "files.json").unlink(missing_ok=True)
    write_file_hashes(checkpoint)  # as whoever changed it would
    arguments = ["megatron-to-hf", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    assert convert.main(arguments) == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert "error: " in said and ".metadata: would call" in said and "open" in said
    assert not (tmp_path / "mark").exists() and not (tmp_path / "out").exists()


def test_what_training_writes_is_read(checkpoint):
    """FP8 state as Transformer Engine writes it, empty state, and the plans of an asynchronous save."""
    from torch.distributed.checkpoint.planner import SavePlan

    state = {"recipe": None, "scale_fwd": torch.ones(3), "extra_fp8_variables": {"num_gemms": 1}}
    put_object(checkpoint, STATE, saved([spelled(state)]))
    put_metadata(checkpoint, all_local_plans=[SavePlan([])])
    open_for_training(checkpoint)
    put_object(checkpoint, STATE, saved([torch.empty(0, dtype=torch.uint8), io.BytesIO(b"x"), None]))
    open_for_training(checkpoint)


def test_shards_lie_in_the_folder_of_their_checkpoint(checkpoint, tmp_path):
    metadata = TorchDistReader(checkpoint).metadata
    for info in metadata.storage_data.values():
        info.relative_path = f"../{info.relative_path}"
    put_metadata(checkpoint, storage_data=metadata.storage_data)
    with pytest.raises(InputError, match=r"\.metadata: damaged or missing \(data at '\.\./"):
        TorchDistReader(checkpoint)


# --- links, FIFOs and odd names -------------------------------------------------------------------------------------


def link_out(folder, outside):
    (folder / "LICENSE").symlink_to(outside / "secret")


def link_config_out(folder, outside):
    shutil.move(folder / "config.json", outside / "config.json")
    (folder / "config.json").symlink_to(outside / "config.json")


def link_weights_out(folder, outside):
    weights = next(folder.glob("*.safetensors"))
    shutil.move(weights, outside / "weights")
    weights.symlink_to(outside / "weights")


def link_folder_out(folder, outside):
    (folder / "additional_chat_templates").symlink_to(outside)


def link_below_out(folder, outside):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").symlink_to("../../outside/secret")


def fifo(name):
    def make(folder, _):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def rename_in_index(name):
    def make(folder, outside):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        tensor, file = next(iter(index["weight_map"].items()))
        shutil.copy(folder / file, outside / file)
        index["weight_map"][tensor] = name if isinstance(name, int) else name.format(file=file, outside=outside)
        path.write_text(json.dumps(index))

    return make


ODD_FOLDERS = {
    "link": (link_out, "LICENSE: a link out of its folder"),
    "config-link": (link_config_out, "config.json: a link out of its folder"),
    "weights-link": (link_weights_out, "safetensors: a link out of its folder"),
    "folder-link": (link_folder_out, "additional_chat_templates: a link out of its folder"),
    "link-below": (link_below_out, "rag.jinja: a link out of its folder"),
    "fifo": (fifo("NOTICE"), "NOTICE: neither a file nor a folder"),
    "config-fifo": (fifo("config.json"), "config.json: neither a file nor a folder"),
    "index-fifo": (fifo("model.safetensors.index.json"), "index.json: neither a file nor a folder"),
    "index-up": (rename_in_index("../outside/{file}"), "weight_map does not name a file"),
    "index-root": (rename_in_index("{outside}/{file}"), "weight_map does not name a file"),
    "index-nul": (rename_in_index("model\0.safetensors"), "weight_map does not name a file"),
    "index-escape": (rename_in_index("\x1b]0;title\x07"), "weight_map does not name a file"),
    "index-number": (rename_in_index(3), "weight_map does not name a file"),
}


@pytest.mark.parametrize("what", ODD_FOLDERS)
def test_nothing_outside_a_model_folder_is_read(tiny, tmp_path, what, capsys):
    make, message = ODD_FOLDERS[what]
    folder, outside = Path(shutil.copytree(tiny("llama3"), tmp_path / "model")), tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("private")
    make(folder, outside)
    arguments = ["hf-to-megatron", "--hf", str(folder), "--output", str(tmp_path / "out"), "--verify", "off"]
    assert convert.main(arguments) == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert message in said and "private" not in said and "\x1b" not in said
    assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_and_inside_the_folder_are_followed(tiny, tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in tiny("llama3").iterdir():
        shutil.copy(path, repository / "blobs" / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    (snapshot / "LICENSE.txt").symlink_to("config.json")
    arguments = ["hf-to-megatron", "--hf", str(snapshot), "--output", str(tmp_path / "out"), "--verify", "off"]
    (tmp_path / "link").symlink_to(snapshot)
    assert convert.main(arguments) == 0
    arguments[2], arguments[4] = str(tmp_path / "link"), str(tmp_path / "again")
    assert convert.main(arguments) == 0
    assert (tmp_path / "again" / "hf" / "LICENSE.txt").read_text() == (snapshot / "config.json").read_text()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a\0b", "", "..", "a/../../b", "\x1b[31m"])
def test_lists_of_files_name_files_of_their_folder(checkpoint, name):
    from megatron_gft.checkpoints.history import find_damage

    (checkpoint / "files.json").write_text(json.dumps({name: {"bytes": 1, "sha256": ""}}))
    (problem,) = find_damage(checkpoint)
    assert f"files.json: {name!r} is no file in the folder" == problem


def odd_name(name):
    def make(prefix, outside):
        path = prefix.with_suffix(".json")
        value = json.loads(path.read_text())
        value["logprobs"] = name
        value.pop("sha256")
        path.write_text(manifest_text(ShardManifest.model_validate(value)))

    return make


def link_bin_out(prefix, outside):
    shutil.move(prefix.with_suffix(".bin"), outside / "bin")
    prefix.with_suffix(".bin").symlink_to(outside / "bin")


ODD_SHARDS = {
    "up": (odd_name("../x"), "lists no file '../x'"),
    "nul": (odd_name("x.a\0b"), r"lists no file 'x.a\x00b'"),
    "escape": (odd_name("x.\x1b[31m"), r"lists no file 'x.\x1b[31m'"),
    "empty": (odd_name(""), "lists no file ''"),
    "manifest-fifo": (lambda prefix, _: fifo("x.json")(prefix.parent, None), "x.json: not a file"),
    "bin-fifo": (lambda prefix, _: fifo("x.bin")(prefix.parent, None), "x.bin: "),
    "bin-link": (link_bin_out, "x.bin: a link out of its folder"),
}


@pytest.mark.parametrize("what", ODD_SHARDS)
def test_a_shard_is_what_lies_beside_its_manifest(tmp_path, what, capsys):
    make, message = ODD_SHARDS[what]
    (tmp_path / "shards").mkdir()
    (tmp_path / "outside").mkdir()
    write_shard(tmp_path / "shards" / "x", 2)
    make(tmp_path / "shards" / "x", tmp_path / "outside")
    assert inspect.main([str(tmp_path / "shards" / "x"), *["--verify"] * (what != "bin-link")]) == EXIT_BAD_INPUT
    assert message in capsys.readouterr().err


def test_a_shard_may_be_linked_as_a_whole(tmp_path):
    for folder in ("shards", "linked"):
        (tmp_path / folder).mkdir()
    write_shard(tmp_path / "shards" / "x", 2)
    for path in (tmp_path / "shards").iterdir():
        (tmp_path / "linked" / path.name).symlink_to(path)
    assert inspect.main([str(tmp_path / "linked" / "x"), "--verify"]) == 0


# --- servers and terminals ------------------------------------------------------------------------------------------

KEY, PASSWORD = "sk-very-secret-key", "p@ss-word"
STEERING = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\r"


def ask(url, **fields):
    """The outcomes of one request, or the error that ends the run."""
    backend = OpenAIBackend(OpenAISource(kind="openai", url=url, model="m", attempts=1, timeout=20, **fields))
    return list(backend.generate([SampleRequest("r", "hi", 0)], SamplingParams(1.0), lambda key: False))


@pytest.mark.parametrize("status", [400, 403, 500])
def test_what_a_server_says_shows_no_key_and_steers_no_terminal(monkeypatch, capsys, status):
    said = f"Bearer {KEY} {PASSWORD} p%40ss-word query-secret {STEERING} line\nerror: forged".encode()
    monkeypatch.setenv("TEACHER", KEY)
    with FaultyServer(answer=lambda body: (status, said)) as server:
        url = server.url.replace("http://", "http://me:p%40ss-word@") + "?api-key=query-secret"

        @command
        def tool():
            print("\n".join(outcome.reason for outcome in ask(url, api_key_env="TEACHER")), file=sys.stderr)

        tool()
        assert server.paths == ["/v1/chat/completions?api-key=query-secret"]
    shown = capsys.readouterr().err
    assert f"HTTP {status}" in shown and "***" in shown
    assert not [word for word in (KEY, PASSWORD, "p%40ss", "query-secret") if word in shown]
    assert all(letter.isprintable() or letter == "\n" for letter in shown) and "\nerror: forged" not in shown


@pytest.mark.parametrize("field", ["content", "finish_reason"])
def test_fields_of_a_reply_are_shown_like_its_errors(monkeypatch, field):
    monkeypatch.setenv("TEACHER", KEY)
    choice = {"finish_reason": "stop", "message": {"content": "fine"}}
    (choice if field in choice else choice["message"])[field] = [KEY, STEERING, "x" * 10_000]
    with FaultyServer(answer=lambda body: (200, json.dumps({"choices": [choice]}).encode())) as server:
        (outcome,) = ask(server.url, api_key_env="TEACHER")
    assert "***" in outcome.reason and KEY not in outcome.reason
    assert outcome.reason.isprintable() and len(outcome.reason) < 500


def test_shown_keeps_letters_and_lines():
    text = "naïve 漢字 😀\n\tnext: https://me:secret@host/x http://host/a@b"
    assert shown(text) == text.replace("me:secret", "***")
    assert shown("a\x00b\x1b[31m\u202e\u2066\ud800\x85") == r"a\x00b\x1b[31m\u202e\u2066\ud800\x85"


def serve_for_ever(head, piece):
    """A server that never stops talking; its url, and how many bytes it could send."""
    listener, sent = socket.create_server(("127.0.0.1", 0)), [0]

    def talk():
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            connection.recv(1 << 16)
            connection.sendall(head)
            while True:
                connection.sendall(piece)
                sent[0] += len(piece)

    threading.Thread(target=talk, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1", sent, listener


GZIPPED = gzip.compress(bytes(1 << 20))
ENDLESS = {
    "body": (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * (1 << 16), "more than 4 MiB"),
    "error": (b"HTTP/1.1 500 No\r\n\r\n", b"x" * (1 << 16), "HTTP 500: reply of more than 4 MiB"),
    "redirect": (b"HTTP/1.1 307 Go\r\nLocation: /elsewhere\r\n\r\n", b"x" * (1 << 16), "more than 4 MiB"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"A: " + b"x" * 5000 + b"\r\n", "RemoteProtocolError"),
    "one-header": (b"HTTP/1.1 200 OK\r\nA: ", b"x" * (1 << 16), "RemoteProtocolError"),
    "gzip": (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n", GZIPPED, "packed with gzip"),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_a_reply_without_end_is_refused_in_bounded_memory(monkeypatch, what):
    head, piece, message = ENDLESS[what]
    monkeypatch.setattr("megatron_gft.sampling.openai_client.MAX_REPLY_BYTES", 4 << 20)
    url, sent, listener = serve_for_ever(head, piece)
    with listener:
        (outcome,) = ask(url)
    assert message in outcome.reason and sent[0] < 32 << 20


# --- chat templates -------------------------------------------------------------------------------------------------

NESTED = "{% for i in range(99999) %}" * 3 + "{% set x = i %}" + "{% endfor %}" * 3
SLOW_TEMPLATES = {
    "loops": NESTED,
    "macro": "{% macro f(n) %}{% for i in range(9) %}{{ f(n - 1) if n }}{% endfor %}{% endmacro %}{{ f(30) }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "power-of-names": "{% set n = 9 %}{{ n ** n ** n }}",
}


@pytest.mark.parametrize("what", SLOW_TEMPLATES)
@pytest.mark.parametrize("tool", [preprocess, evaluate], ids=lambda tool: tool.__name__.split(".")[-1])
def test_a_template_does_not_take_for_ever(tmp_path, monkeypatch, capsys, what, tool):
    monkeypatch.setattr("megatron_gft.chat_template.TEMPLATE_SECONDS", 0.3)
    folder = language_model_folder(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(SLOW_TEMPLATES[what])
    group = {"id": "a", "prompt": "p", "answer": "1", "responses": [{"text": "x", "source": "expert"}]}
    (folder / "groups.jsonl").write_text(json.dumps(group) + "\n")
    assert tool.main([*arguments_of(tool, folder), *(["--quiet"])]) == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert "the chat template" in said and "-> read it" in said
    assert not any(signal.getitimer(signal.ITIMER_VIRTUAL))


@pytest.mark.parametrize("what", SLOW_TEMPLATES)
def test_nor_does_it_before_a_request(tmp_path, monkeypatch, what):
    monkeypatch.setattr("megatron_gft.chat_template.TEMPLATE_SECONDS", 0.3)
    folder = language_model_folder(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(SLOW_TEMPLATES[what])
    with pytest.raises(InputError, match="the chat template .* -> read it"):
        ask("http://127.0.0.1:9/v1", api="completions", tokenizer=str(folder))
