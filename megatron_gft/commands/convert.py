"""Convert between a Hugging Face model folder and a Megatron distributed checkpoint, exactly, in both directions."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_gft.commands.options import number, tool_parser
from megatron_gft.errors import command
from megatron_gft.hf.shape import DTYPES

EPILOG = """examples:
  python tools/convert_checkpoint.py hf-to-megatron --hf models/Qwen2.5-1.5B --output checkpoints/qwen
  python tools/convert_checkpoint.py megatron-to-hf --checkpoint runs/gft --output export
  torchrun --nproc-per-node 8 tools/convert_checkpoint.py hf-to-megatron --hf models/70B --output checkpoints/70B

The output appears whole or not at all. Every tensor of it is read back and compared with the source by sha256;
--verify logits also runs both models, layer by layer, and compares their logits. Exit code 0: converted and equal;
2: bad input, with one message.
"""


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = tool_parser(description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True)
    to_megatron = commands.add_parser("hf-to-megatron", help="Hugging Face folder to Megatron checkpoint")
    to_megatron.add_argument("--hf", required=True, help="folder with config.json and safetensors")
    to_hf = commands.add_parser("megatron-to-hf", help="Megatron checkpoint to Hugging Face folder")
    to_hf.add_argument("--checkpoint", required=True, help="torch_dist checkpoint, or a run folder: its newest")
    to_hf.add_argument("--hf", help="configuration and tokenizer; default: those the checkpoint carries (hf/)")
    to_hf.add_argument("--max-shard-gb", type=number(high=10**6), default=5.0, help="of a safetensors file (default 5)")
    for sub in (to_megatron, to_hf):
        sub.add_argument("--output", required=True, help="folder to make; it must not exist")
        sub.add_argument("--dtype", choices=DTYPES, help="of the written tensors (default: kept)")
        sub.add_argument(
            "--verify",
            choices=("hash", "logits", "off"),
            default="hash",
            help="hash: read back, compare every sha256 (default); logits: also run both models; off: neither",
        )
        sub.add_argument("--text", help="text for --verify logits (default: 256 fixed token ids)")
    arguments = parser.parse_args(argv)
    import torch  # seconds, which --help and a wrong option do not wait for
    import torch.distributed as dist

    from megatron_gft.conversion.convert import hf_to_megatron, megatron_to_hf

    if os.environ.get("WORLD_SIZE", "") not in ("", "1"):  # started by torchrun
        dist.init_process_group("gloo")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    common = {
        "dtype": arguments.dtype and getattr(torch, DTYPES[arguments.dtype]),
        "verify": arguments.verify,
        "text": arguments.text,
        "progress": True,
    }
    if arguments.command == "hf-to-megatron":
        hf_to_megatron(arguments.hf, arguments.output, **common)
    else:
        from megatron_gft.checkpoints.history import newest_checkpoint

        checkpoint = newest_checkpoint(Path(arguments.checkpoint), "--checkpoint")
        max_shard_bytes = int(arguments.max_shard_gb * 1e9)
        megatron_to_hf(checkpoint, arguments.output, hf_dir=arguments.hf, max_shard_bytes=max_shard_bytes, **common)
    if dist.is_initialized():
        dist.destroy_process_group()
