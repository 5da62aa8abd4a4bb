"""A source in a run: what it is asked, and the records of a group file that become of the answers."""

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_gft import __version__
from megatron_gft.atomic import sha256_json
from megatron_gft.chat_template import TemplateOptions
from megatron_gft.groups import cell
from megatron_gft.groups.records import ResponseRecord
from megatron_gft.journal import Journal
from megatron_gft.sampling.prompts import PromptRow
from megatron_gft.sampling.settings import Outcome, Prompt, Sample, SampleRequest, sample_seed
from megatron_gft.sampling.sources import ColumnSource, OpenAISource, SampledSource
from megatron_gft.sampling.written import prompt_opens

FAILED = "request failed"


@dataclass
class Summary:
    """What a finished run made; written beside the group file."""

    output: str
    groups: int = 0
    responses: dict[str, dict[str, int]] = field(default_factory=dict)  # source name -> counts by finish reason
    dropped: dict[str, int] = field(default_factory=Counter)  # reason -> count
    notes: dict[str, int] = field(default_factory=Counter)  # what else is not as one might expect -> count
    sha256: str = ""
    sources: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    version: str = __version__


class ColumnResponses:
    """Responses that the rows bring along."""

    def __init__(self, source: ColumnSource, seed: int):
        self.source, self.identity = source, source.identity() | {"seed": seed}

    def records(self, row: PromptRow, *_: object) -> Iterator[ResponseRecord]:
        yield ResponseRecord(str(cell(row.columns, self.source.column)), self.source.source, finish_reason="stop")


class SampledResponses:
    """Responses that a model is asked for; ``identity`` is all that decides what is sampled, and its hash goes into
    every record as ``sampling["settings"]``.

    Raises:
        InputError: what the source needs is not there.
    """

    def __init__(self, source: SampledSource, seed: int, template_kwargs: Mapping[str, Any]):
        self.source, self.identity = source, source.identity() | {"seed": seed}
        if template_kwargs:
            self.identity["template_kwargs"] = dict(template_kwargs)
        self._tokenizer = source.load_tokenizer()
        found = [] if self._tokenizer is None else self._tokenizer.problems()
        self.findings = {f"{source.name}: {kind}: {detail}": 1 for kind, detail in found}  # preprocessing refuses them
        self._template_kwargs = {**template_kwargs, **source.template_kwargs()}
        self.server: Any = source.backend() if isinstance(source, OpenAISource) else None
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
            options = self._options(row)
            for k, seed in self.wanted(row).items():
                yield SampleRequest(self._key(row, k), prompt, seed, options)

    def _options(self, row: PromptRow) -> TemplateOptions:
        return TemplateOptions.of_row(row.meta, self._template_kwargs)

    def _rendering(self, row: PromptRow) -> dict[str, Any]:
        """How the row's prompt was rendered, as each response keeps it; a chat server's template is not known."""
        options, tokenizer = self._options(row), self._tokenizer
        by_server = isinstance(self.source, OpenAISource) and self.source.api == "chat"
        value = options.record() | {"add_generation_prompt": True}
        if tokenizer is not None:
            value["tokenizer"] = tokenizer.fingerprint
            value |= {} if by_server else {"chat_template": tokenizer.chat_template_fingerprint}
        opens = prompt_opens(tokenizer, _with_system(row.prompt, self.source.system), options, by_server)
        return value | ({"opens": opens} if opens else {})

    def _key(self, row: PromptRow, k: int) -> str:
        own = TemplateOptions.of_row(row.meta, {}).record()
        digest = row.digest() + (f"-{sha256_json(own)[:12]}" if own else "")
        return f"{self.source.name}/{k}/{digest}/{row.id}"

    def records(
        self, row: PromptRow, journal: Journal, summary: Summary, failed: Mapping[str, str]
    ) -> Iterator[ResponseRecord]:
        """The row's new responses; those that are missing or empty are counted, and what they lack."""
        wanted = self.wanted(row)
        if len(wanted) < self.source.k:
            summary.notes[f"{self.source.name}: in the input already"] += self.source.k - len(wanted)
        rendering: dict[str, Any] = {}
        for k, seed in wanted.items():
            key = self._key(row, k)
            if key not in journal:
                reason = failed.get(key, "not asked again").partition(": ")[0]
                summary.dropped[FAILED] += 1
                summary.notes[f"{self.source.name}: {FAILED}: {reason}"] += 1
                continue
            sample = Sample(key, **journal[key])
            if not sample.text and not sample.token_ids:
                summary.dropped["reasoning without an answer" if sample.without_reasoning else "empty response"] += 1
                continue
            rendering = rendering or self._rendering(row)
            record = self._record(sample, seed, rendering)
            for note in self._notes(sample, record):
                summary.notes[f"{self.source.name}: {note}"] += 1
            yield record

    def _record(self, sample: Sample, seed: int, rendering: dict[str, Any]) -> ResponseRecord:
        # A server's JSON may spell half of a surrogate pair, which no file can hold: U+FFFD in its place.
        text = sample.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
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
            extra={"rendering": rendering | ({"prompt_tokens": sample.prompt_tokens} if sample.prompt_tokens else {})},
        )

    def _notes(self, sample: Sample, record: ResponseRecord) -> Iterator[str]:
        if record.text != sample.text:
            yield "half a character replaced by U+FFFD"
        if sample.note:
            yield sample.note
        if sample.without_reasoning:
            yield "reasoning, which the server kept apart, left out"
        if self.source.logprobs and record.logprobs is None:
            yield "without log-probs"
        elif self.identity.get("token_ids") and record.token_ids is None:
            yield "without token ids"


def sampled(sources: Sequence[SampledResponses], rows: Iterable[PromptRow], journal: Journal) -> Iterator[Outcome]:
    """Ask for what the journal lacks: servers side by side, then models in this process one after the other."""
    done, servers = journal.__contains__, []
    for of in sources:
        if of.server is not None:
            servers.append(functools.partial(of.server.ask, of.requests(rows), of.source.params(), done))
    if servers:
        from megatron_gft.sampling.openai_client import asked_together

        yield from asked_together(servers)
    for of in sources:
        if of.server is None:  # it is loaded now
            yield from of.source.backend().generate(of.requests(rows), of.source.params(), done)


def _with_system(prompt: Prompt, system: str | None) -> Prompt:
    """The prompt, which has none of its own, as messages that begin with a system message, if there is one to add."""
    if system is None:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *messages]
