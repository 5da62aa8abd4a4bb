"""What judging means, for group files and shards alike: options, what is found, and groups on their way.

A group goes through the workers of a :class:`VerifierPool`, so a response that hangs, crashes or exhausts memory is
judged ``timeout`` or ``error`` and delays nothing else. Its verdicts go into a journal that a killed run continues.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from megatron_gft import __version__
from megatron_gft.atomic import sha256_file
from megatron_gft.errors import InputError, InputErrors
from megatron_gft.groups import SOURCES
from megatron_gft.groups.records import FLOAT32_MAX
from megatron_gft.journal import Journal
from megatron_gft.scoring.verifier_pool import VerifierPool, limit_problems
from megatron_gft.scoring.verifiers import OUTCOMES, Case, Verdict, needs_answer, user_module

SHOWN_EXAMPLES = 10
_NOT_JUDGED = Verdict("unparsed", 0.0)  # keeps the place of a response that no verifier sees
Item = TypeVar("Item")


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


def has_gold(answer: str | None) -> bool:
    """Whether there is an answer to compare with; blank text is none."""
    return answer is not None and bool(answer.strip())


@dataclass(frozen=True)
class ScoringOptions:
    """How to judge.

    Args:
        verifier: name or ``module:function``; ``verifier_options`` are its own.
        workers: processes.
        time_limit: wall seconds for one response.
        memory_limit_gib: address space of one worker.
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
        problems = limit_problems(self.workers, self.time_limit, self.memory_limit_gib)
        for outcome, reward in self.rewards.items():
            if outcome not in OUTCOMES:
                problems.append(f"reward of unknown outcome {outcome!r} -> outcomes are {', '.join(OUTCOMES)}")
            if reward is not None and not abs(reward) <= FLOAT32_MAX:  # nor NaN
                problems.append(f"reward {outcome}={reward} is not a finite float32 -> a number, or null for none")
        if self.missing_answer not in ("error", "null"):
            problems.append(f"missing_answer={self.missing_answer!r} -> error or null")
        if problems:
            raise InputErrors("scoring options", problems)

    def pool(self) -> VerifierPool:
        """Workers for these options."""
        return VerifierPool(
            self.verifier,
            self.verifier_options,
            workers=self.workers,
            time_limit=self.time_limit,
            memory_limit_gib=self.memory_limit_gib,
        )

    def description(self) -> dict[str, Any]:
        """What is recorded with the rewards: enough to judge the same way again."""
        version: dict[str, Any] = {"megatron_gft": __version__}
        if self.verifier == "math":
            version["math-verify"] = importlib.metadata.version("math-verify")
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
        """Whether a response can be judged with this gold answer."""
        return has_gold(answer) or not needs_answer(self.verifier)

    def reward(self, verdict: Verdict) -> float | None:
        """The reward of a verdict under ``rewards``."""
        return self.rewards.get(verdict.outcome, verdict.reward)


@dataclass
class ScoreSummary:
    """What was found: outcomes by source, mean reward by source, a few of the responses without verdict."""

    groups: int = 0
    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    reward_sums: Counter[str] = field(default_factory=Counter)
    rewarded: Counter[str] = field(default_factory=Counter)
    without_answer: int = 0
    rewards_removed: int = 0  # in groups without gold answer
    verifiers_moved: int = 0  # meta["verifier"] of others
    replaced_workers: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, source: str, verdict: Verdict, reward: float | None, place: str) -> None:
        """Count one response."""
        self.outcomes[source][verdict.outcome] += 1
        if reward is not None:
            self.reward_sums[source] += reward  # type: ignore[assignment]
            self.rewarded[source] += 1
        if verdict.outcome in ("timeout", "error") and len(self.examples) < SHOWN_EXAMPLES:
            self.examples.append(f"{place}: {verdict.outcome}: {verdict.detail}")

    @property
    def responses(self) -> int:
        return sum(sum(counts.values()) for counts in self.outcomes.values())

    def table(self) -> str:
        """Counts by source and outcome, and the mean reward, for people."""
        lines = [f"{'source':<10}" + "".join(f"{name:>10}" for name in OUTCOMES) + f"{'reward':>10}"]
        for source in [name for name in SOURCES if name in self.outcomes]:
            counts, rewarded = self.outcomes[source], self.rewarded[source]
            mean = f"{self.reward_sums[source] / rewarded:.4f}" if rewarded else "-"
            lines.append(f"{source:<10}" + "".join(f"{counts[name]:>10}" for name in OUTCOMES) + f"{mean:>10}")
        for count, note in (
            (self.without_answer, "groups without gold answer, not judged"),
            (self.rewards_removed, "rewards that such groups had before, removed"),
            (self.verifiers_moved, "groups whose meta.verifier was not written by this tool, now meta.verifier_before"),
            (self.replaced_workers, "workers that hung or died, replaced"),
        ):
            if count:
                lines.append(f"{note}: {count}")
        return "\n".join(lines + self.examples)


@dataclass(frozen=True)
class JudgedGroup(Generic[Item]):
    """A group on its way through the workers.

    ``key`` names its verdicts in the journal: a hash of all that a verifier may look at, and the group's name; it is
    empty when the group cannot be judged. ``cases`` is read only when the verdicts are not known yet.
    """

    item: Item
    place: str
    key: str
    sources: list[str]
    cases: Iterable[Case]


def journal_key(name: str, content: Any, *tokens: bytes) -> str:
    """Name in a journal of what has this JSON value and these tokens as its content."""
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    for part in tokens:
        digest.update(len(part).to_bytes(8, "little") + part)
    return f"{digest.hexdigest()[:24]}/{name}"


@contextlib.contextmanager
def open_journal(path: Path, description: dict[str, Any]) -> Iterator[Journal]:
    """The verdicts of a run; removed when the run is complete, and when there are none to keep."""
    journal = Journal(path, description)
    if journal.header != description:
        with journal:
            if len(journal):
                raise InputError(f"{path}: begun with another verifier or its options -> remove it, or go back")
            path.unlink()  # of a run that was killed before its first verdict
        journal = Journal(path, description)
    with journal:
        try:
            yield journal
        except BaseException:
            if not len(journal):
                path.unlink()
            raise
        path.unlink()


def judge_groups(
    groups: Iterable[JudgedGroup[Item]],
    options: ScoringOptions,
    pool: VerifierPool,
    journal: Journal,
    summary: ScoreSummary,
    progress: bool,
    total: int | None = None,
) -> Iterator[tuple[Item, list[Verdict] | None]]:
    """Every group in order with its verdicts (``None``: cannot be judged); those in the journal are not asked for."""
    waiting: deque[JudgedGroup[Item]] = deque()

    def cases() -> Iterator[Case | Verdict]:
        for group in groups:
            waiting.append(group)
            if not group.key:
                yield from (_NOT_JUDGED for _ in group.sources)
            elif group.key in journal:
                yield from (Verdict(*said) for said in journal[group.key])
            else:
                yield from group.cases

    verdicts: list[Verdict] = []
    with tqdm(total=total, desc="scoring", unit="response", disable=not progress) as bar:
        for verdict in pool.judge(cases()):
            verdicts.append(verdict)
            group = waiting[0]
            if len(verdicts) < len(group.sources):
                continue
            waiting.popleft()
            bar.update(len(verdicts))
            summary.groups += 1
            if not group.key:
                summary.without_answer += 1
                yield group.item, None
            else:
                if group.key not in journal:
                    journal.append(group.key, [[v.outcome, v.reward, v.detail] for v in verdicts])
                for source, said in zip(group.sources, verdicts, strict=True):
                    summary.add(source, said, options.reward(said), group.place)
                yield group.item, verdicts
            verdicts = []
    summary.replaced_workers = pool.replaced
