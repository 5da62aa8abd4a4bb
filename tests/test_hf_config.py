"""Model shapes from config.json: both styles, known sizes, and refusal of everything that is not mapped."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gft.errors import InputError, InputErrors
from megatron_gft.hf.families import FAMILIES
from megatron_gft.hf.mapping import HfMapping, parameter_count
from megatron_gft.hf.shape import (
    SAME_TENSORS,
    gpt_model_kwargs,
    model_shape_from_config,
    padded_vocab_size,
    read_model_shape,
    shape_differences,
    shape_problems,
    transformer_config_kwargs,
)

EXAMPLES = Path(__file__).parents[1] / "examples"
LLAMA_3_1_70B, QWEN_2_5_MATH_1_5B, QWEN3_30B_A3B = (
    json.loads((EXAMPLES / model / "config.json").read_text())
    for model in ("llama3.1-70b", "qwen2.5-math-1.5b", "qwen3-30b-a3b")
)

MIXTRAL = QWEN3_30B_A3B | {
    **{"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8},
    **{"norm_topk_prob": None, "sliding_window": None},
}


def shape_of(config, **changes):
    return model_shape_from_config({**config, **changes}, "config.json")


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(LLAMA_3_1_70B, 70_553_706_496), (QWEN_2_5_MATH_1_5B, 1_543_714_304), (QWEN3_30B_A3B, 30_532_122_624)],
)
def test_parameter_counts_of_published_models(config, parameters):
    assert parameter_count(shape_of(config)) == parameters


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_both_config_styles_give_one_shape_and_transformers_count(tmp_path, name):
    family, options = tiny_models.MODELS[name]
    config = getattr(transformers, f"{family}Config")(**options)
    config.architectures = [f"{family}ForCausalLM"]
    config.save_pretrained(tmp_path)
    new_style = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in new_style
    old_style = tiny_models.to_transformers4_style(new_style)
    assert "rope_parameters" not in old_style
    shape = model_shape_from_config(old_style, "tf4")
    assert read_model_shape(tmp_path) == shape
    assert read_model_shape(tmp_path / "config.json") == shape
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    assert parameter_count(shape) == model.num_parameters()


def test_rope_and_window_options_reach_megatron():
    llama3 = shape_of(LLAMA_3_1_70B)
    assert gpt_model_kwargs(llama3)["rope_scaling_factor"] == 8.0 and gpt_model_kwargs(llama3)["rope_scaling"]
    linear = shape_of(LLAMA_3_1_70B, rope_scaling={"type": "linear", "factor": 4})
    assert gpt_model_kwargs(linear)["seq_len_interpolation_factor"] == 4.0
    assert "rope_scaling" not in gpt_model_kwargs(linear)
    mistral = {**LLAMA_3_1_70B, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "rope_scaling": None}
    assert transformer_config_kwargs(shape_of(mistral, sliding_window=4096))["window_size"] == (4095, 0)
    assert shape_of(mistral).window_size == (4095, 0)  # transformers' default where the key is absent
    assert "window_size" not in transformer_config_kwargs(shape_of(mistral, sliding_window=None))
    assert shape_of(QWEN_2_5_MATH_1_5B).window_size is None  # 4096 stands there, use_sliding_window is false


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"rope_type": "linear", "factor": 8.0}, "linear 8.0"),
        ({**LLAMA_3_1_70B["rope_scaling"], "factor": 16.0}, "llama3 16.0"),
        ({"type": "linear", "factor": 1.0}, None),
        (None, None),
    ],
)
def test_a_difference_of_rope_scaling_names_both_kinds(scaling, said):
    other = shape_of(LLAMA_3_1_70B, rope_scaling=scaling)
    assert shape_differences(other, shape_of(LLAMA_3_1_70B)) == {"rope_scaling": (said, "llama3 8.0")}
    assert shape_differences(other, other) == {}
    assert bool(said) == bool(shape_differences(other, shape_of(LLAMA_3_1_70B, rope_scaling=None)))


def test_only_keys_that_no_tensor_depends_on_may_differ():
    """Every field of a shape, changed by itself, changes the tensors, or is one that can be allowed; but for those that
    belong to the family, and one that models with experts do not use."""
    shape = shape_of(QWEN3_30B_A3B)
    for field in dataclasses.fields(shape):
        value = getattr(shape, field.name)
        other = {bool: not value, int: value and 2 * value, float: value and 2 * value}.get(type(value), (7, 0))
        if field.name not in ("architecture", "model_type", "add_qkv_bias", "qk_layernorm", "ffn_hidden_size"):
            changed = dataclasses.replace(shape, **{field.name: other})
            keys = shape_differences(changed, shape).keys()
            same = HfMapping(changed).hf_shapes == HfMapping(shape).hf_shapes
            assert same == (keys <= SAME_TENSORS), (field.name, keys)


def test_router_order_follows_norm_topk_prob():
    assert not shape_of(QWEN3_30B_A3B).moe_router_pre_softmax
    assert shape_of(QWEN3_30B_A3B, norm_topk_prob=False).moe_router_pre_softmax
    without = {key: value for key, value in QWEN3_30B_A3B.items() if key != "norm_topk_prob"}
    assert shape_of(without).moe_router_pre_softmax  # transformers' default is false


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LLAMA_3_1_70B, {"attention_bias": True}, "attention_bias is True"),
        (LLAMA_3_1_70B, {"mlp_bias": True}, "mlp_bias is True"),
        (LLAMA_3_1_70B, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (LLAMA_3_1_70B, {"sliding_window": 4096}, "sliding_window is 4096"),
        (LLAMA_3_1_70B, {"mlp_bias": 0}, "mlp_bias is 0, only False is mapped"),
        (LLAMA_3_1_70B, {"torch_dtype": 7}, "torch_dtype is 7 -> it must be a valid string"),
        (LLAMA_3_1_70B, {"is_causal": False}, "is_causal is False"),
        (LLAMA_3_1_70B, {"auto_map": 3}, "auto_map is 3 -> it must be a valid object"),
        (LLAMA_3_1_70B, {"id2label": 3}, "id2label is 3 -> it must be a valid object"),
        (LLAMA_3_1_70B, {"num_labels": "a"}, "num_labels is 'a' -> it must be a valid integer"),
        (LLAMA_3_1_70B, {"num_labels": 10**12}, "num_labels is 1000000000000"),
        (LLAMA_3_1_70B, {"per_layer_config": {"3": {"rms_norm_eps": 0.1}}}, "per_layer_config is "),
        (LLAMA_3_1_70B, {"original_max_position_embeddings": 4096}, "original_max_position_embeddings is 4096"),
        (
            LLAMA_3_1_70B,
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "a": 1}},
            "rope_scaling.a is not mapped",
        ),
        (LLAMA_3_1_70B, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        (LLAMA_3_1_70B, {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope type 'dynamic'"),
        (
            LLAMA_3_1_70B,
            {"rope_scaling": {**LLAMA_3_1_70B["rope_scaling"], "high_freq_factor": 8.0}},
            "llama3 rope high_freq_factor is 8.0",
        ),
        (LLAMA_3_1_70B, {"rope_scaling": {"rope_type": "linear"}}, "rope factor is None"),
        (LLAMA_3_1_70B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA_3_1_70B, {"rope_parameters": {"rope_type": "default"}}, "both set and differ"),
        (
            LLAMA_3_1_70B,
            {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "differ by layer type",
        ),
        (LLAMA_3_1_70B, {"rope_scaling": None, "rope_parameters": {"rope_theta": 1e4}}, "in rope_parameters 10000.0"),
        (MIXTRAL, {"norm_topk_prob": False}, "norm_topk_prob is False"),  # transformers does not read it
        (LLAMA_3_1_70B, {"quantization_config": {"bits": 4}}, "dequantize"),
        (LLAMA_3_1_70B, {"num_key_value_heads": 7}, "no multiple of num_key_value_heads 7"),
        (LLAMA_3_1_70B, {"num_hidden_layers": None}, "num_hidden_layers is None"),
        (LLAMA_3_1_70B, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (QWEN_2_5_MATH_1_5B, {"use_sliding_window": True}, "use_sliding_window"),
        (QWEN_2_5_MATH_1_5B, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (QWEN_2_5_MATH_1_5B, {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        (QWEN3_30B_A3B, {"mlp_only_layers": [0]}, "mlp_only_layers"),
        (QWEN3_30B_A3B, {"num_experts": None}, "num_experts is missing"),
        (QWEN3_30B_A3B, {"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
        (QWEN3_30B_A3B, {"attention_bias": True}, "attention_bias is True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and len(value) < 3 else None,
)
def test_unmapped_options_are_refused(config, changes, message):
    with pytest.raises(InputError, match=message):
        shape_of(config, **changes)


def test_all_problems_are_reported_at_once():
    with pytest.raises(InputErrors) as caught:
        shape_of(LLAMA_3_1_70B, attention_bias=True, hidden_act="relu", rope_scaling={"rope_type": "yarn"})
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"model_type": None},
    ],
)
def test_unsupported_architectures_name_the_supported_ones_and_the_file_to_extend(changes):
    with pytest.raises(InputError) as caught:
        shape_of(LLAMA_3_1_70B, **changes)
    message = str(caught.value)
    assert str(changes.get("model_type", "LlamaForSequenceClassification")) in message
    assert "hf/families.py" in message
    assert all(family.architecture in message for family in FAMILIES.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no Hugging Face config.json"),
        ('{"model_type": "llama"', "not valid JSON"),
        ("[]", "not an object"),
        ('{"model_type": "glm4"}', r"model_type 'glm4'\) is not mapped -> use one of"),
    ],
)
def test_damaged_and_missing_files_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_model_shape(tmp_path)


@settings(deadline=None)
@given(vocab=st.integers(1, 300_000), tp=st.integers(1, 16), divisible_by=st.integers(1, 256))
def test_padding_is_the_next_multiple(vocab, tp, divisible_by):
    padded = padded_vocab_size(vocab, tp, divisible_by)
    assert padded % (tp * divisible_by) == 0
    assert vocab <= padded < vocab + tp * divisible_by


def test_layouts_that_do_not_divide_say_what_would():
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576, "intermediate_size": 1536}
    smollm2 = shape_of(LLAMA_3_1_70B, num_hidden_layers=30, **sizes)
    assert list(shape_problems(smollm2, tp=3, pp=2)) == []
    problems = list(shape_problems(smollm2, tp=2, pp=4, ep=2))
    assert [problem.split()[0] for problem in problems] == ["9", "3", "30", "expert"]
    assert "TP in [1, 3, 9]" in problems[0]
    llama = shape_of(LLAMA_3_1_70B)
    assert list(shape_problems(llama, tp=16)) == []  # 8 KV groups, replicated by Megatron-Core
    moe = shape_of(QWEN3_30B_A3B)
    assert list(shape_problems(moe, tp=4, pp=4, vpp=3, ep=8, etp=1)) == []
    assert len(list(shape_problems(moe, ep=3, etp=5))) == 2


def test_needs_neither_torch_nor_megatron_nor_transformers():
    code = (
        "import sys, megatron_gft.hf.shape, megatron_gft.hf.mapping\n"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
