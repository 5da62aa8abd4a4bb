"""Chat templates: what renders a prompt, with which options, and what is wrong with a template."""

import functools
import hashlib
import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_gft.errors import InputError, nearest
from megatron_gft.reading import read_text

NO_TEMPLATE = "none"
TEMPLATE_SECONDS = 5.0  # of CPU time for one prompt; templates take milliseconds
TOOLS, KWARGS = "tools", "chat_template_kwargs"  # of a row, as requests to servers call them
# Templates that print today's date would make other shards tomorrow: they get the date that Llama 3.x falls back to.
_FIXED_DATE = (("%d", "26"), ("%b", "Jul"), ("%B", "July"), ("%m", "07"), ("%Y", "2024"), ("%y", "24"))
_FIXED_DATE_MACRO = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{code}', '{text}')" for code, text in _FIXED_DATE)
    + " }}{% endmacro %}"
)
TEMPLATE_KWARGS_HELP = "variables of the chat template, e.g. enable_thinking=false, or JSON; those of a row go first"
_OURS = frozenset({"messages", "conversations", "tools", "add_generation_prompt", "chat_template"})
_OURS |= {"continue_final_message", "return_assistant_tokens_mask"}
_MARKER = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
_ASKED, _SAID = "2 plus 3?", "It is 5."  # a conversation to try a template with
# Thoughts of earlier turns, which templates leave out on purpose.
_CLOSED_THOUGHTS = re.compile(r".*(</think>|</seed:think>|\[/THINK\]|<\|END_THINKING\|>)", re.DOTALL)

Prompt = str | list[dict[str, Any]]


class ChatTemplateError(InputError):
    """The chat template cannot render this prompt."""


@dataclass(frozen=True)
class TemplateOptions:
    """What a template gets beside the messages: descriptions of functions (as in the OpenAI interface), variables."""

    tools: list[dict[str, Any]] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_row(cls, fields: Mapping[str, Any], kwargs: Mapping[str, Any]) -> "TemplateOptions":
        """``tools`` and ``chat_template_kwargs`` of a row (or their JSON text); ``kwargs`` are those of all rows."""
        tools, own = _json_value(fields.get(TOOLS)) or [], _json_value(fields.get(KWARGS)) or {}
        are_tools = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
        if not are_tools or not isinstance(own, dict):
            name, value = (KWARGS, own) if are_tools else (TOOLS, tools)
            raise ChatTemplateError(f"{name} is {str(value)[:60]!r}, no JSON for it -> correct or rename the field")
        own = {name: value for name, value in own.items() if value is not None}  # as parquet fills rows without it
        return cls(tools or None, {**kwargs, **own})

    def record(self) -> dict[str, Any]:
        """What a response keeps of them: all that says something, ``tools`` by their hash."""
        tools = json.dumps(self.tools, sort_keys=True).encode()
        value: dict[str, Any] = {KWARGS: dict(self.kwargs)} if self.kwargs else {}
        return value | ({TOOLS: hashlib.sha256(tools).hexdigest()[:16]} if self.tools else {})


PLAIN = TemplateOptions()


def template_kwargs(words: Sequence[str]) -> dict[str, Any]:
    """``['{"enable_thinking": false}']`` or ``["enable_thinking=false", ...]`` of a command line."""
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        try:  # YAML reads JSON, too
            given = {name: yaml.safe_load(text)} if name.isidentifier() and equals else yaml.safe_load(word)
        except yaml.YAMLError:
            given = None
        if not isinstance(given, dict):
            raise InputError(f"--template-kwargs {word!r}: neither JSON nor key=value -> enable_thinking=false")
        values |= given
    return values


class ChatTemplate:
    """A Jinja template with the special tokens that it may name."""

    def __init__(self, text: str, names: Mapping[str, str]):
        self.text, self._names = text, names
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def reads(self, name: str) -> bool:
        """Whether the template names the variable."""
        return re.search(rf"\b{re.escape(name)}\b", self.text) is not None

    def render(self, prompt: Prompt, options: TemplateOptions = PLAIN) -> str:
        """Text of a prompt with its generation prompt, special tokens spelled.

        Raises:
            ChatTemplateError: the template raises, does not read an option, or the last turn is the assistant's.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if messages and messages[-1].get("role") in ("assistant", "model"):
            raise ChatTemplateError(
                "the prompt ends with a turn of the assistant, after which another would begin -> make that turn a "
                "response, or leave it out"
            )
        for name in [*options.kwargs, *([TOOLS] if options.tools else [])]:
            if name in _OURS and name != TOOLS:
                raise ChatTemplateError(f"{KWARGS} sets {name}, which is set here -> leave it out")
            if not self.reads(name):
                near = nearest(name, set(re.findall(r"\w+", self.text)))
                hint = f"did you mean {near}?" if near else "leave it out, or set --chat-template"
                raise ChatTemplateError(f"the template does not read {name!r}, it would be lost -> {hint}")
        return self._render(messages, options, True)

    def _render(self, messages: list[dict[str, Any]], options: TemplateOptions, generation_prompt: bool) -> str:
        template = (_FIXED_DATE_MACRO if "strftime_now" in self.text else "") + self.text
        known: dict[str, Any] = {**self._names, **options.kwargs, "chat_template": template, "tools": options.tools}
        try:
            return _render_in_time([messages], add_generation_prompt=generation_prompt, **known)
        except TimeoutError as error:  # the next prompt would take as long
            raise InputError(f"the chat template {error} -> read it, or set another with --chat-template") from None
        except Exception as error:  # a template is a program of the user's; it may raise anything
            raise ChatTemplateError(f"{type(error).__name__}: {error}") from error

    def problems(
        self, specials: re.Pattern[str], eos: str, options: TemplateOptions = PLAIN
    ) -> Iterator[tuple[str, str]]:
        """Kind and detail of what is wrong with the template, whatever the prompt.

        Args:
            specials: matches the spelling of special tokens.
            eos: spelling of the token that ends a response.
        """
        if "\ufeff" in self.text:
            yield (
                "bad_template",
                "a byte-order mark in it would begin prompts -> save it without, or --chat-template FILE",
            )
        question = [{"role": "user", "content": _ASKED}]
        answer = {"role": "assistant", "content": _SAID}
        try:
            asked, opened = (self._render(question, options, generation) for generation in (False, True))
            answered = self._render([*question, answer], options, False)
        except ChatTemplateError:
            return  # it wants other turns; what it makes of the prompts is looked at one by one
        head, said, tail = answered.rpartition(_SAID)
        missing = head.removeprefix(asked).strip()
        if said and asked == opened and head.startswith(asked) and missing:
            why = f"it ignores add_generation_prompt, though answers begin with {missing!r}"
            yield "bad_template", f"{why} -> add {{% if add_generation_prompt %}}{missing}...{{% endif %}}"
        end = specials.match(tail.lstrip()) or _MARKER.match(tail.lstrip())
        if said and end and end.group() != eos:
            why = f"the chat template ends turns with {end.group()!r}, EOS is {eos!r}: every response would"
            remedy = f"set eos_token to {end.group()!r} in tokenizer_config.json (and eos_token_id in "
            remedy += "generation_config.json), or --chat-template FILE"
            yield "turn_end", f"{why} end with a token that ends no turn -> {remedy}"


def _render_in_time(conversations: list[Any], chat_template: str, **options: Any) -> str:
    """transformers' rendering, with a TimeoutError after :data:`TEMPLATE_SECONDS` of CPU time.

    By a signal, which only the main thread can be told by, between two steps. A power, one step that may take for ever,
    is refused.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    if _has_power(chat_template):
        raise TimeoutError("computes a power (**), which may take for ever")
    if threading.current_thread() is not threading.main_thread():
        return render_jinja_template(conversations, chat_template=chat_template, **options)[0][0]

    def end(*_: Any) -> None:
        raise TimeoutError(f"takes more than {TEMPLATE_SECONDS:g} s")

    signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, TEMPLATE_SECONDS)
    try:
        return render_jinja_template(conversations, chat_template=chat_template, **options)[0][0]
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@functools.lru_cache(16)
def _has_power(template: str) -> bool:
    from jinja2 import Environment

    return any(kind == "operator" and text == "**" for _, kind, text in Environment().lex(template))


def lost_text(prompt: Prompt, rendered: str) -> str | None:
    """Text of the prompt that its rendering does not show, if there is any; white space around it may go."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for number, message in enumerate(messages):
        role, texts = message.get("role"), [message.get("content")]
        if role == "assistant":
            texts = [_CLOSED_THOUGHTS.sub("", text) for text in texts if isinstance(text, str)]
        calls = message.get("tool_calls")
        texts += re.findall(r'"name": "([^"]+)"', json.dumps(calls)) if calls else []
        for text in (text.strip() for text in texts if isinstance(text, str)):
            if text not in rendered and json.dumps(text, ensure_ascii=False)[1:-1] not in rendered:
                return f"of message {number} ({role}): {text[:40]!r} -> correct the template, or --chat-template FILE"
    return None


def load_template(
    chat_template: str | None, path: str | Path, own: Any, names: Mapping[str, str]
) -> ChatTemplate | None:
    """The template that was asked for: a file's, the tokenizer's ``own`` (of one name or several), or None: raw text.

    Raises:
        InputError: there is none, or it cannot be read or is no template.
    """
    if chat_template == NO_TEMPLATE:
        return None
    if chat_template is not None:
        own, path = read_text(chat_template, "name a file with a chat template"), chat_template
    if not own:
        raise InputError(f"{path}: the tokenizer has no chat template -> set --chat-template FILE or none (raw text)")
    if isinstance(own, dict) and "default" not in own:
        raise InputError(
            f"{path}: the chat templates have names ({', '.join(sorted(own))}) and none is the default "
            "-> save one in a file and set --chat-template FILE, or none (raw text)"
        )
    text = own["default"] if isinstance(own, dict) else own
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([], chat_template=text)  # reads it and renders nothing
    except TemplateSyntaxError as error:
        raise InputError(f"{path}: line {error.lineno} of the chat template: {error.message} -> correct it") from None
    return ChatTemplate(text, names)


def _json_value(value: Any) -> Any:
    """The value of JSON text, as tables hold lists of objects; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
