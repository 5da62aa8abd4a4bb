"""Group records: the text side of the data, checked field by field.

Format in :mod:`megatron_gft.groups`. A row becomes a :class:`GroupRecord` or a finding in a
:class:`~megatron_gft.groups.problems.ProblemLog`; nothing else comes out of here, whatever the row holds.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    with_config,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from megatron_gft.atomic import sha256_json
from megatron_gft.errors import nearest
from megatron_gft.groups.messages import as_prompt, message_text
from megatron_gft.groups.problems import DROP, ERROR, FIX, KEEP, Found, ProblemLog
from megatron_gft.objectives import SOURCE_CODES

FINISH_REASONS = ("stop", "length")
FLOAT32_MAX = 3.4028234663852886e38
MAX_DEPTH = 100  # of lists and objects in each other; parsers and writers of JSON end at 200 and more, each elsewhere

_REQUIRED = ("id", "prompt", "responses", "text", "source")


def _finish_reason(value: str) -> str:
    if value not in FINISH_REASONS:
        raise PydanticCustomError("finish_reason", "Input should be stop or length")
    return value


def _is_deep(value: Any, left: int = MAX_DEPTH) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    return not left or any(_is_deep(item, left - 1) for item in (value.values() if isinstance(value, dict) else value))


def _not_deep(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse what a writer of JSON further on would stumble over, hours later."""
    for name, item in value.items():
        if _is_deep(item):
            raise PydanticCustomError("deep", f"{name!r} is nested more than {MAX_DEPTH} deep")
    return value


def _prompt(value: Any) -> Any:
    """The prompt as it was read, in one form (pydantic's copy would have its fields in another order)."""
    value = as_prompt(value)
    if isinstance(value, list):
        _MESSAGES.validate_python(value)
    elif not isinstance(value, str):
        raise PydanticCustomError("prompt", "Input should be text or a list of messages")
    return value


def _has_content(message: Any) -> Any:
    if message["content"] is None and not message.get("tool_calls"):
        raise PydanticCustomError("content", "a message has content null, and no tool_calls beside it")
    return message


def _own_group(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("prompt") is None and "messages" in value:
        value = {"prompt" if name == "messages" else name: item for name, item in value.items() if name != "prompt"}
    return _own_fields(value, GROUP_FIELDS, "meta")


def _own_response(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PydanticCustomError("response", "Input should be an object with text and source")
    return _own_fields(value, RESPONSE_FIELDS, "extra")


def _own_fields(value: dict[str, Any], own: tuple[str, ...], rest: str) -> dict[str, Any]:
    """Our fields, without null, which stands for "absent"; the others are the user's own and go into field ``rest``,
    unless a name looks like a misspelt one of ours."""
    known = {name: item for name, item in value.items() if item is not None and name in own}
    if len(known) == len(value):
        return known
    others = {name: item for name, item in value.items() if name not in own}
    for name in others:
        near = _near_name(name, own)
        if near is not None and near not in value and near not in _REQUIRED:  # of which it is told that they miss
            raise PydanticCustomError("misspelt", f"unknown field {name!r}, did you mean {near!r}?")
    if others and isinstance(known.setdefault(rest, {}), dict):
        known[rest] = known[rest] | others
    return known


_near_name = functools.lru_cache(maxsize=1024)(functools.partial(nearest, cutoff=0.8))


_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)")
_Number = StrictFloat | StrictInt  # a float alone would refuse integers beyond it, of which others have to be told


def number_text(value: Any) -> Any:
    """Numbers as text; NaN and infinities, which data frames write into empty cells, are ``None``."""
    if type(value) in (int, float):
        return str(value) if math.isfinite(value) else None
    return value


_Answer = Annotated[StrictStr | None, BeforeValidator(number_text)]
_Id = Annotated[StrictStr, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
_Object = Annotated[dict[str, Any], AfterValidator(_not_deep)]


@with_config(extra="allow")
class _Message(TypedDict):
    role: StrictStr
    content: StrictStr | None


_MESSAGES = TypeAdapter(list[Annotated[_Message, AfterValidator(_has_content), AfterValidator(_not_deep)]])


@dataclass(slots=True)
class ResponseRecord:
    """One response as text, with what is known about how it came to be."""

    text: StrictStr
    source: StrictStr
    reward: _Number | None = None
    outcome: StrictStr | None = None
    finish_reason: Annotated[StrictStr, AfterValidator(_finish_reason)] | None = None  # None reads as "stop"
    model: StrictStr | None = None
    tokenizer: StrictStr | None = None  # fingerprint of the tokenizer of token_ids
    token_ids: list[StrictInt] | None = None  # without prompt; EOS may be the last one
    logprobs: list[_Number] | None = None  # one per token_id, of the sampling model at temperature 1
    sampling: _Object | None = None
    extra: _Object = field(default_factory=dict)
    position: int = field(default=0, compare=False, repr=False)  # in the row that it was read from


@dataclass(slots=True)
class GroupRecord:
    """One prompt with its responses."""

    id: Annotated[_Id, Field(min_length=1)]
    prompt: Annotated[str | list[dict[str, Any]], PlainValidator(_prompt)]
    responses: list[Annotated[ResponseRecord, BeforeValidator(_own_response)]]
    answer: _Answer = None
    meta: _Object = field(default_factory=dict)


GROUP_FIELDS = tuple(part.name for part in dataclasses.fields(GroupRecord))
RESPONSE_FIELDS = tuple(
    part.name for part in dataclasses.fields(ResponseRecord) if part.name not in ("extra", "position")
)
_PLAIN_ROWS = (("question", "answer"), ("problem", "solution"))
PROMPT = TypeAdapter(Annotated[str | list[dict[str, Any]], PlainValidator(_prompt)])
_GROUP = TypeAdapter(Annotated[GroupRecord, BeforeValidator(_own_group)])


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


def parse_group(value: dict[str, Any], place: str, problems: ProblemLog) -> GroupRecord | None:
    """Check one row and make it a group; None when a problem removes it (it is in ``problems`` then)."""
    plain = None
    if "responses" not in value:
        plain = next((pair for pair in _PLAIN_ROWS if pair[0] in value and pair[1] in value), None)
    try:
        record = _GROUP.validate_python(_of_plain_row(value, *plain) if plain else value)
    except ValidationError as error:
        kind, detail, position = _finding(error)
        if plain:
            detail = detail.replace("'prompt'", repr(plain[0])).replace("'text'", repr(plain[1]))
        group_id = str(value["id"]) if type(value.get("id")) in (str, int) else None
        problems.found(place, group_id or None, kind, detail, position)
        return None
    found = problems.of_group(place, record.id)
    if not has_text(record.prompt):
        found("empty_prompt", "no text in the prompt")
        return None
    if not record.responses:
        found("no_responses", "responses is an empty list")
        return None
    for position, response in enumerate(record.responses):
        response.position = position

    def check(response: ResponseRecord) -> str:
        action = _check_response(response, found)
        return ERROR if action == DROP and plain else action  # a plain row is lost with its only response

    return record if keep_responses(record, check, found) else None


def _of_plain_row(row: dict[str, Any], question: str, solution: str) -> dict[str, Any]:
    """A plain row as a group: one expert response, no reward yet; without an id, a hash of the content is one."""
    prompt, text = row[question], number_text(row[solution])
    gold = row.get("answer") if solution != "answer" else gold_answer(text) if isinstance(text, str) else None
    response = {"text": "" if str(text).isspace() else text, "source": "expert", "finish_reason": "stop"}
    group_id = row.get("id")
    if group_id in (None, ""):
        group_id = hashlib.sha256(f"{prompt}\0{text}".encode()).hexdigest()[:16]
    meta = {name: item for name, item in row.items() if name not in (question, solution, "answer", "id")}
    return {"id": group_id, "prompt": prompt, "answer": gold, "responses": [response], "meta": meta}


def _finding(error: ValidationError) -> tuple[str, str, int | None]:
    """Kind and detail of what is wrong first, in the order of the fields, and the response that it is in."""
    first = error.errors(include_url=False)[0]
    where = [part for part in first["loc"] if part not in ("float", "int")]  # what else a number might have been
    position = where[1] if where[:1] == ["responses"] and len(where) > 1 else None
    name = next((part for part in reversed(where) if isinstance(part, str)), "")
    assert not isinstance(position, str)
    if first["type"] == "missing" or (first["input"] is None and where[-1] == name):
        others = " (a group has id, prompt, responses; of other rows tools/import_groups.py makes groups)"
        return "missing_field", f"no {name!r}{others if len(where) == 1 else ''}", position
    if first["type"] == "too_short":
        return "missing_field", f"{name!r} is empty", position
    expected = first["msg"].replace("Input should be ", "expected ").replace("dictionary", "object")
    if expected == first["msg"]:  # our own, which says it all
        return "wrong_type", expected, position
    verb = "holds" if isinstance(where[-1], int) else "is"
    return "wrong_type", f"{name!r} {verb} {short(first['input'])}, {expected}", position


def recorded_rendering(response: ResponseRecord) -> dict[str, Any]:
    """What generation recorded of how the response's prompt was rendered."""
    recorded = response.extra.get("rendering")
    return recorded if isinstance(recorded, dict) and "add_generation_prompt" in recorded else {}


def prompt_tokens(ids: Sequence[int]) -> str:
    """Number and fingerprint of a prompt's token ids, by which two renderings are compared."""
    return f"{len(ids)}-{sha256_json(list(ids))[:16]}"


def opened_tag(response: ResponseRecord) -> str:
    """The tag of thoughts that the rendered prompt ended with, if generation recorded one."""
    return str(recorded_rendering(response).get("opens") or "")


def has_text(prompt: str | list[dict[str, Any]]) -> bool:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return any(message_text(message).strip() for message in prompt)


def gold_answer(text: str) -> str | None:
    """What follows the last ``####`` of a GSM8K solution, without separators of thousands; None without the marker."""
    _, marker, tail = text.rpartition("####")
    if re.search(r"[(\[{]", tail):  # (100,200) is a pair
        return tail.strip() if marker else None
    return _THOUSANDS.sub(lambda match: match[0].replace(",", ""), tail).strip() if marker else None


def _check_response(response: ResponseRecord, found: Found) -> str:
    """``error``, ``drop`` or ``keep`` for one well-formed response; changes it as the policies say."""
    if not response.text and not response.token_ids:
        return found("empty_response", "no text", response.position)
    if response.source not in SOURCE_CODES:
        return found("unknown_source", f"{short(response.source)} is no source", response.position)
    if response.reward is not None and abs(response.reward) <= FLOAT32_MAX:
        response.reward = float(response.reward)
    elif response.reward is not None:  # NaN, too
        action = found("nonfinite_reward", f"reward {short(response.reward)}", response.position)
        if action != FIX:
            return action
        response.reward = None
    actions = []
    if response.finish_reason == "length":
        actions.append(found("truncated", "finish_reason is length", response.position))
    if response.source == "expert" and _judged_wrong(response):
        detail = f"expert with reward {response.reward}, outcome {response.outcome}"
        actions.append(found("expert_wrong", detail, response.position))
        if actions[-1] == FIX:
            response.reward, response.outcome = 1.0, "correct"
    return ERROR if ERROR in actions else DROP if DROP in actions else KEEP


def _judged_wrong(response: ResponseRecord) -> bool:
    if response.outcome is not None:
        return response.outcome == "wrong"
    return response.reward is not None and response.reward <= 0


def keep_responses(record: GroupRecord, check: Callable[[ResponseRecord], str], found: Found) -> bool:
    """Drop the responses of which ``check`` says ``drop``; False when the group is lost: an ``error``, or none left."""
    actions = []
    for response in record.responses:
        actions.append(check(response))
        if actions[-1] == ERROR:
            return False
    record.responses = [r for r, action in zip(record.responses, actions, strict=True) if action != DROP]
    if not record.responses:
        found("no_responses", "every response was dropped")
    return bool(record.responses)


def check_group(record: GroupRecord, found: Found) -> bool:
    """Look at the responses side by side: duplicates, expert, rewards. Changes ``record`` as the policies say; False
    when the group is lost. Call it once, when all that one response alone can be dropped for is done."""
    kept: list[ResponseRecord] = []
    seen: set[Any] = set()
    for response in record.responses:
        content = response.text or tuple(response.token_ids or ())
        if content in seen:
            detail = f"same {'text' if response.text else 'token_ids'} as an earlier one"
            action = found("duplicate_response", detail, response.position)
            if action == ERROR:
                return False
            if action == DROP:
                continue
        seen.add(content)
        kept.append(response)
    record.responses = kept
    if all(response.source != "expert" for response in kept):
        if found("no_expert", "no expert response") in (ERROR, DROP):
            return False
    rewards = {response.reward for response in kept}
    if len(kept) == 1 or len(rewards) > 1 or None in rewards:
        return True
    return found("equal_rewards", f"all {len(kept)} rewards are {rewards.pop()}") == KEEP


def id_digest(group_id: str) -> bytes:
    """16 bytes that stand for an id where millions of ids are remembered."""
    return hashlib.blake2b(group_id.encode("utf-8"), digest_size=16).digest()
