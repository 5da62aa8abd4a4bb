r"""One spelling for answers that say the same: unicode and plain text become LaTeX, presentation goes away.

``plain_latex`` turns what stands outside of ASCII into LaTeX; ``one_spelling`` takes delimiters, spacing, sizes and
currency signs from an answer and writes fractions, lists and infinity in one way; ``parse_number`` reads a number
exactly.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Literal

DecimalPolicy = Literal["point", "comma", "either"]

MULTIPLIERS = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SPACES = " \u00a0\u2009\u202f"
# at most three digits of exponent: 1e999999 must not become a million digits
MAGNITUDE = (
    rf"(?:(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d{{1,3}}(?:[{SPACES}]\d{{3}})+(?![\d/])|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][+-]?\d{1,3}(?![\w.]))?"
)
LIST_WORD = r"\\text\{\s*,?\s*(?:or|and)\s*\}|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])|\\lor(?![A-Za-z])"
OUTSIDE_PERCENT = "{}%"  # how a percent sign is spelled that stands after a box or formula, not in it
DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))

_LATEX = (
    r"× \times, · \cdot, ⋅ \cdot, ± \pm, ∓ \mp, ∞ \infty, ≤ \le, ≥ \ge, ⩽ \le, ⩾ \ge, ≠ \ne, ≈ \approx, ≡ \equiv, "
    r"∈ \in, ∪ \cup, ∩ \cap, ∅ \emptyset, ∨ \lor, ° ^\circ, ⌊ \lfloor, ⌋ \rfloor, ⌈ \lceil, ⌉ \rceil, ℝ \mathbb{R}, "
    r"ℤ \mathbb{Z}, ℚ \mathbb{Q}, λ \lambda, ∑ \sum, ∏ \prod, ∫ \int, → \to, ∠ \angle, △ \triangle"
)
_ASCII = "− - – - ÷ / ⁄ / ∕ / ⟨ ( ⟩ ) ′ ' ’ ' 、 ,".split()
_SIGNS = (
    {
        chr(code): f"\\{unicodedata.name(chr(code)).split()[-1].lower()} "
        for code in range(0x3B1, 0x3CA)
        if code != 0x3C2
    }
    | {sign: command + " " for sign, command in (pair.split(" ") for pair in _LATEX.split(", "))}
    | dict(zip(_ASCII[::2], _ASCII[1::2], strict=False))
    | dict.fromkeys("\u00a0\u2009\u202f", " ")
)
_SIGN = re.compile(f"([{''.join(_SIGNS)}]) ?")
_COMPATIBLE = re.compile("[\uff01-\uff5e\U0001d400-\U0001d7ff\u2103]")  # full width, mathematical alphabets
_SUPERSCRIPTS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207f", "0123456789+-n"
)
_FRACTIONS = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_ROOTS = {"\u221a": r"\sqrt", "\u221b": r"\sqrt[3]", "\u221c": r"\sqrt[4]"}
_ROOT = re.compile(r"([\u221a-\u221c])\s?(?:(\d+(?:\.\d+)?|[A-Za-z\u03c0])|\(([^()]*)\)|\{([^{}]*)\})")
_EUROS = re.compile(  # cents after a comma: "1.234,50 €"
    r"(?:(?<=€)|(?<=€ )|(?<=EUR )|(?<![\d.,])(?=[\d.]+,\d\d(?:\s|\\[,;]|\\text\{)*(?:€|\\euro|euros?\b|EUR\b)))"
    r"(\d{1,3}(?:\.\d{3})+|\d+),(\d\d)(?!\d)"
)

_FUNCTIONS = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp|lg|gcd|lcm|max|min|det"
_LAYOUT = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|limits)(?![A-Za-z])|(?<!\\)\\!")
_SPACING = re.compile(r"(?<!\\)\\[,;:> ]|\\q?quad|(?<!\\)~")
_TEXT_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mbox|hbox|math(?:rm|bf|it|sf)|bm|bold(?:symbol)?|vec|operatorname\*?)\s*\{([^{}]*)\}"
)
_BRACED = r"\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}"
_BOLD = re.compile(rf"\\(?:mathbf|bm|bold(?:symbol)?)\s*{_BRACED}")
_DEGREES = re.compile(  # 30 degrees are no number of their own, but their sine is
    r"(?<![A-Za-z])(\\?(?:sin|cos|tan|cot|sec|csc)(?:\s*\^\s*\{?\d\}?)?)\s*([({]\s*)?(-?\d+(?:\.\d+)?)\s*"
    r"(?:\^\{?\s*\\circ\s*\}?|\\degree\b)(?(2)\s*[)}])"
)
_TWICE_ESCAPED = re.compile(r"\\\\(?=begin\b)|\A(?!.*\\begin\b).*\\\\[A-Za-z]", re.DOTALL)
_INFINITY = re.compile(
    r"(?:\+\s*|(?P<sign>-\s*)|\b(?:positive|plus) |\b(?P<word>negative|minus) )?"
    r"(?:\\infty|(?<![A-Za-z\\])(?:[iI]nf(?:inity|ty)?|oo))(?![A-Za-z])"
)
_PERCENT = re.compile(r"(?<=[\d)}])\s*(?:\\text\{\s*)?(?:per ?cent(?:age)?|pct)(?![A-Za-z])\.?\s*\}?|\\%")
_NOTED = re.compile(r"\s*\(\s*(?:(\\?%|per ?cent|pct)|\\?[$\u20ac\u00a3\u00a5])\s*\)")  # 9 (%), 9 ($)
_HALF_DAY = re.compile(r"(?<=:\d\d)([$}]?(?:\\\))?)\s?(\(?\s?(?:\\text\{\s?)?)([ap])\.?\s?m\b\.?", re.IGNORECASE)
_PERCENT_AFTER = re.compile(r"\s?(?:\$|\\[)\]])?\s?(?:\\?%|(?:\\text\{\s*)?(?:per ?cent(?:age)?|pct)\b)")
_HALF_DAY_AFTER = re.compile(r"(?:(?<=:\d\d)|(?<=:\d\d[$}]))\s?(?:\\text\{\s?)?([ap]m)\b")
_DROPPED = re.compile(r"\\pmod\s*\{?\w+\}?|\(\\?(?:text\{)?mod\}? ?\d+\)|\^\{?\s*\\circ\s*\}?|\\degree\b|\u00b0")


def plain_latex(text: str) -> str:
    r"""LaTeX for what stands outside of ASCII: ``5\u00bd`` is ``5\frac{1}{2}``. Cents of euros follow a point."""
    text = _HALF_DAY.sub(lambda m: f"{m[1]} {m[2]}{m[3].lower()}m", text)
    text = _EUROS.sub(lambda m: f"{m[1].replace('.', '')}.{m[2]}", text)
    if text.isascii():
        return text
    text = _COMPATIBLE.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text)
    text = re.sub(
        "[\u2070\u00b9\u00b2\u00b3\u2074-\u207b\u207f]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text
    )
    text = re.sub("[\u2080-\u2089]+", lambda m: f"_{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    text = _FRACTIONS.sub(
        lambda m: re.sub("(.+)\u2044(.+)", r"\\frac{\1}{\2}", unicodedata.normalize("NFKC", m[0])), text
    )
    text = re.sub(r"\^(\\frac\{\d+\}\{\d+\})", r"^{\1}", text)
    text = _ROOT.sub(lambda m: f"{_ROOTS[m[1]]}{{{m[2] or m[3] or m[4]}}}", text)
    return _SIGN.sub(lambda m: _SIGNS[m[1]].rstrip() + (m[0][1:] if m[1] in _ASCII else " "), text)


def with_sign_after(value: str, text: str, end: int) -> tuple[str, int]:
    """``value`` with a percent sign or "p.m." that stands outside of its box or formula, which ends at ``end``."""
    if (percent := _PERCENT_AFTER.match(text, end)) and "%" not in value[-1:]:
        return value + OUTSIDE_PERCENT, percent.end()
    half = _HALF_DAY_AFTER.match(text, end)
    return (f"{value} ({half[1]})", half.end()) if half else (value, end)


def without_delimiters(text: str) -> str:
    """``text`` without the signs of mathematics (or of bold type) around the whole of it."""
    text = text.strip()
    for opening, closing in DELIMITERS:
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            text = text[len(opening) : -len(closing)].strip()
    return text


def one_spelling(answer: str, decimal: DecimalPolicy = "point") -> str:
    """One spelling for what is only presentation; numbers get a decimal point as ``decimal`` says."""
    text = without_delimiters(plain_latex(answer))
    if _TWICE_ESCAPED.search(text):
        text = text.replace("\\\\", "\\")
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", re.sub(r",\\!\s*|\{,\}", ",", text))
    text = _SPACING.sub(" ", _LAYOUT.sub("", text))
    text = _BOLD.sub(lambda m: m[0] if re.fullmatch(r"[A-Za-z\s]*", m[1]) else m[1], text)
    text = _DEGREES.sub(r"\1(\\frac{\3\\pi}{180})", text)
    text = (
        _TEXT_WRAPPER.sub(_text, text).replace(r"\varnothing", r"\emptyset").replace(r"\mathbb{R}", r"(-\infty,\infty)")
    )
    text = _NOTED.sub(lambda m: OUTSIDE_PERCENT if m[1] else "", re.sub(r"^\s*(?:=|\\approx)", "", text))
    text = re.sub(r"\\?[$\u20ac\u00a3\u00a5]|\\(?:euro|pounds)\b|\\\\?$", "", text)
    text = re.sub(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d/])", lambda m: m[0].replace(" ", ""), text)
    text = _DROPPED.sub("", _PERCENT.sub("%", text))
    text = _INFINITY.sub(lambda m: r"-\infty" if m["sign"] or m["word"] else r"\infty", _from_plain_text(text))
    if re.search(r"[\d=\\]", text):
        text = re.sub(r",(?:\s*,)+", ",", re.sub(rf"\s*(?:{LIST_WORD})\s*", ", ", text))
    return _decimal_point(text.strip().rstrip(".,;").strip(), decimal)


def _text(match: re.Match[str]) -> str:
    content = match[1].strip()
    if re.fullmatch(_FUNCTIONS, content):
        return "\\" + content
    if re.fullmatch(r"(?:(?:positive|negative|plus|minus) )?[iI]nfinity", content):
        return content
    if not re.search("[A-Za-z]", content):
        return content
    letter = len(content) == 1 and re.match(r"\\(?:mathbf|bm|bold|vec)", match[0])
    return content if letter or (content in ("e", "i") and "math" in match[0]) else rf"\text{{{content}}}"


def _from_plain_text(text: str) -> str:
    """LaTeX for what people write without it: ``2 x 3``, ``2**3``, ``10^-5``, ``x^(1/2)``, ``sqrt(2)``, ``3pi``."""
    text = re.sub(r"(?<=\d)\s+[xX]\s+(?=\d)", r" \\times ", text)
    text = re.sub(r"(?<=[\w)])\*\*(?=[\w(-])", "^", text)
    text = re.sub(r"\^(-\d+)|\^\(([^()]*)\)", lambda m: f"^{{{m[1] or m[2]}}}", text)
    text = re.sub(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}", text)
    return re.sub(rf"(?<![\\A-Za-z])(pi(?![A-Za-z])|(?:{_FUNCTIONS})(?=\())", r"\\\1", text)


def _decimal_point(text: str, decimal: DecimalPolicy) -> str:
    if decimal == "comma":
        text = re.sub(r"(?<=\d)\.(?=\d{3}(?!\d))", "", text)
        return re.sub(r"(?<=\d),(?=\d)", ".", text)
    if decimal == "either" and text.count(",") == 1 and not re.search(r"[(\[]|\\\{", text):
        text = re.sub(r"(?<![\d.,])\d{1,3}(?:\.\d{3})+(?=,\d)", lambda m: m[0].replace(".", ""), text)
        return re.sub(r"(?<![\d.,])(0|\d+(?=,\d{1,2}(?!\d))|\d+(?=,\d{4})|\d{4,}),(?=\d+(?![\d,]))", r"\1.", text)
    return text


# --- numbers ----------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(rf"[+-]?(?:{MAGNITUDE}|\d+\.)")
_REPEATING = re.compile(r"(?P<sign>[+-]?)(?P<head>\d*\.(?P<fixed>\d*))\\(?:overline|bar|dot)\{?(?P<period>\d+)\}?")
_SCIENTIFIC = re.compile(
    r"(?P<mantissa>[+-]?[\d.]+)\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{?(?P<exponent>[+-]?\d{1,3})\}?"
)
_MULTIPLIED = re.compile(rf"(?P<count>.*\d)\s*(?:\\text\{{)?\b(?P<word>{'|'.join(MULTIPLIERS)})\}}?")
_RATIO = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>\d+(?=\\frac|\s\d+/))?\s?(?:\\frac\{?(?P<p>-?\d+?)\}?\{?(?P<q>\d+)\}?|(?P<n>\d+)/(?P<d>\d+))"
)
_SIMPLE_FRAC = re.compile(r"\\frac(?:\{-?\d+\}\{\d+\}|\d\{\d+\}|\d\d|\{-?\d+\}\d)")


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
    if _NUMBER.fullmatch(text):
        return Fraction(re.sub(rf"[,{SPACES}]", "", text).rstrip("."))
    if repeating := _REPEATING.fullmatch(text):
        head = Fraction(f"{repeating['head']}0")
        tail = Fraction(int(repeating["period"]), 10 ** len(repeating["period"]) - 1) / 10 ** len(repeating["fixed"])
        return -(head + tail) if repeating["sign"] == "-" else head + tail
    return None


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
