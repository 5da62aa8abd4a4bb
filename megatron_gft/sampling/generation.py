"""From prompts to a group file: expert answers from columns, teacher and self responses from sampling backends.

A run is prompts x sources x k. Every sampled response goes into a journal beside the output at once
(``OUTPUT.journal``); a run that was killed continues from it. When all responses are there the group file is written
in the order of the prompts, whole or not at all, then ``OUTPUT.summary.json``. The journal stays: with it, a later run
may raise K, add prompts or add sources and samples only what is new.

The seed of a response depends on the run's seed, the prompt's id, the source's name and k, on nothing else.
"""

from __future__ import annotations

import functools
import json
import queue
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_gft import __version__
from megatron_gft.atomic import sha256_file, sha256_json, write_json
from megatron_gft.data.group_records import GroupRecord, ResponseRecord
from megatron_gft.errors import InputError, InputErrors
from megatron_gft.groups import write_group_file
from megatron_gft.sampling.journal import Journal
from megatron_gft.sampling.prompts import PromptColumns, PromptRow, iter_prompts, prompt_files
from megatron_gft.sampling.settings import (
    Backend,
    Outcome,
    Prompt,
    Sample,
    SampleFailure,
    SampleRequest,
    model_fingerprint,
    sample_seed,
)
from megatron_gft.sampling.sources import (
    ColumnSource,
    OpenAISource,
    SampledSource,
    Source,
    SourceList,
    TransformersSource,
    VllmSource,
)

JOURNAL_FORMAT = 1
SHOWN_PROBLEMS = 20
_SOURCE_KEY = "source/"


@dataclass(frozen=True)
class PromptSet:
    """Where prompts come from: files or folders, how their rows are read, and at most how many."""

    inputs: Sequence[str | Path]
    columns: PromptColumns = PromptColumns()
    split: str = "train"
    limit: int | None = None

    def __iter__(self) -> Iterator[PromptRow]:
        left = self.limit if self.limit is not None else -1
        for path in self.inputs:
            for row in iter_prompts(path, self.columns, self.split):
                if left == 0:
                    return
                left -= 1
                yield row

    def fingerprint(self) -> str:
        """Changes with any byte of the files and with how they are read."""
        files = [sha256_file(file) for path in self.inputs for file in prompt_files(path, self.split)]
        return sha256_json([files, repr(self.columns), self.limit])


@dataclass
class Summary:
    """What a finished run made; written beside the group file."""

    output: str
    groups: int = 0
    responses: dict[str, dict[str, int]] = field(default_factory=dict)  # source name -> counts by finish reason
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> count
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
        InputErrors: no prompts, an id twice, or rows that a source cannot use.
    """

    def __init__(self, prompts: PromptSet, output: str | Path, sources: SourceList, seed: int = 0):
        self._prompts, self.output, self._seed = prompts, Path(output), seed
        self._columns = [source for source in sources if isinstance(source, ColumnSource)]
        self._sampled = [source for source in sources if not isinstance(source, ColumnSource)]
        self._sources = list(sources)
        self.num_prompts = self._scan()
        self.num_samples = self.num_prompts * sum(source.k for source in self._sampled)
        self._identities = {source.name: self._identity(source) for source in sources}

    def _scan(self) -> int:
        seen: dict[str, str] = {}
        problems = []
        for row in self._prompts:
            if row.id in seen:
                problems.append(f"{row.place}: id {row.id!r} is that of {seen[row.id]} too -> ids must differ")
            seen[row.id] = row.place
            problems += _column_problems(row, self._columns)
            if len(problems) >= SHOWN_PROBLEMS:
                break
        if problems:
            raise InputErrors("prompts", problems)
        if not seen:
            raise InputError(f"{', '.join(map(str, self._prompts.inputs))}: no prompts in there -> check the input")
        return len(seen)

    def _identity(self, source: Source) -> dict[str, Any]:
        """What must not change while a journal grows: everything that decides what a sample is."""
        identity = source.identity() | {"seed": self._seed}
        if isinstance(source, (TransformersSource, VllmSource)):
            identity["checkpoint"] = model_fingerprint(source.model)
        return identity

    def plan_fingerprint(self) -> str:
        """Of everything that decides the output file."""
        shape = [[source.name, source.source, getattr(source, "k", 1)] for source in self._sources]
        return sha256_json([self._prompts.fingerprint(), self._identities, shape, __version__])

    def finished_summary(self) -> Summary | None:
        """The summary of an output that is complete and unchanged, made by this very plan; else ``None``."""
        path = summary_path(self.output)
        if not path.is_file() or not self.output.is_file():
            return None
        summary = _read_summary(path)
        if summary is None or summary.plan != self.plan_fingerprint():
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
        finished = self.finished_summary()
        if finished is not None:
            return finished
        with Journal(journal_path(self.output), {"format": JOURNAL_FORMAT}) as journal:
            self._register_sources(journal)
            failures = self._sample(journal, progress)
            if failures and not allow_failures:
                shown = [f"{failure.key}: {failure.reason}" for failure in failures[:SHOWN_PROBLEMS]]
                raise InputErrors(
                    f"{len(failures)} of {self.num_samples} responses failed; the others are kept. Run again to try "
                    "these once more, or pass --allow-failures. First of them",
                    shown,
                )
            return self._assemble(journal, progress)

    def _register_sources(self, journal: Journal) -> None:
        if journal.header.get("format") != JOURNAL_FORMAT:
            raise InputError(f"{journal.path}: format {journal.header.get('format')} -> made by another version")
        problems = []
        for name, identity in self._identities.items():
            key = _SOURCE_KEY + name
            if key not in journal:
                journal.append(key, identity)
            elif (before := journal[key]) != identity:
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
        for row in self._prompts:
            prompt = with_system(row.prompt, source.system)
            for k in range(source.k):
                seed = sample_seed(self._seed, row.id, source.name, k)
                yield SampleRequest(sample_key(source, k, row), prompt, seed)

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
            runs: list[Iterator[Outcome]] = [merged(streams)] if streams else []
            runs += [self._stream(source, journal) for source in local]
            for run in runs:
                for outcome in run:
                    if isinstance(outcome, SampleFailure):
                        failures.append(outcome)
                        bar.set_postfix(failed=len(failures))
                    else:
                        journal.append(outcome.key, _journal_value(outcome))
                        bar.update()
        return failures

    def _stream(self, source: SampledSource, journal: Journal) -> Iterator[Outcome]:
        backend = build_backend(source)
        yield from backend.generate(self._requests(source), source.params(), journal.__contains__)

    # --- writing ---------------------------------------------------------------------------------------------

    def _assemble(self, journal: Journal, progress: bool) -> Summary:
        summary = Summary(str(self.output), plan=self.plan_fingerprint(), sources=self._identities, seed=self._seed)
        counts: dict[str, Counter[str]] = {source.name: Counter() for source in self._sources}
        dropped: Counter[str] = Counter()
        describe = {source.name: _Lineage(source, self._identities[source.name]) for source in self._sampled}

        def groups() -> Iterator[GroupRecord]:
            for row in tqdm(self._prompts, total=self.num_prompts, desc="writing", unit="group", disable=not progress):
                responses = list(row.responses)
                for source in self._sources:
                    made = self._responses_of(source, row, journal, describe, dropped)
                    counts[source.name].update(response.finish_reason or "stop" for response in made)
                    responses += made
                if responses:
                    yield GroupRecord(row.id, row.prompt, responses, row.answer, row.meta)
                else:
                    dropped["group without responses"] += 1

        summary.groups = write_group_file(self.output, groups())
        summary.responses = {name: dict(count) for name, count in counts.items()}
        summary.dropped = dict(dropped)
        summary.sha256 = sha256_file(self.output)
        write_json(summary_path(self.output), vars(summary))
        return summary

    def _responses_of(
        self,
        source: Source,
        row: PromptRow,
        journal: Journal,
        describe: dict[str, _Lineage],
        dropped: Counter[str],
    ) -> list[ResponseRecord]:
        if isinstance(source, ColumnSource):
            return [ResponseRecord(str(row.columns[source.column]), source.source, finish_reason="stop")]
        made = []
        for k in range(source.k):
            key = sample_key(source, k, row)
            if key not in journal:
                dropped["request failed"] += 1
                continue
            value = journal[key]
            if not value["text"] and not value.get("token_ids"):
                dropped["empty response"] += 1
                continue
            made.append(describe[source.name].record(value, sample_seed(self._seed, row.id, source.name, k)))
        return made


class _Lineage:
    """Makes the records of one source: who sampled, from which checkpoint, how."""

    def __init__(self, source: SampledSource, identity: dict[str, Any]):
        self._source, self._identity = source, identity
        self._tokenizer = functools.cache(source.tokenizer_fingerprint)

    def record(self, value: dict[str, Any], seed: int) -> ResponseRecord:
        source, ids = self._source, value.get("token_ids")
        sampling = source.params().as_dict() | {"seed": seed, "backend": source.kind, "name": source.name}
        if "checkpoint" in self._identity:
            sampling["checkpoint"] = self._identity["checkpoint"]
        return ResponseRecord(
            value["text"],
            source.source,
            finish_reason=value["finish_reason"],
            model=source.model,
            tokenizer=self._tokenizer() if ids is not None else None,
            token_ids=ids,
            logprobs=value.get("logprobs"),
            sampling=sampling,
        )


def build_backend(source: SampledSource) -> Backend:
    """Load or connect what a source samples from (imports torch, transformers or vLLM only when needed)."""
    if isinstance(source, OpenAISource):
        from megatron_gft.sampling.openai_client import OpenAIBackend

        return OpenAIBackend(source.server(), source.load_tokenizer())
    if isinstance(source, VllmSource):
        from megatron_gft.sampling.local_backends import VllmBackend

        return VllmBackend(source.model, source.engine, source.requests_per_call, source.chat_template)
    assert isinstance(source, TransformersSource)
    from megatron_gft.sampling.decoding import LocalModel
    from megatron_gft.sampling.local_backends import TransformersBackend

    model = LocalModel(source.model, dtype=source.dtype, device=source.device, chat_template=source.chat_template)
    return TransformersBackend(model, source.batch_size)


def merged(streams: Sequence[Iterable[Outcome]]) -> Iterator[Outcome]:
    """Items of several iterators, each consumed by a thread of its own; the first exception is raised here."""
    results: queue.Queue[Any] = queue.Queue(maxsize=1024)
    end = object()

    def consume(stream: Iterable[Outcome]) -> None:
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


def sample_key(source: SampledSource, k: int, row: PromptRow) -> str:
    """Name of one response in the journal."""
    return f"{source.name}/{k}/{row.digest()}/{row.id}"


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """The prompt as messages that begin with a system message, if there is one to add."""
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


def _journal_value(sample: Sample) -> dict[str, Any]:
    value: dict[str, Any] = {"text": sample.text, "finish_reason": sample.finish_reason}
    if sample.token_ids is not None:
        value["token_ids"] = sample.token_ids
    if sample.logprobs is not None:
        value["logprobs"] = sample.logprobs
    return value


def _column_problems(row: PromptRow, sources: Iterable[ColumnSource]) -> list[str]:
    problems = []
    for source in sources:
        value = row.columns.get(source.column)
        if source.column not in row.columns:
            names = ", ".join(row.columns) or "none: it is a group already"
            problems.append(f"{row.place}: no column {source.column!r} for source {source.name} (columns: {names})")
        elif not isinstance(value, (str, int, float)) or not str(value).strip():
            problems.append(f"{row.place}: column {source.column!r} holds {value!r}, not an answer")
    return problems
