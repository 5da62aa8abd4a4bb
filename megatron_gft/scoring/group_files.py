"""Rewards and outcomes for the responses of group files and of existing shards.

``score_group_file`` reads groups as text and writes them with reward and outcome; ``score_shard`` decodes the
responses of a shard and adds a sidecar, leaving tokens alone. Judging happens in a :class:`VerifierPool`, so a
response that hangs, crashes or exhausts memory is judged ``timeout`` or ``error`` and delays nothing else.

Verdicts go into a journal beside the output while a run lasts, so that a killed run continues; it is removed when the
output is complete.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_gft import __version__
from megatron_gft.atomic import sha256_file
from megatron_gft.errors import InputError
from megatron_gft.groups import SOURCES, GroupRecord, iter_group_file, write_group_file
from megatron_gft.sampling.journal import Journal
from megatron_gft.scoring.verifier_pool import VerifierPool
from megatron_gft.scoring.verifiers import OUTCOMES, Case, Verdict, needs_answer
from megatron_gft.tokenizer import NO_TEMPLATE, load_tokenizer

SHOWN_EXAMPLES = 10


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
            or ``null`` (no reward, no outcome).
    """

    verifier: str = "math"
    verifier_options: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1
    time_limit: float = 10.0
    memory_limit_gib: float = 8.0
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    missing_answer: str = "error"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.rewards) - set(OUTCOMES))
        if unknown:
            raise InputError(f"reward of unknown outcome {unknown[0]!r} -> outcomes are {', '.join(OUTCOMES)}")
        if self.missing_answer not in ("error", "null"):
            raise InputError(f"missing_answer={self.missing_answer!r} -> error or null")

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
            source = importlib.import_module(self.verifier.partition(":")[0]).__file__
            version["source_sha256"] = sha256_file(source) if source else None
        return {
            "name": self.verifier,
            "options": dict(self.verifier_options),
            "time_limit_seconds": self.time_limit,
            "rewards": dict(self.rewards),
            "version": version,
        }

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
        if self.without_answer:
            lines.append(f"groups without gold answer, not judged: {self.without_answer}")
        return "\n".join(lines + self.examples)


def score_group_file(
    inputs: Sequence[str | Path], output: str | Path, options: ScoringOptions, *, progress: bool = True
) -> ScoreSummary:
    """Judge every response of group files; write one group file with rewards and outcomes, whole or not at all.

    What judged a group is recorded in its ``meta["verifier"]``, from where it goes into the manifest of a shard.

    Raises:
        InputError: a line that is not a group, a missing gold answer, an output that is an input, a bad verifier.
    """
    output = Path(output)
    if any(output.resolve() == Path(path).resolve() for path in inputs):
        raise InputError(f"{output}: is an input too -> choose another output")
    summary = ScoreSummary()
    journal_path = output.with_name(output.name + ".journal")
    records = (item for path in inputs for item in iter_group_file(path))
    with Journal(journal_path, options.description()) as journal, options.pool() as pool:
        if journal.header != options.description():
            raise InputError(f"{journal_path}: begun with another verifier or its options -> remove it, or go back")
        bar = tqdm(desc="scoring", unit="response", disable=not progress)
        with bar:
            write_group_file(output, _scored(records, pool, journal, options, summary, bar.update))
        summary.replaced_workers = pool.replaced
    journal_path.unlink()
    return summary


def _scored(
    records: Iterable[tuple[GroupRecord, str]],
    pool: VerifierPool,
    journal: Journal,
    options: ScoringOptions,
    summary: ScoreSummary,
    advance: Callable[[int], object],
) -> Iterator[GroupRecord]:
    """The records in order, with rewards; verdicts that the journal knows are not asked for again."""
    waiting: deque[tuple[GroupRecord, str, str]] = deque()
    description = options.description()

    def cases() -> Iterator[Case | Verdict]:
        for record, place in records:
            unanswerable = record.answer is None and needs_answer(options.verifier)
            if unanswerable and options.missing_answer == "error":
                raise InputError(
                    f"{place}: group {record.id!r} has no gold answer -> give one, set --missing-answer null, or use "
                    "a verifier that needs none"
                )
            key = "" if unanswerable else _group_key(record)
            waiting.append((record, place, key))
            known = journal[key] if key in journal else None
            for k, response in enumerate(record.responses):
                if unanswerable:
                    yield Verdict("unparsed", 0.0)  # a place holder: the group stays as it is
                elif known is not None:
                    yield Verdict(*known[k])
                else:
                    yield Case(response.text, record.answer, record.prompt, record.meta)

    verdicts: list[Verdict] = []
    for verdict in pool.judge(cases()):
        verdicts.append(verdict)
        record, place, key = waiting[0]
        if len(verdicts) < len(record.responses):
            continue
        waiting.popleft()
        summary.groups += 1
        advance(len(verdicts))
        if not key:
            summary.without_answer += 1
            record.meta.pop("verifier", None)
            for response in record.responses:
                response.reward = response.outcome = None
        else:
            if key not in journal:
                journal.append(key, [[v.outcome, v.reward, v.detail] for v in verdicts])
            record.meta["verifier"] = description
            for response, judged in zip(record.responses, verdicts, strict=True):
                response.outcome, response.reward = judged.outcome, options.reward(judged)
                summary.add(response.source, judged, response.reward, f"{place} id {record.id!r}")
        verdicts = []
        yield record


def _group_key(record: GroupRecord) -> str:
    """Name of a group's verdicts in the journal: its id and a hash of all that a verifier may look at."""
    content = [record.answer, record.prompt, record.meta, [response.text for response in record.responses]]
    text = json.dumps(content, sort_keys=True, default=str)
    return f"{hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=12).hexdigest()}/{record.id}"


def score_shard(
    prefix: str | Path,
    tokenizer: str | Path,
    options: ScoringOptions,
    *,
    groups: Sequence[str | Path] = (),
    progress: bool = True,
) -> ScoreSummary:
    """Judge the responses of an existing shard anew; adds a reward sidecar, which is then the one in force.

    Args:
        prefix: of the shard.
        tokenizer: the one that made it (checked); responses are decoded from their tokens.
        groups: group files that give prompts, ``meta`` and gold answers by id; without them the gold answer is the
            shard's and the prompt its decoded text.

    Raises:
        InputError: another tokenizer, a group that is in the shard but not in ``groups``, or a missing gold answer.
    """
    from megatron_gft.shards import GroupShard, add_rewards_sidecar  # imports megatron and torch: seconds

    shard = GroupShard(prefix)
    text_of = load_tokenizer(tokenizer, NO_TEMPLATE)
    if text_of.fingerprint != shard.manifest.tokenizer.fingerprint:
        raise InputError(f"{prefix}: made by another tokenizer than {tokenizer} -> give that one")
    known = {record.id: record for path in groups for record, _ in iter_group_file(path)}
    if groups:
        absent = [shard.meta(i)["id"] for i in range(len(shard)) if shard.meta(i)["id"] not in known]
        if absent:
            raise InputError(f"{prefix}: group {absent[0]!r} and {len(absent) - 1} more are in none of the group files")
    unanswerable: set[int] = set()

    def cases() -> Iterator[Case | Verdict]:
        for i in range(len(shard)):
            group, meta = shard[i], shard.meta(i)
            record = known.get(meta["id"])
            answer = record.answer if record else meta["answer"]
            if answer is None and needs_answer(options.verifier):
                if options.missing_answer == "error":
                    raise InputError(f"{prefix}: group {meta['id']!r} has no gold answer -> give --groups")
                unanswerable.add(i)
                yield from (Verdict("unparsed", 0.0) for _ in group.responses)
                continue
            prompt = record.prompt if record else text_of.decode(group.prompt.tolist())
            for response in group.responses:
                ids = response.tolist()
                ids = ids[:-1] if ids and ids[-1] == text_of.eos_id else ids
                text = text_of.decode_response(group.prompt.tolist(), ids)
                yield Case(text, answer, prompt, record.meta if record else {})

    summary = ScoreSummary(groups=len(shard))
    rewards = np.full(shard.manifest.counts.responses, np.nan, dtype=np.float32)
    outcomes: list[str | None] = [None] * len(rewards)
    group_of = np.repeat(np.arange(len(shard)), shard.response_counts)
    with options.pool() as pool:
        verdicts = tqdm(pool.judge(cases()), total=len(rewards), desc="scoring", unit="response", disable=not progress)
        for position, verdict in enumerate(verdicts):
            if int(group_of[position]) in unanswerable:
                continue
            reward = options.reward(verdict)
            rewards[position] = np.nan if reward is None else reward
            outcomes[position] = verdict.outcome
            source = SOURCES[int(shard.sources[position])]
            summary.add(source, verdict, reward, f"{prefix} group {int(group_of[position])}")
        summary.replaced_workers = pool.replaced
    summary.without_answer = len(unanswerable)
    add_rewards_sidecar(prefix, rewards, outcomes=outcomes, verifier=options.description())
    return summary
