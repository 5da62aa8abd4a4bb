"""Objectives as presets of the same few knobs: one path trains what stands between SFT and RL.

Imported by the configuration, so it needs nothing but Python. The formulas are in ``gft.py``.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from megatron_gft.errors import InputError

Coefficient = Literal[
    "rectified", "none", "probability", "ratio", "clipped_ratio", "truncated_ratio", "shaped", "uncertainty"
]
Advantage = Literal["std", "population", "mean_only", "rloo", "reward", "none"]
Normalize = Literal["tokens", "sequences", "groups"]
ZeroVariance = Literal["keep", "skip"]
CutOff = Literal["train", "no_loss", "drop"]
Source = Literal["expert", "teacher", "self"]

SOURCES: tuple[Source, ...] = get_args(Source)
"""Where a response comes from; its code in shards and tensors is its place here."""
SOURCE_CODES: dict[str, int] = {name: code for code, name in enumerate(SOURCES)}
READ_Q: tuple[Coefficient, ...] = ("ratio", "clipped_ratio", "truncated_ratio")
"""Coefficients of the sampling log-probs; a user's own reads them when ``data.logprobs`` is set."""


T = TypeVar("T")


def by_source(value: T | Mapping[Source, T] | tuple[T | None, ...]) -> tuple[T | None, ...]:
    """The value of each source, in the order of ``SOURCES``: one for all, those of a mapping, or a tuple as it is."""
    if isinstance(value, tuple):
        return value
    return tuple(value.get(source) if isinstance(value, Mapping) else value for source in SOURCES)


@functools.cache
def user_coefficient(name: str) -> Callable[..., Any]:
    """The function that ``module:function`` names; InputError when it cannot be imported, or is none."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # of whatever stands in the module
        raise InputError(f"objective.coefficient={name}: {error} -> module:function, on PYTHONPATH") from error
    if not callable(function):
        raise InputError(f"objective.coefficient={name}: a {type(function).__name__} -> name a function")
    return function


@dataclass(frozen=True)
class Objective:
    """A preset: what it is (``formula``, ``paper``, ``use``) and the keys of ``objective`` that it sets."""

    formula: str
    paper: str
    use: str
    coefficient: Coefficient | Mapping[Source, Coefficient] = "rectified"
    advantage: Advantage | Mapping[Source, Advantage] = "std"
    sources: tuple[Source, ...] = SOURCES
    negative_scale: float = 1.0
    baseline_shift: float = 0.0
    eps_low: float = 0.2
    eps_high: float = 0.2
    normalize: Normalize = "tokens"
    per_source_denominator: bool = False
    zero_variance: ZeroVariance = "keep"
    mu_peak: float | None = None


EXPERT: tuple[Source, ...] = ("expert",)
SELF: tuple[Source, ...] = ("self",)
OBJECTIVES: dict[str, Objective] = {
    "gft": Objective("c = 1 if p > tau else p; A = (r - mean) / std", "arXiv 2604.14258", "watch for collapse"),
    "sft": Objective("c = 1; A = 1", "-", "experts are good and close to the model", "none", "none", EXPERT),
    "dft": Objective("c = p; A = 1", "arXiv 2508.05629", "experts unlike the model", "probability", "none", EXPERT),
    "rft": Objective("c = 1; A = r, without rows of r = 0", "arXiv 2308.01825", "a safe start", "none", "reward"),
    "dft_correct": Objective(
        "c = p; A = r, without rows of r = 0", "dft, on what rft keeps", "close to the model", "probability", "reward"),
    "gft_scaled": Objective(
        "gft; A < 0 times negative_scale (0.25)", "found with this project", "gft collapses", negative_scale=0.25),
    "asymre": Objective(
        "c = 1; A = r - mean - baseline_shift (-0.1)", "arXiv 2506.20520", "old self samples without log-probs",
        "none", "mean_only", SELF, baseline_shift=-0.1),
    "grpo": Objective(
        "c = p/q, 0 where A > 0 and p/q > 1 + eps_high or A < 0 and p/q < 1 - eps_low; A as gft", "arXiv 2402.03300",
        "self samples with log-probs, a few updates old", "clipped_ratio", "std", SELF, normalize="sequences"),
    "dapo": Objective(
        "grpo with eps 0.2 / 0.28, per token, equal rewards skipped", "arXiv 2503.14476",
        "grpo for long responses; objective.cut_off=no_loss", "clipped_ratio", "std", SELF, eps_high=0.28,
        zero_variance="skip"),
    "cispo": Objective(
        "c = min(p/q, 1 + eps_high); A as gft", "arXiv 2506.13585", "grpo whose rare tokens must keep their gradient",
        "truncated_ratio", "std", SELF, eps_high=4.0),
    "psft": Objective(
        "c = p/q, 0 where p/q > 1 + eps_high; A = 1", "arXiv 2508.17784", "sft in a trust region around its start (q)",
        "clipped_ratio", "none", EXPERT, eps_low=0.28, eps_high=0.28),
    "luffy": Objective(
        "self: c = p/q; others: c = g p / (p + g)^2; A = r - mean", "arXiv 2504.14945", "experts guide self samples",
        {"expert": "shaped", "teacher": "shaped", "self": "ratio"}, "mean_only"),
    "chord_phi": Objective(
        "mu * (expert: c = p (1 - p); A = 1) + (1 - mu) * (self: grpo), each by its own tokens", "arXiv 2508.11408",
        "sft and grpo in one run", {"expert": "uncertainty", "self": "clipped_ratio"},
        {"expert": "none", "self": "std"}, ("expert", "self"), per_source_denominator=True, mu_peak=0.1),
}  # fmt: skip


# Of logits in a chunk: large products, and little beside the weights' gradient. 2093 rows of 128,256 in bf16.
HEAD_CHUNK_BYTES = 2**29


@dataclass(frozen=True)
class HeadSettings:
    """How output layer and loss are computed: one value, from the configuration to the loop over chunks.

    Keys of ``objective``, and:

    Attributes:
        coefficient: name of each token's, or ``module:function``; or one for each of ``SOURCES``.
        vocab_size: true size of the vocabulary; rows of the output matrix beyond it are padding, get no
            probability and no gradient. None: there are none.
        fused: False takes Megatron's own linear layer and vocab-parallel cross entropy, which hold all logits.
        chunk_tokens: rows of logits that the fused path holds at a time; larger chunks re-read the matrix and its
            gradient less often. None: see :meth:`chunk_rows`.
    """

    tau: float = 0.1
    coefficient: str | tuple[str | None, ...] = "rectified"
    eps_low: float = 0.2
    eps_high: float = 0.2
    ratio_dual_clip: float | None = None
    shaping: float = 0.1
    vocab_size: int | None = None
    fused: bool = True
    chunk_tokens: int | None = None
    entropy: bool = False

    def chunk_rows(self, columns: int, itemsize: int) -> int:
        """Rows of ``columns`` logits of ``itemsize`` bytes in a chunk: what was asked for, or ``HEAD_CHUNK_BYTES``."""
        return self.chunk_tokens or max(1, HEAD_CHUNK_BYTES // (columns * itemsize))
