"""How far a stage is, and how long it still takes: a bar on a terminal, in a log file a line every ten seconds."""

import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 10.0
LOG_LINE = "{desc}: {percentage:.0f}% ({n_fmt}/{total_fmt}), {elapsed} gone, {remaining} left, {rate_fmt}{postfix}"


class ProgressBar(tqdm):
    """tqdm's bar on stderr. Where that is no terminal nothing is drawn over: no control characters, whole lines.

    Args:
        show: False draws nothing.
        options: tqdm's; ``unit="B"`` scales.
    """

    def __init__(self, iterable: Iterable | None = None, desc: str = "", *, show: bool = True, **options: Any):
        self.in_log = not sys.stderr.isatty()
        self.last_line = self.begun = time.monotonic()  # a stage of a few seconds needs no line
        if self.in_log:
            options["bar_format"] = LOG_LINE
        options.setdefault("smoothing", 0)  # the mean: responses come by batches
        options["unit_scale"] = options.get("unit") == "B"
        super().__init__(iterable, desc, file=sys.stderr, disable=not show, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw; in a log, a line when it is time for one."""
        if not self.in_log:
            return super().display(msg, pos)
        if time.monotonic() - self.last_line >= LOG_SECONDS:
            self._print_line()

    def _print_line(self) -> None:
        self.last_line = time.monotonic()
        print(str(self).removeprefix(": "), file=self.fp, flush=True)

    def clear(self, nolock: bool = False) -> None:
        """Make room for other text, which in a log is there."""
        if not self.in_log:
            super().clear(nolock)

    def close(self) -> None:
        """Draw the end; in a log, of what was drawn before."""
        if self.in_log and not self.disable:
            if self.last_line > self.begun:
                self._print_line()
            self.delay = math.inf  # tqdm's own close would end a bar
        super().close()


def total_bytes(files: Sequence[str | os.PathLike]) -> int:
    """Sizes of files, added up."""
    return sum(map(os.path.getsize, files))
