"""Conversions that must fail: one message that names the cause, and nothing left behind."""

import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny_models import hf_tensors, write_tiny_model

from megatron_gft.checkpoints import torch_dist
from megatron_gft.checkpoints.checkpointer import load_weights
from megatron_gft.checkpoints.torch_dist import TorchDistReader
from megatron_gft.checkpoints.verification import write_file_hashes
from megatron_gft.conversion import convert
from megatron_gft.conversion.convert import hf_to_megatron, megatron_to_hf
from megatron_gft.errors import InputError


@pytest.fixture
def broken(tiny, tmp_path):
    """A copy of a model folder, to be damaged."""
    return Path(shutil.copytree(tiny("llama3"), tmp_path / "broken"))


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def edit(folder, name, new):
    """Put ``new(old tensor or None)`` under ``name`` into its shard, a new name into the first; None takes it out."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = folder / index["weight_map"].setdefault(name, shards(folder)[0].name)
    tensors = load_file(file)
    tensor = new(tensors.pop(name, None))
    if tensor is None:
        del index["weight_map"][name]
    save_file(tensors if tensor is None else tensors | {name: tensor}, file, metadata={"format": "pt"})
    path.write_text(json.dumps(index))


def index_absent_tensor(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"ghost": shards(folder)[0].name}}))


def remove_weights(folder):
    for file in [*shards(folder), folder / "model.safetensors.index.json"]:
        file.unlink()


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGES = {
    "shard gone": (lambda f: shards(f)[1].unlink(), r"shard model-00002\S* is missing"),
    "end cut": (
        lambda f: os.truncate(shards(f)[1], shards(f)[1].stat().st_size - 100),
        r"model-00002\S* is damaged or truncated",
    ),
    "header cut": (lambda f: os.truncate(shards(f)[0], 4), r"model-00001\S* is damaged or truncated"),
    "index": (index_absent_tensor, "names tensor ghost, which model-00001"),
    "shape": (
        lambda f: edit(f, UP, lambda t: t[:-1].clone()),
        r"up_proj\.weight in model-.* is \[175, 64\], by config\.json \[176, 64\]",
    ),
    "extra tensor": (
        lambda f: edit(f, "model.extra.weight", lambda _: torch.ones(3)),
        r"model\.extra\.weight in model-.* has no place in LlamaForCausalLM",
    ),
    "tensor gone": (lambda f: edit(f, "model.norm.weight", lambda _: None), r"model\.norm\.weight is missing"),
    "dtypes": (
        lambda f: edit(f, UP, torch.Tensor.half),
        r"linear_fc1\.weight: its tensors are torch\.float16, torch\.float32 -> .*--dtype",
    ),
    "no weights": (remove_weights, r"neither model\.safetensors nor model\.safetensors\.index\.json"),
    "integers": (lambda f: edit(f, UP, lambda _: torch.ones(3).long()), "has dtype I64"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_sources_are_named_and_leave_nothing(broken, tmp_path, damage, message):
    damage(broken)
    with pytest.raises(InputError, match=message):
        hf_to_megatron(broken, tmp_path / "ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_an_existing_output_is_never_touched(tiny, tmp_path):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "mine").write_text("keep")
    with pytest.raises(InputError, match="exists already"):
        hf_to_megatron(tiny("llama3"), tmp_path / "ckpt")
    assert (tmp_path / "ckpt" / "mine").read_text() == "keep"


def test_a_duplicate_of_a_tied_embedding_is_accepted_only_if_equal(tmp_path):
    folder = write_tiny_model(tmp_path / "hf", "llama_tied_linear", tie_word_embeddings=True)
    embedding = hf_tensors(folder)["model.embed_tokens.weight"]
    edit(folder, "lm_head.weight", lambda _: embedding)
    hf_to_megatron(folder, tmp_path / "equal")
    edit(folder, "lm_head.weight", lambda tensor: tensor * 2)
    with pytest.raises(InputError, match=r"lm_head\.weight in .* has no place"):
        hf_to_megatron(folder, tmp_path / "different")


def convert_with_a_file_limit(folder, output, limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(InputError, match=rf"{output}: writing failed .*File too large"):
        if (folder / ".metadata").is_file():
            megatron_to_hf(folder, output)
        else:
            hf_to_megatron(folder, output)
    return sorted(path.name for path in output.parent.iterdir())


def test_a_write_error_ends_in_one_message_and_nothing_left(tiny, tmp_path):
    """A file size limit stands in for a full disk: the write fails halfway."""
    folder = tiny("llama3")
    hf_to_megatron(folder, tmp_path / "ckpt")
    for source in (folder, tmp_path / "ckpt"):
        left = run_ranks(1, convert_with_a_file_limit, source, tmp_path / "out" / "x", 400_000)
        assert left == [[]]


def test_a_disk_too_small_is_noticed_before_writing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(InputError, match=r"needs 0\.00 GB, the disk has 0\.00 GB free"):
        hf_to_megatron(tiny("llama3"), tmp_path / "ckpt")
    assert not list(tmp_path.iterdir())


def test_bits_that_change_on_the_way_fail_the_conversion(tiny, tmp_path, monkeypatch):
    """In both directions: written data that read back differently, and a checkpoint that was altered later."""
    folder = tiny("llama3")
    hf_to_megatron(folder, tmp_path / "ckpt")

    write_data = torch_dist._StreamPlanner.resolve_data

    def flip(self, item):
        tensor = write_data(self, item)
        if item.index.fqn == "decoder.layers.self_attention.linear_proj.weight" and item.index.offset[0] == 2:
            tensor.view(torch.int32)[0, 0, 0] ^= 1
        return tensor

    with monkeypatch.context() as patch:
        patch.setattr(torch_dist._StreamPlanner, "resolve_data", flip)
        with pytest.raises(InputError, match=r"model\.layers\.2\.self_attn\.o_proj\.weight read back differs"):
            hf_to_megatron(folder, tmp_path / "other")
        hf_to_megatron(folder, tmp_path / "unverified", verify="off")
    assert not (tmp_path / "other").exists()
    shutil.copy(tmp_path / "ckpt" / "hf_source.json", tmp_path / "unverified")
    write_file_hashes(tmp_path / "unverified")
    with pytest.raises(InputError, match=r"o_proj\.weight read back differs"):
        megatron_to_hf(tmp_path / "unverified", tmp_path / "back")
    write = convert.write_shard

    def flip_shard(path, layouts, tensors):
        changed = ((name, tensor + 1 if name == "model.norm.weight" else tensor) for name, tensor in tensors)
        write(path, layouts, changed)

    monkeypatch.setattr(convert, "write_shard", flip_shard)
    with pytest.raises(InputError, match=r"model\.norm\.weight read back differs"):
        megatron_to_hf(tmp_path / "ckpt", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_damaged_checkpoints_are_named(tiny, tmp_path):
    folder, checkpoint = tiny("llama3"), tmp_path / "ckpt"
    hf_to_megatron(folder, checkpoint)
    content = (checkpoint / "__0_0.distcp").read_bytes()
    loose = Path(shutil.copytree(checkpoint, tmp_path / "loose"))  # as earlier versions converted: only reading tells
    (loose / "files.json").unlink()
    set_format(loose, 1)
    for folder in (checkpoint, loose):
        data, metadata = folder / "__0_0.distcp", folder / ".metadata"
        data.write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match=r"__0_0\.distcp( has|: damaged or missing)"):
            megatron_to_hf(folder, tmp_path / "back")
        data.unlink()
        with pytest.raises(InputError, match=r"__0_0\.distcp( is missing|: damaged or missing)"):
            megatron_to_hf(folder, tmp_path / "back")
        metadata.write_bytes(b"\x80")
        with pytest.raises(InputError, match=r"\.metadata(: damaged| has 1 bytes)"):
            megatron_to_hf(folder, tmp_path / "back")
    with pytest.raises(InputError, match=r"no \.metadata there"):
        TorchDistReader(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt", "loose"}


def set_format(checkpoint, number):
    path = checkpoint / "hf_source.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": number}))


def test_every_changed_byte_of_a_checkpoint_is_found(tiny, tmp_path):
    """On both ways in: by the converter, and as ``checkpoint.init_from``. A change of files.json may be one of a name
    or a number that is then wrong, or leave its meaning."""
    checkpoint = tmp_path / "ckpt"
    hf_to_megatron(tiny("llama3"), checkpoint)
    written = json.loads((checkpoint / "files.json").read_text())
    ways = (lambda: megatron_to_hf(checkpoint, tmp_path / "out"), lambda: load_weights(checkpoint, [], None))
    rng = random.Random(1)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert set(written) == {str(path.relative_to(checkpoint)) for path in files} - {"files.json"}
    for path in files:
        content = path.read_bytes()
        damages = [content[:-1], content + b"\n", b"", *(None for _ in ways)]
        for position in [0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(8))]:
            flipped = content[position] ^ 1 << rng.randrange(8)
            damages.append(content[:position] + bytes([flipped]) + content[position + 1 :])
        for number, damage in enumerate(damages):
            path.unlink() if damage is None else path.write_bytes(damage)
            if damage is not None and path.name == "files.json" and same_json(damage, written):
                continue
            with pytest.raises(InputError) as caught:
                ways[number % 2]()
            assert path.name in str(caught.value) or path.name == "files.json"
            path.write_bytes(content)
        path.write_bytes(content)
    ways[0]()


def same_json(text: bytes, value) -> bool:
    try:
        return json.loads(text) == value
    except ValueError:
        return False


def test_files_of_a_checkpoint_that_changed_places_are_found(tiny, tmp_path):
    checkpoint = tmp_path / "ckpt"
    hf_to_megatron(tiny("llama3"), checkpoint)
    one, two = checkpoint / "common.pt", checkpoint / "metadata.json"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(InputError, match=r"common\.pt has(?s:.)*metadata\.json has"):
        load_weights(checkpoint, [], None)


@pytest.mark.parametrize("text", ["[]", '"x"', "{}", '{"format": "2", "tensors_sha256": {}}', '{"format": 1}', "\x00"])
def test_a_source_record_that_is_none_is_refused(tiny, tmp_path, text):
    hf_to_megatron(tiny("llama3"), tmp_path / "ckpt")
    (tmp_path / "ckpt" / "files.json").unlink()
    (tmp_path / "ckpt" / "hf_source.json").write_text(text)
    with pytest.raises(InputError, match=r"hf_source\.json: (not a source record|not valid JSON|holds (list|str))"):
        megatron_to_hf(tmp_path / "ckpt", tmp_path / "back")


def test_a_checkpoint_of_another_model_is_refused(tiny, tmp_path):
    """By its config.json; where it has none, by its tensors."""
    for name, other in (("llama3", "qwen3"), ("qwen3", "llama3")):
        hf_to_megatron(tiny(name), tmp_path / name)
        with pytest.raises(InputError, match=r"(?s)not the config\.json of this model.*model_type: .*rope_theta: "):
            megatron_to_hf(tmp_path / name, tmp_path / "back", hf_dir=tiny(other))
        shutil.rmtree(tmp_path / name / "hf")
        for file in ("files.json", "hf_source.json"):
            (tmp_path / name / file).unlink()
    with pytest.raises(InputError, match=r"decoder\.layers\.self_attention\.q_layernorm\.weight is missing"):
        megatron_to_hf(tmp_path / "llama3", tmp_path / "back", hf_dir=tiny("qwen3"))
    with pytest.raises(InputError, match=r"q_layernorm\.weight has no place in LlamaForCausalLM"):
        megatron_to_hf(tmp_path / "qwen3", tmp_path / "back", hf_dir=tiny("llama3"))
