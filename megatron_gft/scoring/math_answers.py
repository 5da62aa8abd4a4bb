r"""Mathematical answers: decide whether two are equal. Finding them in responses: ``final_answers.py``.

Answers are brought to one spelling (``spelling.py``), read as forms (``answer_forms.py``), and compared form by form,
down to values (``answer_values.py``). :class:`Policies` are explicit and strict unless asked otherwise, since a
verifier that forgives too much trains wrong answers. Whatever they say, x is never taken for x/100 or 100x without a
percent sign, and a currency or degree sign is never part of a number; ``x = 5`` answers ``5``, and ``x=3 or x=5`` and
``x = 3, 5`` answer ``3,5``.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_gft.errors import InputError
from megatron_gft.scoring.answer_forms import (
    RELATIONS,
    Form,
    UnreadableError,
    atoms_of,
    has_letters,
    has_matrix,
    interval_of,
    is_name,
    items_of,
    read_form,
    spelling_key,
)
from megatron_gft.scoring.answer_values import (
    Policies,
    constant,
    constant_ratio,
    expression,
    is_words,
    same_expression,
    same_value,
    value_of,
)
from megatron_gft.scoring.spelling import one_spelling

MAX_ANSWER_CHARS = 400  # longer "answers" are not parsed
CALCULATION_TOLERANCE = 0.01  # of "10/3 = 3.33", where the last side is the answer
STRICT = Policies()
_ORDERED = frozenset(("()", "[]", "[)", "(]", "union"))


def same_answer(gold: str, answer: str, policies: Policies = STRICT, **options: Any) -> bool | None:
    """Whether two answers are equal under the policies; ``None`` when ``answer`` cannot be read as mathematics.

    ``options`` are fields of :class:`Policies` that stand for those of ``policies``.

    Raises:
        InputError: ``gold`` cannot be read.
    """
    policies = replace(policies, **options) if options else policies
    if len(answer) > MAX_ANSWER_CHARS and answer.strip() != gold.strip():
        return None
    left, right = one_spelling(gold, policies.decimal), one_spelling(answer, policies.decimal)
    if left and spelling_key(left) == spelling_key(right):
        return True
    expected = _read_gold(left, policies)
    try:
        said = read_form(right)
        return any(_match(*pair, policies) for pair in _without_names(expected, said, policies))
    except UnreadableError:
        return None


@functools.lru_cache(maxsize=1024)  # responses of a group have one gold answer
def _read_gold(gold: str, policies: Policies) -> Form:
    try:
        form = read_form(gold)
        for atom in atoms_of(form.parts[-1] if len(form.parts) > 2 and form.kind == "=" else form):
            value = value_of(atom.text, policies)
            if value.number is None and not is_words(value.text) and not has_matrix(atom.text):
                expression(value.text)
    except UnreadableError as error:
        raise InputError(
            f"gold answer {gold!r} cannot be read as mathematics -> correct it, or use another verifier"
        ) from error
    return form


def _without_names(gold: Form, answer: Form, policies: Policies) -> Iterator[tuple[Form, Form]]:
    """Both answers as they can be compared: without names where only one of them has names, or none count."""
    named = _has_relation(gold), _has_relation(answer)
    golds, answers = _assigned(gold, True, policies), _assigned(answer, named[0], policies)
    if named == (False, True):
        yield from ((gold, values) for values in answers)
    elif named == (True, False):
        yield from ((values, answer) for values in golds)
    elif policies.names == "ignore" or _one_name(gold) == _one_name(answer) != "":
        yield from itertools.product(golds, answers)
    asked, given = interval_of(gold), interval_of(answer)
    if asked and given and asked.text == given.text:
        yield asked, given
    if asked:
        yield from ((asked, values) for values in (answer, *answers))
    if given and policies.intervals == "either":
        yield from ((values, given) for values in (gold, *golds))
    yield gold, answer


def _one_name(form: Form) -> str:
    """The name before the "=" of every item that has one; "" for several names."""
    names = {spelling_key(item.parts[0].text) for item in items_of(form) if item.kind == "="}
    return names.pop() if len(names) == 1 else ""


def _has_relation(form: Form) -> bool:
    return form.kind in RELATIONS or any(map(_has_relation, form.parts))


def _assigned(form: Form, strictly: bool, policies: Policies) -> list[Form]:
    """The values that ``form`` gives to one name (``x=3, x=5``); none if that is not what it does."""
    if form.kind == "~":
        exact, *rest = form.parts
        close = [side for side in rest if _comes_to(exact.parts[-1] if exact.parts else exact, side)]
        return [exact, *_assigned(exact, strictly, policies), *close]
    names: set[str] = set()
    values: list[Form] = []
    for item in form.parts if form.kind == "list" else (form,):
        named, value = _name_and_value(item, strictly, policies)
        names |= named
        if value is None or value.kind in RELATIONS or (value is item and not values):
            return []
        values.append(value)  # with a name, or of the name before: n = 1, 2, 3
    if len(names) > 1 and policies.names == "off":
        return []
    return values if len(values) == 1 else [Form("list" if len(names) < 2 else "()", form.text, tuple(values))]


def _name_and_value(chain: Form, strictly: bool, policies: Policies) -> tuple[set[str], Form | None]:
    """Of ``x = 2+3 = 5`` the name and the last side; neither of an equation, or where a side comes to something else.

    ``strictly``: the name is a name, not another expression of unknowns (``x+y = 12``).
    """
    if chain.kind == "list":  # p=5, q=2; p=7, q=2
        inner = _assigned(chain, strictly, policies)
        return ({""}, inner[0]) if inner else (set(), None)
    if chain.kind != "=":
        return set(), chain
    turned = is_name(chain.parts[-1].text) > is_name(chain.parts[0].text)  # 5 = x
    *sides, value = chain.parts[:: (1, -1)[turned]]
    unknown = [side for side in sides if has_letters(side.text) or is_name(side.text)]
    if (strictly or value.text == "0") and not all(is_name(side.text) for side in unknown):
        return set(), None
    if policies.steps == "checked" or has_letters(value.text):
        if not all(_comes_to(side, value) for side in sides if side not in unknown):
            return set(), None
    return {spelling_key(side.text) for side in unknown[:1]}, value


def _comes_to(calculation: Form, value: Form) -> bool:
    """Whether ``calculation`` has about the value that stands behind its "="; what has no value is believed.

    Sines are believed, too: their degrees have lost their sign.
    """
    if calculation.kind == value.kind != "atom":
        return all(_comes_to(*pair) for pair in zip(calculation.parts, value.parts, strict=False))
    if re.search(r"\\(?:sin|cos|tan)", calculation.text):
        return True
    claimed, computed = (_constant(side) for side in (value, calculation))
    if claimed is None or computed is None:
        return computed is None and not has_letters(value.text)
    return bool(abs(computed - claimed) <= CALCULATION_TOLERANCE * abs(claimed))


def _constant(side: Form) -> Any:
    try:
        return constant(value_of(side.text, STRICT).text)
    except UnreadableError:
        return None


def _match(gold: Form, answer: Form, policies: Policies) -> bool:
    """Whether two forms are equal.

    Raises:
        UnreadableError: a value of ``answer`` is no mathematics.
    """
    kinds = {gold.kind, answer.kind}
    if kinds & {"list", "set"} and not kinds & _ORDERED:
        return _same_items(items_of(gold), items_of(answer), policies)
    if kinds == {"ratio", "atom"} or (kinds != {"atom"} and has_matrix(gold.text) and has_matrix(answer.text)):
        return _match_in_order(gold, answer, policies) or same_expression(_quotient(gold), _quotient(answer), policies)
    if kinds == {"atom"}:
        return same_value(gold.text, answer.text, policies)
    if kinds == {"union"}:
        return _same_items(list(gold.parts), list(answer.parts), policies)
    if len(kinds) == 1 and gold.kind in RELATIONS:
        return _same_relation(gold, answer, policies)
    return _match_in_order(gold, answer, policies)


def _same_items(golds: list[Form], answers: list[Form], policies: Policies) -> bool:
    """As sets: each of the one is among the others."""
    return all(any(_match(g, a, policies) for a in answers) for g in golds) and all(
        any(_match(g, a, policies) for g in golds) for a in answers
    )


def _match_in_order(gold: Form, answer: Form, policies: Policies) -> bool:
    if gold.kind != answer.kind and {gold.kind, answer.kind} != {"list", "()"}:
        return False
    pairs = list(zip(gold.parts, answer.parts, strict=False))
    return 0 < len(pairs) == max(len(gold.parts), len(answer.parts)) and all(_match(*pair, policies) for pair in pairs)


def _quotient(form: Form) -> str:
    two = form.kind == "ratio" and len(form.parts) == 2
    return f"({form.parts[0].text})/({form.parts[1].text})" if two else form.text


def _same_relation(gold: Form, answer: Form, policies: Policies) -> bool:
    """Side by side, or one is a multiple of the other: ``2x < 4`` and ``x - 2 < 0``."""
    left, right = (form._replace(parts=(form.parts[0], form.parts[-1])) for form in (gold, answer))
    if _match_in_order(left, right, policies):
        return True
    if any(side.kind != "atom" for side in left.parts + right.parts):
        return False
    factor = constant_ratio(*(f"({form.parts[0].text})-({form.parts[1].text})" for form in (left, right)))
    return factor is not None and (gold.kind in ("=", "!=") or factor.real > 0)
