"""A LoRA file on disk → its tensors, each read when it is asked for.

The safetensors library checks a file's header; the numbers are read here. Its own ``get_tensor``
leaves two integers behind with every call (0.4.2 to 0.8.0): 130 KiB for the 2364 tensors of an SDXL
file, which never come back, so that a long day of ever new pairs would fill the memory. It also
maps the file: each page that is touched counts as memory until the file is closed, and one that is
saved over in the meantime ends the process.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from .errors import KLoraError


class TensorFile(Mapping[str, torch.Tensor], ABC):
    """The tensors of the file at ``path`` by key, on the CPU.

    Asking for one raises KLoraError if it cannot be read, or the file is not what it was.

    Attributes:
        changed: key → the tensor that a host is to load in the place of the file's.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = path
        self._version: tuple[int, int] | None = None
        self._keys: Mapping[str, Any] = {}
        self.changed: Mapping[str, torch.Tensor] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    @abstractmethod
    def release(self) -> None:
        """Closes the file, until the next tensor is asked for."""

    def _check_version(self, status: os.stat_result) -> None:
        version = status.st_mtime_ns, status.st_size
        if self._version is None:
            self._version = version
        elif version != self._version:
            raise KLoraError(
                f"“{os.path.basename(self._path)}” was replaced while it was being read: try again."
            )


class UnpickledFile(TensorFile):
    """A file that can only be read as a whole, by ``read``."""

    def __init__(
        self, path: str | os.PathLike, read: Callable[[], Mapping[str, torch.Tensor]]
    ) -> None:
        super().__init__(path)
        self._read = read
        self._tensors: Mapping[str, torch.Tensor] | None = None
        self._keys = dict.fromkeys(self._all())

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return self._all()[key]

    def release(self) -> None:
        self._tensors = None

    def _all(self) -> Mapping[str, torch.Tensor]:
        if self._tensors is None:
            tensors = self._read()
            self._check_version(read_or_raise(self._path, os.stat, self._path))
            self._tensors = tensors
        return self._tensors


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: bytes ``start`` to ``start + size`` of the file."""

    number_type: str
    """As safetensors calls it."""
    shape: tuple[int, ...]
    start: int
    size: int


class SafetensorsFile(TensorFile):
    """A .safetensors file.

    Raises KLoraError if it is missing, may not be read, is truncated or no safetensors file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__(path)
        self._file: BinaryIO | None = None
        self._keys: dict[str, _Place] = read_or_raise(path, self._read_header)
        self.release()

    def __getitem__(self, key: str) -> torch.Tensor:
        place = self._keys[key]
        memory = torch.empty(place.size, dtype=torch.uint8)
        return read_or_raise(self._path, self._read, place, memory)

    def __del__(self) -> None:
        self.release()

    def read_all(self) -> dict[str, torch.Tensor]:
        """All tensors, the changed ones among them, for a host that keeps them; the others in one
        block of memory, which many small ones would fragment."""
        memory = torch.empty(
            sum(_aligned(place.size) for place in self._keys.values()), dtype=torch.uint8
        )
        tensors, start = {}, 0
        for key, place in self._keys.items():
            part = memory[start : start + place.size]
            tensors[key] = read_or_raise(self._path, self._read, place, part)
            start += _aligned(place.size)
        self.release()
        return {**tensors, **self.changed}

    def release(self) -> None:
        file, self._file = getattr(self, "_file", None), None
        if file is not None:
            file.close()

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self._file = open(self._path, "rb")  # noqa: SIM115 - closed by release
        self._check_version(os.fstat(self._file.fileno()))
        return self._file

    def _read_header(self) -> dict[str, _Place]:
        file = self._opened()  # first: it tells why not; to safe_open, there is no such file
        with safe_open(os.fspath(self._path), "pt") as checked:
            keys = list(checked.keys())
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        places = {}
        for key in keys:
            start, end = header[key]["data_offsets"]
            shape = tuple(header[key]["shape"])
            places[key] = _Place(header[key]["dtype"], shape, 8 + size + start, end - start)
        return places

    def _read(self, place: _Place, memory: torch.Tensor) -> torch.Tensor:
        """A tensor in ``memory``, bytes that begin where any number may."""
        dtype = getattr(torch, _NUMBER_TYPES.get(place.number_type, ""), None)
        if dtype is None:
            raise KLoraError(
                f"“{os.path.basename(self._path)}” cannot be read (the torch that is installed has "
                f"no numbers of type {place.number_type}): choose another file."
            )
        file = self._opened()
        file.seek(place.start)
        if file.readinto(memory.numpy()) != place.size:
            raise OSError("it ends too early")
        self._check_version(os.fstat(file.fileno()))
        return memory.view(dtype).view(place.shape)


_NUMBER_TYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
    "I32": "int32", "U64": "uint64", "I64": "int64", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip
"""What safetensors calls a type → what torch does."""


def _aligned(size: int) -> int:
    """Bytes from the beginning of a tensor of this size to where the next one may begin."""
    return -(-size // 64) * 64  # torch's own alignment


def read_or_raise(path: str | os.PathLike, read: Callable, *args):
    """What ``read`` returns. Raises KLoraError if the file at ``path`` cannot be read."""
    try:
        return read(*args)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise KLoraError(
            f"“{os.path.basename(path)}” cannot be read ({reason}): {_what_to_do(path, error)}"
        ) from error


def _what_to_do(path: str | os.PathLike, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "allow it in the file's permissions, or choose another file."
    if isinstance(error, OSError):
        return "check that it is still there and its disk works, then try again."
    if any("\udc80" <= letter <= "\udcff" for letter in os.fspath(path)):
        return "its name, or that of a folder, is not UTF-8: rename it."
    return "the file is damaged or not a safetensors file; download it again."
