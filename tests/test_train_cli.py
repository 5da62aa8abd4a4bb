"""``python -m megatron_gft.train`` as a user types it: real processes, real shards, one clear error for bad input."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_models import write_tiny_model, write_tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_gft.commands.train import read_command_line
from megatron_gft.errors import InputError
from megatron_gft.shards import GroupShardWriter, TokenizerStamp
from megatron_gft.tokenizer import load_tokenizer

VOCAB = 503


def write_shard(prefix: Path, folder: Path, groups: int = 12, scored: bool = True) -> Path:
    """A shard of random groups, one expert and some self-sampled responses each."""
    rng = np.random.default_rng(groups)
    tokenizer = load_tokenizer(folder)
    stamp = TokenizerStamp(
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
        chat_template=tokenizer.chat_template_fingerprint,
    )
    with GroupShardWriter(prefix, stamp) as writer:
        for index in range(groups):
            size = int(rng.integers(2, 5))
            writer.add_group(
                prompt=rng.integers(0, 250, rng.integers(3, 20)).tolist(),
                responses=[rng.integers(0, 250, rng.integers(1, 30)).tolist() for _ in range(size)],
                sources=["expert"] + ["self"] * (size - 1),
                rewards=[float(k % 2) if scored else None for k in range(size)],
                group_id=f"group-{index}",
            )
    return prefix


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    model = write_tiny_model(folder / "model", "llama_tied_linear", num_hidden_layers=2)
    write_shard(folder / "train", model)
    config = {
        "model": {"config": str(model), "precision": "fp32"},
        "data": {
            "train": [str(folder / "train")],
            "groups_per_step": 4,
            "max_tokens_per_pack": 128,
            "split": "80,20",
        },
        "optimizer": {"lr": 1e-3},
        "objective": {"coefficient": "none"},
        "checkpoint": {"init_from": f"hf:{model}"},
        "train": {"validate_every": 2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def command(workspace: Path, *arguments: str, processes: int = 0) -> subprocess.CompletedProcess:
    """Run the trainer alone (0) or under torchrun."""
    launcher = [sys.executable, "-m"]
    if processes:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return train_command(workspace / "config.yaml", *arguments, launcher=launcher)


def train_command(
    file: Path, *arguments: str, launcher: Sequence[str] = (sys.executable, "-m")
) -> subprocess.CompletedProcess:
    line = [*launcher, "megatron_gft.train", "--config", str(file), *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=250, env=os.environ | {"OMP_NUM_THREADS": "1"})


def read_losses(output: Path) -> list[float]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_one_config_runs_alone_and_at_tp2_pp2(workspace, tmp_path):
    alone = command(workspace, f"train.output={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr[-3000:]
    lines = [line for line in alone.stderr.splitlines() if line.startswith("step ")]
    assert len(lines) == 3 and all(
        word in lines[0] for word in ("loss", "grad norm", "lr", "tokens/s", "rectified", "ETA")
    )
    (tmp_path / "many" / "report.html").mkdir(parents=True)
    many = command(workspace, f"train.output={tmp_path / 'many'}", "parallel.tp=2", "parallel.pp=2", processes=4)
    assert many.returncode == 0, many.stderr[-3000:]
    assert "report.html: not written (" in many.stderr, "a run that is done does not fail for want of a picture"
    report = (tmp_path / "alone" / "report.html").read_text()
    assert all(word in report for word in ("<svg", "<td>torch</td>", "forward_backward", "max_tokens_per_pack"))
    # losses are differences of sums of this size, and Adam amplifies rounding over the steps
    scale = max(abs(loss) for loss in read_losses(tmp_path / "alone"))
    assert read_losses(tmp_path / "many") == pytest.approx(read_losses(tmp_path / "alone"), abs=1e-5 * scale)
    assert many.stderr.count("step 1/3") == 1, "only rank 0 writes"
    resolved = yaml.safe_load((tmp_path / "many" / "config.yaml").read_text())
    assert resolved["parallel"]["tp"] == 2 and resolved["objective"]["advantage"] == "std"
    assert list((tmp_path / "alone" / "tensorboard").iterdir())
    assert not (tmp_path / "many" / "doing").exists(), "what a process was doing, when it did not end in order"
    validations = [line for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines() if "valid/" in line]
    assert validations and "valid/expert/positive/nll" in validations[0]


PATH_TO_THE_LOSS = """
import json, os, sys
import megatron_gft.job
from megatron_gft.commands.train import main

package = os.path.dirname(megatron_gft.__file__)

def watch(frame, event, _):
    if event == "call" and frame.f_code.co_name == "linear_gft_loss":
        path = []
        while path[:1] != [["commands/train.py", "main"]]:
            if frame.f_code.co_filename.startswith(package):
                path.insert(0, [os.path.relpath(frame.f_code.co_filename, package), frame.f_code.co_name])
            frame = frame.f_back
        print(json.dumps(path), flush=True)
        os._exit(0)

sys.setprofile(watch)
main(sys.argv[1:])
"""


def test_from_main_to_the_loss_is_a_short_way(workspace, tmp_path):
    """What a reader has to follow: this package's functions on the stack when the loss begins, Megatron's left out."""
    arguments = ["--config", str(workspace / "config.yaml"), f"train.output={tmp_path}", "model.precision=bf16"]
    line = [sys.executable, "-c", PATH_TO_THE_LOSS, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=250, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    path = json.loads(done.stdout)
    assert path[0][1] == "main" and path[-1][1] == "linear_gft_loss"
    assert len(path) <= 8 and len({file for file, _ in path}) <= 5, path


@pytest.mark.parametrize(
    ("flag", "key"), [("--lr", "section.key=value"), ("--tensor-model-parallel-size=2", "parallel.tp=value")]
)
def test_a_flag_of_another_program_names_the_key(workspace, flag, key):
    with pytest.raises(InputError, match=f"^{flag}: no flag of training -> keys are set as {key}$"):
        read_command_line(["--config", str(workspace / "config.yaml"), flag, "2"])


def test_help_is_there_at_once():
    """CPU seconds of the program, so that a busy machine does not matter; the best of five."""
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "megatron_gft.train", "--help"], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) <= 0.3


def refused(workspace: Path, *arguments: str, processes: int = 0) -> str:
    """The message of a run that must end with exit code 2 and no traceback."""
    done = command(workspace, *arguments, processes=processes)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.returncode == 2, done.stderr[-3000:]
    message = done.stderr[done.stderr.index("error: ") :]
    return message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["optimizer.lrr=1"], "did you mean optimizer.lr?"),
        (["parallel.tp=3"], "attention heads do not divide by TP 3"),
        (["data.train=[nowhere]"], "nowhere"),
        (["model.config=nowhere"], "nowhere"),
        (["data.max_tokens_per_pack=16"], "over-long"),
        (["checkpoint.init_from=hf:nowhere"], "nowhere"),
        (["checkpoint.init_from=nowhere"], "hf:DIR"),
        (["train.epochs=0", "optimizer.min_lr=1"], "train.epochs"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(workspace, tmp_path, arguments, expected):
    assert expected in refused(workspace, f"train.output={tmp_path / 'run'}", *arguments)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_world_size_that_does_not_fit_is_said_once(workspace, tmp_path):
    done = command(workspace, f"train.output={tmp_path / 'run'}", "parallel.tp=2", processes=3)
    assert done.returncode != 0
    assert done.stderr.count("does not divide the world size 3") == 1


def test_shard_of_another_tokenizer(workspace, tmp_path):
    other = tmp_path / "tokenizer"
    other.mkdir()
    write_tiny_tokenizer(other)
    settings = json.loads((other / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(settings))
    write_shard(tmp_path / "other", other)
    arguments = (f"train.output={tmp_path / 'run'}", f"data.train=[{tmp_path / 'other'}]")
    assert "made with tokenizer" in refused(workspace, *arguments)
    one_step = ("train.max_steps=1", "data.groups_per_step=11")
    allowed = command(workspace, *arguments, *one_step, "data.allow_tokenizer_mismatch=true")
    assert allowed.returncode == 0, allowed.stderr[-3000:]
    assert "data.groups_per_step=11: there are 10 groups -> an epoch is one step" in allowed.stderr


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_shard(workspace, tmp_path, damage):
    prefix = write_shard(tmp_path / "bad", workspace / "model")
    data = Path(f"{prefix}.bin")
    if damage == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:-4])
    assert "bad.bin" in refused(workspace, f"train.output={tmp_path / 'run'}", f"data.train=[{prefix}]")


def test_rewards_that_are_missing_name_group_and_tool(workspace, tmp_path):
    prefix = write_shard(tmp_path / "unscored", workspace / "model", scored=False)
    message = refused(workspace, f"train.output={tmp_path / 'run'}", f"data.train=[{prefix}]")
    assert "tools/score_groups.py" in message and "group-" in message
    done = command(
        workspace,
        f"train.output={tmp_path / 'sft'}",
        f"data.train=[{prefix}]",
        "objective.name=sft",
        "train.max_steps=1",
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow  # test_dataset.py counts them without a run
def test_overlong_responses_are_dropped_or_truncated_and_counted(workspace, tmp_path):
    for policy, word in (("drop", "dropped_responses="), ("truncate", "truncated_responses=")):
        done = command(
            workspace,
            f"train.output={tmp_path / policy}",
            f"data.overlong={policy}",
            "data.max_response_tokens=8",
            "train.max_steps=1",
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert word in done.stderr and f"{word}0" not in done.stderr


@pytest.fixture(scope="module")
def recipe(workspace, tmp_path_factory) -> Path:
    """A recipe's folder: a config.json and nothing else, which says what the model's own says."""
    folder = tmp_path_factory.mktemp("recipe")
    shutil.copyfile(workspace / "model" / "config.json", folder / "config.json")
    return folder


def changed(recipe: Path, target: Path, **values) -> Path:
    target.mkdir()
    config = json.loads((recipe / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | values))
    return target


@pytest.mark.slow  # test_recipes.py loads the export of each recipe
def test_what_a_recipe_run_exports_is_whole(workspace, recipe, tmp_path):
    """Tokenizer, chat template and generation settings come from the folder of the weights."""
    done = command(workspace, f"model.config={recipe}", f"train.output={tmp_path / 'run'}", "checkpoint.export_hf=last")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"model.config agrees with {workspace / 'model'}" in done.stderr
    (export,) = (tmp_path / "run" / "export").iterdir()
    own = load_tokenizer(workspace / "model")
    for folder in (export, tmp_path / "run" / "checkpoints" / "step-00000003" / "hf"):
        assert load_tokenizer(folder).fingerprint == own.fingerprint
    AutoTokenizer.from_pretrained(export)
    AutoModelForCausalLM.from_pretrained(export)
    # a run that starts from this one has its tokenizer too
    again = command(
        workspace,
        *(f"model.config={recipe}", f"train.output={tmp_path / 'again'}", f"checkpoint.init_from={tmp_path / 'run'}"),
        *("train.max_steps=1", "checkpoint.export_hf=last"),
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert load_tokenizer(next((tmp_path / "again" / "export").iterdir())).fingerprint == own.fingerprint


@pytest.mark.slow  # test_shard_of_another_tokenizer is the same check
def test_a_recipe_checks_the_tokenizer_of_the_weights(workspace, recipe, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "other")
    write_shard(tmp_path / "foreign", tmp_path / "other")
    done = command(
        workspace, f"model.config={recipe}", f"data.train=[{tmp_path / 'foreign'}]", f"train.output={tmp_path / 'r'}"
    )
    assert done.returncode == 2 and "made with tokenizer" in done.stderr


@pytest.mark.slow  # five starts of processes; test_damaged_inputs.py has the refusals
@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"rope_theta": 123456.0}, "rope_theta"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "rope_scaling"),
    ],
)
def test_weights_of_another_function_are_refused(workspace, recipe, tmp_path, values, key):
    """On a start from a folder, on one from a run, and on resume; with both values and the key that allows it."""
    other = changed(recipe, tmp_path / "other", **values)
    run = tmp_path / "run"
    start = [f"train.output={run}", "train.max_steps=1"]
    refused = command(workspace, f"model.config={other}", *start)
    assert refused.returncode == 2 and not (run / "checkpoints").exists()
    for part in (f"{key}: ", str(other), str(workspace / "model"), f"model.allow_config_mismatch=[{key}]"):
        assert part in refused.stderr, refused.stderr
    assert command(workspace, f"model.config={recipe}", *start).returncode == 0
    resumed = command(workspace, f"model.config={other}", f"train.output={run}")
    assert resumed.returncode == 2 and f"{key}: " in resumed.stderr and "step-00000001" in resumed.stderr
    from_run = command(
        workspace, f"model.config={other}", f"checkpoint.init_from={run}", f"train.output={tmp_path / 'second'}"
    )
    assert from_run.returncode == 2 and f"{key}: " in from_run.stderr
    allowed = command(workspace, f"model.config={other}", f"train.output={run}", f"model.allow_config_mismatch=[{key}]")
    assert allowed.returncode == 0 and f"{key}: " in allowed.stderr, "it is said all the same"


@pytest.mark.slow  # four processes; test_starts.py has the parts
def test_a_run_goes_on_with_the_objective_that_it_had(workspace, tmp_path):
    """Both values and the key that allows another one; every start keeps its configuration and says what changed."""
    run = tmp_path / "run"
    first = command(workspace, f"train.output={run}", "train.max_steps=1", "objective.normalize=groups")
    assert first.returncode == 0, first.stderr[-3000:]
    kept = (run / "config.yaml").read_bytes()
    lost = refused(workspace, f"train.output={run}", "train.max_steps=2", "optimizer.lr=5e-4")
    assert "objective.normalize: 'groups' in" in lost and "'tokens' now" in lost
    allow = "checkpoint.allow_changes=[objective.normalize]"
    assert allow in lost
    options = ["train.max_steps=2", "optimizer.lr=5e-4", "checkpoint.init_from=null", allow]
    second = command(workspace, f"train.output={run}", *options)
    assert second.returncode == 0, second.stderr[-3000:]
    for line in (
        "allowed by checkpoint.allow_changes: objective.normalize: 'groups' in",
        "optimizer.lr: 0.0005, in config.yaml 0.001",
        "checkpoint.init_from=None: not read, the run goes on from",
    ):
        assert line in second.stderr, second.stderr
    assert (run / "config.yaml").read_bytes() == kept
    assert yaml.safe_load((run / "config-0002.yaml").read_text())["objective"]["normalize"] == "tokens"
    # from here on it is the run's own
    other_data = refused(workspace, f"train.output={run}", "data.groups_per_step=3", "data.split=70,30", "train.seed=9")
    for part in ("groups_per_step: 4 then, 3 now", "split: '80,20' then", "seed: 1234 then, 9 now", "allow_changed"):
        assert part in other_data


@pytest.mark.slow  # four starts of processes; what they call is tested in test_shards.py and test_convert_safety.py
def test_damage_ends_a_start_with_one_message(workspace, tmp_path):
    """Other tokens of the same size; a checkpoint to begin with whose weights are another's."""
    prefix = write_shard(tmp_path / "train", workspace / "model", groups=8)
    options = [f"data.train=[{prefix}]", "data.split=100,0", "train.validate_every=null", "train.max_steps=1"]
    first = command(workspace, *options, f"train.output={tmp_path / 'first'}", processes=2)
    assert first.returncode == 0, first.stderr[-3000:]
    assert first.stderr.count("data.verify: 0.000 GB are as written") == 1
    assert len(json.loads((tmp_path / "first" / "verified.json").read_text())) == 1
    tokens = np.fromfile(f"{prefix}.bin", "<i4")
    np.roll(tokens, 1).tofile(f"{prefix}.bin")
    damaged = command(workspace, *options, f"train.output={tmp_path / 'first'}", processes=2)
    assert damaged.returncode != 0 and "megatron_gft/" not in damaged.stderr, damaged.stderr[-3000:]
    assert f"{prefix}.bin: content differs from the manifest" in damaged.stderr
    unverified = command(workspace, *options, f"train.output={tmp_path / 'second'}", "data.verify=false")
    assert unverified.returncode == 0, unverified.stderr[-3000:]
    weights = next((tmp_path / "second" / "checkpoints").glob("step-*/*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 0x40
    weights.write_bytes(content)
    origin = f"checkpoint.init_from={tmp_path / 'second'}"
    refused = command(workspace, *options, f"train.output={tmp_path / 'third'}", "data.verify=false", origin)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr, refused.stderr[-3000:]
    assert f"{weights.name}: the content differs from what was written" in refused.stderr
