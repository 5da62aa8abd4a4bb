"""What a start of a run keeps of its configuration, and what it says of an earlier one's."""

from pathlib import Path

import pytest

from megatron_gft.checkpoints.starts import changes, check_same_function, config_files, keep_config
from megatron_gft.config import Config, load_config
from megatron_gft.errors import InputError


def config(*overrides: str) -> Config:
    return load_config([], ["model.config=somewhere", *overrides])


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoints" / "step-00000003"
    config().write(folder / "config.yaml")
    return folder


def test_no_start_overwrites_the_configuration_of_another(tmp_path):
    assert keep_config(config(), tmp_path) == []
    assert keep_config(config("optimizer.lr=2e-6", "data.valid=[a]"), tmp_path) == [
        "data.valid: ['a'], in config.yaml []",
        "optimizer.lr: 2e-06, in config.yaml 1e-06",
    ]
    (tmp_path / "config-mine.yaml").write_text("notes")
    (tmp_path / "config.yaml").unlink()  # whatever a person does there
    assert keep_config(config("optimizer.lr=2e-6"), tmp_path) == ["data.valid: [], in config-0002.yaml ['a']"]
    keep_config(config(), tmp_path)
    assert [path.name for path in config_files(tmp_path)] == [f"config-000{n}.yaml" for n in (2, 3, 4)]
    assert load_config([tmp_path / "config-0003.yaml"]).optimizer.lr == 2e-6


def test_keys_that_an_earlier_version_did_not_have(tmp_path):
    """They had their defaults; keys of its own say nothing any more."""
    (tmp_path / "config.yaml").write_text(
        "model: {config: somewhere}\ntrain: {old: 1}\nobjective: {tau: 0.2}\ngone: 3\ndata: 4"
    )
    assert set(changes(tmp_path / "config.yaml", config("train.seed=7"))) == {
        *("objective.tau", "train.seed", "objective.coefficient", "objective.advantage", "objective.sources"),
    }


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (["objective=sft"], ["name: 'gft' in", "'sft' now", "advantage: 'std'", "sources: ['expert', 'teacher'"]),
        (["objective.normalize=groups"], ["normalize: 'tokens' in", "'groups' now"]),
        (["objective.zero_variance=skip"], ["zero_variance: 'keep'"]),
        (["objective.tau=0.2"], ["tau: 0.1", "0.2 now"]),
        (["objective.advantage=population"], ["advantage: 'std'", "'population' now"]),
        (["objective.advantage_eps=1e-4"], ["advantage_eps: 1e-06"]),
        (["objective.coefficient=none"], ["coefficient: 'rectified'", "'none' now"]),
        (["objective.sources=[expert]"], ["sources: "]),
        (["objective.entropy=false", "objective.head_chunk_tokens=64", "optimizer.lr=1", "train.epochs=3"], []),
        (["objective.name=dft", "objective.coefficient=rectified", "objective.advantage=std"], ["sources"]),
    ],
)
def test_another_function_is_refused_unless_it_is_allowed(tmp_path, checkpoint, options, refused):
    now = config(*options)
    if not refused:
        assert check_same_function(now, checkpoint, tmp_path)[1] == []
        return
    with pytest.raises(InputError) as error:
        check_same_function(now, checkpoint, tmp_path)
    assert all(part in str(error.value) for part in refused)
    allow = str(error.value)[str(error.value).index("checkpoint.allow_changes=") :].splitlines()[0].split(" (")[0]
    _, said = check_same_function(config(*options, allow), checkpoint, tmp_path)
    assert said and all("allowed by checkpoint.allow_changes: objective." in line for line in said)


def test_the_name_of_the_preset_stands_for_what_it_sets(tmp_path, checkpoint):
    allow = "checkpoint.allow_changes=[objective.name]"
    check_same_function(config("objective=sft", allow), checkpoint, tmp_path)
    with pytest.raises(InputError, match="tau: 0.1"):
        check_same_function(config("objective=sft", "objective.tau=0.5", allow), checkpoint, tmp_path)
    same = ["objective.name=dft", "objective.coefficient=rectified", "objective.advantage=std"]
    check_same_function(config(*same, "objective.sources=[expert,teacher,self]"), checkpoint, tmp_path)


def test_the_checkpoint_counts_and_not_a_start_that_came_to_nothing(tmp_path, checkpoint):
    config("objective=sft").write(tmp_path / "config.yaml")
    assert check_same_function(config(), checkpoint, tmp_path)[1] == []
    (checkpoint / "config.yaml").unlink()  # as earlier versions wrote it
    with pytest.raises(InputError, match="'sft' in .*config.yaml, 'gft' now"):
        check_same_function(config(), checkpoint, tmp_path)
    (tmp_path / "config.yaml").unlink()
    assert "not compared" in check_same_function(config(), checkpoint, tmp_path)[1][0]


def test_weights_to_begin_with_are_not_read_again(tmp_path, checkpoint):
    changed, said = check_same_function(config("checkpoint.init_from=hf:other"), checkpoint, tmp_path)
    assert list(changed) == ["checkpoint.init_from"]
    assert said == [f"checkpoint.init_from=hf:other: not read, the run goes on from {checkpoint}"]
