"""Planning needs a process in which Megatron was redirected to meta tensors: a program for the tests to call.

``python tests/plan_cases.py`` reads ``{case: [arguments, ...]}`` from stdin and prints ``{case: [answer, ...]}``.
"""

import dataclasses
import json
import sys

from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

from megatron_gft.config import load_config
from megatron_gft.hf.shape import read_model_shape
from megatron_gft.sizing.fit import make_plan
from megatron_gft.sizing.memory import measure_stage, simulated_rank
from megatron_gft.sizing.report import format_plan

MANY_PACKS = 64


def measure(overrides: list[str], world_size: int, stage: int) -> dict:
    """Static memory of the first rank of a stage."""
    config = load_config([], overrides)
    shape = read_model_shape(config.model.config)
    return dataclasses.asdict(measure_stage(config, shape, world_size, stage))


def warmup(pp: int, vpp: int | None) -> list[int]:
    """Warm-up microbatches (chunks of them when interleaved) by Megatron's own schedule, per stage."""
    options = ["model.config=unused", f"parallel.pp={pp}"] + ([f"parallel.vpp={vpp}"] if vpp else [])
    config, counts = load_config([], options), []
    for stage in range(pp):
        with simulated_rank(config, stage, pp):
            _, _, count, _ = get_pp_rank_microbatches(MANY_PACKS, vpp or 1, pp, False)
            counts.append(count)
    return counts


def plan(files: list[str], overrides: list[str], world_size: int, with_steps: bool) -> dict:
    """A plan as JSON and as ``text``; ``followed`` is the verdict of the plan that follows its suggestion."""
    config = load_config(files, overrides)
    shape = read_model_shape(config.model.config)
    result = make_plan(config, shape, world_size, with_steps=with_steps)
    answer = result.to_json() | {"text": format_plan(result)}
    if suggestion := answer["suggestion"]:
        config = load_config(files, [*overrides, *suggestion["overrides"]])
        answer["followed"] = make_plan(config, shape, suggestion["world_size"], with_steps=False).verdict
    return answer


if __name__ == "__main__":
    cases = {"measure": measure, "warmup": warmup, "plan": plan}
    asked = json.load(sys.stdin)
    print(json.dumps({name: [cases[name](*arguments) for arguments in asked[name]] for name in asked}))
