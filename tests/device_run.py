"""Train a tiny model for a few steps on whatever device this process sees; print losses and gradient norms as JSON.

Run as a program by the GPU tests: with ``CUDA_VISIBLE_DEVICES=`` it is the CPU reference, without it the GPU run.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from memory_groups import MemoryGroups

from megatron_gft.config import Config, load_config
from megatron_gft.hf.shape import read_model_shape
from megatron_gft.job import build_trainer
from megatron_gft.parallel import destroy_parallel, initialize_parallel
from megatron_gft.runtime import set_up_logging, start_process_group
from megatron_gft.shards import Group


class RandomGroups(MemoryGroups):
    """Random groups: ragged sizes and lengths, one expert each, some groups of equal rewards."""

    def __init__(self, count: int, vocab_size: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        items = []
        for _ in range(count):
            size = int(rng.integers(2, 7))
            prompt = rng.integers(0, vocab_size, rng.integers(4, 60))
            responses = [rng.integers(0, vocab_size, rng.integers(1, 80)) for _ in range(size)]
            sources = np.array([0] + [int(rng.integers(1, 3)) for _ in range(size - 1)], dtype=np.int8)
            items.append(Group(prompt, responses, sources, rng.integers(0, 2, size).astype(np.float32), None))
        super().__init__(items, f"random-{count}-{vocab_size}-{seed}")


def make_config(model: str, output: str, overrides: list[str]) -> Config:
    """Of a run that starts from ``model``, without TensorBoard."""
    return load_config(
        [],
        [
            f"model.config={model}",
            f"train.output={output}",
            f"checkpoint.init_from=hf:{model}",
            "data.groups_per_step=8",
            "data.max_tokens_per_pack=512",
            "optimizer.lr=1e-3",
            "logging.progress_bar=false",
            "logging.tensorboard=false",
            *overrides,
        ],
    )


def run(model: str, output: str, overrides: list[str]) -> dict:
    """Losses and gradient norms of each step of a run on :class:`RandomGroups`."""
    config = make_config(model, output, overrides)
    if not dist.is_initialized():
        start_process_group(5)
    set_up_logging(dist.get_rank())
    shape = read_model_shape(model)
    p = config.parallel
    parallel = initialize_parallel(tp=p.tp, pp=p.pp, vpp=p.vpp, cp=p.cp, ep=p.ep, etp=p.etp)
    trainer = build_trainer(
        config, shape, parallel, RandomGroups(32, shape.vocab_size), RandomGroups(8, shape.vocab_size, 1)
    )
    code = trainer.run()
    trainer.close()
    destroy_parallel()
    records = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "loss" in record]  # not those of validations
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "code": code,
        "device": device,
        "loss": [record["loss"] for record in records],
        "grad_norm": [record["grad_norm"] for record in records],
    }


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], sys.argv[2], sys.argv[3:])))
