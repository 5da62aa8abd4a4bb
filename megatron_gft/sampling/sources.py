"""Where responses come from, as the user describes it: one typed section a source, from YAML or the command line.

    sources:
      - {kind: column, source: expert, column: solution}
      - {kind: openai, source: teacher, url: "http://host:8000/v1", model: Qwen/Qwen2.5-72B-Instruct, k: 3}
      - {kind: transformers, source: self, model: models/student, k: 4, max_tokens: 512, logprobs: true}

The same on the command line: ``--source "kind=column source=expert column=solution"``. There, text is taken as it is;
lists, numbers and switches are YAML, and quotes inside a list need quotes around it: ``stop='["\\n\\n", "####"]'``.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import pydantic
import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_gft.config import Section
from megatron_gft.errors import InputError, InputErrors, nearest
from megatron_gft.sampling.settings import SamplingParams, model_fingerprint
from megatron_gft.tokenizer import NO_TEMPLATE, Tokenizer, load_tokenizer

Role = Literal["expert", "teacher", "self"]


class ColumnSource(Section):
    """Answers that the rows bring along."""

    kind: Literal["column"]
    name: str = Field("", description="default: the source, numbered when there are several")
    source: Role = "expert"
    column: str = Field(description="column with the whole answer")

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind, "source": self.source, "column": self.column}


class SampledSource(Section):
    """Answers to be sampled. Fields named in ``operational`` may change while a journal grows."""

    model_config = pydantic.ConfigDict(allow_inf_nan=False)
    operational: ClassVar[frozenset[str]] = frozenset({"name", "k", "tokenizer", "chat_template"})

    kind: str
    name: str = Field("", description="default: the source, numbered when there are several")
    source: Role
    model: str
    k: PositiveInt = Field(1, description="responses per prompt")
    temperature: NonNegativeFloat = Field(1.0, description="0: greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: NonNegativeInt = Field(0, description="0: off")
    max_tokens: PositiveInt = Field(1024, description="longest response; a longer one is marked finish_reason length")
    stop: list[str] = Field(default_factory=list, description="texts that end a response; not part of it")
    logprobs: bool = Field(False, description="keep the log-prob of each sampled token (temperature 1)")
    system: str | None = Field(None, description="system message for this source only; not part of the group's prompt")

    @pydantic.model_validator(mode="after")
    def _check(self) -> SampledSource:
        if self.temperature == 0 and self.k > 1:
            raise ValueError(f"temperature 0 gives the same response {self.k} times: set k=1 or a temperature")
        if any(not text for text in self.stop):
            raise ValueError("stop holds an empty text")
        return self

    def params(self) -> SamplingParams:
        """The sampling parameters as backends take them."""
        return SamplingParams(
            self.temperature, self.top_p, self.top_k, self.max_tokens, tuple(self.stop), self.logprobs
        )

    @abstractmethod
    def load_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer with the chat template that renders prompts, if there is one on this side.

        Raises:
            InputError: it cannot be loaded.
        """

    def identity(self) -> dict[str, Any]:
        """All that decides what is sampled; files by their contents.

        Raises:
            InputError: files that the source needs are not there.
        """
        identity = {key: value for key, value in self.model_dump(mode="json").items() if key not in self.operational}
        tokenizer = self.load_tokenizer()
        if tokenizer is None:
            return identity
        return identity | {
            "tokenizer": tokenizer.fingerprint,
            "chat_template": tokenizer.chat_template_fingerprint,
        }


class OpenAISource(SampledSource):
    """A server with the OpenAI interface: vLLM, SGLang, a hosted one.

    Thoughts that the server keeps apart from the answer (``reasoning_content``) are left out, and counted in the
    summary; to keep them in the responses as the model wrote them, start the server without a reasoning parser.
    """

    operational: ClassVar[frozenset[str]] = SampledSource.operational | {
        "url",
        "api_key_env",
        "concurrency",
        "timeout",
        "attempts",
        "backoff",
        "requests_per_second",
    }

    kind: Literal["openai"]
    source: Role = "teacher"
    url: str = Field(description="base with the version, such as http://host:8000/v1")
    api: Literal["chat", "completions"] = Field("chat", description="who renders the chat template: server or we")
    tokenizer: str | None = Field(None, description="the model's tokenizer folder; for completions and token_ids")
    chat_template: str | None = Field(None, description="template file or none, for completions")
    api_key_env: str | None = Field(None, description="environment variable that holds the key")
    concurrency: PositiveInt = Field(16, description="requests at a time")
    timeout: PositiveFloat = Field(600.0, description="seconds for one request")
    attempts: PositiveInt = Field(8, description="tries of one request")
    backoff: PositiveFloat = Field(1.0, description="seconds; longest first pause, doubled for each further one")
    requests_per_second: PositiveFloat | None = Field(None, description="rate limit")
    token_ids: bool = Field(False, description="ask for the sampled ids (vLLM); needs tokenizer")
    extra_body: dict[str, Any] = Field(default_factory=dict, description="further fields of each request")

    @pydantic.model_validator(mode="after")
    def _check_server(self) -> OpenAISource:
        if self.tokenizer is None and (self.token_ids or self.api == "completions"):
            raise ValueError("token_ids and api=completions need the model's tokenizer: set tokenizer=DIR")
        if self.logprobs and not self.token_ids:
            raise ValueError("logprobs are kept beside token ids only: set token_ids=true (vLLM) and tokenizer=DIR")
        return self

    def load_tokenizer(self) -> Tokenizer | None:
        if self.tokenizer is None:
            return None
        return load_tokenizer(self.tokenizer, self.chat_template if self.api == "completions" else NO_TEMPLATE)


class LocalSource(SampledSource):
    """A model folder sampled in this process."""

    source: Role = "self"
    model: str = Field(description="Hugging Face folder")
    chat_template: str | None = Field(None, description="template file or none; default: the folder's own")

    def load_tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.model, self.chat_template)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"checkpoint": model_fingerprint(self.model)}


class TransformersSource(LocalSource):
    """A Hugging Face folder sampled in this process by batches; for CPUs and small runs."""

    kind: Literal["transformers"]
    batch_size: PositiveInt = Field(16, description="responses at a time; part of what decides the rounding")
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(None, description="default: fp32 on a CPU, else the folder's")
    device: str | None = Field(None, description="default: cuda when there is one")


class VllmSource(LocalSource):
    """vLLM's offline engine in this process."""

    operational: ClassVar[frozenset[str]] = SampledSource.operational | {"engine", "requests_per_call"}

    kind: Literal["vllm"]
    engine: dict[str, Any] = Field(default_factory=dict, description="arguments of vllm.LLM")
    requests_per_call: PositiveInt = Field(1024, description="responses between two writes to the journal")

    def identity(self) -> dict[str, Any]:
        if "vllm" not in sys.modules and importlib.util.find_spec("vllm") is None:
            raise InputError("the vllm package is not installed -> pip install vllm, or use kind openai")
        return super().identity()


Source = ColumnSource | SampledSource
SourceList = Sequence[Source]
_AnySource = Annotated[ColumnSource | OpenAISource | TransformersSource | VllmSource, Field(discriminator="kind")]
_QUOTING = """quote a list twice: stop='["\\n\\n", "####"]'"""
_KINDS: dict[str, type[Section]] = {
    "column": ColumnSource,
    "openai": OpenAISource,
    "transformers": TransformersSource,
    "vllm": VllmSource,
}


class _Sources(Section):
    sources: list[_AnySource] = Field(min_length=1)


def load_sources(arguments: Sequence[str] = (), file: str | Path | None = None) -> SourceList:
    """Sources of a YAML file (``sources: [...]``), then those of ``--source`` arguments, named and checked.

    Raises:
        InputErrors: every unknown key (with the nearest), missing field and bad value.
    """
    described = _read_file(file) if file is not None else []
    described += [_read_argument(argument) for argument in arguments]
    try:
        sources = _Sources.model_validate({"sources": described}).sources
    except pydantic.ValidationError as error:
        raise InputErrors("sources", [_explain(problem) for problem in error.errors()]) from None
    return _with_names(sources)


def _read_file(file: str | Path) -> list[Any]:
    try:
        value = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}) -> check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(value, dict) or set(value) != {"sources"} or not isinstance(value["sources"], list):
        raise InputError(f"{file}: expected one key 'sources' with a list -> see --help")
    return value["sources"]


def _read_argument(argument: str) -> dict[str, Any]:
    texts: dict[str, str] = {}
    try:
        words = shlex.split(argument)
    except ValueError as error:
        raise InputError(f"--source {argument!r}: {error}") from None
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise InputError(f"--source {argument!r}: {word!r} is not key=value -> write kind=... key=value ...")
        if key in texts:
            raise InputError(f"--source {argument!r}: {key} is given twice -> give it once")
        texts[key] = text
    kind = _KINDS.get(texts.get("kind", ""))
    fields = {} if kind is None else kind.model_fields
    return {
        key: text if key not in fields or _is_text(fields[key].annotation) else _read_value(key, text)
        for key, text in texts.items()
    }


def _is_text(annotation: Any) -> bool:
    """Whether a field holds nothing but text: ``str``, a choice of words, either of them or None."""
    if get_origin(annotation) is Literal:
        return True
    if get_origin(annotation) in (Union, UnionType):
        return all(part is NoneType or _is_text(part) for part in get_args(annotation))
    return annotation is str


def _read_value(key: str, text: str) -> Any:
    """A list, mapping, number or switch of the command line, as YAML."""
    is_collection = text.lstrip().startswith(("[", "{"))
    try:
        # shlex took unprotected quotes away, and a plain \n is two characters: better no list than another one.
        if is_collection and "\\" in text and '"' not in text:
            raise yaml.YAMLError
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--source: {key}={text}: not valid YAML -> {_QUOTING}") from None


def _with_names(sources: Sequence[Any]) -> SourceList:
    """Give unnamed sources the name of their role, numbered from the second on; refuse a name used twice."""
    named, taken = [], {source.name for source in sources if source.name}
    for source in sources:
        if not source.name:
            number, name = 1, source.source
            while name in taken:
                number += 1
                name = f"{source.source}{number}"
            taken.add(name)
            source = source.model_copy(update={"name": name})
        named.append(source)
    names = [source.name for source in named]
    twice = sorted({name for name in names if names.count(name) > 1 or "/" in name})
    if twice:
        raise InputError(f"source name {twice[0]!r}: used twice or with a '/' in it -> name the sources differently")
    return named


def _explain(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        kind, key = str(problem["loc"][2]), str(problem["loc"][-1])
        near = nearest(key, _KINDS[kind].model_fields)
        hint = f"did you mean {near}?" if near else f"known: {', '.join(_KINDS[kind].model_fields)}"
        return f"{place}: unknown key -> {hint}"
    if problem["type"] == "missing":
        return f"{place}: missing -> set it"
    if problem["type"] == "list_type":
        return f"{place}: not a list (got {problem['input']!r}) -> {_QUOTING}"
    return f"{place}: {problem['msg'].removeprefix('Value error, ')} (got {str(problem['input'])[:80]})"
