"""Tiny random Hugging Face models of every family, their logits, and Megatron's GPTModel for them.

Norms and biases are random: transformers starts them at ones and zeros, which hides most mapping mistakes.
Both config.json styles are written: transformers 4 (``rope_theta``) and transformers 5 (``rope_parameters``).
"""

import functools
import json
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_gft.attention import RMSNorm
from megatron_gft.conversion.convert import megatron_to_hf
from megatron_gft.hf.mapping import HfMapping
from megatron_gft.hf.shape import (
    ModelShape,
    gpt_model_kwargs,
    model_shape_from_config,
    padded_vocab_size,
    transformer_config_kwargs,
)
from megatron_gft.parallel import Parallel, seed_everything

VOCAB_SIZE = 503  # odd: padded at every layout
POSITIONS = (2, 128)

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _rope(theta: float, **scaling) -> dict:
    return {"rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})}}


_MOE = {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

MODELS: dict[str, tuple[str, dict]] = {
    "llama3": ("Llama", {**_COMMON, "max_position_embeddings": 131072, **_rope(500000.0, **_LLAMA3_ROPE)}),
    "llama_tied_linear": (
        "Llama",
        {**_COMMON, "tie_word_embeddings": True, **_rope(10000.0, rope_type="linear", factor=2.0)},
    ),
    "qwen2": ("Qwen2", {**_COMMON, "tie_word_embeddings": True, **_rope(1000000.0)}),
    "qwen3": ("Qwen3", {**_COMMON, "head_dim": 32, **_rope(1000000.0)}),
    "mistral": ("Mistral", {**_COMMON, "head_dim": 16, "sliding_window": 32, **_rope(10000.0)}),
    "qwen3_moe": ("Qwen3Moe", {**_COMMON, **_MOE, "norm_topk_prob": True, **_rope(1000000.0)}),
    "qwen3_moe_raw_probs": ("Qwen3Moe", {**_COMMON, **_MOE, "norm_topk_prob": False, **_rope(1000000.0)}),
    "mixtral": (
        "Mixtral",
        {**_COMMON, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **_rope(1000000.0)},
    ),
}
MOE_MODELS = ("qwen3_moe", "qwen3_moe_raw_probs", "mixtral")


def to_transformers4_style(config: dict) -> dict:
    """The config.json that transformers 4 would have written, which most models on the hub still have."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    if config["model_type"] == "qwen3_moe" and "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    config["transformers_version"] = "4.51.0"
    return config


def write_tiny_model(
    folder: Path,
    name: str,
    *,
    style: str = "tf4",
    dtype: torch.dtype = torch.float32,
    embedding_std: float = 1.0,
    trunk_scale: float = 1.5,
    head_scale: float = 1.5,
    **changes,
) -> Path:
    """Write model ``name`` of :data:`MODELS` with random weights, a tokenizer and several shards."""
    family, options = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**options, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in key:
                parameter.copy_(1 + 0.3 * noise)
            elif key.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed" in key:
                parameter.copy_(noise * embedding_std)
            else:
                scale = head_scale if "lm_head" in key else trunk_scale
                parameter.copy_(noise * scale / parameter.shape[-1] ** 0.5)
    model.to(dtype).save_pretrained(folder, max_shard_size="300KB")
    write_tiny_tokenizer(folder)
    if style == "tf4":
        path = folder / "config.json"
        path.write_text(json.dumps(to_transformers4_style(json.loads(path.read_text())), indent=2))
    return folder


def write_large_model(folder: Path) -> Path:
    """A random Llama in bfloat16 of 0.7 GB, whose largest tensors have 25 MB; returns the folder."""
    large = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 8, "num_attention_heads": 16}
    config = {**_COMMON, **large, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4000}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = HfMapping(model_shape_from_config(config, "large")).hf_shapes
    # random bits in an exponent range without NaN: several times faster than normal numbers
    bits = {name: torch.randint(-(2**15), 2**15, shape, dtype=torch.int16) & -16385 for name, shape in shapes.items()}
    save_file({name: value.view(torch.bfloat16) for name, value in bits.items()}, folder / "model.safetensors")
    return folder


def write_tiny_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)


def sample_tokens() -> torch.Tensor:
    """256 token ids, [b, s]."""
    return torch.randint(0, VOCAB_SIZE, POSITIONS, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def hf_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [b, s, v] of the real transformers class in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()(tokens).logits


def megatron_config(shape: ModelShape, parallel: Parallel, **extra) -> TransformerConfig:
    """float32, nothing fused, the layout of ``parallel``."""
    kwargs = transformer_config_kwargs(shape) | {
        "activation_func": torch.nn.functional.silu,
        "tensor_model_parallel_size": parallel.tp_size,
        "pipeline_model_parallel_size": parallel.pp_size,
        "virtual_pipeline_model_parallel_size": parallel.vp_size,
        "expert_model_parallel_size": parallel.ep_size,
        "expert_tensor_parallel_size": parallel.etp_size,
        "sequence_parallel": parallel.tp_size > 1 and bool(shape.num_moe_experts),
        "pipeline_dtype": torch.float32,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
    }
    return TransformerConfig(**(kwargs | extra))


def local_layer_spec(config: TransformerConfig):
    """Megatron's own local layer with a norm that takes sequence parallel."""
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16.1 reads it without defining it
        moe_utils.te_general_gemm = None
    layer = get_gpt_layer_local_spec(
        normalization="RMSNorm", qk_layernorm=config.qk_layernorm, num_experts=config.num_moe_experts
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer


def build_gpt(
    shape: ModelShape, parallel: Parallel, layer_spec=local_layer_spec, divisible_by: int = 8, **extra
) -> list[GPTModel]:
    """Stock GPTModel chunks of this rank, randomly initialised."""
    seed_everything(1234, parallel)
    config = megatron_config(shape, parallel, **extra)
    chunks = []
    for vp_stage in [None] if parallel.vp_size is None else range(parallel.vp_size):
        first, last = parallel.stage_bounds(vp_stage)
        layers = [layer_spec(config)] * get_num_layers_to_build(config, vp_stage=vp_stage)
        spec = TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
        chunk = GPTModel(
            config,
            spec,
            vocab_size=padded_vocab_size(shape.vocab_size, parallel.tp_size, divisible_by),
            pre_process=first,
            post_process=last,
            vp_stage=vp_stage,
            **gpt_model_kwargs(shape),
        )
        chunks.append(chunk.eval())
    return chunks


@torch.no_grad()
def megatron_logits(chunks: list[GPTModel], tokens: torch.Tensor, parallel: Parallel) -> torch.Tensor | None:
    """Logits [b, s, padded v] on every rank of the last pipeline stage, None elsewhere.

    The hidden states walk through the (virtual) stages by broadcast over the pipeline group.
    """
    batch, length = tokens.shape
    positions = torch.arange(length)[None].expand(batch, -1)
    future = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)[None, None]
    config = chunks[0].config
    rows = length // parallel.tp_size if config.sequence_parallel else length
    hidden = torch.empty(rows, batch, config.hidden_size)
    output = None
    for chunk in chunks:
        for stage in range(parallel.pp_size):
            if stage == parallel.pp_rank:
                chunk.set_input_tensor(None if chunk.pre_process else hidden)
                output = chunk(tokens, positions, future)
                hidden = hidden if chunk.post_process else output.contiguous()
            dist.broadcast(hidden, group=parallel.pp_group, group_src=stage)
    if not chunks[-1].post_process:
        return None
    parts = [torch.empty_like(output) for _ in range(parallel.tp_size)]
    dist.all_gather(parts, output.contiguous(), group=parallel.tp_group)
    return torch.cat(parts, dim=-1)


@functools.cache
def reference_logits(folder: Path) -> torch.Tensor:
    """:func:`hf_logits` of the sample tokens, once a folder."""
    return hf_logits(folder, sample_tokens())


def compare_logits(ours: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """(largest difference relative to the largest logit, share of positions with the same top token)."""
    ours = ours[..., : reference.shape[-1]]
    difference = (ours - reference).abs().max() / reference.abs().max()
    return difference.item(), (ours.argmax(-1) == reference.argmax(-1)).float().mean().item()


def world_size(layout: dict) -> int:
    """Ranks of a layout without data parallel; experts share the tensor-parallel ranks."""
    return max(layout.get("tp", 1), layout.get("ep", 1)) * layout.get("pp", 1)


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_tensors(one: Path, other: Path) -> None:
    """Names, shapes, dtypes and bits."""
    left, right = hf_tensors(one), hf_tensors(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def export(chunks, parallel: Parallel, output: Path, folder: Path, **options) -> None:
    """As a run exports: Megatron's checkpoint, then converted by all ranks."""
    checkpoint = output.with_name(f"{output.name}-checkpoint")
    if parallel.rank == 0:
        checkpoint.mkdir()
    dist.barrier()
    bare = [getattr(chunk, "module", chunk) for chunk in chunks]
    keys = ["model"] if len(bare) == 1 else [f"model{index}" for index in range(len(bare))]
    state = {key: chunk.sharded_state_dict() for key, chunk in zip(keys, bare, strict=True)}
    dist_checkpointing.save(state, str(checkpoint))
    megatron_to_hf(checkpoint, output, hf_dir=folder, **options)
