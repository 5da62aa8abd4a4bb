"""Small random group shards for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_gft.groups import SOURCES
from megatron_gft.shards import GroupShardWriter, TokenizerStamp

STAMP = TokenizerStamp(fingerprint="f" * 64, vocab_size=100, eos_id=2, bos_id=None, chat_template="none")


def random_group(rng: np.random.Generator, index: int, logprobs: bool = True) -> dict:
    """Arguments of ``GroupShardWriter.add_group``; some rewards, outcomes and log-probs are unknown."""
    count = int(rng.integers(1, 6))
    responses = [[*rng.integers(3, 100, rng.integers(0, 9)).tolist(), 2] for _ in range(count)]
    rewards = [None if rng.random() < 0.2 else float(rng.integers(0, 3)) for _ in responses]
    known = [None if rng.random() < 0.3 else (-rng.random(len(r) - 1)).tolist() for r in responses]
    return {
        "prompt": rng.integers(3, 100, rng.integers(1, 7)).tolist(),
        "responses": responses,
        "sources": [SOURCES[code] for code in rng.integers(0, 3, count)],
        "rewards": rewards,
        "group_id": f"g-{index}-é",
        "answer": None if index % 3 == 0 else str(index),
        "outcomes": [None if reward is None else ("wrong", "unparsed", "correct")[int(reward)] for reward in rewards],
        "models": ["teacher-7b"] * count,
        "logprobs": known if logprobs else None,
    }


def write_shard(prefix: Path, groups: int = 20, seed: int = 0, stamp: TokenizerStamp = STAMP, **options) -> list[dict]:
    """Write a shard of random groups; return what went in."""
    rng = np.random.default_rng(seed)
    logprobs = options.pop("logprobs", True)
    content = [random_group(rng, i, logprobs) for i in range(groups)]
    with GroupShardWriter(prefix, stamp, **options) as writer:
        for group in content:
            writer.add_group(**group)
    return content


def write_recipe(folder: Path, tp: int) -> Path:
    """A two-layer Llama, a shard of random groups, and a configuration of two steps cut over ``tp`` tensor ranks."""
    from tiny_models import write_tiny_model  # imports transformers, which most tests do without

    from megatron_gft.tokenizer import tokenizer_fingerprint

    model = write_tiny_model(folder / "hf", "llama3", num_hidden_layers=2)
    stamp = TokenizerStamp(
        fingerprint=tokenizer_fingerprint(model), vocab_size=256, eos_id=2, bos_id=None, chat_template="none"
    )
    write_shard(folder / "groups", groups=40, stamp=stamp)
    config = {
        "model": {"config": str(model), "precision": "fp32"},
        "parallel": {"tp": tp},
        "data": {"train": [str(folder / "groups")], "groups_per_step": 8, "max_tokens_per_pack": 128},
        "objective": {"name": "sft", "sources": ["expert", "teacher", "self"]},
        "train": {"max_steps": 2},
        "checkpoint": {"init_from": f"hf:{model}"},
        "logging": {"progress_bar": False, "tensorboard": False},
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(config))
    return path
