"""Core attention: every backend and layout against a dense softmax written from the rule, values and gradients."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import run_ranks

from megatron_gft.attention import (
    CoreAttention,
    GatherRows,
    PackLayout,
    RMSNorm,
    TECoreAttention,
    flash_attention,
    masked_attention,
)

HEADS, CHANNELS = 4, 8
GPU_CHANNELS = 64  # a size that every kernel has

# Segments (start, length, prefix start, prefix length) of packs that hold every case.
LAYOUTS = {
    "one": [(0, 17, 0, 0)],
    "one row": [(0, 1, 0, 0)],
    "packed": [(0, 5, 0, 0), (5, 1, 0, 0), (6, 12, 0, 0), (18, 1, 0, 0)],
    "shared": [(0, 6, 0, 0), (6, 3, 0, 6), (9, 1, 0, 6), (10, 9, 0, 6)],
    "shared, padded prompt": [(0, 8, 0, 0), (8, 4, 0, 5), (12, 8, 0, 5)],
    "mixed": [(0, 7, 0, 0), (7, 9, 0, 0), (16, 2, 7, 9), (18, 1, 7, 9), (19, 1, 0, 0), (20, 3, 19, 1), (23, 4, 0, 0)],
    "one row prompt": [(0, 1, 0, 0), (1, 2, 0, 1), (3, 1, 0, 1)],
}
CP_LAYOUTS = {
    "packed": [(0, 8, 0, 0), (8, 16, 0, 0), (24, 8, 0, 0)],
    "shared": [(0, 16, 0, 0), (16, 8, 0, 11), (24, 16, 0, 11), (40, 8, 0, 0), (48, 8, 40, 1)],
}


def make_config(channels=CHANNELS, **fields) -> TransformerConfig:
    defaults = dict(num_layers=2, hidden_size=HEADS * channels, num_attention_heads=HEADS, attention_dropout=0.0)
    return TransformerConfig(**defaults | fields)


def make_module(cp_group=None, kind=CoreAttention, window=None, **fields) -> CoreAttention:
    fields.setdefault("context_parallel_size", cp_group.size() if cp_group else 1)
    if window is not None:
        fields["window_size"] = (window - 1, 0)
    groups = SimpleNamespace(cp=cp_group, tp=None)
    return kind(make_config(**fields), 1, AttnMaskType.causal, "self", pg_collection=groups)


def make_layout(segments, cp_size=1) -> PackLayout:
    return PackLayout(segments=torch.tensor(segments), cp_size=cp_size)


def make_inputs(rows, kv_heads, dtype=torch.float64, channels=CHANNELS):
    """query, key, value [T, 1, heads, d] with gradients, and an upstream gradient [T, 1, h * d]."""
    g = torch.Generator().manual_seed(0)
    shapes = [(rows, 1, heads, channels) for heads in (HEADS, kv_heads, kv_heads)]
    qkv = [torch.randn(shape, dtype=dtype, generator=g).requires_grad_() for shape in shapes]
    return qkv, torch.randn(rows, 1, HEADS * channels, dtype=dtype, generator=g)


def dense_attention(query, key, value, segments, window=None):
    """The rule itself: row i of a segment sees its prefix and its own rows up to i, the last ``window`` of these."""
    rows = len(query)
    visible = torch.zeros(rows, rows, dtype=torch.bool)
    for start, length, prefix_start, prefix_length in segments:
        for i in range(length):
            seen = [*range(prefix_start, prefix_start + prefix_length), *range(start, start + i + 1)]
            visible[start + i, seen[-window:] if window else seen] = True
    repeat = query.shape[2] // key.shape[2]
    k, v = (t[:, 0].repeat_interleave(repeat, dim=1) for t in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query[:, 0], k) / math.sqrt(query.shape[-1])
    probabilities = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, v).reshape(rows, 1, -1)


def value_and_gradients(out, inputs, upstream):
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def assert_equal(ours, expected, tolerance):
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


def dense_results(segments, kv_heads=2, window=None, channels=CHANNELS):
    """Inputs, upstream gradient, and value and gradients by the rule; float64."""
    inputs, upstream = make_inputs(sum(length for _, length, _, _ in segments), kv_heads, channels=channels)
    return inputs, upstream, value_and_gradients(dense_attention(*inputs, segments, window), inputs, upstream)


def check_module(segments, kv_heads=2, window=None):
    inputs, upstream, expected = dense_results(segments, kv_heads, window)
    module = make_module(num_query_groups=kv_heads, window=window)
    out = module(*inputs, None, packed_seq_params=make_layout(segments))
    assert_equal(value_and_gradients(out, inputs, upstream), expected, 1e-13)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_dense_attention(name, kv_heads):
    check_module(LAYOUTS[name], kv_heads)
    # The path that a GPU takes in fp32.
    inputs, upstream, expected = dense_results(LAYOUTS[name], kv_heads)
    index = make_layout(LAYOUTS[name]).varlen(0, upstream.device)
    out = masked_attention(*(t[:, 0] for t in inputs), index, CHANNELS**-0.5, None)
    assert_equal(value_and_gradients(out.reshape(len(out), 1, -1), inputs, upstream), expected, 1e-13)


@pytest.mark.parametrize("window", [1, 2, 5, 9, 40])
@pytest.mark.parametrize("name", LAYOUTS)
def test_sliding_window_counts_over_the_prefix(name, window):
    check_module(LAYOUTS[name], window=window)


def test_window_only_on_the_layers_that_have_it():
    config = make_config(window_size=(3, 0), window_attn_skip_freq=2)
    windows = [CoreAttention(config, layer, AttnMaskType.causal, "self").window for layer in (1, 2)]
    assert windows == [4, None]


@st.composite
def random_segments(draw, multiple=1):
    """Packs of prompts with up to three responses each, and of plain sequences."""
    lengths = st.integers(1, 6).map(lambda n: n * multiple)
    segments, end = [], 0
    for _ in range(draw(st.integers(1, 4))):
        prompt = draw(lengths)
        start, end = end, end + prompt
        segments.append((start, prompt, 0, 0))
        visible = draw(st.integers(max(1, prompt - multiple + 1), prompt))
        for length in draw(st.lists(lengths, max_size=3)):
            segments.append((end, length, start, visible))
            end += length
    return segments


@settings(max_examples=60, deadline=None)
@given(segments=random_segments())
def test_any_layout_equals_dense_attention(segments):
    check_module(segments)


@settings(max_examples=40, deadline=None)
@given(segments=random_segments(multiple=8), cp_size=st.sampled_from([1, 2, 4]))
def test_zigzag_shards_partition_the_pack(segments, cp_size):
    layout = make_layout(segments, cp_size)
    shards = [layout.rows(rank) for rank in range(cp_size)]
    assert len({len(shard) for shard in shards}) == 1
    gathered = torch.cat(shards)
    assert torch.equal(gathered[layout.ungather_index(torch.device("cpu"))], torch.arange(layout.tokens))
    # What a rank computes: as many visible pairs as any other, and all of them together.
    pairs = []
    for rank in range(cp_size):
        index = layout.varlen(rank, torch.device("cpu"))
        assert sum(index.q_lengths) == len(shards[rank])
        pairs.append(
            sum(q * (kv - q) + q * (q + 1) // 2 for q, kv in zip(index.q_lengths, index.kv_lengths, strict=True))
        )
    assert len(set(pairs)) == 1
    assert sum(pairs) == sum(n * prefix + n * (n + 1) // 2 for _, n, _, prefix in segments)


def _attend_on_rank(segments, window, cp_size, kind=CoreAttention):
    """Output and gradients of this rank, gathered in pack order; inputs are the same on every rank."""
    torch.manual_seed(0)
    layout = make_layout(segments, cp_size)
    inputs, upstream = make_inputs(layout.tokens, 2)
    rows = layout.rows(dist.get_rank())
    local = [t.detach()[rows].requires_grad_() for t in inputs]
    module = make_module(dist.group.WORLD, kind, window, num_query_groups=2)
    out = module(*local, None, packed_seq_params=layout)
    order = layout.ungather_index(upstream.device)
    parts = value_and_gradients(out, local, upstream[rows])
    return [gather_from_sequence_parallel_region(part, group=dist.group.WORLD)[order] for part in parts]


@pytest.mark.parametrize("window", [None, 3, 14])
@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("name", CP_LAYOUTS)
def test_context_parallel_is_exact(name, cp_size, window):
    _, _, expected = dense_results(CP_LAYOUTS[name], window=window)
    for result in run_ranks(cp_size, _attend_on_rank, CP_LAYOUTS[name], window, cp_size):
        assert_equal(result, expected, 1e-13)


def test_shared_prefix_gradients_equal_independent_sequences():
    """fp32: keys and values of a shared prompt collect what the copies of the prompt would."""
    prompt, lengths = 9, [4, 7, 1]
    segments, end = [(0, prompt, 0, 0)], prompt
    copies = []  # row of the shared pack behind each row of the independent sequences
    for length in lengths:
        copies += [*range(prompt), *range(end, end + length)]
        segments.append((end, length, 0, prompt))
        end += length
    inputs, upstream = make_inputs(end, 2, torch.float32)
    upstream[:prompt] = 0  # as in training: prompt rows carry no loss of their own
    module = make_module(num_query_groups=2)
    ours = value_and_gradients(module(*inputs, None, packed_seq_params=make_layout(segments)), inputs, upstream)
    independent, start = [], 0
    for length in lengths:
        independent.append((start, prompt + length, 0, 0))
        start += prompt + length
    rows = torch.tensor(copies)
    out = module(*(t[rows] for t in inputs), None, packed_seq_params=make_layout(independent))
    expected = value_and_gradients(out, inputs, upstream[rows])
    assert_equal([ours[0][rows], *ours[1:]], expected, 1e-6)


def test_prompt_rows_sum_their_gradients_in_float32():
    """64 responses read 3 prompt rows; a sum in half precision would be off by a percent and more."""
    index = torch.arange(3).repeat(64)
    rows = torch.randn(3, 2, 8).bfloat16().requires_grad_()
    grad = (torch.randn(192, 2, 8) + 1).bfloat16()
    gathered = GatherRows.apply(rows, index, torch.float32)
    assert torch.equal(gathered, rows[index])
    gathered.backward(grad)
    expected = torch.zeros(3, 2, 8, dtype=torch.float64).index_add_(0, index, grad.double())
    assert torch.equal(rows.grad, expected.bfloat16())
    twin = rows.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: GatherRows.apply(x, index, torch.float64), twin)


def test_bf16_stays_near_fp32():
    inputs, upstream = make_inputs(27, 2, torch.float32)
    module, layout = make_module(num_query_groups=2), make_layout(LAYOUTS["mixed"])
    expected = module(*inputs, None, packed_seq_params=layout)
    out = module(*(t.bfloat16() for t in inputs), None, packed_seq_params=layout)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() < 0.03


def test_meta_tensors_pass_for_planning():
    inputs, upstream = make_inputs(27, 2)
    inputs = [t.detach().to("meta").requires_grad_() for t in inputs]
    out = make_module(num_query_groups=2)(*inputs, None, packed_seq_params=make_layout(LAYOUTS["mixed"]))
    gradients = torch.autograd.grad(out, inputs, upstream.to("meta"))
    assert out.shape == upstream.shape and [g.shape for g in gradients] == [t.shape for t in inputs]


@pytest.mark.parametrize(
    "segments",
    [
        [(0, 3, 0, 0), (4, 2, 0, 0)],  # hole
        [(0, 0, 0, 0), (0, 2, 0, 0)],  # empty
        [(0, 3, 0, 0), (3, 2, 1, 4)],  # prefix reaches into its segment
        [(0, 3, 2, 1)],
    ],
)
def test_broken_segments_are_refused(segments):
    with pytest.raises(ValueError, match=r"tile|prefix"):
        make_layout(segments)


def test_layout_that_does_not_fit_is_refused():
    inputs, _ = make_inputs(16, 4)
    with pytest.raises(ValueError, match="does not fit"):
        make_module()(*inputs, None, packed_seq_params=make_layout([(0, 15, 0, 0)]))
    with pytest.raises(ValueError, match="multiples of 4"):
        make_layout([(0, 6, 0, 0)], cp_size=2)


def test_rms_norm_marks_its_weight_for_sequence_parallel_sums():
    config = make_config(tensor_model_parallel_size=2, sequence_parallel=True)
    norm = RMSNorm(config, 8, eps=1e-6)
    assert norm.weight.sequence_parallel and norm.eps == 1e-6
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm.double()(x), expected)


class StandInForTE(torch.nn.Module):
    """What Megatron's wrapper of TE is called with, computed entry by entry from the lengths alone."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **options):
        super().__init__()
        assert config.context_parallel_size == 1 and (layer_number, attention_type) == (1, "self")

    def forward(self, query, key, value, attention_mask, attn_mask_type, *, packed_seq_params):
        p = packed_seq_params
        assert p.qkv_format == "thd" and attention_mask is None
        lengths = [cu.diff().tolist() for cu in (p.cu_seqlens_q, p.cu_seqlens_kv)]
        longest = (p.max_seqlen_q, p.max_seqlen_kv)
        assert all(0 <= most - max(of) < 64 and most % 64 == 0 for most, of in zip(longest, lengths, strict=True))
        assert {cu.dtype for cu in (p.cu_seqlens_q, p.cu_seqlens_kv)} == {torch.int32}
        names = {True: "padding_causal", False: "padding_causal_bottom_right"}
        assert attn_mask_type.name == names[lengths[0] == lengths[1]]
        outputs = []
        pieces = zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True)
        for q, k, v in pieces:
            rows = torch.cat((q.new_zeros(len(k) - len(q), *q.shape[1:]), q))
            inputs = (t[:, None] for t in (rows, k, v))
            outputs.append(dense_attention(*inputs, [(0, len(k), 0, 0)])[len(k) - len(q) :])
        return torch.cat(outputs).flatten(1)


def _attend_with_stand_in(segments, cp_size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron.core.extensions.transformer_engine.TEDotProductAttention", StandInForTE)
        return _attend_on_rank(segments, None, cp_size, TECoreAttention)


@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize("name", CP_LAYOUTS)
def test_transformer_engine_gets_lengths_that_mean_the_layout(name, cp_size):
    _, _, expected = dense_results(CP_LAYOUTS[name])
    for result in run_ranks(cp_size, _attend_with_stand_in, CP_LAYOUTS[name], cp_size):
        assert_equal(result, expected, 1e-13)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 5, 9])
@pytest.mark.parametrize("name", LAYOUTS)
def test_flash_equals_reference_on_gpu(name, window):
    """Also says that the kernel's causal mask is aligned to the bottom right, and its window likewise."""
    inputs, upstream, expected = dense_results(LAYOUTS[name], window=window, channels=GPU_CHANNELS)
    half = [t.detach().cuda().bfloat16().requires_grad_() for t in inputs]
    index = make_layout(LAYOUTS[name]).varlen(0, torch.device("cuda", torch.cuda.current_device()))
    out = flash_attention(*(t[:, 0] for t in half), index, GPU_CHANNELS**-0.5, window)
    ours = value_and_gradients(out.reshape(upstream.shape), half, upstream.cuda().bfloat16())
    assert_equal([t.cpu().double() for t in ours], expected, 0.04)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5])
def test_module_equals_reference_on_gpu(dtype, window):
    inputs, upstream, expected = dense_results(LAYOUTS["mixed"], window=window, channels=GPU_CHANNELS)
    moved = [t.detach().cuda().to(dtype).requires_grad_() for t in inputs]
    module = make_module(channels=GPU_CHANNELS, num_query_groups=2, window=window)
    out = module(*moved, None, packed_seq_params=make_layout(LAYOUTS["mixed"]))
    ours = value_and_gradients(out, moved, upstream.cuda().to(dtype))
    assert_equal([t.cpu().double() for t in ours], expected, 1e-5 if dtype == torch.float32 else 0.04)


def _transformer_engine_on_gpu(name, window):
    """Runs in a rank of its own: Megatron's wrapper wants process groups."""
    segments = LAYOUTS[name]
    inputs, upstream, expected = dense_results(segments, window=window, channels=GPU_CHANNELS)
    fields = {} if window is None else {"window_size": (window - 1, 0)}
    groups = SimpleNamespace(cp=dist.group.WORLD, tp=dist.group.WORLD)
    config = make_config(GPU_CHANNELS, num_query_groups=2, bf16=True, params_dtype=torch.bfloat16, **fields)
    module = TECoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
    half = [t.detach().cuda().bfloat16().requires_grad_() for t in inputs]
    out = module(*half, None, packed_seq_params=make_layout(segments))
    ours = value_and_gradients(out, half, upstream.cuda().bfloat16())
    assert_equal([t.cpu().double() for t in ours], expected, 0.04)
    return list(module.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("name", LAYOUTS)
def test_transformer_engine_equals_reference_on_gpu(name, window, tmp_path):
    pytest.importorskip("transformer_engine.pytorch")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        assert _transformer_engine_on_gpu(name, window) == []
    finally:
        dist.destroy_process_group()
