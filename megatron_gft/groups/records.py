"""Group records: the text side of the data, checked field by field.

Format in :mod:`megatron_gft.groups`. A row becomes a :class:`GroupRecord` or a finding in a
:class:`~megatron_gft.groups.problems.ProblemLog`; nothing else comes out of here, whatever the row holds.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json

from megatron_gft.groups.problems import DROP, ERROR, FIX, KEEP, ProblemLog, raise_errors

SOURCES = ("expert", "teacher", "self")
SOURCE_CODES = {name: code for code, name in enumerate(SOURCES)}
FINISH_REASONS = ("stop", "length")
FLOAT32_MAX = 3.4028234663852886e38
MAX_DEPTH = 100  # of lists and objects in each other; parsers and writers of JSON end at 200 and more, each elsewhere

# Field -> type of its JSON value, and that type in words. null stands for "absent".
_GROUP_TYPES: dict[str, tuple[Any, str]] = {
    "id": ((str, int), "text"),
    "prompt": ((str, list), "text or a list of messages"),
    "answer": ((str, int, float), "text"),
    "responses": (list, "a list"),
    "meta": (dict, "an object"),
}
_RESPONSE_TYPES: dict[str, tuple[Any, str]] = {
    "text": (str, "text"),
    "source": (str, "text"),
    "reward": ((int, float), "a number or null"),
    "outcome": (str, "text"),
    "finish_reason": (str, "text"),
    "model": (str, "text"),
    "tokenizer": (str, "text"),
    "token_ids": (list, "a list of numbers"),
    "logprobs": (list, "a list of numbers"),
    "sampling": (dict, "an object"),
}
GROUP_FIELDS, RESPONSE_FIELDS = tuple(_GROUP_TYPES), tuple(_RESPONSE_TYPES)
_PLAIN_FIELDS = (("question", "answer"), ("problem", "solution"))
_SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(slots=True)
class ResponseRecord:
    """One response as text, with what is known about how it came to be."""

    text: str
    source: str
    reward: float | None = None
    outcome: str | None = None
    finish_reason: str | None = None  # None reads as "stop"
    model: str | None = None
    tokenizer: str | None = None  # fingerprint of the tokenizer of token_ids
    token_ids: list[int] | None = None  # without prompt; EOS may be the last one
    logprobs: list[float] | None = None  # one per token_id, of the sampling model at temperature 1
    sampling: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    position: int = field(default=0, compare=False, repr=False)  # in the row that it was read from


@dataclass(slots=True)
class GroupRecord:
    """One prompt with its responses."""

    id: str
    prompt: str | list[dict[str, Any]]
    responses: list[ResponseRecord]
    answer: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def record_from_json(text: str | bytes, place: str = "<text>") -> GroupRecord:
    """Parse one line of a group file.

    Raises:
        InputErrors: it is not a group; ``place`` is named.
    """
    problems = ProblemLog()
    line = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    value = parse_json_line(line, place, problems)
    record = None if value is None else parse_group(value, place, problems)
    raise_errors(problems.take())
    if record is None:  # every way to lose a record is an error under the default policies
        raise AssertionError(f"{place}: lost without a problem")
    return record


def record_to_dict(record: GroupRecord) -> dict[str, Any]:
    """JSON value of a group; optional fields that are None are left out, ``reward`` and ``answer`` stay."""
    responses = []
    for response in record.responses:
        value: dict[str, Any] = {"text": response.text, "source": response.source, "reward": response.reward}
        for name in RESPONSE_FIELDS[3:]:
            if (item := getattr(response, name)) is not None:
                value[name] = item
        responses.append(value | response.extra)
    value = {"id": record.id, "prompt": record.prompt, "answer": record.answer, "responses": responses}
    return value | ({"meta": record.meta} if record.meta else {})


def record_to_json(record: GroupRecord) -> str:
    """One line of a group file, without the newline."""
    return json.dumps(record_to_dict(record), ensure_ascii=False)


# --- from one row to one group -----------------------------------------------------------------------------------


def parse_json_line(line: bytes, place: str, problems: ProblemLog) -> Any:
    """The object of a line, or None when a problem removes it."""
    try:
        value = from_json(line)  # twice as fast as json, and refuses all that needs a closer look
    except ValueError:
        return _parse_doubtful_line(line, place, problems)
    return _object(value, place, problems)


def _object(value: Any, place: str, problems: ProblemLog) -> dict[str, Any] | None:
    if isinstance(value, dict):
        return value
    problems.found("invalid_json", place, None, f"a JSON {type(value).__name__}, not an object")
    return None


def _parse_doubtful_line(line: bytes, place: str, problems: ProblemLog) -> Any:
    """Name what is wrong with a line, mend what the policies say, and take what only Python's parser takes."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        if problems.found("invalid_utf8", place, None, f"{error.reason} at byte {error.start}") != FIX:
            return None
        text = line.decode("utf-8", "replace")
    try:
        checked = _object(json.loads(text), place, problems)
        return None if checked is None else without_surrogates(checked, text, place, problems)
    except (ValueError, RecursionError) as error:
        problems.found("invalid_json", place, None, str(error) or type(error).__name__)
        return None


def without_surrogates(value: Any, text: str, place: str, problems: ProblemLog) -> Any:
    """The value of JSON ``text`` without halves of surrogate pairs, which JSON may spell and no UTF-8 text can hold.

    Returns:
        The value, mended where the policy says so; None when the problem removes the row.
    """
    if not _SURROGATE_ESCAPE.search(text):
        return value
    plain = json.dumps(value, ensure_ascii=False)
    half = _SURROGATE.search(plain)
    if half is None:
        return value
    if problems.found("invalid_utf8", place, None, f"lone surrogate {half.group()!a}") != FIX:
        return None
    return json.loads(_SURROGATE.sub("\ufffd", plain))


def parse_group(value: dict[str, Any], place: str, problems: ProblemLog) -> GroupRecord | None:
    """Check one row and make it a group; None when a problem removes it (it is in ``problems`` then)."""
    if "responses" not in value:
        for names in _PLAIN_FIELDS:
            if all(name in value for name in names):
                return _plain_group(value, *names, place, problems)
    group_id = _group_id(value, place, problems)
    if group_id is None:
        return None
    try:
        extra = _check_fields(value, _GROUP_TYPES, ("prompt", "responses"))
        prompt, responses, answer = _prompt(value), value["responses"], value.get("answer")
        _refuse_deep("meta", value.get("meta"))
    except _BadField as bad:
        problems.found(bad.kind, place, group_id, bad.detail)
        return None
    meta = (value.get("meta") or {}) | extra
    record = GroupRecord(group_id, prompt, [], None if answer is None else str(answer), meta)
    if not has_text(prompt):
        problems.found("empty_prompt", place, group_id, "no text in the prompt")
        return None
    if not responses:
        problems.found("no_responses", place, group_id, "responses is an empty list")
        return None
    for position, item in enumerate(responses):
        response, action = _response(item, position, place, group_id, problems)
        if response is not None:
            action = _check_response(response, place, group_id, problems)
        if action == ERROR:
            return None
        if response is not None and action != DROP:
            record.responses.append(response)
    if not record.responses:
        problems.found("no_responses", place, group_id, "every response was dropped")
        return None
    return record


def check_group(record: GroupRecord, place: str, problems: ProblemLog) -> GroupRecord | None:
    """Look at the responses side by side: duplicates, expert, rewards. Changes ``record`` as the policies say.

    Call it once, when all that one response alone can be dropped for is done: what it says is of the survivors.

    Returns:
        The group, or None when a problem removes it.
    """
    kept: list[ResponseRecord] = []
    seen: set[Any] = set()
    for response in record.responses:
        content = response.text or tuple(response.token_ids or ())
        if content in seen:
            detail = f"same {'text' if response.text else 'token_ids'} as an earlier one"
            action = problems.found("duplicate_response", place, record.id, detail, response.position)
            if action == ERROR:
                return None
            if action == DROP:
                continue
        seen.add(content)
        kept.append(response)
    record.responses = kept
    if not kept:
        problems.found("no_responses", place, record.id, "every response was dropped")
        return None
    if all(response.source != "expert" for response in kept):
        if problems.found("no_expert", place, record.id, "no expert response") in (ERROR, DROP):
            return None
    rewards = [response.reward for response in kept]
    if len(kept) > 1 and None not in rewards and min(rewards) == max(rewards):  # type: ignore[type-var]
        detail = f"all {len(kept)} rewards are {rewards[0]}"
        if problems.found("equal_rewards", place, record.id, detail) in (ERROR, DROP):
            return None
    return record


def _check_response(response: ResponseRecord, place: str, group_id: str, problems: ProblemLog) -> str:
    """``error``, ``drop`` or ``keep`` for one well-formed response."""
    actions = []
    if response.finish_reason == "length":
        actions.append(problems.found("truncated", place, group_id, "finish_reason is length", response.position))
    if response.source == "expert" and _judged_wrong(response):
        detail = f"expert with reward {response.reward}, outcome {response.outcome}"
        actions.append(problems.found("expert_wrong", place, group_id, detail, response.position))
        if actions[-1] == FIX:
            response.reward, response.outcome = 1.0, "correct"
    return ERROR if ERROR in actions else DROP if DROP in actions else KEEP


def _judged_wrong(response: ResponseRecord) -> bool:
    if response.outcome is not None:
        return response.outcome == "wrong"
    return response.reward is not None and response.reward <= 0


class _BadField(Exception):
    """A field that cannot be used; carries the kind of problem."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind, self.detail = kind, detail


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _required(value: dict, name: str, types: type | tuple[type, ...], expected: str) -> Any:
    if value.get(name) is None:
        raise _BadField("missing_field", f"no {name!r}")
    return _optional(value, name, types, expected)


def _optional(value: dict, name: str, types: type | tuple[type, ...], expected: str) -> Any:
    item = value.get(name)
    if item is not None and (not isinstance(item, types) or isinstance(item, bool)):
        raise _BadField("wrong_type", f"{name!r} is {_shown(item)}, expected {expected}")
    return item


@functools.lru_cache(maxsize=1024)
def _near_name(name: str, known: tuple[str, ...]) -> str | None:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return near[0] if near else None


def _check_fields(value: dict, types: dict[str, tuple[Any, str]], required: tuple[str, ...]) -> dict[str, Any]:
    """Refuse missing fields, fields of a wrong type, and names that look like misspelt ones of ours; returns the
    other fields, which are the user's own."""
    for name in required:
        if value.get(name) is None:
            raise _BadField("missing_field", f"no {name!r}")
    extra = {}
    for name, item in value.items():
        known = types.get(name)
        if known is None:
            extra[name] = item
        elif item is not None and (not isinstance(item, known[0]) or isinstance(item, bool)):
            raise _BadField("wrong_type", f"{name!r} is {_shown(item)}, expected {known[1]}")
    for name, item in extra.items():
        _refuse_deep(name, item)
        near = _near_name(name, tuple(types))
        if near is not None and near not in value:
            raise _BadField("wrong_type", f"unknown field {name!r}, did you mean {near!r}?")
    return extra


def _refuse_deep(name: str, value: Any) -> None:
    """Refuse what a writer of JSON further on would stumble over, hours later."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise _BadField("wrong_type", f"{name!r} is nested more than {MAX_DEPTH} deep")


def _group_id(value: dict, place: str, problems: ProblemLog) -> str | None:
    try:
        group_id = str(_required(value, "id", (str, int), "text"))
        if not group_id:
            raise _BadField("missing_field", "'id' is empty")
        return group_id
    except (_BadField, ValueError) as bad:  # ValueError: an integer too long to print
        problems.found(bad.kind if isinstance(bad, _BadField) else "wrong_type", place, None, str(bad))
        return None


def _prompt(value: dict) -> str | list[dict[str, Any]]:
    prompt = _required(value, "prompt", (str, list), "text or a list of messages")
    for message in prompt if isinstance(prompt, list) else ():
        if not isinstance(message, dict):
            raise _BadField("wrong_type", f"message {_shown(message)}, expected an object with role and content")
        _required(message, "role", str, "text")
        _required(message, "content", str, "text")
        if len(message) > 2:
            _refuse_deep("prompt", message)
    return prompt


def has_text(prompt: str | list[dict[str, Any]]) -> bool:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return any(message["content"].strip() for message in prompt)


def _response(
    value: Any, position: int, place: str, group_id: str, problems: ProblemLog
) -> tuple[ResponseRecord | None, str]:
    """One response, or None and what the policy says about it."""
    try:
        if not isinstance(value, dict):
            raise _BadField("wrong_type", f"a response is {_shown(value)}, expected an object")
        extra = _check_fields(value, _RESPONSE_TYPES, ("text", "source"))
        text, source, reward = value["text"], value["source"], value.get("reward")
        finish_reason, token_ids, logprobs = value.get("finish_reason"), value.get("token_ids"), value.get("logprobs")
        if finish_reason is not None and finish_reason not in FINISH_REASONS:
            raise _BadField("wrong_type", f"finish_reason {finish_reason!r}, expected stop or length")
        _refuse_other_than(int, "token_ids", token_ids)
        _refuse_other_than((int, float), "logprobs", logprobs)
        _refuse_deep("sampling", value.get("sampling"))
    except _BadField as bad:
        problems.found(bad.kind, place, group_id, bad.detail, position)
        return None, ERROR  # a broken response breaks its group, whatever the policy: the advantage needs all rewards
    response = ResponseRecord(
        text,
        source,
        outcome=value.get("outcome"),
        finish_reason=finish_reason,
        model=value.get("model"),
        tokenizer=value.get("tokenizer"),
        token_ids=token_ids,
        logprobs=logprobs,
        sampling=value.get("sampling"),
        extra=extra,
        position=position,
    )
    if not text and not token_ids:
        return None, problems.found("empty_response", place, group_id, "no text", position)
    if source not in SOURCE_CODES:
        return None, problems.found("unknown_source", place, group_id, f"{_shown(source)} is no source", position)
    if reward is not None:
        if not _is_float32(reward):
            action = problems.found("nonfinite_reward", place, group_id, f"reward {_shown(reward)}", position)
            if action != FIX:
                return None, action
        else:
            response.reward = float(reward)
    return response, KEEP


def _is_float32(value: float) -> bool:
    return (
        math.isfinite(value) and -FLOAT32_MAX <= value <= FLOAT32_MAX
        if isinstance(value, float)
        else (-(2**127) < value < 2**127)
    )


def _refuse_other_than(types: type | tuple[type, ...], name: str, items: list | None) -> None:
    if items and not all(isinstance(item, types) and not isinstance(item, bool) for item in items):
        raise _BadField("wrong_type", f"{name!r} holds something that is not a number")


def gold_answer(text: str) -> str | None:
    """What follows the last ``####`` of a GSM8K solution, without thousands separators; None without the marker."""
    _, marker, tail = text.rpartition("####")
    return tail.strip().replace(",", "") if marker else None


def _plain_group(value: dict, question: str, answer: str, place: str, problems: ProblemLog) -> GroupRecord | None:
    """A plain row: one expert response, no reward yet; without an id, a hash of the content is one."""
    try:
        prompt = _required(value, question, str, "text")
        text = str(_required(value, answer, (str, int, float), "text"))
        gold = _optional(value, "answer", (str, int, float), "text") if answer != "answer" else gold_answer(text)
        meta = {name: item for name, item in value.items() if name not in (question, answer, "answer", "id")}
        for name, item in meta.items():
            _refuse_deep(name, item)
    except _BadField as bad:
        problems.found(bad.kind, place, None, bad.detail)
        return None
    if value.get("id") in (None, ""):
        group_id: str | None = hashlib.sha256(f"{prompt}\0{text}".encode()).hexdigest()[:16]
    else:
        group_id = _group_id(value, place, problems)
    if group_id is None:
        return None
    if not prompt.strip():
        problems.found("empty_prompt", place, group_id, f"{question!r} has no text")
        return None
    if not text.strip():
        problems.found("empty_response", place, group_id, f"{answer!r} has no text", 0)
        return None
    response = ResponseRecord(text, "expert", finish_reason="stop")
    return GroupRecord(group_id, prompt, [response], None if gold is None else str(gold), meta)
