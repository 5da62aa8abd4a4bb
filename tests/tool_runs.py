"""The command lines, each run in a forked process: hundreds of runs in seconds, none of which sees another.

A fork is as a fresh process would be, but for the modules that are imported already; ``ranks.py`` says why that is
sound.
"""

import faulthandler
import importlib
import importlib.util
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ranks  # noqa: F401  # one thread, no CUDA

from megatron_gft import cpu

# What the command lines import when they run. A fork that finds them need not import them again.
MODULES = (
    *("job", "conversion.convert", "inspection.inputs", "inspection.output", "preprocess.run", "reports.plotting"),
    *("sampling.generation", "sampling.local_model", "sampling.sources", "scoring.score", "sizing.report"),
    *("evaluation.run", "validation", "groups.importing", "logprobs"),
)
UNREADABLE_FOR = 65534  # the user "nobody"


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code (None: by a signal), and all that it printed."""

    code: int | None
    text: str

    @property
    def is_message(self) -> bool:
        """Whether it ended as it should on bad input."""
        return self.code == 2 and "Traceback" not in self.text


def load() -> None:
    """Import what the commands need, once, in the process that forks."""
    for module in MODULES:
        importlib.import_module(f"megatron_gft.{module}")
    importlib.import_module("transformers.models.auto.modeling_auto")
    importlib.import_module("transformers.models.llama.modeling_llama")


def main_of(tool: str) -> Callable[..., int]:
    """``main`` of ``megatron_gft.commands.<tool>``, or else of ``tools/<tool>.py``."""
    if importlib.util.find_spec(f"megatron_gft.commands.{tool}"):
        return importlib.import_module(f"megatron_gft.commands.{tool}").main
    if (name := f"tools.{tool}.py") not in sys.modules:  # there is a package tools.bench, too
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "tools" / f"{tool}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].main


def run(folder: Path, tool: str, *arguments: str, seconds: float = 120, as_nobody: bool = False) -> Ended:
    """:func:`main_of` ``tool`` with these arguments and with ``folder`` as the working directory."""
    main = main_of(tool)

    def child() -> int:
        faulthandler.dump_traceback_later(seconds, exit=True)
        os.chdir(folder)
        if as_nobody and os.geteuid() == 0:
            os.seteuid(UNREADABLE_FOR)
        if main.__module__.endswith((".plan", "recipe_tables.py")):
            cpu._installed.clear()  # planning puts a redirection to "meta" upon the one to the CPU
        return main(list(arguments))

    with tempfile.TemporaryFile() as log:
        status = os.waitpid(forked(child, log.fileno()), 0)[1]
        log.seek(0)
        text = log.read().decode(errors="replace")
    return Ended(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else None, text)


def forked(function: Callable[[], int | None], output: int) -> int:
    """Call ``function`` in a fork that prints to the descriptor ``output`` and exits with what it returns; its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.stdin = open(os.devnull)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", encoding="utf-8", closefd=False) for stream in (1, 2))
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
        code = function() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
