r"""The structure of an answer: a list, tuple, interval, union, matrix, ratio, equation or inequality of other forms.

``read_form`` reads an answer in the spelling of ``spelling.py``; its values, the atoms, stay texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from megatron_gft.scoring.spelling import parse_number

MAX_DEPTH = 12  # of brackets within brackets


class Form(NamedTuple):
    """``kind``: atom, list (any order), set, two brackets, union, matrix with its shape, ratio, ``=``, ``<``, ..."""

    kind: str
    text: str
    parts: tuple[Form, ...] = ()


class UnreadableError(ValueError):
    """A text that is no mathematics."""


_LISTED = r",(?!(?<=\d,)\d{3}(?!\d))"
_OPERATORS = {
    "<": "<", ">": ">", "<=": "<=", ">=": ">=", "=": "=", "!=": "!=", "lt": "<", "gt": ">", "le": "<=", "leq": "<=",
    "leqslant": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=", "ne": "!=", "neq": "!=", "approx": "~", "in": "in",
    "equiv": "=",
}  # fmt: skip
_RELATION = r"[<>]=|(?<![\w)}])!=|[<>=]|\\(?:lt|gt|leq?(?:slant)?|geq?(?:slant)?|neq?|approx|in|equiv)(?![A-Za-z])"
_LEVELS = ("relation", _RELATION), ("union", r"\\cup(?![A-Za-z])"), ("ratio", ":")
_MATRIX = re.compile(r"\(?\\begin\{([pbB]?(?:small)?matrix|array|cases)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}\)?", re.DOTALL)
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_NAME = re.compile(
    r"(?!\\(?:sin|cos|tan|cot|sec|csc|log|ln))(?:[A-Za-z]|\\[A-Za-z]+)(?:_\{?\w+\}?)?'*(?:\(\w\))?"
    r"|\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)"
)
RELATIONS = frozenset(("=", "<", "<=", "!=", "~"))
_DISTANCE = re.compile(  # of x from a number
    r"\|\s*([A-Za-z])\s*(?:([-+])\s*(\d+(?:[./]\d+)?|\\frac\{?\d+\}?\{?\d+\}?))?\s*\|"
)
_SEGMENTS = re.compile(r"[A-Z]{1,8}")  # AB, and what stands for |AB|, AB:CD or \frac{AB}{CD}


def _split(text: str, separator: str) -> list[str]:
    """Pieces of ``text`` outside of brackets, with the separators between them.

    Raises:
        UnreadableError: not as many brackets close as open.
    """
    pieces, depth, start = [], 0, 0
    for match in re.finditer(rf"(?P<open>\\begin|[(\[{{])|(?P<close>\\end|[)\]}}])|{separator}", text):
        if match["open"]:
            depth += 1
        elif match["close"]:
            depth -= 1
            if depth < 0:
                break
        elif depth == 0:
            pieces += [text[start : match.start()].strip(), match[0]]
            start = match.end()
    if depth:
        raise UnreadableError(text)
    return [*pieces, text[start:].strip()]


def read_form(text: str, depth: int = 0, listed: str = _LISTED) -> Form:
    """The form of ``text``.

    Raises:
        UnreadableError: it is empty or its brackets do not close.
    """
    text = text.strip()
    if not text or depth > MAX_DEPTH:
        raise UnreadableError(text)

    def read_all(pieces: list[str]) -> tuple[Form, ...]:
        return tuple(read_form(piece, depth + 1) for piece in pieces if piece)

    for kind, separator in (("list", ";"), ("list", listed), *_LEVELS):
        pieces = _split(text, separator)
        if len(pieces) > 1 and kind == "relation":
            return _relation(text, read_all(pieces[::2]), [_OPERATORS[sign.lstrip("\\")] for sign in pieces[1::2]])
        if len(pieces) > 1:
            return Form(kind, text, read_all(pieces[::2]))
        if kind == "relation" and _PLUS_MINUS.search(text) and not has_matrix(text):
            upper = _PLUS_MINUS.sub(lambda sign: "+" if sign[1] == "pm" else "-", text)
            lower = _PLUS_MINUS.sub(lambda sign: "-" if sign[1] == "pm" else "+", text)
            return Form("list", text, read_all([upper, lower]))
    return _read_brackets(text, depth)


def _read_brackets(text: str, depth: int) -> Form:
    matrix = _MATRIX.fullmatch(text)
    if matrix and "\\begin" not in matrix[2]:
        return _read_matrix(text, matrix[1], matrix[2], depth)
    pair = re.fullmatch(r"(\\?[(\[{])(.*?)\\?([)\]}])", text, re.DOTALL)
    if not pair or not pair[2].strip() or not _encloses(text):
        return Form("atom", text)
    form = read_form(pair[2], depth + 1)
    if form.kind == "atom" and "," in pair[2]:
        form = read_form(pair[2], depth + 1, ",")  # (100,200) is a pair, 100,200 a number
    if form.kind != "list" or not re.search("[,;]", pair[2]):  # (\pm 1)
        return form
    return Form({"{": "list", "\\{": "set"}.get(pair[1], pair[1] + pair[3]), text, form.parts)


def _read_matrix(text: str, environment: str, content: str, depth: int) -> Form:
    rows = [row.split("&") for row in re.split(r"\\\\(?:\[\w+\])?|\\cr(?![A-Za-z])", content) if row.strip()]
    if environment == "cases":
        return Form("list", text, tuple(read_form(" ".join(row), depth + 1) for row in rows))
    cells = tuple(read_form(cell, depth + 1) for row in rows for cell in row)
    return Form(f"matrix {[len(row) for row in rows]}", text, cells)


def _encloses(text: str) -> bool:
    """Whether the first bracket closes at the end."""
    depth = 0
    for match in re.finditer(r"[(\[{]|[)\]}]", text):
        depth += 1 if match[0] in "([{" else -1
        if depth == 0:
            return match.end() == len(text)
    return False


def _relation(text: str, sides: tuple[Form, ...], operators: list[str]) -> Form:
    """``a < b <= c`` is a list of two inequalities, ``a = b = c`` one chain; what follows "approx" is no side of it."""
    if len(sides) != len(operators) + 1:
        raise UnreadableError(text)
    if "~" in operators[1:] or ("~" in operators and not is_name(sides[0].text)):
        cut = operators.index("~", 0 if not is_name(sides[0].text) else 1) + 1
        exact = _relation(text, sides[:cut], operators[: cut - 1]) if cut > 1 else sides[0]
        return Form("~", text, (exact, *sides[cut:]))
    if all(sign in ("=", "in", "~") for sign in operators):
        return Form("=", text, sides)
    pairs = []
    for sign, left, right in zip(operators, sides[:-1], sides[1:], strict=True):
        ends = (right, left) if sign in (">", ">=") else (left, right)
        pairs.append(Form(sign.replace(">", "<"), text, ends))
    return pairs[0] if len(pairs) == 1 else Form("list", text, tuple(pairs))


def items_of(form: Form) -> list[Form]:
    """What a list or set holds, lists within it included; any other form is one item."""
    return [item for part in form.parts for item in items_of(part)] if form.kind in ("list", "set") else [form]


def atoms_of(form: Form) -> Iterator[Form]:
    if form.kind == "atom":
        yield form
    for part in form.parts:
        yield from atoms_of(part)


def spelling_key(text: str) -> str:
    """Spelling without needless spaces and braces, for the equality that needs no parsing; "1 2" is not "12"."""
    key = re.sub(r"(?<![\w\\])\s+|\s+(?!\w)", "", text)
    return re.sub(r"\{(\w)\}", r"\1", key)


def is_name(text: str) -> bool:
    bare = re.sub(r"_\{?\w+\}?|\\[A-Za-z]+|[\s{}|:]", "", text)
    return bool(_NAME.fullmatch(text) or _SEGMENTS.fullmatch(bare))


def has_matrix(text: str) -> bool:
    return r"\begin" in text


def has_letters(text: str) -> bool:
    return bool(re.search("[A-Za-z]", re.sub(r"\\(?:text\{[^{}]*\}|[A-Za-z]+)", "", text)))


def interval_of(form: Form) -> Form | None:
    """``1 < x <= 2`` as ``(1,2]``, ``1 < |x-3| <= 2`` and ``x < 1, x > 2`` as unions; ``text`` is the name."""
    if (bounds := _bounds(form)) is None:
        return None
    name, (left, right), ends = bounds
    if distance := _DISTANCE.fullmatch(name):
        return _around(distance, left, right, ends)
    low, high = (parse_number(end.text) for end in ends)
    if low is None or high is None or low < high:
        return Form(left + right, name, tuple(ends))
    below = Form("(" + right, name, (Form("atom", r"-\infty"), ends[1]))  # one or the other
    return Form("union", name, (below, Form(left + ")", name, (ends[0], Form("atom", r"\infty")))))


def _bounds(form: Form) -> tuple[str, list[str], list[Form]] | None:
    """What inequalities say of one name, or of its distance from a number: the name, two brackets, two ends."""
    ends, brackets, names = [Form("atom", r"-\infty"), Form("atom", r"\infty")], ["(", ")"], set()
    for item in items_of(form):
        if item.kind not in ("<", "<="):
            return None
        first = item.parts[0].text
        upper = int(is_name(first.strip("|")) or bool(_DISTANCE.fullmatch(first)))
        names.add(item.parts[1 - upper].text)
        ends[upper] = item.parts[upper]
        if item.kind == "<=":
            brackets[upper] = "[]"[upper]
    name = names.pop() if names else ""  # none: a list of nothing
    return None if names or not (_DISTANCE.fullmatch(name) or is_name(name.strip("|"))) else (name, brackets, ends)


def _around(distance: re.Match[str], left: str, right: str, ends: list[Form]) -> Form:
    name, center = distance[1], ("-" if distance[2] == "+" else "") + (distance[3] or "")
    mirrored = tuple(Form("atom", f"{center}-({end.text})") for end in reversed(ends))
    shifted = tuple(Form("atom", f"{center}+({end.text})" if center else end.text) for end in ends)
    turned = {"]": "[", ")": "("}[right]
    if ends[0].text == r"-\infty":
        return Form(turned + right, name, (mirrored[0], shifted[1]))
    flipped = turned + {"[": "]", "(": ")"}[left]
    return Form("union", name, (Form(flipped, name, mirrored), Form(left + right, name, shifted)))
