"""Imported by the fork server of the verifiers' workers, and by nothing else: it keeps hold of what verifiers start.

A process whose parent ended becomes the child of its nearest ancestor that asks for it, whatever its session.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import sys
import warnings

import psutil


@atexit.register
def _end_all_below() -> None:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            process.kill()


if sys.platform == "linux":
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER of linux/prctl.h
warnings.filterwarnings("ignore", "forkserver: waitpid returned unexpected pid")  # of those, when they end
