"""From rows of a group file to tokens: parse, check, render, tokenize. Runs in worker processes.

All texts of a chunk are tokenized in two calls (prompts, responses). A prompt is tokenized once for its group;
``token_ids`` made by the same tokenizer are taken as they are. EOS follows a response unless it was cut off.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_gft.groups import RawChunk, parse_chunk
from megatron_gft.groups.problems import DROP, ERROR, FIX, KEEP, Problem, ProblemLog
from megatron_gft.groups.records import SOURCE_CODES, GroupRecord, ResponseRecord, check_group, has_text
from megatron_gft.shards.encoded import EncodedGroups, GroupEncoder
from megatron_gft.tokenizer import ChatTemplateError, Tokenizer

LOGPROB_SLACK = 1e-3  # servers round: a log-prob may come out slightly above 0


@dataclass(frozen=True)
class EncodingOptions:
    """What to accept.

    Args:
        policies: what to do with each kind of problem.
        max_prompt_tokens: longest prompt, template included; None = any.
        max_response_tokens: longest response, EOS included; None = any.
    """

    policies: Mapping[str, str]
    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None


@dataclass
class EncodedChunk:
    """One chunk of rows as tokens, and everything that is to be known about it."""

    groups: EncodedGroups
    ids: list[str]
    places: list[str]
    problems: list[Problem]
    lineages: list[dict[str, int]]  # of each group: JSON of (source, model, sampling) -> responses
    verifiers: list[str | None]  # of each group: JSON of meta["verifier"]
    rows: int


@dataclass(slots=True)
class _Pending:
    """A response on its way: its ids are known, or its text is still to be tokenized."""

    record: ResponseRecord
    text: str = ""
    parse_special: bool = False
    ids: list[int] | None = None
    logprobs: list[float] | None = None


@dataclass(slots=True)
class _PendingGroup:
    record: GroupRecord
    place: str
    prompt: str
    responses: list[_Pending] = field(default_factory=list)


class ChunkEncoder:
    """Encodes chunks with one tokenizer; a pure function of the chunk."""

    def __init__(self, tokenizer: Tokenizer, options: EncodingOptions):
        self.tokenizer, self.options = tokenizer, options

    def encode(self, chunk: RawChunk) -> EncodedChunk:
        """Tokens of the groups of a chunk, in order; what is wrong with the others is in ``problems``."""
        log = ProblemLog(self.options.policies)
        pending = []
        for record, place in parse_chunk(chunk, log):
            group = self._prepare(record, place, log)
            if group is not None:
                pending.append(group)
        prompts = self.tokenizer.encode_batch([group.prompt for group in pending])
        self._tokenize_responses(pending)
        encoder, ids, places = GroupEncoder(), [], []
        lineages: list[dict[str, int]] = []
        verifiers: list[str | None] = []
        for group, prompt in zip(pending, prompts, strict=True):
            responses = self._finish(group, prompt, log)
            if responses:
                self._add(encoder, group, prompt, responses)
                ids.append(group.record.id)
                places.append(group.place)
                lineages.append(_count_lineages(responses))
                verifier = group.record.meta.get("verifier")
                verifiers.append(None if verifier is None else json.dumps(verifier, sort_keys=True))
        return EncodedChunk(encoder.take(), ids, places, log.take(), lineages, verifiers, len(chunk))

    # --- before tokenizing ------------------------------------------------------------------------------------------

    def _prepare(self, record: GroupRecord, place: str, log: ProblemLog) -> _PendingGroup | None:
        prompt = self._checked_prompt(record, place, log)
        if prompt is None:
            return None
        try:
            group = _PendingGroup(record, place, self.tokenizer.render_prompt(prompt))
        except ChatTemplateError as error:
            log.found("template_failed", place, record.id, str(error))
            return None
        for response in record.responses:
            pending, action = self._checked_response(response, place, record.id, log)
            if pending is not None:
                group.responses.append(pending)
            elif action != DROP:
                return None
        return group

    def _checked_prompt(self, record: GroupRecord, place: str, log: ProblemLog) -> str | list[dict[str, Any]] | None:
        """The prompt without spelled special tokens, or None when they remove the group."""
        prompt, pattern = record.prompt, self.tokenizer.special_pattern
        spelled = next((match.group() for match in map(pattern.search, _texts(prompt)) if match), None)
        if spelled is None:
            return prompt
        action = log.found("special_tokens", place, record.id, f"the prompt spells {spelled!r}")
        if action == KEEP:
            return prompt
        if action != FIX:
            return None
        fixed = _without(pattern, prompt)
        if not has_text(fixed):
            log.found("empty_prompt", place, record.id, "no text in the prompt without its special tokens")
            return None
        return fixed

    def _checked_response(
        self, response: ResponseRecord, place: str, group_id: str, log: ProblemLog
    ) -> tuple[_Pending | None, str]:
        """What to tokenize, or None and why not."""
        if response.token_ids is not None:
            pending, action = self._from_token_ids(response, place, group_id, log)
            if pending is not None or action != KEEP:
                return pending, action
        elif response.logprobs:
            action = log.found("bad_logprobs", place, group_id, "log-probs without token_ids", response.position)
            if action != FIX:
                return None, action
        pending, position = _Pending(response, response.text), response.position
        match = self.tokenizer.special_pattern.search(response.text)
        if match:
            action = log.found("special_tokens", place, group_id, f"spells {match.group()!r}", position)
            if action in (ERROR, DROP):
                return None, action
            pending.parse_special = action == KEEP
            if action == FIX:
                pending.text = response.text.removesuffix(self.tokenizer.decode([self.tokenizer.eos_id]))
        if not pending.text:
            return None, log.found("empty_response", place, group_id, "no text", position)
        return pending, KEEP

    def _from_token_ids(
        self, response: ResponseRecord, place: str, group_id: str, log: ProblemLog
    ) -> tuple[_Pending | None, str]:
        """Ids as given; or None and ``keep`` (tokenize the text instead), ``drop`` or ``error``."""
        ids, tokenizer, position = response.token_ids or [], self.tokenizer, response.position
        if response.tokenizer != tokenizer.fingerprint:
            known = "an unknown one" if response.tokenizer is None else response.tokenizer[:12]
            return None, log.found("foreign_token_ids", place, group_id, f"tokenizer is {known}", position)
        body = ids[:-1] if ids and ids[-1] == tokenizer.eos_id else ids
        wrong = self._unusable(body) if ids else "no token ids"
        if wrong is not None:
            action = log.found("bad_token_ids", place, group_id, wrong, position)
            return None, KEEP if action == FIX else action
        if not tokenizer.special_ids.isdisjoint(body):
            special = next(i for i in body if i in tokenizer.special_ids)
            detail = f"token_ids hold {tokenizer.decode([special])!r} ({special})"
            action = log.found("special_tokens", place, group_id, detail, position)
            if action != KEEP:
                return None, KEEP if action == FIX else action
        logprobs = response.logprobs
        if logprobs is not None and not _are_logprobs(logprobs, len(ids)):
            detail = f"{len(logprobs)} log-probs for {len(ids)} token ids"
            action = log.found("bad_logprobs", place, group_id, detail, position)
            if action != FIX:
                return None, action
            logprobs = None
        return _Pending(response, ids=list(ids), logprobs=logprobs), KEEP

    def _unusable(self, body: list[int]) -> str | None:
        """What is wrong with the ids of a response before its end, if anything."""
        tokenizer = self.tokenizer
        ends = {tokenizer.eos_id, tokenizer.bos_id}
        if not body or (min(body) >= 0 and max(body) < tokenizer.vocab_size and ends.isdisjoint(body)):
            return None
        wrong = next(i for i in body if not 0 <= i < tokenizer.vocab_size or i in ends)
        return f"token id {wrong}"

    # --- after tokenizing -------------------------------------------------------------------------------------------

    def _tokenize_responses(self, groups: list[_PendingGroup]) -> None:
        waiting = [response for group in groups for response in group.responses if response.ids is None]
        for parse_special in (False, True):
            batch = [response for response in waiting if response.parse_special == parse_special]
            if not batch:
                continue
            encoded = self.tokenizer.encode_responses([response.text for response in batch], parse_special)
            for response, ids in zip(batch, encoded, strict=True):
                response.ids = ids

    def _finish(self, group: _PendingGroup, prompt: list[int], log: ProblemLog) -> list[_Pending]:
        """The responses with EOS and within the limits; none when the group is lost."""
        limit = self.options.max_prompt_tokens
        if not prompt:
            log.found("empty_prompt", group.place, group.record.id, "the rendered prompt has no tokens")
            return []
        if limit is not None and len(prompt) > limit:
            log.found("long_prompt", group.place, group.record.id, f"{len(prompt)} tokens, the limit is {limit}")
            return []
        kept = []
        for response in group.responses:
            action = self._end(response, group, log)
            if action == ERROR:
                return []
            if action != DROP:
                kept.append(response)
        if not kept:
            log.found("no_responses", group.place, group.record.id, "every response was dropped")
            return []
        group.record.responses = [response.record for response in kept]
        checked = check_group(group.record, group.place, log)
        if checked is None or len(checked.responses) == len(kept):
            return [] if checked is None else kept
        positions = {record.position for record in checked.responses}
        return [response for response in kept if response.record.position in positions]

    def _end(self, response: _Pending, group: _PendingGroup, log: ProblemLog) -> str:
        ids, eos = response.ids or [], self.tokenizer.eos_id
        if response.record.finish_reason != "length" and (not ids or ids[-1] != eos):
            ids.append(eos)
        if not ids:  # a cut-off response whose text the tokenizer maps to nothing
            return log.found("empty_response", group.place, group.record.id, "no tokens", response.record.position)
        response.ids, limit = ids, self.options.max_response_tokens
        if limit is None or len(ids) <= limit:
            return KEEP
        detail = f"{len(ids)} tokens, the limit is {limit}"
        action = log.found("long_response", group.place, group.record.id, detail, response.record.position)
        if action == FIX:
            response.ids = ids[:limit]
            response.logprobs = response.logprobs and response.logprobs[:limit]
        return action

    @staticmethod
    def _add(encoder: GroupEncoder, group: _PendingGroup, prompt: list[int], responses: list[_Pending]) -> None:
        records = [response.record for response in responses]
        encoder.add(
            prompt,
            [response.ids or [] for response in responses],
            [SOURCE_CODES[record.source] for record in records],
            [record.reward for record in records],
            group_id=group.record.id,
            answer=group.record.answer,
            outcomes=[record.outcome for record in records],
            models=[record.model for record in records],
            logprobs=[response.logprobs for response in responses],
        )


def _texts(value: Any) -> Iterator[str]:
    """Every text in a prompt, names of fields included: a chat template may print any of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _without(pattern: re.Pattern[str], value: Any) -> Any:
    """A prompt without what ``pattern`` matches in its texts, nor what comes to match when the text around it joins."""
    if isinstance(value, str):
        while pattern.search(value):
            value = pattern.sub("", value)
        return value
    if isinstance(value, dict):
        return {_without(pattern, name): _without(pattern, item) for name, item in value.items()}
    return [_without(pattern, item) for item in value] if isinstance(value, list) else value


def _are_logprobs(values: list[float], count: int) -> bool:
    try:
        return len(values) == count and all(math.isfinite(v) and v <= LOGPROB_SLACK for v in values)
    except OverflowError:  # an integer beyond float
        return False


def _count_lineages(responses: list[_Pending]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for response in responses:
        lineage = _lineage(response.record)
        counts[lineage] = counts.get(lineage, 0) + 1
    return counts


def _lineage(record: ResponseRecord) -> str:
    """Source, model and sampling parameters but the seed, which differs from response to response."""
    if record.sampling is None:
        return _lineage_text(record.source, record.model)
    sampling = {name: value for name, value in record.sampling.items() if name != "seed"}
    return _lineage_text(record.source, record.model, json.dumps(sampling, sort_keys=True))


@functools.lru_cache(maxsize=1024)  # one object for all that are equal: it is pickled once a chunk
def _lineage_text(source: str, model: str | None, sampling: str = "{}") -> str:
    return f'{{"model": {json.dumps(model)}, "sampling": {sampling}, "source": {json.dumps(source)}}}'


def id_digest(group_id: str) -> bytes:
    """16 bytes that stand for an id where millions of ids are remembered."""
    return hashlib.blake2b(group_id.encode("utf-8"), digest_size=16).digest()
