"""Shared fixtures. Importing ``ranks`` first sets one thread per process before any torch operation."""

import functools
import multiprocessing.forkserver
import os
import signal
import threading
from pathlib import Path

if not os.path.exists("/dev/nvidiactl") or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which Megatron does

import hypothesis
import pytest
import ranks  # noqa: F401
import torch
from tqdm import tqdm

# tqdm's own lock is a semaphore that all forks share: a child killed while it holds it would stop every later one.
tqdm.set_lock(threading.RLock())


def forget_fork_server():
    """Children that tests fork start one of their own: they cannot wait for this process's."""
    server = multiprocessing.forkserver._forkserver
    server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None


os.register_at_fork(after_in_child=forget_fork_server)

hypothesis.settings.register_profile("shared machine", deadline=None)  # others' load is no fault of ours
hypothesis.settings.load_profile("shared machine")


def pytest_configure():
    """Tests of Ctrl-C work in a background job too, where shells have SIGINT ignored, by children as well."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signals_as_before():
    """A run in this process takes over its signals; children that later tests fork would not end by SIGTERM."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    if threading.current_thread() is threading.main_thread():
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)


# Files that take long begin first: at the end no worker works alone.
LONG = ("study", "trainer", "layouts", "survive", "train_cli", "fake_cuda", "hf_weights", "rounds", "step", "convert")


def pytest_collection_modifyitems(config, items):
    """Tests marked ``gpu`` need a CUDA device; ``soak`` and ``slurm`` run only when asked for by ``-m``."""
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    not_asked = pytest.mark.skip(reason="runs in make soak")
    slurm = pytest.mark.skip(reason="runs in make test-slurm")
    soak = "soak" in (config.getoption("-m") or "") or os.environ.get("MEGATRON_GFT_SOAK") == "1"
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("soak") and not soak:
            item.add_marker(not_asked)
        if item.get_closest_marker("slurm") and "slurm" not in (config.getoption("-m") or ""):
            item.add_marker(slurm)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a tiny random Hugging Face model, written once a session: ``tiny(name, style="tf4")``."""
    from tiny_models import write_tiny_model  # imports transformers, which most tests do without

    @functools.cache
    def folder(name: str, style: str = "tf4") -> Path:
        return write_tiny_model(tmp_path_factory.mktemp("hf") / name, name, style=style)

    return folder
