"""Objectives as presets of two knobs and a choice of sources: one path trains GFT, SFT, DFT and the ablations.

Imported by the configuration, so it needs nothing but Python.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Coefficient = Literal["rectified", "none", "probability"]
Advantage = Literal["std", "population", "mean_only", "rloo", "none"]
Normalize = Literal["tokens", "sequences", "groups"]
ZeroVariance = Literal["keep", "skip"]
Source = Literal["expert", "teacher", "self"]

ALL_SOURCES: tuple[Source, ...] = ("expert", "teacher", "self")


class Objective(NamedTuple):
    """``coefficient`` weights each token, ``advantage`` each response, ``sources`` says which responses train."""

    coefficient: Coefficient
    advantage: Advantage
    sources: tuple[Source, ...]


OBJECTIVES: dict[str, Objective] = {
    "gft": Objective("rectified", "std", ALL_SOURCES),
    "sft": Objective("none", "none", ("expert",)),
    "dft": Objective("probability", "none", ("expert",)),
}
