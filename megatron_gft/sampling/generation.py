"""From prompts to a group file: expert answers from columns, teacher and self responses from sampling backends.

A run is prompts x sources x k. Every sampled response goes into a journal beside the output at once
(``OUTPUT.journal``); a run that was killed continues from it. When all responses are there the group file is written
in the order of the prompts, whole or not at all, then ``OUTPUT.summary.json``. The journal stays: with it, a later run
may raise K, add prompts or add sources and samples only what is new. A response that an input group carries already
(the same source, settings and seed made it) is not sampled again.

The seed of a response depends on the run's seed, the prompt's id, the source's name and k, on nothing else.
"""

from __future__ import annotations

import itertools
import json
import queue
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from megatron_gft import __version__
from megatron_gft.atomic import sha256_file, sha256_json, write_json
from megatron_gft.errors import InputError, InputErrors
from megatron_gft.groups import GROUP_FILE_SUFFIXES, write_group_file
from megatron_gft.groups.records import GroupRecord, ResponseRecord
from megatron_gft.journal import Journal
from megatron_gft.sampling.prompts import PromptRow, PromptSet, scalar_text
from megatron_gft.sampling.responses import FAILED, ResponseMaker, journal_value, sample_key
from megatron_gft.sampling.settings import (
    Backend,
    Outcome,
    Prompt,
    SampleFailure,
    SampleRequest,
)
from megatron_gft.sampling.sources import (
    ColumnSource,
    OpenAISource,
    SampledSource,
    SourceList,
    TransformersSource,
    VllmSource,
)

JOURNAL_FORMAT = 1
SHOWN_PROBLEMS = 20
_SOURCE_KEY = "source/"
Item = TypeVar("Item")


@dataclass
class Summary:
    """What a finished run made; written beside the group file."""

    output: str
    groups: int = 0
    responses: dict[str, dict[str, int]] = field(default_factory=dict)  # source name -> counts by finish reason
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> count
    notes: dict[str, int] = field(default_factory=dict)  # what else is not as one might expect -> count
    plan: str = ""
    sha256: str = ""
    sources: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    version: str = __version__


class GenerationRun:
    """One output file in the making.

    Args:
        prompts: what to sample from; read once here (ids must differ, columns be there) and once per source.
        output: group file (``.jsonl``, ``.jsonl.gz``, ``.parquet``).
        sources: in the order their responses stand in a group.
        seed: of the whole run.

    Attributes:
        num_prompts, num_samples: size of the plan; ``num_samples`` counts sampled responses only.

    Raises:
        InputErrors: whatever can be known before the first request: an output that cannot be written or is an input,
            missing models or packages, bad urls, no prompts, an id twice, rows that a source cannot use.
    """

    def __init__(self, prompts: PromptSet, output: str | Path, sources: SourceList, seed: int = 0):
        self._prompts, self.output, self._seed = prompts, Path(output), seed
        self._columns = [source for source in sources if isinstance(source, ColumnSource)]
        self._sampled = [source for source in sources if not isinstance(source, ColumnSource)]
        self._sources = list(sources)
        self._identities: dict[str, dict[str, Any]] = {}
        self._makers: dict[str, ResponseMaker] = {}
        self._servers: dict[str, Backend] = {}
        self.num_prompts = self.num_samples = self._num_duplicates = 0
        problems = _output_problems(self.output)
        for check in (self._source_problems, self._prompt_problems):
            try:
                problems.extend(itertools.islice(check(), SHOWN_PROBLEMS))
            except InputError as error:
                problems += error.problems if isinstance(error, InputErrors) else [str(error)]
        if problems:
            raise InputErrors("cannot begin", problems)

    def _source_problems(self) -> Iterator[str]:
        """Find out what each source is, by the contents of its files: what must not change while a journal grows."""
        for source in self._sources:
            try:
                self._identities[source.name] = source.identity() | {"seed": self._seed}
                if isinstance(source, SampledSource):
                    self._makers[source.name] = ResponseMaker(source, self._identities[source.name])
                if isinstance(source, OpenAISource):
                    self._servers[source.name] = build_backend(source)
            except InputError as error:
                yield f"source {source.name}: {error}"

    def _prompt_problems(self) -> Iterator[str]:
        """Read the prompts once and count what there is to do."""
        if any(self.output.resolve() == Path(file).resolve() for file in self._prompts.files()):
            yield f"{self.output}: is an input too -> choose another output"
        seen: dict[str, str] = {}
        ids: Counter[str] = Counter()
        for row in self._prompts.rows(ids):
            if row.id in seen:
                yield f"{row.place}: id {row.id!r} is that of {seen[row.id]} too -> ids must differ, or --duplicates"
            seen[row.id] = row.place
            yield from _column_problems(row, self._columns)
            yield from _system_problems(row, self._sampled)
            self.num_samples += sum(len(maker.wanted(row)) for maker in self._makers.values())
        self.num_prompts = len(seen)
        if self._prompts.columns.duplicates == "drop":
            self._num_duplicates = ids.total() - len(ids)
        if not seen:
            yield f"{', '.join(map(str, self._prompts.inputs))}: no prompts in there -> check the input"

    def plan_fingerprint(self) -> str:
        """Of everything that decides the output file."""
        shape = [[source.name, source.source, getattr(source, "k", 1)] for source in self._sources]
        return sha256_json([self._prompts.fingerprint(), self._identities, shape, __version__])

    def finished_summary(self, allow_failures: bool = False) -> Summary | None:
        """The summary of an output that is complete and unchanged, made by this very plan; else ``None``.

        Args:
            allow_failures: an output that lacks responses which were given up counts as complete.
        """
        path = summary_path(self.output)
        if not path.is_file() or not self.output.is_file():
            return None
        summary = _read_summary(path)
        if summary is None or (summary.dropped.get(FAILED) and not allow_failures):
            return None
        if summary.plan != self.plan_fingerprint():
            return None
        return summary if summary.sha256 == sha256_file(self.output) else None

    def execute(self, *, allow_failures: bool = False, progress: bool = True) -> Summary:
        """Sample what the journal lacks, then write the group file.

        Args:
            allow_failures: write the file without responses that were given up, counted in the summary.

        Raises:
            InputErrors: requests were given up; run again to try them once more.
            InputError: the journal was made with other settings, is in use, or a backend cannot work.
        """
        finished = self.finished_summary(allow_failures)
        if finished is not None:
            return finished
        with Journal(journal_path(self.output), {"format": JOURNAL_FORMAT}) as journal:
            self._check_journal(journal)
            failures = self._sample(journal, progress)
            if failures and not allow_failures:
                shown = [f"{failure.key}: {failure.reason}" for failure in failures[:SHOWN_PROBLEMS]]
                raise InputErrors(
                    f"{len(failures)} of {self.num_samples} responses failed; the others are kept. Run again to try "
                    "these once more, or pass --allow-failures. First of them",
                    shown,
                )
            try:
                return self._assemble(journal, progress)
            except OSError as error:
                raise InputError(
                    f"{self.output}: cannot be written ({error.strerror or error}) -> see to the place and its space, "
                    "then run again: all responses are kept"
                ) from error

    def _check_journal(self, journal: Journal) -> None:
        if journal.header.get("format") != JOURNAL_FORMAT:
            raise InputError(f"{journal.path}: format {journal.header.get('format')} -> made by another version")
        problems = []
        for name in self._makers:
            key, identity = _SOURCE_KEY + name, self._identities[name]
            if key in journal and (before := journal[key]) != identity:
                changed = sorted(k for k in before.keys() | identity.keys() if before.get(k) != identity.get(k))
                was = ", ".join(f"{k}={before.get(k)!r} (now {identity.get(k)!r})" for k in changed)
                problems.append(f"source {name}: {was}")
        if problems:
            raise InputErrors(
                f"{journal.path} was begun with other settings -> go back to them, give the source another name, "
                "or choose another output",
                problems,
            )

    # --- sampling --------------------------------------------------------------------------------------------

    def _requests(self, source: SampledSource) -> Iterator[SampleRequest]:
        maker = self._makers[source.name]
        for row in self._prompts:
            prompt = with_system(row.prompt, source.system)
            for k in maker.wanted(row):
                yield SampleRequest(sample_key(source, k, row), prompt, maker.seed(row, k))

    def _sample(self, journal: Journal, progress: bool) -> list[SampleFailure]:
        """Fill the journal; servers are asked side by side, models in this process one after the other."""
        pending = {
            source.name: sum(request.key not in journal for request in self._requests(source))
            for source in self._sampled
        }
        todo = [source for source in self._sampled if pending[source.name]]
        remote = [source for source in todo if isinstance(source, OpenAISource)]
        local = [source for source in todo if not isinstance(source, OpenAISource)]
        failures: list[SampleFailure] = []
        done = self.num_samples - sum(pending.values())
        bar = tqdm(total=self.num_samples, initial=done, desc="sampling", unit="response", disable=not progress)
        with bar:
            streams = [self._stream(source, journal) for source in remote]
            runs: list[Iterator[tuple[str, Outcome]]] = [merged(streams)] if streams else []
            runs += [self._stream(source, journal) for source in local]
            for run in runs:
                for name, outcome in run:
                    if isinstance(outcome, SampleFailure):
                        failures.append(outcome)
                        bar.set_postfix(failed=len(failures))
                        continue
                    if _SOURCE_KEY + name not in journal:  # not before: settings that never worked may be corrected
                        journal.append(_SOURCE_KEY + name, self._identities[name])
                    journal.append(outcome.key, journal_value(outcome))
                    bar.update()
        return failures

    def _stream(self, source: SampledSource, journal: Journal) -> Iterator[tuple[str, Outcome]]:
        """Outcomes, each with the name of its source."""
        backend = self._servers.get(source.name) or build_backend(source)
        for outcome in backend.generate(self._requests(source), source.params(), journal.__contains__):
            yield source.name, outcome

    # --- writing ---------------------------------------------------------------------------------------------

    def _assemble(self, journal: Journal, progress: bool) -> Summary:
        summary = Summary(str(self.output), plan=self.plan_fingerprint(), sources=self._identities, seed=self._seed)
        counts: dict[str, Counter[str]] = {source.name: Counter() for source in self._sources}
        dropped, notes = Counter[str](), Counter[str]()
        if self._num_duplicates:
            dropped["prompt given before"] = self._num_duplicates
        if journal.damaged:
            notes["damaged lines of the journal, sampled again"] = journal.damaged
        if journal.torn:
            notes["bytes of a torn last line of the journal, sampled again"] = journal.torn

        def groups() -> Iterator[GroupRecord]:
            for row in tqdm(self._prompts, total=self.num_prompts, desc="writing", unit="group", disable=not progress):
                responses = list(row.responses)
                for source in self._sources:
                    if isinstance(source, ColumnSource):
                        made = [ResponseRecord(str(row.columns[source.column]), source.source, finish_reason="stop")]
                    else:
                        made = self._makers[source.name].responses(row, journal, dropped, notes)
                    counts[source.name].update(response.finish_reason or "stop" for response in made)
                    responses += made
                if responses:
                    yield GroupRecord(row.id, row.prompt, responses, row.answer, row.meta)
                else:
                    dropped["group without responses"] += 1

        summary.groups = write_group_file(self.output, groups())
        summary.responses = {name: dict(count) for name, count in counts.items()}
        summary.dropped, summary.notes = dict(dropped), dict(notes)
        summary.sha256 = sha256_file(self.output)
        write_json(summary_path(self.output), vars(summary))
        return summary


def build_backend(source: SampledSource) -> Backend:
    """Load or connect what a source samples from (imports torch, transformers or vLLM only when needed)."""
    if isinstance(source, OpenAISource):
        from megatron_gft.sampling.openai_client import OpenAIBackend

        return OpenAIBackend(source)
    if isinstance(source, VllmSource):
        from megatron_gft.sampling.local_backends import VllmBackend

        return VllmBackend(source.model, source.engine, source.requests_per_call, source.chat_template)
    assert isinstance(source, TransformersSource)
    from megatron_gft.sampling.local_backends import TransformersBackend
    from megatron_gft.sampling.local_model import LocalModel

    model = LocalModel(source.model, dtype=source.dtype, device=source.device, chat_template=source.chat_template)
    return TransformersBackend(model, source.batch_size)


def merged(streams: Sequence[Iterable[Item]]) -> Iterator[Item]:
    """Items of several iterators, each consumed by a thread of its own; the first exception is raised here."""
    results: queue.Queue[Any] = queue.Queue(maxsize=1024)
    end = object()

    def consume(stream: Iterable[Item]) -> None:
        try:
            for item in stream:
                results.put(item)
        except BaseException as error:
            results.put(error)
        results.put(end)

    for stream in streams:
        threading.Thread(target=consume, args=(stream,), daemon=True).start()
    running = len(streams)
    while running:
        item = results.get()
        if item is end:
            running -= 1
        elif isinstance(item, BaseException):
            raise item
        else:
            yield item


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """The prompt, which has none of its own, as messages that begin with a system message, if there is one to add."""
    if system is None:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *messages]


def journal_path(output: Path) -> Path:
    return output.with_name(output.name + ".journal")


def summary_path(output: Path) -> Path:
    return output.with_name(output.name + ".summary.json")


def _read_summary(path: Path) -> Summary | None:
    try:
        return Summary(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return None


def _output_problems(output: Path) -> list[str]:
    """What speaks against writing there, found out without leaving anything behind."""
    if not output.name.endswith(GROUP_FILE_SUFFIXES):
        return [f"{output}: unknown kind of group file -> use {', '.join(GROUP_FILE_SUFFIXES)}"]
    if output.is_dir():
        return [f"{output}: is a folder -> choose another output"]
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            return []
    except OSError as error:
        return [f"{output}: cannot be written in {folder} ({error.strerror}) -> choose another output"]


def _column_problems(row: PromptRow, sources: Iterable[ColumnSource]) -> Iterator[str]:
    for source in sources:
        if source.column not in row.columns:
            names = ", ".join(row.columns) or "none: it is a group already"
            yield f"{row.place}: no column {source.column!r} for source {source.name} (columns: {names})"
            continue
        try:
            if not (scalar_text(row.columns[source.column], row.place, source.column) or "").strip():
                yield f"{row.place}: column {source.column!r} is empty, there is no answer of source {source.name}"
        except InputError as error:
            yield str(error)


def _system_problems(row: PromptRow, sources: Iterable[SampledSource]) -> Iterator[str]:
    if isinstance(row.prompt, str) or row.prompt[0]["role"] != "system":
        return
    for source in sources:
        if source.system is not None:
            yield (
                f"{row.place}: the prompt begins with a system message, source {source.name} would add another "
                "-> leave system= out of the source, or the message out of the prompt"
            )
