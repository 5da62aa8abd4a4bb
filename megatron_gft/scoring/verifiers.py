"""Verifiers by name: is this response to this problem right?

``math`` (see :mod:`megatron_gft.scoring.math_answers`), ``exact``, ``choice``, or any function of the user as
``module:function``. The first three judge what a response says after its thoughts (``thoughts.py``); a user's function
gets the whole response. A verifier is a function of one :class:`Case`; it runs in a worker process that may be killed
at any time (``verifier_pool.py``), so it owns no time limit and keeps no state that matters.

A user's function takes a :class:`Case` and returns a :class:`Verdict`, a bool, or a reward as a finite number
(positive: correct). What it raises becomes the outcome ``error`` with the message kept, and so does a result of
another form.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Literal, get_args, get_type_hints

from megatron_gft.errors import InputError, InputErrors, nearest
from megatron_gft.groups.records import FLOAT32_MAX
from megatron_gft.scoring.boxes import BoxPolicy
from megatron_gft.scoring.final_answers import extract_answer, with_words_around
from megatron_gft.scoring.math_answers import Policies, same_answer
from megatron_gft.scoring.spelling import plain_latex
from megatron_gft.scoring.thoughts import after_thoughts

Outcome = Literal["correct", "wrong", "unparsed", "timeout", "error"]
OUTCOMES: tuple[str, ...] = get_args(Outcome)


@dataclass(frozen=True)
class Case:
    """One response to judge, with all that is known of its problem; ``opens``: what the rendered prompt left open."""

    response: str
    answer: str | None
    prompt: str | list[dict[str, Any]] = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    opens: str = ""


@dataclass(frozen=True)
class Verdict:
    """``outcome`` says why ``reward`` is what it is; ``detail`` is the answer found, or what went wrong."""

    outcome: Outcome
    reward: float
    detail: str | None = None


Verifier = Callable[[Case], Verdict]


def _judged(equal: bool | None, detail: str | None) -> Verdict:
    if equal is None:
        return Verdict("unparsed", 0.0, detail)
    return Verdict("correct", 1.0, detail) if equal else Verdict("wrong", 0.0, detail)


@dataclass(frozen=True)
class _AfterThoughts:
    """What the built-in verifiers share: they judge the text after the thoughts that ``thoughts`` names.

    Raises:
        InputError: ``thoughts`` names no known tags.
    """

    thoughts: str = "all"

    def __post_init__(self) -> None:
        after_thoughts("", self.thoughts)

    def said(self, case: Case) -> str:
        """The response after its thoughts; "" where they never end."""
        prompt = case.prompt if isinstance(case.prompt, str) else (case.prompt or [{}])[-1].get("content")
        return (
            after_thoughts(case.response, self.thoughts, case.opens or (prompt if isinstance(prompt, str) else ""))
            or ""
        )


@dataclass(frozen=True)
class MathVerifier(Policies, _AfterThoughts):
    """The final answer equals the gold answer mathematically; policies: :mod:`~megatron_gft.scoring.math_answers`."""

    boxes: BoxPolicy = "listed"

    def __call__(self, case: Case) -> Verdict:
        said = self.said(case)
        answer = extract_answer(said, self.boxes)
        if answer is None:
            return Verdict("unparsed", 0.0)
        gold = _final_gold(case, self.boxes)
        equal = same_answer(gold, answer, self)
        if equal is False and re.search("[A-Za-z]{2}", gold):  # "3 kg" was said, of which 3 is the answer
            equal = any(same_answer(gold, longer, self) for longer in with_words_around(said, answer))
        return _judged(equal, answer)

    def warm_up(self) -> None:
        """Import and exercise sympy, so that the first real answer does not pay for it."""
        same_answer(r"\sqrt{2}", r"2^{1/2}")


@dataclass(frozen=True)
class ExactVerifier(_AfterThoughts):
    """The response is the gold answer, letter for letter but for white space around and between words.

    ``part``: ``whole`` compares the whole response, ``answer`` only its final answer (box, ``####``, "answer is").
    """

    part: Literal["whole", "answer"] = "whole"
    case: Literal["sensitive", "ignore"] = "sensitive"

    def __call__(self, case: Case) -> Verdict:
        whole = self.said(case)
        said = extract_answer(whole) if self.part == "answer" else whole
        if said is None or not said.strip():
            return Verdict("unparsed", 0.0)
        expected = plain_latex(_final_gold(case)) if self.part == "answer" else _gold_text(case)
        return _judged(self._form(said) == self._form(expected), said.strip())

    def _form(self, text: str) -> str:
        words = " ".join(text.split())
        return words.casefold() if self.case == "ignore" else words


@dataclass(frozen=True)
class ChoiceVerifier(_AfterThoughts):
    """The letter chosen: boxed, after "answer is" or "answer:", or the last one in parentheses or alone on a line.

    A small letter is one only in a box, or where nothing else follows it: "a" is a word, and ``f(a)`` a formula.
    """

    letters: str = "ABCDE"

    def __call__(self, case: Case) -> Verdict:
        expected = self.find_gold(_gold_text(case))
        if expected is None:
            raise InputError(f"gold answer {case.answer!r} names none of the choices {self.letters} -> set letters=...")
        chosen = self.find(self.said(case))
        return _judged(None if chosen is None else chosen == expected, chosen)

    def find(self, text: str) -> str | None:
        """The letter that ``text`` settles on, in upper case, or ``None``."""
        return self._declared(text) or self._mentioned(text)

    def find_gold(self, text: str) -> str | None:
        """The letter of a gold answer: declared as in a response, or the one it begins with ("C) f(a) is ...")."""
        leading = re.match(rf"\(?(?:\\text\w*\{{)?\(?({self._either})(?:[.):]|\}}|\W*$)", text)
        return self._declared(text) or (leading[1].upper() if leading else self._mentioned(text))

    @property
    def _upper(self) -> str:
        return f"[{re.escape(self.letters.upper())}]"

    @property
    def _either(self) -> str:
        return f"[{re.escape(self.letters.upper() + self.letters.lower())}]"

    def _declared(self, text: str) -> str | None:
        """The letter in the last box, else after the last "answer is"."""
        wrapped = r"\(?(?:\\text\w*\{{)?\**\(?\s*({})\s*\)?\**\}}?\)?"
        either = wrapped.format(self._either)
        tail = rf"{wrapped.format(self._upper)}(?![\w'])|\(({self._either})\)|{either}(?=[\s.*$)]*(?:\n|$))"
        for pattern in (
            rf"\\boxed\s*\{{\s*+{either}\s*(?:[.):][^{{}}]*)?\}}",
            rf"(?i:\banswer\b(?:\s+is|\s*[:=]))\s*+(?:(?i:option|choice)\s++)?\$?(?:{tail})",
        ):
            found = list(re.finditer(pattern, text))
            if found:
                return next(letter for letter in found[-1].groups() if letter).upper()
        return None

    def _mentioned(self, text: str) -> str | None:
        """The last letter in parentheses or alone on its line (or before its text: "B. north")."""
        found = re.findall(
            rf"(?<!\w)\(({self._upper})\)|(?m:^[^\w\n]*({self._upper})(?:[.):]\s[^\n]*|[^\w\n]*)$)"
            rf"|(?:^|\n)[^\w\n]*({self._either})\W*$",
            text,
        )
        return "".join(found[-1]).upper() if found else None


def _final_gold(case: Case, boxes: BoxPolicy = "listed") -> str:
    r"""The gold answer itself, where the gold text is a whole solution (``\boxed{}``, ``####``).

    Raises:
        InputError: there is no gold answer.
    """
    text = _gold_text(case)
    if re.search(r"####|\\boxed|\banswer is\b", text):
        return extract_answer(text, boxes) or text
    return text


def _gold_text(case: Case) -> str:
    if case.answer is None or not case.answer.strip():
        raise InputError("the problem has no gold answer -> give one, or use a verifier that needs none")
    return case.answer.strip()


_BUILTIN: dict[str, type] = {"math": MathVerifier, "exact": ExactVerifier, "choice": ChoiceVerifier}


def needs_answer(name: str) -> bool:
    """Whether the verifier compares with a gold answer; a user's function may do without."""
    return name in _BUILTIN


def build_verifier(name: str, options: Mapping[str, str] | None = None) -> Verifier:
    """The verifier called ``name``; ``options`` are its fields (built-in) or keyword arguments (user's function).

    Raises:
        InputError: unknown name, option or value, or a module or function that cannot be imported.
    """
    options = dict(options or {})
    if name in _BUILTIN:
        return _build_builtin(name, options)
    module_name, colon, function_name = name.partition(":")
    if not colon:
        near = nearest(name, _BUILTIN)
        hint = f"did you mean {near}?" if near else f"choose one of {', '.join(_BUILTIN)} or module:function"
        raise InputError(f"verifier {name!r} is not known -> {hint}")
    function = getattr(user_module(name), function_name, None)
    if not callable(function):
        state = "has no" if function is None else "is not callable:"
        raise InputError(f"verifier {name!r}: the module {state} {function_name} -> name a function that takes a Case")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C do not say what they take
        return UserVerifier(name, function, options)
    try:
        signature.bind(Case("", None), **options)
    except TypeError as error:
        raise InputError(
            f"verifier {name!r}: {error}; its signature is {function_name}{signature} -> it takes a Case, then only "
            "what options give it"
        ) from error
    return UserVerifier(name, function, options)


def user_module(name: str) -> ModuleType:
    """The module of the verifier ``module:function``.

    Raises:
        InputError: it cannot be imported; the message says why and where.
    """
    module_name = name.partition(":")[0]
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever a user's module does on import
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(f"verifier {name!r}: {error} -> check the spelling and PYTHONPATH") from error
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{last.filename}:{last.lineno}"
        if isinstance(error, SyntaxError) and error.filename:
            place = f"{error.filename}:{error.lineno}"
        raise InputError(
            f"verifier {name!r}: importing its module fails at {place} ({type(error).__name__}: {error}) -> correct it"
        ) from error


def _build_builtin(name: str, options: dict[str, str]) -> Verifier:
    kind = _BUILTIN[name]
    allowed = get_type_hints(kind)
    problems = []
    for key, value in options.items():
        if key not in allowed:
            problems.append(f"verifier {name} has no option {key!r} -> it has {', '.join(allowed)}")
        elif choices := get_args(allowed[key]):
            if value not in choices:
                problems.append(f"verifier {name}: {key}={value!r} -> one of {', '.join(choices)}")
    if problems:
        raise InputErrors("verifier options", problems)
    return kind(**options)


@dataclass(frozen=True)
class UserVerifier:
    """Calls the user's function and gives its result the form of a :class:`Verdict`."""

    name: str
    function: Callable[..., Any]
    options: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, case: Case) -> Verdict:
        """The verdict on a copy of ``case``: its prompt and ``meta`` are shared with other responses.

        Raises:
            TypeError, ValueError: the result is not a verdict, or not one that the files can hold.
        """
        own = replace(case, prompt=copy.deepcopy(case.prompt), meta=copy.deepcopy(case.meta))
        result = self.function(own, **self.options)
        if not isinstance(result, Verdict):
            reward = self._reward(result, "not a Verdict, bool or number")
            return Verdict("correct" if reward > 0 else "wrong", reward)
        if not isinstance(result.outcome, str) or result.outcome not in OUTCOMES:
            raise ValueError(f"{self.name} returned the outcome {result.outcome!r}, not one of {', '.join(OUTCOMES)}")
        reward = self._reward(result.reward, "as a reward, not a number")
        return Verdict(result.outcome, reward, None if result.detail is None else str(result.detail))

    def _reward(self, value: Any, complaint: str) -> float:
        try:
            reward = float(value) if not isinstance(value, str) else None
        except (TypeError, ValueError, OverflowError):
            reward = None
        if reward is None:
            raise TypeError(f"{self.name} returned {value!r}, {complaint}")
        if not abs(reward) <= FLOAT32_MAX:  # nan, too
            raise ValueError(f"{self.name} returned the reward {reward}, which is no finite 32-bit number")
        return reward
