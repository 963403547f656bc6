"""A layer's ΔW block by block, so that its analysis needs the memory of one block and no more.

``Layer.delta`` makes the same numbers at once; a test proves the two equal. What the scores are
made of, sums and largest entries of |ΔW|, does not depend on the order of the entries, nor on
their signs. That is used where it helps: a matrix may come transposed, and a Kronecker product
W₁ ⊗ W₂ comes as the outer product of its factors' entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from .lora_file import FusedLayer, Layer

BLOCK_CPU = 2**18
"""Entries in one block: 1 MiB, which stays in the processor's cache from the matmul to the last
look at it. With 2^20 the whole analysis of a rank 8 pair takes 1.3 times as long."""
BLOCK_GPU = 2**19
"""2 MiB: a GPU has few orders to wait for, and a block, a mask, the positions of all its entries
(CUDA writes them down to index by a mask, eight bytes each) and the entries stay below 16 MiB."""
SAMPLE = 2**15
"""Entries in a sample."""

Index = slice | torch.Tensor
_ALL = slice(None)


def blocks(layer: Layer | FusedLayer, device: torch.device | str) -> Iterator[torch.Tensor]:
    """|ΔW| in fp32 on ``device``, every entry once, two-dimensional pieces of one block at most.

    A piece is valid until the next one is asked for, and may be overwritten.
    """
    size = BLOCK_CPU if torch.device(device).type == "cpu" else BLOCK_GPU
    buffer = torch.empty(size, dtype=torch.float32, device=device)
    for matrix in _matrices(layer, device):
        rows, columns = matrix.shape
        step = max(1, size // columns)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            yield matrix.part(part, _ALL, buffer).abs_()


def sample(layer: Layer | FusedLayer, device: torch.device | str) -> torch.Tensor:
    """About SAMPLE entries of |ΔW|, from evenly spaced rows and columns; one-dimensional."""
    pieces = []
    for matrix in _matrices(layer, device):
        rows, columns = matrix.shape
        share = max(1, SAMPLE * rows * columns // layer.entries)
        few_columns = _spread(columns, 128, device)
        few_rows = _spread(rows, max(1, share // len(few_columns)), device)
        pieces.append(matrix.part(few_rows, few_columns).abs().flatten())
    return torch.cat(pieces)


def _spread(length: int, count: int, device: torch.device | str) -> torch.Tensor:
    """Up to ``count`` evenly spaced indices, each in the middle of its stretch."""
    count = min(length, count)
    return (torch.arange(count, device=device) * 2 + 1) * length // (2 * count)


def _matrices(layer: Layer | FusedLayer, device: torch.device | str) -> Iterator[_Matrix]:
    """ΔW as matrices of which any part can be made alone."""
    if isinstance(layer, FusedLayer):
        for part in layer.parts:
            yield from _matrices(part, device)
        return
    # A tensor keeps its dtype and becomes fp32 part by part; but fp8 cannot be indexed.
    parts = {
        name: tensor.to(device, torch.float32 if tensor.element_size() == 1 else None)
        for name, tensor in layer.tensors.items()
    }
    if layer.kind == "full":
        yield _Given(parts["diff"], layer.scale)
    elif layer.kind == "LoHa":
        one, other = (
            _factor(parts, f"hada_w{i}", f"hada_t{i}", 1.0 if i == 2 else layer.scale)
            for i in (1, 2)
        )
        yield _Hadamard(one, other)
    elif layer.kind == "LoKr":
        factors = [_factor(parts, f"lokr_w{i}", f"lokr_t{i}", 1.0) for i in (1, 2)]
        small, large = sorted(factors, key=lambda factor: factor.shape[0] * factor.shape[1])
        row = small.part(_ALL, _ALL).reshape(1, -1)
        step = max(1, BLOCK_CPU // large.shape[1])
        for start in range(0, large.shape[0], step):
            column = large.part(slice(start, start + step), _ALL).reshape(-1, 1)
            yield _Product(column, row, layer.scale)
    else:  # LoRA and DoRA
        yield _lora(parts, layer.scale)


@dataclass
class _Given:
    """A matrix that the file holds as such, seen as one column."""

    values: torch.Tensor
    scale: float

    def __post_init__(self) -> None:
        self.values = self.values.reshape(-1, 1)
        self.shape = tuple(self.values.shape)

    def part(self, rows: Index, columns: Index, buffer: torch.Tensor | None = None) -> torch.Tensor:
        # Into the buffer or a new tensor: what is the file's stays as it is.
        values = self.values[rows, columns]
        if buffer is None:
            return values.float() * self.scale
        return buffer[: values.numel()].view(values.shape).copy_(values).mul_(self.scale)


@dataclass
class _Product:
    """scale · up @ down, transposed if that makes it taller than wide."""

    up: torch.Tensor
    down: torch.Tensor
    scale: float

    def __post_init__(self) -> None:
        if self.up.shape[0] < self.down.shape[1]:
            self.up, self.down = self.down.T, self.up.T
        self.down = self.down.float() * self.scale
        self.shape = (self.up.shape[0], self.down.shape[1])

    def part(self, rows: Index, columns: Index, buffer: torch.Tensor | None = None) -> torch.Tensor:
        up, down = self.up[rows].float(), self.down[:, columns]
        count = up.shape[0] * down.shape[1]
        if buffer is None or count > len(buffer):
            return up @ down
        return torch.mm(up, down, out=buffer[:count].view(up.shape[0], down.shape[1]))


@dataclass
class _Hadamard:
    """Two matrices of one shape, entry by entry."""

    one: _Product
    other: _Product

    def __post_init__(self) -> None:
        self.shape = self.one.shape

    def part(self, rows: Index, columns: Index, buffer: torch.Tensor | None = None) -> torch.Tensor:
        return self.one.part(rows, columns, buffer).mul_(self.other.part(rows, columns))


_Matrix = _Given | _Product | _Hadamard


def _lora(parts: Mapping[str, torch.Tensor], scale: float) -> _Product:
    up, down = parts["up"].flatten(1), parts["down"].flatten(1)
    if "mid" in parts:  # CP form: the core belongs to the inner side
        down = torch.einsum("nmkl,mi->nikl", parts["mid"].float(), down.float()).flatten(1)
    return _Product(up, down, scale)


def _factor(
    parts: Mapping[str, torch.Tensor], name: str, core: str, scale: float
) -> _Given | _Product:
    """One factor of a LoHa or LoKr: given, decomposed, or decomposed with a core."""
    if name in parts:
        return _Given(parts[name], scale)
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    if core in parts:
        b = torch.einsum("pqkl,qi->pikl", parts[core].float(), b.float()).flatten(1)
        return _Product(a.T, b, scale)
    return _Product(a, b, scale)
