"""Batched sampling against ``model.generate`` and unbatched twins; teacher-forced log-probs against fp64."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_language_model import language_model_folder

from megatron_gft.errors import InputError
from megatron_gft.sampling.local_backends import TransformersBackend
from megatron_gft.sampling.local_model import LocalModel, pick_tokens, token_logprobs
from megatron_gft.sampling.settings import SampleFailure, SampleRequest, SamplingParams, model_fingerprint, sample_seed
from megatron_gft.sampling.written import MISMATCH

PROMPTS = ["1 plus 7?", "Question 12: what is 12 plus 84? Let us think.", "a", "Let us think step by step about 9."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return language_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def local(folder):
    return LocalModel(folder, device="cpu")


def test_greedy_batches_equal_generate_of_single_prompts(local):
    prompts = [local.prompt_ids(text) for text in PROMPTS]
    batch = local.sample(prompts, [0] * 4, SamplingParams(temperature=0, max_tokens=40))
    for prompt, decoded in zip(prompts, batch, strict=True):
        expected = local.model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
        assert decoded.ids == expected[0, len(prompt) :].tolist()
        assert decoded.finish_reason == ("stop" if decoded.ids[-1] in local.eos_ids else "length")


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(local):
    prompts = [local.prompt_ids(text) for text in PROMPTS for _ in range(5)]
    seeds = list(range(20))
    params = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=30, logprobs=True)
    batch = local.sample(prompts, seeds, params)
    assert {decoded.finish_reason for decoded in batch} == {"stop", "length"}
    assert len({tuple(decoded.ids) for decoded in batch}) > 15
    for index in (0, 7, 13, 19):
        (alone,) = local.sample([prompts[index]], [seeds[index]], params)
        assert alone.ids == batch[index].ids
        np.testing.assert_allclose(alone.logprobs, batch[index].logprobs, atol=1e-4)


def test_sampling_logprobs_are_those_of_teacher_forcing_in_fp64(local):
    prompts = [local.prompt_ids(text) for text in PROMPTS * 3]
    batch = local.sample(prompts, list(range(12)), SamplingParams(temperature=0.7, max_tokens=25, logprobs=True))
    pairs = [(prompt, decoded.ids) for prompt, decoded in zip(prompts, batch, strict=True)]
    forced = local.response_logprobs([*pairs, (prompts[0], [])])
    assert forced.pop() == []
    twin = local.model.double()
    try:
        for (prompt, response), decoded, values in zip(pairs, batch, forced, strict=True):
            logits = twin(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)].tolist()
            np.testing.assert_allclose(values, expected, atol=2e-5)
            np.testing.assert_allclose(decoded.logprobs, expected, atol=2e-5)
    finally:
        local.model.float()


def test_long_and_short_answers_are_cut_into_batches_within_limits(local, monkeypatch):
    monkeypatch.setattr("megatron_gft.sampling.local_model.MAX_BATCH_TOKENS", 60)
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(3, 90, rng.integers(1, 30)).tolist(), rng.integers(3, 90, n).tolist()) for n in range(1, 25)]
    seen = []
    values = local.response_logprobs(pairs, seen.append)
    assert sum(seen) == 24 and len(seen) > 4 and [len(v) for v in values] == list(range(1, 25))
    (alone,) = local.response_logprobs([pairs[10]])
    np.testing.assert_allclose(alone, values[10], atol=1e-5)


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(0.5), SamplingParams(1.3, 0.8), SamplingParams(1.0, 1.0, 3)]
)
def test_tokens_are_picked_with_their_probability(params):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)) * 2
    count = 40_000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    picked = pick_tokens(logits.expand(count, -1), uniforms, params)
    share = torch.bincount(picked, minlength=12) / count
    expected = (logits[0].double() / params.temperature).softmax(-1)
    order = expected.argsort(descending=True)
    keep = torch.ones(12, dtype=torch.bool)
    if params.top_p < 1:
        reached = expected[order].cumsum(0) - expected[order] >= params.top_p
        keep[order[reached]] = False
    if params.top_k:
        keep[order[params.top_k :]] = False
    expected = torch.where(keep, expected, 0) / expected[keep].sum()
    torch.testing.assert_close(share.double(), expected, atol=1e-4, rtol=0)


def test_few_candidates_and_the_whole_vocabulary_give_the_same_tokens(monkeypatch):
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 4, 200)[:, None]
    uniforms = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    whole = pick_tokens(logits, uniforms, SamplingParams(top_p=0.9))
    monkeypatch.setattr("megatron_gft.sampling.local_model.TOP_P_CANDIDATES", 20)
    assert torch.equal(pick_tokens(logits[100:], uniforms[100:], SamplingParams(top_p=0.9)), whole[100:])
    assert torch.equal(pick_tokens(logits, uniforms, SamplingParams(top_p=0.9)), whole)  # the flat rows need all


def test_uniforms_at_the_edges_pick_tokens_that_can_be_picked():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert pick_tokens(logits, edges, SamplingParams()).tolist() == [1, 2]
    assert pick_tokens(logits, edges, SamplingParams(top_p=0.5)).tolist() == [1, 1]


def test_token_logprobs():
    logits = torch.randn(5, 7)
    tokens = torch.arange(5)
    torch.testing.assert_close(token_logprobs(logits, tokens), logits.log_softmax(-1)[tokens, tokens])


def requests_for(texts, k=4):
    return [
        SampleRequest(f"{i}/{j}", text, sample_seed(0, text, "self", j))
        for i, text in enumerate(texts)
        for j in range(k)
    ]


def sampled(local, requests, params, batch_size=16, done=frozenset()):
    """Outcomes of a backend, by key."""
    outcomes = TransformersBackend(local, batch_size).generate(requests, params, done.__contains__)
    return {outcome.key: outcome for outcome in outcomes}


def test_the_backend_gives_every_request_its_sample_with_ids_that_spell_the_text(local):
    samples = sampled(local, requests_for(PROMPTS), SamplingParams(max_tokens=30, logprobs=True), 6)
    assert samples.keys() == {r.key for r in requests_for(PROMPTS)}
    for request in requests_for(PROMPTS):
        sample = samples[request.key]
        assert "<|im_end|>" not in sample.text
        if sample.token_ids is None:  # special tokens inside, which the text leaves out
            assert sample.note == MISMATCH and sample.logprobs is None
            continue
        assert (sample.finish_reason == "stop") == (sample.token_ids[-1] == local.tokenizer.eos_id)
        assert len(sample.logprobs) == len(sample.token_ids) <= 30
        assert local.tokenizer.written(sample.token_ids) == sample.text
    assert sum(sample.token_ids is not None for sample in samples.values()) > len(samples) / 2


def test_a_continued_run_samples_what_an_undisturbed_one_would_have(local):
    params, done = SamplingParams(max_tokens=12, logprobs=True), {"0/1", "1/0", "1/1", "1/2", "1/3", "3/2"}
    whole, rest = (sampled(local, requests_for(PROMPTS), params, 5, keys) for keys in (set(), done))
    assert rest.keys() == whole.keys() - done
    assert all(rest[key] == whole[key] for key in rest)  # bit for bit, log-probs too


def test_stop_texts_end_a_response_and_leave_no_ids_that_spell_more(local):
    (free,) = sampled(local, requests_for(PROMPTS[:1], 1), SamplingParams(max_tokens=30)).values()
    stop = free.text[6:9]
    params = SamplingParams(max_tokens=30, stop=("never said \u2603", stop))
    (cut,) = sampled(local, requests_for(PROMPTS[:1], 1), params).values()
    assert cut.text == free.text[: free.text.find(stop)]
    assert (cut.finish_reason, cut.token_ids, cut.logprobs) == ("stop", None, None)


@pytest.mark.parametrize("stop", ["終わり終わり終わり", "\U0001f600" * 5, "####"])
def test_a_stop_text_is_seen_whatever_its_number_of_tokens(local, monkeypatch, stop):
    tokens = [local.tokenizer.encode_response(text) for text in ("so 8. ", stop, " and more")]
    script = iter(sum(tokens, []))
    monkeypatch.setattr("megatron_gft.sampling.local_model.pick_tokens", lambda *_: torch.tensor([next(script)]))
    params = SamplingParams(max_tokens=100, stop=("never said", stop))
    (sample,) = sampled(local, [SampleRequest("k", "a", 1)], params).values()
    assert (sample.text, sample.finish_reason) == ("so 8. ", "stop")
    assert sum(1 for _ in script) == len(tokens[2])


def test_prompts_that_do_not_fit_are_failures_not_crashes(local):
    requests = [SampleRequest("long", "word " * 600, 1), SampleRequest("fits", "word", 1)]
    outcomes = sampled(local, requests, SamplingParams(max_tokens=5))
    assert isinstance(outcomes["long"], SampleFailure) and "leaves no room" in outcomes["long"].reason
    assert len(outcomes["fits"].token_ids) <= 5


def test_what_is_no_model_is_refused(tmp_path, folder):
    with pytest.raises(InputError, match="no such tokenizer|tokenizer"):
        LocalModel(tmp_path / "none")
    other = language_model_folder(tmp_path / "other", seed=1)
    assert model_fingerprint(other) != model_fingerprint(folder)
    (other / "config.json").unlink()
    with pytest.raises(InputError, match="other: no Hugging Face model folder with a config.json"):
        LocalModel(other)


@pytest.mark.parametrize("device", ["graphics", "xpu", "meta"])
def test_a_device_that_is_not_there_is_refused(folder, device):
    with pytest.raises(InputError, match=f"device '{device}' cannot be used .* -> set cpu"):
        LocalModel(folder, device=device)


def edit_config(model, **changes):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def leave_out(model, name):
    weights = load_file(model / "model.safetensors")
    del weights[name]
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def cut(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def no_safetensors(model):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"junk")


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda model: leave_out(model, "lm_head.weight"), r"1 weights are in no file .*\(lm_head.weight\)"),
        (lambda model: edit_config(model, num_hidden_layers=3), "9 weights are in no file .*, ...\\): they would be"),
        (lambda model: edit_config(model, intermediate_size=32), r"not in the shape .*mlp.down_proj"),
        (cut, "model.safetensors: damaged or truncated .* -> copy it again"),
        (no_safetensors, "cannot load a causal language model .* -> check config.json and the weight files"),
    ],
)
def test_a_model_folder_that_is_not_whole_is_refused(tmp_path, damage, message):
    model = language_model_folder(tmp_path)
    damage(model)
    with pytest.raises(InputError, match=message):
        LocalModel(model, device="cpu")


def test_tied_weights_are_not_missing(tmp_path):
    model = language_model_folder(tmp_path)
    leave_out(model, "lm_head.weight")
    edit_config(model, tie_word_embeddings=True)
    weights = LocalModel(model, device="cpu").model
    assert torch.equal(weights.lm_head.weight, load_file(model / "model.safetensors")["model.embed_tokens.weight"])
