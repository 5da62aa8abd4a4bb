r"""Thoughts of responses: only what follows them is said to the user, and only that is judged.

Tags are named by the model families that write them; ``all`` (the default of every verifier) knows all of them,
``none`` judges the whole text, ``qwen,mistral`` takes some, and ``OPENING...CLOSING`` is a pair of one's own.
Templates may open the thoughts in the prompt, so a closing tag alone ends thoughts, too.
"""

from __future__ import annotations

import functools
import re

from megatron_gft.errors import InputError

_THINK = ("<think>", "</think>")
TAGS = {
    "qwen": _THINK,
    "deepseek": _THINK,
    "mistral": ("[THINK]", "[/THINK]"),
    "gpt-oss": ("<|channel|>", "<|channel|>final<|message|>"),
    "thinking": ("<thinking>", "</thinking>"),
    "exaone": ("<thought>", "</thought>"),
    "seed": ("<seed:think>", "</seed:think>"),
    "kimi": ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    "command": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "openthoughts": ("<|begin_of_thought|>", "<|end_of_thought|>"),
    "reasoning": ("<reasoning>", "</reasoning>"),
}
LONGEST_TAG = 100  # with the spaces in it
_HARMONY = ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>")  # written out
_HARMONY_TOKEN = re.compile(r"<\|(?:return|end|call)\|>.*", re.DOTALL)
_HARMONY_WITHOUT_TOKENS = re.compile(r"analysis(?=[A-Z]).*?(?:assistant(final)|\Z)", re.DOTALL)


def after_thoughts(text: str, tags: str = "all", before: str = "") -> str | None:
    """What ``text`` says after the last closing tag; ``None`` where thoughts are opened and never closed.

    ``before`` is the text that the response continues: a prompt may end with an opening tag.

    Raises:
        InputError: ``tags`` names no family.
    """
    opening, closing = _patterns(tags)
    if opening is None or closing is None:
        return text
    harmony = "gpt-oss" in _families(tags)
    if harmony and (shown := _HARMONY_WITHOUT_TOKENS.match(text)):  # decoded without special tokens
        return text[shown.end() :] if shown[1] else None
    ends = [match.end() for match in closing.finditer(text)]
    opened = bool(ends) or not any(match.end() == len(before.rstrip()) for match in opening.finditer(before))
    said = text[ends[-1] :] if ends else text
    if not opened or opening.search(said):
        return None
    return _HARMONY_TOKEN.sub("", said) if harmony else said


def opened_by(prompt: str) -> tuple[str, str] | None:
    """The tags (opening, closing) of the thoughts that a rendered prompt leaves open at its end, if it does."""
    end = prompt.rstrip()[-LONGEST_TAG:]
    return next((pair for pair in TAGS.values() if re.search(rf"(?:{_spelled(pair[0])})\Z", end, re.IGNORECASE)), None)


def unfit_thoughts(prompt: str, response: str, cut_off: bool = False) -> str | None:
    """``thoughts_twice`` or ``thoughts_open`` of a response that opens, or never closes, what its prompt left open."""
    tags = opened_by(prompt)
    if tags is not None and re.match(rf"\s*+{_spelled(tags[0])}", response, re.IGNORECASE):
        return "thoughts_twice"
    closed = tags is None or cut_off or re.search(_spelled(tags[1]), response, re.IGNORECASE)
    return None if closed else "thoughts_open"


def without_opening(prompt: str, response: str) -> str:
    """A response without the opening tag, and what follows it in the prompt, that ``prompt`` has written already."""
    tags = opened_by(prompt)
    if tags is None:
        return response
    said = re.sub(rf"\A\s*+{_spelled(tags[0])}", "", response, flags=re.IGNORECASE)
    return said.removeprefix(prompt[len(prompt.rstrip()) :])


def thought_tags(name: str) -> tuple[str, str] | None:
    """Opening and closing tag of a family, or of ``OPENING...CLOSING``, as the model writes them; None of ``none``.

    Raises:
        InputError: ``name`` is neither, or several.
    """
    if _patterns(name) == (None, None):
        return None
    if "..." not in name and name not in TAGS:
        raise InputError(f"thoughts={name!r}: several families -> one of {', '.join(TAGS)}, or none")
    opening, _, closing = name.partition("...")
    return _HARMONY if name == "gpt-oss" else TAGS.get(name, (opening, closing))


def _spelled(tag: str) -> str:
    """A pattern of the tag as models misspell it: ``< think >``, ``<THINK>`` (and, without case, ``</Think>``)."""
    return r"\s{0,3}".join(map(re.escape, re.findall(r"\w+|\W", tag)))


def tags_named_in(text: str) -> list[str]:
    """Families whose tags a text (of a chat template) names, one of those with the same tags."""
    return list({pair: name for name, pair in TAGS.items() if pair[0] in text or pair[1] in text}.values())


def lost_tags(text: str) -> bool:
    """Whether these are thoughts and answer of a model whose tags are special tokens that were left out."""
    return text.startswith("analysis") and "assistantfinal" in text


def _families(tags: str) -> list[str]:
    return list(TAGS) if tags == "all" else [name.strip() for name in tags.split(",")]


@functools.cache
def _patterns(tags: str) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
    """What opens thoughts and what closes them.

    Raises:
        InputError: a name that is not known.
    """
    if tags == "none":
        return None, None
    own = tuple(tags.split("...")) if "..." in tags else ()
    if own and (len(own) != 2 or not all(own)):
        raise InputError(f"thoughts={tags!r} is no pair of tags -> write OPENING...CLOSING")
    unknown = [] if own else [name for name in _families(tags) if name not in TAGS]
    if unknown:
        raise InputError(f"thoughts={unknown[0]!r} -> all, none, OPENING...CLOSING or some of {', '.join(TAGS)}")
    pairs = [own] if own else [TAGS[name] for name in _families(tags)]
    opening, closing = ("|".join(_spelled(pair[side]) for pair in pairs) for side in (0, 1))
    return re.compile(opening, re.IGNORECASE), re.compile(closing, re.IGNORECASE)
