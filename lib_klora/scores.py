"""The scores of a pair: S_c, S_s and Σ|ΔW| of every paired layer, computed once per pair."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from . import klora
from .errors import KLoraError
from .pair import Pair


@dataclass(frozen=True)
class Scores:
    """One entry per paired layer, in the pair's order; fp64 arrays of shape [layers].

    Attributes:
        s_content, s_style: S_c and S_s, the top-K sums (Eq. 3, 4).
        abs_content, abs_style: Σ|ΔW|, what γ is made of (Eq. 9).
    """

    s_content: np.ndarray
    s_style: np.ndarray
    abs_content: np.ndarray
    abs_style: np.ndarray

    def gamma(self, kind: str) -> float:
        """γ, ``kind`` as in the setting: “paper” (Eq. 9) or “authors”.

        1 where nothing is paired. Raises KLoraError if a file is zero in all paired layers.
        """
        if not len(self.s_content):
            return 1.0
        for role, sums in (("content", self.abs_content), ("style", self.abs_style)):
            if not sums.any():
                raise KLoraError(
                    f"The {role} LoRA is zero in every layer that both files have, so there is "
                    f"nothing to choose from: choose another file."
                )
        rule = klora.gamma_paper if kind == "paper" else klora.gamma_authors
        return rule(self.abs_content.tolist(), self.abs_style.tolist())


def compute_scores(pair: Pair, device: torch.device | str = "cpu") -> Scores:
    """The scores of all paired layers, one layer in memory at a time, on ``device``."""
    rows = np.empty((len(pair.paired), 4))
    with torch.inference_mode():
        for row, layer in zip(rows, pair.paired, strict=True):
            for column, side in ((0, layer.content), (1, layer.style)):
                delta = side.delta(device)
                row[column] = klora.top_k_sum(delta, layer.k)
                row[column + 2] = klora.abs_sum(delta)
    return Scores(*np.ascontiguousarray(rows.T))
