"""Many small pictures → one picture with words on it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LEFT, _TOP, _GAP = 150, 26, 4
INK = (40, 40, 40)


@cache
def font() -> ImageFont.FreeTypeFont:
    """One that has γ and ½: matplotlib's."""
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), 12
    )


def sheet(
    rows: Sequence[tuple[str, np.ndarray]], columns: Sequence[str] = (), zoom: int = 2
) -> Image.Image:
    """One line for each (words, pictures uint8 [n, size, size, 3]), under the words of the
    columns."""
    size = rows[0][1].shape[1] * zoom
    count = max(len(pictures) for _, pictures in rows)
    top = _TOP if columns else _GAP
    whole = Image.new(
        "RGB", (_LEFT + count * (size + _GAP), top + len(rows) * (size + _GAP)), "white"
    )
    pen = ImageDraw.Draw(whole)
    for i, words in enumerate(columns):
        pen.text((_LEFT + i * (size + _GAP), 6), words, INK, font())
    for y, (words, pictures) in enumerate(rows):
        above = top + y * (size + _GAP)
        pen.text((6, above + size // 2 - 8), words, INK, font())
        for x, picture in enumerate(pictures):
            small = Image.fromarray(picture).resize((size, size), Image.Resampling.NEAREST)
            whole.paste(small, (_LEFT + x * (size + _GAP), above))
    return whole
