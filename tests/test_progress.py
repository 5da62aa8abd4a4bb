"""What stages say of their progress, in a log and on a terminal."""

import io
import re
import sys

import pytest

from megatron_gft import progress
from megatron_gft.progress import ProgressBar


class _Stderr(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


class _Clock:
    """Stands still while nobody works."""

    now = 0.0

    def __call__(self):
        return self.now

    def work(self, count):
        """So many pieces of work of three seconds."""
        for piece in range(count):
            yield piece
            self.now += 3.0


def shown(monkeypatch, terminal, run):
    monkeypatch.setattr(sys, "stderr", stderr := _Stderr(terminal))
    monkeypatch.setattr("tqdm.std.time", clock := _Clock())
    monkeypatch.setattr(progress.time, "monotonic", clock)
    run(clock)
    return stderr.getvalue()


def by_hand(clock):
    with ProgressBar(None, "reading", total=12, unit="B") as bar:
        for _ in clock.work(12):
            bar.update(1)
            bar.write("another line", file=sys.stderr)


def by_iteration(clock):
    assert list(ProgressBar(clock.work(12), "judging", total=12, unit="response")) == list(range(12))


@pytest.mark.parametrize("run", [by_hand, by_iteration])
def test_a_log_gets_whole_lines_with_the_time_left(monkeypatch, run):
    text = shown(monkeypatch, False, run)
    lines = [line for line in text.splitlines() if line != "another line"]
    assert text.endswith("\n") and "" not in lines and not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    assert len(lines) == 3  # at 12 s, 24 s, and at the end
    assert all(re.fullmatch(r"(reading|judging): \d+% .*, \S+ gone, \S+ left, .*", line) for line in lines)
    assert "100%" in lines[-1] and sum("100%" in line for line in lines) == 1


def test_a_terminal_gets_a_bar_and_a_short_stage_no_line_in_a_log(monkeypatch):
    assert shown(monkeypatch, True, by_iteration).count("\r") > 2
    assert shown(monkeypatch, False, lambda clock: list(ProgressBar(clock.work(3), "short"))) == ""
    assert shown(monkeypatch, True, lambda clock: list(ProgressBar(clock.work(9), "quiet", show=False))) == ""
