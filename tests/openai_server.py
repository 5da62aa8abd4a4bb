"""A local server with the OpenAI interface whose replies are a function of the request, and which fails on demand.

Faults: HTTP 500, 429 with Retry-After, a dropped connection before or in the middle of the reply, a stall longer than
the client's time-out, a reply that is not JSON, a reply without choices, finish_reason abort.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any

FAULTS = ("500", "429", "drop", "cut", "stall", "garbage", "empty", "abort")
BAD_REPLIES: dict[str, tuple[int, bytes]] = {
    "500": (500, b"internal error"),
    "429": (429, b"slow down"),
    "garbage": (200, b"<html>proxy says hello</html>"),
    "empty": (200, b'{"choices": []}'),
}


def expected_text(prompt: Any, seed: int) -> str:
    """What the server says to a prompt under a seed."""
    digest = hashlib.sha256(f"{json.dumps(prompt)}|{seed}".encode()).hexdigest()
    return f"Résumé {digest[:12]} \u2028 #### {int(digest[:4], 16)}"


def vllm_reply(written: str, parser=None, finish="stop", specials=None, **fields) -> tuple[int, bytes]:
    """What vLLM says of what a model wrote: its reasoning parser takes thoughts out; special tokens are left out.

    Args:
        parser: ``deepseek_r1`` and ``qwen3`` cut at </think>, ``openai_gptoss`` reads channels; None: all is the text.
        specials: pattern of special tokens.
    """
    message: dict[str, Any] = {"role": "assistant", "content": written, "reasoning_content": None}
    if parser == "openai_gptoss":
        parts = re.findall(r"<\|channel\|>(\w+)<\|message\|>(.*?)(?:<\|end\|>|<\|return\|>|$)", written, re.DOTALL)
        said = {name: text for name, text in parts}
        message |= {"content": said.get("final"), "reasoning_content": said.get("analysis")}
    elif parser is not None:
        thoughts, closing, content = written.removeprefix("<think>").partition("</think>")
        message |= {"content": content or None, "reasoning_content": thoughts}
    elif specials is not None:
        message["content"] = specials.sub("", written)
    return 200, json.dumps({"choices": [{"message": message, "finish_reason": finish} | fields]}).encode()


class FaultyServer:
    """Serve in threads on a free port until closed.

    Args:
        fault_share: share of requests that meet a fault, chosen by a seeded generator.
        delay: seconds before each reply.
        stall: seconds of a stall; longer than the client's time-out.
        status: when set, every request is answered with it.
        token_ids: what ids the server gives to a text, when asked for ids.
        answer: when set, gives status and bytes of the reply to the body of a request.
        models: what ``/models`` names, id -> folder.
    """

    def __init__(
        self,
        fault_share=0.0,
        seed=0,
        delay=0.0,
        stall=1.0,
        status=None,
        faults=FAULTS,
        token_ids=None,
        answer=None,
        port=0,
        models=MappingProxyType({}),
    ):
        self.fault_share, self.delay, self.stall, self.status, self.faults = fault_share, delay, stall, status, faults
        self.token_ids, self.answer, self.models = token_ids, answer, models
        self.seen: Counter[str] = Counter()  # fault or "ok" -> requests
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.random, self.lock = random.Random(seed), threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # headers and body go in two writes, which would wait for each other

            def do_POST(self) -> None:
                server.handle(self)

            def do_GET(self) -> None:
                models = [{"id": name, "root": folder} for name, folder in server.models.items()]
                server._send(self, 200, json.dumps({"data": models}).encode())

            def log_message(self, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:  # clients get killed: not worth a word
                pass

        self._http = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> FaultyServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _choose_fault(self) -> str:
        with self.lock:
            fault = self.random.choice(self.faults) if self.random.random() < self.fault_share else "ok"
            self.seen[fault] += 1
        return fault

    def handle(self, http: BaseHTTPRequestHandler) -> None:
        body = json.loads(http.rfile.read(int(http.headers["Content-Length"])))
        with self.lock:
            self.requests.append(body)
            self.times.append(time.monotonic())
            self.headers.append(dict(http.headers))
            self.paths.append(http.path)
        fault = self._choose_fault()
        time.sleep(self.delay)
        if self.answer is not None:
            self._send(http, *self.answer(body))
        elif self.status is not None:
            self._send(http, self.status, b'{"error": "as configured"}')
        elif fault in BAD_REPLIES:
            self._send(http, *BAD_REPLIES[fault])
        elif fault == "drop":
            http.connection.close()
            http.close_connection = True
        else:
            content = json.dumps(self._reply(body, http.path, "abort" if fault == "abort" else "stop")).encode()
            if fault == "stall":
                time.sleep(self.stall)
            if fault == "cut":
                http.send_response(200)
                http.send_header("Content-Length", str(len(content)))
                http.end_headers()
                http.wfile.write(content[: len(content) // 2])
                http.wfile.flush()
                http.connection.shutdown(2)
                http.close_connection = True
            else:
                self._send(http, 200, content)

    def _reply(self, body: dict[str, Any], path: str, finish: str) -> dict[str, Any]:
        chat = path.endswith("/chat/completions")
        text = expected_text(body["messages"] if chat else body["prompt"], body["seed"])
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "stop_reason": None}
        if body.get("return_token_ids") and self.token_ids is not None:
            ids = self.token_ids(text)
            choice["token_ids"] = ids
            if body.get("logprobs"):
                values = [-0.5 - 0.001 * i for i in range(len(ids))]
                content = [{"token": "t", "logprob": value} for value in values]
                choice["logprobs"] = {"content": content} if chat else {"token_logprobs": values}
        return {"choices": [choice | ({"message": {"role": "assistant", "content": text}} if chat else {"text": text})]}

    def _send(self, http: BaseHTTPRequestHandler, status: int, content: bytes) -> None:
        http.send_response(status)
        if status == 429:
            http.send_header("Retry-After", "0.01")
        http.send_header("Content-Length", str(len(content)))
        http.end_headers()
        http.wfile.write(content)


if __name__ == "__main__":  # PORT NAME FOLDER [FAULT_SHARE]
    port, name, folder, *share = sys.argv[1:]
    FaultyServer(*map(float, share), port=int(port), models={name: folder})
    threading.Event().wait()
