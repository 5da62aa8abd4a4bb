"""The order of groups over steps and epochs. It does not depend on the layout at all."""

import functools
import hashlib
import json

import numpy as np


@functools.lru_cache(maxsize=2)
def epoch_order(num_groups: int, seed: int, epoch: int, fingerprint: str) -> np.ndarray:
    """Order of the groups in an epoch: a permutation, int64 [num_groups], read-only.

    A function of its arguments alone, the same on every layout and with every numpy: it sorts raw Philox numbers
    (streams of bit generators are fixed by numpy's NEP 19, ``Generator.permutation`` is not).
    """
    text = json.dumps([num_groups, seed, epoch, fingerprint])
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    order = np.argsort(np.random.Philox(key=key).random_raw(num_groups), kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def steps_per_epoch(num_groups: int, groups_per_step: int) -> int:
    """Steps in which every group comes once; the last one may be smaller."""
    return -(-num_groups // groups_per_step)


def step_groups(step: int, *, num_groups: int, groups_per_step: int, seed: int, fingerprint: str) -> np.ndarray:
    """Groups of the 0-based optimizer step ``step``, counted over epochs: int64 [1 <= n <= groups_per_step]."""
    epoch, place = divmod(step, steps_per_epoch(num_groups, groups_per_step))
    order = epoch_order(num_groups, seed, epoch, fingerprint)
    return order[place * groups_per_step : (place + 1) * groups_per_step]
