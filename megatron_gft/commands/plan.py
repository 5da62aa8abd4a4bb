"""Does a configuration fit on N GPUs, and how fast will it be? Needs no GPU.

Exit code 0: it fits; 1: it does not (the report names the nearest layout that does); 2: the configuration is wrong.
"""

import json
import logging
import os
from collections.abc import Sequence

from megatron_gft.commands.options import config_parser, count, number
from megatron_gft.errors import InputError, command

EXIT_DOES_NOT_FIT = 1


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = config_parser(
        description=__doc__,
        epilog="example: python tools/plan.py --config examples/llama3.1-70b/gpus-64.yaml --world-size 64",
    )
    parser.add_argument("--world-size", type=count(high=10**6), required=True, metavar="N", help="processes of the job")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    gpu = parser.add_argument_group("device")
    gpu.add_argument("--gpu-memory-gib", type=number(), default=79.1, help="usable (default: H100 80 GB, 79.1)")
    gpu.add_argument("--reserve-gib", type=number(-1), default=5.0, help="CUDA, NCCL, fragmentation (default 5)")
    gpu.add_argument("--peak-tflops", type=number(), default=989.0, help="dense bf16 peak (default: H100, 989)")
    gpu.add_argument(
        "--efficiency", type=number(high=1), help="share of it reached while computing (default: published runs)"
    )
    assumed = parser.add_argument_group("assumed groups, used where data.train is empty")
    assumed.add_argument("--groups", type=count(high=10**8), default=10_000)
    assumed.add_argument("--responses", type=count(high=10**5), default=8, help="of a group; the first is the expert's")
    assumed.add_argument("--prompt-tokens", type=count(high=10**7), default=150, help="mean")
    assumed.add_argument("--response-tokens", type=count(high=10**7), default=700, help="mean")
    o = parser.parse_args(argv)
    if not 0 <= o.reserve_gib < o.gpu_memory_gib:
        raise InputError(f"--reserve-gib {o.reserve_gib:g}: not from 0 to --gpu-memory-gib {o.gpu_memory_gib:g}")
    from megatron_gft.config import load_config
    from megatron_gft.hf.shape import read_model_shape
    from megatron_gft.validation import check

    config = load_config(o.config, o.overrides)
    shape = read_model_shape(config.model.config)
    check(config, shape, o.world_size, training=False)  # before torch: a wrong configuration fails at once
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.disable(logging.WARNING)
    from megatron_gft.sizing.fit import Device, make_plan  # torch and Megatron: seconds
    from megatron_gft.sizing.report import format_plan
    from megatron_gft.sizing.throughput import Workload

    device = Device(f"GPU of {o.gpu_memory_gib:g} GiB", o.gpu_memory_gib, o.reserve_gib, o.peak_tflops)
    workload = Workload(o.groups, o.responses, o.prompt_tokens, o.response_tokens)
    plan = make_plan(config, shape, o.world_size, device=device, workload=workload, efficiency=o.efficiency)
    print(json.dumps(plan.to_json(), indent=1) if o.json else format_plan(plan))
    return 0 if plan.fits else EXIT_DOES_NOT_FIT
