"""Objectives as presets of two knobs and a choice of sources: one path trains GFT, SFT, DFT and the ablations.

Imported by the configuration, so it needs nothing but Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Coefficient = Literal["rectified", "none", "probability"]
Advantage = Literal["std", "population", "mean_only", "rloo", "none"]
Normalize = Literal["tokens", "sequences", "groups"]
ZeroVariance = Literal["keep", "skip"]
Source = Literal["expert", "teacher", "self"]

SOURCES: tuple[Source, ...] = get_args(Source)
"""Where a response comes from; its code in shards and tensors is its place here."""
SOURCE_CODES: dict[str, int] = {name: code for code, name in enumerate(SOURCES)}


class Objective(NamedTuple):
    """``coefficient`` weights each token, ``advantage`` each response, ``sources`` says which responses train."""

    coefficient: Coefficient
    advantage: Advantage
    sources: tuple[Source, ...]


OBJECTIVES: dict[str, Objective] = {
    "gft": Objective("rectified", "std", SOURCES),
    "sft": Objective("none", "none", ("expert",)),
    "dft": Objective("probability", "none", ("expert",)),
}


@dataclass(frozen=True)
class HeadSettings:
    """How output layer and loss are computed: one value, from the configuration to the loop over chunks.

    Attributes:
        tau: threshold of the rectification.
        coefficient: of each token: ``rectified`` (GFT), ``none`` (SFT) or ``probability`` (DFT).
        vocab_size: true size of the vocabulary; rows of the output matrix beyond it are padding, get no
            probability and no gradient. None: there are none.
        fused: False takes Megatron's own linear layer and vocab-parallel cross entropy, which hold all logits.
        chunk_tokens: rows of logits that the fused path holds at a time; rows are cut evenly. Larger chunks re-read
            the matrix and its gradient less often.
        entropy: also the entropy of each row's distribution, in the same pass.
    """

    tau: float = 0.1
    coefficient: Coefficient = "rectified"
    vocab_size: int | None = None
    fused: bool = True
    chunk_tokens: int = 2048
    entropy: bool = False
