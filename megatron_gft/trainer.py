"""The loop of a run: take a step, run its packs, update, report, save. ``job.py`` builds what it needs."""

import math
import statistics
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from signal import Signals

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_gft.batch import StepBatch, StepLoader
from megatron_gft.checkpoints.checkpointer import Checkpointer, RunState
from megatron_gft.config import Config
from megatron_gft.conversion.convert import megatron_to_hf
from megatron_gft.errors import EXIT_BAD_INPUT
from megatron_gft.metrics import CollapseGuard, Reporter
from megatron_gft.optimizer import apply_gradients, gathered_parameters, learning_rate, reduce_gradients
from megatron_gft.packing import Pack
from megatron_gft.parallel import Parallel
from megatron_gft.runtime import StopRequest, Watchdog
from megatron_gft.step import LossReport, StepOutcome, StepRunner
from megatron_gft.timing import DeviceTimer, gather_times, traced

# Steps of gradient norms that a spike is measured against, and how many there must be.
SPIKE_WINDOW, SPIKE_MIN_STEPS = 50, 10
NO_WEIGHT = "the rewards of each group are all equal, or none is right -> tools/inspect_groups.py shows them"


class TrainingStopped(RuntimeError):
    """The run cannot go on: a step was not finite, or too many were skipped."""


@dataclass
class Trainer:
    """One run on this rank. Built by ``job.build_trainer``; every rank calls every method in the same order."""

    config: Config
    parallel: Parallel
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    runner: StepRunner
    loader: StepLoader
    steps: Generator[tuple[StepBatch, list[Pack]], None, None]
    validation: StepLoader | None
    checkpointer: Checkpointer
    reporter: Reporter | None
    state: RunState
    total_steps: int
    stop: StopRequest
    watchdog: Watchdog
    save_seconds: float = 0.0
    recent_norms: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_WINDOW))
    guard: CollapseGuard = field(default_factory=CollapseGuard)

    def run(self) -> int:
        """Train until the last step or a stop request; returns the exit code. Raises TrainingStopped, SaveFailed."""
        settings = self.config.train
        if (first := self.state.step) >= self.total_steps:
            self._log("nothing is left to train -> a new run: another train.output; a longer one: more train.epochs")
        self._export()  # what an earlier start was not asked for, or did not come to
        learned = False
        while self.state.step < self.total_steps:
            self.watchdog.doing(f"training step {self.state.step + 1}")
            started = time.perf_counter()
            batch, packs = next(self.steps)
            with traced(self.config.profile, self.state.step + 1, self.parallel.rank, self.output / "traces"):
                outcome = self.step(batch, packs, time.perf_counter() - started)
            self.state = self._next_state(batch, outcome)
            learned |= batch.plan is not None
            if not learned and self.state.step in (first + 1, self.total_steps):
                self._log(f"warning: nothing is learned up to step {self.state.step}: {NO_WEIGHT}")
            outcome.seconds |= {"save": self.save_seconds, "step": time.perf_counter() - started}
            if self.reporter is not None:
                self.reporter.step(self.state.step, batch, outcome, self.state.skipped_steps)
            self._watch_collapse(outcome.report)
            if settings.validate_every and self.state.step % settings.validate_every == 0:
                self.validate()
            if self.reporter is not None and self.reporter.problem:
                self.stop.received = Signals.SIGTERM  # on all ranks, as a request to stop is
            signal = self.stop.agreed()
            self._save(last=self.state.step == self.total_steps or bool(signal))
            if signal:
                failed = self.reporter.problem if self.reporter is not None else ""
                why = f"error: {failed}; stopped" if failed else f"stopped by {Signals(signal).name}"
                self._log(f"{why} after step {self.state.step}; the checkpoint is complete, the same command goes on")
                return EXIT_BAD_INPUT if failed else StopRequest.CODES[Signals(signal)]
        self._log(f"finished {self.total_steps} steps; run folder {settings.output}")
        return 0

    @property
    def output(self) -> Path:
        """The run folder."""
        return Path(self.config.train.output)

    def step(self, batch: StepBatch, packs: list[Pack], data_seconds: float) -> StepOutcome:
        """Forward, backward and update of one planned step; TrainingStopped where loss or gradient are of no use."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self.config.objective.entropy:
            self.runner.measure_entropy(self.state.step % self.config.logging.entropy_every == 0)
        started, timer = time.perf_counter(), DeviceTimer()
        with timer.measure():
            report = self.runner.forward_backward(packs, batch.denominator)
        grad_norm = reduce_gradients(self.optimizer)
        problem = self._why_not_update(report, grad_norm)
        updated = problem is None and batch.denominator > 0
        if problem is not None:
            self._skip_or_stop(problem, report, batch, packs)
        elif updated:
            apply_gradients(self.optimizer, grad_norm, self.config.optimizer.clip_grad)
            self.recent_norms.append(grad_norm)
        seconds = {"data": data_seconds, "forward_backward": timer.take()}
        seconds["optimizer"] = time.perf_counter() - started - seconds["forward_backward"]
        forward, times = self.runner.timer.take(), None
        if (self.state.step + 1) % self.config.logging.every == 0:
            times = gather_times(forward, seconds["forward_backward"], self.parallel)
        return StepOutcome(report, grad_norm, learning_rate(self.optimizer), updated, seconds, times)

    def _why_not_update(self, report: LossReport, grad_norm: float) -> str | None:
        if not math.isfinite(report.loss):
            return f"the loss is {report.loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        factor = self.config.train.grad_spike_factor
        if factor and len(self.recent_norms) >= SPIKE_MIN_STEPS:
            median = statistics.median(self.recent_norms)
            if grad_norm > factor * median:
                return f"the gradient norm {grad_norm:.4g} is over {factor:g} times its running median {median:.4g}"
        return None

    def _skip_or_stop(self, problem: str, report: LossReport, batch: StepBatch, packs: list[Pack]) -> None:
        """Keep the evidence of a step that was not finite, then stop or skip."""
        step = self.state.step + 1
        culprits: Sequence[int] = []
        if self.parallel.is_last_stage and self.parallel.tp_rank == 0:  # one rank speaks for its replica
            culprits = range(len(packs)) if math.isfinite(report.loss) else self.runner.nonfinite_packs()
        folder = self.output / "nonfinite"
        for index in culprits:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(
                {"step": step, "rank": self.parallel.rank, "pack": packs[index].to("cpu")},
                folder / f"step-{step:08d}-rank-{self.parallel.rank}-pack-{index}.pt",
            )
        places = sorted({group for index in culprits for group in packs[index].groups})
        mine = [self.loader.groups.describe(int(batch.groups[place])) for place in places]
        found: list[tuple[str, list[str]] | None] = [None] * self.parallel.world_size
        dist.all_gather_object(found, (self.parallel.coordinates, mine))
        found_on = [f"{rank}: groups {', '.join(names)}" for rank, names in filter(None, found) if names]
        text = f"step {step}: {problem}" + (f"; {'; '.join(found_on)}; saved in {folder}" if found_on else "")
        if self.config.train.nonfinite == "stop":
            raise TrainingStopped(text + " -> set train.nonfinite=skip to leave such steps out")
        if self.state.skipped_steps >= self.config.train.max_skipped_steps:
            raise TrainingStopped(f"{text}; train.max_skipped_steps={self.config.train.max_skipped_steps} reached")
        self._log(f"{text}; the update is skipped")

    def _watch_collapse(self, report: LossReport) -> None:
        """Warn once, or stop, where the model unlearns what it should learn; every rank sees the same."""
        if self.config.train.collapse == "off" or (found := self.guard.rises(report)) is None:
            return
        lr = self.config.optimizer.lr
        text = f"step {self.state.step}: {found} -> lower optimizer.lr={lr:g}, or objective.negative_scale (0.25)"
        if self.config.train.collapse == "stop":
            raise TrainingStopped(f"{text}; train.collapse=warn goes on")
        self._log(f"warning: {text}; train.collapse=stop would end the run")

    def _next_state(self, batch: StepBatch, outcome: StepOutcome) -> RunState:
        self.scheduler.step(1)
        return replace(
            self.state,
            step=self.state.step + 1,
            consumed_groups=self.state.consumed_groups + len(batch.groups),
            skipped_steps=self.state.skipped_steps + (0 if outcome.updated else 1),
        )

    def validate(self) -> None:
        """Mean -log p per source over the first ``validate_groups`` of the validation data; no update."""
        if self.validation is None:
            return
        self.watchdog.doing(f"validating after step {self.state.step}")
        for chunk in self.chunks:
            chunk.eval()
        if self.config.objective.entropy:
            self.runner.measure_entropy(True)
        groups = min(self.config.train.validate_groups, len(self.validation.groups))
        batches = map(self.validation.batch, range(-(-groups // self.config.data.groups_per_step)))
        run = self.runner.forward_backward
        reports = [run(self.validation.packs(batch), batch.denominator, forward_only=True) for batch in batches]
        for chunk in self.chunks:
            chunk.train()
        if self.reporter is not None and reports:
            self.reporter.validation(self.state.step, sum(reports[1:], reports[0]))

    def _save(self, *, last: bool) -> None:
        started = time.perf_counter()
        settings, step = self.config.checkpoint, self.state.step
        due = last or self._export_due or (settings.save_every is not None and step % settings.save_every == 0)
        self.watchdog.doing(f"saving after step {step}")
        if self.checkpointer.wait(blocking=False) or due:  # a background save that failed is made good at once
            with gathered_parameters(self.chunks):
                self.checkpointer.save(self.state)
                if (last or self._export_due) and self.checkpointer.wait():
                    self.checkpointer.save(self.state)
        self._export()
        self.save_seconds = time.perf_counter() - started

    @property
    def _export_due(self) -> bool:
        every, step = self.config.checkpoint.export_hf, self.state.step
        return every is not None and step > 0 and (step >= self.total_steps or (every != "last" and step % every == 0))

    def _export(self) -> None:
        """From the checkpoint of this step: no weights are gathered on a device, and every rank writes a part."""
        folder = self.output / "export" / f"step-{self.state.step:08d}"
        if self._export_due and not folder.exists():
            self.watchdog.doing(f"exporting after step {self.state.step}")
            megatron_to_hf(self.checkpointer.folder / f"step-{self.state.step:08d}", folder)
            self._log(f"exported to {folder}")

    def _log(self, text: str) -> None:
        if self.reporter is not None:
            self.reporter.say(text)

    def close(self) -> None:
        """End background work; safe to call after a failure. Raises InputError as :meth:`Reporter.close` does."""
        self.steps.close()
        self.watchdog.stop()
        if self.reporter is not None:
            self.reporter.close()
