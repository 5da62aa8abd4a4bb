"""A source in a run: what it is asked, and the records of a group file that become of the answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_gft import __version__
from megatron_gft.atomic import sha256_json
from megatron_gft.groups.records import ResponseRecord
from megatron_gft.journal import Journal
from megatron_gft.sampling.prompts import PromptRow
from megatron_gft.sampling.settings import Outcome, Prompt, Sample, SampleRequest, sample_seed
from megatron_gft.sampling.sources import ColumnSource, OpenAISource, SampledSource

FAILED = "request failed"


@dataclass
class Summary:
    """What a finished run made; written beside the group file."""

    output: str
    groups: int = 0
    responses: dict[str, dict[str, int]] = field(default_factory=dict)  # source name -> counts by finish reason
    dropped: dict[str, int] = field(default_factory=Counter)  # reason -> count
    notes: dict[str, int] = field(default_factory=Counter)  # what else is not as one might expect -> count
    plan: str = ""
    sha256: str = ""
    sources: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    version: str = __version__


class ColumnResponses:
    """Responses that the rows bring along."""

    def __init__(self, source: ColumnSource, seed: int):
        self.source, self.identity = source, source.identity() | {"seed": seed}

    def records(self, row: PromptRow, journal: Journal, summary: Summary) -> Iterator[ResponseRecord]:
        yield ResponseRecord(str(row.columns[self.source.column]), self.source.source, finish_reason="stop")


class SampledResponses:
    """Responses that a model is asked for: who sampled, from which checkpoint, how.

    Args:
        source: as the user describes it.
        seed: of the run.

    Attributes:
        identity: all that decides what is sampled; its hash goes into every record as ``sampling["settings"]``.

    Raises:
        InputError: what the source needs is not there.
    """

    def __init__(self, source: SampledSource, seed: int):
        self.source, self.identity = source, source.identity() | {"seed": seed}
        self._server = source.backend() if isinstance(source, OpenAISource) else None
        self._sampling = source.params().as_dict() | {"backend": source.kind, "name": source.name}
        if "checkpoint" in self.identity:
            self._sampling["checkpoint"] = self.identity["checkpoint"]
        self._sampling["settings"] = sha256_json(self.identity)[:16]

    def wanted(self, row: PromptRow) -> dict[int, int]:
        """Numbers k of the responses that the row does not carry yet, with their seeds."""
        seeds = {k: sample_seed(self.identity["seed"], row.id, self.source.name, k) for k in range(self.source.k)}
        carried = [response.sampling for response in row.responses]
        return {k: seed for k, seed in seeds.items() if self._sampling | {"seed": seed} not in carried}

    def requests(self, rows: Iterable[PromptRow]) -> Iterator[SampleRequest]:
        """In the order of the rows; the key names a response in the journal."""
        for row in rows:
            prompt = _with_system(row.prompt, self.source.system)
            for k, seed in self.wanted(row).items():
                yield SampleRequest(self._key(row, k), prompt, seed)

    def _key(self, row: PromptRow, k: int) -> str:
        return f"{self.source.name}/{k}/{row.digest()}/{row.id}"

    def outcomes(self, rows: Iterable[PromptRow], journal: Journal) -> Iterator[Outcome]:
        """Ask for what the journal lacks; a model is loaded when the first outcome is wanted."""
        backend = self._server or self.source.backend()
        yield from backend.generate(self.requests(rows), self.source.params(), journal.__contains__)

    def records(self, row: PromptRow, journal: Journal, summary: Summary) -> Iterator[ResponseRecord]:
        """The row's new responses; those that are missing or empty are counted, and what they lack."""
        wanted = self.wanted(row)
        if len(wanted) < self.source.k:
            summary.notes[f"{self.source.name}: in the input already"] += self.source.k - len(wanted)
        for k, seed in wanted.items():
            key = self._key(row, k)
            if key not in journal:
                summary.dropped[FAILED] += 1
                continue
            sample = Sample(key, **journal[key])
            if not sample.text and not sample.token_ids:
                summary.dropped["reasoning without an answer" if sample.without_reasoning else "empty response"] += 1
                continue
            record = self._record(sample, seed)
            for note in self._notes(sample, record):
                summary.notes[f"{self.source.name}: {note}"] += 1
            yield record

    def _record(self, sample: Sample, seed: int) -> ResponseRecord:
        text = _whole_characters(sample.text)
        ids = sample.token_ids if text == sample.text else None  # else they spell something else now
        return ResponseRecord(
            text,
            self.source.source,
            finish_reason=sample.finish_reason,
            model=self.source.model,
            tokenizer=self.identity["tokenizer"] if ids is not None else None,
            token_ids=ids,
            logprobs=sample.logprobs if ids is not None else None,
            sampling=self._sampling | {"seed": seed},
        )

    def _notes(self, sample: Sample, record: ResponseRecord) -> Iterator[str]:
        if record.text != sample.text:
            yield "half a character replaced by U+FFFD"
        if sample.without_reasoning:
            yield "reasoning, which the server kept apart, left out"
        if self.source.logprobs and record.logprobs is None:
            yield "without log-probs"
        elif self.identity.get("token_ids") and record.token_ids is None:
            yield "without token ids"


def _with_system(prompt: Prompt, system: str | None) -> Prompt:
    """The prompt, which has none of its own, as messages that begin with a system message, if there is one to add."""
    if system is None:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *messages]


def _whole_characters(text: str) -> str:
    """The text with U+FFFD for every half of a surrogate pair, which a server's JSON may spell and no file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
