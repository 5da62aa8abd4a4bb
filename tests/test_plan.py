"""The planner: bytes equal to real allocations, schedules equal to Megatron's, errors, verdicts and suggestions."""

import dataclasses
import gc
import json
import math
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import device_run
import pytest
import torch
from group_shards import TokenizerStamp, write_shard
from ranks import run_ranks
from tiny_models import write_tiny_model

from megatron_gft.batch import StepLoader
from megatron_gft.config import ParallelConfig, load_config
from megatron_gft.hf.shape import ModelShape, read_model_shape
from megatron_gft.model import build_model, unwrap
from megatron_gft.optimizer import build_optimizer, wrap_data_parallel
from megatron_gft.parallel import initialize_parallel, seed_everything
from megatron_gft.planning import FlopModel
from megatron_gft.sizing import report
from megatron_gft.sizing.fit import Device
from megatron_gft.sizing.memory import StaticMemory, estimate_activations, microbatches_in_flight, static_memory
from megatron_gft.sizing.throughput import (
    AssumedGroups,
    StepStatistics,
    StepTime,
    Workload,
    better_cut,
    estimate_step_time,
    head_in_layers,
    pipeline_bubble,
)
from megatron_gft.tokenizer import tokenizer_fingerprint

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONWARNINGS": "ignore",
}
LLAMA_70B = "examples/llama3.1-70b/gpus-64.yaml"


def run_python(*arguments: str, **options) -> subprocess.CompletedProcess:
    """Run a program of this repository."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, **options)


def ask(**cases: list) -> dict[str, list]:
    """Answers of ``plan_cases.py``."""
    result = run_python("tests/plan_cases.py", input=json.dumps(cases))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


# --- exact memory -------------------------------------------------------------------------------------------------

LAYOUTS = {
    "one rank fp32": ("llama3", 1, ["model.precision=fp32"]),
    "one rank bf16": ("llama3", 1, []),
    "tensor": ("llama3", 2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "pipeline, tied": ("llama_tied_linear", 2, ["parallel.pp=2"]),
    "interleaved": ("qwen2", 2, ["parallel.pp=2", "parallel.vpp=2"]),
    "uneven stages": ("qwen2", 2, ["parallel.pp=2", "parallel.layers_per_stage=[3,1]"]),
    "data, overlapped": ("qwen3", 2, ["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"]),
    "data, not sharded": ("llama3", 2, ["optimizer.distributed=false"]),
    "bf16 gradients": ("llama3", 2, ["optimizer.grad_reduce_in_fp32=false"]),
    "experts": ("qwen3_moe", 2, ["parallel.ep=2"]),
    "tensor, pipeline, data": ("llama3", 8, ["parallel.tp=2", "parallel.pp=2"]),
}


SCHEDULES = [[2, None], [4, None], [8, None], [2, 2], [4, 5], [8, 5]]
LAYOUT_70B = ["model.config=examples/llama3.1-70b", "parallel.tp=8", "parallel.pp=4"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {name: str(write_tiny_model(folder / name, name)) for name in {layout[0] for layout in LAYOUTS.values()}}


@pytest.fixture(scope="module")
def cases(models) -> list:
    """[overrides, world size, stage] of every stage of every layout."""
    found = []
    for model, world_size, options in LAYOUTS.values():
        overrides = [f"model.config={models[model]}", *options]
        found += [[overrides, world_size, stage] for stage in range(load_config([], overrides).parallel.pp)]
    return found


@pytest.fixture(scope="module")
def answers(cases) -> dict[str, list]:
    """Everything that is asked of the planner in one process."""
    return ask(
        measure=cases + [[LAYOUT_70B, 64, stage] for stage in range(4)],
        warmup=SCHEDULES,
        plan=[
            [[LLAMA_70B], ["parallel.pp=2", "parallel.vpp=null"], 64, False],
            [[], ["model.config=examples/llama3.1-70b", "parallel.tp=8"], 8, False],
        ],
    )


def live_storages() -> dict[int, int]:
    """Bytes of every storage that some tensor object of this process refers to."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.layout == torch.strided}


def allocate(overrides: list[str]) -> tuple[dict, int, int]:
    """Build for real, update once; (static memory, bytes of Adam's state, bytes of all new live tensors)."""
    config = load_config([], overrides)
    shape, p = read_model_shape(config.model.config), config.parallel
    parallel = initialize_parallel(tp=p.tp, pp=p.pp, vpp=p.vpp, cp=p.cp, ep=p.ep, etp=p.etp)
    seed_everything(1, parallel)
    before = live_storages()
    transformer, modules = build_model(shape, config.model, config.objective, config.parallel, parallel)
    chunks = wrap_data_parallel(modules, transformer, config.optimizer)
    optimizer = build_optimizer(chunks, config.optimizer, bf16=transformer.bf16)
    optimizer.step()
    optimizer.zero_grad()
    states = [
        tensor
        for part in optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for tensor in state.values()
    ]
    after = live_storages()
    new = sum(size for storage, size in after.items() if storage not in before)
    return vars(static_memory(chunks, optimizer)), sum(t.numel() * t.element_size() for t in states), new


@pytest.mark.slow  # real allocations of many layouts beside the planned ones, which the other tests pin
def test_bytes_equal_the_real_allocation(cases, answers):
    allocated: dict[str, list] = {}
    for case, planned in zip(cases, answers["measure"], strict=False):
        overrides, world_size, stage = case
        ranks = allocated.get(str(overrides)) or run_ranks(world_size, allocate, overrides)
        allocated[str(overrides)] = ranks
        static, adam, live = ranks[stage * world_size // load_config([], overrides).parallel.pp]
        assert planned == static, case
        main = planned["optimizer"] - adam  # float32 copies of the weights, none in fp32 training
        assert main == (0 if "model.precision=fp32" in overrides else adam // 2), case
        total = planned["weights"] + planned["gradients"] + planned["optimizer"]
        # RoPE frequencies, step counters and the like: nothing that grows with the model
        assert total <= live <= total + 20_000, (case, total, live)


def test_70b_matches_the_published_count(answers):
    """Llama-3.1-70B has 70,553,706,496 parameters; tensor ranks repeat norms, the vocabulary is padded."""
    stages = answers["measure"][-4:]
    norms = 2 * 80 * 8192 + 8192
    padding = 2 * (129_024 - 128_256) * 8192
    assert 8 * sum(stage["parameters"] for stage in stages) == 70_553_706_496 + 7 * norms + padding
    assert stages[1] == stages[2], "stages between the first and the last are alike, so one is built"
    assert stages[1]["optimizer"] == 12 * stages[1]["parameters"] // 2  # sharded over 2 data-parallel ranks


# --- activations --------------------------------------------------------------------------------------------------


def test_chunks_in_flight_are_those_of_megatrons_schedules(answers):
    for (pp, vpp), warmups in zip(SCHEDULES, answers["warmup"], strict=True):
        ours = [microbatches_in_flight(stage, pp, vpp) for stage in range(pp)]
        assert ours == [warmup + 1 for warmup in warmups]
    assert microbatches_in_flight(0, 8, None, packs=3) == 3
    assert microbatches_in_flight(0, 4, 5, packs=4) == 20


def saved_for_backward(overrides: list[str]) -> tuple[int, int]:
    """Rows of a pack, and bytes in distinct storages that its forward through all layers keeps, weights left out."""
    config = load_config([], overrides)
    shape = read_model_shape(config.model.config)
    parallel = initialize_parallel()
    seed_everything(1, parallel)
    _, (model,) = build_model(shape, config.model, config.objective, config.parallel, parallel)
    loader = StepLoader(device_run.RandomGroups(16, shape.vocab_size), config, shape, parallel)
    pack = loader.packs(loader.batch(0))[0]
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # the tensor too: a freed storage's name comes again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = unwrap(model).hidden_states(pack)
    assert output.requires_grad
    return len(pack.tokens), sum(size for size, _ in kept.values())


def test_the_estimate_bounds_what_the_cpu_layers_keep_from_below(tmp_path):
    """The CPU runs norms and SwiGLU unfused and so keeps more: 1.3 to 2.2 times the estimate for fused layers."""
    kept, rows = [], 0
    for layers in (2, 4):
        model = write_tiny_model(tmp_path / str(layers), "llama3", num_hidden_layers=layers)
        overrides = [f"model.config={model}", "data.groups_per_step=16", "data.max_tokens_per_pack=1024"]
        overrides.append("data.packing=packed")
        ((rows, size),) = run_ranks(1, saved_for_backward, overrides)
        kept.append(size)
    config = load_config([], [*overrides, f"data.max_tokens_per_pack={rows}"])
    estimate = estimate_activations(config, read_model_shape(config.model.config), 0, static_of(1)).per_layer
    assert 1.0 < (kept[1] - kept[0]) / 2 / estimate < 2.2


def test_activations_follow_their_formula():
    """268 MiB a layer of 70B at tp 8 with sequence parallelism: tokens * (12 h + 4 kv + 6 f) / tp plus log-sum-exp."""
    config = load_config([LLAMA_70B], ["parallel.tp=8", "data.max_tokens_per_pack=8192", "data.packing=packed"])
    shape = read_model_shape(config.model.config)
    static = static_of(1)
    layer = estimate_activations(config, shape, 0, static).per_layer
    assert layer == 8192 * (12 * 8192 + 4 * 1024 + 6 * 28672 + 4 * 64) // 8
    assert math.isclose(layer / 2**20, 268, rel_tol=0.01)

    def changed(*overrides: str) -> int:
        options = ["parallel.tp=8", "data.max_tokens_per_pack=8192", "data.packing=packed", *overrides]
        return estimate_activations(load_config([LLAMA_70B], options), shape, 0, static).per_layer

    assert changed("model.recompute=full") == 8192 * 2 * 8192 // 8
    assert changed("parallel.sequence_parallel=false") == layer + 8192 * 8 * 8192 * 7 // 8
    assert changed("parallel.cp=2") == layer // 2 + 4096 * 4 * 1024 // 8, "keys and values of both halves"
    assert changed("data.packing=shared_prefix") > layer > changed("model.fp8=tensorwise")


def static_of(parameters: int) -> StaticMemory:
    """A rank with these parameters, none of them sharded."""
    return StaticMemory(parameters, parameters, 2 * parameters, 4 * parameters, 12 * parameters)


# --- steps and time -----------------------------------------------------------------------------------------------


def test_assumed_groups_have_the_stated_means():
    groups = AssumedGroups(Workload(groups=2000), longest=10_000)
    table = groups.table(range(2000))
    assert abs(table.prompt_lengths.mean() / 150 - 1) < 0.05
    assert abs(table.response_lengths.mean() / 700 - 1) < 0.05
    assert (groups.table([5]).response_lengths == table.response_lengths[40:48]).all()
    assert AssumedGroups(Workload(), longest=99).fingerprint != groups.fingerprint


STEPS = StepStatistics(
    assumed=True,
    groups=1000,
    steps_per_epoch=10,
    sampled_steps=1,
    packs_per_rank=16,
    tokens=1e6,
    loss_tokens=5e5,
    padding_share=0.1,
    dead_groups=0,
    fill=0.9,
    balance=0.8,
    flops=64e15,
)
# 8 layers; the vocabulary that makes the head on half of the rows as dear as half a layer or three layers on all.
SHAPE = read_model_shape(LLAMA_70B.rpartition("/")[0])
HEAD = FlopModel.from_shape(SHAPE).head_per_row / SHAPE.vocab_size * 5e5 / 64e15  # of the step's FLOPs, per row


def shape_with(head_in_layers: float) -> ModelShape:
    """Eight layers and a head of this size in layers."""
    vocab = round(head_in_layers / (8 + head_in_layers) / HEAD)
    return dataclasses.replace(SHAPE, num_layers=8, vocab_size=vocab)


def step_time(*overrides: str, head: float = 0.0, parameters: int = 10**9) -> StepTime:
    config = load_config([], ["model.config=unused", "checkpoint.save_every=null", *overrides])
    return estimate_step_time(
        config, shape_with(head), STEPS, static_of(parameters), 64, efficiency=0.5, peak_tflops=1000
    )


def test_step_time_adds_up():
    time = step_time("parallel.pp=4", "parallel.vpp=2")
    assert pipeline_bubble(4, 2, 16) == 3 / 32
    assert math.isclose(time.compute_seconds, 1e15 / 0.5e15 / 0.8)
    assert math.isclose(time.gradient_sync_seconds, 6e9 / 300e9)
    assert math.isclose(time.seconds, 2.5 * (1 + 3 / 32) + 0.02)
    assert math.isclose(time.mfu, 1 / time.seconds)
    assert math.isclose(time.epoch_hours, 10 * time.seconds / 3600)
    time = step_time("optimizer.overlap_grad_reduce=true", "model.recompute=full")
    assert math.isclose(time.seconds, 2.5 * 4 / 3), "less traffic than one pack takes"
    time = step_time("parallel.tp=4", "optimizer.overlap_grad_reduce=true", parameters=10**10)
    assert math.isclose(time.gradient_sync_seconds, 60e9 / (2 * 40e9) - 2.5 / 16), "two ports a machine and group"
    # 8 layers of a TP group's 1e6 / 16 rows: 8 times 3/4 of [rows, h] in bf16
    assert math.isclose(time.tensor_parallel_seconds, 8 * 8 * 0.75 * 62500 * 8192 * 2 / 300e9)
    saved = step_time("checkpoint.save_every=20")
    assert math.isclose(saved.save_seconds, 12e9 / 2e9 / 20)
    assert math.isclose(saved.seconds, step_time().seconds + saved.save_seconds)


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        (1, ("3.14e-05 s per step = 3e-05 s", "2.5e-06 PFLOP", "1.2e-07 h per epoch", "+ 2e-05 s saves")),
        (1e7, ("314 s per step = 300 s", " 25 PFLOP", "1.2 h per epoch", "+ 200 s saves")),
        (1e10, ("3.14e+05 s per step", "25,000 PFLOP", "1200 h per epoch")),
    ],
)
def test_times_are_told_with_their_digits(scale, told):
    """A small model's step is not told as no time, and a month's epoch not as a power of ten."""
    small = {"seconds": 3.14e-5, "compute_seconds": 3e-5, "epoch_hours": 1.2e-7, "save_seconds": 2e-5}
    time = dataclasses.replace(step_time(), **{name: value * scale for name, value in small.items()})
    steps = dataclasses.replace(STEPS, flops=2.5e9 * scale)
    config = load_config([], ["model.config=unused"])
    text = "\n".join(report._steps(SimpleNamespace(steps=steps, time=time, config=config, device=Device())))
    assert not [words for words in told if words not in text], text
    assert "too small to fill the devices takes longer" in text


def test_the_output_layer_counts_where_it_is():
    assert math.isclose(head_in_layers(shape_with(1.5), STEPS), 1.5, rel_tol=1e-4)
    even, uneven = (
        step_time("parallel.pp=2", head=2),
        step_time("parallel.pp=2", "parallel.layers_per_stage=[5,3]", head=2),
    )
    assert math.isclose(even.stage_balance, 5 / 6, rel_tol=1e-4) and math.isclose(uneven.stage_balance, 1, rel_tol=1e-4)
    assert math.isclose(even.compute_seconds / uneven.compute_seconds, 6 / 5, rel_tol=1e-4)
    # full recomputation repeats the layers alone
    full = step_time("model.recompute=full", head=2).compute_seconds / step_time(head=2).compute_seconds
    assert math.isclose(full, (8 * 4 / 3 + 2) / 10, rel_tol=1e-4)


@pytest.mark.parametrize(
    ("head", "pp", "now", "better"),
    [
        (2, 2, None, ([5, 3], 1 / 6)),
        (2, 2, [5, 3], None),
        (0.1, 2, None, None),
        (1.9, 4, None, ([3, 2, 2, 1], 1 - 3 / 3.9)),
        (30, 2, None, ([7, 1], 1 - 31 / 34)),
        (5, 1, None, None),
        (5, 8, None, None),
    ],
)
def test_a_better_cut_is_named(head, pp, now, better):
    parallel = ParallelConfig(pp=pp, layers_per_stage=now)
    found = better_cut(parallel, shape_with(head), STEPS)
    if better is None:
        assert found is None
    else:
        assert found[0] == better[0] and math.isclose(found[1], better[1], rel_tol=1e-3)


# --- the tool -----------------------------------------------------------------------------------------------------


def test_512_ranks_in_seconds_and_little_memory():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run_python(
        "tools/plan.py", "--config", "examples/llama3.1-70b/gpus-512.yaml", "--world-size", "512", "--json"
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    assert (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 15
    )  # not wall time: machines are shared
    assert after.ru_maxrss < 2 * 2**20  # KiB
    plan = json.loads(result.stdout)
    assert plan["schema"] == 1 and plan["verdict"] == "fits" and plan["layout"]["dp"] == 16
    assert list(plan) == [
        *("schema", "verdict", "world_size", "model", "layout", "device", "stages", "steps", "time"),
        *("suggestion", "notes"),
    ]
    assert [stage["stage"] for stage in plan["stages"]] == list(range(8))
    assert set(plan["stages"][0]) == {"stage", "exact", "estimate", "fits"}
    exact = plan["stages"][0]["exact"]
    assert set(exact) == {"parameters", "linear_parameters", "weights", "gradients", "optimizer", "save"}
    assert 0 < exact["save"] <= 2**31, "buckets: gradients are reduced while backward runs"
    assert set(plan["steps"]) == {"exact"} and set(plan["time"]) == {"estimate"}


def test_what_does_not_fit_gets_a_suggestion_that_does(answers):
    plan = answers["plan"][0]
    assert plan["verdict"] == "does not fit" and not plan["stages"][0]["fits"]
    assert plan["suggestion"]["world_size"] == 64 and plan["suggestion"]["overrides"]
    assert plan["followed"] == "fits"
    lines = plan["text"].splitlines()
    assert any(line.startswith("verdict: does not fit (") for line in lines)
    assert any(line.startswith("nearest that fits here (") for line in lines)
    assert [line.split()[0] for line in lines if line.startswith("  ")][:3] == ["stage", "0", "1"]


def test_a_model_too_large_for_the_machines_is_sent_to_more(answers):
    plan = answers["plan"][1]
    assert plan["verdict"] == "does not fit"
    assert plan["suggestion"]["world_size"] in (16, 32, 64) and plan["followed"] == "fits"


def test_shards_are_planned_as_they_will_be_trained(tmp_path):
    model = write_tiny_model(tmp_path / "hf", "llama3", num_hidden_layers=2)
    stamp = TokenizerStamp(
        fingerprint=tokenizer_fingerprint(model), vocab_size=256, eos_id=2, bos_id=None, chat_template="none"
    )
    content = write_shard(tmp_path / "groups", groups=30, stamp=stamp)
    config = tmp_path / "c.yaml"
    config.write_text(
        json.dumps(
            {
                "model": {"config": str(model)},
                "data": {"train": [str(tmp_path / "groups")], "groups_per_step": 30, "max_tokens_per_pack": 64},
                "objective": {"name": "sft", "sources": ["expert", "teacher", "self"]},
            }
        )
    )
    command = ("tools/plan.py", "--config", str(config), "--world-size", "2", "--gpu-memory-gib", "139", "--json")
    result = run_python(*command)
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["device"]["name"] == "GPU of 139 GiB" and "(its ranks: 2)" in plan["notes"][-1]
    steps = plan["steps"]["exact"]
    assert not steps["assumed"] and steps["groups"] == 30 and steps["steps_per_epoch"] == 1
    assert steps["loss_tokens"] == sum(len(tokens) for group in content for tokens in group["responses"])
    assert steps["tokens"] * (1 - steps["padding_share"]) <= sum(
        len(group["prompt"]) + len(tokens) - 1 for group in content for tokens in group["responses"]
    )


@pytest.mark.parametrize(
    ("arguments", "code", "messages"),
    [
        (
            ["--config", LLAMA_70B, "--world-size", "50", "parallel.tp=3", "optimizer.min_lr=1", "data.split=1,1,1"],
            2,
            [
                *("does not divide the world size 50", "64 attention heads do not divide by TP 3"),
                *("optimizer.min_lr", "data.split"),
            ],
        ),
        # tp 8 divides neither its 28 heads nor, being a multiple of 4 groups, is refused for them
        (
            ["--config", "examples/qwen2.5-math-7b/gpus-8.yaml", "--world-size", "8", "parallel.tp=8"],
            2,
            ["28 attention heads do not divide by TP 8"],
        ),
        (["--help"], 0, ["example: python tools/plan.py"]),
    ],
)
def test_all_errors_at_once_and_help_before_torch(arguments, code, messages):
    result = run_python("-X", "importtime", "tools/plan.py", *arguments)
    assert result.returncode == code and "Traceback" not in result.stderr
    assert not re.search(r"\| +torch$", result.stderr, re.MULTILINE)
    assert all(message in result.stdout + result.stderr for message in messages)
