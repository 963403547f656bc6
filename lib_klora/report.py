"""What one generation did: the passes with K-LoRA, and every sentence that a person is told.

A sentence is shown in the page, in the picture's parameters and in the log.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from . import infotext
from .errors import get_log
from .pair import Pair
from .plan import Plan

REFINER_WITHOUT = "The steps before the refiner have K-LoRA, the refiner's do not."
_HIRES_WITHOUT = "The first pass has K-LoRA, the hires pass does not."

log = get_log()


@dataclass(frozen=True)
class PassReport:
    """One kind of sampling pass of a generation.

    Attributes:
        names: of the content and the style LoRA.
        pair, plan: what was chosen from, and how.
        hires: whether it is a hires pass.
    """

    names: tuple[str, str]
    pair: Pair
    plan: Plan
    hires: bool = False

    def is_like(self, other: PassReport) -> bool:
        """Whether a person would see the same: each image of a batch count has a pass of its
        own."""
        return (self.names, self.hires) == (other.names, other.hires) and self.plan.is_like(
            other.plan
        )


@dataclass(eq=False)
class Report:
    """What one generation did, or a preview would do: what the page shows.

    Attributes:
        passes: one for each kind of sampling pass so far.
        notes: sentences that were told; ``error`` is the one that means “without K-LoRA”, at least
            for one pass.
    """

    passes: list[PassReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def has_picture_without(self) -> bool:
        """Whether one image of a batch count has K-LoRA and another has none of it."""
        parts = {_HIRES_WITHOUT, REFINER_WITHOUT}
        return bool(self.passes and self.error) and parts.isdisjoint(self.notes)

    def show(self, new: PassReport) -> None:
        """Adds a pass whose plan is being followed, unless one like it is there."""
        if not any(new.is_like(known) for known in self.passes):
            self.passes.append(new)

    def hide(self, shown: PassReport | None) -> None:
        """Takes a pass out again that was not completed."""
        self.passes = [known for known in self.passes if known is not shown]

    def note(self, p: Any, sentence: str) -> None:
        """Tells the person who generates ``p`` (None: nobody is left to tell), and the log once a
        generation."""
        comments = getattr(p, "comments", None)
        if comments is None or f"K-LoRA: {sentence}" not in comments:
            log.info(sentence)
        if p is not None:
            p.comment(f"K-LoRA: {sentence}")
        if sentence not in self.notes:
            self.notes.append(sentence)

    def fail(self, p: Any, sentence: str, part: str = "") -> None:
        """Tells that ``p`` is without K-LoRA, and why. ``part``: which part of the picture has it
        all the same."""
        self.error = sentence
        self.note(p, sentence)
        if p is None:
            return
        parameters = p.extra_generation_params
        hires = getattr(p, "is_hr_pass", False)
        if not part and hires and any(not done.hires for done in self.passes):
            part = _HIRES_WITHOUT
        if part:
            # That part has what its parameter says.
            self.note(p, part)
            parameters[infotext.ERROR_KEY] = f"{sentence} {part}"
        else:
            parameters.pop(infotext.KEY, None)
            parameters[infotext.ERROR_KEY] = sentence
