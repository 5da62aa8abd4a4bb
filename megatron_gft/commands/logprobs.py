"""Compute the log-probs that a model gives to the responses of group shards, and keep them beside the tokens."""

import argparse
import re
from collections.abc import Sequence

from megatron_gft.commands.options import config_parser
from megatron_gft.commands.train import check_config, one_message
from megatron_gft.config import load_config
from megatron_gft.errors import InputError, command

EPILOG = """examples:
  python tools/compute_logprobs.py --config run.yaml --name start
  torchrun --nproc-per-node 8 tools/compute_logprobs.py --config run.yaml --name ref checkpoint.init_from=hf:models/base

The model is that of checkpoint.init_from, the shards are those of data.train; other keys are as in training, whose file
can be used as it is. Training reads NAME as q with data.logprobs=NAME, as the anchor with objective.reference=NAME.

Prints the prefixes of the shards. A shard that has NAME by this model stays as it is; by another one it is an error.
Killed or failed: run the same command again.
"""


def logprob_name(text: str) -> str:
    """A name that may be part of a file's; ``sampled`` is what the samplers themselves said."""
    if text == "sampled" or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} -> letters, digits, - and _, and not 'sampled'")
    return text


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = config_parser(description=__doc__, epilog=EPILOG)
    parser.add_argument("--name", required=True, type=logprob_name, help="of the log-probs, in the shards' manifests")
    options = parser.parse_args(argv)
    with one_message():
        config = load_config(options.config, options.overrides)
        if config.checkpoint.init_from is None:
            raise InputError("checkpoint.init_from: not set -> the model to compute with, hf:DIR or a checkpoint")
        shape = check_config(config)
        from megatron_gft.job import join
        from megatron_gft.logprobs import compute_logprobs
        from megatron_gft.parallel import destroy_parallel

        _, parallel = join(config)
        prefixes = compute_logprobs(config, shape, parallel, options.name)
        if parallel.rank == 0:
            print(*prefixes, sep="\n")
        destroy_parallel()
