"""Measurements of whole steps as ratios: GFT against SFT, shared prompts, padded batches.

Every function runs the trainer's own parts (plan, packs, model under Megatron's DDP, optimizer) on one rank.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_gft.batch import StepBatch
from megatron_gft.logprobs import LogprobRunner
from megatron_gft.metrics import device_peak_tflops
from megatron_gft.model import unwrap
from megatron_gft.packing import Pack, build_pack
from megatron_gft.pipeline import schedule_arguments
from megatron_gft.planning import PackPlan
from megatron_gft.sizing.memory import estimate_activations, static_memory
from tools.bench.head import peak, reset_peak, single_rank
from tools.bench.packing import lognormal_lengths
from tools.bench.timing import interleaved_seconds, summary
from tools.bench.workbench import RandomGroups, StepShape, Workbench, default_shape, relative_error

# Pairs of a comparison whose goal is within a percent.
PAIRS = 31

# Responses in a padded batch.
BATCH_SIZE = 8

# (prompt, response, responses) of the shared-prefix comparison, and the share of the formula that is the goal.
PREFIX_SHAPES = ((120, 200, 8, 0.90), (1000, 250, 8, 0.95), (2000, 125, 8, 0.95))


def step_ratio(shape: StepShape | None = None, *, pairs: int = PAIRS) -> dict[str, Any]:
    """A GFT step and what Megatron runs by itself over an SFT step on the same rows: forward, backward, clipping, Adam.

    Goal: median ratio of GFT at most 1.01 (CPU), 1.003 (GPU); 1 is the limit. ``mfu`` where the device's peak is known;
    ``peak`` is what a GFT step held at most, in bytes, ``planned`` what ``plan.py`` says of it.
    """
    shape = shape or default_shape()
    with single_rank():
        before = reset_peak()
        bench = Workbench(shape)
        packs, batch = bench.packs(RandomGroups.equal(shape))
        plain = [dataclasses.replace(pack, token_weights=torch.ones_like(pack.token_weights)) for pack in packs]

        runs = {"sft": partial(bench.step, plain, batch.denominator, "none")}
        runs["gft"] = partial(bench.step, packs, batch.denominator)
        runs["gft"]()
        held, static = peak() - before, static_memory(bench.chunks, bench.optimizer)
        planned = static.total + estimate_activations(bench.config, bench.model_shape, 0, static, len(packs)).total
        durations = interleaved_seconds(runs | {"plain": partial(_plain_step, bench, packs)}, repeats=pairs)
    result = summary(durations, "sft")
    found = {"peak": held, "planned": planned, "peak / planned": held / planned}
    seconds = {name: run["seconds_median"] for name, run in result.items()}
    assert batch.plan is not None
    if top := device_peak_tflops():
        found |= {f"mfu {name}": batch.plan.flops / taken / top / 1e12 for name, taken in seconds.items()}
    found |= {"tokens per second": batch.plan.tokens / seconds["gft"], "gft / plain": seconds["gft"] / seconds["plain"]}
    return {"shape": dataclasses.asdict(shape), "pairs": pairs, **found, **result}


def _plain_step(bench: Workbench, packs: list[Pack]) -> None:
    """Megatron's own: logits of every row, its cross entropy, a mask of the loss tokens."""

    def forward(iterator: Iterator[Pack], chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        pack = next(iterator)
        labels, mask = torch.zeros_like(pack.tokens), torch.zeros_like(pack.tokens, dtype=torch.float32)
        labels[pack.loss_rows], mask[pack.loss_rows] = pack.labels, 1.0
        losses = vocab_parallel_cross_entropy(unwrap(chunk).logits(pack)[:, None], labels[:, None])[:, 0]
        return (losses * mask).sum(), lambda total: (total, mask.sum().int(), {})

    bench.clear()
    rows = [len(pack.tokens) for pack in packs]
    options = schedule_arguments(bench.parallel, unwrap(bench.chunks[0]).config, rows)
    options |= {"seq_length": max(rows), "micro_batch_size": 1, "num_microbatches": len(packs), "forward_only": False}
    run = get_forward_backward_func()
    run(forward_step_func=forward, data_iterator=iter(packs), model=bench.chunks[0], **options)
    bench.update()


def logprob_throughput(shape: StepShape | None = None, *, pairs: int = 15) -> dict[str, Any]:
    """The forward-only pass of ``tools/compute_logprobs.py`` and a GFT step (forward, backward, clipping, Adam) on the
    same rows.

    Goal: ``speedup``, tokens a second of the pass over those of the step (median of the pairs), at least 2.5.
    """
    shape = shape or default_shape()
    with single_rank():
        bench = Workbench(shape)
        packs, batch = bench.packs(RandomGroups.equal(shape))
        starts = np.cumsum([0, *(len(pack.labels) for pack in packs)])
        placed = [
            dataclasses.replace(pack, sampled_logprobs=start + torch.arange(len(pack.labels), dtype=torch.float64))
            for pack, start in zip(packs, starts[:-1].tolist(), strict=True)
        ]
        tokens = int(starts[-1])
        runner = LogprobRunner(bench.chunks, bench.parallel)

        def forward() -> None:
            for chunk in bench.chunks:
                chunk.eval()
            values, _ = runner.logprobs(placed, range(tokens))
            assert np.isfinite(values).all()
            for chunk in bench.chunks:
                chunk.train()

        step = partial(bench.step, packs, batch.denominator)
        durations = interleaved_seconds({"forward": forward, "step": step}, repeats=pairs)
    result = summary(durations, "forward")
    rates = {name: tokens / result[name]["seconds_median"] for name in durations}
    told = {"shape": dataclasses.asdict(shape), "pairs": pairs, "tokens_per_second": rates}
    return told | {"speedup": result["step"]["ratio_median"], **result}


def shared_prefix_step(
    shape: StepShape | None = None, *, pairs: int = 3, shapes: Sequence[tuple[int, int, int, float]] = PREFIX_SHAPES
) -> dict[str, Any]:
    """Forward and backward of the whole model, packed over shared prefix, against the ratio of their FLOPs.

    Goal: ``attained`` = speed-up / formula at least 0.90 for GSM8K's shape, 0.95 for prompts of 1000 and more.
    """
    shape = shape or dataclasses.replace(default_shape(), hidden=512, heads=8, ffn=1408, layers=1)
    rows = []
    with single_rank():
        bench = Workbench(shape)
        for prompt, response, responses, goal in shapes:
            rows.append(_prefix_row(bench, prompt, response, responses, pairs) | {"goal": goal})
    return {"model": dataclasses.asdict(shape), "rows": rows}


def _prefix_row(bench: Workbench, prompt: int, response: int, responses: int, pairs: int) -> dict[str, Any]:
    groups = max(1, 16384 // (responses * (prompt + response))) if torch.cuda.is_available() else 1
    bench.shape = dataclasses.replace(
        bench.shape,
        groups=groups,
        prompt=prompt,
        response=response,
        responses=responses,
        pack_rows=groups * responses * (prompt + response),
    )
    data = RandomGroups.equal(bench.shape)
    made = {form: bench.packs(data, f"data.packing={form}") for form in ("shared_prefix", "packed")}
    gradients: dict[str, torch.Tensor] = {}
    runs: dict[str, Callable[[], Any]] = {}
    flops: dict[str, float] = {}
    for form, (packs, batch) in made.items():
        bench.forward_backward(packs, batch.denominator)
        gradients[form] = bench.gradients()
        runs[form] = partial(bench.forward_backward, packs, batch.denominator)
        flops[form] = batch.plan.flops if batch.plan else 0.0
    result = summary(interleaved_seconds(runs, repeats=pairs), "shared_prefix")
    formula = flops["packed"] / flops["shared_prefix"]
    speedup = result["packed"]["ratio_of_min"]
    return {
        "prompt": prompt,
        "response": response,
        "responses": responses,
        "groups": groups,
        "formula": formula,
        "speedup": speedup,
        "attained": speedup / formula,
        "speedup_median": result["packed"]["ratio_median"],
        "gradient_error": relative_error(gradients["shared_prefix"], gradients["packed"]),
        "seconds_packed": result["packed"]["seconds_min"],
        "seconds_shared_prefix": result["shared_prefix"]["seconds_min"],
    }


def padded_batches(shape: StepShape | None = None, *, pairs: int = 5) -> dict[str, Any]:
    """Forward and backward of the same responses packed, with shared prompts, and as padded batches.

    Lengths are GSM8K's (``bench/packing.py``). A padded batch is what trainers without packing run: ``BATCH_SIZE``
    responses, each with its prompt, in the order of the data, padded to the longest of the batch, logits of every
    row. The rows ratio is what padding and repeated prompts cost where time goes with rows.
    """
    shape = shape or default_shape()
    with single_rank():
        bench = Workbench(shape)
        data = RandomGroups(lognormal_lengths("gsm8k", shape.groups, shape.responses), shape.vocab)
        made = {form: bench.packs(data, f"data.packing={form}") for form in ("packed", "shared_prefix")}
        packs = {form: packs for form, (packs, _) in made.items()}
        batch = made["packed"][1]
        packs["padded"] = _padded(data, batch)
        runs, gradients = {}, {}
        for form, microbatches in packs.items():
            runs[form] = partial(bench.forward_backward, microbatches, batch.denominator)
            runs[form]()
            gradients[form] = bench.gradients()
        durations = interleaved_seconds(runs, repeats=pairs)
    rows = {form: sum(len(pack.tokens) for pack in microbatches) for form, microbatches in packs.items()}
    return {
        "shape": dataclasses.asdict(shape) | {"prompt": "gsm8k", "response": "gsm8k"},
        "batch_size": BATCH_SIZE,
        "rows": rows,
        "rows_ratio": {form: rows["padded"] / count for form, count in rows.items()},
        "gradient_error": {form: relative_error(gradients[form], gradients["padded"]) for form in packs},
        **{f"over_{form}": summary(durations, form)["padded"] for form in ("packed", "shared_prefix")},
    }


def _padded(data: RandomGroups, batch: StepBatch) -> list[Pack]:
    """Padded batches as packs of segments of one length, with loss rows of weight 0 where others compute logits."""
    groups = {place: data[int(index)] for place, index in enumerate(batch.groups)}
    responses = [(place, k) for place, group in groups.items() for k in range(len(group.responses))]
    packs = []
    for start in range(0, len(responses), BATCH_SIZE):
        members = responses[start : start + BATCH_SIZE]
        longest = max(len(groups[g].prompt) + len(groups[g].responses[k]) for g, k in members)
        plan = PackPlan(tuple((g, (k,)) for g, k in members), longest * len(members), 0.0, 0)
        pack = build_pack(plan, groups, batch.offsets, batch.weights, batch.advantages, segment_multiple=longest)
        unused = torch.tensor(np.setdiff1d(np.arange(len(pack.tokens)), pack.loss_rows.numpy()))
        zeros = torch.zeros(len(unused))
        packs.append(
            dataclasses.replace(
                pack,
                loss_rows=torch.cat((pack.loss_rows, unused)),
                labels=torch.cat((pack.labels, zeros.long())),
                token_weights=torch.cat((pack.token_weights, zeros)),
                sources=torch.cat((pack.sources, zeros.to(pack.sources.dtype))),
                advantages=torch.cat((pack.advantages, zeros)),
                response_index=torch.cat((pack.response_index, zeros.to(pack.response_index.dtype))),
            ).to(torch.device(torch.cuda.current_device()))
        )
    return packs
