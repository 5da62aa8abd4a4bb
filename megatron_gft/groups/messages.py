"""Prompts as people store them: text, messages, messages as JSON text, contents in parts or null beside tool calls."""

import ast
import json
import re
from reprlib import repr as short
from typing import Any

from pydantic_core import PydanticCustomError

_PRINTED_LIST = re.compile(r"""\s*\[\s*\{\s*["']\w+["']\s*:.*\}\s*\]\s*""", re.DOTALL)
_PRINTED_ROLE = re.compile(r"""["']role["']\s*:""")
_TEXT_PARTS = ("text", "input_text", "output_text")
_ANSWERING = ("assistant", "model", "gpt")


def as_prompt(value: Any) -> Any:
    """A prompt in its one form: a list of messages when it is the text of one, and parts of contents put together.

    Only forms with one meaning are changed; what else is wrong with the value stays as it is.

    Raises:
        PydanticCustomError: a part that is no text, text of messages that nobody can read, or a prompt that ends with
            the assistant's turn: a model would begin a turn of its own behind it.
    """
    messages = _messages_in(value) if isinstance(value, str) else value
    if not (isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)):
        return messages
    messages = [with_text(message) for message in messages]
    if messages[-1].get("role") in _ANSWERING:
        raise PydanticCustomError(
            "answered",
            "the prompt ends with the assistant's answer, behind which a model would begin another -> leave the last "
            "message out (it can be a response)",
        )
    return messages


def message_text(message: dict[str, Any]) -> str:
    """Content of a message; "" of one that only calls tools."""
    return message["content"] or ""


def with_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is one text, or null beside tool calls; PydanticCustomError for a part that is none."""
    content = message.get("content")
    if isinstance(content, list):
        return message | {"content": "".join(map(_part_text, content))}
    return message | {"content": None} if content is None and message.get("tool_calls") else message


def _part_text(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS else part
    if isinstance(text, str):
        return text
    raise PydanticCustomError("part", f"a content has a part that is no text: {short(part)}")


def _messages_in(text: str) -> Any:
    """The messages that ``text`` spells as JSON or as Python prints them, else ``text``."""
    if not (_PRINTED_LIST.fullmatch(text) and _PRINTED_ROLE.search(text)):
        return text
    for read in (json.loads, ast.literal_eval):  # neither runs code
        try:
            found = read(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return found if all(isinstance(item, dict) and "role" in item for item in found) else text
    raise PydanticCustomError("printed", "a list of messages printed as text -> store it as a list, or as JSON text")
