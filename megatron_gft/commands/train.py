"""``python -m megatron_gft.train --config FILE [section.key=value ...]``, alone or under torchrun.

Configuration problems end the program with exit code 2 before torch is imported and any process group starts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_gft.commands.options import config_parser
from megatron_gft.config import Config, load_config
from megatron_gft.errors import EXIT_FAILED, KEY_OF, InputError, command
from megatron_gft.launchers import name_rank
from megatron_gft.reports.configuration import help_text
from megatron_gft.run_lock import run_lock
from megatron_gft.runtime import StopRequest, meet

if TYPE_CHECKING:
    from megatron_gft.hf.shape import ModelShape

# The same bad input stops every rank. Ranks other than a machine's first wait so long with their message, by when
# torchrun has ended them because of the first one's exit code; what only they saw is still said.
QUIET_SECONDS = 8.0

FEWEST_OPEN_FILES = 256  # one process alone has some 120
SYSTEM_LIMITS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENFILE)

EXAMPLE = """example: torchrun --nproc-per-node 8 -m megatron_gft.train --config FILE optimizer.lr=2e-6 train.output=RUN

Every key, as it stands in a file under its section, and on the command line as section.key=value:
"""


def recipes() -> Path:
    """The folder with ``examples/`` and ``launch/``: within an installed package, or the repository's root."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent


def read_command_line(argv: Sequence[str] | None = None) -> Config:
    """The configuration that a command line names, not yet checked against a model or a world size."""
    parser = config_parser(
        prog="python -m megatron_gft.train",
        description="Train a model on group shards with GFT, SFT or DFT on Megatron-Core.",
        epilog=EXAMPLE + help_text(),
    )
    parser.add_argument(
        "--recipes", action="version", version=str(recipes()), help="print the folder of examples/ and launch/"
    )
    options, flags = parser.parse_known_args(argv)
    if flags:
        name = flags[0].lstrip("-").partition("=")[0].replace("-", "_")
        raise InputError(f"{flags[0]}: no flag of training -> keys are set as {KEY_OF.get(name, 'section.key')}=value")
    return load_config(options.config, options.overrides)


def check_config(config: Config) -> ModelShape:
    """The model's shape, checked against the configuration and the world size."""
    name_rank(os.environ)
    from megatron_gft.hf.shape import read_model_shape  # --help does without these
    from megatron_gft.validation import check

    shape = read_model_shape(config.model.config)
    check(config, shape, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    return shape


@contextlib.contextmanager
def one_message(stop: StopRequest | None = None) -> Iterator[None]:
    """Of the bad input that stops every rank, a machine's first one tells at once, the others when they are left to.

    Raises:
        InputError: also for an OSError that the user can see to.
    """
    try:
        yield
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in SYSTEM_LIMITS:
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise InputError(str(error)) from None
        if stop is not None:
            stop.failing = True
        time.sleep(QUIET_SECONDS)
        raise InputError(f"rank {os.environ['RANK']}: {error}") from None


@command
def main(argv: Sequence[str] | None = None, stop: StopRequest | None = None) -> int:
    """Train; the exit code is 0, 2 for bad input, or that of the ``stop``, made in the first lines of the process."""
    stop = stop or StopRequest()
    with one_message(stop):
        shape = check_config(config := read_command_line(argv))
        if 0 <= (limit := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < FEWEST_OPEN_FILES:
            raise InputError(f"ulimit -n: {limit} open files are too few -> ulimit -n 4096")
        from megatron_gft.job import open_run  # torch and Megatron: seconds, and only for a sound configuration

        store = meet(config.parallel.collective_timeout_minutes, stop)
        with run_lock(Path(config.train.output), stop), open_run(config, shape, store, stop) as trainer:
            return trainer.run()
    return EXIT_FAILED  # it stopped, and has said why
