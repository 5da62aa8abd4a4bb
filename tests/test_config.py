"""The configuration tree: precedence, presets, messages, and that reading it is quick."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_gft.config import Config, all_keys, load_config
from megatron_gft.errors import KEY_OF, InputError, InputErrors

REPOSITORY = Path(__file__).parents[1]
BASE = ["model.config=somewhere"]


def write(path, text):
    path.write_text(text)
    return path


def problem_of(overrides, files=()):
    with pytest.raises(InputError) as error:
        load_config(files, overrides)
    return str(error.value)


def test_later_files_and_then_overrides_win_key_by_key(tmp_path):
    one = write(tmp_path / "one.yaml", "model: {config: m, precision: fp32}\noptimizer: {lr: 1e-5, beta1: 0.8}\n")
    two = write(tmp_path / "two.yaml", "optimizer: {lr: 2e-5}\ntrain: {seed: 7}\n")
    config = load_config([one, two], ["train.seed=9", "parallel.tp=2"])
    assert (config.model.config, config.model.precision) == ("m", "fp32")
    assert (config.optimizer.lr, config.optimizer.beta1) == (2e-5, 0.8)
    assert (config.train.seed, config.parallel.tp) == (9, 2)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-6", 1e-6), ("2E-05", 2e-5), ("3.e-4", 3e-4), (".5e-3", 5e-4), ("1", 1.0), ("0.5", 0.5)]
)
def test_learning_rates_are_numbers_in_every_notation(tmp_path, text, value):
    file = write(tmp_path / "c.yaml", f"model: {{config: m}}\noptimizer: {{lr: {text}}}\n")
    assert load_config([file]).optimizer.lr == value
    assert load_config([], [*BASE, f"optimizer.lr={text}"]).optimizer.lr == value


@pytest.mark.parametrize(
    ("overrides", "coefficient", "advantage", "sources"),
    [
        ([], "rectified", "std", ["expert", "teacher", "self"]),
        (["objective=sft"], "none", "none", ["expert"]),
        (["objective.name=dft"], "probability", "none", ["expert"]),
        (["objective=sft", "objective.sources=[expert,teacher]"], "none", "none", ["expert", "teacher"]),  # SFT(mix)
        (["objective.coefficient=none"], "none", "std", ["expert", "teacher", "self"]),  # without rectification
        (["objective.advantage=none", "objective.sources=[expert]"], "rectified", "none", ["expert"]),  # without groups
    ],
)
def test_presets_fill_what_is_not_said(overrides, coefficient, advantage, sources):
    objective = load_config([], BASE + overrides).objective
    assert (objective.coefficient, objective.advantage, objective.sources) == (coefficient, advantage, sources)


def test_a_preset_in_a_file_can_be_refined_by_overrides(tmp_path):
    file = write(tmp_path / "c.yaml", "model: {config: m}\nobjective: sft\n")
    objective = load_config([file], ["objective.sources=[self]"]).objective
    assert (objective.name, objective.sources, objective.advantage) == ("sft", ["self"], "none")


def test_names_of_other_programs_lead_to_keys_that_are_there():
    assert len(KEY_OF) >= 25 and set(KEY_OF.values()) <= set(all_keys())


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["optimizer.lrr=1"], ["optimizer.lrr: unknown key", "did you mean optimizer.lr?"]),
        (["tp=2"], ["tp: unknown key", "did you mean parallel.tp?"]),
        (["data.micro_batch_size=1"], ["data.micro_batch_size: unknown key -> did you mean data.max_tokens_per_pack?"]),
        (["train.log_interval=1"], ["train.log_interval: unknown key -> did you mean logging.every?"]),
        (["train.steps=1"], ["did you mean train.max_steps?"]),
        (["learning_rate=1"], ["did you mean optimizer.lr?"]),
        (["train.wxyz_every=1"], ["known there: train.output, "]),
        (["data.train=a"], ["data.train: input should be a valid list (got 'a') -> write data.train=[a]"]),
        (["optimiser.lr=1"], ["optimiser: unknown key", "did you mean optimizer"]),
        (["zzzzzz=1"], ["zzzzzz: unknown key", "docs/configuration.md"]),
        (["parallel.tp=0"], ["parallel.tp: ", "greater than 0", "(got 0)"]),
        (["parallel.vpp=1"], ["parallel.vpp: ", "greater than or equal to 2"]),
        (["optimizer.lr=fast"], ["optimizer.lr: ", "(got 'fast')"]),
        (["optimizer.lr=.inf", "objective.tau=.nan"], ["optimizer.lr: ", "finite number (got inf)", "objective.tau: "]),
        (["data.train=[a]", "data.train_weights=[.inf]"], ["data.train_weights", "finite number"]),
        (["objective.tau=1.5"], ["objective.tau: ", "less than or equal to 1", "(got 1.5)"]),
        (["objective=gtf"], ["objective.name: ", "'gft', 'sft', 'dft', 'rft', ", "or 'chord_phi' (got 'gtf')"]),
        (["objective.sources=[human]"], ["objective.sources.0: ", "'human'"]),
        (["data.packing=tight"], ["data.packing: ", "'auto', 'packed' or 'shared_prefix'"]),
        (["model.config=a", "parallel"], ["override 'parallel': not of the form section.key=value"]),
        (["optimizer.lr=2", "optimizer.lr.x=1"], ["override optimizer.lr.x: lr is not a section"]),
        (["train.seed=[1"], ["override 'train.seed=[1': the value is not valid YAML"]),
    ],
)
def test_messages_name_the_key_and_the_nearest_one(overrides, parts):
    message = problem_of(BASE + overrides)
    for part in parts:
        assert part in message, message


def number_fields():
    """Keys whose value is a number, or a list, mapping or choice of one; and the ways to put a value in its place."""
    for section, of in Config.model_fields.items():
        for key, field in of.annotation.model_fields.items():
            kind = str(field.annotation)
            if re.search(r"\b(int|float)\b", kind):
                yield f"{section}.{key}", "{expert: %s}" if "dict" in kind else "[%s]" if "list" in kind else "%s"


@pytest.mark.parametrize("text", ["true", "off", "010", "1:30", ".nan", "-.inf", "1e400", "three", "{a: 1}", "[[1]]"])
def test_a_number_is_a_number(text):
    fields = dict(number_fields())
    assert len(fields) > 45 and fields["data.train_weights"] == "[%s]"
    for key, form in fields.items():
        if text != "010":
            message = problem_of([*BASE, f"{key}={form % text}"])
            assert key in message and ("got" in message or "is 90 in YAML" in message), message
    assert "010 is 8 in YAML" in problem_of([*BASE, "train.seed=010"])


@pytest.mark.parametrize(("text", "value"), [("1e3", 1000), ("8.0", 8), ("08", 8), ("1_000", 1000), ("'3'", 3)])
def test_whole_numbers_in_every_notation(text, value):
    assert load_config([], [*BASE, f"train.seed={text}"]).train.seed == value


@pytest.mark.parametrize(("text", "value"), [("off", "off"), ("false", "off"), ("stop", "stop"), ("'off'", "off")])
def test_yaml_off_is_the_choice_off(text, value):
    assert load_config([], [*BASE, f"train.collapse={text}"]).train.collapse == value
    for other in ("true", "0", "null", "[]"):
        assert "train.collapse: " in problem_of([*BASE, f"train.collapse={other}"])


def test_missing_model_is_named():
    assert "model: missing -> set it" in problem_of([])


def test_every_problem_is_reported_at_once():
    with pytest.raises(InputErrors) as error:
        load_config([], [*BASE, "parallel.tp=0", "optimizer.lr=-1", "train.sed=3"])
    assert len(error.value.problems) == 3


def test_files_that_are_no_configuration_are_named(tmp_path):
    assert "no.yaml: cannot be read" in problem_of([], [tmp_path / "no.yaml"])
    assert "a.yaml: not valid YAML" in problem_of([], [write(tmp_path / "a.yaml", "model: [")])
    assert "b.yaml: a configuration is a mapping" in problem_of([], [write(tmp_path / "b.yaml", "- 1\n")])
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    assert "c.yaml: not UTF-8" in problem_of([], [tmp_path / "c.yaml"])


def test_the_written_tree_reads_back_equal(tmp_path):
    config = load_config(
        [], [*BASE, "objective=sft", "parallel.tp=4", "checkpoint.export_hf=last", "optimizer.lr=1e-6"]
    )
    config.write(tmp_path / "config.yaml")
    assert load_config([tmp_path / "config.yaml"]) == config


@given(
    tau=st.floats(0, 1),
    lr=st.floats(1e-12, 1e3),
    groups=st.integers(1, 10**9),
    sources=st.lists(st.sampled_from(["expert", "teacher", "self"]), min_size=1, unique=True),
    name=st.sampled_from(["gft", "sft", "dft"]),
)
def test_any_tree_survives_yaml(tau, lr, groups, sources, name):
    config = Config.model_validate(
        {
            "model": {"config": "m: 1 # no comment"},
            "objective": {"name": name, "tau": tau, "sources": sources},
            "optimizer": {"lr": lr},
            "data": {"groups_per_step": groups},
        }
    )
    text = yaml.safe_dump(config.model_dump(mode="json"))
    assert Config.model_validate(yaml.safe_load(text)) == config


def test_every_key_has_a_place_and_help_is_complete():
    keys = all_keys()
    assert len(keys) == len(set(keys)) and "objective.tau" in keys and "parallel.etp" in keys
    for section, field in Config.model_fields.items():
        for key, leaf in field.annotation.model_fields.items():
            assert leaf.description, f"{section}.{key} has no description"


@pytest.mark.parametrize(
    ("overrides", "segment", "pack"),
    [
        ([], 1, 1),
        (["parallel.tp=4"], 1, 1),
        (["parallel.tp=4", "parallel.sequence_parallel=true"], 1, 4),
        (["parallel.cp=2"], 4, 2),
        (["parallel.cp=2", "parallel.tp=4", "parallel.sequence_parallel=true"], 4, 8),
        (["model.fp8=delayed"], 1, 16),
        (["model.fp8=delayed", "parallel.tp=4"], 1, 16),
        (["model.fp8=delayed", "parallel.tp=6", "parallel.sequence_parallel=true", "parallel.cp=2"], 4, 96),
        (["model.fp8=tensorwise", "parallel.tp=4", "parallel.sequence_parallel=true"], 1, 32),
        (["model.fp8=tensorwise", "parallel.tp=8", "parallel.sequence_parallel=true", "parallel.cp=2"], 4, 128),
        (["model.fp8=mxfp8"], 1, 32),
        (["model.fp8=mxfp8", "parallel.tp=2", "parallel.sequence_parallel=true"], 1, 64),
        (["model.fp8=blockwise", "parallel.tp=4", "parallel.sequence_parallel=true"], 1, 512),
    ],
)
def test_rows_are_multiples_of_what_the_layout_cuts(overrides, segment, pack):
    assert load_config([], BASE + overrides).row_multiples == (segment, pack)


_IMPORT = """import sys, time, megatron_gft.config
print(time.process_time(), [name for name in sys.argv if name in sys.modules])"""


def test_importing_the_configuration_is_quick_and_needs_no_torch():
    """0.3 s of the process's own time; the best of three, since other jobs share the machine."""
    command = [sys.executable, "-c", _IMPORT, "torch", "megatron.core", "transformers", "numpy"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    runs = [subprocess.check_output(command, env=environment, text=True, timeout=60).split() for _ in range(3)]
    assert [heavy for _, heavy in runs] == ["[]"] * 3
    assert min(float(seconds) for seconds, _ in runs) < 0.3
