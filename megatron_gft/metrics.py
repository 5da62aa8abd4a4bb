"""What a run reports: ``metrics.jsonl``, TensorBoard, Weights & Biases, one console line a step. Rank 0 only.

A record is flat, ``{"step": 12, "loss": 0.31, "expert/positive/probability": 0.62, ...}``; means over no tokens are
left out rather than written as NaN.
"""

import json
import logging
import math
import platform
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from tqdm import tqdm

from megatron_gft import __version__
from megatron_gft.atomic import atomic_file, write_json, writing
from megatron_gft.batch import StepBatch
from megatron_gft.config import Config
from megatron_gft.errors import InputError
from megatron_gft.objectives import SOURCES
from megatron_gft.planning import StepPlan
from megatron_gft.progress import ProgressBar
from megatron_gft.reading import read_json
from megatron_gft.step import MORE_STATISTICS, SIGNS, STATISTICS, LossReport, StepOutcome

logger = logging.getLogger(__name__)

TOKENS = STATISTICS.index("tokens")
ENVIRONMENT_FILE = "environment.json"
PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "transformers", "numpy")

Record = dict[str, float | int]
Sink = Callable[[Record], object]


def loss_record(report: LossReport, *, prefix: str = "") -> Record:
    """Means over tokens: of all loss rows, and per source and sign of the advantage.

    ``loss`` is the objective's own value; ``nll`` is mean -log p, ``probability`` mean p, ``rectified`` the share
    of tokens with p <= tau, ``abs_advantage`` mean |A|; for the rest see docs/objectives.md.
    """
    record: Record = {f"{prefix}loss": report.loss}
    measured = bool(report.token_sums[..., STATISTICS.index("entropy")].any())  # it is exactly 0 where it was not
    names = [name for name in STATISTICS if name not in ("tokens", "loss") and (measured or name != "entropy")]
    places = {"": report.token_sums.sum((0, 1))}
    nll = (report.token_sums[..., STATISTICS.index("nll")].sum(0) / report.token_sums[..., TOKENS].sum(0)).tolist()
    record |= {f"{prefix}{sign}/nll": mean for sign, mean in zip(SIGNS, nll, strict=True) if mean == mean}
    for source, by_sign in zip(SOURCES, report.token_sums, strict=True):
        places |= {f"{source}/{sign}/": sums for sign, sums in zip(SIGNS, by_sign, strict=True) if sums[TOKENS]}
    for place, values in places.items():
        sums = dict(zip(STATISTICS + MORE_STATISTICS, values.tolist(), strict=True))
        record[f"{prefix}{place}tokens"] = int(sums["tokens"])
        if sums["tokens"]:
            record |= {f"{prefix}{place}{name}": sums[name] / sums["tokens"] for name in names}
        if place and report.denominator:
            record[f"{prefix}{place}loss"] = sums["loss"] / report.denominator
        of = {"sampling_gap": sums["known_q"], "clipped": sums["known_q"], "kl": sums["anchored"]}
        of |= {"published_loss": sums["published_loss"] and report.denominator, "unknown_q": sums["unknown_q"] and 1}
        record |= {f"{prefix}{place}{name}": sums[name] / count for name, count in of.items() if count}
    return record


class CollapseGuard:
    """Sees a model unlearn: mean -log p of positive responses rises above its start, that of negative ones faster.

    The last 5 steps against the first one, and against the first 5; the curve's bends tell how much is noise."""

    def __init__(self) -> None:
        self.first: list[list[float]] = []  # positive, negative
        self.recent: deque[list[float]] = deque(maxlen=200)
        self.warned = False

    def rises(self, report: LossReport) -> str | None:
        """What rose, in words; once, and of steps that push both ways."""
        tokens, nll = (report.token_sums[..., STATISTICS.index(name)].sum(0) for name in ("tokens", "nll"))
        if self.warned or not (tokens > 0).all() or not nll.isfinite().all():
            return None
        self.recent.append((nll / tokens).tolist())
        self.first = [*self.first, self.recent[-1]][:5]
        if (window := min(5, len(self.recent) // 2)) < 2:
            return None
        curve = np.array(self.recent)
        noise = (4.5 + 8 / (len(curve) - 2)) * 0.6 * np.median(np.abs(np.diff(curve[:, 0], 2)))
        last = curve[-window:].mean(0)
        for steps, spread in ((1, 1 + 1 / window), (window, 2 / window)):
            start = np.mean(self.first[:steps], axis=0)
            rise, other = last - start
            if rise > max(0.02 + 0.05 * start[0], noise * math.sqrt(spread)) and other > rise:
                self.warned = True
                text = f"{start[0]:.3g} to {last[0]:.3g}, of negative ones from {start[1]:.3g} to {last[1]:.3g}"
                return f"the model collapses: mean -log p of positive responses rose from {text}"
        return None


# Dense bf16 peak of one device in TFLOP/s, by the name that the driver reports (NVIDIA's data sheets).
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "B200": 2250.0}


def device_peak_tflops() -> float | None:
    """Peak of this machine's GPU, None when unknown or without one."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def step_record(batch: StepBatch, outcome: StepOutcome, *, world_size: int, peak_tflops: float | None) -> Record:
    """What a step cost: tokens, time split, packing, memory, and MFU where the device's peak is known.

    ``tokens_per_second`` counts rows that went through the model (prompt and response, no padding).
    """
    record: Record = {
        "grad_norm": outcome.grad_norm,
        "lr": outcome.lr,
        "groups": len(batch.groups),
        "dead_groups": batch.dead_groups,
        "denominator": batch.denominator,
        **{f"seconds/{name}": value for name, value in outcome.seconds.items()},
    }
    if times := outcome.times:
        record |= {"slowest_rank": times.slowest_rank, "slowest_rank_factor": times.slowest_factor}
        record |= {f"idle_share/stage_{i}": share for i, share in enumerate(times.idle_share_by_stage)}
    for code, source in enumerate(SOURCES):
        lengths = batch.lengths[(batch.sources == code) & (batch.lengths > 0)]
        if len(lengths):
            record[f"{source}/response_tokens"] = float(lengths.mean())
    plan, elapsed = batch.plan, outcome.seconds["step"]
    tokens = plan.tokens - plan.padding if plan else 0
    record["tokens_per_second"] = tokens / elapsed
    record["tokens_per_second_per_device"] = tokens / elapsed / world_size
    if plan:
        record |= {"packs_per_rank": len(plan.packs[0]), "fill": plan.fill, "balance": plan.balance}
        peak = peak_tflops or device_peak_tflops()
        if peak:
            record["mfu"] = plan.flops / elapsed / world_size / (peak * 1e12)
    if torch.cuda.is_available():
        record["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return record


@dataclass
class RunTotals:
    """Of all starts of a run: what its steps computed, and the time of its devices, saves and stalls included.

    A step that is run again after a resume counts once; the time that went into it before was lost.
    """

    tokens: float = 0.0  # rows without padding
    flops: float = 0.0
    device_seconds: float = 0.0
    useful_seconds: float = 0.0  # of ``device_seconds``: forward, backward and update of steps that count

    @classmethod
    def of_lines(cls, lines: Sequence[str], resume_step: int) -> Self:
        """Those at ``resume_step``, from the ``metrics.jsonl`` of the earlier starts."""
        totals = cls()
        for line in lines:
            with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
                record = json.loads(line)
                found = cls(**{name: float(record[f"run/{name}"]) for name in vars(totals)})
                spent = max(totals.device_seconds, found.device_seconds)
                totals = replace(found if record["step"] <= resume_step else totals, device_seconds=spent)
        return totals

    def add(self, plan: StepPlan | None, outcome: StepOutcome, elapsed: float, world_size: int) -> None:
        """One step, ``elapsed`` seconds after the one before it was added."""
        self.device_seconds += elapsed * world_size
        if plan is not None and outcome.updated:
            self.tokens += plan.tokens - plan.padding
            self.flops += plan.flops
            self.useful_seconds += (outcome.seconds["forward_backward"] + outcome.seconds["optimizer"]) * world_size

    def record(self, peak_tflops: float | None) -> Record:
        """``goodput`` is the useful share of the time; rates are over all of it."""
        seconds = max(self.device_seconds, 1e-9)
        record: Record = {f"run/{name}": value for name, value in vars(self).items()}
        record["goodput"] = self.useful_seconds / seconds
        record["run/tokens_per_second_per_device"] = self.tokens / seconds
        if peak := peak_tflops or device_peak_tflops():
            record["run/mfu"] = self.flops / seconds / (peak * 1e12)
        return record


def _read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _json_lines(path: Path, resume_step: int, closing: ExitStack) -> Sink:
    """``metrics.jsonl``; on resume, lines of steps that will be run again are dropped first."""
    if lines := _read_lines(path):
        kept = [line for line in lines if _step_of(line) <= resume_step]
        with atomic_file(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept))
    file = closing.enter_context(open(path, "a", encoding="utf-8"))
    return lambda record: print(json.dumps(record), file=file, flush=True)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")  # a line cut off when the process died


def _tensorboard(folder: Path, resume_step: int, closing: ExitStack) -> Sink:
    from torch.utils.tensorboard import SummaryWriter  # optional dependency

    def once(failure: threading.ExceptHookArgs) -> None:
        if not isinstance(failure.exc_value, OSError):  # such an error of the writer's thread comes from its next call
            threading.__excepthook__(failure)

    threading.excepthook = once
    writer = closing.enter_context(SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None))

    def write(record: Record) -> None:
        for key, value in record.items():
            if key != "step":
                writer.add_scalar(key, value, record["step"])

    return write


def _weights_and_biases(project: str, run_folder: Path, config: dict[str, Any], closing: ExitStack) -> Sink:
    """A run that later starts in the same folder continue; its id lies there, its name is the folder's."""
    try:
        import wandb  # optional dependency
    except ImportError:
        raise InputError(
            f"logging.wandb_project={project}: the package wandb is not installed -> pip install wandb"
        ) from None
    if not (file := run_folder / "wandb_id.json").exists():
        write_json(file, secrets.token_hex(8))
    name, known = run_folder.resolve().name, read_json(file, "remove it: the run gets another id", str)
    run = wandb.init(project=project, dir=str(run_folder), name=name, id=known, config=config, resume="allow")
    closing.callback(run.finish)
    return lambda record: run.log({k: v for k, v in record.items() if k != "step"}, step=int(record["step"]))


def write_environment(folder: Path, world_size: int, device: str) -> None:
    """Keep what this start runs on in ``folder/environment.json``. Each start writes it anew."""
    found = {"processes": str(world_size), "device": device, "host": platform.node(), "system": platform.platform()}
    found |= {"python": platform.python_version(), "megatron_gft": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    write_json(folder / ENVIRONMENT_FILE, found)


class Reporter:
    """Everything a person sees of a run, on rank 0; ``problem`` is why a record could not be written, else ""."""

    def __init__(self, run: Config, *, world_size: int, first_step: int, total_steps: int):
        config, run_folder = run.logging, Path(run.train.output)
        self.config, self.world_size = config, world_size
        self.total_steps = total_steps
        self.slow_steps, self.problem, self.place = 0, "", run_folder / "metrics.jsonl"
        run_folder.mkdir(parents=True, exist_ok=True)
        self.closing = ExitStack()
        self.totals, self.reported = RunTotals.of_lines(_read_lines(self.place), first_step), time.monotonic()
        self.sinks = [_json_lines(self.place, first_step, self.closing)]
        if config.tensorboard:
            try:
                self.sinks.append(_tensorboard(run_folder / "tensorboard", first_step, self.closing))
            except ImportError:
                logger.warning("TensorBoard is not installed: no event files (pip install tensorboard)")
        if config.wandb_project:
            resolved = run.model_dump(mode="json")
            self.sinks.append(_weights_and_biases(config.wandb_project, run_folder, resolved, self.closing))
        show = config.progress_bar and sys.stderr.isatty()  # in a log the steps' own lines say when it ends
        self.bar = ProgressBar(None, "train", total=total_steps, initial=first_step, unit="step", show=show)
        self.started, self.first_step = time.monotonic(), first_step
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        write_environment(run_folder, world_size, device)

    def step(self, step: int, batch: StepBatch, outcome: StepOutcome, skipped_steps: int) -> None:
        """Write the record of one step; every ``logging.every`` steps and on the last also a console line."""
        record: Record = {"step": step, "skipped_steps": skipped_steps}
        record |= loss_record(outcome.report)
        record |= step_record(batch, outcome, world_size=self.world_size, peak_tflops=self.config.peak_tflops)
        before, self.reported = self.reported, time.monotonic()
        self.totals.add(batch.plan, outcome, self.reported - before, self.world_size)
        record |= self.totals.record(self.config.peak_tflops)
        self._write(record)
        self.bar.update(1)
        if step == self.first_step + 1 and "unknown_q" in record:
            self.say(f"{record['unknown_q']:.0f} of {record['tokens']} tokens, ends of responses, have no q: c = 1")
        if outcome.times is not None and outcome.times.hint is not None:
            self.slow_steps += 1
            if self.slow_steps in (3, 30, 300):  # not a hiccup any more, and not a line a step
                self.say(outcome.times.hint)
        if step % self.config.every == 0 or step == self.total_steps:
            self.say(self._line(record))

    def validation(self, step: int, report: LossReport) -> None:
        """Write a validation's record and a line."""
        record: Record = {"step": step} | loss_record(report, prefix="valid/")
        self._write(record)
        sources = [
            f"{source} {record[key]:.4f}" for source in SOURCES if (key := f"valid/{source}/positive/nll") in record
        ]
        self.say(f"valid {step}/{self.total_steps} | loss {record['valid/loss']:.4f} | nll {', '.join(sources)}")

    def _write(self, record: Record) -> None:
        try:
            with writing(self.place):
                for sink in self.sinks:
                    sink(record)
        except InputError as error:
            self.problem = str(error)

    def say(self, text: str) -> None:
        """A line on stderr that does not tear the progress bar."""
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

    def _line(self, record: Record) -> str:
        step = int(record["step"])
        spent = time.monotonic() - self.started
        rest = spent / max(step - self.first_step, 1) * (self.total_steps - step)
        parts = [
            f"step {step}/{self.total_steps}",
            f"loss {record['loss']:.5f}",
            f"grad norm {record['grad_norm']:.4f}",
            f"lr {record['lr']:.3g}",
            f"{record['tokens_per_second']:.0f} tokens/s",
            f"rectified {100 * record.get('rectified', 0.0):.1f}%",
            f"ETA {tqdm.format_interval(rest)}",
        ]
        for key, text in {"kl": "KL", "sampling_gap": "|log p - log q|"}.items():
            if key in record:
                parts.insert(5, f"{text} {record[key]:.3g}")
        if "mfu" in record:
            parts.insert(5, f"MFU {100 * record['mfu']:.1f}% ({100 * record['run/mfu']:.1f}% of the whole run)")
        return " | ".join(parts)

    def close(self) -> None:
        """Raises InputError where the last records could not be written, and no problem was known so far."""
        self.bar.close()
        with suppress(OSError) if self.problem else writing(self.place):
            self.closing.close()
