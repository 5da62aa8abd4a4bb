"""What the study runs: worlds, arms, learning rates, sizes; and what that costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megatron_gft.atomic import sha256_json

LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)

ARMS: dict[str, tuple[str, ...]] = {
    "sft": ("objective=sft",),
    "sft_mix": ("objective=sft", "objective.sources=[expert,teacher]"),
    "dft": ("objective=dft",),
    "rft": ("objective=rft",),
    "dft_correct": ("objective=dft_correct",),
    "gft": ("objective=gft",),
    "gft_no_rectification": ("objective=gft", "objective.coefficient=none"),
    "gft_no_groups": ("objective=gft", "objective.advantage=none", "objective.sources=[expert]"),
    "gft_self_only": ("objective=gft", "objective.sources=[self]"),
    "gft_scaled_0.25": ("objective=gft_scaled",),
    "gft_scaled_0": ("objective=gft_scaled", "objective.negative_scale=0"),
}
"""The objective of each arm, as on a command line. All train on the same groups."""

BASE = "base"
ROUND_STARTS = (BASE, "sft", "rft", "dft_correct", "gft", "gft_scaled_0.25")


@dataclass(frozen=True)
class World:
    """A base model and the groups that it is tuned on.

    Attributes:
        hidden, layers: of a Llama.
        pretrain: examples of pre-training, one pass, ``pretrain_batch`` a step.
        right, rare, side, larger: shares of pre-training: right solutions, those in the experts' style, the
            side skill, problems with a number larger than those of the groups.
        least_ways: right solutions that each problem of the groups and tests has at least.
        prompts, teachers, selves: groups, and responses of each beside the expert's; ``teacher_right`` of the teachers'
            are right.
        epochs, groups_per_step: of the tuning.
    """

    hidden: int = 128
    layers: int = 2
    pretrain: int = 76_800
    pretrain_batch: int = 64
    pretrain_lr: float = 3e-3
    right: float = 0.6
    rare: float = 0.05
    side: float = 0.1
    larger: float = 0.25
    least_ways: int = 1
    prompts: int = 256
    teachers: int = 3
    teacher_right: float = 0.9
    selves: int = 4
    epochs: int = 1
    groups_per_step: int = 8


@dataclass(frozen=True)
class Sizes:
    """How much is run and measured.

    Attributes:
        valid, valid_samples: problems that learning rates are chosen on, and samples of each.
        test, test_samples: problems that the chosen ones are measured on; ``larger_samples`` with larger numbers.
        rounds, round_prompts, round_samples, round_steps: of GRPO after the best of an arm.
        round_lrs: its learning rates, one of which is chosen on validation problems for each start.
    """

    seeds: int = 5
    arms: tuple[str, ...] = tuple(ARMS)
    lrs: tuple[float, ...] = LEARNING_RATES
    valid: int = 128
    valid_samples: int = 8
    test: int = 256
    test_samples: int = 16
    larger_samples: int = 4
    starts: tuple[str, ...] = ROUND_STARTS
    rounds: int = 8
    round_prompts: int = 64
    round_samples: int = 8
    round_steps: int = 4
    round_lrs: tuple[float, ...] = (1e-4, 3e-4)
    product: tuple[str, ...] = ("gft",)


@dataclass(frozen=True)
class Study:
    """One world with all its arms; ``name`` is the folder of its runs."""

    name: str = "study"
    world: World = field(default_factory=World)
    sizes: Sizes = field(default_factory=Sizes)

    @property
    def key(self) -> str:
        """Hash of what a result depends on, beside its own name: the world, and how it is measured."""
        sizes = asdict(self.sizes)
        for name in ("seeds", "arms", "lrs", "starts", "round_lrs", "product"):
            del sizes[name]
        return sha256_json([asdict(self.world), sizes])

    @property
    def tune_steps(self) -> int:
        """Optimizer steps of a run of an arm."""
        return -(-self.world.prompts // self.world.groups_per_step) * self.world.epochs


STUDY = Study()
QUICK = replace(
    STUDY,
    name="quick",
    sizes=replace(STUDY.sizes, seeds=1, lrs=LEARNING_RATES[:3], starts=(BASE, "sft", "gft"), round_lrs=(3e-4,)),
)
TINY = Study(
    "tiny",
    World(hidden=32, layers=2, pretrain=4096, pretrain_batch=32, prompts=16, groups_per_step=8),
    Sizes(
        *(1, ("sft", "gft"), (3e-4, 1e-3), 16, 4, 16, 4, 2),
        *((BASE, "gft"), 2, 8, 4, 2, (3e-4,), ("gft",)),
    ),
)


def axes() -> list[Study]:
    """``make study-full``: worlds that differ from the study's in one thing each, with three seeds and no rounds."""
    few = replace(STUDY.sizes, seeds=3, starts=(), product=())
    scales = tuple(f"gft_scaled_{scale:g}" for scale in (0, 0.1, 0.25, 0.5))
    changed: list[tuple[str, dict[str, Any]]] = [
        *((f"rare-{share:g}", {"rare": share}) for share in (0.005, 0.3)),
        *((f"epochs-{epochs}", {"epochs": epochs}) for epochs in (3, 9)),
        ("ways-4", {"least_ways": 4}),
    ]
    studies = [Study(name, replace(STUDY.world, **change), few) for name, change in changed]
    return [STUDY, Study("negative-scale", STUDY.world, replace(few, arms=("gft", *scales))), *studies]


def objective(arm: str) -> tuple[str, ...]:
    """Settings of an arm; ``gft_scaled_S`` is one for every S."""
    scale = arm.removeprefix("gft_scaled_")
    return ARMS.get(arm) or ("objective=gft_scaled", f"objective.negative_scale={scale}")
