"""Hugging Face weights in live Megatron models: same logits, same bytes back, at every layout and layer spec."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from te_shaped import build_rank
from tiny_models import (
    MODELS,
    MOE_MODELS,
    assert_same_tensors,
    build_gpt,
    compare_logits,
    export,
    hf_tensors,
    world_size,
    write_large_model,
)

from megatron_gft.config import ModelConfig, ObjectiveConfig, ParallelConfig
from megatron_gft.conversion import convert
from megatron_gft.conversion.verify import plain_pack
from megatron_gft.errors import InputError
from megatron_gft.hf.files import scatter_rows
from megatron_gft.hf.mapping import HfMapping
from megatron_gft.hf.safetensors_io import REOPEN_BYTES, SafetensorsFolder
from megatron_gft.hf.shape import model_shape_from_config, read_model_shape
from megatron_gft.hf.weights import load_hf_weights
from megatron_gft.model import build_model
from megatron_gft.parallel import initialize_parallel, seed_everything
from tools.bench.head import peak, reset_peak

SHARD_BYTES = 300_000


def load_run_export(folder, output, layout, spec):
    """On every rank: load, logits of the sample tokens, export; returns how far the logits are from transformers'."""
    parallel, shape, chunks = build_rank(folder, layout, spec)
    load_hf_weights(chunks, shape, folder, parallel)
    logits = tiny_models.megatron_logits(chunks, tiny_models.sample_tokens(), parallel)
    export(chunks, parallel, output, folder, max_shard_bytes=SHARD_BYTES)
    return None if logits is None else compare_logits(logits, tiny_models.reference_logits(folder))


def check_layout(folder: Path, output: Path, layout: dict, spec: str = "local") -> None:
    tiny_models.reference_logits(folder)  # in the parent, so that the ranks share it
    results = run_ranks(world_size(layout), load_run_export, folder, output, layout, spec)
    compared = [result for result in results if result is not None]
    assert compared
    for relative, same_top in compared:
        assert relative < 1e-4 and same_top == 1.0
    assert_same_tensors(folder, output)


LAYOUTS = [{"tp": 1}, {"tp": 2}, {"pp": 2}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_same_logits_and_same_bytes_back(tiny, tmp_path, name, layout):
    """The odd vocabulary is padded at each layout; config.json comes in both styles."""
    style = "tf5" if layout == {"pp": 2} else "tf4"
    check_layout(tiny(name, style), tmp_path / "out", layout)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama3", {"tp": 2, "pp": 2}),
        ("qwen2", {"pp": 2, "vpp": 2}),  # tied: the last stage holds a copy of the embedding
        ("qwen3_moe", {"tp": 2, "pp": 2}),
        ("qwen3_moe", {"ep": 2}),
        ("mixtral", {"ep": 2}),
        ("qwen3_moe", {"tp": 2, "ep": 2, "etp": 1}),
        ("mixtral", {"tp": 2, "etp": 2}),
    ],
    ids=str,
)
def test_mixed_layouts(tiny, tmp_path, name, layout):
    check_layout(tiny(name), tmp_path / "out", layout)


@pytest.mark.slow
@pytest.mark.parametrize("name", MOE_MODELS)
def test_tensor_pipeline_and_expert_parallel_together(tiny, tmp_path, name):
    check_layout(tiny(name), tmp_path / "out", {"tp": 2, "pp": 2, "ep": 2, "etp": 1})


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=str)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe"])
def test_transformer_engine_names(tiny, tmp_path, name, layout):
    check_layout(tiny(name), tmp_path / "out", layout, spec="te")


def train_model(folder, precision, tp=1):
    """(parallel, shape, chunks) of the training model of this rank, loaded."""
    parallel = initialize_parallel(tp=tp)
    seed_everything(0, parallel)
    shape = read_model_shape(folder)
    config = ModelConfig(config=str(folder), precision=precision, backend="local")
    _, chunks = build_model(shape, config, ObjectiveConfig(), ParallelConfig(tp=tp), parallel)
    load_hf_weights(chunks, shape, folder, parallel)
    return parallel, shape, chunks


def gft_model_logits(folder, output, tp):
    """As :func:`load_run_export` with the training model, one pack."""
    parallel, shape, chunks = train_model(folder, "fp32", tp)
    with torch.no_grad():
        local = chunks[0].eval().logits(plain_pack(tiny_models.sample_tokens()[0]))
    parts = [torch.empty_like(local) for _ in range(parallel.tp_size)]
    torch.distributed.all_gather(parts, local.contiguous(), group=parallel.tp_group)
    export(chunks, parallel, output, folder)
    return compare_logits(torch.cat(parts, dim=-1), tiny_models.reference_logits(folder)[0])


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_fewer_kv_groups_than_tensor_parallel_ranks(tiny, tmp_path, name):
    """TP 4 with 2 KV groups: a shard is half a group; Megatron gathers before it splits."""
    folder = tiny(name)
    tiny_models.reference_logits(folder)
    for relative, same_top in run_ranks(4, gft_model_logits, folder, tmp_path / "out", 4):
        assert relative < 1e-4 and same_top == 1.0
    assert_same_tensors(folder, tmp_path / "out")


def test_transformers_loads_the_export(tiny, tmp_path):
    folder, output = tiny("qwen2"), tmp_path / "out"
    check_layout(folder, output, {"tp": 2})
    tokens = tiny_models.sample_tokens()
    assert torch.equal(tiny_models.hf_logits(output, tokens), tiny_models.reference_logits(folder))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (folder / name).read_bytes()
    assert len(list(output.glob("model-*.safetensors"))) > 2


def half_round_trip(folder, output, dtype):
    parallel, shape, chunks = train_model(folder, "bf16")
    export(chunks, parallel, output, folder, dtype=dtype)
    return {type(chunk).__name__ for chunk in chunks}


def test_bfloat16_through_wrappers_and_dtype_on_export(tmp_path):
    folder = tiny_models.write_tiny_model(tmp_path / "hf", "llama3", dtype=torch.bfloat16)
    assert run_ranks(1, half_round_trip, folder, tmp_path / "kept", None) == [{"Float16Module"}]
    assert_same_tensors(folder, tmp_path / "kept")
    run_ranks(1, half_round_trip, folder, tmp_path / "wide", torch.float32)
    source = hf_tensors(folder)
    for name, tensor in hf_tensors(tmp_path / "wide").items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, source[name].float())
    assert '"float32"' in (tmp_path / "wide" / "config.json").read_text()


def bytes_read_by_a_rank(folder, layout):
    parallel, shape, chunks = build_rank(folder, layout)
    seen = 0
    read = SafetensorsFolder.read

    def counting(self, *args):
        nonlocal seen
        tensor = read(self, *args)
        seen += tensor.nbytes
        return tensor

    SafetensorsFolder.read = counting
    load_hf_weights(chunks, shape, folder, parallel)
    held = sum(p.nbytes for p in chunks[0].parameters())
    return seen, held


def test_a_rank_reads_only_what_it_holds(tiny):
    folder = tiny("llama3")
    for seen, held in run_ranks(4, bytes_read_by_a_rank, folder, {"tp": 2, "pp": 2}):
        assert 0.9 * held < seen <= held


def flip_a_bit(write):
    def flipped(name, tensor):
        if name == "model.layers.2.mlp.up_proj.weight":
            tensor = tensor.clone()
            tensor.view(torch.int32)[3, 5] ^= 1
        return name, tensor

    return lambda path, layouts, tensors: write(path, layouts, itertools.starmap(flipped, tensors))


def fill_the_disk(write):
    def full(path, layouts, tensors):
        raise OSError(28, "No space left on device")

    return full


def export_with_a_bad_writer(folder, output, layout, failing_rank, damage, message):
    parallel, shape, chunks = build_rank(folder, layout)
    if parallel.rank == failing_rank:
        convert.write_shard = damage(convert.write_shard)
    with pytest.raises(InputError, match=message):
        export(chunks, parallel, output, folder)
    return sorted(path.name for path in output.parent.iterdir())


@pytest.mark.parametrize(
    ("layout", "failing_rank", "damage", "message"),
    [
        ({}, 0, flip_a_bit, r"model\.layers\.2\.mlp\.up_proj\.weight read back differs"),
        ({"tp": 2, "pp": 2}, 0, fill_the_disk, "No space left"),
        ({"tp": 2, "pp": 2}, 2, fill_the_disk, "No space left"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_bad_write_on_one_rank_ends_the_export_on_all(tiny, tmp_path, layout, failing_rank, damage, message):
    arguments = (layout, failing_rank, damage, message)
    left = run_ranks(world_size(layout), export_with_a_bad_writer, tiny("llama3"), tmp_path / "out", *arguments)
    assert left[0] == ["out-checkpoint"]


def load_with_another_shape(folder):
    parallel = initialize_parallel()
    shape = dataclasses.replace(read_model_shape(folder), ffn_hidden_size=128)
    chunks = build_gpt(shape, parallel)
    with pytest.raises(InputError) as refused:
        load_hf_weights(chunks, read_model_shape(folder), folder, parallel)
    return str(refused.value)


def test_a_model_of_another_shape_is_refused(tiny):
    [message] = run_ranks(1, load_with_another_shape, tiny("llama3"))
    assert "linear_fc1.weight is (256, 64), by the Hugging Face model (352, 64)" in message


@settings(deadline=None)
@given(
    heads_per_group=st.integers(1, 4),
    groups=st.integers(1, 8),
    head=st.integers(1, 4),
    tp=st.integers(1, 8),
    length=st.integers(1, 40),
)
def test_qkv_shards_are_the_rows_of_the_interleaved_matrix(heads_per_group, groups, head, tp, length):
    """For any sizes and any range of rows, also where a shard is a part of a KV group."""
    tp = tp if groups * (heads_per_group + 2) * head % tp == 0 else 1
    config = dict(MODELS["llama3"][1], model_type="llama")
    shape = dataclasses.replace(
        model_shape_from_config(config, "test"),
        num_attention_heads=groups * heads_per_group,
        num_query_groups=groups,
        kv_channels=head,
        num_layers=1,
    )
    mapping = HfMapping(shape)
    entry = mapping.entry("decoder.layers.0.self_attention.linear_qkv.weight")
    sources = [torch.arange(size[0]) + 1000 * i for i, size in enumerate(entry.source_shapes)]
    blocks = [source.view(groups, -1) for source in sources]
    interleaved = torch.cat(blocks, dim=1).flatten()
    found = [torch.full_like(source, -1) for source in sources]
    for rank in range(tp):
        shard = mapping.shard(entry, rank, tp)
        local = torch.cat([sources[p.source][p.start : p.stop] for p in shard.pieces])
        assert torch.equal(local, interleaved.view(tp, -1)[rank])
        for begin in range(0, len(local), length):
            scatter_rows(found, shard, local[begin : begin + length], begin)
    assert all(torch.equal(one, other) for one, other in zip(found, sources, strict=True))


def memory_of_loading(folder):
    parallel = initialize_parallel(tp=2)
    shape = read_model_shape(folder)
    chunks = build_gpt(shape, parallel, params_dtype=torch.bfloat16, perform_initialization=False)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.zero_()  # touch every page: what loading adds is its own
    before = reset_peak()
    load_hf_weights(chunks, shape, folder, parallel)
    return peak() - before, sum(parameter.nbytes for parameter in chunks[0].parameters())


def test_loading_needs_little_memory_beyond_the_shard(tmp_path):
    """The goal: at most three times the largest tensor (25 MB) beyond the shard; mapped file pages count."""
    folder = write_large_model(tmp_path / "hf")
    largest = max(info.num_bytes for info in SafetensorsFolder(folder).tensors.values())
    for most, held in run_ranks(2, memory_of_loading, folder):
        assert held > 2e8 and most < 3 * largest + REOPEN_BYTES
