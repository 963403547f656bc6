"""NP-LoRA (arXiv 2511.11051): both LoRAs, with the content taken off the style's directions.

In a layer that both files have, the columns of Q are an orthonormal basis of the row space of ΔW_s,
the inputs that the style answers to:

    ΔW = ΔW_s + ΔW_c · (I − μ/(1+μ) · Q·Qᵀ)

Only factors change, A_c ← A_c − μ/(1+μ) · (A_c·Q) · Qᵀ, so the content's rank stays and a host
reads it like any LoRA. It is the same at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .lora_file import FusedLayer, Layer
from .pair import Pair

MU = 0.5
"""How hard the projection is: 0 is Direct merge, infinite leaves nothing in the style's row space.
The paper's value."""
_TAKEN_OFF = MU / (1 + MU)
_HARDLY = 0.02
"""An overlap below that is told of. Of unrelated files it is about rank / width, such as 1/200."""
_ROWS_IN = {"LoRA": "down", "full": "diff"}
"""Kind → the tensor whose rows span those of ΔW, and may be projected in its place."""


@dataclass(frozen=True)
class Projection:
    """What NP-LoRA makes of the content's file.

    Attributes:
        changed: key in the file → its new tensor, of the old one's shape and dtype.
        overlap: Σ‖ΔW_c·Q‖²_F / Σ‖ΔW_c‖²_F over the layers that were projected, 0..1: the part of
            the content's energy in the style's row space. None if that is nothing of nothing.
        left: the content's layers that stay as they are.
    """

    changed: Mapping[str, torch.Tensor]
    overlap: float | None
    left: tuple[Layer, ...]

    def notes(self, content: str, style: str) -> list[str]:
        """What to tell of it, by the names of the two files."""
        notes = []
        if self.left:
            notes.append(
                f"NP-LoRA leaves {len(self.left)} layer{'s' * (len(self.left) > 1)} of “{content}” "
                f"(such as {self.left[0].prefix}) as in Direct merge, because not both files have "
                f"LoRA factors there."
            )
        if self.overlap is not None and self.overlap < _HARDLY:
            notes.append(
                f"“{content}” and “{style}” hardly overlap ({100 * self.overlap:.1f} % of content "
                f"in the style's directions), so this is nearly Direct merge."
            )
        return notes


def project(pair: Pair, progress: Callable[[int, int], None] | None = None) -> Projection:
    """Takes the content of each paired layer off the style's row space.

    Computed in fp64, rounded to fp32 and then to the file's own dtype. Of the content, LoRAs and
    full differences can be projected; of the style, LoRAs (CP too) tell their rows.

    Args:
        progress: called with (layers done, layers in all) before each layer and at the end; it may
            raise to stop.
    """
    changed: dict[str, torch.Tensor] = {}
    left: list[Layer] = []
    inside = total = 0.0
    for done, layer in enumerate(pair.paired):
        if progress:
            progress(done, len(pair.paired))
        parts, rows = _parts(layer.content), _style_rows(layer.style)
        if rows is None or not all(_can_be_projected(part, rows) for part in parts):
            left += parts
            continue
        basis = row_space(rows)
        for part in parts:
            name = _ROWS_IN[part.kind]
            factor = part.tensors[name]
            before = factor.flatten(1).double()
            along = before @ basis
            after = before - _TAKEN_OFF * (along @ basis.T)
            key = part.key_of(name)
            changed[key] = after.float().to(factor.dtype).reshape(factor.shape)
            inside += _energy(part, along)
            total += _energy(part, before)
    if progress and pair.paired:
        progress(len(pair.paired), len(pair.paired))
    return Projection(changed, inside / total if total else None, tuple(left))


def row_space(rows: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of what the rows of a matrix span: [n, width] → [width, its rank], fp64.

    What is dependent up to fp64's precision counts once, as in ``numpy.linalg.matrix_rank``.
    """
    orthonormal, triangle = torch.linalg.qr(rows.T)
    directions, sizes, _ = torch.linalg.svd(triangle, full_matrices=False)  # the largest first
    smallest = max(rows.shape) * torch.finfo(rows.dtype).eps * sizes[:1]
    return orthonormal @ directions[:, sizes > smallest]


def _parts(layer: Layer | FusedLayer) -> tuple[Layer, ...]:
    return layer.parts if isinstance(layer, FusedLayer) else (layer,)


def _can_be_projected(part: Layer, rows: torch.Tensor) -> bool:
    if part.kind not in _ROWS_IN or "mid" in part.tensors or len(part.shape) < 2:
        return False
    return part.entries // part.shape[0] == rows.shape[1]


def _style_rows(layer: Layer | FusedLayer) -> torch.Tensor | None:
    """Rows that span those of the style's ΔW, fp64 of shape [n, width]; None where its factors do
    not tell them."""
    found = []
    for part in _parts(layer):
        if part.kind != "LoRA":
            return None
        down = part.tensors["down"].flatten(1).double()
        if "mid" in part.tensors:
            core = part.tensors["mid"].double()
            down = torch.einsum("pqkl,qi->pikl", core, down).flatten(1)
        # A layer that was never trained has an up of zeros, and so a ΔW without rows.
        found.append(down if part.tensors["up"].double().any() else down[:0])
    return torch.cat(found) if len({rows.shape[1] for rows in found}) == 1 else None


def _energy(part: Layer, rows: torch.Tensor) -> float:
    """‖ΔW·M‖²_F from the rows of the projected factor times M, fp64."""
    if part.kind == "full":
        return rows.square().sum().item()
    up = part.tensors["up"].flatten(1).double()
    return part.scale**2 * ((up.T @ up) * (rows @ rows.T)).sum().item()
