"""Where a group is in rows that others stored: a mapping of columns, from YAML (``examples/import/``) or options.

    prompt: problem
    answer: answer
    responses:
      - {each: generations, reward: correctness_math_verify, finish_reason: [finish_reasons], source: teacher}

A name is a column; ``reward_model.ground_truth`` is a field in one. What a row lacks is counted, not guessed.
"""

import fnmatch
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal, NamedTuple

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

from megatron_gft.config import Float, Section
from megatron_gft.errors import InputError, InputErrors, nearest
from megatron_gft.groups.messages import as_prompt, with_text
from megatron_gft.groups.records import gold_answer, number_text
from megatron_gft.groups.rows import cell
from megatron_gft.objectives import SOURCE_CODES, Source
from megatron_gft.reading import read_yaml

_ABSENT = object()
_Value = Callable[[str | None], Any]  # column -> cell
_FINISHED = dict.fromkeys("stop eos end_turn stop_sequence stop_word completed finished true".split(), "stop")
_FINISHED |= dict.fromkeys("length max_tokens max_length max_new_tokens truncated false".split(), "length")
_VERDICTS = {"true": True, "false": False}


class Responses(Section):
    """One place of responses in a row; in an ``each`` of objects, names are first looked up in the object."""

    each: str | None = Field(None, description="column with a list: every item is a response")
    text: str | None = Field(
        None, description="column of the text, or conversation that ends with it; sol_* for several"
    )
    source: str = Field("teacher", description="expert, teacher or self, or the column that says it")
    reward: Float | str | None = Field(None, union_mode="left_to_right", description="column, or number for all")
    finish_reason: list[str] = Field([], description="columns, the first with a value: stop, length, or true: complete")
    model: str | None = Field(None, description="column with the name of the model")

    @pydantic.model_validator(mode="after")
    def _check(self) -> "Responses":
        if self.each is None and self.text is None:
            raise ValueError("no responses are named: set each=COLUMN of lists, or text=COLUMN")
        return self


class Mapping(Section):
    """Where the parts of a group are in a row."""

    prompt: str | None = Field(None, description="column; default: what stands before the last message of a response")
    answer: str | None = Field(None, description="column of the gold answer")
    id: str | None = Field(None, description="column; default: a hash of the content")
    group_by: list[str] = Field([], description="columns: rows alike in them are one group")
    keep: list[str] = Field([], description="columns that go into meta")
    unfinished: Literal["drop", "keep"] = Field("drop", description="drop or keep responses that were cut off")
    sources: dict[str, Source] = Field({}, description="what the cells of a column of sources mean")
    responses: list[Responses] = Field(min_length=1)

    def columns(self) -> dict[str, bool]:
        """Columns that are named, and whether some row must have them; without the others, rows say less."""
        named: dict[Any, bool] = dict.fromkeys((self.id, *self.keep), False)
        for place in self.responses:
            named |= dict.fromkeys((place.model, *place.finish_reason), False)
            named |= dict.fromkeys((place.each, place.text, place.source, place.reward), True)
        named |= dict.fromkeys((self.prompt, self.answer, *self.group_by), True)
        return {name: must for name, must in named.items() if isinstance(name, str) and name not in SOURCE_CODES}


class Part(NamedTuple):
    """What one row gives to a group; ``key`` is that of the group, "" where a row is one."""

    place: str
    key: str
    id: str | None
    prompt: Any
    answer: str | None
    meta: dict[str, Any]
    responses: list[dict[str, Any]]


class Dropped(Exception):
    """A row, or one response, is of no use; the text is the reason to count."""


class _RowDropped(Dropped):
    pass


def load_mapping(file: Path | None, group: dict[str, Any], responses: dict[str, Any]) -> Mapping:
    """The mapping of a YAML file, with options over it: ``responses`` replaces fields of its one entry there.

    Raises:
        InputErrors: an unknown key (with the nearest), a wrong value, or several entries to choose from.
    """
    tree = read_yaml(file) if file else {}
    places = tree.get("responses", [{}])
    if responses and not (isinstance(places, list) and len(places) == 1 and isinstance(places[0], dict)):
        raise InputError(f"{', '.join(responses)}: {file} has several places of responses -> write them in a file")
    if responses or file is None:
        tree["responses"] = [places[0] | responses]
    try:
        return Mapping.model_validate(tree | group)
    except pydantic.ValidationError as error:
        raise InputErrors(str(file or "the options"), [_explain(problem) for problem in error.errors()]) from None


def _explain(problem: Any) -> str:
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        known = (Responses if "responses" in problem["loc"] else Mapping).model_fields
        return f"{where}: unknown key -> {nearest(str(problem['loc'][-1]), known) or ', '.join(known)}"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')} (got {short(problem['input'])})"


class RowReader:
    """Reads rows as a mapping says; ``unseen`` holds the columns that no row had so far.

    Args:
        drop: is told the reason and the place of every response that is left out.
    """

    def __init__(self, mapping: Mapping, drop: Callable[[str, str], None]):
        self.mapping, self.unseen, self._drop = mapping, mapping.columns(), drop

    def part(self, row: dict[str, Any], place: str) -> Part:
        """What a row gives to its group; ``Dropped``: nothing. InputError: the mapping does not fit."""
        own = self.mapping
        key = [self._cell(row, name) for name in own.group_by]
        if None in key:
            raise Dropped("no_key")
        prompt, responses = number_text(self._cell(row, own.prompt)), []
        for where in own.responses:
            for value, said in self._found(row, where, place):
                try:
                    if _is_conversation(said):
                        prompt, said = _apart(said, prompt, place)
                        self.unseen.pop(own.prompt or "", None)  # the conversation has it
                    responses.append(self._response(where, value, said, place))
                except _RowDropped:
                    raise
                except Dropped as reason:
                    self._drop(str(reason), place)
        answer = _text(self._cell(row, own.answer), own.answer, place)
        answer = answer and (gold_answer(answer) or answer)
        kept = {name: self._cell(row, name) for name in own.keep}
        meta = {name: item for name, item in kept.items() if number_text(item) is not None}
        id_ = _text(self._cell(row, own.id), own.id, place)
        return Part(place, json.dumps(key, sort_keys=True) if key else "", id_, prompt, answer, meta, responses)

    def _cell(self, scope: dict[str, Any], name: str | None, absent: Any = None) -> Any:
        if name is None or (value := cell(scope, name, _ABSENT)) is _ABSENT:
            return absent
        self.unseen.pop(name, None)
        return value

    def _found(self, row: dict[str, Any], where: Responses, place: str) -> Iterator[tuple[_Value, Any]]:
        """The responses at one place: what gives the cells that belong to it, and what holds its text."""
        if where.each is None:
            assert where.text is not None
            for name in fnmatch.filter(row, where.text) if "*" in where.text else [where.text]:
                self.unseen.pop(where.text if name in row else "", None)
                yield functools.partial(self._cell, row), self._cell(row, name)
            return
        items = self._cell(row, where.each) or []
        if not isinstance(items, list):
            raise InputError(f"{place}: column {where.each!r} is {short(items)}, no list -> name it as text")
        for index, item in enumerate(items):
            value = functools.partial(self._beside, row, items, index)
            yield value, item if where.text is None else value(where.text)

    def _beside(self, row: dict[str, Any], items: list[Any], index: int, name: str | None) -> Any:
        """A cell of one item of a list: its own, that of a list beside it, or one for all."""
        inside = self._cell(items[index], name, _ABSENT) if isinstance(items[index], dict) else _ABSENT
        column = self._cell(row, name) if inside is _ABSENT else inside
        if inside is not _ABSENT or not isinstance(column, list):
            return column
        if len(column) != len(items):
            raise _RowDropped("list_lengths")  # which belongs to which is not known
        return column[index]

    def _response(self, where: Responses, value: _Value, said: Any, place: str) -> dict[str, Any]:
        ended = next((found for found in [*map(value, where.finish_reason)] if found is not None), None)
        scored = value(where.reward) if isinstance(where.reward, str) else where.reward
        told = where.source if where.source in SOURCE_CODES else str(value(where.source))
        text = _text(None if said == [] else said, where.text or where.each, place)
        if text is None or not text.strip():
            raise Dropped("empty_response")
        if ended is not None and (ended := _FINISHED.get(str(ended).lower())) is None:
            raise Dropped("ended_otherwise")  # abort, error, content_filter, ...
        if ended == "length" and self.mapping.unfinished == "drop":
            raise Dropped("unfinished")
        source = self.mapping.sources.get(told, told)
        if source not in SOURCE_CODES:
            raise InputError(
                f"{place}: column {where.source!r} says {short(told)}, none of {', '.join(SOURCE_CODES)} -> set "
                f"sources: {{{told}: teacher}} in the mapping, or source to one of them"
            )
        reward, outcome = _reward(scored)
        known = {"reward": reward, "outcome": outcome, "finish_reason": ended}
        return {"text": text, "source": source, **known, "model": _text(value(where.model), where.model, place)}


def _text(value: Any, name: str | None, place: str) -> str | None:
    value = number_text(value)
    if value is None or isinstance(value, str):
        return value
    raise InputError(f"{place}: column {name!r} is {short(value)}, neither text nor a number -> name another column")


def _is_conversation(said: Any) -> bool:
    return isinstance(said, list) and said != [] and all(isinstance(message, dict) for message in said)


def _apart(messages: list[dict[str, Any]], prompt: Any, place: str) -> tuple[Any, Any]:
    """Prompt and text of a conversation; what stands before the last message must be the prompt, or becomes it."""
    if messages[-1].get("role") != "assistant":
        raise InputError(f"{place}: a conversation that does not end with the assistant -> name another column")
    try:
        *before, last = map(with_text, messages)
        asked = as_prompt(prompt)
    except PydanticCustomError:  # an image, a prompt that ends with an answer
        raise Dropped("wrong_type") from None
    asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if before and asked is not None and _turns(before) != _turns(asked):
        raise Dropped("other_prompt")
    return before if prompt is None else prompt, last.get("content")


def _turns(messages: Any) -> list[Any]:
    return [(turn.get("role"), turn.get("content")) if isinstance(turn, dict) else turn for turn in messages]


def _reward(value: Any) -> tuple[float | None, str | None]:
    """Reward and outcome: a boolean is a verdict, a number (or its text) is a reward and no more."""
    if isinstance(value, str):
        value = _VERDICTS.get(value.strip().lower(), value)
    if isinstance(value, bool):
        return float(value), "correct" if value else "wrong"
    try:
        number = math.nan if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        raise Dropped("unreadable_reward") from None
    return (number if math.isfinite(number) else None), None
