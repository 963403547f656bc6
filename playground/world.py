"""The world: subjects × styles × contexts → pictures, drawn with polygons.

A subject is a few parts with a characteristic silhouette; a style is a palette, a texture and a
stroke. Every picture is 48 × 48 and has a prompt. The held-out subjects and styles are never seen
by the base model: they are what the LoRAs teach. The held-out styles are all darker than their
ground, as plain pictures are: with the opposite, what the subject's LoRA drew at first is taken for
ground when the style's comes in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 48
_FINE = 3
"""Pictures are drawn this much larger and averaged down, for smooth edges."""

Points = list[tuple[float, float]]
Part = tuple[str, Points]
"""A role (body, part or detail) and a polygon; x to the right, y down, both about -1..1."""


def ellipse(x: float, y: float, rx: float, ry: float, *slice_: float) -> Points:
    """An ellipse, or a slice of it between two angles in degrees (0: right, 90: down)."""
    angles = np.radians(np.linspace(*(slice_ or (0, 360)), 32))
    return [(x + rx * np.cos(a), y + ry * np.sin(a)) for a in angles]


def box(left: float, top: float, right: float, bottom: float) -> Points:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _star(tips: int, inner: float) -> Points:
    angles = np.arange(2 * tips) * np.pi / tips - np.pi / 2
    return [
        ((inner if i % 2 else 1) * np.cos(a), (inner if i % 2 else 1) * np.sin(a))
        for i, a in enumerate(angles)
    ]


def _heart() -> Points:
    u = np.linspace(0, 2 * np.pi, 40)
    x = np.sin(u) ** 3
    y = -(13 * np.cos(u) - 5 * np.cos(2 * u) - 2 * np.cos(3 * u) - np.cos(4 * u)) / 16
    return list(zip(x, y, strict=True))


def _moon() -> Points:
    return ellipse(0, 0, 0.95, 0.95, 50, 310) + ellipse(0.35, 0, 0.6, 0.73, 285, 75)


SUBJECTS: dict[str, list[Part]] = {
    "ball": [
        ("body", ellipse(0, 0, 0.9, 0.9)),
        ("part", ellipse(0, 0, 0.9, 0.3)),
    ],
    "gift": [
        ("body", box(-0.85, -0.7, 0.85, 0.85)),
        ("part", box(-0.18, -0.7, 0.18, 0.85)),
        ("part", box(-0.85, -0.1, 0.85, 0.2)),
    ],
    "tent": [
        ("body", [(0, -0.9), (1, 0.8), (-1, 0.8)]),
        ("detail", [(0, -0.1), (0.35, 0.8), (-0.35, 0.8)]),
    ],
    "star": [("body", _star(5, 0.42))],
    "heart": [("body", _heart())],
    "cross": [
        ("body", box(-0.32, -0.95, 0.32, 0.95)),
        ("body", box(-0.95, -0.32, 0.95, 0.32)),
        ("detail", ellipse(0, 0, 0.22, 0.22)),
    ],
    "moon": [("body", _moon())],
    "arrow": [
        (
            "body",
            [(1, 0), (0.1, -0.85), (0.1, -0.35), (-1, -0.35), (-1, 0.35), (0.1, 0.35), (0.1, 0.85)],
        ),
    ],
    "house": [
        ("body", box(-0.7, -0.1, 0.7, 0.9)),
        ("part", [(0, -0.95), (1, -0.1), (-1, -0.1)]),
        ("detail", box(-0.2, 0.3, 0.2, 0.9)),
    ],
    "tree": [
        ("detail", box(-0.16, 0.3, 0.16, 0.95)),
        ("body", [(0, -0.3), (0.85, 0.5), (-0.85, 0.5)]),
        ("part", [(0, -0.95), (0.65, -0.05), (-0.65, -0.05)]),
    ],
    "fish": [
        ("part", [(0.35, 0), (1, -0.6), (1, 0.6)]),
        ("body", ellipse(-0.25, 0, 0.75, 0.52)),
        ("detail", ellipse(-0.6, -0.12, 0.12, 0.12)),
    ],
    "car": [
        ("part", [(-0.5, -0.1), (-0.3, -0.6), (0.35, -0.6), (0.6, -0.1)]),
        ("body", box(-1, -0.15, 1, 0.4)),
        ("detail", ellipse(-0.5, 0.42, 0.26, 0.26)),
        ("detail", ellipse(0.5, 0.42, 0.26, 0.26)),
    ],
    # held out
    "mushroom": [
        ("part", [(-0.28, 0), (0.28, 0), (0.4, 0.95), (-0.4, 0.95)]),
        ("body", ellipse(0, 0.1, 1, 1.0, 180, 360)),
        ("detail", ellipse(-0.42, -0.28, 0.2, 0.2)),
        ("detail", ellipse(0.3, -0.45, 0.2, 0.2)),
    ],
    "cat": [
        ("body", [(-0.85, -1), (-0.15, -0.5), (-0.8, 0.1)]),
        ("body", [(0.85, -1), (0.15, -0.5), (0.8, 0.1)]),
        ("body", ellipse(0, 0.15, 0.88, 0.75)),
        ("detail", ellipse(-0.36, 0, 0.15, 0.19)),
        ("detail", ellipse(0.36, 0, 0.15, 0.19)),
        ("part", ellipse(0, 0.46, 0.3, 0.2)),
    ],
    "rocket": [
        ("part", [(-0.3, 0.3), (-0.8, 0.95), (-0.3, 0.75)]),
        ("part", [(0.3, 0.3), (0.8, 0.95), (0.3, 0.75)]),
        (
            "body",
            [
                (0, -1),
                (0.3, -0.6),
                (0.38, -0.2),
                (0.34, 0.8),
                (-0.34, 0.8),
                (-0.38, -0.2),
                (-0.3, -0.6),
            ],
        ),
        ("detail", ellipse(0, -0.2, 0.18, 0.18)),
    ],
    "mug": [
        ("part", ellipse(0.5, 0.05, 0.48, 0.5)),
        ("ground", ellipse(0.5, 0.05, 0.25, 0.28)),
        ("body", box(-0.9, -0.75, 0.5, 0.85)),
        ("detail", box(-0.9, -0.15, 0.5, 0.2)),
    ],
    "umbrella": [
        ("detail", box(-0.09, -0.2, 0.09, 0.95)),
        ("detail", ellipse(0.2, 0.82, 0.3, 0.16, 0, 180)),
        ("body", ellipse(0, 0.05, 1, 0.95, 180, 360)),
        ("part", ellipse(0, 0.05, 0.38, 0.95, 180, 360)),
    ],
}
HELD_OUT_SUBJECTS = ("mushroom", "cat", "rocket", "mug", "umbrella")
BASE_SUBJECTS = tuple(name for name in SUBJECTS if name not in HELD_OUT_SUBJECTS)

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Style:
    """How things are painted.

    Attributes:
        ground, ground_2: the background's two colours; ``ground_texture`` mixes them.
        body, part, detail: the colours of a subject's roles; ``fill_texture`` mixes each with
            ``ink``, ``fill_strength`` of it.
        ink: the colour of strokes; ``stroke``: their width in pixels, 0 for none.
    """

    ground: Colour
    ground_2: Colour
    ground_texture: str
    body: Colour
    part: Colour
    detail: Colour
    ink: Colour
    stroke: float
    fill_texture: str = "flat"
    fill_strength: float = 1.0


_WHITE, _BLACK = (250, 250, 250), (15, 15, 20)
STYLES: dict[str, Style] = {
    "plain": Style(_WHITE, _WHITE, "flat", (150, 155, 165), (205, 208, 214), (90, 92, 100),
                   (40, 40, 45), 1.2),
    "night": Style((18, 22, 70), (235, 235, 190), "stars", (240, 225, 130), (200, 170, 90),
                   (90, 90, 150), _BLACK, 0),
    "blueprint": Style((30, 80, 170), (95, 140, 215), "grid", (30, 80, 170), (60, 110, 195),
                       (150, 185, 240), _WHITE, 1.3),
    "candy": Style((255, 190, 215), (255, 240, 245), "diagonal", (225, 50, 130), (120, 200, 220),
                   (255, 245, 160), _WHITE, 0),
    "forest": Style((150, 190, 110), (60, 110, 60), "gradient", (115, 75, 40), (45, 90, 40),
                    (205, 175, 90), (40, 30, 15), 1.2),
    "zebra": Style((225, 225, 225), (200, 200, 200), "flat", _WHITE, _WHITE, _WHITE, _BLACK, 1.5,
                   "horizontal"),
    "sunset": Style((90, 40, 120), (255, 150, 60), "gradient", (25, 12, 30), (60, 20, 45),
                    (250, 200, 90), _BLACK, 0),
    "sand": Style((225, 200, 150), (190, 155, 100), "grain", (150, 100, 60), (190, 140, 90),
                  (95, 60, 35), (80, 50, 30), 0, "grain", 0.5),
    "ocean": Style((90, 190, 200), (20, 110, 150), "waves", (250, 240, 220), (250, 150, 110),
                   (10, 70, 110), (10, 60, 95), 1.2),
    "comic": Style((255, 225, 70), (250, 170, 40), "dots", (220, 40, 40), (50, 120, 220), _WHITE,
                   _BLACK, 2.2),
    "paper": Style((245, 235, 210), (235, 222, 190), "grain", (245, 235, 210), (245, 235, 210),
                   (200, 180, 140), (95, 60, 35), 1.3, "diagonal", 0.8),
    "neon": Style((10, 10, 15), (10, 10, 15), "flat", (10, 10, 15), (10, 50, 35), (10, 90, 60),
                  (60, 255, 130), 1.8),
    # held out
    "lava": Style((255, 205, 60), (255, 130, 30), "waves", (110, 20, 20), (165, 40, 20),
                  (40, 5, 8), (40, 5, 8), 1.2),
    "crayon": Style((215, 235, 215), (190, 215, 195), "grain", (110, 180, 120), (150, 200, 130),
                    (200, 120, 60), (20, 70, 45), 1.5, "diagonal", 0.75),
    "mosaic": Style((235, 215, 185), (195, 110, 75), "checks", (20, 130, 135), (60, 180, 170),
                    (245, 235, 215), (120, 60, 40), 0, "checks", 0.35),
    "disco": Style((250, 240, 90), (180, 240, 40), "horizontal", (110, 40, 160), (225, 50, 170),
                   (40, 10, 70), _WHITE, 0),
    "stamp": Style((250, 240, 225), (245, 225, 210), "flat", (250, 240, 225), (240, 190, 180),
                   (200, 40, 50), (200, 40, 50), 1.8, "dots"),
}  # fmt: skip
HELD_OUT_STYLES = ("lava", "crayon", "mosaic", "disco", "stamp")
BASE_STYLES = tuple(name for name in STYLES if name not in HELD_OUT_STYLES)

POSITIONS = {"left": -0.42, "middle": 0.0, "right": 0.42}
SIZES = {"small": 0.44, "large": 0.66}
SETTINGS = ("bare", "hill", "sun")

_xs, _ys = np.meshgrid(np.arange(SIZE * _FINE) / _FINE, np.arange(SIZE * _FINE) / _FINE)
"""Where each fine pixel lies, in pixels of the picture."""


def _stripes(u: np.ndarray, period: float) -> np.ndarray:
    return (u % period < period / 2).astype(np.float32)


def _round_dots(x, y, period, radius) -> np.ndarray:
    row = np.floor(y / period)
    dx, dy = (x + row % 2 * period / 2) % period - period / 2, y % period - period / 2
    return (dx**2 + dy**2 < radius**2).astype(np.float32)


def _grain(x, y, rng) -> np.ndarray:
    coarse = rng.random((SIZE, SIZE)).astype(np.float32)
    return np.kron(coarse, np.ones((_FINE, _FINE), np.float32)) ** 2


TEXTURES: dict[str, Callable] = {  # (x, y, rng) → how much of the second colour, 0..1
    "flat": lambda x, y, rng: np.zeros_like(x, dtype=np.float32),
    "horizontal": lambda x, y, rng: _stripes(y, 4),
    "diagonal": lambda x, y, rng: _stripes(x + y, 8),
    "waves": lambda x, y, rng: _stripes(y + 1.6 * np.sin(x * 2 * np.pi / 16), 8),
    "grid": lambda x, y, rng: np.maximum(x % 8 < 1.2, y % 8 < 1.2).astype(np.float32),
    "checks": lambda x, y, rng: ((x // 4 + y // 4) % 2).astype(np.float32),
    "dots": lambda x, y, rng: _round_dots(x, y, 8, 2.1),
    "stars": lambda x, y, rng: _round_dots(x, y, 12, 1.2),
    "gradient": lambda x, y, rng: (y / SIZE).astype(np.float32),
    "grain": _grain,
}


@dataclass(frozen=True)
class Context:
    """Where, how large and how many, and in what surroundings."""

    count: str = "one"
    size: str = "large"
    position: str = "middle"
    setting: str = "bare"


def random_context(rng: np.random.Generator) -> Context:
    count = "two" if rng.random() < 0.2 else "one"
    return Context(
        count,
        "small" if count == "two" else str(rng.choice(list(SIZES))),
        "middle" if count == "two" else str(rng.choice(list(POSITIONS))),
        str(rng.choice(SETTINGS)),
    )


# -- made up ---------------------------------------------------------------------------------------
# Without them the base model would know twelve outlines and twelve palettes and bend all else to
# these. With them it learns to go on with what it has never seen, as a large model can.


def random_subject(rng: np.random.Generator) -> list[Part]:
    """A thing that has no name: a body with up to two parts and up to three details."""
    parts = [("body", _random_outline(rng, 0, 0, 1))]
    for _ in range(rng.integers(3)):
        x, y = rng.uniform(-0.6, 0.6, 2)
        part = ("part", _random_outline(rng, x, y, rng.uniform(0.25, 0.6)))
        parts.insert(rng.integers(2) * len(parts), part)  # behind the body or before it
    x, y, size = rng.uniform(0.05, 0.5), rng.uniform(-0.5, 0.5), rng.uniform(0.12, 0.28)
    places = ([], [(0, y)], [(-x, y), (x, y)], [(-x, y), (x, y), (0, -y)])[rng.integers(4)]
    return parts + [("detail", ellipse(*place, size, size)) for place in places]


def _random_outline(rng: np.random.Generator, x: float, y: float, size: float) -> Points:
    wide, high = size * rng.uniform(0.35, 1, 2)
    kind = rng.integers(5)
    if kind == 0:
        return box(x - wide, y - high, x + wide, y + high)
    if kind == 1:
        start = rng.choice((0, 90, 180, 270))
        return ellipse(x, y, wide, high, start, start + rng.choice((180, 360)))
    if kind == 2:
        corners = rng.integers(3, 7)
        angles = np.sort(rng.uniform(0, 360, corners)) + rng.uniform(0, 360)
    else:
        corners = 24
        angles = np.linspace(0, 360, corners, endpoint=False)
    radius = np.ones(corners)
    if kind == 3:
        radius = np.where(np.arange(corners) % (24 // rng.choice((3, 4, 6))) < 2, 1, 0.55)
    if kind == 4:
        for waves in (1, 2, 3, 5):
            shift = rng.uniform(0, 2 * np.pi)
            radius += rng.uniform(0, 0.5) / waves * np.sin(waves * np.radians(angles) + shift)
        radius /= radius.max()
    u = np.radians(angles)
    points = zip(x + wide * radius * np.cos(u), y + high * radius * np.sin(u), strict=True)
    return [(float(px), float(py)) for px, py in points]


def random_style(rng: np.random.Generator) -> Style:
    """A way to paint that has no name, in which a body differs from the ground."""

    def colour() -> Colour:
        return tuple(int(v) for v in rng.integers(5, 251, 3))

    def far(a: Colour, b: Colour) -> bool:
        return float(np.linalg.norm(np.subtract(a, b))) > 130

    while True:
        ground, ink = colour(), (_WHITE, _BLACK, colour())[rng.integers(3)]
        stroke = float(rng.choice((0, 0, 1.2, 1.5, 2)))
        body = ground if stroke and rng.random() < 0.3 else colour()
        if far(ink, ground) and far(ink, body) and (stroke or far(body, ground)):
            break
    textures = list(TEXTURES)
    return Style(
        ground, colour(), str(rng.choice(textures)), body, colour(), colour(), ink, stroke,
        *((str(rng.choice(textures)), rng.uniform(0.3, 1)) if rng.random() < 0.4 else ()),
    )  # fmt: skip


def prompt(subject: str, style: str, context: Context) -> str:
    """The words of a picture. ``subject`` and ``style`` are any words, such as “sks shape”."""
    return f"{context.count} {context.size} {subject} {context.position} {context.setting} {style}"


def draw(
    subject: str | list[Part],
    style: str | Style,
    context: Context,
    rng: np.random.Generator,
    mask: bool = False,
) -> np.ndarray:
    """A picture, uint8 [SIZE, SIZE, 3]; with ``mask`` also where the subject is, bool [SIZE, SIZE].

    ``subject`` and ``style`` are names, or made up. ``rng`` moves the subject a little: place,
    size, tilt.
    """
    parts = SUBJECTS[subject] if isinstance(subject, str) else subject
    s = STYLES[style] if isinstance(style, str) else style

    def paint(texture, first, second, strength=1.0):
        share = TEXTURES[texture](_xs, _ys, rng)[..., None] * strength
        return np.asarray(first, np.float32) * (1 - share) + np.asarray(second, np.float32) * share

    ground = paint(s.ground_texture, s.ground, s.ground_2)
    picture = ground.copy()
    fills = {
        role: paint(s.fill_texture, getattr(s, role), s.ink, s.fill_strength)
        for role in ("body", "part", "detail")
    }
    fills["ground"] = ground
    covered = np.zeros(picture.shape[:2], bool)

    def put(role: str, points: Points, of_subject: bool) -> None:
        pixels = [((1 + px) * SIZE * _FINE / 2, (1 + py) * SIZE * _FINE / 2) for px, py in points]
        layer = Image.new("L", picture.shape[:2][::-1])
        pen = ImageDraw.Draw(layer)
        pen.polygon(pixels, fill=1)
        if s.stroke:
            pen.line([*pixels, pixels[0]], fill=2, width=round(s.stroke * _FINE), joint="curve")
        inside, line = np.asarray(layer) == 1, np.asarray(layer) == 2
        picture[inside] = fills[role][inside]
        picture[line] = s.ink
        if of_subject:
            covered[:] = covered & ~inside if role == "ground" else covered | inside
            covered[line] = True

    if context.setting == "hill":
        put("part", ellipse(0, 1.5, 1.8, 0.95), False)
    elif context.setting == "sun":
        put("part", ellipse(0.78, -0.78, 0.3, 0.3), False)
    places = (-0.48, 0.48) if context.count == "two" else (POSITIONS[context.position],)
    for place in places:
        size = SIZES[context.size] * rng.uniform(0.97, 1.03)
        cx = place * (1.2 - SIZES[context.size]) / 0.7 + rng.uniform(-0.02, 0.02)
        cy = 0.06 + rng.uniform(-0.02, 0.02)
        tilt = rng.uniform(-0.05, 0.05)
        cos, sin = np.cos(tilt) * size, np.sin(tilt) * size
        for role, points in parts:
            put(
                role,
                [(cx + cos * px - sin * py, cy + sin * px + cos * py) for px, py in points],
                True,
            )
    small = picture.reshape(SIZE, _FINE, SIZE, _FINE, 3).mean((1, 3)).round().astype(np.uint8)
    if not mask:
        return small
    return small, covered.reshape(SIZE, _FINE, SIZE, _FINE).mean((1, 3)) > 0.5
