"""``make demo``: K-LoRA beside its parts and beside a plain merge, for a few pairs and seeds.

Writes build/demo/demo.png and index.html, and prints the table of scores.
"""

from __future__ import annotations

import argparse
import html
import time
from pathlib import Path

import numpy as np
from PIL import Image

from lib_klora.plot import describe, selection_map

from . import world
from .generate import Playground
from .scores import Scores, score
from .sheet import sheet
from .ways import ALONE, DIRECT, K_LORA, K_LORA_STAR

WAYS = (*ALONE, DIRECT, K_LORA, K_LORA_STAR)
PAIRS = tuple(zip(world.HELD_OUT_SUBJECTS, world.HELD_OUT_STYLES, strict=True))
SEEDS = (0, 1, 2, 3)

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
<p>A small diffusion model that has never seen these subjects and styles; one LoRA teaches a
subject from five plain pictures, another a style from five pictures of other things. Each column is
a seed. The map shows which LoRA each attention layer (from top to bottom) gets at each step (from
left to right).</p>
{table}
{pairs}
</html>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="K-LoRA in a small world.")
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="how many pairs")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    playground = Playground()
    blocks, sheets, rows = [], [], {way.name: [] for way in WAYS}
    for content, style in PAIRS[: arguments.pairs]:
        print(f"{content} × {style}", flush=True)
        target = np.stack(
            [
                world.draw(content, style, world.Context(), np.random.default_rng(seed))
                for seed in SEEDS
            ]
        )
        lines, maps = [("as we would draw it", target)], []
        for way in WAYS:
            made, report = playground.generate(
                way.prompt(content, style), SEEDS, way.settings, way.steps
            )
            rows[way.name].append(score(made, content, style))
            lines.append((way.name, made))
            if way in (K_LORA, K_LORA_STAR):
                file = f"{content}-{style}-{way.settings.scale.replace('*', '-star')}.png"
                plan, pair = report.plans[-1], report.pair
                Image.fromarray(selection_map(plan, pair)).save(arguments.out / file)
                maps.append((way.name, file, describe(plan, pair)))
        sheets.append(sheet(lines, [f"{content} × {style}"]))
        file = f"{content}-{style}.png"
        sheets[-1].save(arguments.out / file)
        blocks.append(_pair_html(content, style, file, maps))
    _side_by_side(sheets).save(arguments.out / "demo.png")
    table = [
        (way.name, Scores(*(np.stack(c) for c in zip(*rows[way.name], strict=True))))
        for way in WAYS
    ]
    print(_text_table(table))
    page = arguments.out / "index.html"
    page.write_text(
        _PAGE.format(table=_html_table(table), pairs="\n".join(blocks)), encoding="utf-8"
    )
    print(f"{time.monotonic() - started:.0f} s. Open {page.resolve().as_uri()}")


_COLUMNS = (("subject", "subject"), ("style", "style"), ("agree", "both"))
"""Attribute of ``Scores``, and what it is called here."""


def _percent(table: list[tuple[str, Scores]]) -> list[tuple[str, list[str]]]:
    return [
        (name, [f"{100 * getattr(scores, column).mean():.0f} %" for column, _ in _COLUMNS])
        for name, scores in table
    ]


def _text_table(table: list[tuple[str, Scores]]) -> str:
    lines = [f"{'':24}" + "".join(f"{word:>10}" for _, word in _COLUMNS)]
    lines += [
        f"{name:24}" + "".join(f"{cell:>10}" for cell in row) for name, row in _percent(table)
    ]
    return "\n".join([*lines, "subject, style: what the judges see of it; both: shows both."])


def _html_table(table: list[tuple[str, Scores]]) -> str:
    head = "".join(f"<th>{word}</th>" for _, word in _COLUMNS)
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


def _side_by_side(pictures: list[Image.Image]) -> Image.Image:
    whole = Image.new(
        "RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white"
    )
    y = 0
    for picture in pictures:
        whole.paste(picture, (0, y))
        y += picture.height
    return whole


if __name__ == "__main__":
    main()
