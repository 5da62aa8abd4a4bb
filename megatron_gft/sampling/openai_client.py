"""Samples from a server with the OpenAI interface (vLLM, SGLang, any other), over the standard library's HTTP client.

One request asks for one response, so that each has its own seed and a lost connection costs one response (servers
share the prompt's computation by prefix caching). ``concurrency`` threads keep one connection each. What may be
transient is tried again with exponential back-off and full jitter, honouring ``Retry-After``: no connection, a
dropped connection, a time-out, HTTP 408/409/425/429/5xx, an answer that is not what the interface says. Other HTTP
errors give the request up. 401, 403, 404 and a row of requests that were given up after all their tries end the run,
because every further request would fail too. Connections go straight to ``url``: proxy variables of the environment
are not used.

Of a reasoning model behind a server that parses its thoughts out (``reasoning_content``), the answer alone becomes the
response: how the thoughts were spelled is not known here, so ids and log-probs are dropped with them and the summary
counts such responses. A server without a reasoning parser leaves the thoughts in the text, as the model wrote them.
"""

from __future__ import annotations

import functools
import http.client
import io
import json
import math
import os
import queue
import random
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_gft.errors import InputError
from megatron_gft.sampling.settings import Outcome, Sample, SampleFailure, SampleRequest, SamplingParams, with_own_eos
from megatron_gft.tokenizer import ChatTemplateError, Tokenizer

RETRIED_STATUS = frozenset({408, 409, 425, 429})
FATAL_STATUS = frozenset({401, 403, 404})
MAX_RETRY_AFTER_SECONDS = 120.0
REFUSED_FINISH = frozenset({"content_filter", "tool_calls", "function_call"})  # the same seed gives the same again
FAILURES_IN_A_ROW = 16  # requests given up after all their tries, without a success between them


@dataclass(frozen=True)
class ServerOptions:
    """How to speak to one server.

    Args:
        url: base, with the version (``http://host:8000/v1``); a query (``?api-version=1``) goes with every request.
        model: name that the server knows the model by.
        api: ``chat`` (the server renders the chat template) or ``completions`` (we render it).
        api_key_env: environment variable with the key; the key itself is never written anywhere.
        timeout: seconds for one request from connecting to the last byte.
        attempts: tries per request; ``backoff`` seconds is the longest first pause, doubled for each further one.
        requests_per_second: limit over all threads; ``None`` for none.
        token_ids: ask for the sampled ids (vLLM's ``return_token_ids``).
        extra_body: further fields of each request.
    """

    url: str
    model: str
    api: str = "chat"
    api_key_env: str | None = None
    concurrency: int = 16
    timeout: float = 600.0
    attempts: int = 8
    backoff: float = 1.0
    max_backoff: float = 60.0
    requests_per_second: float | None = None
    token_ids: bool = False
    extra_body: dict[str, Any] = field(default_factory=dict)


class _Transient(Exception):
    """Worth another try, after ``retry_after`` seconds if the server said so."""

    def __init__(self, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.retry_after = retry_after


class _Refused(Exception):
    """This request will never work."""


class OpenAIBackend:
    """:class:`megatron_gft.sampling.settings.Backend` over HTTP.

    Args:
        options: the server.
        tokenizer: the model's; renders prompts for ``api: completions`` and vouches for sampled ids, which are not
            kept without it.

    Raises:
        InputError: a bad url, or ``api_key_env`` names a variable that is not set or holds no key.
    """

    def __init__(self, options: ServerOptions, tokenizer: Tokenizer | None = None):
        if options.api == "completions" and tokenizer is None:
            raise InputError("api: completions needs the model's tokenizer -> set tokenizer=DIR, or api=chat")
        self._options, self._url, self._tokenizer = options, _parse_url(options.url), tokenizer
        self._headers = {"Content-Type": "application/json", **_authorization(options.api_key_env)}
        self._limiter = RateLimiter(options.requests_per_second)
        self._random = random.Random()

    def generate(
        self, requests: Iterable[SampleRequest], params: SamplingParams, is_done: Callable[[str], bool]
    ) -> Iterator[Outcome]:
        """Outcomes as they arrive.

        Raises:
            InputError: the server refuses every request, or none succeeded for long.
        """
        work = (request for request in requests if not is_done(request.key))
        lock, stop = threading.Lock(), threading.Event()
        results: queue.Queue[Outcome | BaseException | None] = queue.Queue()

        def serve() -> None:
            connection = _Connection(self._url, self._headers, self._options.timeout)
            try:
                while not stop.is_set():
                    with lock:
                        request = next(work, None)
                    if request is None:
                        break
                    results.put(self._sample(connection, request, params, stop))
            except BaseException as error:
                results.put(error)
            finally:
                connection.close()
                results.put(None)

        threads = [threading.Thread(target=serve, daemon=True) for _ in range(self._options.concurrency)]
        for thread in threads:
            thread.start()
        try:
            yield from self._drain(results, len(threads))
        finally:
            stop.set()

    def _drain(self, results: queue.Queue[Outcome | BaseException | None], running: int) -> Iterator[Outcome]:
        failures = 0
        while running:
            result = results.get()
            if result is None:
                running -= 1
            elif isinstance(result, BaseException):
                raise result
            elif isinstance(result, SampleFailure):
                yield result
                failures += result.transient  # a refused prompt says nothing about the next one
                if failures >= FAILURES_IN_A_ROW:
                    raise InputError(
                        f"{self._options.url}: {failures} requests in a row failed, the last with: {result.reason} "
                        "-> see to the server, then run again: finished samples are kept"
                    )
            else:
                failures = 0
                yield result

    def _sample(
        self, connection: _Connection, request: SampleRequest, params: SamplingParams, stop: threading.Event
    ) -> Outcome:
        """One request with its retries."""
        try:
            body = json.dumps(self._body(request, params)).encode()
        except ChatTemplateError as error:
            return SampleFailure(request.key, f"chat template: {error}")
        path = f"{self._url.path.rstrip('/')}/{'chat/completions' if self._options.api == 'chat' else 'completions'}"
        path += f"?{self._url.query}" if self._url.query else ""
        reason = ""
        for attempt in range(self._options.attempts):
            self._limiter.wait()
            try:
                return self._read_sample(request.key, connection.post(path, body), params)
            except _Refused as refused:
                return SampleFailure(request.key, str(refused))
            except _Transient as transient:
                reason = str(transient)
                connection.close()
                longest = min(self._options.max_backoff, self._options.backoff * 2**attempt)
                pause = max(self._random.uniform(0, longest), min(transient.retry_after or 0, MAX_RETRY_AFTER_SECONDS))
                if attempt + 1 < self._options.attempts and stop.wait(pause):
                    break
        return SampleFailure(request.key, f"{reason} ({self._options.attempts} attempts)", transient=True)

    def _body(self, request: SampleRequest, params: SamplingParams) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._options.model, "n": 1, "seed": request.seed}
        body |= {"temperature": params.temperature, "top_p": params.top_p, "max_tokens": params.max_tokens}
        if params.top_k:
            body["top_k"] = params.top_k
        if params.stop:
            body["stop"] = list(params.stop)
        if self._options.api == "chat":
            prompt = request.prompt
            body["messages"] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            if params.logprobs:
                body["logprobs"] = True
        else:
            assert self._tokenizer is not None
            body["prompt"] = self._tokenizer.encode(self._tokenizer.render_prompt(request.prompt))
            if params.logprobs:
                body["logprobs"] = 1
        if self._options.token_ids:
            body["return_token_ids"] = True
        return body | self._options.extra_body

    def _read_sample(self, key: str, reply: Any, params: SamplingParams) -> Sample:
        """Check the reply field by field: a proxy's or a dying server's answer must not become a response.

        Raises:
            InputError: the server cannot give the log-probs that were asked for.
        """
        try:
            choice = reply["choices"][0]
            finish = choice["finish_reason"]
            message = choice["message"] if self._options.api == "chat" else {"content": choice["text"]}
            text = message["content"]
            thoughts = message.get("reasoning_content") or message.get("reasoning")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Transient(f"reply without {error}") from error
        if finish in REFUSED_FINISH:
            raise _Refused(f"reply with finish_reason {finish!r}")
        if finish not in ("stop", "length"):
            raise _Transient(f"reply with finish_reason {finish!r}")
        if text is None and (thoughts or finish == "length"):
            text = ""  # all its tokens went into the thoughts; the same seed would do it again
        if not isinstance(text, str):
            raise _Transient(f"reply with content {text!r}")
        if params.logprobs and text and (choice.get("token_ids") is None or choice.get("logprobs") is None):
            missing = "token_ids" if choice.get("token_ids") is None else "logprobs"
            raise InputError(
                f"{self._options.url}: the reply has no {missing}, which log-probs need -> use a server that gives "
                "them (vLLM with return_token_ids), or set logprobs=false"
            )
        ids, logprobs = (None, None) if thoughts else self._ids_and_logprobs(choice, finish, params)
        return Sample(key, text, finish, ids, logprobs, without_reasoning=bool(thoughts))

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
            values = _logprobs(choice["logprobs"], self._options.api)
            logprobs = values if len(values) == len(ids) else None
        end = self._tokenizer.special_ids if finish == "stop" else frozenset()
        return with_own_eos(ids, logprobs, end, self._tokenizer.eos_id)


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


def _parse_url(url: str) -> urllib.parse.SplitResult:
    """Parts of a server's url, its path spelled as HTTP wants it."""
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        (parts.hostname or "").encode("idna")
    except ValueError:  # of a port or a host name
        usable = False
    if not usable:
        raise InputError(f"url {url!r} is not http(s)://host[:port]/v1 -> correct it")
    path, query = (urllib.parse.quote(part, safe="/%:@&=+,;?!$'()*~") for part in (parts.path, parts.query))
    return parts._replace(path=path, query=query)


def _authorization(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    key = os.environ.get(variable)
    if not key:
        raise InputError(f"api_key_env: the environment variable {variable} is not set -> export it")
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            f"api_key_env: {variable} holds what no HTTP header can carry (a line break, or letters beyond ASCII) "
            "-> export the key alone"
        )
    return {"Authorization": f"Bearer {key}"}


class RateLimiter:
    """Spaces the calls of all threads ``1 / rate`` seconds apart."""

    def __init__(self, rate: float | None):
        self._interval = 1 / rate if rate else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Sleep until this call's turn."""
        if not self._interval:
            return
        with self._lock:
            turn = max(time.monotonic(), self._next)
            self._next = turn + self._interval
        time.sleep(max(0.0, turn - time.monotonic()))


class _TimedReader(io.RawIOBase):
    """What a socket receives until a deadline; http.client alone would grant every single read the whole time-out."""

    def __init__(self, connection: socket.socket, deadline: float):
        self._socket, self._raw, self._deadline = connection, connection.makefile("rb", buffering=0), deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._socket.settimeout(remaining)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """Status, headers and body of a reply, all of them within one deadline."""

    def __init__(self, connection: socket.socket, *arguments: Any, deadline: float, **options: Any):
        super().__init__(connection, *arguments, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_TimedReader(connection, deadline))


class _Connection:
    """One kept-alive connection; every way to fail becomes :class:`_Transient`, :class:`_Refused` or InputError."""

    def __init__(self, url: urllib.parse.SplitResult, headers: dict[str, str], timeout: float):
        self._url, self._headers, self._timeout = url, headers, timeout
        self._http: http.client.HTTPConnection | None = None

    def post(self, path: str, body: bytes) -> Any:
        """The JSON value of the reply to one POST."""
        try:
            status, headers, content = self._exchange(path, body)
        except TimeoutError as error:
            raise _Transient(f"no reply within {self._timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Transient(f"{type(error).__name__}: {error}") from error
        if status != 200:
            self._refuse(status, headers, content)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise _Transient(f"reply is not JSON ({len(content)} bytes)") from error

    def _exchange(self, path: str, body: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Send and read everything before one deadline, however slowly the bytes trickle in."""
        deadline = time.monotonic() + self._timeout
        if self._http is None:
            host, port = self._url.hostname or "", self._url.port
            if self._url.scheme == "https":
                context = ssl.create_default_context()
                self._http = http.client.HTTPSConnection(host, port, timeout=self._timeout, context=context)
            else:
                self._http = http.client.HTTPConnection(host, port, timeout=self._timeout)
            self._http.connect()
        self._http.sock.settimeout(max(deadline - time.monotonic(), 0.001))
        self._http.response_class = functools.partial(_Response, deadline=deadline)  # type: ignore[assignment]
        self._http.request("POST", path, body, self._headers)
        with self._http.getresponse() as response:
            content = response.read()
        if response.will_close:
            self.close()
        return response.status, response.headers, content

    def _refuse(self, status: int, headers: http.client.HTTPMessage, content: bytes) -> None:
        reason = f"HTTP {status}: {content[:300].decode('utf-8', 'replace').strip()}"
        if status in RETRIED_STATUS or status >= 500:
            after = headers.get("Retry-After", "")
            raise _Transient(reason, float(after) if after.replace(".", "", 1).isdecimal() else None)
        if status in FATAL_STATUS:
            raise InputError(f"{self._url.geturl()}: {reason} -> check url, model and api_key_env")
        raise _Refused(reason)

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None
