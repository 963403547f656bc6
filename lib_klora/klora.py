"""K-LoRA: Unlocking Training-Free Fusion of Any Subject and Style LoRAs (CVPR 2025).

The paper, formula by formula; torch and arithmetic only. For one layer with the content (subject)
update ΔW_c and the style update ΔW_s:

    K    = r_c · r_s                                  how many entries speak for a layer     Eq. 5
    S_c  = sum of the K largest |ΔW_c|, S_s likewise  importance of a layer                  Eq. 1-4
    γ    = Σ|ΔW_c| / Σ|ΔW_s| over all paired layers   balances files of different strength   Eq. 9
    S(t) = α·t + β                                    moves from content to style            Eq. 7
    content if S_c ≥ γ · S(t) · S_s, else style                                     Eq. 6, 8, 10

t runs from 0 at the noisiest step towards 1. The winner's whole ΔW is used, the other's not at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

ALPHA = 1.5
"""Slope of S(t), and modulus of S*(t). Raising it lets style take over sooner."""
BETA = 0.5
"""S(0). Below 1 favours content at the start; raising it shifts every step towards style."""
BETA_S_STAR = 1.3
"""β' of S* (supplement, Eq. 12)."""


def top_k(rank_content: int, rank_style: int, entries: int, multiplier: float = 1.0) -> int:
    """K = r_c · r_s (Eq. 5), times a multiplier, rounded; at least 1, at most ``entries``.

    ``entries`` is the number of entries of ΔW. A small K lets few extreme entries decide, so that
    neither subject nor style shows; a very large one loses the style (the paper's Fig. 8).
    """
    return max(1, min(round(multiplier * rank_content * rank_style), entries))


def top_k_sum(delta: torch.Tensor, k: int) -> float:
    """Sum of the ``k`` largest absolute entries of ΔW, any shape (Eq. 1-4).

    The entries are compared in fp32 and added in fp64. ``k`` must be in 1..delta.numel().
    """
    return torch.topk(delta.float().abs().flatten(), k, sorted=False).values.double().sum().item()


def abs_sum(delta: torch.Tensor) -> float:
    """Σ|ΔW| of one layer, any shape, added in fp64: the summand of γ (Eq. 9)."""
    return delta.float().abs().sum(dtype=torch.float64).item()


def gamma_paper(content: Sequence[float], style: Sequence[float]) -> float:
    """γ (Eq. 9): the ratio of the two files' Σ|ΔW|, each given layer by layer.

    Raises ZeroDivisionError if every style layer is zero.
    """
    return float(sum(content)) / float(sum(style))


def gamma_authors(content: Sequence[float], style: Sequence[float]) -> float:
    """γ as the authors' program computes it: the mean over layers of the per-layer ratio of Σ|ΔW|,
    taken again without the layers at or above three times that mean.

    Unlike Eq. 9 it weighs every layer alike and is not 1/γ when the two files are swapped. Layers
    whose style part is zero have no ratio and are left out; ZeroDivisionError if that leaves none.
    """
    ratios = [c / s for c, s in zip(content, style, strict=True) if s > 0]
    mean = sum(ratios) / len(ratios)
    kept = [ratio for ratio in ratios if ratio < 3 * mean] or ratios
    return sum(kept) / len(kept)


def scale_s(t: np.ndarray, alpha: float = ALPHA, beta: float = BETA) -> np.ndarray:
    """S(t) = α·t + β (Eq. 7), t in [0, 1]."""
    return alpha * np.asarray(t, dtype=np.float64) + beta


def scale_s_star(t: np.ndarray, alpha: float = ALPHA, beta: float = BETA_S_STAR) -> np.ndarray:
    """S*(t) = (α'·t + β') mod α with α' = α (Eq. 12 of the supplement), t in [0, 1], α > 0.

    It starts high (style), wraps to 0 (content) and climbs again, so style sets the ground first.
    """
    return scale_s(t, alpha, beta) % alpha


def scale_none(t: np.ndarray) -> np.ndarray:
    """S = 1 at every step: the paper's ablation without the scaling factor."""
    return np.ones_like(np.asarray(t, dtype=np.float64))


def chooses_content(
    s_content: np.ndarray, s_style: np.ndarray, gamma: float, scale: np.ndarray
) -> np.ndarray:
    """C(S_c, S'_s) (Eq. 6, 8, 10): True where content wins.

    Args:
        s_content, s_style: S_c and S_s, shape [layers].
        gamma: γ.
        scale: S(t) of each step, shape [steps].

    Returns:
        bool array, shape [steps, layers].
    """
    s_content, s_style = np.asarray(s_content, np.float64), np.asarray(s_style, np.float64)
    return s_content[None, :] >= gamma * np.asarray(scale)[:, None] * s_style[None, :]
