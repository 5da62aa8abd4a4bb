"""Preprocessing under fire: killed at any point, two runs at once, dying workers."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from group_files import random_records
from tiny_tokenizers import byte_level_folder

from megatron_gft.atomic import sha256_file
from megatron_gft.dataset import build_group_datasets
from megatron_gft.errors import InputError
from megatron_gft.groups import GroupRecord, ResponseRecord, write_group_file
from megatron_gft.preprocess.encode import ChunkEncoder
from megatron_gft.preprocess.run import PreprocessOptions, preprocess
from megatron_gft.preprocess.staging import Staging
from megatron_gft.preprocess.workers import OrderedWorkers, WorkerDied, WorkerError
from megatron_gft.shards import GroupShard
from megatron_gft.shards.manifest import read_manifest
from megatron_gft.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_level_folder(tmp_path_factory.mktemp("tokenizer") / "hf")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# --- interruptions --------------------------------------------------------------------------------------------------


def _in_child(function, delay: float | None, begun=lambda: True) -> int:
    """Run ``function`` in a forked process, SIGKILL it ``delay`` seconds after it has ``begun``; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    if delay is not None:
        while process.is_alive() and not begun():
            time.sleep(0.002)
        process.join(delay)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    process.join(300)
    return process.exitcode


def _check_nothing_partial(folder: Path, complete: dict[str, bytes]) -> None:
    """Every manifest that is there is of a whole shard, and an incomplete set is refused."""
    manifests = sorted(folder.glob("train*.json")) if folder.exists() else []
    for path in manifests:
        listed = read_manifest(str(path).removesuffix(".json")).files
        assert {name: sha256_file(folder / name) for name in listed} == {name: e.sha256 for name, e in listed.items()}
    expected = sum(name.endswith(".json") for name in complete)
    if 0 < len(manifests) < expected:
        with pytest.raises(InputError, match="shards are given"):
            build_group_datasets([f"{folder}/train*"])


@pytest.fixture(scope="module")
def interrupted_case(tmp_path_factory, folder):
    base = tmp_path_factory.mktemp("interrupted")
    write_group_file(base / "in.jsonl", random_records(300))
    options = PreprocessOptions(
        [str(base / "in.jsonl")], str(folder), str(base / "whole" / "train"), rows_per_chunk=8, max_groups_per_shard=100
    )
    preprocess(options, progress=False)
    started = time.monotonic()
    preprocess(replace(options, output_prefix=str(base / "again" / "train")), progress=False)
    return options, contents(base / "whole"), time.monotonic() - started


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_points_it_completes_to_the_same_bytes(interrupted_case, tmp_path, workers):
    options, complete, duration = interrupted_case
    options = replace(options, output_prefix=str(tmp_path / "out" / "train"), workers=workers)
    rng = random.Random(workers)
    codes = []
    for attempt in range(40):
        delay = duration * (0.2 * attempt if attempt < 3 else rng.uniform(0.3, 1.0) * attempt)
        begun = (tmp_path / "out" / ".train.staging" / "run.json").exists  # then the first kill comes in time
        codes.append(_in_child(lambda: preprocess(options, progress=False), delay, begun))
        _check_nothing_partial(tmp_path / "out", complete)
        if _has_all(tmp_path / "out", complete):  # a kill may also come after the last rename
            break
    assert codes[0] == -signal.SIGKILL and codes[-1] in (0, -signal.SIGKILL), codes
    assert _has_all(tmp_path / "out", complete)


def _has_all(folder: Path, complete: dict[str, bytes]) -> bool:
    files = {name: folder / name for name in complete}
    return all(path.is_file() and path.read_bytes() == complete[name] for name, path in files.items())


def _dying_at(options: PreprocessOptions, fatal: int, log: Path | None = None) -> None:
    """Preprocess, but end like ``kill -9`` at the ``fatal``-th rename or removal; write each into ``log``."""
    count = 0

    def or_die(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == fatal:
                os._exit(9)
            if log is not None:
                with open(log, "a") as lines:
                    lines.write(f"{function.__name__} {args[0]}\n")
            return function(*args, **kwargs)

        return call

    os.replace, os.unlink, os.rmdir = map(or_die, (os.replace, os.unlink, os.rmdir))
    preprocess(options, progress=False)
    os._exit(0)


def _changes(options: PreprocessOptions, folder: Path) -> list[str]:
    """Renames and removals of an undisturbed run."""
    chosen = replace(options, output_prefix=str(folder / "train"))
    assert _in_child(lambda: _dying_at(chosen, 0, folder.with_suffix(".log")), None) == 0
    return folder.with_suffix(".log").read_text().splitlines()


def test_killed_at_any_rename_or_removal_it_completes_to_the_same_bytes(interrupted_case, tmp_path):
    options, complete, _ = interrupted_case
    changes = _changes(options, tmp_path / "log")
    published = max(i for i, change in enumerate(changes, 1) if re.fullmatch("unlink .*/run.json", change))
    more = tmp_path / "more.jsonl"
    write_group_file(more, [replace(record, id=f"more-{i}") for i, record in enumerate(random_records(3))])
    assert published > 70 and len(changes) > published + 5
    for fatal in (*range(1, published, 13), *range(published - 1, len(changes) + 1, 3)):
        out = tmp_path / f"out{fatal}"
        chosen = replace(options, output_prefix=str(out / "train"))
        assert _in_child(lambda o=chosen, n=fatal: _dying_at(o, n), None) == 9
        _check_nothing_partial(out, complete)
        if fatal > published:  # all is there but the folder of the run is not gone yet
            with pytest.raises(InputError, match="train: the shard exists already"):
                preprocess(chosen, progress=False)
            preprocess(replace(chosen, append=True, inputs=[str(more)]), progress=False)
            assert _has_all(out, complete) and not list(out.glob(".*"))
        else:
            preprocess(chosen, progress=False)
            assert contents(out) == complete, fatal


def test_killed_while_it_begins_anew_it_takes_nothing_of_the_old_run(interrupted_case, tmp_path):
    """What is left of a folder that was half cleared must never be continued."""
    options, complete, _ = interrupted_case
    options = replace(options, output_prefix=str(tmp_path / "out" / "train"))
    other = replace(options, max_response_tokens=500)
    for fatal in (2, 5):
        _in_child(lambda: _dying_at(options, 50), None)
        assert _in_child(lambda n=fatal: _dying_at(other, n), None) == 9
    preprocess(options, progress=False)
    assert contents(tmp_path / "out") == complete


def test_a_resumed_run_keeps_finished_shards(interrupted_case, tmp_path):
    options, complete, _ = interrupted_case
    options = replace(options, output_prefix=str(tmp_path / "out" / "train"))
    _in_child(lambda: _dying_at(options, 30), None)
    staging = tmp_path / "out" / ".train.staging"
    finished = (staging / "train.bin").stat().st_mtime_ns
    preprocess(options, progress=False)
    assert (tmp_path / "out" / "train.bin").stat().st_mtime_ns == finished
    assert contents(tmp_path / "out") == complete


def test_changed_input_starts_anew(interrupted_case, tmp_path):
    options, complete, _ = interrupted_case
    options = replace(options, output_prefix=str(tmp_path / "out" / "train"))
    _in_child(lambda: _dying_at(options, 30), None)
    summary = preprocess(replace(options, max_response_tokens=500), progress=False)
    assert summary.groups == 300 and contents(tmp_path / "out").keys() == complete.keys()
    assert GroupShard(summary.prefixes[0]).manifest.provenance["limits"]["response"] == 500


def test_two_runs_on_one_prefix_do_not_mix(interrupted_case, tmp_path):
    options, _, _ = interrupted_case
    options = replace(options, output_prefix=str(tmp_path / "out" / "train"))
    ready, done = multiprocessing.Event(), multiprocessing.Event()

    def hold() -> None:
        staging = Staging(Path(options.output_prefix), "other", 0)
        ready.set()
        done.wait(30)
        staging.close()

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    ready.wait(30)
    with pytest.raises(InputError, match="another process writes"):
        preprocess(options, progress=False)
    done.set()
    process.join()


def _peak_mebibytes(options: PreprocessOptions, scratch: Path) -> int:
    """Largest resident size of this process and its two workers together, in a process of its own."""

    def measured() -> None:
        preprocess(options, progress=False)
        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kibibytes += 2 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # the larger of two workers
        (scratch / "peak").write_text(str(kibibytes >> 10))

    assert _in_child(measured, None) == 0
    mebibytes = int((scratch / "peak").read_text())
    print(f"peak of two workers and their parent: {mebibytes} MiB")
    return mebibytes


@pytest.mark.soak
@pytest.mark.parametrize(
    ("groups", "responses", "words", "sampled"),
    [(125_000, 8, 1, 0), (400, 16, 4000, 0), (25_000, 8, 1, 1000)],
    ids=["short", "long", "logprobs"],
)
def test_memory_stays_flat(tmp_path, folder, groups, responses, words, sampled):
    """A million short responses; long chains of thought, of which a few fill a worker's hands; 200 M log-probs."""
    tokens = {"finish_reason": "length", "token_ids": [9] * sampled, "logprobs": [-0.5] * sampled}
    tokens["tokenizer"] = load_tokenizer(folder).fingerprint

    def records():
        for i in range(groups):
            made = [
                ResponseRecord(
                    f"the answer is {i} or {k}" + " so" * (words - 1),
                    "self",
                    float(k % 2),
                    **(tokens if sampled else {}),
                )
                for k in range(responses)
            ]
            yield GroupRecord(f"group-{i}", f"what is {i}?", made)

    write_group_file(tmp_path / "in.jsonl", records())
    options = PreprocessOptions([str(tmp_path / "in.jsonl")], str(folder), str(tmp_path / "out" / "train"), workers=2)
    assert _peak_mebibytes(options, tmp_path) < 2048
    manifest = GroupShard(tmp_path / "out" / "train").manifest
    assert manifest.counts.responses == groups * responses and (manifest.logprobs is not None) == bool(sampled)


# --- disk and environment -------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_and_the_run_goes_on(interrupted_case, tmp_path):
    options, complete, _ = interrupted_case
    options = replace(options, output_prefix=str(tmp_path / "out" / "train"))
    largest = max(map(len, complete.values()))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, resource.RLIM_INFINITY))
        with pytest.raises(InputError, match="(?s)train: cannot be written .*File too large.* the same command again"):
            preprocess(options, progress=False)

    assert _in_child(limited, None) == 0
    assert not list((tmp_path / "out").glob("train*"))
    preprocess(options, progress=False)
    assert contents(tmp_path / "out") == complete


@pytest.mark.parametrize("setting", ["true", "1"])
def test_threads_of_tokenizers_do_not_hang_workers(setting, interrupted_case, tmp_path, monkeypatch):
    options, complete, _ = interrupted_case
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", setting)
    encode = ChunkEncoder.encode

    def without_threads(encoder, chunk):
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"  # else the first batch waits for ever
        return encode(encoder, chunk)

    monkeypatch.setattr(ChunkEncoder, "encode", without_threads)
    preprocess(replace(options, output_prefix=str(tmp_path / "out" / "train"), workers=2), progress=False)
    assert contents(tmp_path / "out") == complete


# --- workers --------------------------------------------------------------------------------------------------------


def _square_or_fail(n: int) -> int:
    if n == 13:
        raise ValueError("thirteen")
    if n == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    return n * n


def test_workers_keep_the_order_and_report_failures():
    with OrderedWorkers(_square_or_fail, 3) as workers:
        assert list(workers.map(range(13))) == [n * n for n in range(13)]
    with OrderedWorkers(_square_or_fail, 2) as workers, pytest.raises(WorkerError, match="(?s)failed.*thirteen"):
        list(workers.map(range(10, 15)))
    with OrderedWorkers(_square_or_fail, 2) as workers, pytest.raises(WorkerDied, match="by signal SIGKILL"):
        list(workers.map(range(16, 20)))


def test_a_killed_worker_ends_a_run_with_a_message(interrupted_case, tmp_path, monkeypatch):
    options, complete, _ = interrupted_case
    options = replace(options, output_prefix=str(tmp_path / "out" / "train"), workers=2)
    monkeypatch.setattr(ChunkEncoder, "encode", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match="worker process . ended by signal SIGKILL.* -> run again"):
        preprocess(options, progress=False)
    monkeypatch.undo()
    preprocess(options, progress=False)
    assert contents(tmp_path / "out") == complete


def _pid_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def test_a_slow_item_holds_up_nobody():
    with OrderedWorkers(_pid_after, 2) as workers:
        slow, *others = workers.map([0.5, 0, 0, 0, 0, 0])
    assert slow not in others and len(set(others)) == 1


def _pid_and_much(_: int) -> tuple[int, bytes]:
    return os.getpid(), bytes(1 << 20)  # more than a pipe holds


def test_a_worker_that_dies_with_half_a_result_is_noticed():
    with OrderedWorkers(_pid_and_much, 1) as workers:
        results = workers.map(range(5))
        pid, _ = next(results)
        time.sleep(0.2)  # the next result is half in the pipe
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="by signal SIGKILL"):
            list(results)


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_workers_end_with_their_parent(tmp_path):
    def parent():
        with OrderedWorkers(_pid_and_much, 2) as workers:
            results = workers.map(range(100))
            pids = {next(results)[0] for _ in range(6)}
            (tmp_path / "pids").write_text(" ".join(map(str, pids)))
            time.sleep(60)

    assert _in_child(parent, delay=1.5) == -signal.SIGKILL
    pids = list(map(int, (tmp_path / "pids").read_text().split()))
    deadline = time.monotonic() + 10
    while (left := list(filter(_is_running, pids))) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "a worker outlives its parent"
