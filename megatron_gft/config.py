"""The whole configuration of a run as one typed tree: YAML files < dotted overrides, checked once, together.

Imports neither torch nor Megatron, so that a wrong configuration is refused in a fraction of a second, before
any process group starts. ``load_config`` gives a :class:`Config` or raises one error that lists every problem.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import pydantic
import yaml
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from megatron_gft.atomic import atomic_file
from megatron_gft.errors import KEY_OF, InputError, InputErrors, nearest
from megatron_gft.objectives import (
    OBJECTIVES,
    READ_Q,
    SOURCES,
    Advantage,
    Coefficient,
    CutOff,
    Normalize,
    Source,
    ZeroVariance,
    by_source,
)
from megatron_gft.reading import YamlLoader, read_yaml


def _is_number(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would take true for 1
        raise PydanticCustomError("number", "input should be a number")
    return value


Int = Annotated[int, BeforeValidator(_is_number), Field(le=2**53)]
Float = Annotated[float, BeforeValidator(_is_number)]
PositiveInt = Annotated[Int, Field(gt=0)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]


class Section(pydantic.BaseModel):
    """A section of the tree: unknown keys are errors, values are fixed once read."""

    model_config = pydantic.ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        defer_build=True,  # validators are made when the first file is read: --help needs none
    )


class ModelConfig(Section):
    """What is trained. The shape comes from a Hugging Face ``config.json``, never from numbers typed twice."""

    config: str = Field(description="folder of a Hugging Face model, or its config.json: the model's shape")
    tokenizer: str | None = Field(
        None, description="tokenizer folder whose fingerprint shards must carry; default: that of the weights"
    )
    allow_config_mismatch: list[str] = Field(
        default_factory=list, description="keys of config.json that may differ from those of the weights"
    )
    precision: Literal["bf16", "fp32"] = Field("bf16", description="weights and activations")
    backend: Literal["auto", "local", "transformer_engine"] = Field(
        "auto", description="auto: Transformer Engine when it is importable and a GPU is there"
    )
    fp8: Literal["delayed", "tensorwise", "mxfp8", "blockwise"] | None = Field(
        None, description="FP8 recipe of the linear layers; needs Transformer Engine"
    )
    recompute: Literal["none", "core_attention", "full"] = Field(
        "none", description="activations made again in backward instead of kept"
    )
    make_vocab_size_divisible_by: PositiveInt = Field(128, description="vocabulary rows per tensor rank divide by it")

    @property
    def folder(self) -> Path:
        """Where ``config`` lies."""
        path = Path(self.config)
        return path if path.is_dir() else path.parent


class ParallelConfig(Section):
    """How the work is cut. Data parallel is what remains of the world size."""

    tp: PositiveInt = Field(1, description="tensor-parallel size")
    pp: PositiveInt = Field(1, description="pipeline stages")
    vpp: Int | None = Field(None, ge=2, description="model chunks per pipeline rank (interleaved schedule)")
    layers_per_stage: list[PositiveInt] | None = Field(
        None, description="of each stage, [15, 13]; with vpp of each chunk, in the model's order; default: all alike"
    )
    cp: PositiveInt = Field(1, description="context-parallel size")
    ep: PositiveInt = Field(1, description="expert-parallel size (MoE)")
    etp: PositiveInt | None = Field(None, description="tensor-parallel size of the experts; default tp")
    sequence_parallel: bool = Field(False, description="cut norms and dropouts over the sequence; needs tp > 1")
    collective_timeout_minutes: PositiveInt = Field(30, description="a collective that takes longer ends the job")


class DataConfig(Section):
    """Group shards and how a step is made of them."""

    train: list[str] = Field(default_factory=list, description="shard prefixes or globs")
    train_weights: list[PositiveFloat] | None = Field(None, description="one per entry of train; default: all groups")
    valid: list[str] = Field(default_factory=list, description="shards to validate on; default: split of train")
    split: str = Field("100,0", description="train,valid shares of every train shard, in order of groups")
    groups_per_step: PositiveInt = Field(128, description="whole groups per optimizer step")
    max_tokens_per_pack: PositiveInt = Field(8192, description="tokens of one microbatch, padding included")
    packing: Literal["auto", "packed", "shared_prefix"] = Field(
        "auto", description="shared_prefix computes a prompt once for its responses; auto takes the cheaper"
    )
    overlong: Literal["error", "drop", "truncate"] = Field(
        "error", description="a response that does not fit max_tokens_per_pack or max_response_tokens"
    )
    max_response_tokens: PositiveInt | None = Field(None, description="limit of one response, EOS included")
    verify: bool = Field(True, description="compare shards with their hashes at the start; unchanged files only once")
    cache: str | None = Field(None, description="folder for Megatron's blend indices")
    logprobs: str | None = Field(None, description="name of the shards' log-probs that are q; default: sampled")
    allow_tokenizer_mismatch: bool = Field(False, description="train on shards tokenized for another model")
    allow_changed_data: bool = Field(False, description="resume although the shards, seed or split changed")


CoefficientName = Annotated[str, Field(pattern=rf"^({'|'.join(get_args(Coefficient))}|[\w.]+:\w+)$")]


class ObjectiveConfig(Section):
    """The loss. ``name`` is a preset of the keys below (docs/objectives.md); what is set here changes parts of it."""

    name: Literal[
        "gft", "sft", "dft", "rft", "dft_correct", "gft_scaled", "asymre",
        "grpo", "dapo", "cispo", "psft", "luffy", "chord_phi",
    ] = Field("gft", description="preset: sets what is null or not named here, down to mu_peak")  # fmt: skip
    coefficient: CoefficientName | dict[Source, CoefficientName] | None = Field(
        None, description="token weight, or module:function of yours; or by source, {expert: none, self: ratio}"
    )
    advantage: Advantage | dict[Source, Advantage] | None = Field(
        None, description="response weight; or by source: those with the same one share the group's statistics"
    )
    sources: list[Source] | None = Field(None, min_length=1, description="which responses train")
    negative_scale: NonNegativeFloat = Field(1.0, description="factor of negative advantages; 0 leaves them out")
    baseline_shift: Float = Field(0.0, description="taken from advantages, in groups of equal rewards too")
    eps_low: Float = Field(0.2, ge=0, le=1, description="p/q below 1 - eps_low is clipped where the advantage is < 0")
    eps_high: NonNegativeFloat = Field(0.2, description="p/q above 1 + eps_high is clipped where the advantage is > 0")
    normalize: Normalize = Field("tokens", description="what the step's loss is divided by")
    per_source_denominator: bool = Field(False, description="each source is divided by its own count")
    zero_variance: ZeroVariance = Field("keep", description="groups with equal rewards count in the divisor, or not")
    mu_peak: Float | None = Field(None, ge=0, le=1, description="weight of experts; that of other sources is 1 less it")
    mu_valley: Float | None = Field(None, ge=0, le=1, description="where mu_peak decays to; default: it stays")
    mu_warmup_steps: NonNegativeInt = Field(0, description="steps of its rise from 0")
    mu_decay_steps: NonNegativeInt = Field(0, description="steps of its cosine decay to mu_valley")
    source_weights: dict[Source, PositiveFloat] = Field(default_factory=dict, description="of a source; default 1")
    tau: Float = Field(0.1, ge=0, le=1, description="probability above which the coefficient is 1")
    shaping: PositiveFloat = Field(0.1, description="g of the coefficient shaped")
    ratio_dual_clip: Float | None = Field(None, gt=1, description="p/q clipped above this where the advantage is < 0")
    beta: NonNegativeFloat = Field(0.0, description="weight of the KL anchor (k3) to the model of reference")
    reference: str | None = Field(None, description="name of the shards' log-probs of the anchor's model")
    kl_sources: list[Source] = Field(["self"], min_length=1, description="responses that the anchor applies to")
    cut_off: CutOff = Field("train", description="responses without an end; no_loss: in the group's statistics only")
    advantage_eps: NonNegativeFloat = Field(1e-6, description="added to the standard deviation of the rewards")
    fused_head: bool = Field(True, description="output layer and loss in one chunked pass, no [tokens, vocab] tensor")
    head_chunk_tokens: PositiveInt | None = Field(None, description="rows of a chunk of the head; default: 512 MiB")
    entropy: bool = Field(True, description="measure the entropy of the predictions")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or value.get("name", "gft") not in OBJECTIVES:
            return value
        preset = vars(OBJECTIVES[value.get("name", "gft")])
        given = {key: own for key, own in value.items() if own is not None or key not in preset}
        return {key: preset[key] for key in preset if key in cls.model_fields} | given

    def mu(self, step: int) -> float | None:
        """Weight of experts in the 0-based ``step``: warm-up, then cosine decay (arXiv 2508.11408)."""
        if self.mu_peak is None or step < self.mu_warmup_steps:
            return self.mu_peak and self.mu_peak * step / self.mu_warmup_steps
        done = min((step - self.mu_warmup_steps) / (self.mu_decay_steps or 1e-9), 1.0)
        valley = self.mu_peak if self.mu_valley is None else self.mu_valley
        return valley + (self.mu_peak - valley) * (1 + math.cos(math.pi * done)) / 2


class OptimizerConfig(Section):
    """Adam(W), its schedule, and Megatron's distributed optimizer."""

    lr: PositiveFloat = Field(1e-6, description="peak learning rate")
    min_lr: NonNegativeFloat = Field(0.0, description="end of the decay")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")
    warmup_steps: NonNegativeInt = Field(0, description="update k of them uses lr * k / warmup_steps")
    decay_steps: PositiveInt | None = Field(None, description="steps until min_lr; default: all steps of the run")
    weight_decay: NonNegativeFloat = Field(0.0, description="not applied to norms and biases")
    beta1: Float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients")
    beta2: Float = Field(0.95, ge=0, lt=1, description="decay of the mean of squared gradients")
    eps: PositiveFloat = Field(1e-8, description="added to the root of the mean square")
    clip_grad: NonNegativeFloat = Field(1.0, description="global gradient norm; 0 turns clipping off")
    distributed: bool = Field(True, description="shard the optimizer state over data-parallel ranks")
    overlap_grad_reduce: bool = Field(False, description="reduce gradients while backward runs")
    overlap_param_gather: bool = Field(False, description="gather weights while forward runs; needs the one above")
    grad_reduce_in_fp32: bool = Field(True, description="gradient buffers in float32")


class TrainConfig(Section):
    """How long, and what to do on the way."""

    output: str = Field("runs/gft", description="folder of the run: config, metrics, checkpoints, exports")
    seed: Int = Field(1234, ge=0, description="order of the groups and initial weights")
    epochs: PositiveInt = Field(1, description="passes over the groups")
    max_steps: PositiveInt | None = Field(None, description="stop earlier")
    validate_every: PositiveInt | None = Field(None, description="steps between validations; null: never")
    validate_groups: PositiveInt = Field(256, description="groups of one validation")
    nonfinite: Literal["stop", "skip"] = Field("stop", description="a step whose loss or gradient is not finite")
    grad_spike_factor: Float | None = Field(
        None, gt=1, description="a gradient norm this many times its running median is treated as nonfinite"
    )
    collapse: Annotated[Literal["warn", "stop", "off"], BeforeValidator(lambda v: "off" if v is False else v)] = Field(
        "warn", description="positive responses become improbable too"
    )
    max_skipped_steps: NonNegativeInt = Field(10, description="skipped steps after which the run stops")
    watchdog_minutes: PositiveFloat = Field(30.0, description="a rank without progress for so long ends the job")


class CheckpointConfig(Section):
    """Where weights come from and where they go."""

    init_from: str | None = Field(None, description="hf:DIR or a Megatron checkpoint: start from its weights")
    resume: Literal["latest", "previous", "never"] = Field(
        "latest", description="continue the run in train.output; previous: the last but one checkpoint"
    )
    allow_changes: list[str] = Field(
        default_factory=list, description="keys such as objective.tau whose value may be another one on resume"
    )
    init_optimizer: bool = Field(False, description="start from the optimizer state of init_from, too: a run's own")
    load_optimizer: bool = Field(True, description="on resume, false keeps only weights and data position")
    save_every: PositiveInt | None = Field(None, description="steps between checkpoints; the last step always saves")
    keep_last: PositiveInt = Field(2, description="older checkpoints are removed")
    async_save: bool = Field(True, description="write in the background while training goes on")
    export_hf: PositiveInt | Literal["last"] | None = Field(
        None, description="Hugging Face exports: every N steps, or after the last one; a checkpoint is saved with each"
    )


class LoggingConfig(Section):
    """What is written besides ``metrics.jsonl`` and the console line."""

    every: PositiveInt = Field(1, description="steps between lines, and between comparisons of ranks")
    entropy_every: PositiveInt = Field(1, description="steps between entropies, where the head has no GPU kernels")
    tensorboard: bool = Field(True, description="TensorBoard events, when it is installed")
    wandb_project: str | None = Field(None, description="Weights & Biases project, when it is installed")
    progress_bar: bool = Field(True, description="on rank 0")
    peak_tflops: PositiveFloat | None = Field(None, description="of one device; default: known GPUs; for MFU")


class ProfileConfig(Section):
    """torch profiler traces of chosen steps and ranks."""

    steps: list[PositiveInt] = Field(default_factory=list, description="steps to trace")
    ranks: list[NonNegativeInt] = Field(default_factory=lambda: [0], description="ranks to trace")


# Transformer Engine asserts it of what a rank holds, before the gather of sequence parallelism
# (module/layernorm_linear.py: line 150 in 2.9.0, 159 in 2.14.1, 184 in 2.20.2).
FP8_ROWS = {"delayed": 8, "tensorwise": 8, "mxfp8": 32, "blockwise": 128}


class Config(Section):
    """One run. See ``examples/`` for complete files."""

    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    profile: ProfileConfig = Field(default_factory=ProfileConfig)

    def write(self, path: str | Path) -> None:
        """Write the resolved tree as YAML that ``load_config`` reads back to an equal value."""
        with atomic_file(path) as temporary:
            temporary.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False), encoding="utf-8")

    @property
    def q_sources(self) -> list[Source]:
        """Sources that train by a coefficient of q. A function of the user reads q when ``data.logprobs`` is set."""
        o, own = self.objective, self.data.logprobs is not None
        of = dict(zip(SOURCES, by_source(o.coefficient or ""), strict=True))
        return [s for s in o.sources or SOURCES if (c := of[s]) and (c in READ_Q or own and ":" in c)]

    @property
    def row_multiples(self) -> tuple[int, int]:
        """Of what the rows of a segment, and those of a pack, are multiples in this layout.

        Context parallelism deals out chunks of each segment in pairs; sequence parallelism cuts a rank's rows evenly;
        FP8 matrix products take rows by 16, and what a rank holds before they are gathered by :data:`FP8_ROWS`.
        """
        p = self.parallel
        alignment = 2 * p.cp if p.cp > 1 else 1
        shares = p.tp if p.sequence_parallel else 1
        rows = math.lcm(16, FP8_ROWS[self.model.fp8] * shares) if self.model.fp8 else shares
        return alignment, p.cp * rows


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """The :func:`load_tree` of a run."""
    return load_tree(Config, files, overrides)


Tree = TypeVar("Tree", bound=Section)


def load_tree(root: type[Tree], files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Tree:
    """Read YAML ``files`` (later ones win, key by key), apply ``section.key=value`` overrides, check the tree.

    Raises:
        InputErrors: with every unknown key (and the nearest known one), wrong type and value out of range.
    """
    tree: dict[str, Any] = {}
    for file in files:
        _merge(tree, read_yaml(Path(file)))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise InputError(f"override {override!r}: not of the form section.key=value")
        try:
            value = yaml.load(text, Loader=YamlLoader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            why = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
            raise InputError(f"override {override[:80]!r}: the value is not valid YAML ({why})") from None
        _set(tree, key.split("."), value)
    try:
        return root.model_validate(tree)
    except pydantic.ValidationError as error:
        problems = [problem for problem in error.errors() if "dict[" not in str(problem["loc"][-1])]  # of a union
        heading = " ".join(["configuration", *map(str, files)])
        raise InputErrors(heading, [_explain(problem, root) for problem in problems]) from None


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        branch = tree.setdefault(key, {})
        if isinstance(branch, str):  # objective: gft
            branch = tree[key] = {"name": branch}
        if not isinstance(branch, dict):
            raise InputError(f"override {'.'.join(path)}: {key} is not a section")
        tree = branch
    tree[path[-1]] = value


def all_keys(root: type[Section] = Config) -> list[str]:
    """Every settable key as ``section.key``, or ``key`` where there are no sections."""
    keys = []
    for name, field in root.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if hasattr(kind, "model_fields")]
        keys += [f"{name}.{key}" for kind in kinds for key in kind.model_fields] or [name]
    return keys


def _unknown(where: str, root: type[Section]) -> str:
    section, _, leaf = where.rpartition(".")
    known = all_keys(root) if section else [*root.model_fields, *all_keys(root)]
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    leaves = {key.rpartition(".")[2]: key for key in reversed(known)}
    alike = key if (key := KEY_OF.get(leaf)) in known else leaves.get(leaf)
    alike = alike or leaves.get(nearest(leaf, [key.rpartition(".")[2] for key in siblings]) or "")
    near = alike or leaves.get(nearest(leaf, leaves, 0.75) or "") or nearest(where, known, 0.75 if section else 0.6)
    hint = f"did you mean {near}?" if near else f"known there: {', '.join(siblings)} (docs/configuration.md)"
    return f"{where}: unknown key -> {hint}"


def _explain(problem: Any, root: type[Section]) -> str:
    where = ".".join(str(part) for part in problem["loc"] if not re.search(r"\[|^(constrained-)?str$", str(part)))
    if problem["type"] == "extra_forbidden":
        return _unknown(where, root)
    if problem["type"] == "missing":
        return f"{where}: missing -> set it in the configuration file or as {where}=..."
    written = f" -> write {where}=[{problem['input']}]" if problem["type"] == "list_type" else ""
    return f"{where}: {problem['msg'].lower()} (got {problem['input']!r}){written}"
