"""SmolLM2-135M-Instruct, a real tied model with 9 heads and 3 KV groups, through loading and export.

Needs its Hugging Face folder: ``MEGATRON_GFT_SMOLLM2``, or ``.models/smollm2`` as ``make quickstart`` makes it.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import torch
import transformers
from ranks import run_ranks
from tiny_models import assert_same_tensors, build_gpt, compare_logits, export, hf_logits, megatron_logits, world_size

from megatron_gft.conversion.convert import hf_to_megatron, megatron_to_hf
from megatron_gft.hf.shape import read_model_shape
from megatron_gft.hf.weights import load_hf_weights
from megatron_gft.parallel import initialize_parallel

FOLDER = Path(os.environ.get("MEGATRON_GFT_SMOLLM2") or Path(__file__).parents[1] / ".models" / "smollm2")
PROMPT = "What is the capital of France?"
TEXT = (
    "The capital of France is Paris. Water boils at 100 degrees Celsius at sea level. In 1969, Neil Armstrong became "
    "the first person to walk on the Moon. Photosynthesis is the process by which plants convert light energy into "
    "chemical energy, producing oxygen as a by-product. def add(a, b):\n    return a + b\n\nTwo plus two equals four. "
)

pytestmark = pytest.mark.skipif(not (FOLDER / "config.json").is_file(), reason=f"no model in {FOLDER}")


@functools.cache
def tokens() -> torch.Tensor:
    """256 tokens of real text, [1, s]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    return torch.tensor(tokenizer(TEXT * 4)["input_ids"][:258])[None]


@functools.cache
def reference() -> torch.Tensor:
    return hf_logits(FOLDER, tokens())


@torch.no_grad()
def greedy_answer(folder: Path) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def load_run_export(output, layout):
    parallel = initialize_parallel(**layout)
    shape = read_model_shape(FOLDER)
    chunks = build_gpt(shape, parallel)
    load_hf_weights(chunks, shape, FOLDER, parallel)
    logits = megatron_logits(chunks, tokens(), parallel)
    export(chunks, parallel, output, FOLDER, max_shard_bytes=2 * 10**8)
    return None if logits is None else compare_logits(logits, reference())


@pytest.mark.parametrize("layout", [{"tp": 3}, {"pp": 2}], ids=str)
def test_logits_round_trip_and_greedy_text(tmp_path, layout):
    reference()
    results = [r for r in run_ranks(world_size(layout), load_run_export, tmp_path / "out", layout, timeout=280) if r]
    print(f"SmolLM2 {layout}: relative logit difference, same top token: {results}")
    assert results and all(relative < 1e-4 and same_top == 1.0 for relative, same_top in results)
    assert_same_tensors(FOLDER, tmp_path / "out")
    answer = greedy_answer(FOLDER)
    print(f"greedy: {answer!r}")
    assert "Paris" in answer and greedy_answer(tmp_path / "out") == answer


def test_offline_round_trip(tmp_path):
    hf_to_megatron(FOLDER, tmp_path / "ckpt")
    megatron_to_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_tensors(FOLDER, tmp_path / "back")
