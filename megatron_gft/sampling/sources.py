"""Where responses come from, as the user describes it: one typed section a source, from YAML or the command line.

    sources:
      - {kind: column, source: expert, column: solution}
      - {kind: openai, source: teacher, url: "http://host:8000/v1", model: Qwen/Qwen2.5-72B-Instruct, k: 3}
      - {kind: transformers, source: self, model: models/student, k: 4, max_tokens: 512, logprobs: true}

The same on the command line: ``--source "kind=column source=expert column=solution"``.
"""

import importlib.util
import itertools
import shlex
import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import pydantic
import yaml
from pydantic import Field

from megatron_gft.chat_template import KWARGS, NO_TEMPLATE, TemplateOptions
from megatron_gft.config import Float, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from megatron_gft.errors import InputError, InputErrors, nearest
from megatron_gft.groups import cell
from megatron_gft.reading import read_yaml
from megatron_gft.sampling.prompts import PromptRow, scalar_text
from megatron_gft.sampling.settings import Backend, SamplingParams, model_fingerprint
from megatron_gft.tokenizer import Tokenizer, load_tokenizer

Role = Literal["expert", "teacher", "self"]
ROLE_HELP = "whose responses they count as"


class Source(Section):
    """One source of responses. Fields with ``exclude`` may change while a journal grows."""

    kind: str
    name: str = Field("", exclude=True, description="default: the source, numbered when there are several")
    source: Role = Field(description=ROLE_HELP)

    def identity(self) -> dict[str, Any]:
        """All that decides what the responses are; files by their contents.

        Raises:
            InputError: files that the source needs are not there.
        """
        return self.model_dump(mode="json")

    @abstractmethod
    def problems(self, row: PromptRow) -> Iterator[str]:
        """Why there can be no response of this source to a prompt."""


class ColumnSource(Source):
    """Answers that the rows bring along."""

    kind: Literal["column"]
    source: Role = Field("expert", description=ROLE_HELP)
    column: str = Field(description="column with the whole answer")

    def problems(self, row: PromptRow) -> Iterator[str]:
        answer = cell(row.columns, self.column, row)  # the row itself: no such column
        if answer is row:
            names = ", ".join(row.columns) or "none: it is a group already"
            yield f"{row.place}: no column {self.column!r} for source {self.name} (columns: {names})"
            return
        try:
            if not (scalar_text(answer, row.place, self.column) or "").strip():
                yield f"{row.place}: column {self.column!r} is empty, there is no answer of source {self.name}"
        except InputError as error:
            yield str(error)


class SampledSource(Source):
    """Answers to be sampled."""

    model: str = Field(description="its name on the server")
    chat_template: str | None = Field(None, exclude=True, description="template file or none; default: the folder's")
    trust_remote_code: bool = Field(False, exclude=True, description="run Python code of the model's folder")
    k: PositiveInt = Field(1, exclude=True, description="responses per prompt")
    temperature: NonNegativeFloat = Field(1.0, description="0: greedy")
    top_p: Float = Field(1.0, gt=0, le=1, description="sample among the likeliest tokens of this mass; 1: off")
    top_k: NonNegativeInt = Field(0, description="0: off")
    max_tokens: PositiveInt = Field(1024, description="longest response; a longer one is marked finish_reason length")
    stop: list[str] = Field(default_factory=list, description="texts that end a response; not part of it")
    logprobs: bool = Field(False, description="keep the log-prob of each sampled token (temperature 1)")
    system: str | None = Field(None, description="system message for this source only; not part of the group's prompt")

    @pydantic.model_validator(mode="after")
    def _check(self) -> "SampledSource":
        if self.temperature == 0 and self.k > 1:
            raise ValueError(f"temperature 0 gives the same response {self.k} times: set k=1 or a temperature")
        if any(not text for text in self.stop):
            raise ValueError("stop holds an empty text")
        return self

    def template_kwargs(self) -> dict[str, Any]:  # of this source only
        return {}

    def params(self) -> SamplingParams:
        """The sampling parameters as backends take them."""
        return SamplingParams(
            self.temperature, self.top_p, self.top_k, self.max_tokens, tuple(self.stop), self.logprobs
        )

    @abstractmethod
    def load_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer with the chat template that renders prompts, if there is one on this side."""

    @abstractmethod
    def backend(self) -> Backend:
        """Load or connect what is sampled from; torch, transformers or vLLM are imported only here."""

    def identity(self) -> dict[str, Any]:
        tokenizer = self.load_tokenizer()
        if tokenizer is None:
            return super().identity()
        own = {"tokenizer": tokenizer.fingerprint, "chat_template": tokenizer.chat_template_fingerprint}
        return super().identity() | own

    def problems(self, row: PromptRow) -> Iterator[str]:
        try:
            TemplateOptions.of_row(row.meta, {})
        except InputError as error:
            yield f"{row.place}: {error}"
        if self.system is not None and not isinstance(row.prompt, str) and row.prompt[0]["role"] == "system":
            yield (
                f"{row.place}: the prompt begins with a system message, source {self.name} would add another "
                "-> leave system= out of the source, or the message out of the prompt"
            )


class OpenAISource(SampledSource):
    """A server with the OpenAI interface: vLLM, SGLang, a hosted one.

    Thoughts that the server keeps apart from the answer (``reasoning_content``) are put back with the model's tags,
    which ``tokenizer`` knows or ``thoughts`` names.
    """

    kind: Literal["openai"]
    source: Role = Field("teacher", description=ROLE_HELP)
    url: str = Field(exclude=True, description="base with the version, such as http://host:8000/v1")
    api: Literal["chat", "completions"] = Field("chat", description="who renders the chat template: server or we")
    tokenizer: str | None = Field(None, exclude=True, description="tokenizer folder, for completions and token_ids")
    api_key_env: str | None = Field(None, exclude=True, description="environment variable that holds the key")
    concurrency: PositiveInt = Field(16, exclude=True, description="requests at a time")
    timeout: PositiveFloat = Field(600.0, exclude=True, description="seconds for one request")
    attempts: PositiveInt = Field(8, exclude=True, description="tries of one request")
    backoff: PositiveFloat = Field(1.0, exclude=True, description="seconds; longest first pause, doubled each time")
    token_ids: bool = Field(False, description="ask for the sampled ids (vLLM); needs tokenizer")
    thoughts: str | None = Field(None, description="tags of thoughts: a family, OPENING...CLOSING; none: left out")
    extra_body: dict[str, Any] = Field(default_factory=dict, description="further fields of each request")

    @pydantic.model_validator(mode="after")
    def _check_server(self) -> "OpenAISource":
        if self.tokenizer is None and (self.token_ids or self.api == "completions"):
            raise ValueError("token_ids and api=completions need the model's tokenizer: set tokenizer=DIR")
        if self.logprobs and not self.token_ids:
            raise ValueError("logprobs are kept beside token ids only: set token_ids=true (vLLM) and tokenizer=DIR")
        return self

    def template_kwargs(self) -> dict[str, Any]:
        return self.extra_body.get(KWARGS, {})

    def identity(self) -> dict[str, Any]:
        return {name: value for name, value in super().identity().items() if (name, value) != ("thoughts", None)}

    def load_tokenizer(self) -> Tokenizer | None:
        if self.tokenizer is None:
            return None
        template = self.chat_template if self.api == "completions" else NO_TEMPLATE
        return load_tokenizer(self.tokenizer, template, None, self.trust_remote_code)

    def backend(self) -> Backend:
        from megatron_gft.sampling.openai_client import OpenAIBackend

        return OpenAIBackend(self)


class LocalSource(SampledSource):
    """A model folder sampled in this process."""

    source: Role = Field("self", description=ROLE_HELP)
    model: str = Field(description="Hugging Face folder")

    def load_tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.model, self.chat_template, None, self.trust_remote_code)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"checkpoint": model_fingerprint(self.model)}


class TransformersSource(LocalSource):
    """A Hugging Face folder sampled in this process by batches; for CPUs and small runs."""

    kind: Literal["transformers"]
    batch_size: PositiveInt = Field(16, description="responses at a time; part of what decides the rounding")
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(None, description="default: fp32 on a CPU, else the folder's")
    device: str | None = Field(None, description="default: cuda when there is one")

    def backend(self) -> Backend:
        from megatron_gft.sampling.local_backends import TransformersBackend
        from megatron_gft.sampling.local_model import LocalModel

        names = ("dtype", "device", "chat_template", "trust_remote_code")
        model = LocalModel(self.model, **{name: getattr(self, name) for name in names})
        return TransformersBackend(model, self.batch_size)


class VllmSource(LocalSource):
    """vLLM's offline engine in this process."""

    kind: Literal["vllm"]
    engine: dict[str, Any] = Field(default_factory=dict, exclude=True, description="arguments of vllm.LLM")
    requests_per_call: PositiveInt = Field(1024, exclude=True, description="responses between writes to the journal")

    def identity(self) -> dict[str, Any]:
        if "vllm" not in sys.modules and importlib.util.find_spec("vllm") is None:
            raise InputError("the vllm package is not installed -> pip install vllm, or use kind openai")
        return super().identity()

    def backend(self) -> Backend:
        from megatron_gft.sampling.local_backends import VllmBackend

        return VllmBackend(self)


_QUOTING = """quote a list twice: stop='["\\n\\n", "####"]'"""
KINDS: dict[str, type[Source]] = {
    "column": ColumnSource,
    "openai": OpenAISource,
    "transformers": TransformersSource,
    "vllm": VllmSource,
}


class _Sources(Section):
    sources: list[
        Annotated[ColumnSource | OpenAISource | TransformersSource | VllmSource, Field(discriminator="kind")]
    ] = Field(min_length=1)


def load_sources(arguments: Sequence[str] = (), file: str | Path | None = None) -> list[Source]:
    """Sources of a YAML file (``sources: [...]``), then those of ``--source`` arguments, named and checked.

    Raises:
        InputErrors: every unknown key (with the nearest), missing field and bad value.
    """
    described: list[Any] = []
    if file is not None:
        value = read_yaml(Path(file))
        if set(value) != {"sources"} or not isinstance(value["sources"], list):
            raise InputError(f"{file}: expected one key 'sources' with a list -> see --help")
        described = value["sources"]
    described += [_read_argument(argument) for argument in arguments]
    try:
        sources = _Sources.model_validate({"sources": described}).sources
    except pydantic.ValidationError as error:
        raise InputErrors("sources", [_explain(problem) for problem in error.errors()]) from None
    return _with_names(sources)


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
    kind = KINDS.get(texts.get("kind", ""), Source)
    collections = {key for key, field in kind.model_fields.items() if get_origin(field.annotation) in (list, dict)}
    return {key: _read_collection(key, text) if key in collections else text for key, text in texts.items()}


def _read_collection(key: str, text: str) -> Any:
    """A list or mapping of the command line, as YAML."""
    try:
        # shlex took unprotected quotes away, and a plain \n is two characters: better no list than another one.
        if "\\" in text and '"' not in text:
            raise yaml.YAMLError
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--source: {key}={text}: not valid YAML -> {_QUOTING}") from None


def _with_names(sources: Sequence[Source]) -> list[Source]:
    """Give unnamed sources the name of their role, numbered from the second on; refuse a name used twice."""
    names = [source.name for source in sources]
    for index, source in enumerate(sources):
        numbered = (source.source + str(number or "") for number in itertools.chain([0], itertools.count(2)))
        names[index] = source.name or next(name for name in numbered if name not in names)
    for name in names:
        if names.count(name) > 1 or "/" in name:
            raise InputError(f"source name {name!r}: used twice or with a '/' in it -> name the sources differently")
    return [source.model_copy(update={"name": name}) for source, name in zip(sources, names, strict=True)]


def _explain(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        kind, key = str(problem["loc"][2]), str(problem["loc"][-1])
        near = nearest(key, KINDS[kind].model_fields)
        hint = f"did you mean {near}?" if near else f"known: {', '.join(KINDS[kind].model_fields)}"
        return f"{place}: unknown key -> {hint}"
    if problem["type"] == "missing":
        return f"{place}: missing -> set it"
    if problem["type"].startswith("union_tag"):
        given = problem["input"].get("kind") if isinstance(problem["input"], dict) else problem["input"]
        return f"{place}.kind is {given!r} -> one of {', '.join(KINDS)}"
    if problem["type"] == "list_type":
        return f"{place}: not a list (got {problem['input']!r}) -> {_QUOTING}"
    return f"{place}: {problem['msg'].removeprefix('Value error, ')} (got {str(problem['input'])[:80]})"
