"""The selection map as a picture (the paper's Fig. 6), and its reading in words.

Steps run from left to right, layers from top to bottom in the network's order. The strip below the
map is the share of the two files in each step, if they have a layer in common. Only numpy and zlib,
because a WebUI's own plotting packages differ.
"""

from __future__ import annotations

import struct
import zlib
from itertools import groupby

import numpy as np

from .families import block, network_order
from .methods import BITS, BOTH, METHODS
from .pair import Pair
from .plan import Plan
from .tag import CONTENT, ROLES, STYLE

# Blue and orange of Okabe and Ito, and a plum darker than both: people with any kind of colour
# blindness tell them apart, and they differ in lightness, so a grey print shows the map too.
COLOURS = {CONTENT: (0, 114, 178), STYLE: (230, 159, 0), "both": (80, 20, 90)}
_PAPER, _INK = (255, 255, 255), (51, 51, 51)
_OF_CHOICE = np.array([_PAPER, *COLOURS.values()], np.uint8)
"""Colour of a number in ``Plan.choice``."""

_WIDTH, _HEIGHT = 640, 560
"""Target size of the map, in pixels; a step or a layer takes whole pixels, at least one."""
_SHARE_HEIGHT, _GAP, _ZOOM = 40, 6, 2
_MOST_TAKEOVERS = 4
"""Most to list one by one."""

# Three by five pixels, a digit of the octal number a row: 4 is the left pixel, 1 the right one.
_FONT = {
    "0": 0o75557, "1": 0o26227, "2": 0o71747, "3": 0o71317, "4": 0o55711,
    "5": 0o74717, "6": 0o74757, "7": 0o71122, "8": 0o75757, "9": 0o75717,
    "a": 0o25755, "b": 0o65656, "c": 0o34443, "d": 0o65556, "e": 0o74647,
    "f": 0o74644, "g": 0o34553, "h": 0o55755, "i": 0o72227, "j": 0o11152,
    "k": 0o55655, "l": 0o44447, "m": 0o57755, "n": 0o65555, "o": 0o25552,
    "p": 0o65644, "q": 0o25563, "r": 0o65655, "s": 0o34216, "t": 0o72222,
    "u": 0o55557, "v": 0o55552, "w": 0o55775, "x": 0o55255, "y": 0o55222,
    "z": 0o71247, "%": 0o51245, "-": 0o00700, " ": 0o00000,
}  # fmt: skip


def selection_map(plan: Plan, pair: Pair) -> np.ndarray:
    """The picture, uint8 of shape [height, width, 3]; layers of one file only are shown lighter."""
    names = sorted((*plan.layers, *pair.unpaired), key=network_order)
    blocks = [(word, list(layers)) for word, layers in groupby(names, block)]
    steps = plan.steps
    wide, high = max(1, _WIDTH // steps), max(1, _HEIGHT // max(1, len(names)))
    left, line = _text_width("content %") + 2 * _GAP, 5 * _ZOOM + _GAP
    map_height = len(names) * high + len(blocks)
    strip_height = _SHARE_HEIGHT + _GAP if plan.layers else 0
    legend = [(word, COLOURS[word], COLOURS[word]) for word in (*ROLES, *_both_if_any(plan))]
    legend.append(("in one file only", *(_lighter(COLOURS[role]) for role in ROLES)))
    words_width = _text_width("  ".join(words for words, *_ in legend)) + 4 * line
    width = left + max(steps * wide, words_width)
    height = _GAP + map_height + _GAP + strip_height + 2 * line
    picture = np.empty((height, width + 4 * _GAP, 3), np.uint8)
    picture[:] = _PAPER

    y, free_from = _GAP, 0
    column = {name: i for i, name in enumerate(plan.layers)}
    for word, layers in blocks:
        if y >= free_from:  # names that would not fit are left out
            free_from = y + line
            _write(picture, word, y, _GAP)
        for name in layers:
            colours = np.empty((steps, 3), np.uint8)
            if name in column:
                colours[:] = _OF_CHOICE[plan.choice[:steps, column[name]]]
            else:
                colours[:] = _lighter(COLOURS[pair.unpaired[name]])
            picture[y : y + high, left : left + steps * wide] = colours.repeat(wide, axis=0)
            y += high
        y += 1  # a white line between two blocks

    y = _GAP + map_height + _GAP
    if plan.layers:
        _draw_shares(picture[y : y + _SHARE_HEIGHT, left:], plan, wide)
        _write(picture, "content %", y + (_SHARE_HEIGHT - 5 * _ZOOM) // 2, _GAP)
    y += strip_height
    _write(picture, "step", y, _GAP)
    apart = next((n for n in (1, 2, 5, 10, 20, 50) if n * wide >= _text_width("000")), 100)
    for step in sorted({1, *range(apart, steps + 1, apart)}):
        _write(picture, str(step), y, left + (step - 1) * wide)

    x, y = left, y + line
    for words, *pair_of_colours in legend:
        for colour in pair_of_colours:
            picture[y : y + 5 * _ZOOM, x : x + 4 * _ZOOM] = colour
            x += 4 * _ZOOM
        x += _GAP + _write(picture, words, y, x + _GAP) + 2 * _GAP
    return picture


def _draw_shares(strip: np.ndarray, plan: Plan, wide: int) -> None:
    """Content at the bottom, style at the top, both between; a step is ``wide`` pixels."""
    shares = zip(content_share(plan), _share(plan, BITS[CONTENT]), strict=True)
    for step, (with_content, alone) in enumerate(shares):
        both = round(len(strip) * (1 - with_content))
        content = round(len(strip) * (1 - alone))
        x = slice(step * wide, (step + 1) * wide)
        strip[:both, x] = COLOURS[STYLE]
        strip[both:content, x] = COLOURS["both"]
        strip[content:, x] = COLOURS[CONTENT]


def png(picture: np.ndarray) -> bytes:
    """A PNG file of a picture, uint8 of shape [height, width, 3]."""
    height, width, _ = picture.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row begins with its filter, 0: none
    rows[:, 1:] = picture.reshape(height, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bit, RGB
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            chunk(b"IEND", b""),
        )
    )


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


def _lighter(colour: tuple[int, int, int]) -> np.ndarray:
    return (np.array(colour) * 0.35 + np.array(_PAPER) * 0.65).astype(np.uint8)


def _text_width(text: str) -> int:
    return 4 * _ZOOM * len(text)


def _write(picture: np.ndarray, text: str, top: int, left: int) -> int:
    """Writes into the picture, cut off at its edge; the width."""
    for i, letter in enumerate(text):
        bits = np.array([int(bit) for bit in f"{_FONT.get(letter, 0):015b}"], bool).reshape(5, 3)
        bits = bits.repeat(_ZOOM, axis=0).repeat(_ZOOM, axis=1)
        x = left + _text_width(text[:i])
        place = picture[top : top + bits.shape[0], x : x + bits.shape[1]]
        place[bits[: place.shape[0], : place.shape[1]]] = _INK
    return _text_width(text)
