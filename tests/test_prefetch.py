"""Steps prepared ahead are the steps, in order; they are prepared while the caller works; errors wait their turn."""

import contextlib
import threading

import pytest
import torch
from test_batch import UnscoredGroups, loader_of

from megatron_gft.batch import StepLoader
from megatron_gft.errors import InputError

WAIT = 20.0


class WatchedLoader:
    """A loader that tells when a step has been prepared, and by which thread."""

    def __init__(self, loader):
        self.loader, self.threads = loader, {}
        self.ready = {step: threading.Event() for step in range(8)}

    def batch(self, step):
        self.threads[step] = threading.current_thread()
        return self.loader.batch(step)

    def packs(self, batch):
        packs = self.loader.packs(batch)
        self.ready[len(self.threads) - 1].set()
        return packs

    ahead = StepLoader.ahead


@pytest.mark.parametrize("first", [0, 3])
def test_the_steps_are_those_of_the_loader(first):
    loader = loader_of()
    with contextlib.closing(loader_of().ahead(range(first, 8))) as ahead:
        for step in range(first, 8):
            batch, packs = next(ahead)
            expected = loader.batch(step)
            assert batch.groups.tolist() == expected.groups.tolist() and batch.plan == expected.plan
            assert torch.equal(batch.weights, expected.weights)
            for pack, same in zip(packs, loader.packs(expected), strict=True):
                assert torch.equal(pack.tokens, same.tokens) and torch.equal(pack.token_weights, same.token_weights)


def test_the_next_step_is_prepared_while_this_one_is_worked_on():
    loader = WatchedLoader(loader_of())
    with contextlib.closing(loader.ahead(range(3))) as ahead:
        next(ahead)
        assert loader.ready[1].wait(WAIT), "nobody prepared step 2 of 3 before it was asked for"
        assert loader.threads[1] is not threading.current_thread() and 2 not in loader.threads
        next(ahead)
        assert loader.ready[2].wait(WAIT)
        next(ahead)
    assert set(loader.threads) == {0, 1, 2}, "a step beyond the last one was prepared"


def test_an_unscored_group_stops_its_own_step_only():
    loader = loader_of(groups=UnscoredGroups())
    bad = [step for step in range(4) if {4, 9} & set(loader.indices(step).tolist())]
    assert 0 < len(bad) < 4
    with contextlib.closing(loader.ahead(range(4))) as ahead:
        for step in range(bad[0] + 1):
            wrong = pytest.raises(InputError, match=f"groups of step {step + 1}")
            with wrong if step in bad else contextlib.nullcontext():
                next(ahead)
