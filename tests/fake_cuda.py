"""A GPU without data: tensors of ``cuda`` have a shape, a dtype and a device, and nothing is computed.

What is left on the host, has another shape or makes the host wait shows as on a GPU; numbers and kernels do not.
A program, since torch must find the device when it is imported: ``LD_PRELOAD=fake_cuda.so python fake_cuda.py WHAT
ARGUMENT...`` calls ``WHAT`` and prints its results as lines of JSON.
"""

import gc
import json
import os
import sys
import traceback
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # read when Megatron is imported

import numpy as np
import torch
import torch.distributed as dist
from allocated import Allocated
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAME = "NVIDIA H100 80GB HBM3"
# What a read of the device gives: finite, no signal to stop, no overflow, and a loss, a norm.
READS = {torch.bool: True, torch.int32: 0, torch.float32: 1.0, torch.float64: 1.0}


class _WithoutDevice(FakeTensorMode):
    avoid_device_init = True  # or it copies constants to the device for real


class FakeCuda(TorchDispatchMode):
    """Gives tensors of the host to torch, those of ``cuda`` to its ``FakeTensorMode``, and counts in ``waits``, by
    operator and place, what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = _WithoutDevice(allow_non_fake_inputs=True)
        self.waits: Counter[str] = Counter()
        self.page_locked: dict[int, torch.Tensor] = {}  # kept, or another tensor would get the place
        self.allocated = Allocated()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs := kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        names_device = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not names_device and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            assert all(tensor.is_cuda for tensor in tensors), f"{func}: {[tensor.device for tensor in tensors]}"
            work = FakeWork().boxed()
            return work if len(func._schema.returns) == 1 else (args[0], work)
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            if tensors[0].is_cuda:
                self.count(func)
            return READS[torch.bool if len(tensors) > 1 else tensors[0].dtype]
        with self.fake:
            out = func(*args, **kwargs)
        self.allocated.note(leaf for leaf in tree_leaves(out) if isinstance(leaf, FakeTensor) and leaf.is_cuda)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source, to = tensors[-1], out.device
            beside = kwargs.get("non_blocking") or args[2:] == (True,)
            beside = beside and (source.is_cuda or source.data_ptr() in self.page_locked)
            if source.device.type != to.type and not beside:
                self.count(func)
        return out

    def count(self, func: Any) -> None:
        """A wait, by the innermost function of this project or of Megatron-Core."""
        frames = [(Path(frame.filename), frame.name) for frame in reversed(traceback.extract_stack())]
        places = [
            f"{path.parent.name}/{path.name} {name}"
            for path, name in frames
            if {"megatron_gft", "megatron"} & set(path.parts[-5:-1])
        ]
        self.waits[f"{func._schema.name.split('::')[1]} {[*places, 'elsewhere'][0]}"] += 1


class Anything:
    """A stream or an event: all that is asked of it is done."""

    device = torch.device("cuda", 0)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self

    def elapsed_time(self, _: Any) -> float:
        return 1.0

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None: ...


class Launched:
    """A Triton kernel: its arguments are looked at instead of run."""

    def __init__(self, check: Any) -> None:
        self.check = check

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert min(grid) > 0
        return self.check


def statistics(logits, labels, out, rows, stride, start, valid, entropy, block, num_warps):
    assert logits.is_cuda and labels.is_cuda and out.is_cuda
    assert logits.stride() == (stride, 1) and labels.dtype == torch.int64 and labels.is_contiguous()
    assert out.shape == (3 + entropy, rows) and out.dtype == torch.float32 and len(labels) == len(logits) == rows


def gradient(logits, labels, top, factor, label_gradient, stride, start, valid, size, block, num_warps):
    assert logits.is_cuda and labels.is_cuda and logits.stride() == (stride, 1) and logits.shape[1] == size
    for row in (top, factor, label_gradient):
        assert row.is_cuda and row.shape == labels.shape and row.dtype == torch.float32 and row.is_contiguous()


class Norm(torch.autograd.Function):
    """``rms_norm`` as CUDA's kernel does it: torch without CUDA falls back to float32 tensors."""

    @staticmethod
    def forward(ctx, x, shape, weight=None, eps=None):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(grad), None, torch.empty_like(ctx.saved_tensors[1]), None


def applied(module: torch.nn.Module, change: Any, recurse: bool = True) -> torch.nn.Module:
    """``Module._apply``, which cannot exchange fake tensors."""
    for part in module.modules():
        for name, old in part._parameters.items():
            new = old if old is None else change(old.detach())
            if old is not None and type(old.data) is type(new):
                old.data = new
            elif old is not None:
                part._parameters[name] = torch.nn.Parameter(new, requires_grad=old.requires_grad)
                part._parameters[name].__dict__.update(vars(old))
        part._buffers.update({name: change(buffer) for name, buffer in part._buffers.items() if buffer is not None})
    return module


def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
    object_list[:] = [obj] * len(object_list)


def gather_object(obj: Any, object_gather_list: list[Any] | None = None, *_: Any, **__: Any) -> None:
    all_gather_object(object_gather_list if object_gather_list is not None else [], obj)


def install() -> FakeCuda:
    """Make ``torch.cuda`` one device, from here on and in this thread; ranks meet nobody."""
    mode, nothing, cuda = FakeCuda(), lambda *_, **__: None, torch.cuda
    for name in ("_lazy_init", "set_device", "synchronize", "manual_seed", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, nothing)
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count, cuda.current_device = lambda: 1, lambda: 0
    cuda.Stream = cuda.Event = Anything
    cuda.current_stream = cuda.default_stream = cuda.stream = Anything
    cuda.get_device_name, cuda.max_memory_allocated = lambda *_: NAME, lambda *_: mode.allocated.most
    cuda.get_device_properties = lambda *_: types.SimpleNamespace(major=9, minor=0, total_memory=80 * 2**30, name=NAME)
    torch._C._cuda_set_sync_debug_mode = torch._C._cuda_get_sync_debug_mode = lambda *_: 0
    cuda.get_device_capability = lambda *_: (9, 0)
    generator = torch.Generator()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: generator.get_state()
    cuda.set_rng_state = cuda.random.set_rng_state = nothing
    cuda.default_generators = (types.SimpleNamespace(set_state=nothing, get_state=generator.get_state),)
    torch.nn.Module._apply, torch.nn.functional.rms_norm = applied, Norm.apply
    torch.Tensor.pin_memory = lambda tensor: mode.page_locked.setdefault(tensor.data_ptr(), tensor)
    dist.broadcast_object_list = nothing  # the first rank's is every rank's own here
    dist.all_gather_object, dist.gather_object = all_gather_object, gather_object
    begin, group, make = dist.init_process_group, dist.new_group, torch.Generator
    dist.init_process_group = lambda _, *, rank=0, world_size=1, **__: begin(
        "fake", store=FakeStore(), rank=rank, world_size=world_size
    )
    dist.new_group = lambda *given, **named: group(*given, **named | {"backend": "fake"})
    none = types.SimpleNamespace(manual_seed=lambda _: None)
    torch.Generator = lambda device="cpu": make() if torch.device(device).type == "cpu" else none
    torch._C._set_only_lift_cpu_tensors(True)  # a new tensor's copy to the device is seen, too
    from megatron_gft import row_kernels

    row_kernels.statistics_kernel, row_kernels.gradient_kernel = Launched(statistics), Launched(gradient)
    mode.__enter__()
    return mode


def operators(mode: FakeCuda) -> Iterator[tuple[str, Any]]:
    """What each of these waits for, or how it fails."""
    x, host = torch.ones(4, device="cuda"), torch.ones(4)
    for name, use in {
        "read": lambda: float(x[0]),
        "list": lambda: x.tolist(),
        "to the host": lambda: x.cpu(),
        "to the host beside": lambda: x.to("cpu", non_blocking=True),
        "to the device": lambda: host.cuda(),
        "pageable beside": lambda: host.to("cuda", non_blocking=True),
        "page-locked": lambda: host.clone().pin_memory().cuda(),
        "page-locked beside": lambda: host.clone().pin_memory().to("cuda", non_blocking=True),
        "made on the device": lambda: torch.full((), 1.0, device="cuda") * x,
        "made on the host": lambda: torch.tensor(1.0, device="cuda"),
        "mask": lambda: x[x > 1],
        "nonzero": lambda: x.nonzero(),
        "two devices": lambda: x + host,
        "two shapes": lambda: torch.mm(x[None], x[None]),
    }.items():
        mode.waits.clear()
        try:
            use()
        except Exception as error:
            yield name, type(error).__name__
        else:
            yield name, sum(mode.waits.values())


def train(mode: FakeCuda, model: str, folder: str, *cases: str) -> Iterator[tuple[str, Any]]:
    """Two steps and a validation of each ``RANK/WORLD_SIZE KEY=VALUE ...``, as that rank: the step that it began after,
    microbatches of the second one, and what that waited for; or how the case failed."""
    for number, case in enumerate(cases):
        try:
            yield case, _train(mode, model, f"{folder}/{number}", case)
        except Exception:
            yield case, traceback.format_exc()
        finally:
            destroy_parallel()


def _train(mode: FakeCuda, model: str, folder: str, case: str) -> tuple[int, int, dict[str, int]]:
    place, *overrides = case.split()
    rank, world_size = map(int, place.split("/"))
    config = device_run.make_config(model, folder, [*overrides, "logging.every=9"])  # no times of ranks to compare
    dist.init_process_group("nccl", rank=rank, world_size=world_size)
    p, shape = config.parallel, read_model_shape(model)
    parallel = initialize_parallel(tp=p.tp, pp=p.pp, vpp=p.vpp, cp=p.cp)
    trainer = build_trainer(config, shape, parallel, *[Groups(count, shape.vocab_size) for count in (16, 8)])
    for _ in range(2):
        batch, packs = next(trainer.steps)
        mode.waits.clear()
        trainer.step(batch, packs, 0.0)
        trainer.stop.agreed()
    waits = dict(mode.waits)
    trainer.validate()
    trainer.close()
    return trainer.state.step, len(packs), waits


def peak(mode: FakeCuda, *cases: str) -> Iterator[tuple[str, Any]]:
    """Bytes held at most in the second step of each ``RECIPE RANK/WORLD_SIZE PACKS KEY=VALUE ...``, as that rank, with
    full packs."""
    for case in cases:
        gc.collect()
        before = mode.allocated.now
        yield case, _peak(mode, case) - before
        destroy_parallel()


def _peak(mode: FakeCuda, case: str) -> int:
    recipe, place, packs, *overrides = case.split()
    rank, world_size = map(int, place.split("/"))
    config = load_config([recipe], ["objective=sft", "data.packing=packed", *overrides])
    dist.init_process_group("nccl", rank=rank, world_size=world_size)
    p, shape, each = config.parallel, read_model_shape(config.model.config), 1024
    parallel = initialize_parallel(tp=p.tp, pp=p.pp, vpp=p.vpp, cp=p.cp)
    count = int(packs) * parallel.dp_size * (config.data.max_tokens_per_pack // each)
    tokens = np.zeros(each, np.int64)
    group = Group(tokens[:101], [tokens[:924]], np.zeros(1, np.int8), np.ones(1, np.float32), None)
    config = config.model_copy(update={"data": config.data.model_copy(update={"groups_per_step": count})})
    loader = StepLoader(MemoryGroups([group] * count, "full"), config, shape, parallel)
    seed_everything(1, parallel)
    transformer, modules = build_model(shape, config.model, config.objective, p, parallel)
    chunks = wrap_data_parallel(modules, transformer, config.optimizer)
    optimizer, runner = build_optimizer(chunks, config.optimizer, bf16=True), StepRunner(chunks, parallel)
    for _ in range(2):
        mode.allocated.reset()
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        batch = loader.batch(0)
        runner.forward_backward(loader.packs(batch), batch.denominator)
        apply_gradients(optimizer, reduce_gradients(optimizer), 1.0)
    return mode.allocated.most


def gpu_check(_: FakeCuda, output: str, *parts: str) -> Iterator[tuple[str, Any]]:
    """Parts of ``tools/gpu_check.py`` at a GPU's sizes: None, or how each failed."""
    from tools import gpu_check

    for part in parts:
        gpu_check.main(["--output", output, "--only", part])
        yield part, json.loads(Path(output).read_text())["parts"][part].get("trace")


if __name__ == "__main__":
    fake = install()
    import device_run
    from memory_groups import MemoryGroups

    from megatron_gft import cpu
    from megatron_gft.batch import StepLoader
    from megatron_gft.config import load_config
    from megatron_gft.hf.shape import read_model_shape
    from megatron_gft.job import build_trainer
    from megatron_gft.model import build_model
    from megatron_gft.optimizer import apply_gradients, build_optimizer, reduce_gradients, wrap_data_parallel
    from megatron_gft.parallel import destroy_parallel, initialize_parallel, seed_everything
    from megatron_gft.shards import Group
    from megatron_gft.step import StepRunner

    cpu.install()

    class Groups(device_run.RandomGroups):
        """With q of each token."""

        def __getitem__(self, index: int) -> Any:
            group = super().__getitem__(index)
            return replace(group, logprobs=[np.full(len(tokens), -1.0, np.float32) for tokens in group.responses])

    for name, result in globals()[sys.argv[1]](fake, *sys.argv[2:]):
        print(json.dumps([name, result]), flush=True)
