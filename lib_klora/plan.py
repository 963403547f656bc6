"""Scores × settings × steps → which LoRA at which layer and step, known before the first step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import klora
from .pair import Pair
from .scores import Scores
from .settings import Settings


@dataclass(frozen=True)
class Plan:
    """The whole choice of one sampling pass.

    Attributes:
        layers: names of the paired layers.
        content: bool, shape [steps + 1, layers]: True where content is applied. The last row is
            t = 1, for samplers that make more calls than they have steps.
        t: shape [steps + 1], the progress of each row.
        gamma: γ.
    """

    layers: tuple[str, ...]
    content: np.ndarray
    t: np.ndarray
    gamma: float

    @property
    def steps(self) -> int:
        return len(self.t) - 1

    def row(self, finished_steps: int) -> np.ndarray:
        """The choice once ``finished_steps`` steps are done: bool, shape [layers]."""
        return self.content[min(finished_steps, self.steps)]


def progress(steps: int, t0: float = 0.0) -> np.ndarray:
    """t = t₀ + (1 − t₀)·min(i/N, 1) for i = 0..N, N = ``steps``; shape [steps + 1].

    t₀ is where the pass starts: 0 for txt2img, 1 − denoising strength for img2img and hires.
    """
    return t0 + (1 - t0) * np.minimum(np.arange(steps + 1) / max(steps, 1), 1)


def make_plan(pair: Pair, scores: Scores, settings: Settings, steps: int, t0: float = 0.0) -> Plan:
    """The choice for every step of a pass of ``steps`` steps that starts at progress ``t0``."""
    t = progress(steps, t0)
    scale = {
        "S": lambda: klora.scale_s(t, settings.alpha, settings.beta),
        "S*": lambda: klora.scale_s_star(t, settings.alpha, settings.beta),
        "none": lambda: klora.scale_none(t),
    }[settings.scale]()
    gamma = scores.gamma(settings.gamma)
    content = klora.chooses_content(scores.s_content, scores.s_style, gamma, scale)
    return Plan(tuple(layer.name for layer in pair.paired), content, t, gamma)
