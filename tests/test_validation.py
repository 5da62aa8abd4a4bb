"""Every rule over the configuration: what trips it, and that the message names the key and the way out."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_gft import backend
from megatron_gft.backend import build_transformer_config
from megatron_gft.config import ModelConfig, ParallelConfig, load_config
from megatron_gft.errors import InputErrors
from megatron_gft.head_rows import EAGER
from megatron_gft.hf.shape import model_shape_from_config
from megatron_gft.validation import check

LLAMA = Path(__file__).parents[1] / "examples" / "llama3.1-8b" / "config.json"
DENSE = json.loads(LLAMA.read_text()) | {
    **{"num_hidden_layers": 12, "hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4},
    **{"intermediate_size": 144, "vocab_size": 503, "max_position_embeddings": 512},
}
EXPERTS = DENSE | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
}
BASE = ["model.config=none", "data.train=[shard]"]


def shape_of(config):
    return model_shape_from_config(config, "config.json")


def problems(overrides, model=DENSE, world_size=1, training=True):
    """The problems of ``check``, [] when it passes."""
    try:
        check(load_config([], BASE + overrides), shape_of(model), world_size, training=training)
    except InputErrors as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("overrides", "model", "world_size"),
    [
        ([], DENSE, 1),
        (["parallel.tp=4", "parallel.pp=3", "parallel.vpp=2", "parallel.cp=2"], DENSE, 48),
        (["parallel.tp=12", "parallel.sequence_parallel=true"], DENSE, 12),  # 4 KV heads, shared by 3 ranks each
        (["parallel.ep=2", "parallel.cp=2"], EXPERTS, 4),
        (["parallel.tp=2", "parallel.ep=2", "parallel.etp=1", "parallel.sequence_parallel=true"], EXPERTS, 2),
        (["parallel.cp=4", "data.max_tokens_per_pack=8"], DENSE, 4),
        (["optimizer.overlap_param_gather=true", "optimizer.overlap_grad_reduce=true"], DENSE, 2),
        (["objective=sft", "train.validate_every=5", "data.split='98,2,0'"], DENSE, 1),
        (["profile.steps=[3]", "profile.ranks=[0,1]"], DENSE, 2),
    ],
)
def test_sound_combinations_pass(overrides, model, world_size):
    assert problems(overrides, model, world_size) == []


RULES = [
    # world size
    (["parallel.tp=2", "parallel.pp=3"], DENSE, 8, ["parallel.tp=2 * parallel.pp=3", "world size 8", "multiple of 6"]),
    (["parallel.cp=4"], DENSE, 2, ["parallel.cp=4", "world size 2", "multiple of 4 processes"]),
    (["parallel.ep=3"], EXPERTS, 4, ["parallel.ep=3 * parallel.etp=1", "world size 4", "choose sizes"]),
    # the model's sizes
    (["parallel.tp=5"], DENSE, 5, ["parallel.tp: 12 attention heads do not divide by TP 5", "[1, 2, 3, 4, 6, 12]"]),
    (["parallel.tp=6"], DENSE, 6, ["parallel.tp: 4 KV groups and TP 6", "choose such a TP"]),
    (["parallel.pp=5"], DENSE, 5, ["parallel.pp: 12 layers do not divide by PP 5", "choose sizes"]),
    (["parallel.pp=2", "parallel.vpp=4"], DENSE, 2, ["parallel.pp: 12 layers", "4 virtual stages"]),
    (["parallel.pp=2", "parallel.layers_per_stage=[7,6]"], DENSE, 2, ["[7, 6]: 2 stages with 13 layers", "12 -> one"]),
    (["parallel.layers_per_stage=[6,6]"], DENSE, 1, ["layers_per_stage=[6, 6]: 2 stages", "for 1 (parallel.pp"]),
    (["parallel.ep=2"], DENSE, 2, ["parallel.ep: ", "the model has no experts", "set it to 1"]),
    (["parallel.ep=4"], EXPERTS, 4, ["parallel.ep: 6 experts do not divide by EP 4"]),
    (["parallel.etp=5"], EXPERTS, 5, ["parallel.etp: expert ffn size 144 does not divide by expert TP 5"]),
    # layouts that Megatron runs wrongly, late, or not at all
    (["parallel.vpp=2"], DENSE, 1, ["parallel.vpp=2", "parallel.pp is 1", "drop vpp"]),
    (["parallel.sequence_parallel=true"], DENSE, 2, ["parallel.sequence_parallel", "parallel.tp is 1", "false"]),
    (["parallel.etp=2"], DENSE, 2, ["parallel.etp=2", "drop it"]),
    (["parallel.tp=2"], EXPERTS, 2, ["parallel.tp=2", "set parallel.sequence_parallel=true"]),
    # data
    (["data.train=[]"], DENSE, 1, ["data.train: missing", "tools/preprocess_groups.py"]),
    (["data.train_weights=[1.0,2.0]"], DENSE, 1, ["data.train_weights has 2 entries for 1"]),
    (["data.split='100'"], DENSE, 1, ["data.split='100'", '"98,2"']),
    (["data.split='0,100,0'"], DENSE, 1, ["data.split="]),
    (["data.split='a,b,c'"], DENSE, 1, ["data.split="]),
    (["data.split='80,10,10'"], DENSE, 1, ["data.split='80,10,10'", "its groups would be lost"]),
    (["train.validate_every=5"], DENSE, 1, ["train.validate_every", "set data.valid"]),
    (["parallel.cp=4", "data.max_tokens_per_pack=7"], DENSE, 4, ["data.max_tokens_per_pack=7", "at least 8"]),
    (
        ["parallel.cp=2", "parallel.tp=4", "parallel.sequence_parallel=true", "data.max_tokens_per_pack=7"],
        DENSE,
        8,
        ["data.max_tokens_per_pack=7", "below 8", "at least 8"],
    ),
    (["data.max_response_tokens=513"], DENSE, 1, ["data.max_response_tokens=513", "512 positions", "lower it"]),
    # objective
    (["objective.sources=[self,self,expert]"], DENSE, 1, ["objective.sources", "named twice"]),
    (["objective.sources=[expert]"], DENSE, 1, ["objective.advantage=std", "none", "objective.sources"]),
    # optimizer
    (["optimizer.min_lr=1e-3", "optimizer.lr=1e-6"], DENSE, 1, ["optimizer.min_lr=0.001", "optimizer.lr=1e-06"]),
    (["optimizer.decay_steps=5", "optimizer.warmup_steps=5"], DENSE, 1, ["optimizer.decay_steps=5", "warmup_steps=5"]),
    (["optimizer.overlap_param_gather=true"], DENSE, 1, ["optimizer.overlap_grad_reduce=true"]),
    (
        ["optimizer.overlap_param_gather=true", "optimizer.overlap_grad_reduce=true", "optimizer.distributed=false"],
        DENSE,
        1,
        ["optimizer.overlap_param_gather", "optimizer.distributed=true"],
    ),
    # model
    (["model.fp8=delayed", "model.backend=local"], DENSE, 1, ["model.fp8=delayed", "set model.backend=auto"]),
    (["model.fp8=mxfp8", "model.precision=fp32"], DENSE, 1, ["model.fp8=mxfp8", "set model.precision=bf16"]),
    (
        ["model.backend=transformer_engine", "model.precision=fp32"],
        DENSE,
        1,
        ["model.backend=transformer_engine", "model.backend=local"],
    ),
    (["model.fp8=delayed"], DENSE, 1, ["model.fp8=delayed needs Transformer Engine -> pip install"]),
    # the run
    (["profile.steps=[3]", "profile.ranks=[0,2]"], DENSE, 2, ["profile.ranks=[2]", "from 0 to 1"]),
    (["checkpoint.init_from=hf:nowhere"], DENSE, 1, ["checkpoint.init_from=hf:nowhere", "no such folder", "hf:DIR"]),
]


@pytest.mark.parametrize(("overrides", "model", "world_size", "parts"), RULES)
def test_every_rule_names_the_key_and_the_way_out(overrides, model, world_size, parts):
    found = problems(overrides, model, world_size)
    assert any(all(part in problem for part in parts) for problem in found), found
    assert all("->" in problem or "parallel.etp: expert" in problem for problem in found), found


def test_all_problems_come_at_once():
    found = problems(["parallel.tp=5", "parallel.vpp=2", "optimizer.min_lr=1", "data.split='1'", "data.train=[]"])
    keys = ("parallel.tp=5", "parallel.tp: 12", "parallel.vpp=2", "optimizer.min_lr", "data.split", "data.train")
    for key in keys:
        assert any(key in problem for problem in found), key


def test_planning_needs_neither_shards_nor_weights_nor_packages():
    overrides = ["data.train=[]", "checkpoint.init_from=hf:nowhere", "model.fp8=delayed"]
    assert len(problems(overrides)) == 3
    assert problems(overrides, training=False) == []


# --- Megatron's own configuration -------------------------------------------------------------------------------------

LAYOUTS = [{}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"cp": 2}]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", [DENSE, EXPERTS])
@pytest.mark.parametrize("recompute", ["none", "core_attention", "full"])
def test_what_the_model_builds_has_no_silent_trap(layout, model, recompute):
    """Each of these fields, set otherwise, trains another loss, and Megatron says nothing."""
    settings = ModelConfig(config="none", recompute=recompute)
    config = build_transformer_config(shape_of(model), settings, ParallelConfig(**layout), backend="local")
    assert config.calculate_per_token_loss and config.variable_seq_lengths
    assert "vpp" not in layout or (config.overlap_p2p_comm and not config.batch_p2p_comm)
    assert (config.hidden_dropout, config.attention_dropout) == (0, 0)
    assert config.mtp_num_layers is None and not config.defer_embedding_wgrad_compute
    assert config.softmax_type == "vanilla" and not config.apply_query_key_layer_scaling
    assert config.moe_router_dtype == "fp32"
    fusions = ("gradient_accumulation_fusion", "apply_rope_fusion", "moe_permute_fusion")
    assert not any(getattr(config, name) for name in fusions)  # these need Transformer Engine
    assert not (config.qk_clip or config.layernorm_zero_centered_gamma or config.fp8_dot_product_attention)
    if config.num_moe_experts:
        assert config.moe_router_load_balancing_type == "none"
        names = ("moe_expert_capacity_factor", "moe_z_loss_coeff", "moe_input_jitter_eps")
        assert [getattr(config, name) for name in names] == [None] * 3


@pytest.mark.parametrize("built", [True, False])
def test_a_gpu_takes_the_fusions_that_can_be_built_there(monkeypatch, built):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    monkeypatch.setattr(backend, "kernels", lambda: EAGER if built else None)
    monkeypatch.setattr(backend, "TransformerConfig", SimpleNamespace)  # Megatron's asks for Transformer Engine
    for kind in ("local", "transformer_engine"):
        config = build_transformer_config(shape_of(EXPERTS), ModelConfig(config="none"), ParallelConfig(), backend=kind)
        assert config.bias_activation_fusion == built  # Megatron compiles it when it first runs
        fused = {config.gradient_accumulation_fusion, config.apply_rope_fusion, config.moe_permute_fusion}
        assert fused == {kind == "transformer_engine"}
        assert layers._grad_accum_fusion_available == (kind == "transformer_engine")


def test_megatron_does_not_know_these_traps():
    """When this fails, Megatron-Core checks one of them itself."""
    common = {"num_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "pipeline_dtype": torch.float32}
    TransformerConfig(**common, pipeline_model_parallel_size=2)
    TransformerConfig(
        **common, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, batch_p2p_comm=True
    )


# --- before torch -----------------------------------------------------------------------------------------------------


def test_a_wrong_configuration_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    (tmp_path / "run.yaml").write_text(f"model: {{config: {tmp_path}}}\ndata: {{train: [shard]}}\n")
    command = [sys.executable, "-X", "importtime", "-m", "megatron_gft.train", "--config", str(tmp_path / "run.yaml")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "WORLD_SIZE": "5"}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    run = subprocess.run([*command, "parallel.tp=5"], capture_output=True, text=True, env=environment, timeout=60)
    assert run.returncode == 2 and not re.findall(
        r"\| +(?:torch|megatron\.core|transformers)$", run.stderr, re.MULTILINE
    )
    assert "parallel.tp: 12 attention heads do not divide by TP 5" in run.stderr and "Traceback" not in run.stderr
