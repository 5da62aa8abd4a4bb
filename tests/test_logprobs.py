"""Log-probs of a checkpoint on shards: right at every layout, whole or not at all, read back as q and p_ref."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tool_runs
import torch
import yaml
from group_shards import STAMP
from layout_cases import MODELS, VOCAB_SIZE, TinyGroups, gradient_errors, hf_gradients
from naive_twin import load_twin, response_logprobs
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_shards import flip_bit, read_all, verify_all
from tiny_models import write_tiny_model

from megatron_gft import logprobs
from megatron_gft.atomic import sha256_file
from megatron_gft.batch import open_groups
from megatron_gft.config import Config, load_config
from megatron_gft.conversion.convert import hf_to_megatron
from megatron_gft.errors import InputError
from megatron_gft.groups import SOURCES
from megatron_gft.hf.shape import read_model_shape
from megatron_gft.job import build_trainer
from megatron_gft.logprobs import LogprobRunner, compute_logprobs
from megatron_gft.parallel import initialize_parallel
from megatron_gft.shards import Group, GroupShard, GroupShardWriter
from megatron_gft.shards import logprobs as shard_files
from megatron_gft.shards.logprobs import open_pieces, piece
from megatron_gft.shards.manifest import read_manifest
from megatron_gft.step import MORE_STATISTICS, STATISTICS

SHARDS = ("a", "b")


def write_groups(prefix: Path, items, name: str) -> None:
    stamp = STAMP.model_copy(update={"vocab_size": VOCAB_SIZE})
    with GroupShardWriter(prefix, stamp) as writer:
        for index, group in enumerate(items):
            writer.add_group(
                group.prompt.tolist(),
                [tokens.tolist() for tokens in group.responses],
                [SOURCES[code] for code in group.sources],
                group.rewards.tolist(),
                group_id=f"{name}{index}",
            )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with model ``tied`` and two shards of ragged groups."""
    folder = tmp_path_factory.mktemp("logprobs")
    name, changes = MODELS["tied"]
    write_tiny_model(folder / "tied", name, **changes)
    items = TinyGroups(15).items
    for shard, chosen in zip(SHARDS, (items[:10], items[10:]), strict=True):
        write_groups(folder / shard, chosen, shard)
    return folder


@pytest.fixture
def place(root, tmp_path) -> Path:
    """Copies of the shards, to be written beside."""
    for path in root.glob("[ab].*"):
        shutil.copy(path, tmp_path)
    return tmp_path


def configure(root: Path, place: Path, *overrides: str, model: str = "tied") -> Config:
    settings = [
        f"model.config={root / model}", "model.precision=fp32", "model.make_vocab_size_divisible_by=8",
        f"checkpoint.init_from=hf:{root / model}", f"train.output={place / 'run'}", f"data.train=['{place}/?']",
        "data.groups_per_step=4", "data.max_tokens_per_pack=160", "data.allow_tokenizer_mismatch=true",
        "logging.tensorboard=false", "logging.progress_bar=false", *overrides,
    ]  # fmt: skip
    return load_config([], settings)


def join(config: Config):
    p = config.parallel
    return initialize_parallel(tp=p.tp, pp=p.pp, vpp=p.vpp, cp=p.cp, ep=p.ep, etp=p.etp)


def _compute(config: Config, name: str) -> list[str]:
    return compute_logprobs(config, read_model_shape(config.model.config), join(config), name)


def compute(config: Config, name: str = "start", world_size: int = 1) -> None:
    run_ranks(world_size, _compute, config, name)


def read(place: Path, name: str = "start") -> np.ndarray:
    """Of all shards, one after another."""
    files = [place / read_manifest(place / shard).logprob_files[name] for shard in SHARDS]
    return np.concatenate([np.load(file) for file in files])


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory) -> np.ndarray:
    """By one process."""
    folder = tmp_path_factory.mktemp("alone")
    for path in root.glob("[ab].*"):
        shutil.copy(path, folder)
    compute(configure(root, folder))
    return read(folder)


# --- values -----------------------------------------------------------------------------------------------------------


def test_one_process_gives_those_of_transformers(root, alone):
    """Of every token, ends and responses without an end and dead groups included, where the manifest says they are."""
    model = load_twin(root / "tied")
    with torch.no_grad():
        shards = [GroupShard(root / name) for name in SHARDS]
        groups = [shard[i] for shard in shards for i in range(len(shard))]
        expected = torch.cat([response_logprobs(model, g, k) for g in groups for k in range(len(g.responses))])
    assert alone.dtype == np.float32 and np.abs(alone - expected.numpy()).max() < 5e-6


def test_a_checkpoint_of_a_run_gives_the_same_and_is_known_by_its_files(root, tmp_path_factory, place, alone):
    checkpoint = tmp_path_factory.mktemp("megatron") / "tied"
    hf_to_megatron(root / "tied", checkpoint)
    compute(configure(root, place, f"checkpoint.init_from={checkpoint}"), world_size=2)
    assert np.abs(read(place) - alone).mean() <= 1e-6
    made = read_manifest(place / "b").provenance["logprobs"]["start"]
    assert made["model"] == sha256_file(checkpoint / "files.json") and made["layout"]["dp"] == 2
    next(checkpoint.glob("*.distcp")).write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match="tied: damaged"):
        compute(configure(root, place, f"checkpoint.init_from={checkpoint}"), "again")


TP2, PP2, CP2, SP = "parallel.tp=2", "parallel.pp=2", "parallel.cp=2", "parallel.sequence_parallel=true"
SHARED, SMALL = "data.packing=shared_prefix", "data.max_tokens_per_pack=64"
LAYOUTS = [(2, f"{TP2} {SHARED}"), (2, f"{PP2} {SMALL}"), (2, f"{CP2} {SHARED}"), (2, "data.packing=packed")]
MORE_LAYOUTS = [
    (1, "data.groups_per_step=1"),
    (4, "data.groups_per_step=1"),  # most ranks see padding only
    (2, f"{PP2} parallel.vpp=2 {SMALL}"),
    (4, f"{TP2} {SP} {CP2} {SHARED}"),
    (4, f"{TP2} {PP2} {SMALL}"),
    (4, f"{PP2} {SHARED}"),
    (2, f"{TP2} objective.fused_head=false"),
]


@pytest.mark.parametrize(
    ("world_size", "layout"), [*LAYOUTS, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_LAYOUTS)]
)
def test_the_same_at_every_layout(root, place, alone, world_size, layout):
    compute(configure(root, place, *layout.split()), world_size=world_size)
    found = read(place)
    assert np.isfinite(found).all() and np.abs(found - alone).mean() <= 1e-6
    assert read_manifest(place / "a").provenance["logprobs"]["start"]["unknown"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "layout"), [(2, "parallel.ep=2"), (2, f"{TP2} {SP} parallel.etp=1")])
def test_experts(root, tmp_path_factory, place, world_size, layout):
    name, changes = MODELS["qwen3_moe"]
    folder = tmp_path_factory.mktemp("moe")
    write_tiny_model(folder / "qwen3_moe", name, **changes)
    one, more = (configure(folder, place, *options.split(), model="qwen3_moe") for options in ("", layout))
    compute(one, "one")
    compute(more, "more", world_size)
    assert np.abs(read(place, "one") - read(place, "more")).mean() <= 5e-5


def test_what_the_limits_leave_out_is_unknown(root, place, alone):
    options = ("data.max_response_tokens=6", "data.overlong=truncate")
    compute(configure(root, place, *options))
    found, lengths = read(place), np.concatenate([GroupShard(root / n).table().response_lengths for n in SHARDS])
    within = np.concatenate([np.arange(length) < 6 for length in lengths])
    np.testing.assert_array_equal(np.isnan(found), ~within)
    assert np.abs(found - alone)[within].max() < 1e-5
    compute(configure(root, place, "data.max_response_tokens=6", "data.overlong=drop"), "dropped")
    np.testing.assert_array_equal(np.isnan(read(place, "dropped")), np.repeat(lengths > 6, lengths))
    made = read_manifest(place / "a").provenance["logprobs"]
    assert made["dropped"]["unknown"] > made["start"]["unknown"] > 0


# --- read back --------------------------------------------------------------------------------------------------------


def _first_step(config: Config):
    """Sums over the tokens of the first step by name, D, and its gradients by Hugging Face name."""
    shape, parallel = read_model_shape(config.model.config), join(config)
    trainer = build_trainer(config, shape, parallel, open_groups(config, shape)[0], None)
    batch = trainer.loader.batch(0)
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    report = trainer.runner.forward_backward(trainer.loader.packs(batch), batch.denominator)
    gradients = hf_gradients(trainer)
    trainer.close()
    sums = dict(zip((*STATISTICS, *MORE_STATISTICS), report.token_sums.sum((0, 1)).tolist(), strict=True))
    return sums, batch.denominator, gradients


def first_step(config: Config, world_size: int):
    results = run_ranks(world_size, _first_step, config)
    return *results[0][:2], {name: g for *_, gradients in results for name, g in gradients.items()}


def gap(sums: dict[str, float]) -> float:
    """Mean |log p - log q|; q is known of every token."""
    assert sums["unknown_q"] == 0 and sums["known_q"] == sums["tokens"] > 0
    return sums["sampling_gap"] / sums["known_q"]


@pytest.fixture(scope="module")
def even(root, tmp_path_factory) -> Path:
    """Shards of equal groups: a pack of 32 rows holds one response, one of 64 a group, whatever the order."""
    folder, rng = tmp_path_factory.mktemp("even"), np.random.default_rng(0)
    for name in SHARDS:
        items = [
            Group(
                rng.integers(0, VOCAB_SIZE, 12),
                [rng.integers(0, VOCAB_SIZE, length) for length in (15, 16, 17)],
                np.array([0, 2, 2]),
                np.array([1.0, 0.0, index % 2]),
                None,
            )
            for index in range(3)
        ]
        write_groups(folder / name, items, name)
    return folder


EVERY = ("objective.sources=[expert,teacher,self]", "data.groups_per_step=6")


ALONE, TOGETHER = "data.packing=packed data.max_tokens_per_pack=32", f"{SHARED} data.max_tokens_per_pack=64"


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, TOGETHER),
        (2, f"{TP2} {TOGETHER}"),
        *(
            pytest.param(2, layout, marks=pytest.mark.slow)
            for layout in (f"{TP2} {ALONE}", f"{PP2} {TOGETHER}", f"{CP2} {TOGETHER}", f"{CP2} {ALONE}", ALONE)
        ),
    ],
)
def test_q_of_the_same_weights_and_packs_is_p_and_grpo_the_policy_gradient(root, even, tmp_path, world_size, layout):
    """One update a round, q from the same layout: min(r A, clip(r) A) has the gradient of A log p."""
    for path in even.iterdir():
        shutil.copy(path, tmp_path)
    options = layout.split()
    compute(configure(root, tmp_path, *EVERY, *options), world_size=world_size)
    grpo = ("objective=grpo", *EVERY, "data.logprobs=start")
    sums, d, gradients = first_step(configure(root, tmp_path, *grpo, *options), world_size)
    assert gap(sums) <= 1e-6 and sums["clipped"] == 0
    plain = configure(root, tmp_path, *grpo, *options, "objective.coefficient=none")
    plain_sums, plain_d, policy_gradients = first_step(plain, world_size)
    assert plain_sums["tokens"] == sums["tokens"] and plain_d == d
    assert max(gradient_errors(gradients, policy_gradients).values()) <= 1e-6
    others = ("data.max_tokens_per_pack=160", "data.packing=packed")
    assert gap(first_step(configure(root, tmp_path, *grpo, *others), 1)[0]) <= 5e-5


# --- whole or not at all ----------------------------------------------------------------------------------------------


def _die_at(config: Config, function: str, call: int) -> None:
    """End like a killed process at the ``call``-th use of a function on the way."""
    original, left = getattr(logprobs, function), [call]

    def dying(*arguments, **options):
        left[0] -= 1
        if not left[0]:
            os._exit(9)
        return original(*arguments, **options)

    setattr(logprobs, function, dying)
    _compute(config, "start")


def _die_before_the_manifest(config: Config) -> None:
    shard_files.write_manifest = lambda *_: os._exit(9)
    _compute(config, "start")


def _count_steps(config: Config) -> int:
    steps = []
    original = LogprobRunner.logprobs
    LogprobRunner.logprobs = lambda *arguments: steps.append(1) or original(*arguments)
    _compute(config, "start")
    return len(steps)


@pytest.mark.parametrize(
    ("kill", "left"),
    [
        ((_die_at, "piece", 2), 4),
        ((_die_at, "publish", 1), 2),
        ((_die_before_the_manifest,), 2),
        ((_die_at, "publish", 2), 0),
    ],
)
def test_a_killed_run_leaves_nothing_to_readers_and_loses_nothing(root, place, alone, kill, left):
    """Five steps: three of the first shard, two of the second."""
    config = configure(root, place)
    function, *arguments = kill
    with pytest.raises(RuntimeError, match="rank 0 failed"):
        run_ranks(1, function, config, *arguments)
    for shard in SHARDS:
        read_all(place / shard)
    whole = [shard for shard in SHARDS if "start" in read_manifest(place / shard).logprob_files]
    assert whole == ([] if left else ["a"])
    assert run_ranks(1, _count_steps, config) == [left]
    np.testing.assert_array_equal(read(place), alone)
    assert not [path.name for path in place.iterdir() if "journal" in path.name or path.name.startswith(".")]
    before = [path.read_bytes() for path in sorted(place.glob("?.*"))]
    assert run_ranks(1, _count_steps, config) == [0]  # they are there
    assert [path.read_bytes() for path in sorted(place.glob("?.*"))] == before


def test_every_flipped_byte_of_the_file_is_found(root, place):
    compute(configure(root, place))
    manifest = read_manifest(place / "b")
    path = place / manifest.logprob_files["start"]
    assert path.stat().st_size == manifest.files[path.name].bytes
    for position in range(0, path.stat().st_size, 3):
        flip_bit(path, position, position % 8)
        with pytest.raises(InputError, match="logprobs-start"):
            verify_all(place / "b")
        flip_bit(path, position, position % 8)
    verify_all(place / "b")


def test_one_writer_at_a_time_and_the_same_settings(root, place):
    header = {"name": "start", "model": "x"}
    with open_pieces(str(place / "a"), header) as pieces:
        pieces.append("0", piece(0, np.zeros(3, np.float32)))
        for name in ("start", "other"):
            with pytest.raises(RuntimeError, match="in use by another run"):
                compute(configure(root, place), name)
    with pytest.raises(RuntimeError, match="a.logprobs.journal: left by a run with other settings -> finish.*remove"):
        compute(configure(root, place), "other")
    with open_pieces(str(place / "a"), header) as pieces:
        assert "0" in pieces


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def tool(root, place):
    tool_runs.load()
    config = place / "run.yaml"
    config.write_text(yaml.safe_dump(configure(root, place).model_dump(mode="json")))

    def run(*arguments: str) -> tool_runs.Ended:
        return tool_runs.run(place, "logprobs", "--config", str(config), *arguments)

    return run


def test_a_name_is_of_one_model(root, place, tool):
    done = tool("--name", "ref")
    assert done.code == 0 and f"\n{place}/a\n{place}/b\n" in f"\n{done.text}"
    manifest = (place / "a.json").read_bytes()
    again = tool("--name", "ref", "data.max_tokens_per_pack=200")
    assert again.code == 0 and "a: has log-probs 'ref' of this model already" in again.text
    other = place / "other"
    shutil.copytree(root / "tied", other)
    weights = load_file(next(other.glob("*.safetensors")))
    next(iter(weights.values()))[0] += 1
    save_file(weights, next(other.glob("*.safetensors")))
    refused = tool("--name", "ref", f"checkpoint.init_from=hf:{other}")
    assert refused.is_message and "a: its log-probs 'ref' are of another model" in refused.text
    assert "-> take another --name" in refused.text and (place / "a.json").read_bytes() == manifest
    assert tool("--name", "other", f"checkpoint.init_from=hf:{other}").code == 0
    assert {*read_manifest(place / "a").logprob_files} == {"ref", "other"}
    made = read_manifest(place / "a").provenance["logprobs"]
    assert made["ref"]["model"] != made["other"]["model"] and made["ref"]["temperature"] == 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--name", "sampled"], ["'sampled'", "letters, digits"]),
        (["--name", "../x"], ["'../x'", "letters, digits"]),
        (["--name", "s", "checkpoint.init_from=null"], ["checkpoint.init_from: not set", "hf:DIR"]),
        (["--name", "s", "checkpoint.init_from=hf:nowhere"], ["checkpoint.init_from=hf:nowhere"]),
        (["--name", "s", "parallel.tp=2"], ["does not divide the world size 1"]),
        (["--name", "s", "data.max_response_tokens=6"], ["over-long groups", "data.overlong"]),
        (["--name", "s", "data.train=[none]"], ["none: no such group shard"]),
    ],
    ids=lambda value: "-" if len(value) > 2 else None,
)
def test_refusals(place, tool, arguments, parts):
    ended = tool(*arguments)
    assert ended.is_message, ended.text
    assert all(part in ended.text for part in parts), ended.text
    assert not list(place.glob("*logprobs*"))


def test_a_linked_shard_is_refused(root, tmp_path):
    for path in root.glob("[ab].*"):
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(RuntimeError, match=r"a.json: a link.*-> name .*logprobs"):
        compute(configure(root, tmp_path))


def test_log_probs_that_are_not_finite_name_the_group(root, tmp_path_factory, place):
    name, changes = MODELS["untied"]
    folder = tmp_path_factory.mktemp("large")
    write_tiny_model(folder / "untied", name, **changes)
    file = next((folder / "untied").glob("*.safetensors"))
    weights = load_file(file)
    save_file(weights | {key: weights[key] * 1e25 for key in ("model.norm.weight", "lm_head.weight")}, file)
    with pytest.raises(RuntimeError, match=r"a group 0 \(id 'a0'\): its log-probs are NaN or infinite, by hf:"):
        compute(configure(folder, place, model="untied"))
    assert "start" not in read_manifest(place / "a").logprob_files
