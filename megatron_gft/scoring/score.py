"""Rewards and outcomes for the responses of group files.

Groups go through the workers of a :class:`VerifierPool`, so a response that hangs, crashes or exhausts memory is judged
``timeout`` or ``error`` and delays nothing else. While a run lasts, verdicts go into ``OUTPUT.journal``, so that a
killed run continues. It is removed when the output is complete, and when it would hold no verdict.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_gft.atomic import writing
from megatron_gft.errors import InputError, InputErrors
from megatron_gft.groups import SOURCES, GroupRecord, iter_groups, output_problems, read_all, write_group_file
from megatron_gft.groups.files import expand_inputs
from megatron_gft.groups.records import opened_tag
from megatron_gft.journal import Journal
from megatron_gft.progress import ProgressBar, total_bytes
from megatron_gft.scoring.judging import ScoringOptions
from megatron_gft.scoring.verifier_pool import VerifierPool
from megatron_gft.scoring.verifiers import OUTCOMES, Case, Verdict

SHOWN_EXAMPLES = 10
_NOT_JUDGED = Verdict("unparsed", 0.0)  # keeps the place of a response that no verifier sees


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


def score_group_file(
    inputs: Sequence[str | Path], output: str | Path, options: ScoringOptions, *, progress: bool = True
) -> ScoreSummary:
    """Judge every response of group files; write one group file with rewards and outcomes, whole or not at all.

    What judged a group is recorded in its ``meta["verifier"]``, from where it goes into the manifest of a shard; what
    stands there and is not from here moves to ``meta["verifier_before"]``.

    Raises:
        InputError: a line that is not a group, a missing gold answer, a bad verifier, an input named twice, an output
            that is an input or cannot be written.
    """
    output = Path(output)
    inputs, problems = expand_inputs(inputs), output_problems(output)
    if output.resolve() in [Path(path).resolve() for path in inputs]:
        problems.append(f"{output}: is an input too -> choose another output")
    if problems:
        raise InputErrors("cannot begin", problems)
    summary = ScoreSummary()
    with VerifierPool(options) as pool:  # first: a verifier that does not work leaves nothing behind
        description = options.description()
        with _open_journal(output.with_name(output.name + ".journal"), description) as journal:
            for left in output.parent.glob(f".{glob.escape(output.name)}.tmp-*"):  # by killed runs: we hold the lock
                left.unlink(missing_ok=True)
            with ProgressBar(desc="scoring", total=total_bytes(inputs), unit="B", show=progress) as bar:
                judged = _judged(_read(inputs, options, bar), pool, journal, bar)
                with writing(output, "verdicts are kept"):
                    write_group_file(output, _with_verdicts(judged, options, description, summary))
        summary.replaced_workers = pool.replaced
    return summary


@contextlib.contextmanager
def _open_journal(path: Path, description: dict[str, Any]) -> Iterator[Journal]:
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


@dataclass(frozen=True)
class _Group:
    """A group on its way through the workers.

    ``key`` names its verdicts in the journal: a hash of all that a verifier may look at, and the group's name; it is
    empty when the group cannot be judged.
    """

    record: GroupRecord
    place: str
    key: str


def _read(inputs: Sequence[str | Path], options: ScoringOptions, bar: ProgressBar) -> Iterator[_Group]:
    for record, place in iter_groups(read_all(inputs, bar)):
        key = ""
        if options.can_judge(record.answer):
            texts = [response.text + opened_tag(response) for response in record.responses]
            content = json.dumps([record.answer, record.prompt, record.meta, texts], sort_keys=True, default=str)
            key = f"{hashlib.blake2b(content.encode('utf-8', 'surrogatepass')).hexdigest()[:24]}/{record.id}"
        elif options.missing_answer == "error":
            raise InputError(
                f"{place}: group {record.id!r} has no gold answer -> give one, set --missing-answer null, or use "
                "a verifier that needs none"
            )
        yield _Group(record, place, key)


def _judged(
    groups: Iterable[_Group], pool: VerifierPool, journal: Journal, bar: ProgressBar
) -> Iterator[tuple[_Group, list[Verdict]]]:
    """Every group in order with its verdicts; those in the journal are not asked for."""
    waiting: deque[_Group] = deque()

    def cases() -> Iterator[Case | Verdict]:
        for group in groups:
            waiting.append(group)
            record = group.record
            if not group.key:
                yield from itertools.repeat(_NOT_JUDGED, len(record.responses))
            elif group.key in journal:
                yield from (Verdict(*said) for said in journal[group.key])
            else:
                for said in record.responses:
                    yield Case(said.text, record.answer, record.prompt, record.meta, opened_tag(said))

    verdicts, done = pool.judge(cases()), 0
    for first in verdicts:
        group = waiting.popleft()
        said = [first, *itertools.islice(verdicts, len(group.record.responses) - 1)]
        if group.key and group.key not in journal:
            journal.append(group.key, [[verdict.outcome, verdict.reward, verdict.detail] for verdict in said])
        done += len(said)
        bar.set_postfix_str(f"{done} responses", refresh=False)
        bar.update(0)
        yield group, said


def _with_verdicts(
    judged: Iterable[tuple[_Group, list[Verdict]]],
    options: ScoringOptions,
    description: dict[str, Any],
    summary: ScoreSummary,
) -> Iterator[GroupRecord]:
    for group, verdicts in judged:
        record = group.record
        summary.groups += 1
        before = record.meta.pop("verifier", None)
        if before is not None and not (isinstance(before, dict) and before.keys() == description.keys()):
            record.meta["verifier_before"] = before
            summary.verifiers_moved += 1
        if not group.key:
            summary.without_answer += 1
            summary.rewards_removed += sum(response.reward is not None for response in record.responses)
            for response in record.responses:
                response.reward = response.outcome = None
        else:
            record.meta["verifier"] = description
            for response, verdict in zip(record.responses, verdicts, strict=True):
                response.outcome, response.reward = verdict.outcome, options.reward(verdict)
                summary.add(response.source, verdict, response.reward, f"{group.place} id {record.id!r}")
        yield record
