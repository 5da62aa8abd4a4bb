"""Log-probs of one model for every response token of group shards: forward only, at any layout, restartable.

The steps are those of validation: ``data.groups_per_step`` groups of a shard in its own order, nothing left out. Each
finished step is kept (:mod:`megatron_gft.shards.logprobs`). In a pack the places of tokens in the file travel where
log-probs do in training, so limits, packing and context parallelism treat both alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_gft import __version__
from megatron_gft.batch import StepLoader, StepPrefetcher, length_limits, open_groups
from megatron_gft.checkpoints.verification import model_hash
from megatron_gft.config import Config, ObjectiveConfig
from megatron_gft.errors import InputError
from megatron_gft.hf.shape import ModelShape
from megatron_gft.hf.shared_folder import gather_results
from megatron_gft.job import load_model, model_files
from megatron_gft.model import LossOutput
from megatron_gft.packing import Pack
from megatron_gft.parallel import Parallel
from megatron_gft.shards import Group, GroupShard
from megatron_gft.shards.limited import LimitedGroups
from megatron_gft.shards.logprobs import LogprobWriter, has_logprobs, provenance_of
from megatron_gft.shards.manifest import read_manifest
from megatron_gft.shards.verification import verify_at_start
from megatron_gft.step import StepRunner

logger = logging.getLogger(__name__)


def forward_config(config: Config) -> Config:
    """The configuration of the pass: every group of ``data.train`` once, no objective, no validation."""
    head = config.objective.model_dump(include={"fused_head", "head_chunk_tokens"})
    objective = ObjectiveConfig(coefficient="none", advantage="none", entropy=False, **head)
    data = config.data.model_copy(update={"train_weights": None, "valid": [], "split": "100,0", "cache": None})
    train = config.train.model_copy(update={"validate_every": None})
    return config.model_copy(update={"objective": objective, "data": data, "train": train})


class TokenPlaces(GroupShard):
    """A shard whose groups bring, as their log-probs, the place of each response token in a file of them (int64)."""

    def __getitem__(self, i: int) -> Group:
        group = super().__getitem__(i)
        ends = int(self.response_starts[i]) + np.cumsum([len(tokens) for tokens in group.responses])
        return replace(group, logprobs=[np.arange(e - len(r), e) for r, e in zip(group.responses, ends, strict=True)])


class LogprobRunner(StepRunner):
    """Runs packs whose ``sampled_logprobs`` are places of tokens (float64, exact below 2^53)."""

    def logprobs(self, packs: Sequence[Pack], tokens: range) -> tuple[np.ndarray, np.ndarray]:
        """log p of the tokens at these places, float32 [n], NaN where no pack has one, and whether one has, bool [n];
        equal on all ranks. Collective.
        """
        self.tokens, device = tokens, torch.device(torch.cuda.current_device())
        self.found = torch.zeros(2, len(tokens), device=device)  # sum and number of values
        self.forward_backward(packs, 0, forward_only=True)
        dist.all_reduce(self.found)
        values, counts = self.found.cpu()
        assert counts.max() <= 1, "a token in two packs"
        return torch.where(counts > 0, values, torch.nan).numpy(), (counts > 0).numpy()

    def _loss(self, pack: Pack, output: LossOutput, count: int, loss_sum: torch.Tensor):
        if self.parallel.tp_rank == 0 and len(pack.labels):
            assert pack.sampled_logprobs is not None
            places = pack.sampled_logprobs.long() - self.tokens.start
            self.found[0, places] = output.logprobs.float()
            self.found[1, places] = 1
        nothing = torch.zeros((), dtype=torch.float64, device=loss_sum.device)
        return loss_sum, nothing.int(), {"token_sums": nothing}


def compute_logprobs(config: Config, shape: ModelShape, parallel: Parallel, name: str) -> list[str]:
    """Write log-probs called ``name`` by the model of ``checkpoint.init_from`` for each shard of ``data.train`` that
    has none by it. Collective.

    Args:
        config: of :func:`forward_config`.

    Returns:
        Prefixes of all the shards, which have them now.

    Raises:
        InputError: weights or shards that are damaged or do not fit, a name taken by another model, log-probs that are
            not finite.
    """
    groups, _ = open_groups(config, shape, model_files(config, None).folder)
    if config.data.verify:
        verify_at_start(groups.shards, Path(config.train.output) / "verified.json")
    assert config.checkpoint.init_from is not None
    provenance = _provenance(config, parallel, model_hash(config.checkpoint.init_from))
    prefixes = [shard.prefix for shard in groups.shards]
    # One process looks, for all: a manifest may be replaced meanwhile.
    standing = gather_results(
        lambda: [] if parallel.rank else [p for p in prefixes if has_logprobs(p, name, provenance["model"])]
    )[0]
    for prefix in standing:
        made = provenance_of(read_manifest(prefix), name)
        logger.info("%s: has log-probs %r of this model; %s tokens without", prefix, name, made.get("unknown"))
    if len(standing) < len(prefixes):
        runner = LogprobRunner(load_model(config, shape, parallel), parallel)
        for prefix in prefixes:
            if prefix not in standing:
                _write_shard(config, shape, runner, prefix, name, provenance)
    return prefixes


def _provenance(config: Config, parallel: Parallel, model: str) -> dict[str, Any]:
    p, m = config.parallel, config.model
    return {
        "model": model,
        "source": config.checkpoint.init_from,
        "config_mismatch": list(m.allow_config_mismatch),
        "layout": {**p.model_dump(exclude={"collective_timeout_minutes"}), "dp": parallel.dp_size},
        "packing": {"form": config.data.packing, "max_tokens": config.data.max_tokens_per_pack},
        "dtype": m.precision if m.fp8 is None else f"{m.precision}, fp8 {m.fp8}",
        "temperature": 1,
        "tool_version": __version__,
    }


def _write_shard(
    config: Config, shape: ModelShape, runner: LogprobRunner, prefix: str, name: str, provenance: dict[str, Any]
) -> None:
    """All steps of one shard that an interrupted run has not left; rank 0 writes."""
    shard, started, writers = TokenPlaces(prefix, (None, None)), time.perf_counter(), list[LogprobWriter]()
    limits = length_limits(config, shape)
    groups = LimitedGroups([shard], limits)
    loader = StepLoader(groups, config, shape, runner.parallel, validation=True)
    loader.with_sampled = True

    def begin() -> list[str]:
        if runner.parallel.rank:
            return []
        pieces = {"groups": config.data.groups_per_step, "limits": [*vars(limits).values()]}
        writers.append(LogprobWriter(prefix, name, provenance, pieces))
        return writers[0].done

    def keep(key: str, start: int, values: np.ndarray) -> None:
        for writer in writers:
            writer.add(key, start, values)

    done = gather_results(begin)[0]
    steps = [step for step in range(loader.steps_per_epoch) if str(step) not in done]
    prefetcher, tokens = StepPrefetcher(loader, loader.steps_per_epoch), 0
    try:
        for step in tqdm(steps, desc=prefix, unit="step", disable=not (writers and config.logging.progress_bar)):
            batch, packs = prefetcher.take(step)
            first, last = (groups.locate(int(i))[1] for i in batch.groups[[0, -1]])
            places = range(int(shard.response_starts[first]), int(shard.response_starts[last + 1]))
            values, computed = runner.logprobs(packs, places)
            _refuse_nonfinite(shard, places, computed & ~np.isfinite(values), config)
            gather_results(partial(keep, str(step), places.start, values))
            tokens += int(computed.sum())
        file = gather_results(lambda: [writer.publish() for writer in writers])[0][0]
    finally:
        prefetcher.close()
        for writer in writers:
            writer.journal.close()
    seconds = time.perf_counter() - started
    logger.info("%s: %s, %d tokens in %.1f s (%.0f a second)", prefix, file, tokens, seconds, tokens / seconds)


def _refuse_nonfinite(shard: GroupShard, places: range, bad: np.ndarray, config: Config) -> None:
    if not bad.any():
        return
    group = int(np.searchsorted(shard.response_starts, places.start + int(bad.argmax()), side="right")) - 1
    raise InputError(
        f"{shard.prefix} group {group} (id {shard.meta(group)['id']!r}): {int(bad.sum())} log-probs of its step are "
        f"NaN or infinite, by {config.checkpoint.init_from} in {config.model.precision} -> model.precision=fp32, or "
        "other weights"
    )
