r"""Final answers of mathematical responses: find the answer in a text, decide whether two answers are equal.

Finding (first rule that applies): the last ``\boxed{...}``; the line after the last ``####``; what follows the
last "answer is" or "answer:"; the last number or formula of the text. A box that is never closed means that the
response was cut off: there is no answer, whatever numbers stand before it.

Comparing: numbers as exact fractions, words as words, all else by the ``math-verify`` library (sympy). Policies
are explicit and strict unless asked otherwise, since a verifier that forgives too much trains wrong answers:

- ``percent``: ``off`` (a percent sign stands on both sides or on none), ``ignore`` (the sign is dropped),
  ``value`` (50% is 0.5). Never is x taken for x/100 or 100x without a percent sign.
- ``units``: ``off`` (unit words are part of the answer), ``ignore`` (unit words after a value are dropped).
- A currency or degree sign is never part of a number.

``math-verify`` imports sympy (a second) and may run for ever on hostile input (``10^{10^{10}}``); it is imported on
first need, its own signal-based limits are off, and the limit is that of the worker pool in ``scoring.py``.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from fractions import Fraction
from typing import Any, Literal

PercentPolicy = Literal["off", "ignore", "value"]
UnitPolicy = Literal["off", "ignore"]

MAX_ANSWER_CHARS = 400  # longer "answers" are not parsed
NON_TERMINATING_TOLERANCE = 2e-6  # 0.333333 for 1/3
SYMBOLIC_TOLERANCE = 1e-5  # guards math-verify's rounding to 6 decimals, under which 1e-8 equals 2e-8

_ONLY_WORDS = re.compile(r"[A-Za-z\s.,;:'*]*")
_BOX = re.compile(r"\\(?:boxed|fbox)\b")
_UNBRACED_BOX = re.compile(r"\s*([^\s{}$\\.,;]+)")
_ANCHOR = re.compile(r"\banswer\b(?:\s+(?:is|equals)\b|\s*[:=])(?P<tail>[^\n]*)", re.IGNORECASE)
_MAX_ANCHOR_FILLER = 40
# Every span is bounded and every repetition unambiguous: no response may make the search take more than a moment.
_MATH_SPAN = (
    r"\$\$(?P<display>[^$]{1,400})\$\$|\\\((?P<paren>.{1,400}?)\\\)|\\\[(?P<bracket>.{1,400}?)\\\]|"
    r"(?<![\\\d$])\$(?P<inline>[\d\s.,+\-*/()]{1,400}+|(?=[^$\n]{0,400}?[\\^_={])[^$\n]{1,400}+)(?<!\\)\$(?!\d)"
)
# at most three digits of exponent: 1e999999 must not become a million digits
_MAGNITUDE = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}(?![\w.]))?"
_TOKEN = re.compile(
    rf"{_MATH_SPAN}|(?P<frac>-?(?:(?<![\w.])\d+\s?)?\\[dt]?frac\s?(?:\{{[^{{}}]+\}}|\d)\s?(?:\{{[^{{}}]+\}}|\d(?!\d)))|"
    rf"(?<![A-Za-z_^\\{{}}\d.])(?P<sign>(?<![\w)\]}}%.,])[-\u2212])?(?:\\?[$\u20ac\u00a3\u00a5]\s?)?(?P<sign2>-(?=\d))?"
    rf"(?P<number>(?>{_MAGNITUDE}(?:/\d+(?![\d/]))?))(?P<percent>\s?\\?%)?(?!(?:st|nd|rd|th)\b)",
    re.DOTALL,
)

_NUMBER = re.compile(rf"[+-]?(?:{_MAGNITUDE}|\d+\.)")
_SCIENTIFIC = re.compile(r"(?P<mantissa>[+-]?[\d.]+)(?:\\times|\\cdot|\*)10(?:\^|\*\*)\{?(?P<exponent>[+-]?\d{1,3})\}?")
_RATIO = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>\d+(?=\\frac|\s\d+/))?\s?(?:\\frac\{?(?P<p>-?\d+?)\}?\{?(?P<q>\d+)\}?|(?P<n>\d+)/(?P<d>\d+))"
)
_SIMPLE_FRAC = re.compile(r"\\frac(?:\{-?\d+\}\{\d+\}|\d\{\d+\}|\d\d|\{-?\d+\}\d)")

_TEXT_WRAPPER = re.compile(r"\\(?:text|mbox|mathrm|textbf|textit|textrm|mathbf|operatorname|mathit)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[!,;: ]|\\q?quad\b|~|\\displaystyle\b|\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])")
_UNIT_TAIL = re.compile(
    r"(?<=[\d})])\s*(?:\\text\{[^{}]*\}|(?<![\\A-Za-z])[A-Za-z]{2,}\.?(?:\s+[A-Za-z]+\.?)*)(?:\^\{?\d\}?)?$"
)
_DEGREES = re.compile(r"\^\{?\\circ\}?|\u00b0|\\degree\b")
_WORDS = re.compile(r"[A-Za-z][A-Za-z .'\-]*")
_BASE = re.compile(r"[\dA-Za-z]+_\{?(\d+)\}?")
_UNICODE = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u00a0": " ",
        "\u202f": " ",
        "\u00d7": r"\times ",
        "\u03c0": r"\pi ",
        "\u221e": r"\infty ",
        "\uff0c": ",",
    }
)


def extract_answer(text: str) -> str | None:
    """The final answer of ``text`` as written there, or ``None`` when there is none (or its box was cut off)."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed or None
    if "####" in text:
        return _marked_answer(text.rsplit("####", 1)[1])
    anchors = list(_ANCHOR.finditer(text))
    if anchors:
        answer = _anchored_answer(anchors[-1]["tail"])
        if answer is not None:
            return answer
    tokens = _tokens(text)
    return tokens[-1] if tokens else None


def last_boxed(text: str) -> str | None:
    r"""Content of the last non-empty ``\boxed{}``; "" when the last box is not closed; ``None`` without a box."""
    for box in reversed(list(_BOX.finditer(text))):
        start = box.end()
        brace = text[start:].lstrip()[:1]
        if brace != "{":
            unbraced = _UNBRACED_BOX.match(text, start)
            if unbraced:
                return unbraced[1]
            continue
        start = text.index("{", start) + 1
        end = _closing_brace(text, start)
        if end is None:
            return ""
        if text[start:end].strip():
            return text[start:end].strip()
    return None


def _closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the one before ``start``; escaped braces do not count."""
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None


def _marked_answer(tail: str) -> str | None:
    """The line after ``####``, or its number where only words surround it: "#### 18 dollars" says 18."""
    lines = tail.strip().splitlines()
    if not lines or not lines[0].strip():
        return None
    line = lines[0].strip()
    tokens = _matches(line)
    if len(tokens) == 1 and _ONLY_WORDS.fullmatch(line[: tokens[0].start()] + line[tokens[0].end() :]):
        return _token_text(tokens[0])
    return line


def _anchored_answer(tail: str) -> str | None:
    """What "the answer is" introduces: a number or formula close by (after the last "=" if any), or a few words."""
    tokens = _matches(tail)
    if tokens:
        filler = tail[: tokens[0].start()]
        if len(filler) > _MAX_ANCHOR_FILLER or re.search(r"\bnot\b", filler):
            return None
        sentence = re.split(r"(?<=[^\d\s])\.\s|\.\s+(?=[A-Z])", tail)[0]
        within = _tokens(sentence) or [_token_text(tokens[0])]
        return within[-1] if "=" in sentence else within[0]
    words = tail.strip(" .*:!\t")
    return words if 0 < len(words) <= _MAX_ANCHOR_FILLER else None


def _tokens(text: str) -> list[str]:
    return [_token_text(match) for match in _matches(text.replace("{,}", ","))]


def _matches(text: str) -> list[re.Match[str]]:
    """Numbers and formulas of ``text``; empty ones ("$ $") say nothing."""
    return [match for match in _TOKEN.finditer(text) if _token_text(match)]


def _token_text(match: re.Match[str]) -> str:
    for span in ("display", "paren", "bracket", "inline", "frac"):
        if match[span] is not None:
            return match[span].strip().rstrip(".,;")
    sign = "-" if match["sign"] or match["sign2"] else ""
    return sign + match["number"] + ("%" if match["percent"] else "")


def same_answer(gold: str, answer: str, percent: PercentPolicy = "off", units: UnitPolicy = "off") -> bool | None:
    """Whether two answers are equal under the policies; ``None`` when ``answer`` cannot be read as mathematics."""
    if len(answer) > MAX_ANSWER_CHARS and answer.strip() != gold.strip():
        return None
    left, right = _normalize(gold, units), _normalize(answer, units)
    left, right = _unwrap_assignment(left, right)
    left_percent, right_percent = left.endswith("%"), right.endswith("%")
    left, right = left.rstrip("% "), right.rstrip("% ")
    if not right:
        return None
    if percent == "off" and left_percent != right_percent:
        return False
    as_value = percent == "value" and left_percent != right_percent
    if as_value:
        left = f"({left})/100" if left_percent else left
        right = f"({right})/100" if right_percent else right
    elif _key(left) == _key(right):
        return True
    left_number, right_number = parse_number(left), parse_number(right)
    if left_number is not None and right_number is not None:
        return _same_number(left_number, right_number)
    if _is_words(left) or _is_words(right):
        return _plain_words(left) == _plain_words(right)
    if _base_of(left) != _base_of(right):
        return False
    return _same_expression(left, right)


def _normalize(answer: str, units: UnitPolicy) -> str:
    """One spelling for what is only presentation: delimiters, spacing, fraction variants, currency, unicode."""
    text = answer.translate(_UNICODE).strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            text = text[len(opening) : -len(closing)].strip()
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = text.replace("{,}", ",").replace(r"\%", "%")
    text = _SPACING.sub(lambda m: "" if m[0] in (r"\!", r"\,") or m[0][1:2].isalpha() else " ", text)
    text = _TEXT_WRAPPER.sub(lambda m: rf"\text{{{m[1].strip()}}}", text)
    text = re.sub(r"\\?[$\u20ac\u00a3\u00a5]", "", text)
    text = re.sub(r"(?<=\d),\s+(?=\d{3}\b)", ",", text) if r",\!" in answer else text
    text = text.strip().rstrip(".,;").strip()
    text = _DEGREES.sub("", text)
    return _UNIT_TAIL.sub("", text).strip() if units == "ignore" else text.strip()


def _unwrap_assignment(gold: str, answer: str) -> tuple[str, str]:
    """``x = 5`` answers ``5`` and the reverse; two equations are left alone."""
    if answer.count("=") and "=" not in gold and not re.search(r"[<>!\\]=|\\[lg]eq?", answer):
        answer = answer.rsplit("=", 1)[1].strip()
    elif "=" not in answer and re.match(r"[A-Za-z](?:_\{?\w+\}?)?\s*=[^=]*$", gold):
        gold = gold.split("=", 1)[1].strip()
    return gold, answer


def _key(text: str) -> str:
    """Spelling without spaces and braces around single characters, for the equality that needs no parsing."""
    key = re.sub(r"\s+", "", text)
    return re.sub(r"\{(\w)\}", r"\1", key)


def parse_number(text: str) -> Fraction | None:
    """An integer, decimal, ``a/b``, ``\\frac{a}{b}``, mixed number or ``a \\times 10^b`` as an exact fraction."""
    value, divisor = text.strip(), 1
    if value.startswith("(") and value.endswith(")/100"):
        value, divisor = value[1:-5], 100
    for read in (_decimal, _scientific, _ratio):
        number = read(value)
        if number is not None:
            return number / divisor
    return None


def _decimal(text: str) -> Fraction | None:
    return Fraction(text.replace(",", "").rstrip(".")) if _NUMBER.fullmatch(text) else None


def _scientific(text: str) -> Fraction | None:
    match = _SCIENTIFIC.fullmatch(re.sub(r"\s+", "", text))
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
    parsed_gold, parsed_answer = parse(gold), parse(answer)
    if not parsed_answer:
        return None
    if not parsed_gold or not verify(parsed_gold, parsed_answer):
        return False
    values = _numeric_value(parsed_gold[0]), _numeric_value(parsed_answer[0])
    if values[0] is None or values[1] is None:
        return True
    return abs(values[0] - values[1]) <= SYMBOLIC_TOLERANCE * max(abs(values[0]), abs(values[1]))


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
