"""The run: built once, then plan a step, run its packs, update, report, save."""

from __future__ import annotations

import logging
import math
import os
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from signal import Signals

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_gft.batch import Groups, StepBatch, StepSource, open_groups
from megatron_gft.checkpoint import (
    Checkpointer,
    RunState,
    SaveFailed,
    find_checkpoint,
    list_checkpoints,
    load_weights,
    newest_checkpoint,
)
from megatron_gft.config import Config
from megatron_gft.errors import InputError
from megatron_gft.hf.config import ModelShape, config_path
from megatron_gft.hf.weights import export_hf_weights, load_hf_weights
from megatron_gft.metrics import Record, Reporter, loss_record, step_record
from megatron_gft.model import build_model
from megatron_gft.optimizer import (
    apply_gradients,
    build_optimizer,
    build_scheduler,
    gathered_parameters,
    learning_rate,
    reduce_gradients,
    wrap_data_parallel,
)
from megatron_gft.packing import Pack
from megatron_gft.parallel import Parallel, destroy_parallel, initialize_parallel, seed_everything
from megatron_gft.prefetch import StepPrefetcher
from megatron_gft.runtime import StopRequest, Watchdog, set_up_logging, start_process_group
from megatron_gft.step import LossReport, StepRunner
from megatron_gft.timing import RankTimes, gather_times, traced

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
# Steps of gradient norms that a spike is measured against.
SPIKE_WINDOW = 50


class TrainingStopped(RuntimeError):
    """The run cannot go on: a step was not finite, or too many were skipped."""


@dataclass
class StepOutcome:
    """What one step did. ``updated`` is false when the update was skipped."""

    report: LossReport
    grad_norm: float
    lr: float
    updated: bool
    seconds: dict[str, float]
    times: RankTimes


@dataclass
class Trainer:
    """One run on this rank. Built by :func:`build_trainer`; every rank calls every method in the same order."""

    config: Config
    shape: ModelShape
    parallel: Parallel
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    runner: StepRunner
    source: StepSource
    prefetcher: StepPrefetcher
    validation: StepSource | None
    checkpointer: Checkpointer
    reporter: Reporter | None
    state: RunState
    total_steps: int
    stop: StopRequest
    watchdog: Watchdog
    save_seconds: float = 0.0
    slow_steps: int = 0
    recent_norms: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_WINDOW))

    def run(self) -> int:
        """Train until the last step or a stop request; returns the exit code."""
        settings = self.config.train
        while self.state.step < self.total_steps:
            with self.watchdog.doing(f"training step {self.state.step + 1}"):
                started = time.perf_counter()
                batch, packs = self.prefetcher.take(self.state.step)
                with traced(self.config.profile, self.state.step + 1, self.parallel.rank, self.output / "traces"):
                    outcome = self.step(batch, packs, time.perf_counter() - started)
                self.state = self._advance(batch, outcome)
                self._report(batch, outcome, time.perf_counter() - started)
            if settings.validate_every and self.state.step % settings.validate_every == 0:
                self.validate()
            signal = self.stop.agreed(self.device)
            self._save(last=self.state.step == self.total_steps or bool(signal))
            if signal:
                self._say(f"stopped by signal {signal} after step {self.state.step}; the checkpoint is complete")
                return StopRequest.CODES[Signals(signal)]
        self._say(f"finished {self.total_steps} steps; run folder {settings.output}")
        return 0

    @property
    def output(self) -> Path:
        """The run folder."""
        return Path(self.config.train.output)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device(torch.cuda.current_device())

    def step(self, batch: StepBatch, packs: list[Pack], data_seconds: float) -> StepOutcome:
        """Forward, backward and update of one planned step.

        Raises:
            TrainingStopped: loss or gradient is not finite, or spikes, and the policy says stop.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        started = time.perf_counter()
        report = self.runner.forward_backward(packs, batch.denominator)
        middle = time.perf_counter()
        grad_norm = reduce_gradients(self.optimizer)
        problem = self._problem(report, grad_norm)
        updated = problem is None and batch.denominator > 0
        if problem is not None:
            self._refuse(problem, report, batch, packs)
        elif updated:
            apply_gradients(self.optimizer, grad_norm, self.config.optimizer.clip_grad)
            self.recent_norms.append(grad_norm)
        seconds = {"data": data_seconds, "forward_backward": middle - started}
        seconds["optimizer"] = time.perf_counter() - middle
        times = gather_times(self.runner.timer.take(), seconds["forward_backward"], self.parallel)
        return StepOutcome(report, grad_norm, learning_rate(self.optimizer), updated, seconds, times)

    def _problem(self, report: LossReport, grad_norm: float) -> str | None:
        if not math.isfinite(report.loss):
            return f"the loss is {report.loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        factor = self.config.train.grad_spike_factor
        if factor and len(self.recent_norms) >= 10:
            median = statistics.median(self.recent_norms)
            if grad_norm > factor * median:
                return f"the gradient norm {grad_norm:.4g} is over {factor:g} times its running median {median:.4g}"
        return None

    def _suspects(self, report: LossReport, packs: int) -> list[int]:
        """This rank's microbatches to keep: those whose loss is not finite, or all when only the gradient is not.
        One tensor rank of the last stage speaks for its replica."""
        if not self.parallel.is_last_stage or self.parallel.tp_rank:
            return []
        return list(range(packs)) if math.isfinite(report.loss) else self.runner.nonfinite_packs()

    def _refuse(self, problem: str, report: LossReport, batch: StepBatch, packs: list[Pack]) -> None:
        """Keep the evidence of a step that was not finite, then stop or skip."""
        step = self.state.step + 1
        culprits = self._suspects(report, len(packs))
        folder = self.output / "nonfinite"
        for index in culprits:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(
                {"step": step, "rank": self.parallel.rank, "pack": packs[index].to("cpu")},
                folder / f"step-{step:08d}-rank-{self.parallel.rank}-pack-{index}.pt",
            )
        places = sorted({group for index in culprits for group in packs[index].groups})
        mine = [self.source.groups.describe(int(batch.groups[place])) for place in places]
        found: list[tuple[str, list[str]] | None] = [None] * self.parallel.world_size
        dist.all_gather_object(found, (self.parallel.coordinates, mine))
        found_on = [f"{rank}: groups {', '.join(names)}" for rank, names in filter(None, found) if names]
        text = f"step {step}: {problem}" + (f"; {'; '.join(found_on)}; saved in {folder}" if found_on else "")
        if self.config.train.nonfinite == "stop":
            raise TrainingStopped(text + " -> set train.nonfinite=skip to leave such steps out")
        if self.state.skipped_steps >= self.config.train.max_skipped_steps:
            raise TrainingStopped(f"{text}; train.max_skipped_steps={self.config.train.max_skipped_steps} reached")
        self._say(f"{text}; the update is skipped")

    def _advance(self, batch: StepBatch, outcome: StepOutcome) -> RunState:
        self.scheduler.step(1)
        return replace(
            self.state,
            step=self.state.step + 1,
            consumed_groups=self.state.consumed_groups + len(batch.groups),
            skipped_steps=self.state.skipped_steps + (0 if outcome.updated else 1),
        )

    def _report(self, batch: StepBatch, outcome: StepOutcome, step_seconds: float) -> None:
        if self.reporter is None:
            return
        record: Record = {"step": self.state.step}
        record |= loss_record(outcome.report, with_entropy=self.config.objective.entropy)
        record |= step_record(
            batch,
            world_size=self.parallel.world_size,
            grad_norm=outcome.grad_norm,
            lr=outcome.lr,
            seconds=outcome.seconds | {"step": step_seconds},
            peak_tflops=self.config.logging.peak_tflops,
        )
        record |= {
            "skipped_steps": self.state.skipped_steps,
            "seconds/save": self.save_seconds,
            "slowest_rank": outcome.times.slowest_rank,
            "slowest_rank_factor": outcome.times.slowest_factor,
            **{f"idle_share/stage_{i}": share for i, share in enumerate(outcome.times.idle_share_by_stage)},
        }
        if self.state.step % self.config.logging.every == 0 and (hint := outcome.times.hint):
            self.slow_steps += 1
            if self.slow_steps in (3, 30, 300):  # not a hiccup any more, and not a line a step
                self.reporter.say(hint)
        self.reporter.step(record)

    def validate(self) -> None:
        """Mean -log p per source over the first ``validate_groups`` of the validation data; no update."""
        if self.validation is None:
            return
        for chunk in self.chunks:
            chunk.eval()
        buckets, denominator, step = None, 0, 0
        size = self.config.data.groups_per_step
        with self.watchdog.doing(f"validating after step {self.state.step}"):
            while step * size < min(self.config.train.validate_groups, len(self.validation.groups)):
                batch = self.validation.batch(step)
                report = self.runner.forward_backward(
                    self.validation.packs(batch), batch.denominator, forward_only=True
                )
                buckets = report.buckets if buckets is None else buckets + report.buckets
                denominator += batch.denominator
                step += 1
        for chunk in self.chunks:
            chunk.train()
        if self.reporter is not None and buckets is not None:
            record = loss_record(
                LossReport(buckets, denominator), with_entropy=self.config.objective.entropy, prefix="valid/"
            )
            self.reporter.validation({"step": self.state.step} | record)

    def _save(self, *, last: bool) -> None:
        started = time.perf_counter()
        self._save_if_due(last=last)
        self.save_seconds = time.perf_counter() - started

    def _save_if_due(self, *, last: bool) -> None:
        settings, step = self.config.checkpoint, self.state.step
        due = settings.save_every is not None and step % settings.save_every == 0
        export = settings.export_hf == "last" and step == self.total_steps
        if isinstance(settings.export_hf, int):
            export = step % settings.export_hf == 0 or step == self.total_steps
        with self.watchdog.doing(f"saving after step {step}"):
            failed = self.checkpointer.poll()
            if not (due or last or failed or export):
                return
            with gathered_parameters(self.chunks):
                if due or last or failed:
                    self.checkpointer.save(self.state)
                if export:
                    self._export()
                if last and self.checkpointer.wait():
                    self.checkpointer.save(self.state)

    def _export(self) -> None:
        folder = self.output / "export" / f"step-{self.state.step:08d}"
        if not folder.exists():
            files = config_path(self.config.model.config).parent
            export_hf_weights(self.chunks, self.shape, self.parallel, folder, model_files=files)
            self._say(f"exported to {folder}")

    def _say(self, text: str) -> None:
        if self.reporter is not None:
            self.reporter.say(text)

    def close(self) -> None:
        """End background work; safe to call after a failure."""
        self.prefetcher.close()
        self.watchdog.stop()
        if self.reporter is not None:
            self.reporter.close()


def build_trainer(
    config: Config, shape: ModelShape, parallel: Parallel, train_groups: Groups, valid_groups: Groups | None
) -> Trainer:
    """Model, optimizer, data and outputs of a run, with weights loaded and the run's state restored.

    Raises:
        InputError: weights or checkpoint do not fit, or the data changed since the checkpoint was written.
    """
    run_folder = Path(config.train.output)
    checkpoints = run_folder / "checkpoints"
    source = StepSource(train_groups, config, shape, parallel)
    total_steps = source.steps_per_epoch * config.train.epochs
    total_steps = min(total_steps, config.train.max_steps or total_steps)
    found = [_resume_point(config, checkpoints) if parallel.rank == 0 else None]
    dist.broadcast_object_list(found, src=0)
    resume_from = found[0]

    seed_everything(config.train.seed, parallel)
    transformer, modules = build_model(shape, config.model, config.objective, config.parallel, parallel)
    if resume_from is None:
        _initial_weights(config, shape, parallel, modules)
    chunks = wrap_data_parallel(modules, transformer, config.optimizer)
    optimizer = build_optimizer(chunks, config.optimizer, bf16=transformer.bf16)
    scheduler = build_scheduler(optimizer, config.optimizer, total_steps)
    checkpointer = Checkpointer(
        checkpoints,
        chunks,
        optimizer,
        parallel,
        keep_last=config.checkpoint.keep_last,
        background=config.checkpoint.async_save,
        model_files=config_path(config.model.config).parent,
    )
    state = RunState(data_fingerprint=train_groups.fingerprint, groups_per_step=config.data.groups_per_step)
    if resume_from is not None:
        stored = checkpointer.load(resume_from, with_optimizer=config.checkpoint.load_optimizer)
        _check_same_data(stored, state, config, resume_from)
        state = replace(stored, data_fingerprint=state.data_fingerprint, groups_per_step=state.groups_per_step)
    scheduler.step(state.step + 1)  # update k uses the rate of step k: the first one is not wasted at rate 0
    objective = config.objective
    return Trainer(
        config=config,
        shape=shape,
        parallel=parallel,
        chunks=chunks,
        optimizer=optimizer,
        scheduler=scheduler,
        runner=StepRunner(chunks, parallel, tau=objective.tau, kind=objective.coefficient or "rectified"),
        source=source,
        prefetcher=StepPrefetcher(source, total_steps),
        validation=StepSource(valid_groups, config, shape, parallel, validation=True) if valid_groups else None,
        checkpointer=checkpointer,
        reporter=_reporter(config, run_folder, state, total_steps) if parallel.rank == 0 else None,
        state=state,
        total_steps=total_steps,
        stop=StopRequest(),
        watchdog=Watchdog(config.train.watchdog_minutes, parallel.coordinates),
    )


def _resume_point(config: Config, checkpoints: Path) -> Path | None:
    if config.checkpoint.resume == "never":
        if list_checkpoints(checkpoints):
            raise InputError(
                f"{checkpoints}: holds checkpoints and checkpoint.resume=never would overwrite them -> choose another "
                "train.output, or remove them"
            )
        return None
    return find_checkpoint(checkpoints, config.checkpoint.resume)


def _initial_weights(config: Config, shape: ModelShape, parallel: Parallel, modules: list[torch.nn.Module]) -> None:
    origin = config.checkpoint.init_from
    if origin is None:
        logger.info("checkpoint.init_from is not set: training starts from random weights")
    elif origin.startswith("hf:"):
        load_hf_weights(modules, shape, origin.removeprefix("hf:"), parallel)
    else:
        load_weights(newest_checkpoint(Path(origin), "checkpoint.init_from"), modules, parallel)


def _check_same_data(stored: RunState, now: RunState, config: Config, path: Path) -> None:
    """The order of groups is a function of these two; with others, "continue at step n" means other groups."""
    if config.data.allow_changed_data:
        return
    if stored.data_fingerprint != now.data_fingerprint or stored.groups_per_step != now.groups_per_step:
        raise InputError(
            f"{path}: was trained on other data (shards, weights, split, seed or groups_per_step "
            f"{stored.groups_per_step}, now {now.groups_per_step}) -> restore them, or set "
            "data.allow_changed_data=true to go on from the same step number in the new order"
        )


def _reporter(config: Config, run_folder: Path, state: RunState, total_steps: int) -> Reporter:
    return Reporter(
        run_folder,
        config.logging,
        first_step=state.step,
        total_steps=total_steps,
        resolved=config.model_dump(mode="json"),
    )


def train(config: Config, shape: ModelShape) -> int:
    """Run the whole job on this process; returns its exit code."""
    if os.environ.get("RANK", "0") == "0":
        try:
            config.write(Path(config.train.output) / "config.yaml")
        except OSError as error:
            raise InputError(f"train.output={config.train.output}: cannot be written ({error.strerror})") from None
    data = None if config.data.cache else open_groups(config, shape)  # Megatron's cache needs the process group
    device = start_process_group(config.parallel.collective_timeout_minutes)
    set_up_logging(dist.get_rank())
    p = config.parallel
    parallel = initialize_parallel(
        tp=p.tp, pp=p.pp, vpp=p.vpp, cp=p.cp, ep=p.ep, etp=p.etp, timeout_minutes=p.collective_timeout_minutes
    )
    train_groups, valid_groups = data or open_groups(config, shape)
    for split in filter(None, (train_groups, valid_groups)):
        if any(asdict(split.limited).values()):
            logger.info("%s data: %s (data.overlong=%s)", split.name, split.limited, config.data.overlong)
    trainer = build_trainer(config, shape, parallel, train_groups, valid_groups)
    logger.info("%s on %d x %s", describe(trainer), parallel.world_size, device)
    try:
        code = trainer.run()
    except (TrainingStopped, SaveFailed) as error:
        if parallel.rank == 0:
            logger.error("%s", error)
        code = EXIT_FAILED
    finally:
        trainer.close()
    destroy_parallel()
    return code


def describe(trainer: Trainer) -> str:
    """One line about the run, for its log."""
    config, parallel = trainer.config, trainer.parallel
    layout = f"tp {parallel.tp_size}, pp {parallel.pp_size}, cp {parallel.cp_size}, dp {parallel.dp_size}"
    if parallel.ep_size > 1:
        layout += f", ep {parallel.ep_size}"
    return (
        f"{config.objective.name} on {len(trainer.source.groups)} groups, {trainer.total_steps} steps from "
        f"{trainer.state.step}; {layout}"
    )
