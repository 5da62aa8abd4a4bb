"""Whatever is wrong with a file, a key, a tensor or a number: every command ends with 2 and one message that names it.

A table of damage for each input of each command. Every run is a fork (``tool_runs.py``), so a case costs what the
command itself does. Every kind of damage to every file is slow and runs with the slow tests; a few cases run always.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tool_runs
import torch
import yaml
from group_files import random_records
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model
from tiny_tokenizers import byte_level_folder
from tool_runs import Ended

from megatron_gft.groups.files import write_group_file

ROOT = Path(__file__).resolve().parents[1]
STEP = "run/checkpoints/step-00000001/"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
SHARD = [f"train.{kind}" for kind in ("bin", "idx", "json", "meta.bin", "meta.idx", "rewards.npy", "outcomes.npy")]
MODEL = [f"hf/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")] + [
    "hf/chat_template.jinja"
]
CHECKPOINT = (".metadata", "__0_0.distcp", "common.pt", "metadata.json", "hf/config.json")

COMMANDS: dict[str, tuple[str, list[str]]] = {
    "to megatron": ("convert hf-to-megatron --hf hf --output OUT", MODEL),
    "to hf": (
        "convert megatron-to-hf --checkpoint ckpt --output OUT",
        [f"ckpt/{name}" for name in (*CHECKPOINT, "hf_source.json")],
    ),
    "run to hf": (
        "convert megatron-to-hf --checkpoint run --output OUT",
        ["run/checkpoints/latest", *(STEP + name for name in CHECKPOINT)],
    ),
    "columns": (
        "generate --input prompts.jsonl --output OUT.jsonl --config sources.yaml --quiet",
        ["prompts.jsonl", "sources.yaml"],
    ),
    "sample": (
        "generate --input prompts.jsonl --output OUT.jsonl --config sampled.yaml --quiet",
        [*MODEL, "sampled.yaml"],
    ),
    "score": ("score --input groups.jsonl --output OUT.jsonl --workers 1 --quiet", ["groups.jsonl"]),
    "preprocess": (
        "preprocess --input groups.jsonl --tokenizer hf --model hf --output-prefix OUT/p --quiet",
        ["groups.jsonl", *MODEL[:1], *MODEL[2:]],
    ),
    "inspect groups": ("inspect groups.jsonl --tokenizer hf", ["groups.jsonl", "hf/tokenizer.json"]),
    "inspect shards": ("inspect train --tokenizer hf --max-tokens-per-pack 512", SHARD),
    "verify shards": ("inspect train --verify", SHARD),
    "plan": ("plan --config config.yaml --world-size 1", ["config.yaml", "hf/config.json", *SHARD]),
    "import": ("import_groups --mapping rows.yaml --input rows.jsonl --output OUT.jsonl", ["rows.jsonl", "rows.yaml"]),
    "logprobs": (
        "compute_logprobs --config config.yaml --name a data.train=[OUT/train]",
        ["config.yaml", *MODEL[:2], *SHARD],
    ),
    "measure verifier": (
        "measure_verifier --input prompts.jsonl --solution-column answer --limit 1",
        ["prompts.jsonl"],
    ),
    "measure suites": ("measure_suites --suite nemo --tests suite.py", ["suite.py"]),
    "recipe tables": ("recipe_tables --check", ["examples/tiny/gpus-1.yaml", "hf/config.json"]),
    "evaluate": (
        "evaluate --model hf --problems prompts.jsonl --no-greedy --quiet --workers 1",
        ["prompts.jsonl", *MODEL],
    ),
    "rounds": ("rounds --config rounds.yaml --dry-run", ["rounds.yaml"]),
    "plot": ("plot run --output OUT.svg", ["run/metrics.jsonl"]),
    "train": ("train --config config.yaml train.output=OUT", ["config.yaml", *MODEL, *SHARD]),
    "train from checkpoint": (
        "train --config config.yaml train.output=OUT checkpoint.init_from=ckpt",
        [f"ckpt/{name}" for name in CHECKPOINT],
    ),
    "resume": (
        "train --config config.yaml train.max_steps=2 train.output=run",
        ["run/checkpoints/latest", *(STEP + name for name in (*CHECKPOINT, "files.json", "state.json"))],
    ),
}
"""Command line, and the files that it reads. OUT is removed before each run."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    tool_runs.load()
    folder = tmp_path_factory.mktemp("damaged") / "w"
    model = write_tiny_model(folder / "hf", "llama3", num_hidden_layers=1, hidden_size=32, intermediate_size=64)
    byte_level_folder(model)
    write_group_file(folder / "groups.jsonl", random_records(6))
    rows = [{"question": f"{i} + 1?", "answer": f"so #### {i + 1}"} for i in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_yaml(folder / "sources.yaml", {"sources": [{"kind": "column", "column": "answer"}]})
    write_yaml(folder / "sampled.yaml", {"sources": [{"kind": "transformers", "model": "hf", "max_tokens": 4}]})
    config = {
        "model": {"config": "hf", "precision": "fp32"},
        "data": {"train": ["train"], "groups_per_step": 3, "max_tokens_per_pack": 512},
        "checkpoint": {"init_from": "hf:hf", "async_save": False},
        "logging": {"progress_bar": False, "tensorboard": False},
        "train": {"max_steps": 1},
    }
    write_yaml(folder / "config.yaml", config)
    rounds = {"model": "hf", "problems": {"train": ["prompts.jsonl"]}, "train": {"config": ["config.yaml"]}}
    write_yaml(folder / "rounds.yaml", rounds | {"generate": {"sources": ["kind=transformers model={model}"]}})
    write_yaml(folder / "rows.yaml", {"prompt": "question", "text": "answer", "source": "self", "answer": "answer"})
    shutil.copyfile(folder / "prompts.jsonl", folder / "rows.jsonl")
    (folder / "suite.py").write_text("def test_one():\n    assert math_equal('1', '1')\n")
    recipe = folder / "examples/tiny/gpus-1.yaml"
    recipe.parent.mkdir(parents=True)
    shutil.copyfile(folder / "config.yaml", recipe)
    write_yaml(folder / "examples/fp8.yaml", {})
    (recipe.parent / "README.md").write_text("| `gpus-1.yaml` | to be written |\n")
    shards = "preprocess --input groups.jsonl --tokenizer hf --output-prefix train --quiet"
    for line in (COMMANDS["to megatron"][0], shards, "train --config config.yaml train.output=run"):
        ended = tool_runs.run(folder, *line.replace("OUT", "ckpt").split())
        assert ended.code == 0, ended.text
    return folder


def write_yaml(path: Path, value: Any) -> None:
    path.write_text(yaml.safe_dump(value))


@contextlib.contextmanager
def changed(path: Path, change: Callable[[Path], object]) -> Iterator[None]:
    """A file, or folder, as ``change`` leaves it; put back afterwards."""
    kept = path.with_name(f".kept.{path.name}")
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, kept)
    try:
        change(path)
        yield
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        kept.rename(path)


def run(folder: Path, line: str, *more: str) -> Ended:
    """The command; a run that goes on works in a copy."""
    for output in folder.glob("OUT*"):
        shutil.rmtree(output) if output.is_dir() else output.unlink()
    if "OUT/train" in line:
        others = shutil.ignore_patterns("[!t]*", "t[!r]*", ".*")
        shutil.copytree(folder, folder / "OUT", symlinks=True, ignore=others)
    if "train.output=run" in line:
        shutil.copytree(folder / "run", folder / "OUT", symlinks=True)
        line = line.replace("train.output=run", "train.output=OUT")
    return tool_runs.run(folder, *line.split(), *more)


def test_every_tool_is_in_the_table():
    """Those that measure read no file of a user's, and are among the command lines."""
    lines = [line for line, *_ in (*COMMANDS.values(), *LINES.values())]
    known = {tool_runs.main_of(line.split()[0]) for line in lines}
    assert not {path.stem for path in (ROOT / "tools").glob("*.py") if tool_runs.main_of(path.stem) not in known}
    assert (
        not {path.stem for path in (ROOT / "megatron_gft" / "commands").glob("[!_]*.py")}
        - {main.__module__.rpartition(".")[2] for main in known}
        - {"launch", "options"}
    )  # starts train; no command


# --- damage to bytes ------------------------------------------------------------------------------------------------


def into(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def part(share: float, more: bytes = b"") -> Callable[[Path], object]:
    def change(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))] + more)

    return change


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": into(b""),
    "git lfs": into(LFS),
    "a list": into(b"[]"),
    "null": into(b"null"),
    "a number": into(b"3"),
    "a text": into(b'"text"'),
    "an object": into(b"{}"),
    "other keys": into(b'{"a": {"b": [1, 2]}}'),
    "list of objects": into(b'[{"a": 1}]'),
    "nested": into(b"[" * 100_000),
    "digits": into(b"1" * 5000),
    "zeros": into(bytes(300)),
    "random": into(random.Random(1).randbytes(400)),
    "tab": into(b"a:\n\tb: 1\n"),
    "html": into(b"<!DOCTYPE html>\n<html>"),
    "half": part(0.5),
    "not UTF-8": part(0.3, b"\xe9\xff"),
    "UTF-16": lambda path: path.write_bytes(b"\xff\xfe" + path.read_bytes()),
    "longer": part(1, b"garbage"),
    "a folder": folder_instead,
    "a loop": loop,
}
ALWAYS = ("git lfs", "half")


def failures(folder: Path, command: str, kinds: tuple[str, ...], files: list[str]) -> Iterator[str]:
    line, _ = COMMANDS[command]
    for file in files:
        for kind in kinds if not file.endswith(".jinja") else ("missing", "half", "not UTF-8", "a folder"):
            with changed(folder / file, DAMAGE[kind]):
                ended = run(folder, line)
            if not is_sound(ended, Path(file).name, Path(file).stem.replace("_", " "), Path(file).parent.name or "-"):
                yield f"{command}, {file} {kind}: exit code {ended.code}\n{ended.text[-900:]}"


def is_sound(ended: Ended, *culprits: str) -> bool:
    """All went well, or one message names a culprit."""
    return ended.code == 0 or (ended.is_message and any(culprit in ended.text for culprit in culprits))


QUICK = [command for command in COMMANDS if command != "score"]  # which starts a server of workers: in the slow tier


@pytest.mark.parametrize("command", QUICK)
def test_damaged_files_are_named(workspace, command):
    found = list(failures(workspace, command, ALWAYS, COMMANDS[command][1][:1]))
    assert not found, "\n\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["to megatron", "to hf", "run to hf", "columns", "score"])
def test_every_damage_of_every_file(workspace, command):
    found = list(failures(workspace, command, tuple(DAMAGE), COMMANDS[command][1]))
    assert not found, "\n\n".join(found)


# --- what the message says ------------------------------------------------------------------------------------------


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change the tensors of a folder; ``change`` gives the new ones, or works in place."""

    def write(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file(change(tensors) or tensors, folder / "model.safetensors", {"format": "pt"})

    return write


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return weights(lambda tensors: {name.replace(old, new, 1): tensor for name, tensor in tensors.items()})


def poisoned(name: str, value: float, dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name].view(-1)[-1] = value
        return {key: tensor.to(dtype) for key, tensor in tensors.items()}

    return weights(change)


def keys(**values: Any) -> Callable[[Path], object]:
    """Other values in a JSON file; of a folder, in its config.json."""

    def write(path: Path) -> None:
        path = path / "config.json" if path.is_dir() else path
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return write


def doubled_key(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"rope_theta": 5.0,', 1))


def several(folder: Path) -> None:
    """Two files instead of one, with an index."""
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    index = {}
    for number, share in enumerate((tensors[:3], tensors[3:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file(dict(share), folder / file)
        index |= {name: file for name, _ in share}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def then(*changes: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        for one in changes:
            one(path)

    return change


def gone(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def also(name: str, content: bytes = b"x") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


INDEX, FIRST = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
K_PROJ, UP = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight"
NAN, INF = float("nan"), float("inf")
ONE_FILE = gone("model.safetensors")

FOLDERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "nan": (poisoned(UP, NAN), [f"model.safetensors: tensor {UP} holds NaN"]),
    "inf": (poisoned(K_PROJ, -INF), [f"tensor {K_PROJ} holds NaN or inf"]),
    "nan in bf16": (poisoned("model.norm.weight", NAN, torch.bfloat16), ["tensor model.norm.weight holds NaN"]),
    "inf in fp16": (poisoned("model.embed_tokens.weight", 1e9, torch.float16), ["model.embed_tokens.weight holds"]),
    "fp8": (weights(lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()}), ["F8_E4M3"]),
    "lfs weights": (also("model.safetensors", LFS), ["model.safetensors is a Git LFS pointer", "git lfs pull"]),
    "lfs shard": (then(several, also(FIRST, LFS)), [f"{FIRST} is a Git LFS pointer"]),
    "lfs tokenizer": (also("tokenizer.json", LFS), ["tokenizer.json is a Git LFS pointer"]),
    "lfs config": (also("config.json", LFS), ["config.json is a Git LFS pointer"]),
    "bin only": (then(ONE_FILE, also("pytorch_model.bin")), ["pytorch_model.bin, a pickle", "save_pretrained"]),
    "adapter": (then(ONE_FILE, also("adapter_config.json")), ["adapter_config.json is there", "merge"]),
    "no weights": (ONE_FILE, ["neither model.safetensors nor model.safetensors.index.json"]),
    "no index": (then(several, gone(INDEX)), [f"2 files like {FIRST}", f"copy {INDEX}"]),
    "index only": (then(several, gone(FIRST, FIRST.replace("00001-", "00002-"))), [f"shard {FIRST} is missing"]),
    "shard missing": (then(several, gone(FIRST)), [f"shard {FIRST} is missing"]),
    "weight_map of numbers": (then(several, also(INDEX, b'{"weight_map": {"a": 1}}')), [INDEX, "'a': 1"]),
    "weight_map a list": (then(several, also(INDEX, b'{"weight_map": [1]}')), [INDEX, "weight_map is [1]"]),
    "index a list": (then(several, also(INDEX, b"[]")), [INDEX, "holds list"]),
    "wrapped": (
        renamed("model.", "base_model.model.model."),
        ["'base_model.model.model.' instead", "more"],
    ),
    "doubled": (renamed("model.", "model.model."), ["'model.model.' instead of 'model.'"]),
    "bare": (renamed("model.", ""), ["'' instead of 'model.'"]),
    "fused": (renamed("self_attn.q_proj", "self_attn.Wqkv"), ["stored fused", "Wqkv"]),
    "lora": (weights(lambda t: t | {"model.layers.0.q.lora_A.weight": torch.ones(2)}), ["adapter", "lora_A"]),
    "quantized": (weights(lambda t: t | {"model.layers.0.mlp.up_proj.qweight": torch.ones(2)}), ["quantized"]),
    "layers": (keys(num_hidden_layers=3), ["num_hidden_layers is 3, the weights have 1"]),
    "list": (also("config.json", b"[]"), ["config.json: holds list"]),
    "key twice": (doubled_key, ["config.json", "'rope_theta' stands there twice"]),
    "rope list": (keys(rope_parameters=None, rope_scaling=[1]), ["rope_scaling is [1] -> it must be"]),
    "rope factor": (keys(rope_parameters={"rope_type": "linear", "factor": NAN}), ["rope_parameters.factor is nan"]),
    "text": (keys(head_dim="16"), ["head_dim is '16' -> it must be a valid integer"]),
    "float": (keys(num_attention_heads=4.0), ["num_attention_heads is 4.0"]),
    "bool": (keys(vocab_size=True), ["vocab_size is True"]),
    "negative": (keys(num_key_value_heads=-2), ["num_key_value_heads is -2 -> it must be greater than 0"]),
    "nan eps": (keys(rms_norm_eps=NAN), ["rms_norm_eps is nan"]),
    "false": (keys(tie_word_embeddings="false"), ["tie_word_embeddings is 'false' -> it must be a valid boolean"]),
    "null": (keys(hidden_size=None), ["hidden_size is None"]),
    "huge": (keys(num_hidden_layers=10**12), ["num_hidden_layers is 1000000000000"]),
    "zero": (keys(vocab_size=0), ["vocab_size is 0"]),
    "token id": (keys(eos_token_id="2"), ["config.json", "eos_token_id", "'2'"]),
    "odd head": (keys(head_dim=15), ["head_dim is 15", "even"]),
    "heads": (keys(num_key_value_heads=3), ["num_attention_heads 4 is no multiple of num_key_value_heads 3"]),
    "architectures": (keys(architectures="LlamaForCausalLM"), ["architectures is 'LlamaForCausalLM'"]),
    "layer types": (keys(layer_types="full"), ["layer_types is 'full'"]),
    "all at once": (keys(head_dim="16", vocab_size=0, rms_norm_eps="x", hidden_act="gelu"), ["hidden_act", "(4)"]),
}
"""What is done to a Hugging Face folder, and words of the message."""


@pytest.mark.parametrize("case", FOLDERS)
def test_the_cause_in_a_model_folder_is_named(workspace, case):
    change, words = FOLDERS[case]
    with changed(workspace / "hf", change):
        ended = run(workspace, COMMANDS["to megatron"][0])
    assert ended.is_message and all(word in ended.text for word in words), ended.text
    assert not list(workspace.glob("*OUT*")), "something was left behind"


@pytest.mark.parametrize("command", ["train", "plan"])
def test_the_same_parser_serves_every_command(workspace, command):
    for case in ("rope list", "text", "negative", "false", "key twice", "token id"):
        with changed(workspace / "hf", FOLDERS[case][0]):
            ended = run(workspace, COMMANDS[command][0])
        assert ended.is_message and all(word in ended.text for word in FOLDERS[case][1]), ended.text


@pytest.mark.parametrize("command", ["sample", "preprocess"])
@pytest.mark.parametrize("key, value", [("auto_map", 3), ("id2label", 3), ("num_labels", "a"), ("torch_dtype", 7)])
def test_what_transformers_reads_is_checked_before_it_does(workspace, command, key, value):
    with changed(workspace / "hf/config.json", keys(**{key: value})):
        ended = run(workspace, COMMANDS[command][0])
    assert ended.is_message and f"hf/config.json (1):\n  - {key} is {value!r} -> it must be" in ended.text, ended.text


def test_a_model_with_fewer_layers_than_its_weights_samples_nothing(workspace):
    with changed(workspace / "hf", weights(lambda t: t | {"model.layers.1.mlp.up_proj.weight": torch.ones(64, 32)})):
        ended = run(workspace, COMMANDS["sample"][0])
    assert ended.is_message and "model.layers.1.mlp.up_proj.weight" in ended.text, ended.text


@pytest.mark.parametrize("case", ["nan", "inf in fp16", "wrapped", "no index"])
def test_training_names_the_cause_in_a_model_folder(workspace, case):
    with changed(workspace / "hf", FOLDERS[case][0]):
        ended = run(workspace, COMMANDS["train"][0])
    assert ended.is_message and all(word in ended.text for word in FOLDERS[case][1]), ended.text


def test_a_cast_that_overflows_is_told_from_a_source_that_does(workspace):
    with changed(workspace / "hf", poisoned(UP, 1e9)):
        ended = run(workspace, COMMANDS["to megatron"][0], "--dtype", "fp16")
        assert ended.is_message and f"tensor {UP} has values that torch.float16 cannot hold" in ended.text
        assert run(workspace, COMMANDS["to megatron"][0], "--dtype", "bf16").code == 0
    with changed(workspace / "ckpt", lambda path: (shutil.rmtree(path), (workspace / "OUT").rename(path))):
        ended = run(workspace, COMMANDS["to hf"][0], "--dtype", "fp16")
    assert ended.is_message and UP in ended.text and "torch.float16 cannot hold" in ended.text


def test_nan_in_a_checkpoint_is_refused_on_every_way_in(workspace, monkeypatch):
    """Written by the converter itself, whose check is turned off for this."""
    monkeypatch.setattr("megatron_gft.conversion.convert.refuse_nonfinite", lambda *_: None)
    with changed(workspace / "hf", poisoned(UP, NAN)):
        assert run(workspace, COMMANDS["to megatron"][0]).code == 0
    monkeypatch.undo()
    with changed(workspace / "ckpt", lambda path: (shutil.rmtree(path), (workspace / "OUT").rename(path))):
        ended = run(workspace, COMMANDS["to hf"][0])
        assert ended.is_message and f"__0_0.distcp: decoder.layers.mlp.linear_fc1.weight[0] (tensor {UP})" in ended.text
        ended = run(workspace, COMMANDS["train from checkpoint"][0])
        assert ended.is_message and "ckpt: decoder.layers.0.mlp.linear_fc1.weight holds NaN" in ended.text


@pytest.mark.parametrize(
    ("values", "tensor", "ours"),
    [
        ({"intermediate_size": 96}, "decoder.layers.mlp.linear_fc1.weight", [1, 192, 32]),
        ({"num_hidden_layers": 2}, "decoder.layers.self_attention.linear_proj.weight", [2, 32, 32]),
        ({"num_key_value_heads": 4}, "decoder.layers.self_attention.linear_qkv.weight", [1, 96, 32]),
    ],
)
def test_a_checkpoint_of_another_shape_names_tensor_and_shapes(workspace, values, tensor, ours):
    """One of Megatron's own, with no config.json beside it; where there is one, the keys are named, allowed or not."""
    with changed(workspace / "hf", keys(**values)):
        with changed(workspace / "ckpt", of_megatron):
            for command, *more in (("train from checkpoint",), ("to hf", "--hf", "hf")):
                ended = run(workspace, COMMANDS[command][0], *more)
                assert ended.is_message and f"{tensor} is [" in ended.text and str(ours) in ended.text, ended.text
        allowed = f"model.allow_config_mismatch=[{','.join(values)}]"
        for command in ("train", "train from checkpoint", "resume"):
            ended = run(workspace, COMMANDS[command][0], allowed, "checkpoint.init_from=ckpt")
            assert ended.is_message and "allow_config_mismatch" not in ended.text, ended.text
            assert all(f"{key}: {value} by hf, " in ended.text for key, value in values.items()), ended.text
        ended = run(workspace, COMMANDS["to hf"][0], "--hf", "hf")
        assert ended.is_message and all(f"{key}: {value}, " in ended.text for key, value in values.items()), ended.text


def test_weights_of_another_function_are_refused(workspace):
    """Of the same shape, by another config.json; ``test_train_cli.py`` goes on with the key that allows it (slow)."""
    with changed(workspace / "hf", keys(rms_norm_eps=1e-3)):
        for command in ("train from checkpoint", "resume"):
            ended = run(workspace, COMMANDS[command][0])
            assert ended.is_message and "rms_norm_eps: 0.001 by hf, " in ended.text, ended.text
            assert "model.allow_config_mismatch=[rms_norm_eps]" in ended.text, ended.text


def of_megatron(checkpoint: Path) -> None:
    """Without what this package puts beside the weights."""
    shutil.rmtree(checkpoint / "hf")
    gone("files.json", "hf_source.json")(checkpoint)


def test_a_vocabulary_beyond_the_rows_of_a_checkpoint_is_refused(workspace):
    """Megatron pads it, so more rows than tokens are right, and fewer were filled with nothing."""
    for vocab_size, right in ((500, True), (520, False)):
        with changed(workspace / "hf", keys(vocab_size=vocab_size)), changed(workspace / "ckpt", of_megatron):
            ended = run(workspace, COMMANDS["train from checkpoint"][0], "model.make_vocab_size_divisible_by=1")
        said = "embedding.word_embeddings.weight is [503, 32], this model's vocabulary has 520 tokens"
        assert ended.code == 0 if right else ended.is_message and said in ended.text, ended.text


# --- configurations and command lines -------------------------------------------------------------------------------

LINES: dict[str, tuple[str, list[str]]] = {
    "world size 0": ("plan --config config.yaml --world-size 0", ["--world-size", "'0'"]),
    "negative": ("plan --config config.yaml --world-size -1", ["--world-size"]),
    "responses 0": ("plan --config config.yaml --world-size 1 --responses 0", ["--responses", "'0'"]),
    "groups huge": ("plan --config config.yaml --world-size 1 --groups 99999999999999999999", ["--groups"]),
    "prompt 0": ("plan --config config.yaml --world-size 1 --prompt-tokens 0", ["--prompt-tokens"]),
    "memory nan": ("plan --config config.yaml --world-size 1 --gpu-memory-gib nan", ["--gpu-memory-gib", "'nan'"]),
    "reserve": ("plan --config config.yaml --world-size 1 --reserve-gib 100", ["--reserve-gib 100"]),
    "tflops inf": ("plan --config config.yaml --world-size 1 --peak-tflops inf", ["--peak-tflops"]),
    "efficiency": ("plan --config config.yaml --world-size 1 --efficiency 0", ["--efficiency"]),
    "workers": ("score --input groups.jsonl --output OUT.jsonl --workers 99999999", ["--workers"]),
    "shard size": ("convert megatron-to-hf --checkpoint ckpt --output OUT --max-shard-gb nan", ["--max-shard-gb"]),
    "limit": (COMMANDS["columns"][0] + " --limit 99999999999999999999999", ["--limit"]),
    "no such key": ("train --config config.yaml max_sequence_tokens=1", ["max_sequence_tokens", "did you mean"]),
    "near key": ("train --config config.yaml data.max_sequence_tokens=1", ["did you mean data.max_"]),
    "far key": ("train --config config.yaml data.zzz=1", ["data.zzz: unknown key -> known there: data.train"]),
    "digits": (f"train --config config.yaml train.seed={'1' * 5000}", ["train.seed", "not valid YAML"]),
    "no such date": ("train --config config.yaml train.output=2001-13-45", ["train.output", "not valid YAML"]),
    "hub id": (
        "convert hf-to-megatron --hf meta-llama/Llama-3.1-8B --output OUT",
        ["hf download meta-llama/Llama-3.1-8B"],
    ),
    "hub id in config": ("train --config config.yaml model.config=Qwen/Qwen3-8B", ["hf download Qwen/Qwen3-8B"]),
    "hub id of weights": (
        "train --config config.yaml checkpoint.init_from=hf:Qwen/Qwen3-8B",
        ["hf download Qwen/Qwen3-8B"],
    ),
    "hub id to evaluate": (
        "evaluate --model Qwen/Qwen3-8B --problems prompts.jsonl --no-greedy",
        ["hf download Qwen/Qwen3-8B"],
    ),
    "hub id of tokenizer": (
        "preprocess --input groups.jsonl --tokenizer Qwen/Qwen3-8B --output-prefix OUT/p",
        ["hf download Qwen/Qwen3-8B"],
    ),
    "other cwd": ("train --config config.yaml model.config=examples/x/y", ["examples/x/y", "seen from"]),
    "no config": ("train --config absent.yaml", ["absent.yaml"]),
    "config a folder": ("plan --config hf --world-size 1", ["hf"]),
    "checkpoint a file": ("convert megatron-to-hf --checkpoint config.yaml --output OUT", ["config.yaml"]),
    "model a file": ("evaluate --model config.yaml --problems prompts.jsonl --no-greedy", ["config.yaml"]),
    "run a file": ("plot config.yaml --output OUT.svg", ["config.yaml"]),
    "no benchmark": ("bench kernels absent", ["'absent'", "kernels"]),
    "no GPU": ("gpu_check --output OUT.json", ["no CUDA device"]),
    "no mapping": ("import_groups --mapping absent --input rows.jsonl --output OUT.jsonl", ["absent", "openr1-math"]),
    "no name": ("compute_logprobs --config config.yaml --name sampled", ["--name", "'sampled'"]),
    "no run": ("plot absent --output OUT.svg", ["absent"]),
    "no shard": ("inspect absent", ["absent"]),
}


@pytest.mark.parametrize("case", LINES)
def test_command_lines_that_cannot_be(workspace, case):
    line, words = LINES[case]
    ended = run(workspace, line)
    assert ended.is_message and all(word in ended.text for word in words), ended.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- model\n", ["config.yaml", "list"]),
        ("model:\n\tconfig: hf\n", ["config.yaml", "line 2"]),
        ("model: {config: hf}\nmodel: {config: hf}\n", ["config.yaml", "'model' is given twice", "line 2"]),
        ("model:\n  config: hf\n  config: x\n", ["'config' is given twice", "line 3"]),
        ("model: &a [*a]\n", ["model"]),
        ("model: {config: hf}\n1: 2\n", ["config.yaml", "1"]),
        ("model: {config: [1]}\ntrain: {seed: 1e400}\n", ["config.yaml", "model.config", "train.seed"]),
        ("", ["config.yaml"]),
    ],
    ids=range(8),
)
def test_yaml_that_cannot_be(workspace, text, words):
    with changed(workspace / "config.yaml", into(text.encode())):
        ended = run(workspace, COMMANDS["train"][0])
    assert ended.is_message and all(word in ended.text for word in words), ended.text


@pytest.mark.parametrize("file", ["hf/config.json", "config.yaml", STEP + ".metadata"])
def test_files_that_may_not_be_read(workspace, file):
    workspace.parent.chmod(0o777)
    workspace.chmod(0o777)
    command = {STEP + ".metadata": "run to hf"}.get(file, "plan")
    with changed(workspace / file, lambda path: path.chmod(0)):
        ended = tool_runs.run(workspace, *COMMANDS[command][0].split(), as_nobody=True)
    assert ended.is_message and file in ended.text and "ermission" in ended.text, ended.text


@pytest.mark.slow
def test_a_real_process_ends_as_the_forks_do(workspace):
    line = [sys.executable, str(ROOT / "tools" / "plan.py"), "--config", "config.yaml", "--world-size", "0"]
    ended = subprocess.run(line, cwd=workspace, capture_output=True, text=True)
    assert ended.returncode == 2 and "--world-size" in ended.stderr and "Traceback" not in ended.stderr
    with changed(workspace / "hf", FOLDERS["no index"][0]):
        line = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), *COMMANDS["to megatron"][0].split()[1:]]
        ended = subprocess.run(line, cwd=workspace, capture_output=True, text=True)
    assert ended.returncode == 2 and INDEX in ended.stderr and "Traceback" not in ended.stderr
