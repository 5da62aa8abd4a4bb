"""Megatron-Core on a machine without CUDA: its CUDA calls are redirected to the CPU.

``install()`` redirects nothing when CUDA is there, so no other module asks which device it runs on. The call
sites it covers (megatron-core 0.16.1 to 0.19.2) are few and of five kinds: ``device="cuda"`` arguments,
``Tensor.cuda()``, ``Tensor.type()`` comparisons with ``torch.cuda.*``, ``torch.cuda`` functions (current
device, synchronize, RNG state, streams), and a CUDA-only Adam, which a GPU without Transformer Engine lacks, too.
"""

import os
import warnings
from typing import Any, Self

import torch
from torch.optim.adam import adam
from torch.overrides import TorchFunctionMode


class FusedAdam(torch.optim.Optimizer):
    """Adam(W) with the state layout of Transformer Engine's and Apex's FusedAdam; the arithmetic is torch's own.

    State per parameter: ``exp_avg``, ``exp_avg_sq``; the step counter lives in the parameter group. So Megatron's
    distributed optimizer takes the same path and writes the same checkpoint layout everywhere. Of torch's own AdamW,
    which counts in each parameter's state, it cannot load one: it wants a count before there is any.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        if not bias_correction:
            raise ValueError("FusedAdam has no variant without bias correction here")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            group["step"] = group.get("step", 0) + 1
            steps = torch.full((len(params),), float(group["step"] - 1), device=params[0].device)  # each is counted up
            for p in params:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            adam(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                list(steps.unbind()),
                foreach=False,
                fused=steps.is_cuda,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=self.adam_w_mode,
            )


class _Stream:
    """CPU operations are synchronous: waiting and recording have nothing to do."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_event(self, *_: Any) -> None:
        return None

    wait_stream = synchronize = wait_event

    def record_event(self, *_: Any) -> Self:
        """Something that can be synchronized, as an event can (MoE token dispatcher)."""
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        return None


def _names_cuda(value: Any) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


class CudaToDevice(TorchFunctionMode):
    """Sends tensors that were meant for CUDA to ``device`` ("cpu", or "meta" for planning).

    A function mode belongs to one thread: enter it in every thread that calls Megatron.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = self.device
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func in (torch.Tensor.pin_memory, torch.Tensor.cuda):
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(self.device if _names_cuda(a) else a for a in args)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return "torch.cuda." + func(*args).split(".")[-1]
        return func(*args, **kwargs)


_installed: list[CudaToDevice] = []


def install(device: str = "cpu") -> None:
    """Redirect Megatron-Core's CUDA calls to ``device``, for the life of the process; with CUDA only torch's Adam.

    Call it before building anything of Megatron's. ``device="meta"`` is for planning without memory.
    """
    redirects = not _installed and (device != "cpu" or not torch.cuda.is_available())
    if redirects:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # megatron.core.jit wraps functions in torch.compile
        _redirect_torch_cuda(torch.device(device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Transformer Engine and Apex are not installed"
        _replace_torch_adam()
    if not redirects:
        return
    _redirect_megatron()
    mode = CudaToDevice(device)
    mode.__enter__()
    _installed.append(mode)


def _redirect_torch_cuda(device: torch.device) -> None:
    stream = _Stream()
    torch.cuda.current_device = lambda: device  # type: ignore[assignment,return-value]
    torch.cuda.set_device = lambda *_: None  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # type: ignore[assignment]
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *_, **__: stream  # type: ignore
    torch.cuda.Stream = _Stream  # type: ignore[assignment,misc]  # a class: transformers annotates with it
    torch.cuda.stream = lambda s: stream  # type: ignore
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]


def _replace_torch_adam() -> None:
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = FusedAdam, False
        distrib_optimizer.Adam = FusedAdam
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True


def _redirect_megatron() -> None:
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # all_to_all_single wants plain integers as split sizes; the GPU path makes them by a copy to the host
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor
    )
