"""The run as a user sees it: exact resume, stops on request, refused steps, bad checkpoints."""

import errno
import json
import shutil
import signal
import time
from pathlib import Path

import device_run
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from ranks import RankGroup, run_ranks
from tiny_models import write_tiny_model

from megatron_gft.checkpoints.history import find_checkpoint, list_checkpoints
from megatron_gft.conversion.convert import hf_to_megatron
from megatron_gft.errors import EXIT_REQUEUE, InputError
from megatron_gft.hf.shape import read_model_shape
from megatron_gft.hf.weights import load_hf_weights
from megatron_gft.metrics import RunTotals
from tools import convert_checkpoint

VOCAB = 503


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model") / "hf", "llama_tied_linear", num_hidden_layers=4))


def train(model: str, output: Path, *overrides: str, world_size: int = 1, timeout: float = 120) -> list[dict]:
    """Four float32 steps of ``device_run`` on forked ranks; the results of all ranks."""
    options = ["model.precision=fp32", "objective.coefficient=none", *overrides]
    return run_ranks(world_size, device_run.run, model, str(output), options, timeout=timeout)


def losses(output: Path) -> dict[int, float]:
    """Training loss by step."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """An undisturbed run on one rank."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train(model, output)
    assert len(losses(output)) == 4
    return output


@pytest.mark.parametrize(
    ("world_size", "first_steps", "option"),
    [(1, 2, "checkpoint.async_save=true"), (1, 2, "checkpoint.async_save=false"), (2, 3, "model.precision=bf16")],
)
def test_resume_in_the_same_layout_is_bit_for_bit(model, tmp_path, world_size, first_steps, option):
    train(model, tmp_path / "whole", option, world_size=world_size)
    train(model, tmp_path / "run", f"train.max_steps={first_steps}", option, world_size=world_size)
    train(model, tmp_path / "run", option, world_size=world_size)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    run, whole = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("run", "whole")
    )
    assert all(run[key] == whole[key] > 0 for key in ("run/tokens", "run/flops"))
    assert 0 < run["goodput"] < 1


def test_entropy_is_measured_when_asked_for_and_changes_no_loss(model, whole, tmp_path):
    train(model, tmp_path / "run", "logging.entropy_every=3", "train.validate_every=2")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "entropy" in record] == [1, 4]
    assert [record["step"] for record in records if "valid/entropy" in record] == [2, 4]
    assert losses(tmp_path / "run") == losses(whole)


def test_time_that_was_lost_counts_and_steps_that_are_run_again_count_once():
    lines = [
        json.dumps(
            {"step": step, **{f"run/{name}": step * value for name, value in vars(RunTotals(10, 40, 5, 3)).items()}}
        )
        for step in (1, 2, 3)
    ]
    others = ["[" * 100000, '{"step": 9}', '{"step": "x", "run/tokens": 1}', lines[2][:-9], "7"]
    totals = RunTotals.of_lines([*others, *lines, *others], 2)
    assert totals == RunTotals(tokens=20, flops=80, device_seconds=15, useful_seconds=6)
    assert RunTotals.of_lines(lines, 0) == RunTotals(device_seconds=15) and RunTotals.of_lines([], 0) == RunTotals()
    record = totals.record(peak_tflops=1e-12)
    assert (record["goodput"], record["run/tokens_per_second_per_device"]) == (6 / 15, 20 / 15)
    assert record["run/mfu"] == pytest.approx(80 / 15)


@pytest.fixture
def small_buckets(monkeypatch) -> str:
    """Several of them, most with padding at the end: Megatron makes each a multiple of the data-parallel size."""

    def wrap(transformer, ddp_config, *args, **options):
        ddp_config.bucket_size = 1000
        return DistributedDataParallel(transformer, ddp_config, *args, **options)

    monkeypatch.setattr("megatron_gft.optimizer.DistributedDataParallel", wrap)
    return "optimizer.overlap_grad_reduce=true"


@pytest.mark.parametrize(("world_size", "precision"), [(1, "fp32"), (3, "bf16")])
def test_padding_of_buckets_moves_no_optimizer_state(model, tmp_path, small_buckets, world_size, precision):
    options = (small_buckets, f"model.precision={precision}")
    train(model, tmp_path / "whole", *options, world_size=world_size)
    train(model, tmp_path / "run", "train.max_steps=2", *options, world_size=world_size)
    train(model, tmp_path / "run", *options, world_size=world_size)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_checkpoint_with_moved_optimizer_state_is_refused(model, tmp_path, small_buckets, monkeypatch):
    with monkeypatch.context() as as_megatron_does:
        gather = DistributedOptimizer.get_parameter_state_dp_zero
        as_megatron_does.setattr("megatron_gft.optimizer._gathered_with_padding", gather)
        train(model, tmp_path, "train.max_steps=2", small_buckets, world_size=2)
    with pytest.raises(
        RuntimeError,
        match=r"step-00000002: the optimizer's copy of .* is not that weight -> set checkpoint\.load_optimizer=false",
    ):
        train(model, tmp_path, small_buckets, world_size=2)
    train(model, tmp_path, small_buckets, "checkpoint.load_optimizer=false", world_size=2)
    assert len(losses(tmp_path)) == 4


@pytest.mark.parametrize(("most", "world_size"), [(None, 2), (0, 2), (0, 1)])
def test_a_save_takes_as_much_of_a_device_as_it_may(model, whole, tmp_path, most, world_size, monkeypatch):
    """Beyond it Megatron gathers the optimizer's state by gloo, on one rank; the checkpoint is as good."""
    if most is not None:
        monkeypatch.setattr("megatron_gft.optimizer.MOST_GATHERED_BYTES", most)
    gather, asked = DistributedOptimizer.get_parameter_state_dp_zero, []

    def watched(part, **options):
        if not options["empty_data"]:
            asked.append(options["use_gloo_comm"])
        state = gather(part, **options)
        assert most is None or asked[-1] and (state is None) == (part.data_parallel_group.rank() > 0)
        return state

    monkeypatch.setattr(DistributedOptimizer, "get_parameter_state_dp_zero", watched)
    train(model, tmp_path, "train.max_steps=2", world_size=world_size)
    monkeypatch.setattr(DistributedOptimizer, "get_parameter_state_dp_zero", gather)
    train(model, tmp_path, world_size=2)
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2, ("parallel.tp=2",)), (2, ("parallel.pp=2", "parallel.layers_per_stage=[3,1]"))),
        ((2, ()), (1, ())),
        ((2, ("parallel.pp=2",)), (4, ("parallel.tp=2", "parallel.sequence_parallel=true"))),
        ((1, ()), (2, ("optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"))),
    ],
)
def test_resume_in_another_layout_is_within_rounding(model, whole, tmp_path, first, second):
    output = tmp_path / "run"
    train(model, output, "train.max_steps=2", *first[1], world_size=first[0])
    train(model, output, *second[1], world_size=second[0])
    expected = losses(whole)
    scale = max(map(abs, expected.values()))
    assert all(abs(loss - expected[step]) < 1e-5 * scale for step, loss in losses(output).items())
    assert set(losses(output)) == set(expected)


def test_checkpoints_are_kept_and_pruned(model, tmp_path):
    output = tmp_path / "run"
    train(model, output, "checkpoint.save_every=1", "checkpoint.keep_last=2")
    folder = output / "checkpoints"
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000003", "step-00000004"]
    assert find_checkpoint(folder, "latest").name == "step-00000004"
    assert find_checkpoint(folder, "previous").name == "step-00000003"
    assert not list(folder.glob(".step-*"))
    beside = {path.name: path.read_bytes() for path in (folder / "step-00000004" / "hf").iterdir()}
    train(model, output, "checkpoint.save_every=1", "checkpoint.keep_last=1", "train.epochs=2")
    newest = folder / "step-00000008"  # what the run went on from is long gone
    assert list_checkpoints(folder) == [newest]
    assert {path.name: path.read_bytes() for path in (newest / "hf").iterdir()} == beside


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, EXIT_REQUEUE)])
def test_signal_to_one_rank_saves_and_leaves(model, whole, tmp_path, number, code):
    """One rank gets the signal, all finish the step, save and leave with its code; the run goes on afterwards."""
    output = tmp_path / "run"
    options = ["model.precision=fp32", "objective.coefficient=none", "train.epochs=50"]
    group = RankGroup(tmp_path, 2, device_run.run, model, str(output), options, timeout=240)
    metrics = output / "metrics.jsonl"
    while time.monotonic() < group.deadline and not (metrics.exists() and metrics.stat().st_size):  # both ranks train
        time.sleep(0.02)
    group.send(number, rank=1)
    results = group.wait()
    assert [result["code"] for result in results] == [code, code]
    saved = find_checkpoint(output / "checkpoints", "latest")
    assert int(saved.name.removeprefix("step-")) == max(losses(output)) < 200
    for step, loss in list(losses(output).items())[:4]:
        assert loss == pytest.approx(losses(whole)[step], rel=1e-5)


def test_changed_data_is_refused_and_can_be_allowed(model, tmp_path):
    output = tmp_path / "run"
    train(model, output, "train.max_steps=2")
    with pytest.raises(RuntimeError, match="data.allow_changed_data"):
        train(model, output, "data.groups_per_step=4")
    train(model, output, "data.groups_per_step=4", "data.allow_changed_data=true", "train.max_steps=3")
    assert max(losses(output)) == 3


def _settings_after_resume(model: str, output: str, options: list[str]) -> list[dict]:
    """What the optimizer works with when training goes on."""
    from megatron_gft.trainer import Trainer

    names, seen = ("max_lr", "min_lr", "betas", "eps", "weight_decay"), []

    def look(trainer):
        seen.extend({name: group[name] for name in names} for group in trainer.optimizer.param_groups)
        return original(trainer)

    original, Trainer.run = Trainer.run, look
    try:
        device_run.run(model, output, options)
    finally:
        Trainer.run = original
    return seen


@pytest.mark.parametrize("options", [(), ("optimizer.distributed=false",), ("model.precision=bf16",)])
def test_the_configuration_wins_over_the_optimizer_settings_of_a_checkpoint(model, tmp_path, options):
    output, first = tmp_path / "run", ("model.precision=fp32", "objective.coefficient=none", *options)
    train(model, output, *first, "train.max_steps=2")
    changed = [*first, "optimizer.lr=5e-4", "optimizer.min_lr=1e-5", "optimizer.beta1=0.8", "optimizer.beta2=0.9"]
    changed += ["optimizer.eps=1e-6", "optimizer.weight_decay=0.1"]
    (seen,) = run_ranks(1, _settings_after_resume, model, str(output), changed)
    assert {group["weight_decay"] for group in seen} == {0.0, 0.1}
    same = {"max_lr": 5e-4, "min_lr": 1e-5, "betas": (0.8, 0.9), "eps": 1e-6}
    assert all(
        {**group, "betas": tuple(group["betas"])} == same | {"weight_decay": group["weight_decay"]} for group in seen
    )
    assert rates(output)[3:] == [5e-4]


def rates(output: Path) -> list[float]:
    """Learning rate of each update."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [record["lr"] for record in records if "loss" in record]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_every_update_has_a_rate_above_the_end_of_the_decay(model, tmp_path, schedule):
    """``min_lr`` is reached after the last update: with 0 it would be a step that does nothing."""
    train(model, tmp_path / "run", f"optimizer.schedule={schedule}", "optimizer.min_lr=0")
    found = rates(tmp_path / "run")
    assert len(found) == 4 and found == sorted(found, reverse=True) and min(found) > 0
    if schedule == "linear":
        assert found == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_experts_with_an_optimizer_of_their_own_are_told(tmp_path, first, second):
    moe, run = str(write_tiny_model(tmp_path / "moe", "qwen3_moe", num_hidden_layers=1)), tmp_path / "run"
    train(moe, run, f"parallel.ep={first}", "train.max_steps=1", world_size=2)
    with pytest.raises(RuntimeError, match="InputError: .*its optimizer is one of another parallel.ep"):
        train(moe, run, f"parallel.ep={second}", world_size=2)
    train(moe, run, f"parallel.ep={second}", "checkpoint.load_optimizer=false", "train.max_steps=2", world_size=2)


@pytest.mark.parametrize(("first", "precision"), [("true", "fp32"), ("false", "bf16")])
def test_another_kind_of_optimizer_is_refused_with_its_settings(model, tmp_path, first, precision):
    """Megatron's optimizers store different things; weights and place can go on all the same."""
    output, second = tmp_path / "run", "false" if first == "true" else "true"
    options = [f"model.precision={precision}"]
    train(model, output, *options, f"optimizer.distributed={first}", "train.max_steps=1")
    with pytest.raises(
        RuntimeError, match=f"(?s)InputError.*holds .*distributed={first}.* needs .*distributed={second}"
    ):
        train(model, output, *options, f"optimizer.distributed={second}")
    options += [f"optimizer.distributed={second}"]
    train(model, output, *options, "checkpoint.load_optimizer=false", "train.max_steps=2", world_size=2)
    train(model, output, *options, "train.max_steps=3")
    assert set(losses(output)) == {1, 2, 3}


def test_resume_never_does_not_overwrite(model, tmp_path):
    train(model, tmp_path / "run", "train.max_steps=1")
    with pytest.raises(RuntimeError, match="would overwrite them"):
        train(model, tmp_path / "run", "checkpoint.resume=never")


def test_weights_only_start_from_a_run(model, whole, tmp_path):
    """``init_from`` a run: its last weights, a fresh optimizer, step 1."""
    output = tmp_path / "run"
    train(model, output, f"checkpoint.init_from={whole}", "train.max_steps=1")
    assert set(losses(output)) == {1}
    assert losses(output)[1] != losses(whole)[1]


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_a_run_that_has_learned_nothing_yet_is_saved_and_goes_on(model, tmp_path, monkeypatch, distributed):
    """Every response wrong, in a first round of rft or grpo: no step makes an update, and Adam has no state."""
    options, groups = ("objective=rft", f"optimizer.distributed={distributed}"), device_run.RandomGroups

    def wrong(*arguments):
        made = groups(*arguments)
        for group in made.items:
            group.rewards[:] = 0
        return made

    monkeypatch.setattr(device_run, "RandomGroups", wrong)
    train(model, tmp_path / "run", *options, "train.max_steps=2")
    monkeypatch.setattr(device_run, "RandomGroups", groups)
    train(model, tmp_path / "run", *options)
    first, second, third, fourth = losses(tmp_path / "run").values()
    assert first == second == 0 < fourth < third


def test_weights_and_optimizer_start_from_a_run(model, tmp_path):
    """Three epochs of one step are one, and two that begin with its weights and Adam's state."""
    options = ("data.groups_per_step=32", "optimizer.lr=1e-2", f"checkpoint.init_from={tmp_path / 'first'}")
    train(model, tmp_path / "whole", *options[:2], "train.epochs=3")
    train(model, tmp_path / "first", *options[:2])
    train(model, tmp_path / "with", *options, "checkpoint.init_optimizer=true", "train.epochs=2")
    train(model, tmp_path / "without", *options, "train.epochs=2")
    whole, carried, fresh = ([*losses(tmp_path / name).values()] for name in ("whole", "with", "without"))
    assert carried == pytest.approx(whole[1:], rel=1e-4)
    assert fresh[0] == carried[0] and abs(fresh[1] - whole[2]) > 100 * abs(carried[1] - whole[2])


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip"])
def test_damaged_checkpoint_is_named_and_the_previous_one_usable(model, whole, tmp_path, damage):
    output = tmp_path / "run"
    train(model, output, "checkpoint.save_every=1", "train.max_steps=3")
    newest = find_checkpoint(output / "checkpoints", "latest")
    victim = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    if damage == "remove":
        victim.unlink()
    elif damage == "flip":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    else:
        victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(RuntimeError, match=f"(?s)damaged.*{victim.name}"):
        train(model, output)
    train(model, output, "checkpoint.resume=previous")
    assert losses(output) == losses(whole)


def test_half_written_checkpoint_is_never_latest(model, whole, tmp_path):
    """What a kill in the middle of a save leaves behind: a hidden folder, and maybe a named one without its list."""
    output = tmp_path / "run"
    train(model, output, "train.max_steps=2")
    folder = output / "checkpoints"
    good = find_checkpoint(folder, "latest")
    shutil.copytree(good, folder / ".step-00000003")
    shutil.copytree(good, folder / "step-00000003")
    (folder / "step-00000003" / "files.json").unlink()
    assert find_checkpoint(folder, "latest") == good
    train(model, output)
    assert losses(output) == losses(whole)


def _run_with_poison(model: str, output: str, options: list[str], step: int) -> dict:
    """``device_run.run`` with a weight set to NaN before a step, on the last rank only."""
    from megatron_gft.trainer import Trainer, TrainingStopped

    original = Trainer.step

    def poisoned(self, batch, packs, seconds):
        if self.state.step + 1 == step and self.parallel.rank == self.parallel.world_size - 1:
            next(self.chunks[0].parameters()).data.view(-1)[0] = float("nan")
        return original(self, batch, packs, seconds)

    Trainer.step = poisoned
    try:
        return device_run.run(model, output, options)
    except TrainingStopped as error:
        return {"stopped": str(error)}


@pytest.mark.parametrize("layout", [(), ("parallel.pp=2",)])
def test_nonfinite_step_stops_with_rank_and_groups_and_keeps_the_microbatch(model, tmp_path, layout):
    output = tmp_path / "run"
    options = ["model.precision=fp32", *layout]
    results = run_ranks(2, _run_with_poison, model, str(output), options, 2)
    for result in results:
        assert "step 2: the loss is nan" in result["stopped"] and "rank 1" in result["stopped"]
        assert "groups g" in result["stopped"]
    kept = list((output / "nonfinite").glob("step-00000002-rank-1-pack-*.pt"))
    assert kept
    pack = torch.load(kept[0], weights_only=False)["pack"]
    assert pack.tokens.numel() > 0 and set(losses(output)) == {1}


def test_nonfinite_steps_are_skipped_up_to_a_limit(model, tmp_path):
    output = tmp_path / "run"
    options = ["model.precision=fp32", "train.nonfinite=skip", "train.max_skipped_steps=2", "train.epochs=2"]
    result = run_ranks(1, _run_with_poison, model, str(output), options, 2)[0]
    assert "max_skipped_steps=2 reached" in result["stopped"]
    assert set(losses(output)) == {1, 2, 3}


def test_export_during_the_run_loads_in_transformers(model, tmp_path):
    import transformers

    output = tmp_path / "run"
    train(model, output, "checkpoint.export_hf=2", world_size=2)
    exports = sorted(path.name for path in (output / "export").iterdir())
    assert exports == ["step-00000002", "step-00000004"]
    before = transformers.AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(output / "export" / "step-00000004").state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)

    # The tool takes the run folder too, and gives what the run exported.
    arguments = ["megatron-to-hf", "--checkpoint", str(output), "--output", str(tmp_path / "back")]
    assert convert_checkpoint.main(arguments) == 0
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(back[key], after[key]) for key in after)
    assert convert_checkpoint.main([*arguments[:2], str(tmp_path), *arguments[3:4], str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()


def test_a_run_that_learns_nothing_says_so(model, tmp_path, capfd, monkeypatch):
    """Once at its first step, once at its last; never where something was learned."""
    train(model, tmp_path / "other", "train.max_steps=1")
    assert "nothing is" not in capfd.readouterr().err
    monkeypatch.setattr("megatron_gft.batch.group_advantages", lambda rewards, *_, **options: 0 * rewards)
    train(model, tmp_path / "run")
    error = capfd.readouterr().err
    assert [error.count(f"warning: nothing is learned up to step {n}: ") for n in (1, 2, 3, 4)] == [1, 0, 0, 1]


def test_an_export_that_is_asked_for_after_the_end(model, tmp_path, capfd):
    """Code beside the weights goes along as data."""
    import transformers

    folder, output = tmp_path / "model", tmp_path / "run"
    shutil.copytree(model, folder)
    (folder / "tokenization_own.py").write_text("raise SystemExit('this is data')\n")
    train(str(folder), output, "train.max_steps=1")
    assert not (output / "export").exists()
    train(str(folder), output, "train.max_steps=1", "checkpoint.export_hf=last")
    assert capfd.readouterr().err.count("nothing is left to train -> a new run: another train.output") == 1
    export = output / "export" / "step-00000001"
    transformers.AutoModelForCausalLM.from_pretrained(export)
    for place in (export, output / "checkpoints" / "step-00000001" / "hf"):
        assert (place / "tokenization_own.py").read_bytes() == (folder / "tokenization_own.py").read_bytes()


def _metrics_fail(model: str, output: str, options: list[str], at: int) -> dict:
    """``device_run.run`` with a disk that is full for the metrics of a step (0: for closing their file)."""
    from megatron_gft import metrics

    original = metrics._json_lines

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    def sink(path, resume_step, closing):
        write = original(path, resume_step, closing)
        if not at:
            closing.callback(full)
        return lambda record: full() if record["step"] == at else write(record)

    metrics._json_lines = sink
    return {"code": device_run.run(model, output, options)["code"]}


def test_metrics_that_cannot_be_written_end_the_run_with_a_checkpoint(model, whole, tmp_path, capfd):
    """On all ranks: one message, nothing lost but the record."""
    output, options = tmp_path / "run", ["model.precision=fp32", "objective.coefficient=none"]
    results = run_ranks(2, _metrics_fail, model, str(output), options, 2)
    assert [result["code"] for result in results] == [2, 0], "the first one speaks for all"
    error = capfd.readouterr().err
    assert error.count("metrics.jsonl: cannot be written (No space left on device)") == 1
    assert "stopped after step 2; the checkpoint is complete" in error
    train(model, output)
    assert {step: pytest.approx(loss, rel=1e-5) for step, loss in losses(whole).items() if step != 2} == losses(output)
    with pytest.raises(RuntimeError, match="InputError: .*metrics.jsonl: cannot be written"):
        run_ranks(1, _metrics_fail, model, str(tmp_path / "other"), [*options, "train.max_steps=1"], 0)


def test_half_a_file_of_a_checkpoint_is_named(model, tmp_path):
    output = tmp_path / "run"
    train(model, output, "train.max_steps=1")
    step = output / "checkpoints" / "step-00000001"
    common = [file.name for file in step.glob("common.pt")]  # Megatron-Core 0.19 writes none
    for name in ("files.json", "state.json", ".metadata", *common, "config.yaml"):
        file = step / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(RuntimeError, match=rf"(?s)InputErrors?: .*step-00000001.*{name}"):
            train(model, output)
        file.write_bytes(content)


@pytest.mark.parametrize("weights", [True, False], ids=["beside weights", "alone"])
def test_a_lora_folder_is_refused(model, tmp_path, weights):
    adapter, message = tmp_path / "adapter", "adapter: adapter_config.json is there.*merge_and_unload"
    shutil.copytree(model, adapter) if weights else adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=message):
        hf_to_megatron(adapter, tmp_path / "checkpoint")
    with pytest.raises(InputError, match=message):
        load_hf_weights([], read_model_shape(model), adapter, None)


def test_profile_writes_a_trace(model, tmp_path):
    train(model, tmp_path / "run", "profile.steps=[2]", "profile.ranks=[1]", "train.max_steps=2", world_size=2)
    traces = list((tmp_path / "run" / "traces").iterdir())
    assert [trace.name for trace in traces] == ["step-00000002-rank-1.json"]
    assert json.loads(traces[0].read_text())["traceEvents"]


def test_metrics_cover_sources_signs_and_time(model, whole):
    record = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    for key in ("grad_norm", "lr", "tokens_per_second", "rectified", "entropy", "probability", "fill", "balance"):
        assert key in record
    for part in ("data", "forward_backward", "optimizer", "save", "step"):
        assert record[f"seconds/{part}"] >= 0
    assert {"expert/positive/nll", "self/negative/rectified", "teacher/response_tokens"} <= set(record)
    shares = [record[f"{s}/{sign}/tokens"] for s in ("expert", "teacher", "self") for sign in ("positive", "negative")]
    assert sum(shares) == record["tokens"]


def test_resume_without_the_optimizer_keeps_weights_and_place(model, whole, tmp_path):
    output = tmp_path / "run"
    train(model, output, "train.max_steps=2")
    train(model, output, "checkpoint.load_optimizer=false")
    assert losses(output)[3] == pytest.approx(losses(whole)[3], rel=1e-5), "same weights, same groups"
    assert losses(output)[4] != losses(whole)[4], "Adam starts afresh"


def test_a_spike_of_the_gradient_is_refused(model, tmp_path):
    """From the eleventh step on, norms are compared with their median."""
    options = ["train.epochs=4", "optimizer.lr=1e-6", "train.grad_spike_factor=1.01", "train.nonfinite=skip"]
    with pytest.raises(RuntimeError, match="times its running median"):
        train(model, tmp_path / "run", *options, "train.max_skipped_steps=0")
    assert len(losses(tmp_path / "run")) >= 10


def _with_fake_wandb(model: str, output: str, options: list[str]) -> dict:
    import sys
    import types

    calls: list[tuple] = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, sorted(values)[:1])), finish=lambda: calls.append(("finish",))
    )
    sys.modules["wandb"] = types.SimpleNamespace(init=lambda **kwargs: calls.append(("init", kwargs)) or run)
    return {"code": device_run.run(model, output, options)["code"], "calls": calls}


def test_weights_and_biases_gets_every_record_when_asked_for(model, tmp_path):
    options = ["model.precision=fp32", "logging.wandb_project=gft"]
    runs = [
        run_ranks(1, _with_fake_wandb, model, str(tmp_path / folder), [*options, f"train.max_steps={steps}"])[0][
            "calls"
        ]
        for folder, steps in (("a/run", 2), ("b/run", 1), ("a/run", 3))
    ]
    ids = [calls[0][1]["id"] for calls in runs]
    assert ids[0] == ids[2] != ids[1], "of a folder, not of its name"
    calls = runs[0]
    started, arguments = calls[0]
    assert started == "init" and arguments["project"] == "gft" and arguments["config"]["train"]["max_steps"] == 2
    assert [call[0] for call in calls[1:]] == [1, 2, "finish"]


def test_a_checkpoint_of_another_model_is_refused(model, whole, tmp_path):
    other = write_tiny_model(tmp_path / "hf", "llama_tied_linear", num_hidden_layers=4, hidden_size=32)
    with pytest.raises(RuntimeError, match="(?s)InputError.*hidden_size: 32 by .*, 64 by"):
        train(str(other), tmp_path / "run", f"checkpoint.init_from={whole}")


def test_weights_without_a_place_in_the_model_are_refused(tmp_path):
    """A head of its own, where the model has none: without it another function would be trained, in silence."""
    untied = write_tiny_model(tmp_path / "u", "llama_tied_linear", num_hidden_layers=2, tie_word_embeddings=False)
    run = tmp_path / "run"
    train(str(untied), run, "train.max_steps=1")
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(RuntimeError, match="(?s)InputError.*tie_word_embeddings: True by .*, False by"):
        train(str(untied), run, "model.allow_config_mismatch=[tie_word_embeddings]")
    (newest,) = list_checkpoints(run / "checkpoints")
    for file in ("hf/config.json", "files.json", "state.json"):  # as one of Megatron's own
        (newest / file).unlink()
    with pytest.raises(RuntimeError, match=r"(?s)InputError.*output_layer.weight \[512, 64\] has no place"):
        train(str(untied), tmp_path / "other", f"checkpoint.init_from={newest}")
