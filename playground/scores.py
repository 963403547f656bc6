"""A way to fuse → pictures of every held-out thing in every held-out set → scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from lib_klora.settings import Settings

from . import world
from .generate import STEPS, Playground
from .judges import Judges
from .model import ANY_STYLE, ANY_SUBJECT, NEW_STYLE, NEW_SUBJECT

PAIRS = tuple((c, s) for c in world.SUBJECTS for s in world.STYLES)
SEEDS = tuple(range(4))
WORDS = f"{NEW_SUBJECT} {ANY_SUBJECT} {NEW_STYLE} {ANY_STYLE}"
"""The prompt of every picture that is judged; the tags come behind it. Without LoRAs it is some
thing in some set: the rare words mean nothing yet."""


@dataclass(frozen=True)
class Way:
    """One way to use a content and a style LoRA: the tags, and K-LoRA's settings.

    Attributes:
        strong: the role whose LoRAs are to be stronger than they were trained.
        kept: which part of every LoRA's layers is left; of none there is no file, so no tag either.
        lora_between: in which part of the steps what ``<lora:>`` names is there.
    """

    name: str
    tags: str = "<klora:{content}> <klora:{style}>"
    settings: Settings = field(default_factory=Settings)
    steps: int = STEPS
    strong: str = ""
    kept: float = 1
    lora_between: tuple[float, float] = (0, 1)

    def prompt(self, content: str, style: str) -> str:
        return f"{WORDS} {self.tags.format(content=content, style=style)}"


@dataclass(frozen=True)
class Scores:
    """Of one way; each an array [pairs, seeds], 0..1.

    Attributes:
        subject, style, both: 1 where the judges name the thing, of the ten held-out ones, the set,
            of ten too, both as asked for.
        of_all: 1 where they name the thing of all that there are.
        truth: likeness to the true picture in the network's features.
        palette, silhouette: likeness to the true picture's.
    """

    subject: np.ndarray
    style: np.ndarray
    both: np.ndarray
    of_all: np.ndarray
    truth: np.ndarray
    palette: np.ndarray
    silhouette: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[list[np.ndarray]]) -> Scores:
        """From what ``Judges.score`` gives for each pair."""
        return cls(*(np.stack(column) for column in zip(*rows, strict=True)))


COLUMNS = tuple(f.name for f in fields(Scores))
TITLES = {
    "subject": "subject",
    "style": "style",
    "both": "both named",
    "of_all": "subject, of 456",
    "truth": "truth",
    "palette": "palette",
    "silhouette": "silhouette",
}


def judge(
    playground: Playground,
    way: Way,
    pairs: Iterable[tuple[str, str]] = PAIRS,
    seeds: Sequence[int] = SEEDS,
) -> tuple[Scores, dict[tuple[str, str], np.ndarray]]:
    """Generates and scores; also the pictures of each pair, uint8 [seeds, SIZE, SIZE, 3]. Every way
    has the same noise for a pair, and every pair its own."""
    pictures = {}
    for pair in pairs:
        own = [len(SEEDS) * PAIRS.index(pair) + seed for seed in seeds]
        pictures[pair], _ = playground.generate(
            way.prompt(*pair), own, way.settings, way.steps, way.lora_between
        )
    judges = Judges.load()
    return Scores.of(judges.score(of_pair, *pair) for pair, of_pair in pictures.items()), pictures


def interval(values: np.ndarray, rng_seed: int = 0) -> tuple[float, float]:
    """95 % confidence interval of the mean of [pairs, seeds], by bootstrap: pairs are drawn, and
    seeds within each."""
    rng = np.random.default_rng(rng_seed)
    pairs, seeds = values.shape
    drawn = rng.integers(pairs, size=(2000, pairs, 1))
    means = values[drawn, rng.integers(seeds, size=(2000, pairs, seeds))].mean((1, 2))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def p_value(a: np.ndarray, b: np.ndarray, rng_seed: int = 0) -> float:
    """Two-sided paired permutation test of equal means, [pairs, seeds] each: the sign of each
    pair's difference is drawn at random, 20 000 times."""
    differences = (a - b).mean(1)
    signs = np.random.default_rng(rng_seed).choice((-1, 1), (20_000, len(differences)))
    drawn = np.abs((signs * differences).mean(1))
    return float((1 + (drawn >= abs(differences.mean()) - 1e-12).sum()) / (1 + len(drawn)))
