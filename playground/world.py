"""The world: things × sets of emoji → pictures.

The base model sees some things in most sets. A few others are held out, in every set, and a few
whole sets: they are what the LoRAs teach. As every thing exists in every set, the true picture of a
held-out thing in a held-out style exists too.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import torch
from torch.nn import functional

SIZE = 48

SUBJECTS = (
    "strawberry", "turtle", "rocket", "cactus", "crown", "doughnut", "mushroom", "helicopter",
    "elephant", "tulip",
)  # fmt: skip
"""What the content LoRAs teach; each from one drawing, in ``CONTENT_SET``."""
STYLES = ("streamline", "fluent-3d", "fluent-black")
"""What the style LoRAs teach."""
BASE_SETS = (
    "twemoji", "noto", "noto-v1", "emojione", "firefox", "fluent-flat", "emojione-black",
)  # fmt: skip
CONTENT_SET = "noto"
STYLE_SUBJECTS = (
    "cherries", "telescope", "anchor", "bicycle", "graduation-cap", "money-bag", "bomb", "guitar",
    "locomotive", "christmas-tree", "hot-beverage", "penguin", "umbrella", "hamburger", "rose",
    "pig",
)  # fmt: skip
"""Other things, which the base model knows: what a style LoRA learns its style from."""

IN_SETS = 9
"""The judges know the things that are in so many of the ten sets."""
BASE_THINGS = 64
"""What the base model learns: as many as it can in an hour. They are in all sets."""

Arrays = dict[str, dict[str, np.ndarray]]
"""Set → thing → uint8 [MASTER, MASTER, 3], white around the thing: ``emoji.pictures``."""


def things(arrays: Arrays, sets: int) -> list[str]:
    """Those that are in at least so many sets, in alphabetical order."""
    found = Counter(thing for of_set in arrays.values() for thing in of_set)
    return sorted(thing for thing, number in found.items() if number >= sets)


def base_things(arrays: Arrays) -> list[str]:
    """The things that the base model learns: STYLE_SUBJECTS, and of the others every so many-th in
    alphabetical order."""
    others = [x for x in things(arrays, len(arrays)) if x not in (*SUBJECTS, *STYLE_SUBJECTS)]
    number = BASE_THINGS - len(STYLE_SUBJECTS)
    return sorted([*STYLE_SUBJECTS, *others[:: len(others) // number][:number]])


def shown(masters: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """uint8 [batch, MASTER, MASTER, 3] → float [batch, 3, SIZE, SIZE], -1..1; with a generator a
    little larger or smaller, turned and moved, else as it is."""
    ink = 1 - masters.permute(0, 3, 1, 2).float() / 255  # outside there is none
    if generator is not None:
        ink = _moved(ink, generator)
    factor = ink.shape[-1] // SIZE
    return 1 - 2 * functional.avg_pool2d(ink, factor)


_SCALE, _TURN, _MOVE = (0.9, 1.0), 0.06, 0.05


def _moved(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    def between(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(ink), generator=generator)

    scale, angle = 1 / between(*_SCALE), between(-_TURN, _TURN)
    x, y = between(-_MOVE, _MOVE), between(-_MOVE, _MOVE)
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    affine = torch.stack([torch.stack([cos, -sin, x], 1), torch.stack([sin, cos, y], 1)], 1)
    grid = functional.affine_grid(affine, list(ink.shape), align_corners=False)
    return functional.grid_sample(ink, grid, align_corners=False)


def recoloured(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures of ``shown`` in colours that nobody chose, on white still: so the base model learns
    to go on with whatever palette is there."""
    ink = (1 - pictures) / 2
    mix = torch.rand(len(ink), 3, 3, generator=generator) ** 2
    mix = mix / mix.sum(2, keepdim=True)
    power = torch.exp(math.log(2) * (2 * torch.rand(len(ink), 1, 1, 1, generator=generator) - 1))
    ink = torch.einsum("bij,bjyx->biyx", mix, ink).clamp(0, 1) ** power
    return 1 - 2 * ink
