r"""Mathematical answers: decide whether two are equal. Finding them in responses: ``final_answers.py``.

Numbers are compared as exact fractions, words as words, all else by the ``math-verify`` library (sympy). Policies are
explicit and strict unless asked otherwise, since a verifier that forgives too much trains wrong answers:

- ``percent``: ``off`` (a percent sign, or the word, stands on both sides or on none), ``ignore`` (it is dropped),
  ``value`` (50% is 0.5). Never is x taken for x/100 or 100x without a percent sign.
- ``units``: ``off`` (unit words are part of the answer), ``ignore`` (words after a value are dropped unless they
  change it: "2 million", "5 or more"; of one and two letters only units: in "12 cm", not in "12ab").
- A currency or degree sign is never part of a number.
- ``x = 5`` answers ``5``, and ``x=3 or x=5`` answers ``3,5``; several names answer nothing but themselves.

``math-verify`` imports sympy (a second) and may run for ever on hostile input (``10^{10^{10}}``); it is imported on
first need, its own signal-based limits are off, and the limit is that of the worker pool in ``verifier_pool.py``.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from megatron_gft.errors import InputError
from megatron_gft.scoring.final_answers import MAGNITUDE, MULTIPLIERS, SPACES, without_delimiters

PercentPolicy = Literal["off", "ignore", "value"]
UnitPolicy = Literal["off", "ignore"]

MAX_ANSWER_CHARS = 400  # longer "answers" are not parsed
NON_TERMINATING_TOLERANCE = 2e-6  # 0.333333 for 1/3
SYMBOLIC_TOLERANCE = 1e-5  # guards math-verify's rounding to 6 decimals, under which 1e-8 equals 2e-8

_NUMBER = re.compile(rf"[+-]?(?:{MAGNITUDE}|\d+\.)")
_SCIENTIFIC = re.compile(
    r"(?P<mantissa>[+-]?[\d.]+)\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{?(?P<exponent>[+-]?\d{1,3})\}?"
)
_MULTIPLIED = re.compile(rf"(?P<count>.*\d)\s*(?:\\text\{{)?\b(?P<word>{'|'.join(MULTIPLIERS)})\}}?")
_RATIO = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>\d+(?=\\frac|\s\d+/))?\s?(?:\\frac\{?(?P<p>-?\d+?)\}?\{?(?P<q>\d+)\}?|(?P<n>\d+)/(?P<d>\d+))"
)
_SIMPLE_FRAC = re.compile(r"\\frac(?:\{-?\d+\}\{\d+\}|\d\{\d+\}|\d\d|\{-?\d+\}\d)")

_TEXT_WRAPPER = re.compile(r"\\(?:text|mbox|mathrm|textbf|textit|textrm|mathbf|operatorname|mathit)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[!,;: ]|\\q?quad\b|~|\\displaystyle\b|\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])")
_UNIT_TAIL = re.compile(
    r"(?<=[\d})])(?P<space>\s*+)(?:\\text\{(?P<text>[^{}]*+)\}|(?P<words>[A-Za-z][A-Za-z. ]*+))(?:\^\{?\d\}?)?$"
)
_SHORT_UNITS = frozenset(
    "mm cm dm m km in ft yd mi sq cu mg g kg lb oz t ml mL cl dl l L s sec min h hr hrs ms mph kph kWh kW W V A J N Pa "
    "Hz K C F of a an to".split()
)
_NO_UNITS = frozenset(  # words that make another value of the one before them
    "zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy "
    "eighty ninety dozen dozens half halves third thirds fourth fourths fifth fifths quarter quarters tenth tenths "
    "percent squared cubed factorial times plus minus over mod modulo and not more less least most fewer than about "
    "or sin cos tan cot csc arcsin arccos arctan log exp sqrt lim max gcd lcm pairs pair score".split()
) | {form for word in MULTIPLIERS for form in (word, word + "s")}
_LIST_WORD = re.compile(
    r"\s*(?:\\text\{\s*,?\s*(?:or|and)\s*\}|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])|\\lor(?![A-Za-z]))\s*"
)
_RELATION = re.compile(r"[<>]|\\(?:n?[lg]eq?|neq?|approx|sim|equiv)(?![A-Za-z])|[\u2260\u2264\u2265\u2248]")
_NAME = re.compile(r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_\{?\w+\}?)?'*(?:\(\w\))?|\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)")
_COMMAND_WORDS = re.compile(
    r"\\(?:d?frac|sqrt|times|cdot|div|pm|pi|text|left|right|infty|log|ln|sin|cos|tan)(?![A-Za-z])"
)
_CALCULATION_TOLERANCE = 0.01  # of "10/3 = 3.33", where the last side is the answer
_DEGREES = re.compile(r"\^\{?\\circ\}?|\u00b0|\\degree\b")
_WORDS = re.compile(r"[A-Za-z][A-Za-z .'\-]*")
_BASE = re.compile(r"[\dA-Za-z]+_\{?(\d+)\}?")
_UNICODE = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "\u00b7": r"\cdot ",
        "\u00f7": "/",
        "\u00d7": r"\times ",
        "\u03c0": r"\pi ",
        "\u221e": r"\infty ",
        "\uff0c": ",",
    }
)


class _Side(NamedTuple):
    """One of the two answers: its text without percent sign, and its value where that is a number."""

    text: str
    number: Fraction | None
    percent: bool

    @classmethod
    def read(cls, text: str) -> _Side:
        bare = text.rstrip("% ")
        return cls(bare, parse_number(bare), text.endswith("%"))

    def of_hundred(self) -> _Side:
        """The same as a share of one, if it has a percent sign."""
        if not self.percent:
            return self
        return _Side(f"({self.text})/100", None if self.number is None else self.number / 100, False)


def same_answer(gold: str, answer: str, percent: PercentPolicy = "off", units: UnitPolicy = "off") -> bool | None:
    """Whether two answers are equal under the policies; ``None`` when ``answer`` cannot be read as mathematics.

    Raises:
        InputError: ``gold`` cannot be read.
    """
    if len(answer) > MAX_ANSWER_CHARS and answer.strip() != gold.strip():
        return None
    left, right = map(_Side.read, _unwrap_assignment(_normalize(gold, units), _normalize(answer, units)))
    same_text = bool(left.text) and _key(left.text) == _key(right.text)
    if not (same_text or left.number is not None or _is_words(left.text) or _parsed_gold(left.text)):
        raise InputError(f"gold answer {gold!r} cannot be read as mathematics -> correct it, or use another verifier")
    if not right.text:
        return None
    if left.percent != right.percent:
        if percent == "off":
            return False
        if percent == "value":
            return _same_value(left.of_hundred(), right.of_hundred())
    return same_text or _same_value(left, right)


def _same_value(left: _Side, right: _Side) -> bool | None:
    """Equality of numbers, of words, or else of expressions; ``None`` when ``right`` cannot be read."""
    if left.number is not None and right.number is not None:
        return _same_number(left.number, right.number)
    if _is_words(left.text) or _is_words(right.text):
        return _plain_words(left.text) == _plain_words(right.text)
    if right.number is None and _is_ambiguous(right.text):
        return None
    if any(form(left.text) != form(right.text) for form in (_base_of, _equations)):
        return False
    return False if _is_tuple_and_set(left.text, right.text) else _same_expression(left.text, right.text)


def _normalize(answer: str, units: UnitPolicy) -> str:
    """One spelling for what is only presentation: delimiters, spacing, fraction variants, currency, unicode."""
    text = without_delimiters(answer.translate(_UNICODE))
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = text.replace("{,}", ",").replace(r"\%", "%")
    text = _SPACING.sub(
        lambda m: "" if m[0] == r"\!" or re.match(r"\\(?:left|right|big|dis)", m[0], re.I) else " ", text
    )
    text = _TEXT_WRAPPER.sub(lambda m: rf"\text{{{m[1].strip()}}}", text)
    text = re.sub(r"\\?[$\u20ac\u00a3\u00a5]", "", text)
    text = re.sub(r"(?<=\d),\s+(?=\d{3}\b)", ",", text) if r",\!" in answer else text
    text = re.sub(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d/])", lambda m: m[0].replace(" ", ""), text)
    text = re.sub(r"(?<=[\d)}])\s*(?:\\text\{)?per ?cent\b\}?", "%", text)
    text = _from_plain_text(text)
    if re.search(r"[\d=]", text):
        text = re.sub(r",(?:\s*,)+", ",", _LIST_WORD.sub(", ", text))
    text = text.strip().rstrip(".,;").strip()
    text = _DEGREES.sub("", text)
    return _without_unit(text) if units == "ignore" else text.strip()


def _from_plain_text(text: str) -> str:
    """LaTeX for what people write without it: ``2 x 3``, ``2**3``, ``10^-5``, ``x^(1/2)``, ``sqrt(2)``, ``3pi``."""
    text = re.sub(r"(?<=\d)\s+[xX]\s+(?=\d)", r" \\times ", text)
    text = re.sub(r"(?<=[\w)])\*\*(?=[\w(-])", "^", text)
    text = re.sub(r"\^(-\d+)|\^\(([^()]*)\)", lambda m: f"^{{{m[1] or m[2]}}}", text)
    text = re.sub(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}", text)
    return re.sub(r"(?<![\\A-Za-z])(pi(?![A-Za-z])|(?:sin|cos|tan|log|ln|exp)(?=\())", r"\\\1", text)


def _without_unit(text: str) -> str:
    tail = _UNIT_TAIL.search(text)
    if not tail:
        return text.strip()
    words = re.findall("[A-Za-z]+", tail["text"] or tail["words"] or "")
    if tail["words"] and not tail["space"] and (len(words) > 1 or len(words[0]) < 2 or words[0] not in _SHORT_UNITS):
        return text.strip()  # 2k, 12ab, 3pi
    if all(word in _SHORT_UNITS or (len(word) > 2 and word.lower() not in _NO_UNITS) for word in words):
        return text[: tail.start()].strip()
    return text.strip()


def _unwrap_assignment(gold: str, answer: str) -> tuple[str, str]:
    """``x = 5`` answers ``5`` and the reverse; two equations are left alone."""
    if "=" in answer and "=" not in gold:
        return gold, _assigned(answer) or answer
    if "=" in gold and "=" not in answer and all(_NAME.fullmatch(part.split("=")[0].strip()) for part in _parts(gold)):
        return _assigned(gold) or gold, answer
    return gold, answer


def _assigned(text: str) -> str | None:
    """The values that ``text`` gives to one name (``x=3, x=5``); ``None`` if that is not what it does."""
    if _RELATION.search(text):
        return None
    values: list[str] = []
    names: set[str] = set()
    for part in _parts(text):
        *names_and_steps, value = (side.strip() for side in part.split("="))
        values.append(value)
        if not names_and_steps and not names:
            return None
        for side in names_and_steps:
            if not re.search("[A-Za-z]", _COMMAND_WORDS.sub("", side)):
                if not _comes_to(side, value):
                    return None
            elif value == "0" and not _NAME.fullmatch(side):
                return None  # an equation
            else:
                names.add(_key(side))
    return ", ".join(values) if len(names) <= 1 and all(values) else None


def _comes_to(calculation: str, value: str) -> bool:
    """Whether ``calculation`` has about the value that stands behind its "="."""
    numbers = [
        _numeric_value(parsed[0]) if (parsed := _math_verify()[0](side)) else None for side in (calculation, value)
    ]
    if numbers[0] is None or numbers[1] is None:
        return False
    return abs(numbers[0] - numbers[1]) <= _CALCULATION_TOLERANCE * abs(numbers[1])


def _parts(text: str) -> list[str]:
    """The items of a list: between commas outside of brackets; those of thousands (1,000) part nothing."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0 and not re.match(r",\d{3}(?!\d)", text[position : position + 5]):
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]]


def _equations(text: str) -> bool:
    return "=" in re.sub(r"[<>!]=", "", text)


def _is_ambiguous(text: str) -> bool:
    """What the parser misreads ("1 2" is 3 to sympy), or may brood over.

    That is when not as many brackets close as open, of whatever kind: ``(3,4]`` is an interval.
    """
    return bool(re.search(r"\d\s+\d", text)) or sum(map(text.count, "([")) != sum(map(text.count, ")]"))


def _is_tuple_and_set(left: str, right: str) -> bool:
    """One is ``(1,2)`` and the other ``\\{1,2\\}``: math-verify takes an open interval for the set of its ends."""
    return any(a.startswith("(") and a.endswith(")") and b.startswith(r"\{") for a, b in ((left, right), (right, left)))


def _key(text: str) -> str:
    """Spelling without needless spaces and braces, for the equality that needs no parsing; "1 2" is not "12"."""
    key = re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text)
    return re.sub(r"\{(\w)\}", r"\1", key)


def parse_number(text: str) -> Fraction | None:
    """An integer, decimal, fraction, mixed number, ``a \\times 10^b`` or ``2 million`` as an exact fraction."""
    text = text.strip()
    if multiplied := _MULTIPLIED.fullmatch(text):
        number = parse_number(multiplied["count"])
        return None if number is None else number * MULTIPLIERS[multiplied["word"]]
    for read in (_decimal, _scientific, _ratio):
        number = read(text)
        if number is not None:
            return number
    return None


def _decimal(text: str) -> Fraction | None:
    return Fraction(re.sub(rf"[,{SPACES}]", "", text).rstrip(".")) if _NUMBER.fullmatch(text) else None


def _scientific(text: str) -> Fraction | None:
    match = _SCIENTIFIC.fullmatch(text)
    mantissa = _decimal(match["mantissa"]) if match else None
    return mantissa * Fraction(10) ** int(match["exponent"]) if match and mantissa is not None else None


def _ratio(text: str) -> Fraction | None:
    compact = re.sub(r"\s*(\\frac|[{}/])\s*", r"\1", text)
    compact = re.sub(r"(\\frac)\s*(\d)\s*(\d)$", r"\1{\2}{\3}", compact)
    match = _RATIO.fullmatch(compact)
    if not match or ("\\frac" in compact and not _SIMPLE_FRAC.search(compact)):
        return None
    top, bottom = int(match["p"] or match["n"]), int(match["q"] or match["d"])
    if bottom == 0 or (match["whole"] and top < 0):
        return None
    value = Fraction(top, bottom) + int(match["whole"] or 0)
    return -value if match["sign"] == "-" else value


def _same_number(left: Fraction, right: Fraction) -> bool:
    """Exact; a decimal may stand for a fraction without an end (1/3) at six digits."""
    if left == right or (_terminates(left) and _terminates(right)):
        return left == right
    return math.isclose(left, right, rel_tol=NON_TERMINATING_TOLERANCE) and not (
        _terminates(left) == _terminates(right)
    )


def _terminates(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _is_words(text: str) -> bool:
    """Words, not a formula: set in ``\\text`` or three letters and more."""
    plain = _plain_words(text)
    return bool(_WORDS.fullmatch(plain)) and (r"\text" in text or len(plain) > 2)


def _plain_words(text: str) -> str:
    plain = _TEXT_WRAPPER.sub(r"\1", text).strip()
    if re.fullmatch(r"\(([A-Za-z])\)", plain):
        plain = plain[1:-1]
    return re.sub(r"\s+", " ", plain).casefold()


def _base_of(text: str) -> str | None:
    """The subscript of a number written in a base (``52_8``)."""
    match = _BASE.fullmatch(text.strip())
    return match[1] if match and text.strip()[0].isdigit() else None


def _same_expression(gold: str, answer: str) -> bool | None:
    """The verdict of ``math-verify``, with a relative tolerance on top of its absolute rounding."""
    parse, verify = _math_verify()
    parsed_gold, parsed_answer = _parsed_gold(gold), parse(answer)
    if not parsed_answer:
        return None
    if not parsed_gold or not verify(parsed_gold, parsed_answer):
        return False
    values = _numeric_value(parsed_gold[0]), _numeric_value(parsed_answer[0])
    if values[0] is None or values[1] is None:
        return True
    return abs(values[0] - values[1]) <= SYMBOLIC_TOLERANCE * max(abs(values[0]), abs(values[1]))


@functools.lru_cache(maxsize=1024)  # responses of a group have one gold answer
def _parsed_gold(gold: str) -> list[Any]:
    return _math_verify()[0](gold)


def _numeric_value(expression: Any) -> complex | None:
    try:
        return complex(expression.evalf(20))
    except (TypeError, ValueError, AttributeError, OverflowError):
        return None


@functools.cache
def _math_verify() -> tuple[Any, Any]:
    """``parse(text)`` and ``verify(gold, answer)`` of the library, without its timeouts and warnings."""
    import math_verify
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    rules = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    extraction = [math_verify.LatexExtractionConfig(boxed_match_priority=-1, normalization_config=rules)]

    def parse(text: str) -> list[Any]:
        return math_verify.parse(f"${text}$", extraction, fallback_mode="no_fallback", parsing_timeout=None)

    def verify(gold: list[Any], answer: list[Any]) -> bool:
        return bool(math_verify.verify(gold, answer, timeout_seconds=None))

    return parse, verify


def warm_up() -> None:
    """Import and exercise sympy, so that the first real answer does not pay for it."""
    same_answer(r"\sqrt{2}", r"2^{1/2}")
