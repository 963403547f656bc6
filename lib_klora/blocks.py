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

from .lora_file import NOT_IN_DELTA, FusedLayer, Layer

BLOCK_CPU = 2**18
"""Entries in one block: 1 MiB, which stays in the processor's cache from the matmul to the last
look at it. With 2^20 the whole analysis of a rank 8 pair takes 1.3 times as long."""
BLOCK_GPU = 2**19
"""2 MiB: few kernel launches to wait for, and a block, a mask, the positions of all its entries
(CUDA stores them to index by a mask, eight bytes each) and the entries stay below 16 MiB."""
FACTOR = 2**18
"""Entries of a factor, or of a core times a factor, that are in fp32 at a time: 1 MiB. The smaller
factor of most layers has less and is made once (1280 columns of rank 204)."""
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
        for part in _row_ranges(matrix, size):
            yield matrix.part(part, _ALL, buffer).abs_()
        del matrix  # before the next one is made


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


def _row_ranges(matrix: _Matrix, size: int) -> Iterator[slice]:
    """All rows, as many at a time as have at most ``size`` entries, in ΔW and in the factors."""
    rows = matrix.shape[0]
    step = max(1, size // matrix.row_size)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


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
    # A tensor keeps its dtype and becomes fp32 part by part.
    parts = {
        name: tensor.to(device)
        for name, tensor in layer.tensors.items()
        if name not in NOT_IN_DELTA
    }
    if layer.kind == "full":
        yield _Stored(parts["diff"], layer.scale)
    elif layer.kind == "LoHa":
        one, other = (
            _factor(parts, f"hada_w{i}", f"hada_t{i}", 1.0 if i == 2 else layer.scale)
            for i in (1, 2)
        )
        step = min(one.step, other.step)
        yield from map(_Hadamard, one.matrices(step), other.matrices(step))
    elif layer.kind == "LoKr":
        factors = [_factor(parts, f"lokr_w{i}", f"lokr_t{i}", 1.0) for i in (1, 2)]
        small, large = sorted(factors, key=lambda factor: factor.entries)
        row = torch.cat([x.part(_ALL, _ALL).reshape(1, -1) for x in small.matrices()], 1)
        buffer = torch.empty(BLOCK_CPU, dtype=torch.float32, device=device)
        for matrix in large.matrices():
            for rows in _row_ranges(matrix, BLOCK_CPU):
                column = matrix.part(rows, _ALL, buffer).reshape(-1, 1)
                yield from _Factors(column, row, layer.scale).matrices()
    else:  # LoRA and DoRA
        up, down = parts["up"].flatten(1), parts["down"].flatten(1)
        yield from _Factors(up, down, layer.scale, parts.get("mid")).matrices()


def _factor(
    parts: Mapping[str, torch.Tensor], name: str, core: str, scale: float
) -> _Stored | _Factors:
    """One factor of a LoHa or LoKr: given, decomposed, or decomposed with a core."""
    if name in parts:
        return _Stored(parts[name], scale)
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    return _Factors(a.T if core in parts else a, b, scale, parts.get(core))


@dataclass
class _Factors:
    """scale · up @ down, made a few columns at a time.

    With a core, scale · Σ up[o, p] · core[p, q, k, l] · down[q, i]: the core belongs to the inner
    side, and the columns are i, k and l in any order. Without one it is transposed if that makes
    it taller than wide.
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float
    core: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.core is None and self.up.shape[0] < self.down.shape[1]:
            self.up, self.down = self.down.T, self.up.T
        self.kernel = 1 if self.core is None else self.core[0, 0].numel()
        self.entries = self.up.shape[0] * self.down.shape[1] * self.kernel
        # Columns of ``down`` that are made at a time.
        tallest = max(self.down.shape[0], self.up.shape[1] * self.kernel)
        self.step = max(1, FACTOR // tallest)

    def matrices(self, step: int | None = None) -> Iterator[_Product]:
        """The columns, from ``step`` of ``down`` at a time."""
        step = step or self.step
        for start in range(0, self.down.shape[1], step):
            yield _Product(self.up, self._inner(slice(start, start + step)))

    def _inner(self, columns: slice) -> torch.Tensor:
        """scale · down or scale · core × down at these columns of ``down``, in fp32."""
        down = self.down[:, columns].to(torch.float32, copy=True).mul_(self.scale)
        if self.core is None:
            return down
        count = len(self.core)
        inner = down.new_empty(count * self.kernel, down.shape[1])
        step = max(1, FACTOR // 4 // self.core[0].numel())  # it is there twice, in another order
        for start in range(0, count, step):
            core = self.core[start : start + step].flatten(2).mT.flatten(0, 1).float()
            place = start * self.kernel
            torch.mm(core, down, out=inner[place : place + len(core)])
        return inner.view(count, -1)


@dataclass
class _Stored:
    """A matrix that the file holds as such, seen as one column."""

    values: torch.Tensor
    scale: float

    def __post_init__(self) -> None:
        self.values = self.values.reshape(-1, 1)
        self.shape = tuple(self.values.shape)
        self.entries, self.row_size = self.shape

    def matrices(self) -> Iterator[_Stored]:
        yield self

    def part(self, rows: Index, columns: Index, buffer: torch.Tensor | None = None) -> torch.Tensor:
        # Into the buffer or a new tensor: the file's own is not changed.
        values = _at(self.values, (rows, columns))
        if buffer is None:
            return values.float() * self.scale
        return buffer[: values.numel()].view(values.shape).copy_(values).mul_(self.scale)


@dataclass
class _Product:
    """up @ down; ``down`` is in fp32."""

    up: torch.Tensor
    down: torch.Tensor

    def __post_init__(self) -> None:
        self.shape = (self.up.shape[0], self.down.shape[1])
        self.row_size = max(self.down.shape)

    def part(self, rows: Index, columns: Index, buffer: torch.Tensor | None = None) -> torch.Tensor:
        up, down = _at(self.up, rows).float(), self.down[:, columns]
        count = up.shape[0] * down.shape[1]
        if buffer is None or count > len(buffer):
            return up @ down
        return torch.mm(up, down, out=buffer[:count].view(up.shape[0], down.shape[1]))


@dataclass
class _Hadamard:
    """Two matrices of one shape, entry by entry.

    ``spare`` is the other's buffer: with a new one per block, the C library would hold on to
    several old ones.
    """

    one: _Product
    other: _Product
    spare: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.shape = self.one.shape
        self.row_size = max(self.one.row_size, self.other.row_size)

    def part(self, rows: Index, columns: Index, buffer: torch.Tensor | None = None) -> torch.Tensor:
        if buffer is not None and self.spare is None:
            self.spare = torch.empty_like(buffer)
        one = self.one.part(rows, columns, buffer)
        return one.mul_(self.other.part(rows, columns, self.spare))


_Matrix = _Stored | _Product | _Hadamard


def _at(values: torch.Tensor, index: Index | tuple[Index, Index]) -> torch.Tensor:
    if values.element_size() == 1:  # some torch (2.3) cannot index fp8, but all can index bytes
        return values.view(torch.uint8)[index].view(values.dtype)
    return values[index]
