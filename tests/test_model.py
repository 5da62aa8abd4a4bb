"""GFTModel over packs: logits of transformers' models, RoPE by position id, padding, backends, wrappers."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from layout_cases import TinyGroups, model_folder
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.module import Float16Module
from memory_groups import pack_of
from ranks import run_ranks
from tiny_models import MODELS, write_tiny_model

from megatron_gft import backend
from megatron_gft.backend import choose_backend
from megatron_gft.config import ModelConfig, ObjectiveConfig, ParallelConfig
from megatron_gft.errors import InputError
from megatron_gft.hf.mapping import parameter_count
from megatron_gft.hf.shape import gpt_model_kwargs, padded_vocab_size, read_model_shape
from megatron_gft.hf.weights import load_hf_weights
from megatron_gft.model import GFTModel, GFTOutputLayer, LossOutput, build_model, unwrap
from megatron_gft.packing import Pack
from megatron_gft.parallel import initialize_parallel, seed_everything
from megatron_gft.planning import GroupLengths, plan_step

MODEL = ModelConfig(config="none", precision="fp32", make_vocab_size_divisible_by=8)
OBJECTIVE = ObjectiveConfig(tau=0.05)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def build(folder: Path, model: ModelConfig = MODEL, objective: ObjectiveConfig = OBJECTIVE, **layout):
    """Chunks of this rank with the folder's weights, and the layout."""
    shape, parallel = read_model_shape(folder), initialize_parallel(**layout)
    seed_everything(1, parallel)
    _, chunks = build_model(shape, model, objective, ParallelConfig(**layout), parallel)
    load_hf_weights(chunks, shape, folder, parallel)
    return chunks, shape


def plan_and_pack(groups, packing: str) -> Pack:
    lengths = [GroupLengths(len(g.prompt), tuple(len(r) for r in g.responses)) for g in groups]
    plan = plan_step(lengths, 1, 4096, packing=packing, pad_multiple=16)
    weights = np.ones(sum(len(g.responses) for g in groups))
    return pack_of(plan.packs[0][0], groups, weights, weights, pad_multiple=16)


# --- logits -----------------------------------------------------------------------------------------------------------


def _pack_logits(folder: Path, packing: str):
    """Logits of the loss rows of three groups, and which response they belong to."""
    (chunk,), shape = build(folder)
    pack = plan_and_pack([TinyGroups()[index] for index in (0, 2, 5)], packing)
    with torch.no_grad():
        logits = unwrap(chunk).logits(pack)
    return logits[pack.loss_rows, : shape.vocab_size], pack.response_index


@pytest.mark.parametrize("packing", ["packed", "shared_prefix"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_over_packs_are_those_of_transformers(tmp_path, name, packing):
    folder = write_tiny_model(tmp_path / name, name)
    [(logits, owner)] = run_ranks(1, _pack_logits, folder, packing)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    index = 0
    for group in (TinyGroups()[place] for place in (0, 2, 5)):
        for response in group.responses:
            tokens = torch.from_numpy(np.concatenate((group.prompt, response)))
            with torch.no_grad():
                expected = reference(tokens[None]).logits[0, len(group.prompt) - 1 : -1]
            found = logits[owner == index]
            assert found.shape == expected.shape
            assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
            index += 1


# --- RoPE -------------------------------------------------------------------------------------------------------------


def _angles(folder: Path):
    (chunk,), shape = build(folder)
    options = gpt_model_kwargs(shape)
    known = ("rotary_base", "rope_scaling", "rope_scaling_factor", "seq_len_interpolation_factor")
    theirs = RotaryEmbedding(
        kv_channels=shape.kv_channels,
        rotary_percent=1.0,
        use_cpu_initialization=True,
        **{key: options[key] for key in known if key in options},
    )
    positions = torch.tensor([0, 1, 2, 7, 7, 3, 100, 0])
    return unwrap(chunk).rotary_frequencies(positions), theirs(101)[positions]


@pytest.mark.parametrize("name", ["llama3", "llama_tied_linear", "qwen2"])
def test_rope_angles_follow_position_ids(tmp_path, name):
    [(ours, megatrons)] = run_ranks(1, _angles, write_tiny_model(tmp_path / name, name))
    assert ours.shape == megatrons.shape and torch.allclose(ours, megatrons, rtol=1e-6, atol=1e-6)
    assert not torch.equal(ours[1], ours[2]) and torch.equal(ours[3], ours[4])


# --- parameters -------------------------------------------------------------------------------------------------------


def _inventory(folder: Path):
    (chunk,), shape = build(folder)
    total = sum(parameter.numel() for parameter in chunk.parameters())
    padding = padded_vocab_size(shape.vocab_size, 1, 8) - shape.vocab_size
    return total, parameter_count(shape), padding * shape.hidden_size, type(chunk.output_layer) is GFTOutputLayer


@pytest.mark.parametrize(("name", "matrices"), [("tied", 1), ("untied", 2), ("mixtral", 2)])
def test_the_loss_head_adds_no_parameter(root, name, matrices):
    [(total, of_hugging_face, padding, is_ours)] = run_ranks(1, _inventory, model_folder(root, name))
    assert total == of_hugging_face + matrices * padding
    assert is_ours


def _padding_rows(folder: Path, fused: bool):
    """Loss and gradient of the vocabulary matrix before and after its padding rows are filled with large numbers."""
    (chunk,), shape = build(folder, objective=OBJECTIVE.model_copy(update={"fused_head": fused}))
    pack = plan_and_pack([TinyGroups()[0]], "packed")
    results = []
    for _ in range(2):
        chunk.zero_grad()
        output = chunk(pack)
        output.loss_sum.backward()
        results.append((output.loss_sum.item(), output.entropy, chunk.output_layer.weight.grad.clone()))
        with torch.no_grad():
            chunk.output_layer.weight[shape.vocab_size :] = 100.0
    return results, shape.vocab_size


@pytest.mark.parametrize("fused", [True, False])
def test_padding_of_the_vocabulary_has_no_probability_and_no_gradient(root, fused):
    [(results, size)] = run_ranks(1, _padding_rows, model_folder(root, "untied"), fused)
    (loss, entropy, gradient), (other_loss, other_entropy, other_gradient) = results
    assert loss == other_loss and torch.equal(entropy, other_entropy)
    assert len(gradient) > size and (gradient[size:] == 0).all() and (other_gradient[size:] == 0).all()


def _stages(folder: Path):
    chunks, shape = build(folder, pp=2, vpp=2)
    models = [unwrap(chunk) for chunk in chunks]
    layers = [[layer.layer_number for layer in model.decoder.layers] for model in models]
    return layers, [model.pre_process for model in models], [model.post_process for model in models]


def test_interleaved_stages_hold_every_layer_once_and_one_head(root):
    first, last = run_ranks(2, _stages, model_folder(root, "untied"))
    assert first == ([[1], [3]], [True, False], [False, False])
    assert last == ([[2], [4]], [False, False], [False, True])


# --- precision and backends -------------------------------------------------------------------------------------------


def _half(folder: Path):
    (chunk,), _ = build(folder, MODEL.model_copy(update={"precision": "bf16"}))
    pack = dataclasses.replace(plan_and_pack([TinyGroups()[0]], "packed"))
    pack.token_weights.fill_(1 + 2**-20)  # not a bf16 number
    output = chunk(pack)
    assert isinstance(output, LossOutput)
    exact = -(pack.token_weights.double() * _coefficients(output.logprobs) * output.logprobs.double()).sum()
    dtypes = {parameter.dtype for parameter in chunk.parameters()}
    wrapped = type(chunk) is Float16Module and type(unwrap(chunk)) is GFTModel and unwrap(chunk) is chunk.module
    return wrapped, dtypes, output.logprobs.dtype, output.loss_sum.item(), exact.item()


def _coefficients(logprobs):
    p = logprobs.double().exp()
    return torch.where(p > OBJECTIVE.tau, 1.0, p)


def test_half_precision_keeps_weights_and_log_probabilities_in_single(root):
    [(wrapped, dtypes, dtype, loss, exact)] = run_ranks(1, _half, model_folder(root, "untied"))
    assert wrapped and dtypes == {torch.bfloat16} and dtype == torch.float32
    assert loss == pytest.approx(exact, rel=2e-7)


def test_the_backend_is_chosen_once(monkeypatch):
    assert choose_backend("auto", "bf16") == choose_backend("local", "bf16") == "local"
    with pytest.raises(InputError, match="needs a GPU and the package transformer-engine"):
        choose_backend("transformer_engine", "bf16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    assert choose_backend("auto", "bf16") == choose_backend("transformer_engine", "bf16") == "transformer_engine"
    assert choose_backend("auto", "fp32") == choose_backend("local", "bf16") == "local"


def test_settings_reach_megatron(root):
    settings = MODEL.model_copy(update={"recompute": "full"})
    shape = read_model_shape(model_folder(root, "tied"))
    config = backend.build_transformer_config(shape, settings, ParallelConfig(), backend="local")
    assert (config.recompute_granularity, config.bf16, config.params_dtype) == ("full", False, torch.float32)
