"""The selection map as one picture, for the gallery, a saved file and the command line.

Steps run from left to right, layers from top to bottom in the network's order. The strip below the
map is the share of the two files in each step, if they have a layer in common. With Pillow, which
every WebUI has.
"""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from . import texts
from .methods import BOTH
from .pair import Pair
from .plan import Plan
from .plot import ALONE, SelectionMap
from .tag import CONTENT, ROLES, STYLE

# Blue and orange of Okabe and Ito, and a plum darker than both: people with any kind of colour
# blindness tell them apart, and they differ in lightness, so a grey print shows the map too.
COLOURS = {CONTENT: (0, 114, 178), STYLE: (230, 159, 0), "both": (80, 20, 90)}
_PAPER, _INK = (255, 255, 255), (51, 51, 51)


def _lighter(colour: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(int(x * 0.35 + y * 0.65) for x, y in zip(colour, _PAPER, strict=True))


PALETTE = np.full((ALONE + 1 + BOTH, 3), 255, np.uint8)
"""Colour of a number in ``SelectionMap.cells``; of 0, the paper's."""
PALETTE[1:ALONE] = [*COLOURS.values()]
PALETTE[ALONE + 1 :] = [_lighter(colour) for colour in COLOURS.values()]

_WIDTH, _HEIGHT = 640, 560
"""Target size of the map, in pixels; a step or a layer takes whole pixels, at least one."""
_SHARE_HEIGHT, _GAP, _LETTERS = 40, 6, 13


def cells(drawn: SelectionMap) -> Image.Image:
    """A pixel for each cell, in ``PALETTE``."""
    picture = Image.fromarray(drawn.cells).convert("P")
    picture.putpalette(PALETTE.tobytes())
    return picture


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(_LETTERS)
    except TypeError:  # before Pillow 10.1 it has no sizes
        return ImageFont.load_default()


def _text_width(text: str) -> int:
    return round(_font().getlength(text))


def selection_map(plan: Plan, pair: Pair) -> Image.Image:
    """The map as one RGB picture, with words; layers of one file only are shown lighter."""
    drawn = SelectionMap.of(plan, pair)
    steps, number = drawn.steps, len(drawn.layers)
    wide, high = max(1, _WIDTH // steps), max(1, _HEIGHT // max(1, number))
    line = _LETTERS + _GAP
    at_the_left = (texts.CONTENT_SHARE, *(word for word, _ in drawn.blocks))
    left = max(map(_text_width, at_the_left)) + 2 * _GAP
    map_height = number * high + len(drawn.blocks)
    strip_height = 0 if drawn.shares is None else _SHARE_HEIGHT + _GAP
    legend_width = sum(_text_width(word) + 3 * line for word in drawn.kinds)
    width = left + max(steps * wide, legend_width) + 4 * _GAP
    whole = Image.new("RGB", (width, _GAP + map_height + _GAP + strip_height + 2 * line), _PAPER)
    pen = ImageDraw.Draw(whole)

    pixels = cells(drawn).convert("RGB")
    y, free_from = _GAP, 0
    for word, rows in drawn.blocks:
        if y >= free_from:  # names that would not fit are left out
            free_from = y + line
            _write(pen, word, y - 1, _GAP)
        part = pixels.crop((0, rows.start, steps, rows.stop))
        part = part.resize((steps * wide, part.height * high), Image.Resampling.NEAREST)
        whole.paste(part, (left, y))
        y += part.height + 1  # a white line between two blocks

    y = _GAP + map_height + _GAP
    if drawn.shares is not None:
        _write(pen, texts.CONTENT_SHARE, y + (_SHARE_HEIGHT - _LETTERS) // 2, _GAP)
        for step, (with_content, alone) in enumerate(drawn.shares):
            x = left + step * wide, left + (step + 1) * wide - 1
            both, content = (y + round(_SHARE_HEIGHT * (1 - s)) for s in (with_content, alone))
            ends = y, both, content, y + _SHARE_HEIGHT
            for kind, top, bottom in zip((STYLE, "both", CONTENT), ends, ends[1:], strict=False):
                if bottom > top:
                    pen.rectangle((x[0], top, x[1], bottom - 1), COLOURS[kind])
    y += strip_height
    _write(pen, texts.STEP, y, _GAP)
    room = _text_width("000")
    apart = next((n for n in (1, 2, 5, 10, 20, 50) if n * wide >= room), 100)
    for step in sorted({1, *range(apart, steps + 1, apart)}):
        _write(pen, str(step), y, left + (step - 1) * wide)

    x, y = left, y + line
    for word in drawn.kinds:
        of_word = [COLOURS[word]] if word in COLOURS else [_lighter(COLOURS[r]) for r in ROLES]
        for colour in of_word:
            pen.rectangle((x, y + 2, x + _GAP, y + _LETTERS - 1), colour)
            x += _GAP + 1
        _write(pen, word, y, x + _GAP)
        x += _text_width(word) + 3 * _GAP
    return whole


def _write(pen: ImageDraw.ImageDraw, text: str, top: int, left: int) -> None:
    pen.text((left, top), text, _INK, _font())


def png(picture: Image.Image) -> bytes:
    """A PNG file of a picture."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()
