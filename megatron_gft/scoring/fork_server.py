"""Imported by the fork server of the verifiers' workers, and by nothing else: it keeps hold of what verifiers start.

A process whose parent ended becomes the child of its nearest ancestor that asks for it, whatever session it has begun.
So all that a worker leaves behind is below the fork server, where the scorer finds it, and ends with the fork server.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import sys
import warnings

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@atexit.register
def _end_all_below() -> None:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            process.kill()


if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
warnings.filterwarnings("ignore", "forkserver: waitpid returned unexpected pid")  # of those, when they end
