r"""Single values of answers: numbers as exact fractions, words as words, all else as expressions.

``latex2sympy2_extended`` (the parser of ``math-verify``) reads expressions; two are equal when their values at some
points agree to many digits. It imports sympy (a second) and may run for ever on hostile input; it is imported on first
need, and the limit is that of the worker pool in ``verifier_pool.py``.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from megatron_gft.scoring.answer_forms import UnreadableError, has_matrix, spelling_key
from megatron_gft.scoring.spelling import OUTSIDE_PERCENT, DecimalPolicy, parse_number

PercentPolicy = Literal["off", "ignore", "value", "either"]
UnitPolicy = Literal["off", "spaced", "ignore"]
NamePolicy = Literal["off", "ignore"]
IntervalPolicy = Literal["asked", "either"]
StepPolicy = Literal["checked", "last"]
DigitPolicy = Literal["2", "3", "4", "5", "6"]

MAX_DIGITS = 2000  # larger numbers are compared by their first 15 digits
NOISE = 1e-30  # what is left where terms cancel
AGREEMENT = 1e-15  # relative, of values worked out to 40 digits


@dataclass(frozen=True)
class Policies:
    """What is forgiven.

    Args:
        percent: ``off`` (a percent sign, or the word, stands on both sides or on none), ``ignore`` (it is dropped),
            ``value`` (50% is 0.5), ``either`` (50% is 50 and 0.5).
        units: ``off`` (unit words are part of the answer; one in parentheses may be left out), ``ignore`` (words after
            a value are dropped unless they change it: "2 million", "5 or more"), ``spaced`` (but not in "5cm").
        decimal: sign of the fraction: ``point`` (1,5 is a list), ``comma`` (1.234,5), ``either`` (a comma that parts no
            group of three digits).
        names: ``off`` (several names answer nothing but themselves), ``ignore`` (only values count, in their order).
        digits: a decimal stands for 1/3 or pi when it is that number rounded or cut at so many digits, or more.
        steps: the last side of "2+3 = 5" is the answer: ``checked`` (if it is about what stands before it), ``last``.
        intervals: whether ``1<x<2`` answers ``(1,2)``: ``asked`` (only the other way round), ``either``.
    """

    percent: PercentPolicy = "off"
    units: UnitPolicy = "off"
    decimal: DecimalPolicy = "point"
    names: NamePolicy = "off"
    digits: DigitPolicy = "6"
    steps: StepPolicy = "checked"
    intervals: IntervalPolicy = "asked"


_UNIT = re.compile(
    r"(?<=[\d})])(?P<space>\s*+)(?:\\text\{(?P<text>[^{}]*+)\}"
    r"|(?P<note>\(\s*/?(?:(?:[A-Za-z][A-Za-z ,./]*+(?:(?<=out of )\d+)?)|\\text\{[^{}]*+\})(?:\^\{?-?\d\}?)?\s*\))"
    r"|(?P<words>[A-Za-z][A-Za-z. /]*+))(?:\^\{?\d\}?)?$"
)
_SHORT_UNITS = frozenset(
    "mm cm dm m km in ft yd mi sq cu mg g kg lb lbs oz t ml mL cl dl l L s sec min h hr hrs ms mph kph kWh kW W V A J "
    "N Pa Hz K C F of a an to per".split()
)
_NO_UNITS = frozenset(  # words that make another value of the one before them
    "zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy "
    "eighty ninety dozen dozens half halves third thirds fourth fourths fifth fifths quarter quarters tenth tenths "
    "percent squared cubed factorial times plus minus over mod modulo and not more less least most fewer than about "
    "or sin cos tan cot csc arcsin arccos arctan log exp sqrt lim max gcd lcm pairs pair score hundred hundreds "
    "thousand thousands million millions billion billions trillion trillions".split()
)
_WORDS = re.compile(r"[A-Za-z][A-Za-z .'\-]*")
_LONG_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{3,}(?![A-Za-z(])")
_BASE = re.compile(r"\d[\dA-Za-z]*_\{?(\d+)\}?")


# to the parser 5(4) is 9, \frac{1}{2}(3) is 7/2 and \pi(3) a function
_PRODUCT = re.compile(r"(?:(?<![_^\d.])\d+|\\pi|\)|(?<![_^])\{[^{}]*\}|\}\})\s*(?=\()|\)\s*(?=\d|\\frac)|\d(?=\\binom)")


class _Value(NamedTuple):
    """A single value: its percent sign and unit are taken from ``text``, a unit in parentheses is a ``note``."""

    text: str
    number: Fraction | None
    percent: bool
    loose: bool  # the percent sign stands outside of a box or formula: it counts only if the other has one
    unit: str
    note: bool


@functools.lru_cache(maxsize=4096)
def value_of(text: str, policies: Policies) -> _Value:
    loose = text.endswith(OUTSIDE_PERCENT)
    bare, unit, note = text.removesuffix(OUTSIDE_PERCENT).rstrip("% "), "", False
    tail = _UNIT.search(bare)
    if tail and _is_unit(tail, frozenset() if policies.units == "spaced" else _SHORT_UNITS):
        unit, note = _plain_words(tail[0].strip(" ()")), bool(tail["note"])
        bare = bare[: tail.start()].rstrip()
    number = parse_number(bare)
    if policies.units != "off":
        unit = ""
    return _Value(bare, number, text.endswith("%"), loose, unit, note)


def _is_unit(tail: re.Match[str], short_units: frozenset[str]) -> bool:
    words = re.findall("[A-Za-z]+", re.sub(r"\\text", "", tail["text"] or tail["note"] or tail["words"] or ""))
    glued = tail["words"] and not tail["space"]
    long_enough = len(words) == 1 and (len(words[0]) > 1 or "^" in tail[0])
    if glued and not (long_enough and (words[0] in short_units or len(words[0]) > 3)):
        return False  # 2k, 12ab, 3pi
    return words == ["times"] or (bool(words) and all(map(_is_unit_word, words)))


def _is_unit_word(word: str) -> bool:
    return word in _SHORT_UNITS or word in ("am", "pm") or (len(word) > 2 and word.lower() not in _NO_UNITS)


def same_value(gold: str, answer: str, policies: Policies) -> bool:
    """Whether two atoms are equal: percent signs and units by the policies, and what is left.

    Raises:
        UnreadableError: ``answer`` is no mathematics.
    """
    left, right = value_of(gold, policies), value_of(answer, policies)
    if left.unit != right.unit and not (left.note and not right.unit) and not (right.note and not left.unit):
        return False
    if left.percent == right.percent or left.loose or right.loose or policies.percent in ("ignore", "either"):
        if _same_bare_value(left, right, policies):
            return True
    if left.percent == right.percent or policies.percent not in ("value", "either"):
        return False
    return _same_bare_value(_hundredth(left), _hundredth(right), policies)


def _hundredth(value: _Value) -> _Value:
    """What a percent sign makes of a value."""
    if not value.percent:
        return value
    return value._replace(text=f"({value.text})/100", number=None if value.number is None else value.number / 100)


def _same_bare_value(left: _Value, right: _Value, policies: Policies) -> bool:
    if left.number is not None and right.number is not None:
        return left.number == right.number or _stands_for(left.number, right.number, policies)
    if left.text and spelling_key(left.text) == spelling_key(right.text):
        return True
    if is_words(left.text) or is_words(right.text):
        return _plain_words(left.text) == _plain_words(right.text)
    if _BASE.fullmatch(left.text) or _BASE.fullmatch(right.text):
        return False
    return same_expression(left.text, right.text, policies)


def is_words(text: str) -> bool:
    r"""Words, not a formula: set in ``\text``, or three letters and more that are no function of something."""
    bare = re.sub(r"\\(?:begin|end)\{\w+\}|\\(?!text)[A-Za-z]+", "", text)
    return bool(_LONG_WORD.search(bare)) or (r"\text" in text and bool(_WORDS.fullmatch(_plain_words(text))))


def _plain_words(text: str) -> str:
    plain = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip()
    return re.sub(r"\s+", " ", re.sub(r"^\(([A-Za-z])\)$", r"\1", plain)).casefold()


def _stands_for(left: Fraction, right: Fraction, policies: Policies) -> bool:
    """One is a fraction without an end (1/3), the other its decimal."""
    endless = [_places(value) is None for value in (left, right)]
    return endless[0] != endless[1] and _rounds_to(*((left, right) if endless[0] else (right, left)), policies)


def _places(value: Fraction) -> int | None:
    """Digits after the decimal point; ``None`` where they never end."""
    places, rest = 0, value.denominator
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest, count = rest // prime, count + 1
        places = max(places, count)
    return places if rest == 1 else None


def _rounds_to(exact: Any, decimal: Fraction, policies: Policies) -> bool:
    """Whether ``decimal`` is ``exact`` (a fraction or a real of mpmath), rounded or cut at enough digits."""
    places = _places(decimal)
    if not places or len(str(abs(decimal.numerator * 10**places // decimal.denominator))) < int(policies.digits):
        return False
    distance = (exact - decimal.numerator / (type(exact)(decimal.denominator))) * 10**places
    cut = abs(distance) < 1 and (distance > 0) == (exact > 0)
    return bool(abs(distance) * 2 <= 1 or cut)


# --- expressions ------------------------------------------------------------------------------------------------------


def same_expression(gold: str, answer: str, policies: Policies) -> bool:
    """Whether two expressions have one value wherever both have one, at some points.

    Raises:
        UnreadableError: one is no mathematics.
    """
    left, right = expression(gold), expression(answer)
    if left == right:
        return True
    if getattr(left, "is_Matrix", False) and getattr(right, "is_Matrix", False):
        return left.shape == right.shape and all(itertools.starmap(_same_at_points, zip(left, right, strict=True)))
    decimals = [(parse_number(text), other) for text, other in ((gold, right), (answer, left))]
    for decimal, other in decimals:
        if decimal is not None and not other.free_symbols:
            exact = _number_at(other, _imaginary())
            if exact is not None and not exact.imag and _rounds_to(exact.real, decimal, policies):
                return True
    return _same_at_points(left, right)


def _same_at_points(left: Any, right: Any) -> bool:
    verdicts = [_same_at(point, left, right) for point in _points(left, right)]
    return False not in verdicts and True in verdicts


def _same_at(point: dict[Any, Any], left: Any, right: Any) -> bool | None:
    """Whether both have one value there; ``None`` if both have none."""
    values = _number_at(left, point), _number_at(right, point)
    if None in values:
        return None if values == (None, None) else False
    if 0 in values and max(map(abs, values)) < NOISE:  # 1 - 1 as it was worked out, or really small
        return len(point) > 1 or bool((left - right).equals(0))
    if len(point) == 1 and 10**15 < abs(values[0]) < 10**MAX_DIGITS and _agree(*values):  # 100! + 1 is not 100!
        digits = 20 + len(str(int(abs(values[0]))))
        exact = [_number_at(side, point, digits) for side in (left, right)]
        return bool(abs(exact[0] - exact[1]) < 1)
    return _agree(*values)


def constant_ratio(left: str, right: str) -> Any:
    """What one expression of unknowns is times the other, wherever; ``None`` if that varies.

    Raises:
        UnreadableError: one is no mathematics.
    """
    above, below = expression(left), expression(right)
    values = [(_number_at(above, point), _number_at(below, point)) for point in _points(above, below)]
    if len(values) < 2 or any(None in pair or 0 in pair for pair in values):
        return None
    ratios = [pair[0] / pair[1] for pair in values]
    return ratios[0] if all(_agree(ratio, ratios[0]) for ratio in ratios) else None


def constant(text: str) -> Any:
    """The value of an expression without unknowns, or ``None``.

    Raises:
        UnreadableError: it is no mathematics.
    """
    return _number_at(expression(text), _imaginary())


def _imaginary() -> dict[Any, Any]:
    import sympy

    return {sympy.Symbol("i"): sympy.I}


def _agree(left: Any, right: Any) -> bool:
    if math.inf in (abs(left), abs(right)):
        return bool(left == right)
    return left == right or abs(left - right) <= AGREEMENT * max(abs(left), abs(right))


def _points(left: Any, right: Any) -> Iterator[dict[Any, Any]]:
    """Values of the variables: none, if there are no variables."""
    import sympy

    names = sorted(left.free_symbols | right.free_symbols, key=str)
    for shift in range(4 if names else 1):
        values = [
            sympy.Rational(sympy.prime(7 + 4 * at + shift), -17 if shift == 2 else 23) for at in range(len(names))
        ]
        yield dict(zip(names, values, strict=True)) | _imaginary()


def _number_at(expression: Any, point: dict[Any, Any], digits: int = 40) -> Any:
    """The value as a complex of mpmath, ``None`` where there is none."""
    import mpmath

    try:
        value = expression.evalf(digits, subs=point)
        real, imaginary = value.as_real_imag()
        with mpmath.workdps(digits):
            return mpmath.mpc(real._to_mpmath(mpmath.mp.prec), imaginary._to_mpmath(mpmath.mp.prec))
    except (TypeError, ValueError, AttributeError, ArithmeticError, NotImplementedError):
        return None


@functools.lru_cache(maxsize=4096)
def expression(text: str) -> Any:
    """The text as a sympy expression.

    Raises:
        UnreadableError: it is none.
    """
    if (number := parse_number(text)) is not None:
        import sympy

        return sympy.Rational(number.numerator, number.denominator)
    if re.search(r"(?<![\^_\d])\d+\s+\d", text) or not text:  # to the parser "1 2" is 3
        raise UnreadableError(text)
    for _ in range(3):  # what one match holds is not looked through
        text = _PRODUCT.sub(r"\g<0>\\cdot ", text)
    parser, rules, conversion = _parser()
    try:
        expression = parser(text, normalization_config=rules, conversion_config=conversion)
        if not has_matrix(text):
            return expression
        expression = expression.doit()
        return expression.as_explicit() if hasattr(expression, "as_explicit") else expression  # x times a matrix
    except Exception as error:  # the parser raises Exception itself
        raise UnreadableError(text) from error


@functools.cache
def _parser() -> tuple[Any, Any, Any]:
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy

    rules = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    return latex2sympy, rules, ConversionConfig(lowercase_symbols=False, interpret_as_mixed_fractions=False)
