r"""Boxes (``\boxed{}``, ``\fbox{}``) in texts: where they stand, whether they close, what they hold."""

from __future__ import annotations

import re
from collections.abc import Iterator

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_UNBRACED_BOX = re.compile(r"\s*([^\s{}$\\.,;]+)")


def last_boxed(text: str) -> str | None:
    r"""Content of the last non-empty ``\boxed{}``; "" when the last box is not closed; ``None`` without a box."""
    for _, start, end in boxes_from_last(text):
        if end is None:
            return ""
        if text[start:end].strip():
            return text[start:end].strip()
    return None


def replace_boxed(text: str, answer: str) -> str:
    """``text`` with ``answer`` in the place of its last boxed content, wherever that is boxed."""
    boxed = last_boxed(text)
    for _, start, end in list(boxes_from_last(text)):
        if end is not None and text[start:end].strip() == boxed:
            braced = text[start - 1] == "{"
            text = text[:start] + (answer if braced else f"{{{answer}}}") + text[end:]
    return text


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
