"""Many small runs in one process. Each is made as a run under torchrun is: ``load_config``, ``job.build_trainer``,
``Trainer.run``, which trains, saves and exports; only the process group is opened once for all. Responses come from
``LocalModel``, as those of ``tools/generate_groups.py`` do.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from examples.study.countdown import is_right
from megatron_gft.config import load_config
from megatron_gft.hf.shape import read_model_shape
from megatron_gft.job import build_trainer, open_groups
from megatron_gft.parallel import Parallel, initialize_parallel
from megatron_gft.runtime import StopRequest, set_up_logging, start_process_group
from megatron_gft.sampling.local_model import Decoded, LocalModel
from megatron_gft.sampling.settings import SamplingParams, sample_seed
from megatron_gft.trainer import TrainingStopped
from megatron_gft.validation import check

TRAIN_CONFIG = Path(__file__).with_name("train.yaml")
MAX_TOKENS = 26
ROWS_AT_ONCE = 1024


class Interrupted(Exception):
    """A signal asked for an end; what is finished stands, and the same command goes on from there."""


@dataclass
class Lab:
    """The process group of one rank, and the log of all runs."""

    stop: StopRequest
    parallel: Parallel
    log: Path

    @classmethod
    def open(cls, log: Path, stop: StopRequest) -> Lab:
        """Once a process."""
        start_process_group(30, dist.HashStore())
        set_up_logging(0)
        logging.getLogger().setLevel(logging.ERROR)
        return cls(stop, initialize_parallel(), log)

    def check_stop(self) -> None:
        """Raise Interrupted where a signal came."""
        if self.stop.received:
            raise Interrupted

    def train(self, output: Path, overrides: Sequence[str], *, keep: bool = False) -> tuple[Path | None, str]:
        """A run of the package; one that was interrupted goes on from its checkpoint.

        Args:
            keep: the checkpoint stays, to go on from.

        Returns:
            The exported folder, and ""; or None, and why the run stopped.
        """
        config = load_config([TRAIN_CONFIG], [*overrides, f"train.output={output}"])
        shape = read_model_shape(config.model.config)
        check(config, shape, world_size=1)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log, contextlib.redirect_stderr(log):
            trainer = build_trainer(config, shape, self.parallel, *open_groups(config, shape), self.stop)
            try:
                trainer.run()
            except TrainingStopped as error:
                return None, str(error)
            finally:
                trainer.close()
        del trainer
        gc.collect()  # a model, its gradients and Adam's state refer to each other
        self.check_stop()
        if not keep:
            shutil.rmtree(output / "checkpoints")
        return max(output.glob("export/step-*")), ""


def open_model(folder: Path) -> LocalModel:
    """An exported model, ready to sample."""
    return LocalModel(folder, chat_template="none")


@dataclass(frozen=True)
class Answers:
    """``n`` responses to each of P prompts, prompt by prompt: ids, texts, and ``right`` bool [P, n]."""

    decoded: list[Decoded]
    texts: list[str]
    right: np.ndarray

    @property
    def entropy(self) -> float:
        """Of a token, in nats: mean -log p of the model's own samples."""
        values = np.concatenate([one.logprobs for one in self.decoded])
        return float(-values.mean())


def answer(model: LocalModel, prompts: Sequence[str], n: int, seed: str) -> Answers:
    """Sample ``n`` responses at temperature 1; ``n=0`` is one greedy one."""
    params = SamplingParams(temperature=float(n > 0), max_tokens=MAX_TOKENS, logprobs=True)
    ids = [model.prompt_ids(prompt) for prompt in prompts]
    requests = [(i, sample_seed(0, prompt, seed, k)) for i, prompt in enumerate(prompts) for k in range(n or 1)]
    decoded: list[Decoded] = []
    for start in range(0, len(requests), ROWS_AT_ONCE):
        batch = requests[start : start + ROWS_AT_ONCE]
        decoded += model.sample([ids[i] for i, _ in batch], [own for _, own in batch], params)
    pairs = list(zip(requests, decoded, strict=True))
    texts = [model.response_text(ids[i], one.ids) for (i, _), one in pairs]
    right = [
        one.finish_reason == "stop" and is_right(prompts[i], text)
        for ((i, _), one), text in zip(pairs, texts, strict=True)
    ]
    return Answers(decoded, texts, np.array(right).reshape(len(prompts), -1))


def expert_nll(model: LocalModel, rows: Sequence[dict]) -> float:
    """Mean -log p of a token of the experts' solutions, ends included."""
    eos = model.tokenizer.eos_id
    pairs = [
        (model.prompt_ids(row["prompt"]), [*model.tokenizer.encode(row["responses"][0]["text"]), eos]) for row in rows
    ]
    values = [value for one in model.response_logprobs(pairs) for value in one]
    return -sum(values) / len(values)
