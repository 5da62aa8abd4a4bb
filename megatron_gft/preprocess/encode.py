"""From rows of a group file to tokens: parse, check, render, tokenize. Runs in worker processes.

All texts of a chunk are tokenized in two calls (prompts, responses). A prompt is tokenized once for its group;
``token_ids`` made by the same tokenizer are taken as they are, if they spell the text. EOS follows a response unless it
was cut off. What generation recorded of a prompt's rendering (``rendering`` of a response) is followed, or a finding.
"""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_gft.chat_template import KWARGS, TOOLS, ChatTemplateError, Prompt, TemplateOptions, lost_text
from megatron_gft.groups import RawChunk, parse_chunk
from megatron_gft.groups.problems import DROP, ERROR, FIX, KEEP, Found, Problem, ProblemLog, raise_errors
from megatron_gft.groups.records import (
    GroupRecord,
    ResponseRecord,
    check_group,
    has_text,
    keep_responses,
    prompt_tokens,
    recorded_rendering,
)
from megatron_gft.scoring.thoughts import opened_by, unfit_thoughts, without_opening
from megatron_gft.shards.encoded import EncodedGroups
from megatron_gft.tokenizer import Tokenizer

LOGPROB_SLACK = 1e-3  # servers round: a log-prob may come out slightly above 0


@dataclass(frozen=True, slots=True)
class GroupOrigin:
    """Where an encoded group comes from."""

    id: str
    place: str
    lineage: dict[str, int]  # JSON of (source, model, sampling) -> responses
    verifier: str | None  # JSON of meta["verifier"]


@dataclass
class EncodedChunk:
    """One chunk of rows as tokens, and everything that is to be known about it."""

    groups: EncodedGroups
    origins: list[GroupOrigin]  # of each group
    problems: list[Problem]
    rows: int


# Texts of responses that are still to be tokenized: those in which special tokens are parsed, and those in which not.
_Waiting = dict[bool, list[tuple[ResponseRecord, str]]]


class ChunkEncoder:
    """Encodes chunks with one tokenizer; a pure function of the chunk.

    Args:
        max_prompt_tokens: longest prompt, template included; None = any.
        max_response_tokens: longest response, EOS included; None = any.
        template_kwargs: of every prompt; without any, those that its responses were sampled with.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        policies: Mapping[str, str],
        max_prompt_tokens: int | None = None,
        max_response_tokens: int | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ):
        self.tokenizer, self._policies = tokenizer, policies
        self._max_prompt_tokens, self._max_response_tokens = max_prompt_tokens, max_response_tokens
        self._template_kwargs = template_kwargs or {}

    def encode(self, chunk: RawChunk) -> EncodedChunk:
        """Tokens of the groups of a chunk, in order; what is wrong with the others is in ``problems``."""
        problems = ProblemLog(self._policies)
        waiting: _Waiting = {False: [], True: []}
        pending: list[tuple[GroupRecord, str, Found]] = []
        rendered: list[str] = []
        for record, place in parse_chunk(chunk, problems):
            found = problems.of_group(place, record.id)
            text = self._prepare(record, found, waiting)
            if text is not None:
                pending.append((record, place, found))
                rendered.append(text)
        prompts = self.tokenizer.encode_batch(rendered)
        for parse_special, responses in waiting.items():
            encoded = self.tokenizer.encode_responses([text for _, text in responses], parse_special)
            for (response, _), ids in zip(responses, encoded, strict=True):
                response.token_ids = ids
        groups, origins = list[tuple[list[int], GroupRecord]](), list[GroupOrigin]()
        for (record, place, found), prompt in zip(pending, prompts, strict=True):
            if self._finish(record, prompt, found):
                groups.append((prompt, record))
                verifier = record.meta.get("verifier")
                judged_by = None if verifier is None else json.dumps(verifier, sort_keys=True)
                origins.append(GroupOrigin(record.id, place, Counter(map(_lineage, record.responses)), judged_by))
        return EncodedChunk(EncodedGroups.of_groups(groups), origins, problems.take(), len(chunk))

    # --- before tokenizing ------------------------------------------------------------------------------------------

    def _prepare(self, record: GroupRecord, found: Found, waiting: _Waiting) -> str | None:
        """The rendered prompt of a group whose responses are ``waiting`` or have ids; None when the group is lost."""
        try:
            options = self._options(record)
            prompt, given = self._checked_prompt(record, options, found)
            if prompt is None:
                return None
            rendered = self.tokenizer.render_prompt(prompt, given)
        except ChatTemplateError as error:
            found("template_failed", str(error))
            return None
        if (lost := lost_text(prompt, rendered)) and found("lost_prompt", lost) != KEEP:
            return None

        def check(response: ResponseRecord) -> str:
            actions = [
                self._check_rendering(response, options, rendered, found),
                self._check_thoughts(response, rendered, found),
            ]
            dropped = next((action for action in (ERROR, DROP) if action in actions), None)
            return dropped or self._check_response(response, found, waiting)

        return rendered if keep_responses(record, check, found) else None

    def _options(self, record: GroupRecord) -> TemplateOptions:
        """What the template gets: of the row, and of the run or else what the responses were sampled with."""
        own_first = sorted(record.responses, key=lambda response: response.source != "self")
        recorded = next(filter(None, map(self._recorded_kwargs, own_first)), {})
        return TemplateOptions.of_row(record.meta, self._template_kwargs or recorded)

    def _recorded_kwargs(self, response: ResponseRecord) -> dict[str, Any]:
        """Template kwargs that a response was sampled with, as far as this template knows them."""
        kwargs, template = recorded_rendering(response).get(KWARGS), self.tokenizer.template
        if template is None or not isinstance(kwargs, dict):
            return {}
        return {name: value for name, value in kwargs.items() if template.reads(name)}

    def _check_rendering(self, response: ResponseRecord, options: TemplateOptions, rendered: str, found: Found) -> str:
        """Whether the response was sampled after the prompt as it is rendered here, as far as that is recorded."""
        recorded, here = recorded_rendering(response), options.record()
        if not recorded:
            return KEEP
        own = {"tokenizer": self.tokenizer.fingerprint, "chat_template": self.tokenizer.chat_template_fingerprint}
        foreign = _changes({name: recorded[name] for name in own if recorded.get(name)}, own)
        sampled = {KWARGS: self._recorded_kwargs(response), TOOLS: recorded.get(TOOLS)}
        other = _changes(sampled, {KWARGS: dict(options.kwargs), TOOLS: here.get(TOOLS)})
        if response.source == "self":
            other += foreign
            if given := recorded.get("prompt_tokens"):
                ids = prompt_tokens(self.tokenizer.encode(rendered))
                other += [f"the server's prompt was tokens {given}, here it is {ids}"] if given != ids else []
            elif not other and "chat_template" not in recorded:
                why = "no prompt_token_ids -> sample with token_ids=true from vLLM, or api=completions"
                return found("unverified_rendering", why, response.position)
        elif foreign and (action := found("foreign_rendering", "; ".join(foreign), response.position)) != KEEP:
            return action
        return found("other_rendering", "; ".join(other), response.position) if other else KEEP

    def _check_thoughts(self, response: ResponseRecord, rendered: str, found: Found) -> str:
        """Thoughts that the prompt opens are closed by the response, not opened again."""
        kind, tags = unfit_thoughts(rendered, response.text, response.finish_reason == "length"), opened_by(rendered)
        if kind is None or tags is None:
            return KEEP
        said = {"thoughts_twice": f"begins with {tags[0]!r}", "thoughts_open": f"has no {tags[1]!r}"}[kind]
        remedy = "--template-kwargs that open no thoughts, or --chat-template FILE of a template that opens none"
        detail = f"the prompt ends with {tags[0]!r}, the response {said} -> {remedy}"
        action = found(kind, detail, response.position)
        if action == FIX:
            response.text = without_opening(rendered, response.text)
            response.token_ids = response.logprobs = None
        return action

    def _checked_prompt(
        self, record: GroupRecord, options: TemplateOptions, found: Found
    ) -> tuple[Prompt | None, TemplateOptions]:
        """Prompt and options without spelled special tokens; None when they remove the group."""
        pattern, given = self.tokenizer.special_pattern, [record.prompt, options.tools, dict(options.kwargs)]
        spelled = next((match.group() for match in map(pattern.search, _texts(given)) if match), None)
        action = KEEP if spelled is None else found("special_tokens", f"the prompt spells {spelled!r}")
        if action != FIX:
            return record.prompt if action == KEEP else None, options
        fixed, tools, kwargs = _without(pattern, given)
        if not has_text(fixed):
            found("empty_prompt", "no text in the prompt without its special tokens")
            return None, options
        return fixed, TemplateOptions(tools, kwargs)

    def _check_response(self, response: ResponseRecord, found: Found, waiting: _Waiting) -> str:
        """``keep`` when its ids are known or its text is ``waiting``, else ``drop`` or ``error``."""
        if response.token_ids is not None:
            action = self._check_token_ids(response, response.token_ids, found)
            if response.token_ids is not None or action != KEEP:
                return action
        elif response.logprobs:
            action = found("bad_logprobs", "log-probs without token_ids", response.position)
            if action != FIX:
                return action
        response.logprobs, text, parse_special = None, response.text, False
        match = self.tokenizer.special_pattern.search(text)
        if match:
            action = found("special_tokens", f"spells {match.group()!r}", response.position)
            if action in (ERROR, DROP):
                return action
            parse_special = action == KEEP
            if action == FIX:
                text = text.removesuffix(self.tokenizer.decode([self.tokenizer.eos_id]))
        if not text:
            return found("empty_response", "no text", response.position)
        waiting[parse_special].append((response, text))
        return KEEP

    def _check_token_ids(self, response: ResponseRecord, ids: list[int], found: Found) -> str:
        """``keep`` (without ids when the text is to be tokenized instead), ``drop`` or ``error``."""
        for kind, detail in self._problems_of_ids(ids, response):
            action = found(kind, detail, response.position)
            if not (kind == "special_tokens" and action == KEEP):
                response.token_ids = None
                return KEEP if action == FIX else action
        if response.logprobs is not None and not _are_logprobs(response.logprobs, len(ids)):
            detail = f"{len(response.logprobs)} log-probs for {len(ids)} token ids"
            action = found("bad_logprobs", detail, response.position)
            if action != FIX:
                return action
            response.logprobs = None
        return KEEP

    def _problems_of_ids(self, ids: list[int], response: ResponseRecord) -> Iterator[tuple[str, str]]:
        """Kind and detail of what keeps the ids of a response from being taken as they are; the first tells all but
        special tokens, which may be kept."""
        tokenizer, made_by = self.tokenizer, response.tokenizer
        if made_by != tokenizer.fingerprint:
            yield "foreign_token_ids", f"tokenizer is {'an unknown one' if made_by is None else made_by[:12]}"
        elif not ids:
            yield "bad_token_ids", "no token ids"
        else:
            body = ids[:-1] if ids[-1] == tokenizer.eos_id else ids
            ends = {tokenizer.eos_id, tokenizer.bos_id}
            if wrong := [i for i in body if not 0 <= i < tokenizer.vocab_size or i in ends]:
                yield "bad_token_ids", f"token id {wrong[0]}"
                return
            if special := [i for i in body if i in tokenizer.special_ids]:
                yield "special_tokens", f"token_ids hold {tokenizer.decode(special[:1])!r} ({special[0]})"
            if (spelled := tokenizer.written(body)) != response.text:
                yield "mismatched_token_ids", f"token_ids spell {spelled[-40:]!r}, the text is {response.text[-40:]!r}"

    # --- after tokenizing -------------------------------------------------------------------------------------------

    def _finish(self, record: GroupRecord, prompt: list[int], found: Found) -> bool:
        """Give the responses EOS and hold them to the limits; whether the group stays."""
        limit = self._max_prompt_tokens
        if not prompt:
            found("empty_prompt", "the rendered prompt has no tokens")
            return False
        if limit is not None and len(prompt) > limit:
            found("long_prompt", f"{len(prompt)} tokens, the limit is {limit}")
            return False
        return keep_responses(record, lambda response: self._end(response, found), found) and check_group(record, found)

    def _end(self, response: ResponseRecord, found: Found) -> str:
        ids, eos, limit = response.token_ids or [], self.tokenizer.eos_id, self._max_response_tokens
        if response.finish_reason != "length" and (not ids or ids[-1] != eos):
            ids.append(eos)
        if not ids:  # a cut-off response whose text the tokenizer maps to nothing
            return found("empty_response", "no tokens", response.position)
        response.token_ids = ids
        if limit is None or len(ids) <= limit:
            return KEEP
        action = found("long_response", f"{len(ids)} tokens, the limit is {limit}", response.position)
        if action == FIX:
            response.token_ids = ids[:limit]
            response.logprobs = response.logprobs and response.logprobs[:limit]
        return action


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [f"{name} was {str(old[name])[:60]}, is {str(new[name])[:60]}" for name in old if old[name] != new[name]]


def tokenizer_problems(tokenizer: Tokenizer, place: str, policies: Mapping[str, str]) -> list[Problem]:
    """Findings about the tokenizer and its template as such, which come from ``place``; raises as the policies say."""
    log = ProblemLog(policies)
    for kind, detail in tokenizer.problems():
        log.found(place, None, kind, detail)
    raise_errors(log.problems)
    return log.take()


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
    sampling = {name: value for name, value in (record.sampling or {}).items() if name != "seed"}
    return _lineage_text(record.source, record.model, json.dumps(sampling, sort_keys=True))


@functools.lru_cache(maxsize=1024)  # one object for all that are equal: it is pickled once a chunk
def _lineage_text(source: str, model: str | None, sampling: str) -> str:
    return f'{{"model": {json.dumps(model)}, "sampling": {sampling}, "source": {json.dumps(source)}}}'
