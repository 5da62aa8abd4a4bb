"""What a training step would make a GPU's host wait for, counted on a CPU."""

import device_run
import pytest
import torch
from host_syncs import HostSyncs
from ranks import run_ranks
from tiny_models import write_tiny_model

from megatron_gft.hf.shape import read_model_shape
from megatron_gft.job import build_trainer
from megatron_gft.parallel import destroy_parallel, initialize_parallel


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model") / "hf", "llama_tied_linear", num_hidden_layers=4))


def waits_of_a_step(model: str, output: str, *overrides: str) -> tuple[int, dict[str, int]]:
    """Microbatches of the second step, and what would wait in it, by operator and place."""
    config = device_run.make_config(model, output, list(overrides))
    shape, p = read_model_shape(model), config.parallel
    parallel = initialize_parallel(tp=p.tp, pp=p.pp, vpp=p.vpp, cp=p.cp)
    trainer = build_trainer(config, shape, parallel, device_run.RandomGroups(16, shape.vocab_size), None)
    counter = HostSyncs()
    for _ in range(2):
        batch, packs = next(trainer.steps)
        counter.found.clear()
        with counter:
            trainer.step(batch, packs, 0.0)
            trainer.stop.agreed()
    trainer.close()
    destroy_parallel()
    return len(packs), dict(counter.found)


# Ours, once a step: whether a rank is to stop. The loss comes along with Megatron's norm of the gradient.
OURS = {"_local_scalar_dense megatron_gft/runtime.py agreed": 1}
# Tensors of the host, which only look like those of the device here; cpu.py's too (test_gpu_paths.py).
ON_HOST = {
    "_local_scalar_dense megatron_gft/step.py loss",  # on the host: copied from page-locked memory
    "tensor megatron_gft/timing.py gather_times",
    "tolist megatron_gft/timing.py gather_times",
    "tensor pipeline_parallel/schedules.py forward_step_calc_loss",  # Megatron's 0, to which it adds ours
    "_local_scalar_dense tensor_parallel/random.py fork",  # states of generators
}


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, ("data.packing=shared_prefix",)),
        (2, ("parallel.pp=2", "model.precision=bf16", "data.packing=auto")),
        pytest.param(2, ("parallel.cp=2",), marks=pytest.mark.slow),
        (2, ("parallel.tp=2", "parallel.sequence_parallel=true")),
    ],
)
def test_a_step_waits_once_and_a_microbatch_never(model, tmp_path, world_size, options):
    for microbatches, found in run_ranks(world_size, waits_of_a_step, model, str(tmp_path / "run"), *options):
        found = {place: count for place, count in found.items() if place not in ON_HOST and "/cpu.py" not in place}
        assert microbatches >= 2
        assert {place: count for place, count in found.items() if "megatron_gft/" in place} == OURS
        assert set(found.values()) == {1}, found  # Megatron's: are there tokens, the norm of the gradient


def test_the_counter_sees_what_would_wait():
    counter, x = HostSyncs(), torch.arange(4.0)
    with counter:
        for read in (float, torch.nonzero, torch.Tensor.tolist, torch.Tensor.cpu, lambda t: t[t > 1], torch.unique):
            read(x[:1] if read is float else x)
        x * 2, x[torch.tensor([1, 2])], torch.full((), 1.0)
    kinds = [place.split()[0] for place in counter.found.elements()]
    assert sorted(kinds) == ["_local_scalar_dense", "_unique2", "cpu", "index", "nonzero", "tensor", "tolist"]
