"""The selection map (the paper's Fig. 6): its cells, and its reading in words. ``picture`` draws it
into a file, ``map_html`` into the page."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from . import texts
from .families import block, network_order
from .methods import BITS, BOTH, METHODS
from .pair import Pair
from .plan import Plan
from .tag import CONTENT, ROLES, STYLE

ALONE = 4
"""Added to the number of a cell whose layer is in one file only."""
_MOST_TAKEOVERS = 4
"""Most to list one by one."""


@dataclass(frozen=True)
class SelectionMap:
    """What every layer gets in every step, in the network's order.

    Attributes:
        layers: the layers' names.
        cells: uint8, shape [layers, steps], as ``methods.BITS``; of a layer in one file only, that
            and ``ALONE``.
        ratio: shape [layers]: S_c/(γ·S_s), which S(t) is compared with; NaN where there is none.
        shares: shape [steps, 2]: the part of the layers in both files that gets content, and
            content alone; None if there are no such layers.
    """

    layers: tuple[str, ...]
    cells: np.ndarray
    ratio: np.ndarray
    shares: np.ndarray | None

    @classmethod
    def of(cls, plan: Plan, pair: Pair) -> SelectionMap:
        layers = sorted((*plan.layers, *pair.unpaired), key=network_order)
        column = {name: i for i, name in enumerate(plan.layers)}
        cells = np.empty((len(layers), plan.steps), np.uint8)
        ratio = np.full(len(layers), np.nan)
        for row, name in enumerate(layers):
            if name in column:
                cells[row] = plan.choice[: plan.steps, column[name]]
                if plan.ratio is not None:
                    ratio[row] = plan.ratio[column[name]]
            else:
                cells[row] = ALONE + BITS[pair.unpaired[name]]
        shares = np.stack([content_share(plan), _share(plan, BITS[CONTENT])], 1)
        return cls(tuple(layers), cells, ratio, shares if plan.layers else None)

    @property
    def steps(self) -> int:
        return self.cells.shape[1]

    @cached_property
    def blocks(self) -> list[tuple[str, slice]]:
        """Each block of the network, as ``families.block`` calls it, and its layers."""
        words = [block(name) for name in self.layers]
        begin = [i for i, word in enumerate(words) if i == 0 or word != words[i - 1]]
        return [(words[i], slice(i, end)) for i, end in pairwise([*begin, len(words)])]

    @property
    def kinds(self) -> list[str]:
        """What occurs in the cells, for a legend: roles, “both”, “in one file only”."""
        found = set(np.unique(self.cells).tolist())
        kinds = [word for word in ROLES if any(BITS[word] == cell % ALONE for cell in found)]
        kinds += ["both"] * (BOTH in found)
        return kinds + [texts.ALONE] * any(cell > ALONE for cell in found)


# -- in words --------------------------------------------------------------------------------------


def content_share(plan: Plan) -> np.ndarray:
    """Which part of the paired layers has content in each step, alone or with style; fp64 of shape
    [steps], 0..1."""
    return _part(plan.content)


def style_share(plan: Plan) -> np.ndarray:
    """Which part of the paired layers has style in each step, alone or with content; likewise."""
    return _part(plan.style)


def describe(plan: Plan, pair: Pair) -> str:
    """The map in words: “47 % content; style takes over at step 9 of 30; 12 layers only in the
    style file”, after the name of a method other than K-LoRA."""
    parts = []
    shares = {word: _share(plan, bits) for word, bits in (*BITS.items(), ("both", BOTH))}
    if not plan.layers:
        parts.append("no layer is in both files")
    elif METHODS[plan.method].apart:
        parts.append("each LoRA predicts by itself in every step, and the two are averaged")
    elif (shares["both"] == 1).all():
        parts.append("every layer gets both in every step")
    elif METHODS[plan.method].blocks is not None:
        parts.append("content in its block, style in its own, nothing else is applied")
    else:
        for word in (CONTENT, *_both_if_any(plan)):
            parts.append(f"{_percent(shares[word].mean())} {word}")
        parts.append(_takeovers(shares[CONTENT], shares[STYLE]))
    if pair.overlap is not None:
        parts.append(f"{100 * pair.overlap:.1f} % of content in the style's directions")
    for role in ROLES:
        count = sum(only == role for only in pair.unpaired.values())
        if count:
            parts.append(f"{count} layer{'s' * (count > 1)} only in the {role} file")
    words = "; ".join(parts)
    return words if plan.method == "K-LoRA" else f"{plan.method}: {words}"


def _takeovers(content: np.ndarray, style: np.ndarray) -> str:
    """Who has more layers, and when that changes, from each one's share of a step. A tie changes
    nothing."""
    for role, other, share in ((CONTENT, STYLE, content), (STYLE, CONTENT, style)):
        if (share == 1).all():
            return f"every step is {role}, {other} is never used"
    leader, changes = None, []
    for step, (c, s) in enumerate(zip(content, style, strict=True), 1):
        ahead = leader or CONTENT if c == s else CONTENT if c > s else STYLE
        if ahead != leader:
            changes.append((ahead, step))
            leader = ahead
    if len(changes) == 1:
        return f"{leader} has more layers in every step"
    if len(changes) > _MOST_TAKEOVERS + 1:
        return f"content and style take turns, {len(changes) - 1} times in {len(content)} steps"
    takes_over = " takes over at"
    words = []
    for role, step in changes[1:]:
        words.append(f"{role}{takes_over} step {step}")
        takes_over = " at"
    return f"{', '.join(words)} of {len(content)}"


def _share(plan: Plan, bits: int) -> np.ndarray:
    """Which part of the paired layers has exactly these in each step; fp64 of shape [steps]."""
    return _part(plan.choice == bits)


def _part(where: np.ndarray) -> np.ndarray:
    steps, layers = len(where) - 1, where.shape[1]
    return where[:steps].mean(axis=1) if layers else np.zeros(steps)


def _both_if_any(plan: Plan) -> tuple[str, ...]:
    return ("both",) if (plan.choice[: plan.steps] == BOTH).any() else ()


def _percent(share: float) -> str:
    """Without a false 0 or 100."""
    percent = 100 * share
    if 0 < percent < 1:
        return "below 1 %"
    if 99 < percent < 100:
        return "above 99 %"
    return f"{percent:.0f} %"
