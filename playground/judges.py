"""What a picture shows.

Two judges, small networks trained on drawn pictures only: one names the subject in any style, one
the style of any subject. And two measures without training, so that nobody has to trust a judge:
the distance between palettes, and how well the silhouette fits.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import nn

from . import world
from .model import WEIGHTS

SUBJECTS, STYLES = tuple(world.SUBJECTS), tuple(world.STYLES)


def new_judge(classes: int) -> nn.Sequential:
    """A small convolutional network: pictures, float [batch, 3, SIZE, SIZE] → logits."""

    def block(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *block(3, 24), *block(24, 40), *block(40, 56), *block(56, 64),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * (world.SIZE // 16) ** 2, classes),
    )  # fmt: skip


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [batch, SIZE, SIZE, 3] → float32 [batch, 3, SIZE, SIZE], -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2) / 127.5 - 1


@cache
def load_judge(kind: str) -> nn.Sequential:
    """The judge of “subject” or “style”."""
    judge = new_judge(len({"subject": SUBJECTS, "style": STYLES}[kind]))
    judge.load_state_dict(load_file(WEIGHTS / f"{kind}_judge.safetensors"))
    return judge.float().eval()


@torch.no_grad()
def probabilities(kind: str, pictures: np.ndarray) -> np.ndarray:
    """The judge's probability of each class, [batch, classes], in the order of SUBJECTS or
    STYLES."""
    return load_judge(kind)(to_pixels(pictures)).softmax(-1).numpy()


# -- measures without training ---------------------------------------------------------------------

_BINS = 4
_CROP = 32
_BORDER, _FAR = 2, 40.0
"""Pixels of frame that show the ground; RGB distance from every ground colour of the subject."""


def palette(picture: np.ndarray) -> np.ndarray:
    """The share of each of _BINS³ colours, uint8 [SIZE, SIZE, 3] → [_BINS³], sum 1. A pixel counts
    for the bins around it, so that a slight change of shade changes it slightly."""
    place = picture.reshape(-1, 3) / 255 * (_BINS - 1)
    low = np.minimum(place.astype(int), _BINS - 2)
    high_share = place - low
    histogram = np.zeros((_BINS,) * 3)
    for corner in np.ndindex(2, 2, 2):
        share = np.where(np.array(corner), high_share, 1 - high_share).prod(1)
        np.add.at(histogram, tuple((low + corner).T), share)
    return histogram.ravel() / len(place)


def palette_distance(picture: np.ndarray, subject: str, style: str) -> float:
    """Total variation between a picture's palette and the drawn one's: 0 the same, 1 no colour in
    common."""
    return float(np.abs(palette(picture) - _drawn_palette(subject, style)).sum() / 2)


def silhouette(picture: np.ndarray) -> np.ndarray:
    """Where the subject is, cut out and scaled, bool [_CROP, _CROP]: what differs from the colours
    of the frame, with everything that it encloses. All False if there is nothing."""
    frame = np.ones(picture.shape[:2], bool)
    frame[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    ground = np.unique(picture[frame].astype(int) // 8, axis=0) * 8 + 4
    distance = np.linalg.norm(picture.reshape(-1, 1, 3).astype(float) - ground, axis=-1).min(1)
    mask = Image.fromarray((distance.reshape(picture.shape[:2]) > _FAR).astype(np.uint8))
    padded = Image.new("L", (mask.width + 2, mask.height + 2))
    padded.paste(mask, (1, 1))
    ImageDraw.floodfill(padded, (0, 0), 2)
    inside = np.asarray(padded)[1:-1, 1:-1] != 2
    return _cut_out(inside)


def silhouette_iou(picture: np.ndarray, subject: str) -> float:
    """Intersection over union of a picture's silhouette and the drawn one's, 0..1."""
    a, b = silhouette(picture), _drawn_silhouette(subject)
    return float((a & b).sum() / max((a | b).sum(), 1))


def _cut_out(mask: np.ndarray) -> np.ndarray:
    ys, xs = np.nonzero(mask)
    if len(ys) < 12:
        return np.zeros((_CROP, _CROP), bool)
    part = Image.fromarray(mask.astype(np.uint8) * 255).crop(
        (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    )
    return np.asarray(part.resize((_CROP, _CROP), Image.Resampling.BILINEAR)) > 127


@cache
def _drawn_palette(subject: str, style: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.mean(
        [palette(world.draw(subject, style, world.Context(), rng)) for _ in range(16)], 0
    )


@cache
def _drawn_silhouette(subject: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    masks = [
        _cut_out(world.draw(subject, "plain", world.Context(), rng, mask=True)[1])
        for _ in range(16)
    ]
    return np.mean(masks, 0) > 0.5
