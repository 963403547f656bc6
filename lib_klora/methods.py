"""The ways to fuse two LoRAs: K-LoRA, the training-free ones that its paper compares it with
(Table 1), the paper's ablations (Fig. 9), and later rules.

A method says, before the first step, what every paired layer gets at every step: the content LoRA,
the style LoRA, or both. The rest (pairing, layers of one file, weights, text encoder, switching) is
the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import klora
from .families import SDXL, BaseModel, Block
from .scores import Scores
from .tag import CONTENT, STYLE

BITS = {CONTENT: 1, STYLE: 2}
"""What a layer gets, as a number: one of these, or their sum."""
BOTH = 3
RANDOM_CONTENT = 1 / 3
"""The probability of content in Random selection; the paper's."""
B_LORA_BLOCKS = {
    CONTENT: Block("up_blocks.0.attentions.0", "output_blocks_0_1_"),
    STYLE: Block("up_blocks.0.attentions.1", "output_blocks_1_1_"),
}
"""Where content and style live in SDXL (B-LoRA, arXiv 2403.14572, section 4.1)."""


Importance = tuple[np.ndarray, np.ndarray]


def top_k_sums(scores: Scores) -> Importance:
    """S_c and S_s (Eq. 1-4)."""
    return scores.s_content, scores.s_style


def energies(scores: Scores) -> Importance:
    """‖ΔW_c‖²_F and ‖ΔW_s‖²_F, in EST-LoRA (arXiv 2508.02165)."""
    return scores.energy_content, scores.energy_style


@dataclass(frozen=True)
class RuleInput:
    """What a rule may go by.

    Attributes:
        scale: S(t) before each step and, last, at t = 1; shape [steps + 1].
        share: in place of S(t), the part of the layers that gets content then, from 0 to 1; None
            where S(t) decides.
        names: of the paired layers.
        seed: for random choices.
        importance: what content and style weigh in each layer, both of shape [layers]; None for a
            method that does not compare.
        gamma: γ; None for such a method.
    """

    scale: np.ndarray
    names: Sequence[str]
    seed: int
    importance: Importance | None
    gamma: float | None
    share: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.scale), len(self.names)


# A rule: RuleInput → uint8 of shape [steps + 1, layers], in BITS.


def weightier(given: RuleInput) -> np.ndarray:
    """Each layer gets the LoRA that weighs more in it (Eq. 6, 8, 10)."""
    if given.share is not None:
        return _either(largest_share(*given.importance, given.share))
    return _either(klora.chooses_content(*given.importance, given.gamma, given.scale))


def largest_share(s_content: np.ndarray, s_style: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Gives content to the part ``share`` of the layers in which it outweighs style most. Ours.

    The paper's S(t) compares values. Where the layers' S_c/S_s lie close together, as in most real
    pairs, they nearly all turn at one step; their order turns them one after another in any pair.
    γ, α and β make no difference to an order, so there are none.

    Args:
        s_content, s_style: S_c and S_s, shape [layers].
        share: c(t) of each step, from 0 to 1; shape [steps].

    Returns:
        bool array, shape [steps, layers]: True for the c(t)·layers (rounded, a half up) with the
        largest S_c/S_s, of equal ones those that come first.
    """
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        ratio = np.where(s_style > 0, s_content / s_style, np.inf)
    rank = np.empty(len(ratio), np.int64)
    rank[np.argsort(-ratio, kind="stable")] = np.arange(len(ratio))
    number = np.floor(np.round(share * len(ratio), 9) + 0.5)  # c(t) is as exact as fp64 makes it
    return rank[None, :] < number[:, None]


def direct_merge(given: RuleInput) -> np.ndarray:
    """Direct arithmetic merge: every layer gets both, at the weights of the tags."""
    return np.full(given.shape, BOTH, np.uint8)


def lora_switch(given: RuleInput) -> np.ndarray:
    """LoRA Switch of Multi-LoRA Composition (arXiv 2402.16843), with one step a turn: all layers
    get content at the first, third, … step and style at the others."""
    steps = np.arange(len(given.scale))
    return _same_in_every_layer(steps % 2 == 0, given)


def fixed_selection(given: RuleInput) -> np.ndarray:
    """Fixed selection: all layers get content while S(t) < 1, style from then on; with a share,
    content while that is at least one half.

    The paper's sentence (section 4.3) gives content where the factor is *greater* than one. With S,
    which rises towards style, that would be style first and subject last, against its own finding
    (ii) that the subject is made in the early steps; so the sentence is taken for a slip.
    """
    content = given.scale < 1 if given.share is None else given.share >= 0.5
    return _same_in_every_layer(content, given)


def random_selection(given: RuleInput) -> np.ndarray:
    """Random selection: each layer gets content with probability 1/3 at each step, else style.

    Numbers are drawn from numpy's ``default_rng(seed)`` step by step, within a step in the order of
    the layers' names. So a longer pass begins like a shorter one, and every pass and picture
    gets the same choice.
    """
    return _either(np.random.default_rng(given.seed).random(given.shape) < RANDOM_CONTENT)


def own_block(given: RuleInput) -> np.ndarray:
    """B-LoRA: the layers of each LoRA's own block get that one, all others none."""
    choice = np.zeros(given.shape, np.uint8)
    for i, name in enumerate(given.names):
        for role, block in B_LORA_BLOCKS.items():
            if name.startswith(block.beginning):
                choice[:, i] = BITS[role]
    return choice


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
        compares: what of the two files; None: they are not compared at all.
        uses_gamma: else γ = 1.
        own_gamma: which γ, whatever the setting is; empty: that of the setting.
        uses_scale: else S(t) = 1, and α and β mean nothing.
        blocks: role → the only block of the network in which that LoRA is applied, its text encoder
            parts neither; None: wherever it has layers.
        model: what these blocks are of.
        projects: whether the content LoRA is taken off the style's row space (``projection``).
        apart: whether each LoRA predicts by itself, and the two are averaged (``composite``): what
            a row gives both is applied in turn, within one step.
    """

    rule: Callable[[RuleInput], np.ndarray]
    help: str
    compares: Callable[[Scores], Importance] | None = None
    uses_gamma: bool = False
    own_gamma: str = ""
    uses_scale: bool = False
    blocks: Mapping[str, Block] | None = None
    model: BaseModel | None = None
    projects: bool = False
    apart: bool = False


METHODS = {
    "K-LoRA": Method(
        weightier,
        "the LoRA whose largest entries weigh more",
        compares=top_k_sums,
        uses_gamma=True,
        uses_scale=True,
    ),
    "Direct merge": Method(direct_merge, "both LoRAs in every layer and step"),
    "LoRA Switch": Method(lora_switch, "content and style in turn, step by step"),
    "LoRA Composite": Method(
        direct_merge,
        "each predicts by itself and the two are averaged, which takes twice the time",
        apart=True,
    ),
    "Fixed selection": Method(
        fixed_selection, "content while S(t) is below 1, then style", uses_scale=True
    ),
    "Random selection": Method(random_selection, "content with probability 1/3, else style"),
    "Top-K without scale": Method(
        weightier, "K-LoRA with S(t) = 1", compares=top_k_sums, uses_gamma=True
    ),
    "Without γ": Method(
        weightier, "K-LoRA with γ = 1", compares=top_k_sums, uses_scale=True
    ),
    "EST-LoRA": Method(
        weightier,
        "as K-LoRA, by the energy of all entries and the authors' γ",
        compares=energies,
        uses_gamma=True,
        own_gamma="authors",
        uses_scale=True,
    ),
    "B-LoRA": Method(
        own_block,
        "SDXL only, content in up_blocks.0.attentions.0, style in up_blocks.0.attentions.1, "
        "nothing else",
        blocks=B_LORA_BLOCKS,
        model=SDXL,
    ),
    "NP-LoRA": Method(
        direct_merge,
        "both, what content does in the style's directions by a third less",
        projects=True,
    ),
}  # fmt: skip
