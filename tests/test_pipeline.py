"""Pipeline transfers of known shapes against Megatron's own exchange of shapes: the same bits.

That no case of the layout suite exchanges a shape is asserted in :func:`layout_cases._train`.
"""

import numpy as np
import pytest
from layout_cases import Case, run_case
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_gft import step

EXCHANGE = P2PCommunicator._communicate_shapes
INTERLEAVED = "parallel.pp=2 parallel.vpp=2"
LAYOUTS = [
    (2, INTERLEAVED),
    pytest.param(2, "parallel.pp=2", marks=pytest.mark.slow),
    pytest.param(4, "parallel.pp=4", marks=pytest.mark.slow),
    pytest.param(4, f"{INTERLEAVED} parallel.tp=2 parallel.sequence_parallel=true", marks=pytest.mark.slow),
    pytest.param(4, "parallel.pp=2 parallel.cp=2 data.packing=shared_prefix", marks=pytest.mark.slow),
]


def with_exchange(_):
    """Megatron's schedules make their own communicator."""
    P2PCommunicator._communicate_shapes = EXCHANGE
    step.schedule_arguments = lambda *_: {}


@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS)
def test_known_shapes_train_as_exchanged_ones(tmp_path, world_size, layout):
    arguments = {"world_size": world_size, "overrides": tuple(layout.split()), "model": "deep", "steps": (0, 1)}
    known = run_case(tmp_path, Case(**arguments))
    exchanged = run_case(tmp_path, Case(**arguments, sabotage=with_exchange))
    assert known.losses == exchanged.losses and known.grad_norms == exchanged.grad_norms
    assert known.evaluation == exchanged.evaluation
    for head, gradients in exchanged.gradients.items():
        for name, gradient in gradients.items():
            np.testing.assert_array_equal(known.gradients[head][name], gradient, err_msg=name)
