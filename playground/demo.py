"""``make demo``: K-LoRA beside its parts and beside a plain merge, for a few pairs and seeds.

Writes build/demo/demo.png and index.html, and prints the table of scores.
"""

from __future__ import annotations

import argparse
import html
import textwrap
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lib_klora.picture import selection_map
from lib_klora.plot import describe

from .generate import Playground
from .judges import Judges
from .scores import COLUMNS, TITLES, Scores
from .sheet import INK, font, sheet
from .ways import ALONE, DIRECT, OURS

WAYS = (*ALONE, DIRECT, *OURS)
PAIRS = (
    ("strawberry", "streamline"), ("turtle", "fluent-3d"), ("rocket", "fluent-black"),
    ("cactus", "streamline"), ("crown", "fluent-3d"),
)  # fmt: skip
SEEDS = (0, 1, 2, 3)
TRUTH = "the true picture"
_CAPTION = 30
_MEANING = (
    "Subject, style, both named: pictures in which the judges name the thing, the set, both, of "
    "ten things and ten sets; of 456: the thing, of all that there are. Truth, palette, "
    "silhouette: likeness to the true picture."
)

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>K-LoRA playground</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1rem }}
img {{ max-width: 100%; image-rendering: pixelated }}
table {{ border-collapse: collapse }} td, th {{ padding: .2rem .8rem; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} tr + tr {{ border-top: 1px solid #ccc }}
</style>
<h1>K-LoRA playground</h1>
<p>A small diffusion model of emoji that has never seen these things and these sets. One LoRA
teaches a thing from its one drawing in another set, one teaches a set from sixteen other things.
Their true picture exists: it is above each. Each column is a seed. The map shows which LoRA each
attention layer (from top to bottom) gets at each step (from left to right).</p>
{table}
<p>{meaning}</p>
{pairs}
</html>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="K-LoRA in a small world.")
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="how many pairs")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    playground, judges = Playground(), Judges.load()
    pairs = PAIRS[: arguments.pairs]
    blocks, maps, scores = [], [], {way.name: [] for way in WAYS}
    pictures: dict[str, list[np.ndarray]] = {way.name: [] for way in WAYS}
    for content, style in pairs:
        print(f"{content} × {style}", flush=True)
        maps_here = []
        for way in WAYS:
            made, report = playground.generate(
                way.prompt(content, style), SEEDS, way.settings, way.steps
            )
            pictures[way.name].append(made)
            scores[way.name].append(judges.score(made, content, style))
            if way in OURS:
                file = f"{content}-{style}-{way.settings.scale.replace('*', '-star')}.png"
                plan, pair = report.passes[-1].plan, report.passes[-1].pair
                maps.append(selection_map(plan, pair))
                maps[-1].save(out / file)
                maps_here.append((way.name, file, describe(plan, pair)))
        lines = [(TRUTH, judges.true[style, content][None])]
        lines += [(name, made[-1]) for name, made in pictures.items()]
        file = f"{content}-{style}.png"
        sheet(lines).save(out / file)
        blocks.append(_pair_html(content, style, file, maps_here))
    _overview(judges, pairs, pictures, maps[: len(OURS)]).quantize(256).save(
        out / "demo.png", optimize=True
    )
    table = [(name, Scores.of(rows)) for name, rows in scores.items()]
    print(_text_table(table))
    page = out / "index.html"
    page.write_text(
        _PAGE.format(table=_html_table(table), meaning=_MEANING, pairs="\n".join(blocks)),
        encoding="utf-8",
    )
    print(f"{time.monotonic() - started:.0f} s. Open {page.resolve().as_uri()}")


def _overview(
    judges: Judges, pairs, pictures: dict[str, list[np.ndarray]], maps: list[Image.Image]
) -> Image.Image:
    """The truth, and two seeds of every pair in every way; below them the first pair's maps."""
    columns = [words for pair in pairs for words in (f"{pair[0]} ×", pair[1])]
    true = [judges.true[style, thing] for thing, style in pairs for _ in range(2)]
    rows = [(TRUTH, np.stack(true))]
    rows += [(name, np.concatenate([p[:2] for p in made])) for name, made in pictures.items()]
    above = sheet(rows, columns)
    width = above.width // len(maps)
    maps = [m.resize((width - 8, round(m.height * (width - 8) / m.width))) for m in maps]
    whole = Image.new("RGB", (above.width, above.height + _CAPTION + maps[0].height), "white")
    whole.paste(above, (0, 0))
    pen = ImageDraw.Draw(whole)
    for i, (way, picture) in enumerate(zip(OURS, maps, strict=True)):
        words = f"{way.name}: which LoRA each layer gets at each step"
        pen.text((6 + i * width, above.height + 8), words, INK, font())
        whole.paste(picture, (i * width, above.height + _CAPTION))
    return whole


def _percent(table: list[tuple[str, Scores]]) -> list[tuple[str, list[str]]]:
    return [
        (name, [f"{100 * getattr(scores, column).mean():.0f} %" for column in COLUMNS])
        for name, scores in table
    ]


def _text_table(table: list[tuple[str, Scores]]) -> str:
    rows = [("", [TITLES[column] for column in COLUMNS]), *_percent(table)]
    widths = [max(map(len, cells)) + 2 for cells in zip(*(row for _, row in rows), strict=True)]
    lines = [f"{name:18}" + "".join(map(str.rjust, cells, widths)) for name, cells in rows]
    return "\n".join([*lines, *textwrap.wrap(_MEANING, len(lines[0]))])


def _html_table(table: list[tuple[str, Scores]]) -> str:
    head = "".join(f"<th>{TITLES[column]}</th>" for column in COLUMNS)
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
        for name, row in _percent(table)
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _pair_html(content: str, style: str, file: str, maps: list[tuple[str, str, str]]) -> str:
    parts = [f"<h2>{content} × {style}</h2>", f'<img src="{file}" alt="{content} in {style}">']
    for name, map_file, words in maps:
        parts.append(f"<h3>{html.escape(name)}</h3><p>{html.escape(words)}</p>")
        parts.append(f'<img src="{map_file}" alt="{html.escape(words, quote=True)}">')
    return "\n".join(parts)


if __name__ == "__main__":
    main()
