"""What would make the host wait for the device on a GPU, counted on a CPU."""

import traceback
from collections import Counter
from pathlib import Path
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result, or its size, the host needs.
WAITING = "_local_scalar_dense nonzero is_nonzero equal masked_select _unique2 unique_dim unique_consecutive bincount"
# Functions that read a tensor on the host without an operator, and those that make one there and copy it.
READING = (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.tensor)


def _place() -> str:
    """The innermost file and function of this project or of Megatron-Core."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if {"megatron_gft", "megatron"} & set(path.parts[-5:-1]) and frame.name != "__torch_function__":
            return f"{path.parent.name}/{path.name} {frame.name}"
    return "elsewhere"


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        masks = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        masks = masks and not (name == "index_put_" and args[2].numel() == 1)  # that is a masked_fill
        if name in WAITING.split() or masks or (name == "repeat_interleave" and func._overloadname == "Tensor"):
            self.found[f"{name} {_place()}"] += 1
        return func(*args, **(kwargs or {}))


class HostSyncs(TorchFunctionMode):
    """Counts, inside the block and in this thread, what would make a GPU's host wait: ``found`` by operator and place.

    On a CPU a tensor of the host looks like one of the device, so the block must be free of both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._operators = _Operators(self.found)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING:
            self.found[f"{func.__name__} {_place()}"] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Self:
        self._operators.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._operators.__exit__(*error)
