"""A second device for torch, for machines without a GPU.

It has memory of its own, keeps the rules that code written on a CPU breaks first, and counts:

- An operation whose tensors are on two devices fails; only a copy may cross (a GPU also takes a
  number in a CPU tensor without dimensions, and so does this).
- A matmul and a sum add up in another order than the CPU, so they round differently, as a GPU does.
- ``most_held`` is what its tensors took at most, with the positions that CUDA writes down to index
  by a mask (ATen's ``expandTensors``: ``nonzero``, eight bytes per entry and dimension).

The arithmetic is the CPU's. What this cannot show: CUDA's own kernels, its times, its asynchrony.
The live tests have another one, on which a WebUI computes (tests/live/second_device).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "privateuseone"
"""What torch calls the device that others may define."""
_CROSSING = {"aten::_to_copy", "aten::copy_"}
_MATMULS = {"aten::mm", "aten::bmm"}

_setup_privateuseone_for_python_backend()


@dataclass
class _Memory:
    held: int = 0
    most: int = 0

    def take(self, size: int) -> None:
        self.held += size
        self.most = max(self.most, self.held)

    def give_back(self, size: int) -> None:
        self.held -= size


_memory = _Memory()
_storages: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


@contextmanager
def most_held() -> Iterator[_Memory]:
    """``most`` is what the tensors made inside took at most, in bytes, beside those before."""
    before, _memory.most = _memory.held, _memory.held
    found = _Memory()
    try:
        yield found
    finally:
        found.most = _memory.most - before


class _Storage:
    """Memory of the device: as long as a tensor or a view of it exists."""

    def __init__(self, size: int) -> None:
        _memory.take(size)
        weakref.finalize(self, _memory.give_back, size)


class _Tensor(torch.Tensor):
    """A tensor of the device; its numbers are in ``numbers``, a tensor of the CPU."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> _Tensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers = numbers
        storage = numbers.untyped_storage()
        self.storage = _storages.get(storage.data_ptr()) or _Storage(storage.nbytes())
        _storages[storage.data_ptr()] = self.storage

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, *args, **(kwargs or {}))


def _run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """The operation on the device's numbers; the result is on the device unless it is a copy to
    the CPU."""
    name = operation.name().split(".")[0]
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if name not in _CROSSING and any(x.dim() and not isinstance(x, _Tensor) for x in given):
        raise RuntimeError(f"{operation}: expected all tensors to be on the same device")
    own = {id(_on_cpu(x)): x for x in given}
    to_cpu = torch.device(kwargs.get("device") or NAME).type == "cpu"
    args, kwargs = tree_map(_on_cpu, (args, kwargs))
    if name in _MATMULS:
        args = args[0].flip(-1), args[1].flip(-2)
    elif name == "aten::sum":
        args = args[0].flip(-1), *args[1:]
    elif name == "aten::index":
        masks = [x for x in args[1] if x is not None and x.dtype == torch.bool]
        positions = [_Tensor(mask.nonzero()) for mask in masks]  # noqa: F841 (held, that is all)
    result = operation(*args, **kwargs)
    return result if to_cpu else tree_map(lambda x: own.get(id(x), _on_device(x)), result)


def _on_cpu(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.numbers if isinstance(x, _Tensor) else x


def _on_device(x: Any) -> Any:
    return _Tensor(x) if isinstance(x, torch.Tensor) else x


_library = torch.library.Library("_", "IMPL")
_library.fallback(_run, "PrivateUse1")
