"""Sampled responses as a journal keeps them, and the records of a group file that become of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_gft.atomic import sha256_json
from megatron_gft.groups.records import ResponseRecord
from megatron_gft.journal import Journal
from megatron_gft.sampling.prompts import PromptRow
from megatron_gft.sampling.settings import Sample, sample_seed
from megatron_gft.sampling.sources import SampledSource

FAILED = "request failed"


def sample_key(source: SampledSource, k: int, row: PromptRow) -> str:
    """Name of one response in the journal."""
    return f"{source.name}/{k}/{row.digest()}/{row.id}"


def journal_value(sample: Sample) -> dict[str, Any]:
    """One response as the journal keeps it."""
    value: dict[str, Any] = {"text": sample.text, "finish_reason": sample.finish_reason}
    if sample.token_ids is not None:
        value["token_ids"] = sample.token_ids
    if sample.logprobs is not None:
        value["logprobs"] = sample.logprobs
    if sample.without_reasoning:
        value["without_reasoning"] = True
    return value


class ResponseMaker:
    """Makes the records of one source out of a journal: who sampled, from which checkpoint, how.

    Args:
        source: as the user describes it.
        identity: all that decides what it samples (``source.identity()`` and the run's ``seed``); its hash goes into
            every record as ``sampling["settings"]``.
    """

    def __init__(self, source: SampledSource, identity: dict[str, Any]):
        self._source, self._identity = source, identity
        sampling = source.params().as_dict() | {"backend": source.kind, "name": source.name}
        if "checkpoint" in identity:
            sampling["checkpoint"] = identity["checkpoint"]
        self._sampling = sampling | {"settings": sha256_json(identity)[:16]}

    def seed(self, row: PromptRow, k: int) -> int:
        return sample_seed(self._identity["seed"], row.id, self._source.name, k)

    def wanted(self, row: PromptRow) -> Sequence[int]:
        """Numbers k of the responses that the row does not carry yet."""
        if not row.responses:
            return range(self._source.k)
        carried = [response.sampling for response in row.responses]
        return [k for k in range(self._source.k) if self._sampling | {"seed": self.seed(row, k)} not in carried]

    def responses(
        self, row: PromptRow, journal: Journal, dropped: Counter[str], notes: Counter[str]
    ) -> list[ResponseRecord]:
        """The row's new responses; those that are missing or empty are counted, and what they lack."""
        source, made = self._source, []
        wanted = self.wanted(row)
        if len(wanted) < source.k:
            notes[f"{source.name}: in the input already"] += source.k - len(wanted)
        for k in wanted:
            key = sample_key(source, k, row)
            if key not in journal:
                dropped[FAILED] += 1
                continue
            value = journal[key]
            if not value["text"] and not value.get("token_ids"):
                dropped["reasoning without an answer" if value.get("without_reasoning") else "empty response"] += 1
                continue
            record = self._record(value, self.seed(row, k))
            notes.update(f"{source.name}: {note}" for note in self._notes(value, record))
            made.append(record)
        return made

    def _record(self, value: dict[str, Any], seed: int) -> ResponseRecord:
        text, ids = _whole_characters(value["text"]), value.get("token_ids")
        if text != value["text"]:
            ids = None  # they spell something else now
        return ResponseRecord(
            text,
            self._source.source,
            finish_reason=value["finish_reason"],
            model=self._source.model,
            tokenizer=self._identity["tokenizer"] if ids is not None else None,
            token_ids=ids,
            logprobs=value.get("logprobs") if ids is not None else None,
            sampling=self._sampling | {"seed": seed},
        )

    def _notes(self, value: dict[str, Any], record: ResponseRecord) -> Iterator[str]:
        if record.text != value["text"]:
            yield "half a character replaced by U+FFFD"
        if value.get("without_reasoning"):
            yield "reasoning, which the server kept apart, left out"
        if self._source.logprobs and record.logprobs is None:
            yield "without log-probs"
        elif self._identity.get("token_ids") and record.token_ids is None:
            yield "without token ids"


def _whole_characters(text: str) -> str:
    """The text with U+FFFD for every half of a surrogate pair, which a server's JSON may spell and no file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
