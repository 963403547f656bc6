"""Scores × settings × steps → which LoRA at which layer and step, known before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from . import klora
from .methods import BITS, METHODS, RuleInput
from .pair import Pair
from .scores import Scores
from .settings import Settings
from .tag import CONTENT, STYLE


@dataclass(frozen=True)
class Plan:
    """The whole choice of one sampling pass.

    Attributes:
        layers: names of the paired layers.
        choice: uint8, shape [steps + 1, layers]: what a layer gets, as ``methods.BITS``. The last
            row is t = 1, for samplers that make more calls than they have steps.
        t: shape [steps + 1], the progress of each row.
        gamma: γ; None for a method that does not weigh the layers.
        method: its name.
        ratio: shape [layers]: content's importance over γ times style's, which S(t) is compared
            with; infinite where style's is 0. None like γ.
    """

    layers: tuple[str, ...]
    choice: np.ndarray
    t: np.ndarray
    gamma: float | None
    method: str
    ratio: np.ndarray | None = None

    @property
    def steps(self) -> int:
        return len(self.t) - 1

    def is_like(self, other: Plan) -> bool:
        """Whether it is the same choice of the same layers at the same progress."""
        return (
            (self.layers, self.method, self.gamma) == (other.layers, other.method, other.gamma)
            and np.array_equal(self.t, other.t)
            and np.array_equal(self.choice, other.choice)
        )

    @cached_property
    def content(self) -> np.ndarray:
        """True where content is applied, alone or with style; bool, shape [steps + 1, layers]."""
        return (self.choice & BITS[CONTENT]).astype(bool)

    @cached_property
    def style(self) -> np.ndarray:
        """True where style is applied, alone or with content; bool, shape [steps + 1, layers]."""
        return (self.choice & BITS[STYLE]).astype(bool)

    def row(self, finished_steps: int) -> np.ndarray:
        """The choice once ``finished_steps`` steps are done: uint8, shape [layers]."""
        return self.choice[min(finished_steps, self.steps)]


def progress(steps: int, t0: float = 0.0) -> np.ndarray:
    """t = t₀ + (1 − t₀)·i/N for i = 0..N, N = ``steps``; shape [steps + 1].

    t₀ is where the pass starts: 0 for txt2img, 1 − denoising strength for img2img and hires.
    """
    return t0 + (1 - t0) * (np.arange(steps + 1) / max(steps, 1))


def make_plan(
    pair: Pair, scores: Scores | None, settings: Settings, steps: int, t0: float = 0.0
) -> Plan:
    """The choice for every step of a pass of ``steps`` steps that starts at progress ``t0``.

    ``scores`` may be None if the method needs none.
    """
    t = progress(steps, t0)
    method = METHODS[settings.method]
    kind = settings.scale if method.uses_scale else "none"
    scale, share = klora.scale_none(t), None
    if kind == "S":
        scale = klora.scale_s(t, settings.alpha, settings.beta)
    elif kind == "S*":
        scale = klora.scale_s_star(t, settings.alpha, settings.beta)
    elif kind == "share":
        start, end = settings.share_start / 100, settings.share_end / 100
        share = start + (end - start) * t
    importance = gamma = ratio = None
    if method.compares is not None:
        importance = content, style = method.compares(scores)
        gamma = scores.gamma(method.own_gamma or settings.gamma) if method.uses_gamma else 1.0
        with np.errstate(all="ignore"):
            ratio = np.where(style > 0, content / (gamma * style), np.inf)
    names = tuple(layer.name for layer in pair.paired)
    given = RuleInput(scale, names, settings.seed, importance, gamma, share)
    return Plan(names, method.rule(given), t, gamma, settings.method, ratio)
