"""Compute the log-probs that a model gives to the responses of group shards, and keep them beside the tokens."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from megatron_gft.commands.train import one_message
from megatron_gft.config import load_config
from megatron_gft.errors import InputError, command
from megatron_gft.launchers import name_rank

EPILOG = """examples:
  python tools/compute_logprobs.py --config run.yaml --name start
  torchrun --nproc-per-node 8 tools/compute_logprobs.py --config run.yaml --name ref checkpoint.init_from=hf:models/base

The model is that of checkpoint.init_from, the shards are those of data.train, all other keys are as in training
(docs/configuration.md): the file of the run can be used as it is. Training reads the log-probs as q with
data.logprobs=NAME, or as the anchor's p_ref with objective.reference=NAME.

Prints the prefixes of the shards. A shard that has NAME by this model is left as it is; by another model it is an
error. Killed or failed: run the same command again. Exit code 2: bad input, with one message.
"""


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="YAML file of a run")
    parser.add_argument("--name", required=True, help="of the log-probs in the shards' manifests")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override single keys")
    options = parser.parse_args(argv)
    config = load_config(options.config, options.overrides)
    name_rank(os.environ)
    with one_message():
        from megatron_gft.shards.logprobs import check_name  # megatron: seconds

        check_name(options.name)
        if config.checkpoint.init_from is None:
            raise InputError("checkpoint.init_from: not set -> the model to compute with, hf:DIR or a checkpoint")
        from megatron_gft.hf.shape import read_model_shape
        from megatron_gft.job import join
        from megatron_gft.logprobs import compute_logprobs, forward_config
        from megatron_gft.parallel import destroy_parallel
        from megatron_gft.validation import check

        config, shape = forward_config(config), read_model_shape(config.model.config)
        check(config, shape, world_size=int(os.environ.get("WORLD_SIZE", "1")))
        _, parallel = join(config)
        prefixes = compute_logprobs(config, shape, parallel, options.name)
        if parallel.rank == 0:
            print(*prefixes, sep="\n")
        destroy_parallel()
