"""The guard against collapse: it speaks before the damage is done, and not without reason."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from layout_cases import model_folder
from memory_groups import MemoryGroups
from ranks import run_ranks

from megatron_gft.config import load_config
from megatron_gft.hf.shape import read_model_shape
from megatron_gft.job import build_trainer
from megatron_gft.metrics import CollapseGuard
from megatron_gft.parallel import initialize_parallel
from megatron_gft.shards import Group
from megatron_gft.step import MORE_STATISTICS, STATISTICS, LossReport
from megatron_gft.trainer import TrainingStopped

GENTLE = ("objective=gft_scaled", "optimizer.lr=1e-4")
SFT = ("objective=sft", "optimizer.lr=3e-2")


class Copies(MemoryGroups):
    """ "Say the prompt again": one expert who does, three samples with one token wrong, one without; EOS is 1."""

    def __init__(self, count: int, seed: int):
        rng = np.random.default_rng(seed)
        items = []
        for _ in range(count):
            prompt = rng.integers(2, 12, 4)
            right = np.append(prompt, 1)
            responses = [right.copy() for _ in range(5)]
            for response in responses[1:4]:
                response[rng.integers(0, 4)] = rng.integers(2, 12)
            rewards = np.array([float((response == right).all()) for response in responses], np.float32)
            items.append(Group(prompt, responses, np.array([0, 2, 2, 2, 2]), rewards, None))
        super().__init__(items, f"copies-{count}-{seed}")


def _train(folder: Path, output: Path, overrides: list[str]) -> tuple[str, list[dict], list[str]]:
    """How a run ended, its records, and what it said."""
    options = [
        f"model.config={folder}",
        "model.precision=fp32",
        f"train.output={output}",
        "data.groups_per_step=48",
        "data.max_tokens_per_pack=1024",
        "train.validate_every=2",
        "logging.tensorboard=false",
        "logging.progress_bar=false",
        *overrides,
    ]
    config = load_config([], options)
    trainer = build_trainer(config, read_model_shape(folder), initialize_parallel(), Copies(48, 0), Copies(16, 1))
    said: list[str] = []
    trainer.reporter.say = said.append
    try:
        trainer.run()
        ended = "finished"
    except TrainingStopped as error:
        ended = str(error)
    trainer.close()
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return ended, records, said


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny model that copies fairly well, and its folder."""
    root = tmp_path_factory.mktemp("collapse")
    folder = model_folder(root, "untied")
    options = [f"checkpoint.init_from=hf:{folder}", "objective=sft", "optimizer.lr=1e-2", "train.epochs=40"]
    [(ended, records, said)] = run_ranks(1, _train, folder, root / "sft", options, timeout=200)
    assert ended == "finished" and not any("collapses" in line for line in said)
    assert records[-1]["valid/expert/positive/nll"] < 1.0
    return folder, root / "sft" / "checkpoints"


def run_from(learned, output: Path, *overrides: str):
    folder, start = learned
    return run_ranks(1, _train, folder, output, [f"checkpoint.init_from={start}", *overrides], timeout=200)[0]


def validation(records: list[dict]) -> dict[int, float]:
    """Geometric mean of p of right responses, by step."""
    return {r["step"]: math.exp(-r["valid/expert/positive/nll"]) for r in records if "valid/loss" in r}


@pytest.mark.slow
def test_a_destructive_rate_is_noticed_before_validation_is_halved(learned, tmp_path):
    destructive = ("optimizer.lr=6e-3", "train.epochs=30")
    ended, records, said = run_from(learned, tmp_path / "warn", *destructive)
    by_step = validation(records)
    halved = next(step for step, p in by_step.items() if p < by_step[2] / 2)
    [warning] = [line for line in said if "collapses" in line]
    assert ended == "finished" and "objective.negative_scale" in warning and "optimizer.lr=0.006" in warning
    warned = int(warning.split("step ")[1].split(":")[0])
    assert warned < halved
    ended, records, _ = run_from(learned, tmp_path / "stop", *destructive, "train.collapse=stop")
    assert ended == warning.removeprefix("warning: ").replace("stop would end the run", "warn goes on")
    assert max(record["step"] for record in records) == warned
    ended, _, said = run_from(learned, tmp_path / "off", *destructive, "train.collapse=off")
    assert ended == "finished" and not any("collapses" in line for line in said)


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(("objective=gft_scaled", "optimizer.lr=1e-4"), marks=pytest.mark.slow),
        pytest.param(("objective=sft", "optimizer.lr=3e-2"), marks=pytest.mark.slow),
    ],
)
def test_default_runs_and_sft_do_not_warn(learned, tmp_path, options):
    ended, _, said = run_from(learned, tmp_path / "run", "train.epochs=15", *options)
    assert ended == "finished" and not any("collapses" in line for line in said)


def report_of(positive: float, negative: float | None) -> LossReport:
    """A step of ten tokens of each sign with these means of -log p."""
    sums = torch.zeros(3, 2, len(STATISTICS) + len(MORE_STATISTICS), dtype=torch.float64)
    for sign, mean in enumerate((positive, negative)):
        if mean is not None:
            sums[2, sign, 0], sums[2, sign, STATISTICS.index("nll")] = 10, 10 * mean
    return LossReport(sums, 10)


STEPS = np.arange(40)


@pytest.mark.parametrize(
    ("positive", "negative", "warns"),
    [
        pytest.param(1 + 0.05 * STEPS, 2 + 0.1 * STEPS, True, id="both rise, negatives faster"),
        pytest.param(1 + 0.05 * STEPS, 2 + 0.02 * STEPS, False, id="negatives slower: forgetting of another kind"),
        pytest.param(1 - 0.01 * STEPS, 2 + 0.1 * STEPS, False, id="as it should be"),
        pytest.param(1 + 0.001 * STEPS, 2 + 0.1 * STEPS, False, id="less than the least rise"),
        pytest.param(1 - abs(np.sin(STEPS / 8)) / 2, 2 - abs(np.sin(STEPS / 8)), False, id="back to the start"),
        pytest.param(1 + 0.05 * STEPS, [None] * 40, False, id="no negative ones"),
        pytest.param(np.where(STEPS == 5, np.nan, 1.0), 2 + 0.0 * STEPS, False, id="a step that is not finite"),
    ],
)
def test_the_signature(positive, negative, warns):
    guard = CollapseGuard()
    said = [guard.rises(report_of(p, n)) for p, n in zip(positive, negative, strict=True)]
    assert sum(text is not None for text in said) == warns


@pytest.mark.parametrize("noise", [0.02, 0.2, 1.0])
def test_noise_alone_seldom_warns(noise):
    """A model that stands still, groups of varying difficulty; 20 runs."""
    rng, warned = np.random.default_rng(0), 0
    for _ in range(20):
        guard, hard = CollapseGuard(), rng.normal(0, noise, 120)
        own = rng.normal(0, noise, (2, 120))
        reports = map(report_of, 5 + hard + own[0], 7 + hard + own[1])
        warned += any(guard.rises(report) is not None for report in reports)
    assert warned <= 1


@pytest.mark.parametrize("text", ["off", "'off'", "false", "warn", "stop"])
def test_yaml_reads_off_as_false(text):
    collapse = load_config([], ["model.config=m", f"train.collapse={text}"]).train.collapse
    assert collapse == {"'off'": "off", "false": "off"}.get(text, text)
