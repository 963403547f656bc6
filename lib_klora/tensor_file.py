"""A LoRA file on disk → its tensors, each read when it is asked for.

Both hosts keep the factors of every LoRA in use, so what is read here comes on top. Every page
touched in a mapped file counts as memory until the file is closed; so it is closed and reopened as
reading goes on, and only one file is open at a time.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from safetensors import SafetensorError, safe_open

from .errors import KLoraError

AT_ONCE = 2**24
"""Bytes read from one opening of a .safetensors file. Opening one takes 3 ms, reading as much as
this and looking at it 10 ms (247 MiB in 2364 tensors, on the machine of docs/PERFORMANCE.md)."""

Opening = tuple[Iterable[str], Callable[[str], torch.Tensor]]
"""The keys of a file, and what reads the tensor of a key while the file is open."""


class TensorFile(Mapping[str, torch.Tensor]):
    """The tensors of a file by key, on the CPU.

    Args:
        open_file: opens the file; closed by letting go of what it returns.
        at_once: bytes to be read from one opening; for a file that can only be read as a whole,
            leave it out.

    Asking for a tensor raises KLoraError if it cannot be read, or the file is not what it was.
    """

    _last: Callable[[], TensorFile | None] = lambda: None
    """Weak reference to the file that may be open."""

    def __init__(
        self, path: str | os.PathLike, open_file: Callable[[], Opening], at_once: float = math.inf
    ) -> None:
        self._path, self._open_file, self._at_once = path, open_file, at_once
        self._get: Callable[[str], torch.Tensor] | None = None
        self._bytes_left = 0.0
        self._version: tuple[int, int] | None = None
        self._keys: Mapping[str, None] = {}
        self._reopen()

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self._keys:
            raise KeyError(key)
        get = self._get if self._bytes_left > 0 else None
        tensor = (get or self._reopen())(key)
        self._bytes_left -= tensor.nbytes
        return tensor

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def read_all(self) -> dict[str, torch.Tensor]:
        """Copies of all tensors, for a host that keeps them. If a mapped file is overwritten or its
        disk goes away, the next access kills the process, and on Windows nobody can save to it.
        The copies share one block of memory: many small ones would fragment it."""
        sizes = self._sizes()
        memory = torch.empty(sum(map(_aligned, sizes.values())), dtype=torch.uint8)
        tensors, start = {}, 0
        for key, size in sizes.items():
            tensor = self[key]
            place = memory[start : start + size].view(tensor.dtype).view(tensor.shape)
            tensors[key] = place.copy_(tensor)
            start += _aligned(size)
        self.release()
        return tensors

    def _sizes(self) -> dict[str, int]:
        """Bytes of each tensor, from one opening; nothing is read."""
        get = self._reopen()
        return {key: get(key).nbytes for key in self._keys}

    def release(self) -> None:
        """Closes the file, until the next tensor is asked for."""
        self._get, self._bytes_left = None, 0.0

    def _reopen(self) -> Callable[[str], torch.Tensor]:
        last = TensorFile._last()
        if last is not None:
            last.release()
        TensorFile._last = weakref.ref(self)
        keys, get = self._open_file()
        status = read_or_raise(self._path, os.stat, self._path)
        version = status.st_mtime_ns, status.st_size
        if self._version is None:
            self._version, self._keys = version, dict.fromkeys(keys)
        elif version != self._version:
            raise KLoraError(
                f"“{os.path.basename(self._path)}” was replaced while it was being read: try again."
            )
        self._get, self._bytes_left = get, self._at_once
        return get


def _aligned(size: int) -> int:
    """Bytes from the beginning of a tensor of this size to where the next one may begin."""
    return -(-size // 64) * 64  # torch's own alignment


def read_safetensors(path: str | os.PathLike) -> TensorFile:
    """The tensors of a .safetensors file.

    ``safe_open`` on purpose: a host may have wrapped ``safetensors.torch.load_file`` to rename a
    file that does not load (Forge, modules_forge/patch_basic.py).
    Raises KLoraError if the file is missing, may not be read, is truncated or no safetensors file.
    """

    def open_file() -> Opening:
        file = read_or_raise(path, _open, os.fspath(path))
        return file.keys(), lambda key: read_or_raise(path, file.get_tensor, key)

    return TensorFile(path, open_file, AT_ONCE)


def _open(path: str) -> safe_open:
    with open(path, "rb"):  # tells why it cannot be opened; to safe_open, there is no such file
        return safe_open(path, "pt")


def read_or_raise(path: str | os.PathLike, read: Callable, *args: str):
    """What ``read`` returns. Raises KLoraError if the file at ``path`` cannot be read."""
    try:
        return read(*args)
    # AttributeError: a number type that this torch has not, such as uint16 before 2.3.
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as error:
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
