"""The scores of each LoRA file, kept on disk.

One entry per file, named after its SHA-256 and ``VERSION``. It holds the top-K sums of the layers
that were needed so far, for every partner, so a second start reads a megabyte instead of
multiplying matrices. An entry that is damaged, truncated, of another version or of another file
counts as missing and is written anew. Two processes may use one folder: a file appears there
complete or not at all, and the last one wins.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import get_log

VERSION = 2
"""Of the analysis. To be raised whenever the same file would give other numbers."""
LIMIT = 128 * 2**20
"""Bytes of all entries together, about 100 SDXL files."""

_log = get_log()


@dataclass(frozen=True)
class LayerTable:
    """One layer of one file.

    Attributes:
        k: int64, ascending.
        sums: fp64, the sum of the k largest |ΔW| for each of them.
        total: Σ|ΔW|.
        energy: ‖ΔW‖²_F.
    """

    k: np.ndarray
    sums: np.ndarray
    total: float
    energy: float

    def has(self, k: int) -> bool:
        place = int(np.searchsorted(self.k, k))
        return place < len(self.k) and int(self.k[place]) == k

    def at(self, k: int) -> float:
        """S at ``k``, which must be one of the table's."""
        return float(self.sums[np.searchsorted(self.k, k)])


class ScoreCache:
    """The tables in ``folder``, which need not exist yet; at most ``limit`` bytes.

    No method fails because of the disk: a cache that cannot be read is empty, one that cannot be
    written stays as it is, and the log says so.
    """

    def __init__(self, folder: str | os.PathLike, limit: int = LIMIT) -> None:
        self.folder = Path(folder)
        self.limit = limit

    def load(self, sha256: str) -> dict[str, LayerTable]:
        """The tables of a file by layer (see ``scores.table_key``); empty if there are none."""
        path = self._path(sha256)
        try:
            with np.load(path, allow_pickle=False) as entry:
                tables = _unpack({name: entry[name] for name in entry.files}, sha256)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except Exception as error:  # whatever a damaged file makes of numpy and zipfile
            _log.info("The scores in %s cannot be used (%s): they are computed anew.", path, error)
            return {}
        with suppress(OSError):  # a folder that one may only read
            os.utime(path)  # used now: the entries used longest ago go first
        return tables

    def save(self, sha256: str, tables: Mapping[str, LayerTable]) -> None:
        """Replaces the entry of a file, and removes old entries above the limit."""
        path = self._path(sha256)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            try:
                with open(handle, "wb") as file:
                    file.write(_pack(tables, sha256))
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
            self._remove_oldest(keep=path)
        except OSError as error:
            _log.info("The scores could not be kept in %s (%s).", self.folder, error)

    def size(self) -> int:
        """Bytes of all entries."""
        return sum(size for _, size, _ in self._entries())

    def clear(self) -> int:
        """Removes all entries; how many could not be removed."""
        return sum(not _removed(path) for _, _, path in self._entries())

    def _path(self, sha256: str) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ValueError(f"{sha256!r} is no SHA-256")
        return self.folder / f"{sha256}-{VERSION}.npz"

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of every entry, the oldest first."""
        entries = []
        for pattern in ("*.npz", "*.tmp"):
            for path in self.folder.glob(pattern):
                try:
                    status = path.stat()
                except OSError:  # another process was quicker
                    continue
                entries.append((status.st_mtime, status.st_size, path))
        return sorted(entries)

    def _remove_oldest(self, keep: Path) -> None:
        size = self.size()
        for used, length, path in self._entries():
            abandoned = path.suffix == ".tmp" and used < time.time() - 3600
            if abandoned or (size > self.limit and path.suffix != ".tmp" and path != keep):
                size -= length * _removed(path)


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a whole file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _removed(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:  # gone already, or in use on Windows
        return False
    return True


def _pack(tables: Mapping[str, LayerTable], sha256: str) -> bytes:
    """An .npz file of plain arrays: the layers' names, and their tables one behind another."""
    arrays = {
        "made_for": np.array([f"{sha256} {VERSION}"]),
        "names": np.array(list(tables), dtype=np.str_),
        "lengths": np.array([len(table.k) for table in tables.values()], np.int64),
        "totals": np.array([table.total for table in tables.values()], np.float64),
        "energies": np.array([table.energy for table in tables.values()], np.float64),
        "k": np.concatenate([np.empty(0, np.int64), *(t.k for t in tables.values())]),
        "sums": np.concatenate([np.empty(0), *(t.sums for t in tables.values())]),
    }
    file = io.BytesIO()  # numpy leaves a zip file open on a disk that is full
    np.savez(file, **arrays)
    return file.getvalue()


def _unpack(entry: Mapping[str, np.ndarray], sha256: str) -> dict[str, LayerTable]:
    """The inverse of ``_pack``. Raises ValueError or KeyError if anything is not as it must be."""

    def check(good: bool) -> None:
        if not good:
            raise ValueError("the entry is damaged, or another file's")

    made_for, names, lengths = (entry[name] for name in ("made_for", "names", "lengths"))
    totals, energies, k, sums = (entry[name] for name in ("totals", "energies", "k", "sums"))
    check(made_for.tolist() == [f"{sha256} {VERSION}"] and names.ndim == 1)
    check(names.dtype.kind == "U" and lengths.dtype == k.dtype == np.int64)
    check(totals.dtype == energies.dtype == sums.dtype == np.float64)
    check(
        names.shape == lengths.shape == totals.shape == energies.shape
        and k.shape == sums.shape == (len(k),)
    )
    check(bool((lengths > 0).all()) and lengths.sum() == len(k))
    ends = np.cumsum(lengths)
    inner = np.ones(len(k), bool)
    inner[ends - lengths] = False  # the first of each layer follows on nothing
    check(bool((k > 0).all() and (np.diff(k, prepend=0)[inner] > 0).all()))
    check(all(bool(np.isfinite(x).all() and (x >= 0).all()) for x in (totals, energies, sums)))
    check(bool((np.diff(sums, prepend=0)[inner] >= 0).all()))
    check(bool((sums <= np.repeat(totals, lengths) * (1 + 1e-6)).all()))
    return {
        name: LayerTable(k[end - length : end], sums[end - length : end], total, energy)
        for name, end, length, total, energy in zip(
            *(x.tolist() for x in (names, ends, lengths, totals, energies)), strict=True
        )
    }
