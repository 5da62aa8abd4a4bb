"""Bytes that tensors hold and held at most, as the allocator of a GPU counts them."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocated(TorchDispatchMode):
    """Counts what is made inside the block, or what :meth:`note` is given."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.held: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.note(leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        return out

    def note(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count the storages of these that are new."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage._cdata not in self.held:
                self.held[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.release, storage._cdata)

    def release(self, storage: int) -> None:
        self.now -= self.held.pop(storage)

    def reset(self) -> int:
        """The bytes held now, from which the most are counted."""
        self.most = self.now
        return self.now
