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
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_gft.groups import RawChunk, parse_chunk
from megatron_gft.groups.problems import DROP, ERROR, FIX, KEEP, GroupProblems, Problem, ProblemLog
from megatron_gft.groups.records import GroupRecord, ResponseRecord, check_group, has_text, keep_responses
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
    log: GroupProblems
    prompt: str
    responses: list[_Pending] = field(default_factory=list)


class ChunkEncoder:
    """Encodes chunks with one tokenizer; a pure function of the chunk."""

    def __init__(self, tokenizer: Tokenizer, options: EncodingOptions):
        self.tokenizer, self.options = tokenizer, options

    def encode(self, chunk: RawChunk) -> EncodedChunk:
        """Tokens of the groups of a chunk, in order; what is wrong with the others is in ``problems``."""
        log = ProblemLog(self.options.policies)
        prepared = (self._prepare(record, log.of_group(place, record.id)) for record, place in parse_chunk(chunk, log))
        pending = [group for group in prepared if group is not None]
        prompts = self.tokenizer.encode_batch([group.prompt for group in pending])
        self._tokenize_responses(pending)
        encoder, ids, places = GroupEncoder(), [], []
        lineages: list[dict[str, int]] = []
        verifiers: list[str | None] = []
        for group, prompt in zip(pending, prompts, strict=True):
            responses = self._finish(group, prompt)
            if responses:
                self._add(encoder, group, prompt, responses)
                ids.append(group.record.id)
                places.append(group.log.place)
                lineages.append(Counter(_lineage(response.record) for response in responses))
                verifier = group.record.meta.get("verifier")
                verifiers.append(None if verifier is None else json.dumps(verifier, sort_keys=True))
        return EncodedChunk(encoder.take(), ids, places, log.take(), lineages, verifiers, len(chunk))

    # --- before tokenizing ------------------------------------------------------------------------------------------

    def _prepare(self, record: GroupRecord, log: GroupProblems) -> _PendingGroup | None:
        prompt = self._checked_prompt(record, log)
        if prompt is None:
            return None
        try:
            group = _PendingGroup(record, log, self.tokenizer.render_prompt(prompt))
        except ChatTemplateError as error:
            log.found("template_failed", str(error))
            return None
        for response in record.responses:
            pending, action = self._checked_response(response, log)
            if pending is not None:
                group.responses.append(pending)
            elif action != DROP:
                return None
        return group

    def _checked_prompt(self, record: GroupRecord, log: GroupProblems) -> str | list[dict[str, Any]] | None:
        """The prompt without spelled special tokens, or None when they remove the group."""
        prompt, pattern = record.prompt, self.tokenizer.special_pattern
        spelled = next((match.group() for match in map(pattern.search, _texts(prompt)) if match), None)
        action = KEEP if spelled is None else log.found("special_tokens", f"the prompt spells {spelled!r}")
        if action != FIX:
            return prompt if action == KEEP else None
        fixed = _without(pattern, prompt)
        if not has_text(fixed):
            log.found("empty_prompt", "no text in the prompt without its special tokens")
            return None
        return fixed

    def _checked_response(self, response: ResponseRecord, log: GroupProblems) -> tuple[_Pending | None, str]:
        """What to tokenize, or None and why not."""
        position = response.position
        if response.token_ids is not None:
            pending, action = self._from_token_ids(response, response.token_ids, log)
            if pending is not None or action != KEEP:
                return pending, action
        elif response.logprobs:
            action = log.found("bad_logprobs", "log-probs without token_ids", position)
            if action != FIX:
                return None, action
        pending = _Pending(response, response.text)
        match = self.tokenizer.special_pattern.search(response.text)
        if match:
            action = log.found("special_tokens", f"spells {match.group()!r}", position)
            if action in (ERROR, DROP):
                return None, action
            pending.parse_special = action == KEEP
            if action == FIX:
                pending.text = response.text.removesuffix(self.tokenizer.decode([self.tokenizer.eos_id]))
        if not pending.text:
            return None, log.found("empty_response", "no text", position)
        return pending, KEEP

    def _from_token_ids(
        self, response: ResponseRecord, ids: list[int], log: GroupProblems
    ) -> tuple[_Pending | None, str]:
        """Ids as given; or None and ``keep`` (tokenize the text instead), ``drop`` or ``error``."""
        found = self._problem_of_ids(ids, response.tokenizer)
        if found is not None:
            kind, detail = found
            action = log.found(kind, detail, response.position)
            if kind == "foreign_token_ids":
                return None, action
            if not (kind == "special_tokens" and action == KEEP):
                return None, KEEP if action == FIX else action
        logprobs = response.logprobs
        if logprobs is not None and not _are_logprobs(logprobs, len(ids)):
            detail = f"{len(logprobs)} log-probs for {len(ids)} token ids"
            action = log.found("bad_logprobs", detail, response.position)
            if action != FIX:
                return None, action
            logprobs = None
        return _Pending(response, ids=list(ids), logprobs=logprobs), KEEP

    def _problem_of_ids(self, ids: list[int], made_by: str | None) -> tuple[str, str] | None:
        """Kind and detail of what keeps the ids of a response from being taken as they are, if anything."""
        tokenizer = self.tokenizer
        if made_by != tokenizer.fingerprint:
            return "foreign_token_ids", f"tokenizer is {'an unknown one' if made_by is None else made_by[:12]}"
        if not ids:
            return "bad_token_ids", "no token ids"
        body = ids[:-1] if ids[-1] == tokenizer.eos_id else ids
        ends = {tokenizer.eos_id, tokenizer.bos_id}
        if body and (min(body) < 0 or max(body) >= tokenizer.vocab_size or not ends.isdisjoint(body)):
            wrong = next(i for i in body if not 0 <= i < tokenizer.vocab_size or i in ends)
            return "bad_token_ids", f"token id {wrong}"
        if not tokenizer.special_ids.isdisjoint(body):
            special = next(i for i in body if i in tokenizer.special_ids)
            return "special_tokens", f"token_ids hold {tokenizer.decode([special])!r} ({special})"
        return None

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

    def _finish(self, group: _PendingGroup, prompt: list[int]) -> list[_Pending]:
        """The responses with EOS and within the limits; none when the group is lost."""
        limit, log = self.options.max_prompt_tokens, group.log
        if not prompt:
            log.found("empty_prompt", "the rendered prompt has no tokens")
            return []
        if limit is not None and len(prompt) > limit:
            log.found("long_prompt", f"{len(prompt)} tokens, the limit is {limit}")
            return []
        kept = {}
        for response in group.responses:
            action = self._end(response, log)
            if action == ERROR:
                return []
            if action != DROP:
                kept[response.record.position] = response
        record = keep_responses(group.record, [response.record for response in kept.values()], log)
        checked = None if record is None else check_group(record, log)
        return [] if checked is None else [kept[response.position] for response in checked.responses]

    def _end(self, response: _Pending, log: GroupProblems) -> str:
        ids, eos = response.ids or [], self.tokenizer.eos_id
        if response.record.finish_reason != "length" and (not ids or ids[-1] != eos):
            ids.append(eos)
        if not ids:  # a cut-off response whose text the tokenizer maps to nothing
            return log.found("empty_response", "no tokens", response.record.position)
        response.ids, limit = ids, self.options.max_response_tokens
        if limit is None or len(ids) <= limit:
            return KEEP
        action = log.found("long_response", f"{len(ids)} tokens, the limit is {limit}", response.record.position)
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
            [record.source for record in records],
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
