"""From prompts to a group file: expert answers from columns, teacher and self responses from sampling backends.

A run is prompts x sources x k. Every sampled response goes into a journal beside the output at once
(``OUTPUT.journal``); a run that was killed continues from it. When all responses are there the group file is written
in the order of the prompts, whole or not at all, then ``OUTPUT.summary.json``. The journal stays: with it, a later run
may raise K, add prompts or add sources and samples only what is new. A response that an input group carries already
(the same source, settings and seed made it) is not sampled again.

The seed of a response depends on the run's seed, the prompt's id, the source's name and k, on nothing else.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_gft.atomic import sha256_file, write_json, writing
from megatron_gft.errors import InputError, InputErrors, refuse
from megatron_gft.groups import output_problems, write_group_file
from megatron_gft.groups.records import GroupRecord, ResponseRecord
from megatron_gft.journal import Journal
from megatron_gft.progress import ProgressBar
from megatron_gft.sampling.prompts import PromptSet
from megatron_gft.sampling.responses import ColumnResponses, SampledResponses, Summary, sampled
from megatron_gft.sampling.settings import SampleFailure
from megatron_gft.sampling.sources import ColumnSource, SampledSource, Source

JOURNAL_FORMAT = 1
SHOWN_PROBLEMS = 20
_SOURCE_KEY = "source/"


class GenerationRun:
    """One output file in the making.

    Args:
        prompts: read once here (ids must differ, columns be there) and once per source.
        sources: in the order their responses stand in a group.
        template_kwargs: variables of the chat template; those of a source's extra_body or of a row go before.
        left_out: for the summary: prompts that were there and are not asked, by reason.

    Raises:
        InputErrors: whatever can be known before the first request: an output that cannot be written or is an input,
            missing models or packages, bad urls, no prompts, an id twice, rows that a source cannot use.
    """

    def __init__(
        self,
        prompts: PromptSet,
        output: str | Path,
        sources: Sequence[Source],
        seed: int = 0,
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
        left_out: Mapping[str, int] = MappingProxyType({}),
    ):
        self._prompts, self._output, self._seed, self._left_out = prompts, Path(output), seed, left_out
        self._template_kwargs = template_kwargs
        self._responses: list[ColumnResponses | SampledResponses] = []
        self._failed: dict[str, str] = {}  # reasons by key
        self._num_prompts = self._num_samples = self._num_duplicates = 0
        problems = output_problems(self._output)
        for check in (self._source_problems(sources), self._prompt_problems(sources)):
            try:
                problems.extend(itertools.islice(check, SHOWN_PROBLEMS))
            except InputError as error:
                problems += error.problems if isinstance(error, InputErrors) else [str(error)]
        refuse("cannot begin", problems)

    @property
    def _sampled(self) -> list[SampledResponses]:
        return [responses for responses in self._responses if isinstance(responses, SampledResponses)]

    def _source_problems(self, sources: Iterable[Source]) -> Iterator[str]:
        """Find out what each source is, by the contents of its files: what must not change while a journal grows."""
        for source in sources:
            try:
                if isinstance(source, ColumnSource):
                    self._responses.append(ColumnResponses(source, self._seed))
                elif isinstance(source, SampledSource):
                    self._responses.append(SampledResponses(source, self._seed, self._template_kwargs))
            except InputError as error:
                yield f"source {source.name}: {error}"

    def _prompt_problems(self, sources: Iterable[Source]) -> Iterator[str]:
        """Read the prompts once and count what there is to do."""
        if any(self._output.resolve() == Path(file).resolve() for file in self._prompts.files()):
            yield f"{self._output}: is an input too -> choose another output"
        seen: dict[str, str] = {}
        ids, sampled = Counter[str](), self._sampled
        for row in self._prompts.rows(ids):
            if row.id in seen:
                yield f"{row.place}: id {row.id!r} is that of {seen[row.id]} too -> ids must differ, or --duplicates"
            seen[row.id] = row.place
            for source in sources:
                yield from source.problems(row)
            self._num_samples += sum(len(responses.wanted(row)) for responses in sampled)
        self._num_prompts = len(seen)
        if self._prompts.columns.duplicates == "drop":
            self._num_duplicates = ids.total() - len(ids)
        if not seen:
            yield f"{', '.join(map(str, self._prompts.inputs))}: no prompts in there -> check the input"

    def execute(self, *, allow_failures: bool = False, progress: bool = True) -> Summary:
        """Sample what the journal lacks, then write the group file.

        Args:
            allow_failures: write the file without responses that were given up, counted in the summary.

        Raises:
            InputErrors: requests were given up; run again to try them once more.
            InputError: the journal was made with other settings, is in use or not beside an output that is there, or a
                backend cannot work.
        """
        identities = {responses.source.name: responses.identity for responses in self._responses}
        if self._sampled and self._output.exists() and not journal_path(self._output).exists():
            raise InputError(
                f"{self._output}: is there, but {journal_path(self._output).name} is not, so all would be sampled "
                "anew -> move it away, or choose another output"
            )
        with Journal(journal_path(self._output), {"format": JOURNAL_FORMAT}) as journal:
            self._check_journal(journal)
            failures = self._sample(journal, progress)
            if failures and not allow_failures:
                raise InputErrors(
                    f"{len(failures)} of {self._num_samples} responses failed; the others are kept. Run again to try "
                    "these once more, or pass --allow-failures. First of them",
                    [f"{failure.key}: {failure.reason}" for failure in failures[:SHOWN_PROBLEMS]],
                )
            with writing(self._output, "all responses are kept"):
                summary = Summary(str(self._output), sources=identities, seed=self._seed)
                return self._write(journal, summary, progress)

    def _check_journal(self, journal: Journal) -> None:
        if journal.header.get("format") != JOURNAL_FORMAT:
            raise InputError(f"{journal.path}: format {journal.header.get('format')} -> made by another version")
        problems = []
        for responses in self._sampled:
            key, identity = _SOURCE_KEY + responses.source.name, responses.identity
            if key in journal and (before := journal[key]) != identity:
                changed = sorted(k for k in before.keys() | identity.keys() if before.get(k) != identity.get(k))
                was = ", ".join(f"{k}={before.get(k)!r} (now {identity.get(k)!r})" for k in changed)
                problems.append(f"source {responses.source.name}: {was}")
        refuse(
            f"{journal.path} was begun with other settings -> go back to them, give the source another name, "
            "or choose another output",
            problems,
        )

    def _sample(self, journal: Journal, progress: bool) -> list[SampleFailure]:
        """Fill the journal; servers are asked side by side, models in this process one after the other."""
        identities = {responses.source.name: responses.identity for responses in self._sampled}
        pending = [
            sum(request.key not in journal for request in responses.requests(self._prompts))
            for responses in self._sampled
        ]
        todo = [responses for responses, number in zip(self._sampled, pending, strict=True) if number]
        failures: list[SampleFailure] = []
        done = self._num_samples - sum(pending)
        with ProgressBar(
            None, "sampling", total=self._num_samples, initial=done, unit="response", show=progress
        ) as bar:
            for outcome in sampled(todo, self._prompts, journal):
                if isinstance(outcome, SampleFailure):
                    failures.append(outcome)
                    self._failed[outcome.key] = outcome.reason
                    bar.set_postfix(failed=len(failures))
                    continue
                name = outcome.key.partition("/")[0]
                if _SOURCE_KEY + name not in journal:  # not before: settings that never worked may be corrected
                    journal.append(_SOURCE_KEY + name, identities[name])
                journal.append(outcome.key, outcome.as_dict())
                bar.update()
        return failures

    def _write(self, journal: Journal, summary: Summary, progress: bool) -> Summary:
        summary.dropped.update(self._left_out)
        if self._num_duplicates:
            summary.dropped["prompt given before"] = self._num_duplicates
        if journal.damaged:
            summary.notes["damaged lines of the journal, sampled again"] = journal.damaged
        if journal.torn:
            summary.notes["bytes of a torn last line of the journal, sampled again"] = journal.torn
        for responses in self._sampled:
            summary.notes |= responses.findings
        summary.responses = {responses.source.name: Counter() for responses in self._responses}

        def groups() -> Iterator[GroupRecord]:
            for row in ProgressBar(self._prompts, "writing", total=self._num_prompts, unit="group", show=progress):
                made: list[ResponseRecord] = list(row.responses)
                for responses in self._responses:
                    for record in responses.records(row, journal, summary, self._failed):
                        made.append(record)
                        summary.responses[responses.source.name][record.finish_reason or "stop"] += 1
                if made:
                    yield GroupRecord(row.id, row.prompt, made, row.answer, row.meta)
                else:
                    summary.dropped["group without responses"] += 1

        summary.groups = write_group_file(self._output, groups())
        summary.sha256 = sha256_file(self._output)
        write_json(summary_path(self._output), vars(summary))
        return summary


def journal_path(output: Path) -> Path:
    return output.with_name(output.name + ".journal")


def summary_path(output: Path) -> Path:
    return output.with_name(output.name + ".summary.json")
