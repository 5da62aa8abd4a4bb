"""Scoring under fire: killed runs, suspended and starved machines, what verifiers leave running."""

from __future__ import annotations

import contextlib
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import time
import types

import psutil
import pytest

from megatron_gft.groups import GroupRecord, ResponseRecord, iter_group_file, write_group_file
from megatron_gft.scoring.judging import ScoringOptions
from megatron_gft.scoring.score import score_group_file
from megatron_gft.scoring.verifier_pool import VerifierPool
from megatron_gft.scoring.verifiers import Case

GROUPS, RESPONSES = 300, 3
JUDGED_TWICE = 64 + RESPONSES + 8  # at most: what one worker holds, a group, what was on its way
SLOW = """
import itertools, os, subprocess, time

def log(text):
    with open(os.path.join(os.path.dirname(__file__), "calls"), "a") as file:
        file.write(text + "\\n")

def judge(case):
    log(case.response)
    time.sleep(0.001)
    return case.response.endswith(case.answer)

def compute(case):
    end = time.process_time() + float(case.response)
    while time.process_time() < end:
        pass
    return True

def leave_running(case):
    log(str(subprocess.Popen(["sleep", "300"]).pid))
    return sum(itertools.repeat(1, 10**12)) > 0  # in C, where no signal handler of Python is ever called

def leave_a_daemon(case):
    how, then = case.response.split()
    if how == "setsid":
        log(str(subprocess.Popen(["sleep", "300"], start_new_session=True).pid))
    elif os.fork() == 0:  # twice, with a session between
        os.setsid()
        if (pid := os.fork()) == 0:
            if how == "exec":
                os.execvpe("sleep", ["sleep", "300"], {})
            time.sleep(300)
        log(str(pid))
        os._exit(0)
    if then == "dies":
        time.sleep(0.3)
        os._exit(3)
    if then == "hangs":
        time.sleep(60)
    return True

def write_everywhere(case):
    if case.response:
        for descriptor in range(3, 200):
            try:
                os.write(descriptor, case.response.encode("latin-1"))
            except OSError:
                pass
    return True
"""


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """Folder of a module ``slow_rewards``; its file ``calls`` has a line for every call."""
    (tmp_path / "slow_rewards.py").write_text(SLOW)
    (tmp_path / "calls").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def calls(folder):
    return (folder / "calls").read_text().split("\n")[:-1]


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.005)


def begin(function) -> int:
    """Run ``function`` in a process of its own, which leads a process group; its id."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.setpgid(0, 0)
            multiprocessing.forkserver._forkserver.__init__()  # not the one of the tests
            function()
        os._exit(0)
    return pid


def gone(pid) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def case(slow):
    """A function that scores a file, which takes a second."""
    records = [
        GroupRecord(f"g{i}", f"{i}?", [ResponseRecord(f"{k} {i}", "self") for k in range(RESPONSES)], str(i))
        for i in range(GROUPS)
    ]
    write_group_file(slow / "in.jsonl", records)
    options = ScoringOptions("slow_rewards:judge")
    return lambda: score_group_file([slow / "in.jsonl"], slow / "out.jsonl", options, progress=False)


def test_a_killed_run_continues_without_judging_twice(slow, case, capfd):
    pid = begin(case)
    wait_until(lambda: len(calls(slow)) >= 400)
    workers = psutil.Process(pid).children(recursive=True)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_until(lambda: all(gone(worker.pid) for worker in workers))
    before = len(calls(slow))
    assert before < GROUPS * RESPONSES and (slow / "out.jsonl.journal").exists()
    assert list(slow.glob(".out.jsonl.tmp-*")) and not (slow / "out.jsonl").exists()
    assert case().responses == GROUPS * RESPONSES
    assert GROUPS * RESPONSES <= len(calls(slow)) <= GROUPS * RESPONSES + JUDGED_TWICE
    outcomes = [[said.outcome for said in record.responses] for record, _ in iter_group_file(slow / "out.jsonl")]
    assert outcomes == [["correct"] * RESPONSES] * GROUPS
    assert not [path for path in slow.iterdir() if path.suffix == ".journal" or ".tmp-" in path.name]
    assert "Traceback" not in capfd.readouterr().err


def test_ctrl_c_ends_the_workers_too(slow, case, capfd):
    pid = begin(case)
    wait_until(lambda: len(calls(slow)) >= 50)
    workers = psutil.Process(pid).children(recursive=True)
    os.killpg(pid, signal.SIGINT)  # as a terminal does
    os.waitpid(pid, 0)
    wait_until(lambda: all(gone(worker.pid) for worker in workers))
    assert len(workers) >= 2 and "Traceback" not in capfd.readouterr().err
    assert len(calls(slow)) < GROUPS * RESPONSES


def test_what_a_verifier_has_started_ends_with_its_worker(slow):
    with VerifierPool(ScoringOptions("slow_rewards:leave_running", time_limit=0.3)) as pool:
        assert [verdict.outcome for verdict in pool.judge([Case("x", "x")])] == ["timeout"]
    (child,) = map(int, calls(slow))
    wait_until(lambda: gone(child))


@pytest.mark.parametrize("then", ["returns", "hangs", "dies"])
def test_a_session_of_its_own_does_not_outlive_scoring(slow, then):
    """Whatever way a verifier leaves its process group, and however its worker ends."""
    cases = [Case(f"{how} {then}", "x") for how in ("setsid", "fork", "exec")]
    with VerifierPool(ScoringOptions("slow_rewards:leave_a_daemon", time_limit=0.6)) as pool:
        outcomes = {verdict.outcome for verdict in pool.judge(cases)}
    late = {"error", "timeout"}  # a daemon that was forked holds the pipe of a worker that died
    assert outcomes <= {"returns": {"correct"}, "hangs": {"timeout"}, "dies": late}[then]
    started = [int(pid) for pid in calls(slow)]
    assert started
    wait_until(lambda: all(gone(pid) for pid in started))


def test_a_process_that_ends_while_strays_are_looked_for_hides_no_other(slow):
    class Ended:
        pid = 1 << 30

        def status(self):
            raise psutil.NoSuchProcess(self.pid)

    stray = subprocess.Popen(["sleep", "300"])
    looks = iter([[Ended()], [Ended(), psutil.Process(stray.pid)], []])
    with VerifierPool(ScoringOptions("slow_rewards:leave_a_daemon")) as pool:
        pool._fork_server = types.SimpleNamespace(children=lambda: next(looks))
    assert stray.wait(timeout=20) == -signal.SIGKILL


def test_no_daemon_outlives_a_killed_run(slow):
    def run():
        with VerifierPool(ScoringOptions("slow_rewards:leave_a_daemon")) as pool:
            list(pool.judge([Case(f"{how} hangs", "x") for how in ("setsid", "exec", "fork")]))

    pid = begin(run)
    wait_until(lambda: calls(slow))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    daemons = [int(child) for child in calls(slow)]  # of a dead run: no more come
    assert daemons
    wait_until(lambda: all(map(gone, daemons)))
    assert calls(slow) == list(map(str, daemons))


JUNK = {
    "text": "junk" * 100,
    "length": "\x00\x00\x10\x00ab",
    "huge": "\xff\xff\xff\xff\x7f\xff\xff\xff\xff\xff\xff\xff",
}


@pytest.mark.parametrize("junk", JUNK)
def test_what_is_written_into_inherited_pipes_costs_one_response(slow, junk, capfd):
    cases = [Case("", "x")] * 3 + [Case(JUNK[junk], "x")] + [Case("", "x")] * 3
    with VerifierPool(ScoringOptions("slow_rewards:write_everywhere", time_limit=2)) as pool:
        outcomes = [verdict.outcome for verdict in pool.judge(cases)]
    assert outcomes == ["correct"] * 3 + ["error"] + ["correct"] * 3
    assert "Traceback" not in capfd.readouterr().err


def test_time_in_which_all_was_suspended_is_nobodys(slow):
    with VerifierPool(ScoringOptions("slow_rewards:compute", time_limit=0.2)) as pool:
        verdicts = pool.judge(Case("0.07", "") for _ in range(8))
        outcomes = [next(verdicts).outcome]
        for worker in pool._workers:
            os.kill(worker._process.pid, signal.SIGSTOP)
        time.sleep(2.2)  # more than ten times the limit, in which this process does not look either
        for worker in pool._workers:
            os.kill(worker._process.pid, signal.SIGCONT)
        outcomes += [verdict.outcome for verdict in verdicts]
    assert outcomes == ["correct"] * 8


def test_a_worker_that_others_keep_off_the_cpu_has_longer(slow):
    cpu = min(os.sched_getaffinity(0))
    with VerifierPool(ScoringOptions("slow_rewards:compute", time_limit=0.4)) as pool:
        os.sched_setaffinity(pool._workers[0]._process.pid, {cpu})
        code = f"import os; os.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"
        others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
        try:
            outcomes = [verdict.outcome for verdict in pool.judge([Case("0.3", ""), Case("9", "")])]
        finally:
            for other in others:
                other.kill()
                other.wait()
    assert outcomes == ["correct", "timeout"]


def test_workers_do_not_run_the_script_that_scores(slow):
    """multiprocessing's do, and a script without ``if __name__`` began again in each of them."""
    (slow / "script.py").write_text(
        "import os\n"
        "from megatron_gft.scoring.judging import ScoringOptions\n"
        "from megatron_gft.scoring.verifier_pool import VerifierPool\n"
        "print('begun', flush=True)\n"
        "with VerifierPool(ScoringOptions('slow_rewards:judge', workers=2)) as pool:\n"
        "    assert pool._fork_server.ppid() == os.getpid()\n"
    )
    ended = subprocess.run([sys.executable, "script.py"], cwd=slow, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout.split(), ended.stderr) == (0, ["begun"], "")
