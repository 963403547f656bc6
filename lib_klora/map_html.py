"""The selection map in the page: drawn in the page's own font and theme, and alive.

The cells are one small picture with a pixel each, so that a choice that changes in every cell costs
no more than one that hardly changes. What javascript/klora_map.js tells of a cell is in the
attributes, and a table holds the same for those who cannot see or point.
"""

from __future__ import annotations

import base64
import html
import math
import statistics
from collections.abc import Iterable

import numpy as np

from . import texts
from .methods import BITS
from .picture import cells, png
from .plot import ALONE, SelectionMap
from .tag import CONTENT, ROLES, STYLE

_LETTERS = {0: "n", BITS[CONTENT]: "c", BITS[STYLE]: "s", BITS[CONTENT] + BITS[STYLE]: "b"}
_LABEL = 0.032
"""Part of the map's height that a line of words takes."""


def map_html(drawn: SelectionMap, words: str) -> str:
    """``words``: the map's reading, for those who hear the page."""
    picture = cells(drawn)
    picture.info["transparency"] = 0  # nothing there: the page's own ground
    source = base64.b64encode(png(picture)).decode()
    attributes = {
        "data-layers": _front_coded(drawn.layers),
        "data-runs": _runs(drawn.cells),
        "data-ratios": " ".join("" if np.isnan(r) else f"{r:.3g}" for r in drawn.ratio),
    }
    if np.isnan(drawn.ratio).all():
        del attributes["data-ratios"]
    data = " ".join(f'{key}="{html.escape(value)}"' for key, value in attributes.items())
    return (
        f'<div class="klora-map" tabindex="0" role="group" '
        f'aria-label="Selection map: {html.escape(words, quote=True)}" {data} '
        f'style="--layers: {len(drawn.layers)}">'
        f'<div class="klora-map-plot"><div class="klora-map-blocks" aria-hidden="true">'
        f"{_block_names(drawn)}</div>"
        f'<div class="klora-map-cells"><img alt="" src="data:image/png;base64,{source}">'
        f"{_block_lines(drawn)}</div>{_shares(drawn)}"
        f'<span class="klora-map-axis">{texts.STEP}</span>'
        f'<div class="klora-map-steps" aria-hidden="true">{_step_numbers(drawn.steps)}</div></div>'
        f'<p class="klora-map-legend" aria-hidden="true">{_legend(drawn)}</p>'
        f'<p class="klora-map-told" aria-live="polite">{texts.MAP_HINT}</p>'
        f"{_table(drawn)}</div>"
    )


def _front_coded(names: Iterable[str]) -> str:
    """Each name as how many of its parts, between “_”, are those of the one before it, and the
    rest."""
    coded, before = [], []
    for name in names:
        parts = name.split("_")
        pairs = enumerate(zip(before, parts, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(before), len(parts)))
        coded.append(f"{shared}:{'_'.join(parts[shared:])}")
        before = parts
    return " ".join(coded)


def _runs(cells: np.ndarray) -> str:
    """“c9sc2” for a layer: content for 9 steps, style for one, content for 2; in capitals for one
    that only one file has."""
    rows = []
    for row, changes in zip(cells.tolist(), np.diff(cells, axis=1) != 0, strict=True):
        runs, begin = [], 0
        for end in (*(np.flatnonzero(changes) + 1).tolist(), len(row)):
            cell = row[begin]
            letter = _LETTERS[cell % ALONE]
            runs.append(letter.upper() if cell > ALONE else letter)
            if end > begin + 1:
                runs.append(str(end - begin))
            begin = end
        rows.append("".join(runs))
    return " ".join(rows)


def _percent(part: float) -> str:
    return f"{100 * part:.6g}%"


def _tops(drawn: SelectionMap) -> list[tuple[str, float]]:
    """Each block and where it begins, 0..1."""
    return [(word, rows.start / len(drawn.layers)) for word, rows in drawn.blocks]


def _block_names(drawn: SelectionMap) -> str:
    parts, free_from = [], 0.0
    for word, top in _tops(drawn):
        if top >= free_from and top <= 1 - _LABEL:  # names that would not fit are left out
            free_from = top + _LABEL
            parts.append(f'<span style="top: {_percent(top)}">{word}</span>')
    return "".join(parts)


def _block_lines(drawn: SelectionMap) -> str:
    return "".join(f'<i style="top: {_percent(top)}"></i>' for _, top in _tops(drawn)[1:])


def _shares(drawn: SelectionMap) -> str:
    """Content at the bottom, style at the top, both between."""
    if drawn.shares is None:
        return ""
    areas = [f'<rect class="klora-{STYLE}" width="{drawn.steps}" height="1"/>']
    for kind, column in (("both", 0), (CONTENT, 1)):
        tops = "".join(f"V{1 - share:.3g}h1" for share in drawn.shares[:, column])
        areas.append(f'<path class="klora-{kind}" d="M0 1{tops}V1z"/>')
    return (
        f'<span class="klora-map-axis">{texts.CONTENT_SHARE}</span>'
        f'<svg class="klora-map-shares" viewBox="0 0 {drawn.steps} 1" preserveAspectRatio="none" '
        f'aria-hidden="true">{"".join(areas)}</svg>'
    )


def _step_numbers(steps: int) -> str:
    apart = next((n for n in (1, 2, 5, 10, 20, 50) if steps / n <= 16), 100)
    numbers = sorted({1, *range(apart, steps + 1, apart)})
    return "".join(f'<span style="left: {_percent((n - 0.5) / steps)}">{n}</span>' for n in numbers)


def _legend(drawn: SelectionMap) -> str:
    parts = []
    for kind in drawn.kinds:
        words = [f"{role}-alone" for role in ROLES] if kind == texts.ALONE else [kind]
        swatches = "".join(f'<i class="klora-swatch klora-{word}"></i>' for word in words)
        parts.append(f"<span>{swatches} <span>{kind}</span></span>")
    return "".join(parts)


def _table(drawn: SelectionMap) -> str:
    """Of each block its layers, the middle of their ratios, and in what part of the steps they have
    content; of each step, what part of the layers has."""
    content = (drawn.cells & BITS[CONTENT]).astype(bool)
    rows = []
    for word, part in drawn.blocks:
        layers = part.stop - part.start
        ratios = [ratio for ratio in drawn.ratio[part].tolist() if not math.isnan(ratio)]
        middle = f"{statistics.median(ratios):.3g}" if ratios else ""
        rows.append((word, str(layers), middle, f"{100 * content[part].mean():.0f} %"))
    of_blocks = _rows(texts.MAP_BLOCK_COLUMNS, rows)
    shares = [] if drawn.shares is None else drawn.shares[:, 0]
    steps = [(str(i), f"{100 * share:.0f} %") for i, share in enumerate(shares, 1)]
    of_steps = _rows(texts.MAP_STEP_COLUMNS, steps) if steps else ""
    return (
        f'<details class="klora-map-table"><summary>{texts.AS_TABLE}</summary>'
        f"<div>{of_blocks}{of_steps}</div></details>"
    )


def _rows(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    first = "".join(f'<th scope="col">{word}</th>' for word in head)
    body = "".join(
        f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for name, *cells in rows
    )
    return f"<table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table>"
