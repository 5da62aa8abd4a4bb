"""Rounds of sampling and training from one YAML: [serve] -> generate -> score -> preprocess -> [logprobs] -> train ->
export -> evaluate. A stage whose output stands is skipped; killed, the same command goes on."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_gft.commands.options import config_parser
from megatron_gft.errors import EXIT_FAILED, EXIT_INTERRUPTED, command

if TYPE_CHECKING:
    from megatron_gft.rounds.driver import Rounds

EPILOG = """examples:
  python tools/run_rounds.py --config examples/rounds/tiny.yaml
  python tools/run_rounds.py --config examples/rounds/gpus-8.yaml rounds=3 output=runs/three --dry-run
Keys: docs/rounds.md.
"""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when every stage is done, 1 when one failed, 2 on bad input, 130 when interrupted."""
    parser = config_parser(description=__doc__, epilog=EPILOG)
    parser.add_argument("--dry-run", action="store_true", help="print the stages with their commands, run none")
    options = parser.parse_args(argv)
    from megatron_gft.config import load_tree
    from megatron_gft.rounds.driver import Rounds
    from megatron_gft.rounds.settings import RoundsConfig

    return run(Rounds(load_tree(RoundsConfig, options.config, options.overrides)), dry_run=options.dry_run)


def run(rounds: Rounds, *, dry_run: bool = False) -> int:
    """Run the stages of ``rounds``, or print them; the exit code."""
    from megatron_gft.rounds.stages import StageFailed, say

    if dry_run:
        rounds.show()
        return 0
    # ends like an interrupt: the stage is told
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        rounds.run()
    except StageFailed as error:
        say(f"\nerror: {error}")
        return EXIT_FAILED
    except KeyboardInterrupt:
        say("\ninterrupted; the same command continues")
        return EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0
