"""The scores of a pair: S_c, S_s, Σ|ΔW| and ‖ΔW‖² of each layer, at about the matmul's speed.

The plain way is ``klora.top_k_sum`` and ``klora.abs_sum`` of ``Layer.delta``. The way taken here
gives the same numbers, which a test proves, in a fraction of the time and memory:

1. ΔW is made in blocks that are looked at once and forgotten (``blocks``).
2. Entries above a threshold τ are kept. τ is read off a small sample, to be a little below the
   K-th largest entry.
3. If too many are kept, the smallest go and τ rises. If fewer than K are kept, τ was too high:
   repeat with a lower one, finally with 0. So the sample decides the time, never the result.
4. The kept entries are sorted and added up in fp64; the largest K yields the sums of all others.

The sums of one layer at K = r·1, r·2, …, r·128 serve every partner of up to rank 128. They depend
on nothing but the file, so ``ScoreCache`` keeps them on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from . import klora
from .blocks import blocks, sample
from .errors import KLoraError, get_log
from .lora_file import FusedLayer, Layer
from .pair import Pair
from .score_cache import LayerTable, ScoreCache
from .tag import CONTENT, ROLES, STYLE

_log = get_log()

PARTNER_RANKS = np.arange(1, 129)
"""The ranks that a table is made for."""

_MOST_KEPT = 2**18
"""Most entries kept, to bound the memory: K for two files of rank 512. A larger K, which takes a
multiplier far above the paper's 1, is counted instead."""
_SLACK = 2**16
"""Entries that may be kept beyond 2·K before the smallest go."""
_CHUNK = 2**15
"""Entries that are counted at a time."""
_MOST_KS = 1024
"""Most K of one layer in a table; beyond that it starts again."""


@dataclass(frozen=True)
class Scores:
    """One entry per paired layer, in the pair's order; fp64 arrays of shape [layers].

    Attributes:
        s_content, s_style: S_c and S_s, the top-K sums (Eq. 3, 4).
        abs_content, abs_style: Σ|ΔW|, what γ is made of (Eq. 9).
        energy_content, energy_style: ‖ΔW‖²_F, what EST-LoRA compares.
    """

    s_content: np.ndarray
    s_style: np.ndarray
    abs_content: np.ndarray
    abs_style: np.ndarray
    energy_content: np.ndarray
    energy_style: np.ndarray

    def gamma(self, kind: str) -> float:
        """γ, ``kind`` as in the setting: “paper” (Eq. 9) or “authors”.

        1 where nothing is paired. Raises KLoraError if a file is zero in all paired layers.
        """
        if not len(self.s_content):
            return 1.0
        for role, sums in ((CONTENT, self.abs_content), (STYLE, self.abs_style)):
            if not sums.any():
                raise KLoraError(
                    f"The {role} LoRA is zero in every layer that both files have, so there is "
                    f"nothing to choose from: choose another file."
                )
        rule = klora.gamma_paper if kind == "paper" else klora.gamma_authors
        return rule(self.abs_content.tolist(), self.abs_style.tolist())


def compute_scores(
    pair: Pair,
    device: torch.device | str = "cpu",
    *,
    progress: Callable[[int, int], None] | None = None,
    cache: ScoreCache | None = None,
    sha256: tuple[str | None, str | None] = (None, None),
) -> Scores:
    """The scores of all paired layers, one block in memory at a time, on ``device``.

    If the device fails (its memory is full, or it lacks an operation), the CPU takes over.

    Args:
        progress: called with (layers done, layers in all) before the first layer and after each,
            unless everything was cached. It may raise to stop; what was done until then is cached.
        cache: where finished layers are kept, under the files' SHA-256. Layers that it has need
            no tensors.
        sha256: of the content and the style file; None is not cached.

    Raises KLoraError if a layer's ΔW is too large for fp32.
    """
    sides = [
        [(layer.content, layer.k) for layer in pair.paired],
        [(layer.style, layer.k) for layer in pair.paired],
    ]
    tables = [cache.load(key) if cache and key else {} for key in sha256]
    if cache and sha256[0] and sha256[0] == sha256[1]:
        tables[1] = tables[0]
    work = [
        (role, table, layer, k)
        for role, table, side in zip(ROLES, tables, sides, strict=True)
        for layer, k in side
        if not _has(table, layer, k)
    ]
    try:
        _fill(work, device, progress, for_every_partner=cache is not None)
    finally:
        if cache:
            for key, table in dict(zip(sha256, tables, strict=True)).items():
                if key and any(changed is table for _, changed, _, _ in work):
                    cache.save(key, table)
    found = [
        [(table[table_key(layer)], k) for layer, k in side]
        for table, side in zip(tables, sides, strict=True)
    ]
    return Scores(
        *(np.array([row.at(k) for row, k in rows], np.float64) for rows in found),
        *(np.array([row.total for row, _ in rows], np.float64) for rows in found),
        *(np.array([row.energy for row, _ in rows], np.float64) for rows in found),
    )


def _fill(
    work: list[tuple[str, dict[str, LayerTable], Layer | FusedLayer, int]],
    device: torch.device | str,
    progress: Callable[[int, int], None] | None,
    for_every_partner: bool,
) -> None:
    """Puts each layer's row, with at least its K, into its table."""
    with _exact_arithmetic(device):
        for done, (role, table, layer, k) in enumerate(work):
            if progress:
                progress(done, len(work))
            if _has(table, layer, k):  # one file in both roles
                continue
            ks = np.array([k])
            if for_every_partner:
                ks = _worth_keeping(table.get(table_key(layer)), layer, k)
            try:
                row = _analyse(role, layer, ks, device)
            except (RuntimeError, TypeError) as error:  # TypeError: MPS has no fp64 and no fp8
                if torch.device(device).type == "cpu":
                    raise
                _log.info("Comparing layers on %s failed (%s): the CPU goes on.", device, error)
                device = "cpu"
                row = _analyse(role, layer, ks, device)
            table[table_key(layer)] = row
    if progress and work:
        progress(len(work), len(work))


def table_key(layer: Layer | FusedLayer) -> str:
    """A layer's name in its file's table; a fused one is named after its parts."""
    return "+".join(p.name for p in layer.parts) if isinstance(layer, FusedLayer) else layer.name


def partner_ks(layer: Layer | FusedLayer) -> np.ndarray:
    """K with a partner of rank 1, 2, …, 128, as ``pair_files`` has it with the paper's multiplier.

    Without the K that are too many to keep; int64, ascending, each once.
    """
    ks = PARTNER_RANKS * (PARTNER_RANKS if layer.rank is None else layer.rank)
    ks = np.unique(np.minimum(ks, layer.entries))
    return ks[ks <= _MOST_KEPT]


def _has(table: dict[str, LayerTable], layer: Layer | FusedLayer, k: int) -> bool:
    known = table.get(table_key(layer))
    return known is not None and known.has(k)


def _worth_keeping(known: LayerTable | None, layer: Layer | FusedLayer, k: int) -> np.ndarray:
    """``k``, those of every partner, and those that the table has already; ascending."""
    kept = known.k if known and len(known.k) < _MOST_KS else []
    return np.unique(np.concatenate([[k], partner_ks(layer), kept]).astype(np.int64))


def _analyse(
    role: str, layer: Layer | FusedLayer, ks: np.ndarray, device: torch.device | str
) -> LayerTable:
    """The top-K sums at every K of ``ks`` (ascending, 1..entries), Σ|ΔW| and ‖ΔW‖²_F."""
    kept, total, energy = _largest(layer, int(ks[ks <= _MOST_KEPT].max(initial=1)), device)
    if not (math.isfinite(total) and math.isfinite(energy)):
        raise KLoraError(
            f"The {role} LoRA's numbers are too large to compute with in layer {layer.name}: the "
            f"training went wrong or the file is damaged, choose another file."
        )
    sums = np.zeros(len(ks))
    if len(kept):
        running = np.cumsum(kept, dtype=np.float64)
        sums[:] = running[np.minimum(ks, len(running)) - 1]
    for i in np.flatnonzero(ks > _MOST_KEPT):
        sums[i] = total if ks[i] >= layer.entries else _sum_by_counting(layer, int(ks[i]), device)
    # The total is rounded otherwise, and a table's sums must not fall.
    return LayerTable(ks, np.maximum.accumulate(sums), total, energy)


def _largest(
    layer: Layer | FusedLayer, k: int, device: torch.device | str
) -> tuple[np.ndarray, float, float]:
    """The ``k`` largest entries of |ΔW| (fp32, descending; fewer if the rest is zero), Σ|ΔW| and
    ‖ΔW‖²_F."""
    for tau in _thresholds(layer, k, device):
        kept, total, energy = _above(layer, tau, k, device)
        if len(kept) >= k:
            break
    return np.sort(kept)[::-1][:k], total, energy


def _thresholds(layer: Layer | FusedLayer, k: int, device: torch.device | str) -> Iterator[float]:
    """Guesses, from a sample, of what is a little below the k-th largest entry; then 0."""
    entries = np.sort(sample(layer, device).cpu().numpy())[::-1]
    expected = k / layer.entries * len(entries)
    # Keeping half too many costs 1 % of a layer's time; a second pass costs all of it again.
    place = 1.5 * expected + 4 * math.sqrt(expected) + 4
    while place < len(entries) and entries[int(place)] > 0:
        yield float(entries[int(place)])
        place *= 4
    yield 0.0


def _above(
    layer: Layer | FusedLayer, tau: float, k: int, device: torch.device | str
) -> tuple[np.ndarray, float, float]:
    """All entries of |ΔW| above ``tau``, or at least the ``k`` largest if they are many; Σ|ΔW|;
    ‖ΔW‖²_F."""
    kept, count, total, energy = [], 0, 0.0, 0.0
    for block in blocks(layer, device):
        # fp32 within a row, fp64 from row to row.
        total += block.sum(1).cpu().numpy().sum(dtype=np.float64)
        energy += np.square(block.norm(dim=1).cpu().numpy(), dtype=np.float64).sum()
        kept.append(_select(block, tau))
        count += len(kept[-1])
        if count > 2 * k + _SLACK:
            kept = [_only_largest(kept, k)]
            # Entries equal to this one are not needed any more: there are k without them.
            tau, count = float(kept[0].min()), k
    return np.concatenate(kept), float(total), float(energy)


def _only_largest(parts: list[np.ndarray], k: int) -> np.ndarray:
    entries = np.concatenate(parts)
    entries.partition(len(entries) - k)
    return entries[-k:].copy()  # a view would hold the others as well


def _select(block: torch.Tensor, tau: float) -> np.ndarray:
    entries = block.reshape(-1)  # a GPU stores one position per dimension
    if block.device.type != "cpu":
        return entries[entries > tau].cpu().numpy()
    entries = entries.numpy()
    return entries[entries > tau]  # in numpy: several times faster than torch's boolean index


def _sum_by_counting(layer: Layer | FusedLayer, k: int, device: torch.device | str) -> float:
    """The top-K sum for a K too large to keep the entries: by counting, in bounded memory.

    Non-negative floats sort like their bits. The first pass counts and sums by the upper half of
    the bits, which gives the bin that holds the K-th entry. The second pass counts the lower half
    within that bin.
    """
    counts, sums = np.zeros(2**15, np.int64), np.zeros(2**15)
    for values in _chunks(layer, device):
        upper = values.view(np.int32) >> 16
        counts += np.bincount(upper, minlength=2**15)
        sums += np.bincount(upper, values, minlength=2**15)
    above = np.cumsum(counts[::-1])[::-1] - counts  # entries in higher bins
    edge = int(np.flatnonzero(above < k)[0])
    lower = np.zeros(2**16, np.int64)
    for values in _chunks(layer, device):
        bits = values.view(np.int32)
        lower += np.bincount(bits[bits >> 16 == edge] & 0xFFFF, minlength=2**16)
    values = ((edge << 16) + np.arange(2**16, dtype=np.int32)).view(np.float32).astype(np.float64)
    lower, values = lower[::-1], values[::-1]
    taken = np.clip(k - above[edge] - (np.cumsum(lower) - lower), 0, lower)
    return float(sums[edge + 1 :].sum() + (taken * values).sum())


def _chunks(layer: Layer | FusedLayer, device: torch.device | str) -> Iterator[np.ndarray]:
    """|ΔW| in pieces so small that the copies ``bincount`` makes do not matter."""
    for block in blocks(layer, device):
        values = block.cpu().numpy().reshape(-1)
        for start in range(0, len(values), _CHUNK):
            yield values[start : start + _CHUNK]


@contextmanager
def _exact_arithmetic(device: torch.device | str) -> Iterator[None]:
    """fp32 is fp32 in here: a host may calculate under autocast, or let matmuls round to TF32."""
    with (
        _exact_matmuls(),
        torch.inference_mode(),
        _no_autocast("cpu"),
        _no_autocast(torch.device(device).type),
    ):
        yield


@contextmanager
def _exact_matmuls() -> Iterator[None]:
    if torch.__version__ < (2, 9):
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    # It complains if the switch above is read after one of these was set.
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            # What it inherited it reports as its own: written back, it would stop inheriting.
            backend.fp32_precision = "none"
            if backend.fp32_precision != value:
                backend.fp32_precision = value


def _no_autocast(device_type: str) -> AbstractContextManager:
    try:
        return torch.autocast(device_type, enabled=False)
    except (RuntimeError, AssertionError, AttributeError):  # a device that has none, in this torch
        return nullcontext()
