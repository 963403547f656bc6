"""The ways to fuse two LoRAs: K-LoRA, the training-free ones that its paper compares it with
(Table 1), and the paper's ablations (Fig. 9).

A method says, before the first step, what every paired layer gets at every step: the content LoRA,
the style LoRA, or both. The rest (pairing, layers of one file, weights, text encoder, switching) is
the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import klora
from .scores import Scores
from .tag import CONTENT, STYLE

BITS = {CONTENT: 1, STYLE: 2}
"""What a layer gets, as a number: one of these, or their sum."""
BOTH = 3
RANDOM_CONTENT = 1 / 3
"""The probability of content in Random selection; the paper's."""


@dataclass(frozen=True)
class RuleInput:
    """What a rule may go by.

    Attributes:
        scale: S(t) before each step and, last, at t = 1; shape [steps + 1].
        layers: how many layers are paired.
        seed: for random choices.
        scores, gamma: of the layers; None for a method without scores.
    """

    scale: np.ndarray
    layers: int
    seed: int
    scores: Scores | None
    gamma: float | None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.scale), self.layers


# A rule: RuleInput → uint8 of shape [steps + 1, layers], in BITS.


def top_k_selection(given: RuleInput) -> np.ndarray:
    """Each layer gets the LoRA whose K largest entries weigh more (Eq. 6, 8, 10)."""
    s_content, s_style = given.scores.s_content, given.scores.s_style
    return _either(klora.chooses_content(s_content, s_style, given.gamma, given.scale))


def direct_merge(given: RuleInput) -> np.ndarray:
    """Direct arithmetic merge: every layer gets both, at the weights of the tags."""
    return np.full(given.shape, BOTH, np.uint8)


def lora_switch(given: RuleInput) -> np.ndarray:
    """LoRA Switch of Multi-LoRA Composition (arXiv 2402.16843), with one step a turn: all layers
    get content at the first, third, … step and style at the others."""
    steps = np.arange(len(given.scale))
    return _same_in_every_layer(steps % 2 == 0, given)


def fixed_selection(given: RuleInput) -> np.ndarray:
    """Fixed selection: all layers get content while S(t) < 1, style from then on.

    The paper's sentence (section 4.3) gives content where the factor is *greater* than one. With S,
    which rises towards style, that would be style first and subject last, against its own finding
    (ii) that the subject is made in the early steps; so the sentence is taken for a slip.
    """
    return _same_in_every_layer(given.scale < 1, given)


def random_selection(given: RuleInput) -> np.ndarray:
    """Random selection: each layer gets content with probability 1/3 at each step, else style.

    Numbers are drawn from numpy's ``default_rng(seed)`` step by step, within a step in the order of
    the layers' names. So a longer pass begins like a shorter one, and every pass and picture
    gets the same choice.
    """
    return _either(np.random.default_rng(given.seed).random(given.shape) < RANDOM_CONTENT)


def _either(content: np.ndarray) -> np.ndarray:
    return np.where(content, np.uint8(BITS[CONTENT]), np.uint8(BITS[STYLE]))


def _same_in_every_layer(content: np.ndarray, given: RuleInput) -> np.ndarray:
    return _either(np.broadcast_to(content[:, None], given.shape))


@dataclass(frozen=True)
class Method:
    """One way to fuse.

    Attributes:
        rule: as above.
        help: a few words for the page.
        needs_scores: else the files are not compared at all.
        uses_gamma: else γ = 1.
        uses_scale: else S(t) = 1, and α and β mean nothing.
    """

    rule: Callable[[RuleInput], np.ndarray]
    help: str
    needs_scores: bool = False
    uses_gamma: bool = False
    uses_scale: bool = False


METHODS = {
    "K-LoRA": Method(
        top_k_selection,
        "the LoRA whose largest entries weigh more",
        needs_scores=True,
        uses_gamma=True,
        uses_scale=True,
    ),
    "Direct merge": Method(direct_merge, "both LoRAs in every layer and step"),
    "LoRA Switch": Method(lora_switch, "content and style in turn, step by step"),
    "Fixed selection": Method(
        fixed_selection, "content while S(t) is below 1, then style", uses_scale=True
    ),
    "Random selection": Method(random_selection, "content with probability 1/3, else style"),
    "Top-K without scale": Method(
        top_k_selection, "K-LoRA with S(t) = 1", needs_scores=True, uses_gamma=True
    ),
    "Without γ": Method(
        top_k_selection, "K-LoRA with γ = 1", needs_scores=True, uses_scale=True
    ),
}  # fmt: skip
