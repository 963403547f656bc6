"""A way to fuse → pictures of every held-out subject in every held-out style → scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from lib_klora.settings import Settings

from . import judges, world
from .generate import STEPS, Playground
from .model import ANY_SUBJECT, NEW_STYLE, NEW_SUBJECT, PLAIN

PAIRS = tuple((c, s) for c in world.HELD_OUT_SUBJECTS for s in world.HELD_OUT_STYLES)
SEEDS = tuple(range(8))
WORDS = world.prompt(f"{NEW_SUBJECT} {ANY_SUBJECT}", f"{NEW_STYLE} {PLAIN}", world.Context())
"""The prompt of every picture that is judged; the tags come behind it. Without LoRAs it is some
shape, plain: the rare words mean nothing yet."""


@dataclass(frozen=True)
class Way:
    """One way to use a content and a style LoRA: the tags, and K-LoRA's settings. ``strong`` is the
    role whose LoRAs are to be stronger than they were trained."""

    name: str
    tags: str = "<klora:{content}> <klora:{style}>"
    settings: Settings = field(default_factory=Settings)
    steps: int = STEPS
    strong: str = ""

    def prompt(self, content: str, style: str) -> str:
        return f"{WORDS} {self.tags.format(content=content, style=style)}"


@dataclass(frozen=True)
class Scores:
    """Of one way; each an array [pairs, seeds].

    Attributes:
        subject, style: the judges' probabilities of what was asked for.
        both: their product.
        agree: 1 where both judges name what was asked for, else 0.
        palette: 1 − distance of the palettes.
        silhouette: intersection over union.
    """

    subject: np.ndarray
    style: np.ndarray
    both: np.ndarray
    agree: np.ndarray
    palette: np.ndarray
    silhouette: np.ndarray


def score(pictures: np.ndarray, content: str, style: str) -> list[np.ndarray]:
    """The rows of ``Scores`` for pictures that should show ``content`` in ``style``."""
    subjects, styles = (judges.probabilities(kind, pictures) for kind in ("subject", "style"))
    c, s = judges.SUBJECTS.index(content), judges.STYLES.index(style)
    agree = (subjects.argmax(1) == c) & (styles.argmax(1) == s)
    return [
        subjects[:, c],
        styles[:, s],
        subjects[:, c] * styles[:, s],
        agree.astype(float),
        np.array([1 - judges.palette_distance(picture, content, style) for picture in pictures]),
        np.array([judges.silhouette_iou(picture, content) for picture in pictures]),
    ]


def judge(
    playground: Playground,
    way: Way,
    pairs: Iterable[tuple[str, str]] = PAIRS,
    seeds: Sequence[int] = SEEDS,
) -> tuple[Scores, dict[tuple[str, str], np.ndarray]]:
    """Generates and scores; also the pictures of each pair, uint8 [seeds, SIZE, SIZE, 3]."""
    pictures = {
        pair: playground.generate(way.prompt(*pair), seeds, way.settings, way.steps)[0]
        for pair in pairs
    }
    rows = [score(made, *pair) for pair, made in pictures.items()]
    return Scores(*(np.stack(column) for column in zip(*rows, strict=True))), pictures


def interval(values: np.ndarray, rng_seed: int = 0) -> tuple[float, float]:
    """95 % confidence interval of the mean of [pairs, seeds], by bootstrap: pairs are drawn, and
    seeds within each."""
    rng = np.random.default_rng(rng_seed)
    pairs, seeds = values.shape
    drawn = rng.integers(pairs, size=(2000, pairs, 1))
    means = values[drawn, rng.integers(seeds, size=(2000, pairs, seeds))].mean((1, 2))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


COLUMNS = tuple(f.name for f in fields(Scores))
