"""The server that a generate stage asks: started and stopped around it, or given; it must serve the round's model."""

import contextlib
import http.client
import json
import shlex
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from megatron_gft.errors import InputError
from megatron_gft.rounds.settings import ServeSettings
from megatron_gft.rounds.stages import StageFailed, last_lines, say, started
from megatron_gft.sampling.settings import model_fingerprint

STOP_SECONDS = 20.0
POLL_SECONDS = 0.5
ANSWER_SECONDS = 10.0


@contextlib.contextmanager
def serving(
    settings: ServeSettings, command: Sequence[str], model: Path, log: Path
) -> Iterator[subprocess.Popen | None]:
    """Have a server of ``model`` at ``settings.url`` while the block runs; its process, if it is ours.

    Raises:
        InputError: the port is taken, or another model is served there.
        StageFailed: it ended, or did not answer in time.
    """
    if not command:
        check_model(settings.url, model, f"restart it with {model}")
        yield None
        return
    url = urllib.parse.urlsplit(settings.url)
    with contextlib.suppress(OSError), socket.create_connection((url.hostname, url.port or 80), ANSWER_SECONDS):
        raise InputError(
            f"serve.url={settings.url}: the port is taken, by {_names(settings.url) or 'something'} -> stop that, or "
            "choose another port in serve.url and serve.command"
        )
    say(f"$ {shlex.join(command)}")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        process = started(command, file)
    try:
        _wait(settings, process, log)
        check_model(settings.url, model, "correct serve.command: it serves {model}")
        yield process
    finally:
        stop(process)


def _wait(settings: ServeSettings, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + settings.timeout
    while not _names(settings.url):
        if process.poll() is not None:
            raise StageFailed(
                f"serve.command: ended with code {process.returncode} before it answered at {settings.url}; "
                f"log: {log}\n{last_lines(log)}"
            )
        if time.monotonic() > deadline:
            raise StageFailed(
                f"serve.timeout={settings.timeout:g}: no answer at {settings.url}/models in so many seconds -> raise "
                f"it, or correct serve.command and serve.url; log: {log}\n{last_lines(log)}"
            )
        time.sleep(POLL_SECONDS)


def check_model(url: str, model: Path, cure: str) -> None:
    """Raise InputError unless the round's model is served: by name and, where its folder can be seen, by content."""
    served = _names(url)
    if not served:
        raise InputError(f"serve.url={url}: no answer -> start a server of {model} there")
    if str(model) not in served:
        raise InputError(f"serve.url={url}: serves {', '.join(served)}, this round samples from {model} -> {cure}")
    root = Path(served[str(model)])
    if root.is_dir() and root.resolve() != model.resolve():
        theirs, ours = model_fingerprint(root)[:12], model_fingerprint(model)[:12]
        if theirs != ours:
            raise InputError(f"serve.url={url}: serves {root} ({theirs}) as {model}, which is {ours} -> {cure}")


def _names(url: str) -> dict[str, str]:
    """The folder of each model that a server names (vLLM's ``root``); empty without an answer of this kind."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/models", timeout=ANSWER_SECONDS) as reply:
            return {entry["id"]: entry.get("root") or entry["id"] for entry in json.load(reply)["data"]}
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError):
        return {}


def stop(process: subprocess.Popen) -> None:
    """End a server with all its processes: asked first, killed after a while."""
    with contextlib.suppress(psutil.Error):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with contextlib.suppress(psutil.Error):
                member.terminate()
        for member in psutil.wait_procs(family, STOP_SECONDS)[1]:
            with contextlib.suppress(psutil.Error):
                member.kill()
    process.wait()
