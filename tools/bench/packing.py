"""Measurements of packs: what sharing a prompt gains against its formula, and what the planner costs and reaches.

Functions for ``tools/bench.py``: each returns a JSON value, measures ratios within one run with the contestants
interleaved, and picks the device it is given. CPU times are process times, so that other load counts less.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_gft.attention import CoreAttention, PackLayout, RMSNorm
from megatron_gft.packing import Pack, build_pack
from megatron_gft.planning import FlopModel, GroupLengths, Packing, plan_step
from megatron_gft.shards import Group

# (prompt, response, responses): GSM8K, mathematical chains of thought, balanced, and two with long prompts.
SHARED_PREFIX_SHAPES = ((120, 200, 8), (200, 1500, 8), (1000, 1000, 8), (2000, 125, 8), (4000, 250, 4))

# Llama 70B: trunk parameters, layers x hidden size, hidden size x vocabulary.
PLANNER_FLOP_MODEL = FlopModel(6 * 68.45e9, 12 * 80 * 8192, 6 * 8192 * 128256)

# Lognormal lengths as (median, sigma, least, most) of prompt and response, and the rows of a pack.
PLANNER_SHAPES: Mapping[str, tuple[tuple[int, float, int, int], tuple[int, float, int, int], int]] = {
    "gsm8k": ((115, 0.3, 70, 300), (180, 0.45, 20, 900), 8192),
    "math": ((180, 0.4, 60, 900), (1200, 0.7, 100, 12000), 16384),
    "long_prompt": ((7300, 0.5, 1000, 30000), (450, 0.5, 50, 2500), 65536),
}


PACKINGS: tuple[Packing, ...] = ("packed", "shared_prefix", "auto")


def lognormal_lengths(shape: str, groups: int = 64, responses: int = 8, seed: int = 0) -> list[GroupLengths]:
    """Synthetic lengths of a step in the manner of ``PLANNER_SHAPES[shape]``."""
    rng = np.random.default_rng(seed)

    def draw(median: int, sigma: float, least: int, most: int, size: int) -> list[int]:
        return np.clip(rng.lognormal(np.log(median), sigma, size), least, most).astype(int).tolist()

    prompt, response, _ = PLANNER_SHAPES[shape]
    return [GroupLengths(draw(*prompt, 1)[0], tuple(draw(*response, responses))) for _ in range(groups)]


def bench_planner(dp_sizes: Sequence[int] = (4, 8, 16), *, seeds: int = 5, repeats: int = 3) -> list[dict[str, Any]]:
    """Balance, fill and CPU time of plans for 64 groups of 8 responses; one row per shape, form and size."""
    model = PLANNER_FLOP_MODEL
    results = []
    for shape, (_, _, capacity) in PLANNER_SHAPES.items():
        for dp_size in dp_sizes:
            for packing in PACKINGS:
                plans, seconds = [], []
                for seed in range(seeds):
                    lengths = lognormal_lengths(shape, seed=seed)
                    tries = []
                    for _ in range(repeats):
                        start = time.process_time()
                        plan = plan_step(lengths, dp_size, capacity, packing=packing, flop_model=model)
                        tries.append(time.process_time() - start)
                    plans.append(plan)
                    seconds.append(min(tries))
                results.append(
                    {
                        "shape": shape,
                        "dp_size": dp_size,
                        "packing": packing,
                        "max_tokens_per_pack": capacity,
                        "balance_min": min(plan.balance for plan in plans),
                        "balance_mean": float(np.mean([plan.balance for plan in plans])),
                        "worst_balance_min": min(plan.worst_balance for plan in plans),
                        "fill_mean": float(np.mean([plan.fill for plan in plans])),
                        "cpu_ms_median": float(np.median(seconds)) * 1e3,
                        "cpu_ms_max": max(seconds) * 1e3,
                    }
                )
    return results


class TrunkLayer(torch.nn.Module):
    """Pre-norm, grouped-query attention with RoPE by position id, gated MLP."""

    def __init__(self, config: TransformerConfig, number: int):
        super().__init__()
        hidden, ffn = config.hidden_size, config.ffn_hidden_size
        self.channels = hidden // config.num_attention_heads
        self.heads = (config.num_attention_heads, config.num_query_groups, config.num_query_groups)
        self.norm, self.mlp_norm = RMSNorm(config, hidden), RMSNorm(config, hidden)
        self.qkv = torch.nn.Linear(hidden, sum(self.heads) * self.channels, bias=False)
        self.attention = CoreAttention(config, number, AttnMaskType.causal, "self")
        self.out = torch.nn.Linear(hidden, hidden, bias=False)
        self.up = torch.nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = torch.nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], layout: PackLayout) -> Tensor:
        """[T, hidden] -> [T, hidden]; ``rotation`` is (cos, sin), each [T, 1, channels / 2]."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (-1, self.channels)).split(self.heads, dim=1)
        q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        attended = self.attention(q[:, None], k[:, None], v[:, None], None, packed_seq_params=layout)
        x = x + self.out(attended[:, 0])
        gate, up = self.up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Trunk(torch.nn.Module):
    """A small decoder without embedding and head, and its ``flop_model``."""

    def __init__(self, layers: int = 1, hidden: int = 512, heads: int = 8, kv_heads: int = 2, ffn: int = 1792):
        super().__init__()
        config = TransformerConfig(
            num_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=kv_heads,
            ffn_hidden_size=ffn,
            attention_dropout=0.0,
        )
        self.hidden, self.channels = hidden, hidden // heads
        self.layers = torch.nn.ModuleList(TrunkLayer(config, number) for number in range(1, layers + 1))
        matrices = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        self.flop_model = FlopModel(6 * matrices, 12 * layers * hidden, 0)

    def forward(self, x: Tensor, position_ids: Tensor, layout: PackLayout) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        steps = torch.arange(0, self.channels, 2, device=x.device, dtype=torch.float32) / self.channels
        angles = torch.outer(position_ids.float(), 10000.0**-steps)[:, None]
        rotation = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, rotation, layout)
        return x


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def _packs_of_one_group(prompt: int, response: int, responses: int, flop_model: FlopModel) -> dict[str, Any]:
    """One group in both forms: ``{"packed": (pack, flops), "shared_prefix": ...}``."""
    rng = np.random.default_rng(0)
    lengths = [GroupLengths(prompt, (response,) * responses)]
    tokens = [rng.integers(0, 1000, length) for length in (prompt, *[response] * responses)]
    group = Group(tokens[0], tokens[1:], np.zeros(responses, np.int8), np.zeros(responses, np.float32), None)
    ones = np.ones(responses)
    packs = {}
    for packing in ("packed", "shared_prefix"):
        plan = plan_step(lengths, 1, 10**9, packing=packing, flop_model=flop_model)
        pack = build_pack(plan.packs[0][0], {0: group}, np.array([0, responses]), ones, ones)
        packs[packing] = (pack, plan.flops)
    return packs


def _gradients(trunk: Trunk, embedding: Tensor, targets: Tensor, pack: Pack) -> Tensor:
    """All gradients of a loss that is linear in the hidden states of the loss rows, flat."""
    trunk.zero_grad(set_to_none=True)
    hidden = trunk(F.embedding(pack.tokens, embedding), pack.position_ids, pack.layout)
    (hidden[pack.loss_rows] * F.embedding(pack.labels, targets)).sum().backward()
    return torch.cat([p.grad.flatten() for p in trunk.parameters() if p.grad is not None])


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time of one call: process time on the CPU, wall time between synchronisations on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        return time.perf_counter() - start
    start = time.process_time()
    run()
    return time.process_time() - start


def bench_shared_prefix(
    device: torch.device | str = "cpu",
    *,
    shapes: Sequence[tuple[int, int, int]] = SHARED_PREFIX_SHAPES,
    dtype: torch.dtype = torch.float32,
    repeats: int = 3,
    **trunk_sizes: int,
) -> list[dict[str, Any]]:
    """Forward and backward of one group's trunk, packed against shared prefix; one row per (P, R, G).

    ``formula`` is the ratio of FLOPs, ``speedup`` the ratio of times, ``attained`` their quotient;
    ``gradient_error`` is ||g_shared - g_packed|| / ||g_packed|| over all parameters.
    """
    device = torch.device(device)
    torch.manual_seed(0)
    trunk = Trunk(**trunk_sizes).to(device, dtype)
    embedding, targets = torch.randn(2, 1000, trunk.hidden, device=device, dtype=dtype)
    results = []
    for prompt, response, responses in shapes:
        packs = _packs_of_one_group(prompt, response, responses, trunk.flop_model)
        moved = {form: pack.to(device) for form, (pack, _) in packs.items()}
        seconds: dict[str, list[float]] = {form: [] for form in packs}
        gradients = {}
        for form, pack in moved.items():  # warm-up, and the comparison
            gradients[form] = _gradients(trunk, embedding, targets, pack).double()
        for _ in range(repeats):
            for form, pack in moved.items():
                gc.collect()
                seconds[form].append(_seconds(partial(_gradients, trunk, embedding, targets, pack), device))
        formula = packs["packed"][1] / packs["shared_prefix"][1]
        speedup = min(seconds["packed"]) / min(seconds["shared_prefix"])
        error = (gradients["shared_prefix"] - gradients["packed"]).norm() / gradients["packed"].norm()
        results.append(
            {
                "prompt": prompt,
                "response": response,
                "responses": responses,
                "rows_packed": len(moved["packed"].tokens),
                "rows_shared_prefix": len(moved["shared_prefix"].tokens),
                "seconds_packed": min(seconds["packed"]),
                "seconds_shared_prefix": min(seconds["shared_prefix"]),
                "formula": formula,
                "speedup": speedup,
                "attained": speedup / formula,
                "gradient_error": float(error),
            }
        )
    return results
