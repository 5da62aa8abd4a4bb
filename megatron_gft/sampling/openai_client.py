"""Samples from a server with the OpenAI interface (vLLM, SGLang, any other), over the standard library's HTTP client.

One request asks for one response, so that each has its own seed and a lost connection costs one response (servers
share the prompt's computation by prefix caching). ``concurrency`` threads keep one connection each. What may be
transient is tried again with exponential back-off and full jitter, honouring ``Retry-After``: no connection, a
dropped connection, a time-out, HTTP 408/409/425/429/5xx, an answer that is not what the interface says. Other HTTP
errors give the request up; 401, 403, 404 and a row of given-up requests end the run, because every further request
would fail too. Connections go straight to ``url``: proxy variables of the environment are not used.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import random
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
FAILURES_IN_A_ROW = 16  # given-up requests without a success between them


@dataclass(frozen=True)
class ServerOptions:
    """How to speak to one server.

    Args:
        url: base, with the version (``http://host:8000/v1``).
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
        InputError: a bad url, or ``api_key_env`` names a variable that is not set.
    """

    def __init__(self, options: ServerOptions, tokenizer: Tokenizer | None = None):
        parts = urllib.parse.urlsplit(options.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"url {options.url!r} is not http(s)://host[:port]/v1 -> correct it")
        if options.api == "completions" and tokenizer is None:
            raise InputError("api: completions needs the model's tokenizer -> set tokenizer=DIR, or api=chat")
        self._options, self._url, self._tokenizer = options, parts, tokenizer
        self._headers = {"Content-Type": "application/json", **_authorization(options.api_key_env)}
        self._limiter = RateLimiter(options.requests_per_second)
        self._random = random.Random()
        self.tokenizer_fingerprint = None if tokenizer is None else tokenizer.fingerprint
        self.lineage = {"backend": "openai", "model": options.model, "api": options.api}

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
            else:
                failures = failures + 1 if isinstance(result, SampleFailure) else 0
                yield result
                if failures >= FAILURES_IN_A_ROW and isinstance(result, SampleFailure):
                    raise InputError(
                        f"{self._options.url}: {failures} requests in a row failed, the last with: {result.reason} "
                        "-> see to the server, then run again: finished samples are kept"
                    )

    def _sample(
        self, connection: _Connection, request: SampleRequest, params: SamplingParams, stop: threading.Event
    ) -> Outcome:
        """One request with its retries."""
        try:
            body = json.dumps(self._body(request, params)).encode()
        except ChatTemplateError as error:
            return SampleFailure(request.key, f"chat template: {error}")
        path = f"{self._url.path.rstrip('/')}/{'chat/completions' if self._options.api == 'chat' else 'completions'}"
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
        return SampleFailure(request.key, f"{reason} ({self._options.attempts} attempts)")

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
        """Check the reply field by field: a proxy's or a dying server's answer must not become a response."""
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"] if self._options.api == "chat" else choice["text"]
            finish = choice["finish_reason"]
            ids = choice.get("token_ids")
            logprobs = _logprobs(choice, self._options.api) if params.logprobs else None
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Transient(f"reply without {error}") from error
        if not isinstance(text, str):
            raise _Transient(f"reply with content {text!r}")
        if finish not in ("stop", "length"):
            raise _Transient(f"reply with finish_reason {finish!r}")
        if isinstance(choice.get("stop_reason"), str) or self._tokenizer is None:
            ids = None  # cut at a stop string: the ids spell more than the text
        if ids is None or (logprobs is not None and len(logprobs) != len(ids)):
            logprobs = None
        if ids is not None and self._tokenizer is not None:
            end = self._tokenizer.special_ids if finish == "stop" else frozenset()
            ids, logprobs = with_own_eos(ids, logprobs, end, self._tokenizer.eos_id)
        return Sample(key, text, finish, ids, logprobs)


def _logprobs(choice: dict[str, Any], api: str) -> list[float]:
    if api == "chat":
        return [float(token["logprob"]) for token in choice["logprobs"]["content"]]
    return [float(value) for value in choice["logprobs"]["token_logprobs"]]


def _authorization(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    key = os.environ.get(variable)
    if not key:
        raise InputError(f"api_key_env: the environment variable {variable} is not set -> export it")
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


class _Connection:
    """One kept-alive connection; every way to fail becomes :class:`_Transient`, :class:`_Refused` or InputError."""

    def __init__(self, url: urllib.parse.SplitResult, headers: dict[str, str], timeout: float):
        self._url, self._headers, self._timeout = url, headers, timeout
        self._http: http.client.HTTPConnection | None = None

    def post(self, path: str, body: bytes) -> Any:
        """The JSON value of the reply to one POST."""
        deadline = time.monotonic() + self._timeout
        try:
            status, headers, content = self._exchange(path, body, deadline)
        except TimeoutError as error:
            raise _Transient(f"no reply within {self._timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Transient(f"{type(error).__name__}: {error}") from error
        if status != 200:
            self._refuse(status, headers, content)
        try:
            return json.loads(content)
        except ValueError as error:
            raise _Transient(f"reply is not JSON ({len(content)} bytes)") from error

    def _exchange(self, path: str, body: bytes, deadline: float) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Send and read everything before ``deadline``, however slowly the bytes trickle in."""
        if self._http is None:
            host, port = self._url.hostname or "", self._url.port
            if self._url.scheme == "https":
                context = ssl.create_default_context()
                self._http = http.client.HTTPSConnection(host, port, timeout=self._timeout, context=context)
            else:
                self._http = http.client.HTTPConnection(host, port, timeout=self._timeout)
            self._http.connect()
        connection = self._http.sock
        connection.settimeout(self._timeout)
        self._http.request("POST", path, body, self._headers)
        response = self._http.getresponse()
        pieces = []
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            connection.settimeout(remaining)
            piece = response.read1(1 << 16)
            if not piece:
                break
            pieces.append(piece)
        content = b"".join(pieces)
        if response.length:  # the server promised more
            raise http.client.IncompleteRead(content, response.length)
        response.close()  # read1 leaves that to us; an open response blocks the next request
        if response.will_close:
            self.close()
        return response.status, response.headers, content

    def _refuse(self, status: int, headers: http.client.HTTPMessage, content: bytes) -> None:
        reason = f"HTTP {status}: {content[:300].decode('utf-8', 'replace').strip()}"
        if status in RETRIED_STATUS or status >= 500:
            after = headers.get("Retry-After", "")
            raise _Transient(reason, float(after) if after.replace(".", "", 1).isdigit() else None)
        if status in FATAL_STATUS:
            raise InputError(f"{self._url.geturl()}: {reason} -> check url, model and api_key_env")
        raise _Refused(reason)

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None
