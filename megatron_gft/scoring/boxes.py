r"""Boxes (``\boxed{}``, ``\fbox{}``) in texts: where they stand, whether they close, what they hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from megatron_gft.scoring.spelling import with_sign_after

BoxPolicy = Literal["last", "listed", "near"]

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_UNBRACED_BOX = re.compile(r"\s*([^\s{}$\\.,;]+)")

_BETWEEN = r"[\s$,;.&}~+|\\]|\\[()\[\],;: ]|\\q?quad|\\text\{"
_LINKED = {
    "listed": re.compile(rf"(?:{_BETWEEN}|\band\b|\bor\b|respectively){{0,40}}"),
    "near": re.compile(rf"(?:{_BETWEEN}){{0,40}}|(?=.*(?:,|\b(?:and|or)\b)).{{0,40}}", re.DOTALL),
}


def boxed_answer(text: str, boxes: BoxPolicy) -> str | None:
    """The last box and those that belong to it; "" when the last is not closed, ``None`` without a box."""
    found: list[str] = []
    begin = -1
    for box, start, end in boxes_from_last(text):
        if end is None:
            return ", ".join(found)
        content = text[start:end].strip()
        if not content or (found and end > begin):
            continue
        after = end + (text[end : end + 1] == "}")
        if found and (boxes == "last" or not _LINKED[boxes].fullmatch(text[after:begin])):
            break
        content = with_sign_after(content, text, after)[0]
        found = [content, *(other for other in found if other != content)]
        begin = box
    return ", ".join(found) if found else None


def boxes_from_last(text: str) -> Iterator[tuple[int, int, int | None]]:
    """Where each box, and its content, begins and the content ends; an end of ``None``: it is never closed."""
    for box in reversed(list(_BOX.finditer(text))):
        start = box.end()
        while text[start : start + 1].isspace():
            start += 1
        if text[start : start + 1] == "{":
            yield box.start(), start + 1, _closing_brace(text, start + 1)
        elif unbraced := _UNBRACED_BOX.match(text, start):
            yield box.start(), *unbraced.span(1)


def _closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the one before ``start``; escaped braces do not count."""
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None
