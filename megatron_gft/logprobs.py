"""Log-probs of one model for every response token of group shards: forward only, at any layout, restartable.

The steps are those of validation: ``data.groups_per_step`` groups of a shard in its own order, nothing left out. In a
pack the places of tokens in the file travel where log-probs do in training, so that limits, packing and context
parallelism treat both alike.
"""

import contextlib
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

from megatron_gft import __version__
from megatron_gft.batch import StepLoader, length_limits, open_groups
from megatron_gft.checkpoints.verification import model_hash
from megatron_gft.config import Config
from megatron_gft.errors import InputError
from megatron_gft.hf.shape import ModelShape
from megatron_gft.hf.shared_folder import gather_results
from megatron_gft.job import load_model, model_files
from megatron_gft.journal import Journal
from megatron_gft.model import LossOutput
from megatron_gft.packing import Pack
from megatron_gft.parallel import Parallel
from megatron_gft.progress import ProgressBar
from megatron_gft.shards import Group, GroupShard
from megatron_gft.shards.limited import LimitedGroups
from megatron_gft.shards.logprobs import has_logprobs, open_pieces, piece, publish
from megatron_gft.shards.verification import verify_at_start
from megatron_gft.step import StepRunner

logger = logging.getLogger(__name__)


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
        equal on all ranks. Collective."""
        self.first = tokens.start
        self.found = torch.zeros(2, len(tokens), device=torch.device(torch.cuda.current_device()))  # sum, number
        self.forward_backward(packs, 0, forward_only=True)
        dist.all_reduce(self.found)
        values, counts = self.found.cpu()
        assert counts.max() <= 1, "a token in two packs"
        return torch.where(counts > 0, values, torch.nan).numpy(), (counts > 0).numpy()

    def _loss(self, pack: Pack, output: LossOutput, count: int, loss_sum: torch.Tensor):
        if self.parallel.tp_rank == 0 and pack.sampled_logprobs is not None:
            places = pack.sampled_logprobs.long() - self.first
            self.found[0, places], self.found[1, places] = output.logprobs.float(), 1.0
        return loss_sum, loss_sum.new_zeros((), dtype=torch.int), {"token_sums": loss_sum.new_zeros(())}


def compute_logprobs(config: Config, shape: ModelShape, parallel: Parallel, name: str) -> list[str]:
    """Write log-probs called ``name`` by the model of ``checkpoint.init_from`` for each shard of ``data.train`` that
    has none. Collective. Returns the prefixes of all the shards.

    Raises:
        InputError: weights or shards that are damaged or do not fit, a name taken by another model, log-probs that are
            not finite.
    """
    whole: dict[str, Any] = {"train_weights": None, "valid": [], "split": "100,0", "cache": None}
    plain = {"coefficient": "none", "beta": 0.0, "entropy": False}
    changes = {"data": config.data.model_copy(update=whole), "objective": config.objective.model_copy(update=plain)}
    config = config.model_copy(update=changes)
    groups, _ = open_groups(config, shape, model_files(config, None).folder)
    if config.data.verify:
        verify_at_start(groups.shards, Path(config.train.output) / "verified.json")
    m, origin = config.model, str(config.checkpoint.init_from)
    made: dict[str, Any] = {
        "model": model_hash(origin),
        "source": origin,
        "config_mismatch": m.allow_config_mismatch,
        "layout": config.parallel.model_dump(exclude={"collective_timeout_minutes"}) | {"dp": parallel.dp_size},
        "packs": [config.data.packing, config.data.max_tokens_per_pack, config.data.groups_per_step],
        "dtype": f"{m.precision}{m.fp8 and f', fp8 {m.fp8}' or ''}",
        "temperature": 1,
        "tool_version": __version__,
    }
    prefixes = [shard.prefix for shard in groups.shards]
    # One process looks for all: a manifest may be replaced meanwhile.
    there = gather_results(
        lambda: [] if parallel.rank else [p for p in prefixes if has_logprobs(p, name, made["model"])]
    )[0]
    runner = LogprobRunner(load_model(config, shape, parallel) if len(there) < len(prefixes) else [], parallel)
    for prefix in prefixes:
        if prefix in there:
            logger.info("%s: has log-probs %r of this model already", prefix, name)
        else:
            _write_shard(config, shape, runner, prefix, name, made)
    return prefixes


def _write_shard(
    config: Config, shape: ModelShape, runner: LogprobRunner, prefix: str, name: str, made: dict[str, Any]
) -> None:
    """All steps of one shard that an interrupted run has not left; rank 0 writes."""
    limits, is_first, started = length_limits(config, shape), runner.parallel.rank == 0, time.perf_counter()
    shard = TokenPlaces(prefix, (None, None))
    groups = LimitedGroups([shard], limits)
    loader = StepLoader(groups, config, shape, runner.parallel, validation=True)
    loader.with_sampled = True
    keys, opened, tokens = [*map(str, range(loader.steps_per_epoch))], list[Journal](), 0

    def begin() -> list[str]:
        if is_first:
            opened.append(open_pieces(prefix, {"name": name, **made, "limits": [*vars(limits).values()]}))
        return [key for pieces in opened for key in keys if key not in pieces]

    def keep(key: str, start: int, values: np.ndarray) -> None:
        for pieces in opened:
            pieces.append(key, piece(start, values))

    try:
        missing = gather_results(begin)[0]
        with contextlib.closing(loader.ahead(map(int, missing))) as steps:
            for key in ProgressBar(missing, prefix, unit="step", show=is_first and config.logging.progress_bar):
                batch, packs = next(steps)
                first, last = (groups.locate(int(i))[1] for i in batch.groups[[0, -1]])
                places = range(int(shard.response_starts[first]), int(shard.response_starts[last + 1]))
                values, computed = runner.logprobs(packs, places)
                if (bad := computed & ~np.isfinite(values)).any():
                    i = int(np.searchsorted(shard.response_starts, places[int(bad.argmax())], side="right")) - 1
                    raise InputError(
                        f"{prefix} group {i} (id {shard.meta(i)['id']!r}): its log-probs are NaN or infinite, by "
                        f"{made['source']} in {made['dtype']} -> model.precision=fp32, or other weights"
                    )
                gather_results(partial(keep, key, places.start, values))
                tokens += int(computed.sum())
        file = gather_results(lambda: [publish(prefix, name, made, pieces, keys) for pieces in opened])[0][0]
    finally:
        for pieces in opened:
            pieces.close()
    seconds = time.perf_counter() - started
    logger.info("%s: %s, %d tokens in %.1f s (%.0f tokens/s)", prefix, file, tokens, seconds, tokens / seconds)
