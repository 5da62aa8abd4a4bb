"""How to judge: the verifier, its limits, and what its outcomes are worth."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_gft import __version__
from megatron_gft.atomic import sha256_file
from megatron_gft.errors import InputError, InputErrors
from megatron_gft.groups.records import FLOAT32_MAX
from megatron_gft.scoring.verifiers import OUTCOMES, Verdict, needs_answer, user_module

MAX_TIME_LIMIT_SECONDS = 86_400.0
MAX_MEMORY_LIMIT_GIB = 2.0**20


def key_values(settings: Sequence[str], flag: str) -> dict[str, str]:
    """``["a=1"]`` -> ``{"a": "1"}``, of a flag of the command line that may be repeated.

    Raises:
        InputError: no ``=`` in one, or a key twice.
    """
    values: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"{flag} {setting!r}: not of the form key=value")
        if key in values:
            raise InputError(f"{flag} {setting!r}: {key!r} is given twice -> give it once")
        values[key] = value
    return values


@dataclass(frozen=True)
class ScoringOptions:
    """How to judge.

    Args:
        verifier: name or ``module:function``; ``verifier_options`` are its own.
        workers: processes.
        time_limit: wall seconds for one response; a worker that is starved of CPU has longer.
        memory_limit_gib: address space of one worker; beyond it a response gets the outcome ``error``.
        rewards: outcome -> reward instead of the verifier's; ``None`` leaves the response without reward.
        missing_answer: what to do with a group without gold answer when the verifier compares with one: ``error``,
            or ``null`` (no reward, no outcome, whatever the group had before).

    Raises:
        InputErrors: limits or rewards that cannot be, unknown outcomes or choices.
    """

    verifier: str = "math"
    verifier_options: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1
    time_limit: float = 10.0
    memory_limit_gib: float = 8.0
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    missing_answer: str = "error"

    def __post_init__(self) -> None:
        problems = [] if self.workers >= 1 else [f"workers={self.workers} -> at least 1"]
        time = ("time limit", self.time_limit, MAX_TIME_LIMIT_SECONDS, "s")
        for name, value, highest, unit in (time, ("memory limit", self.memory_limit_gib, MAX_MEMORY_LIMIT_GIB, "GiB")):
            if not 0 < value <= highest:  # nor NaN
                problems.append(f"{name} of {value} {unit} -> more than 0, at most {highest:g}")
        for outcome, reward in self.rewards.items():
            if outcome not in OUTCOMES:
                problems.append(f"reward of unknown outcome {outcome!r} -> outcomes are {', '.join(OUTCOMES)}")
            if reward is not None and not abs(reward) <= FLOAT32_MAX:  # nor NaN
                problems.append(f"reward {outcome}={reward} is not a finite float32 -> a number, or null for none")
        if self.missing_answer not in ("error", "null"):
            problems.append(f"missing_answer={self.missing_answer!r} -> error or null")
        if problems:
            raise InputErrors("scoring options", problems)

    def description(self) -> dict[str, Any]:
        """What is recorded with the rewards: enough to judge the same way again."""
        version: dict[str, Any] = {"megatron_gft": __version__}
        if self.verifier == "math":
            version["latex2sympy2_extended"] = importlib.metadata.version("latex2sympy2_extended")
        elif ":" in self.verifier:
            source = user_module(self.verifier).__file__
            version["source_sha256"] = sha256_file(source) if source else None
        return {
            "name": self.verifier,
            "options": dict(self.verifier_options),
            "time_limit_seconds": self.time_limit,
            "rewards": dict(self.rewards),
            "version": version,
        }

    def can_judge(self, answer: str | None) -> bool:
        """Whether a response can be judged with this gold answer; blank text is none."""
        return bool(answer and answer.strip()) or not needs_answer(self.verifier)

    def reward(self, verdict: Verdict) -> float | None:
        """The reward of a verdict under ``rewards``."""
        return self.rewards.get(verdict.outcome, verdict.reward)
