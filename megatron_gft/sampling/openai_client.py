"""Samples from a server with the OpenAI interface (vLLM, SGLang, any other), over httpx.

One request asks for one response, so that each has its own seed and a lost connection costs one response (servers
share the prompt's computation by prefix caching). What may be transient is tried again with exponential back-off and
full jitter, honouring ``Retry-After``: no connection, a dropped connection, a time-out, HTTP 408/409/425/429/5xx, an
answer that is not what the interface says. Other HTTP errors, redirects among them, give the request up. 401, 403, 404
and a row of requests that were given up after all their tries end the run, because every further request would fail
too. Proxies, ``NO_PROXY`` and certificates of the environment hold as they do for other programs.

A server without a reasoning parser leaves thoughts in the text, as the model wrote them; those that a parser took out
(``reasoning_content``) are put back (:mod:`megatron_gft.sampling.written`).
"""

import asyncio
import functools
import json
import logging
import math
import os
import random
import urllib.parse
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx2

from megatron_gft.chat_template import KWARGS, ChatTemplateError
from megatron_gft.errors import InputError, shown
from megatron_gft.groups.records import prompt_tokens
from megatron_gft.sampling.settings import Outcome, Sample, SampleFailure, SampleRequest, SamplingParams, with_own_eos
from megatron_gft.sampling.sources import OpenAISource
from megatron_gft.sampling.written import BY_TAGS, PUT_BACK, prompt_opens, server_tags, with_thoughts, written_sample
from megatron_gft.scoring.thoughts import lost_tags

RETRIED_STATUS = frozenset({408, 409, 425, 429})
FATAL_STATUS = frozenset({401, 403, 404})
MAX_PAUSE_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS = 120.0
MAX_REPLY_BYTES = 256 << 20  # a hundred times the log-probs of a long response; what is longer is no reply
HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
SHORTEST_SECRET = 6  # a shorter word would take ordinary text with it
SHOWN_CHARACTERS = 300  # of what a server says
REFUSED_FINISH = ("content_filter", "tool_calls", "function_call")  # the same seed gives the same again
FAILURES_IN_A_ROW = 16  # requests given up after all their tries, without a success between them

logger = logging.getLogger(__name__)


class _Transient(Exception):
    """Worth another try, after ``retry_after`` seconds if the server said so."""

    def __init__(self, reason: str, retry_after: float = 0.0):
        super().__init__(reason)
        self.retry_after = retry_after


class _Refused(Exception):
    """This request will never work."""


class OpenAIBackend:
    """:class:`megatron_gft.sampling.settings.Backend` over HTTP.

    The tokenizer of the source renders prompts for ``api: completions`` and vouches for sampled ids, which are not
    kept without it.

    Raises:
        InputError: a bad url or proxy, or ``api_key_env`` names a variable that is not set or holds no key.
    """

    def __init__(self, source: OpenAISource):
        self._source, self._tokenizer = source, source.load_tokenizer()
        self._tags = server_tags(source.thoughts, self._tokenizer)
        self._url = _endpoint(source.url, "chat/completions" if source.api == "chat" else "completions")
        self._headers = HEADERS | _authorization(source.api_key_env)
        self._place = self._url.copy_with(query=None)  # for messages: a key may stand in the query
        self._secrets = _secrets(source.url, self._headers)
        self._certificates = httpx2.create_ssl_context()
        self._has_warned = False
        try:
            self._client()
        except (httpx2.InvalidURL, ValueError, ImportError) as error:
            reason = self._shown(str(error))
            raise InputError(f"proxy of the environment: {reason} -> correct or unset HTTP_PROXY, ALL_PROXY") from None

    def _client(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(headers=self._headers, verify=self._certificates, timeout=None)

    def generate(
        self, requests: Iterable[SampleRequest], params: SamplingParams, is_done: Callable[[str], bool]
    ) -> Iterator[Outcome]:
        """Outcomes as they arrive.

        Raises:
            InputError: the server refuses every request, or none succeeded for long.
        """
        return asked_together([functools.partial(self.ask, requests, params, is_done)])

    async def ask(
        self,
        requests: Iterable[SampleRequest],
        params: SamplingParams,
        is_done: Callable[[str], bool],
        arrived: asyncio.Queue[Any],
    ) -> None:
        """Put the outcomes of :meth:`generate` into ``arrived``."""
        work = (request for request in requests if not is_done(request.key))
        failures = 0

        async def ask_one_after_another() -> None:
            nonlocal failures
            async with self._client() as client:  # one each: looking through a pool of 512 takes 4 ms a request
                for request in work:
                    arrived.put_nowait(outcome := await self._sample(client, request, params))
                    if isinstance(outcome, Sample):
                        failures = 0
                        continue
                    failures += outcome.transient  # a refused prompt says nothing about the next one
                    if failures >= FAILURES_IN_A_ROW:
                        raise InputError(
                            f"{self._place}: {failures} requests in a row failed, the last with: {outcome.reason} "
                            "-> see to the server, then run again: finished samples are kept"
                        )

        await asyncio.gather(*(ask_one_after_another() for _ in range(self._source.concurrency)))

    async def _sample(self, client: httpx2.AsyncClient, request: SampleRequest, params: SamplingParams) -> Outcome:
        """One request with its retries."""
        try:
            body = json.dumps(self._body(request, params)).encode()
        except ChatTemplateError as error:
            return SampleFailure(request.key, f"chat template: {error}")
        reason, pause = "", 0.0
        for attempt in range(self._source.attempts):
            await asyncio.sleep(pause)
            try:
                reply = await self._post(client, body)
                return replace(self._read_sample(request, reply, params), prompt_tokens=_prompt_tokens(reply))
            except _Refused as refused:
                return SampleFailure(request.key, self._shown(str(refused)))
            except _Transient as transient:
                reason = self._shown(str(transient))
                if not self._has_warned:  # all tries of a server that is not there take minutes
                    self._has_warned = True
                    logger.warning(
                        "%s: %s; each request is tried up to %d times", self._place, reason, self._source.attempts
                    )
                longest = min(MAX_PAUSE_SECONDS, self._source.backoff * 2**attempt)
                pause = max(random.uniform(0, longest), min(transient.retry_after, MAX_RETRY_AFTER_SECONDS))
        return SampleFailure(request.key, f"{reason} ({self._source.attempts} attempts)", transient=True)

    async def _post(self, client: httpx2.AsyncClient, body: bytes) -> Any:
        """The JSON value of the reply to one POST; from connecting to the last byte within ``timeout`` seconds."""
        content = bytearray()
        try:
            async with (
                asyncio.timeout(self._source.timeout),  # httpx would grant every single read the whole time-out
                client.stream("POST", self._url, content=body) as response,
            ):
                if packing := response.headers.get("Content-Encoding"):  # a bomb, or what never ends and gives nothing
                    raise _Refused(f"reply packed with {packing}, which was not asked for")
                async for piece in response.aiter_raw():
                    content += piece
                    if len(content) > MAX_REPLY_BYTES:
                        raise _Refused(f"HTTP {response.status_code}: reply of more than {MAX_REPLY_BYTES >> 20} MiB")
        except TimeoutError as error:
            raise _Transient(f"no reply within {self._source.timeout:g} s") from error
        except (httpx2.HTTPError, OSError) as error:
            cause: BaseException = error
            while inner := cause.__cause__ or cause.__context__:  # httpx says that connecting failed, the first one why
                cause = inner
            raise _Transient(f"{type(cause).__name__}: {cause}") from error
        if response.status_code != 200:
            self._refuse(response.status_code, response.headers.get("Retry-After", ""), bytes(content))
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise _Transient(f"reply is not JSON: {content[:200].decode('utf-8', 'replace')}") from error

    def _shown(self, text: str) -> str:
        return shown(" ".join(text.split()), self._secrets)[:SHOWN_CHARACTERS]

    def _refuse(self, status: int, retry_after: str, content: bytes) -> None:
        reason = self._shown(f"HTTP {status}: {content[:4096].decode('utf-8', 'replace').strip()}")
        if status in RETRIED_STATUS or status >= 500:
            raise _Transient(reason, float(retry_after) if retry_after.replace(".", "", 1).isdecimal() else 0.0)
        if status in FATAL_STATUS:
            raise InputError(f"{self._place}: {reason} -> check url, model and api_key_env")
        raise _Refused(reason)

    def _body(self, request: SampleRequest, params: SamplingParams) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._source.model, "n": 1, "seed": request.seed}
        body |= {"temperature": params.temperature, "top_p": params.top_p, "max_tokens": params.max_tokens}
        if params.top_k:
            body["top_k"] = params.top_k
        if params.stop:
            body["stop"] = list(params.stop)
        if self._source.api == "chat":
            prompt = request.prompt
            body["messages"] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            if request.options.tools:  # in the prompt; a call of one stays in the text
                body |= {"tools": request.options.tools, "tool_choice": "none"}
            if params.logprobs:
                body["logprobs"] = True
        else:
            assert self._tokenizer is not None
            body["prompt"] = self._tokenizer.encode(self._tokenizer.render_prompt(request.prompt, request.options))
            if params.logprobs:
                body["logprobs"] = 1
        if self._source.token_ids:
            body["return_token_ids"] = True
        kwargs = {KWARGS: dict(request.options.kwargs)} if request.options.kwargs else {}  # with those of extra_body
        return body | self._source.extra_body | kwargs

    def _read_sample(self, request: SampleRequest, reply: Any, params: SamplingParams) -> Sample:
        """Check the reply field by field: a proxy's or a dying server's answer must not become a response.

        Raises:
            InputError: the server cannot give the log-probs that were asked for, or hides what the model wrote.
        """
        choice, text, thoughts = self._choice(reply)
        finish = choice["finish_reason"]
        missing = [name for name in ("token_ids", "logprobs") if choice.get(name) is None]
        if params.logprobs and text and missing:
            raise InputError(
                f"{self._place}: the reply has no {missing[0]}, which log-probs need -> use a server that gives "
                "them (vLLM with return_token_ids), or set logprobs=false"
            )
        ids, logprobs = self._ids_and_logprobs(choice, finish, params)
        if not thoughts:
            sample = written_sample(request.key, finish, self._tokenizer, text, ids, logprobs)
            if sample.token_ids is None and lost_tags(text):
                raise InputError(
                    f"{self._place}: the server leaves out special tokens around thoughts ({text[:20]!r}...) -> set "
                    "extra_body='{skip_special_tokens: false}', or use its reasoning parser"
                )
            return sample
        spelled = None if ids is None or self._tokenizer is None else self._tokenizer.written(ids)
        whole = self._with_thoughts(request, thoughts, text, spelled)
        if self._source.thoughts == "none" or (not text and finish == "stop" and whole != spelled):
            return Sample(request.key, text, finish, without_reasoning=True)  # or are the thoughts never closed?
        return written_sample(
            request.key, finish, self._tokenizer, whole, ids, logprobs, PUT_BACK if whole == spelled else BY_TAGS
        )

    def _with_thoughts(self, request: SampleRequest, thoughts: str, answer: str, spelled: str | None) -> str:
        if self._source.thoughts == "none":
            return answer
        opened = prompt_opens(self._tokenizer, request.prompt, request.options, self._source.api == "chat")
        try:
            return with_thoughts(thoughts, answer, spelled, self._tags, bool(opened))
        except InputError as error:
            raise InputError(f"{self._place}: {error}") from None

    def _choice(self, reply: Any) -> tuple[dict[str, Any], str, str]:
        """The one choice of a reply that ended as a response may, its text and the thoughts that were kept apart."""
        try:
            choice = reply["choices"][0]
            finish = choice["finish_reason"]
            message = choice["message"] if self._source.api == "chat" else {"content": choice["text"]}
            text, thoughts = message["content"], message.get("reasoning_content") or message.get("reasoning") or ""
            calls = message.get("tool_calls") or message.get("function_call")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Transient(f"reply without the text of a choice: {str(reply)[:200]}") from error
        said = next((f": {str(part['error'])[:200]}" for part in (choice, reply) if part.get("error")), "")
        if finish in REFUSED_FINISH:
            raise _Refused(f"reply with finish_reason {finish!r}{said}")
        if calls:
            raise _Refused("reply with tool calls taken out of the text: start the server without a tool parser")
        if finish not in ("stop", "length"):
            raise _Transient(f"reply with finish_reason {finish!r}{said}")
        if text is None and (thoughts or finish == "length"):
            text = ""  # all its tokens went into the thoughts; the same seed would do it again
        if not isinstance(text, str) or not isinstance(thoughts, str):
            raise _Transient(f"reply with content {text!r}, reasoning {str(thoughts)[:60]!r}")
        return choice, text, thoughts

    def _ids_and_logprobs(
        self, choice: dict[str, Any], finish: str, params: SamplingParams
    ) -> tuple[list[int] | None, list[float] | None]:
        """The sampled ids and their log-probs, where they are known to belong to the text and to each other."""
        ids, logprobs = choice.get("token_ids"), None
        if ids is None or self._tokenizer is None or isinstance(choice.get("stop_reason"), str):
            return None, None  # cut at a stop string: the ids spell more than the text
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise _Transient(f"reply with token_ids {str(ids)[:60]}")
        if ids and max(ids) >= self._tokenizer.vocab_size:
            known = f"{self._tokenizer.path}, which has {self._tokenizer.vocab_size} ids"
            raise _Refused(f"reply with token id {max(ids)}, unknown to tokenizer {known}: is it the model's?")
        if params.logprobs and choice.get("logprobs") is not None:
            values = _logprobs(choice["logprobs"], self._source.api)
            logprobs = values if len(values) == len(ids) else None
        end = self._tokenizer.special_ids if finish == "stop" else frozenset()
        return with_own_eos(ids, logprobs, end, self._tokenizer.eos_id)


def asked_together(servers: Sequence[Callable[[asyncio.Queue[Any]], Coroutine]]) -> Iterator[Outcome]:
    """Outcomes of several servers (:meth:`OpenAIBackend.ask`) as they arrive, from one event loop, which runs in the
    caller's thread while an outcome is waited for; the first exception of one is raised."""
    arrived: asyncio.Queue[Any] = asyncio.Queue()

    async def ask_all() -> None:
        await asyncio.gather(*(ask(arrived) for ask in servers))

    with asyncio.Runner() as runner:
        everything = runner.get_loop().create_task(ask_all())
        everything.add_done_callback(arrived.put_nowait)  # comes last, with what went wrong
        while (outcome := runner.run(arrived.get())) is not everything:
            yield outcome
        everything.result()


def _prompt_tokens(reply: dict[str, Any]) -> str | None:
    """Of the prompt as a server rendered it: vLLM gives its ids beside the choices (chat), or in each."""
    ids = reply.get("prompt_token_ids") or reply["choices"][0].get("prompt_token_ids")
    return prompt_tokens(ids) if isinstance(ids, list) and all(type(token) is int for token in ids) else None


def _logprobs(found: Any, api: str) -> list[float]:
    try:
        if api == "chat":
            values = [float(token["logprob"]) for token in found["content"]]
        else:
            values = [float(value) for value in found["token_logprobs"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _Transient(f"reply with log-probs {str(found)[:60]}") from error
    if not all(map(math.isfinite, values)):
        raise _Transient("reply with a log-prob that is not finite")
    return values


def _endpoint(url: str, method: str) -> httpx2.URL:
    try:
        base = httpx2.URL(url)
        labels = base.host.removesuffix(".").split(".")
        usable = base.scheme in ("http", "https") and all(labels) and (base.port is None or 0 < base.port < 1 << 16)
    except httpx2.InvalidURL:
        usable = False
    if not usable:
        raise InputError(f"url {url!r} is not http(s)://host[:port]/v1 -> correct it")
    # a password in it would be printed with every error: a key comes by api_key_env
    return base.copy_with(path=f"{base.path.rstrip('/')}/{method}", userinfo=b"")


def _secrets(url: str, headers: Mapping[str, str]) -> set[str]:
    """The key, the password and the query's values of the url, as they are and encoded."""
    parts = urllib.parse.urlsplit(url)
    found = [headers.get("Authorization", "").removeprefix("Bearer "), parts.password or ""]
    found += [word.partition("=")[2] for word in parts.query.split("&")]
    spelled = {form for word in found for form in (word, urllib.parse.unquote(word), urllib.parse.quote(word, ""))}
    return {word for word in spelled if len(word) >= SHORTEST_SECRET}


def _authorization(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    key = os.environ.get(variable, "")
    if not (key and key.isascii() and key.isprintable()):
        what = "holds what no HTTP header can carry (a line break, or letters beyond ASCII)" if key else "is not set"
        raise InputError(f"api_key_env: the environment variable {variable} {what} -> export the key alone")
    return {"Authorization": f"Bearer {key}"}
