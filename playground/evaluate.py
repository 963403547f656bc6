"""``make evaluate``: every way to fuse, scored; the tables and figures of docs/EVALUATION.md.

The prose is evaluation.md beside this file; its ``<!-- NAME -->`` marks become the tables.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import diffusers
import matplotlib
import numpy as np
import torch

from . import judges, world
from .generate import Playground, strengthened
from .model import WEIGHTS
from .scores import COLUMNS, PAIRS, SEEDS, Scores, Way, interval, judge, score
from .sheet import sheet
from .ways import (
    ALPHAS,
    BETAS,
    DIRECT,
    GAMMAS,
    GRID,
    K_LORA,
    K_LORA_STAR,
    METHOD_WAYS,
    MULTIPLIERS,
    STEP_COUNTS,
    STRENGTHS,
    STRONG,
)  # fmt: skip

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DOCS = Path("docs")
TEMPLATE = Path(__file__).parent / "evaluation.md"
TITLES = {
    "subject": "subject",
    "style": "style",
    "both": "subject × style",
    "agree": "both named",
    "palette": "palette",
    "silhouette": "silhouette",
}
SHOWN_PAIRS = (("cat", "lava"), ("mushroom", "disco"), ("rocket", "stamp"), ("mug", "crayon"),
               ("umbrella", "mosaic"))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="pictures for each pair")
    parser.add_argument("--out", type=Path, default=DOCS)
    arguments = parser.parse_args()
    started, seeds = time.monotonic(), range(arguments.seeds)
    groups = {
        "methods": METHOD_WAYS,
        "grid": tuple(GRID.values()),
        "top_k": tuple(MULTIPLIERS.values()),
        "steps": tuple(STEP_COUNTS.values()),
        "gamma": tuple(GAMMAS.values()),
        "strength": tuple(STRENGTHS.values()),
    }
    done = _measure({_nameless(way) for ways in groups.values() for way in ways}, seeds)
    tables = {
        name: [(way.name, done[_nameless(way)][0]) for way in ways] for name, ways in groups.items()
    }
    drawn = [("drawn, not generated", _drawn_scores(seeds))]
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    blocks = {name: _markdown(table) for name, table in tables.items() if name != "grid"}
    blocks["methods"] = _markdown([*drawn, *tables["methods"]])
    blocks["grid"] = _grid_markdown(dict(tables["grid"]))
    blocks["pairs"] = _pairs_markdown(dict(tables["methods"]))
    blocks["about"] = _about(Playground(), len(seeds), time.monotonic() - started)
    _figure(tables["methods"], out / "evaluation-methods.png")
    shown = [(way, done[_nameless(way)][1]) for way in METHOD_WAYS]
    _pictures(shown).quantize(256).save(out / "evaluation-pictures.png", optimize=True)
    _write_blocks(out / "EVALUATION.md", blocks)
    _write_json(out / "evaluation.json", {**tables, "drawn": drawn})


def _nameless(way: Way) -> Way:
    """Ways that differ in name only are measured once."""
    return replace(way, name="")


def _measure(ways: set[Way], seeds: Sequence[int]) -> dict[Way, tuple[Scores, dict]]:
    """What ``judge`` finds for each way; a process for each core, with one thread each."""
    started, done = time.monotonic(), {}
    first = sorted(ways, key=lambda way: -way.steps)  # the longest, so that none is left to the end
    context = multiprocessing.get_context("spawn")
    with context.Pool(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = pool.imap(_measure_one, [(way, seeds) for way in first])
        for way, result in zip(first, found, strict=True):
            done[way] = result
            print(
                f"{len(done)}/{len(first)} ways, {time.monotonic() - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return done


def _measure_one(job: tuple[Way, Sequence[int]]) -> tuple[Scores, dict]:
    way, seeds = job
    return judge(_playground(way.strong), way, PAIRS, seeds)


@cache
def _playground(strong: str) -> Playground:
    """With the LoRAs of one role ``STRONG`` times as strong, or as they are."""
    if not strong:
        return Playground()
    names = {"content": world.HELD_OUT_SUBJECTS, "style": world.HELD_OUT_STYLES}[strong]
    folder = Path(f"build/playground/strong-{strong}-{os.getpid()}")
    return Playground(folder=strengthened(STRONG, names, folder))


def _drawn_scores(seeds: Sequence[int]) -> Scores:
    """What drawn pictures of the pairs get: as good as it can be."""
    rows = []
    for content, style in PAIRS:
        pictures = [
            world.draw(content, style, world.Context(), np.random.default_rng(10_000 + seed))
            for seed in seeds
        ]
        rows.append(score(np.stack(pictures), content, style))
    return Scores(*(np.stack(column) for column in zip(*rows, strict=True)))


def _cell(values: np.ndarray) -> str:
    low, high = interval(values)
    return f"{100 * values.mean():.0f} ({100 * low:.0f}–{100 * high:.0f})"


def _markdown(table: list[tuple[str, Scores]]) -> str:
    lines = ["| | " + " | ".join(TITLES[c] for c in COLUMNS) + " |", "|---" + "|--:" * 6 + "|"]
    for name, scores in table:
        lines.append(f"| {name} | " + " | ".join(_cell(getattr(scores, c)) for c in COLUMNS) + " |")
    return "\n".join(lines)


def _grid_markdown(table: dict[str, Scores]) -> str:
    lines = ["| both named | " + " | ".join(f"β = {b:g}" for b in BETAS) + " |"]
    lines.append("|---" + "|--:" * len(BETAS) + "|")
    for alpha in ALPHAS:
        cells = [_cell(table[GRID[alpha, beta].name].agree) for beta in BETAS]
        lines.append(f"| α = {alpha:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pairs_markdown(table: dict[str, Scores]) -> str:
    """Of each pair, how often both are named: K-LoRA (S) and the plain merge."""
    lines = ["| both named | " + " | ".join(world.HELD_OUT_STYLES) + " |"]
    lines.append("|---" + "|--:" * len(world.HELD_OUT_STYLES) + "|")
    ours, plain = table[K_LORA.name].agree.mean(1), table[DIRECT.name].agree.mean(1)
    for content in world.HELD_OUT_SUBJECTS:
        cells = []
        for style in world.HELD_OUT_STYLES:
            i = PAIRS.index((content, style))
            cells.append(f"{100 * ours[i]:.0f} / {100 * plain[i]:.0f}")
        lines.append(f"| {content} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _about(playground: Playground, seeds: int, seconds: float) -> str:
    accuracy = json.loads((WEIGHTS / "judges.json").read_text())
    gammas = []
    for content, style in PAIRS:
        _, report = playground.generate(K_LORA.prompt(content, style), [0], K_LORA.settings, 1)
        gammas.append(report.passes[-1].plan.gamma)
    right = [
        max(judges.SUBJECTS, key=lambda s: judges.silhouette_iou(picture, s)) == content
        for content, style in PAIRS
        for picture in [world.draw(content, style, world.Context(), np.random.default_rng(77))]
    ]
    return "\n".join(
        [
            f"- {len(PAIRS)} pairs × {seeds} seeds = {len(PAIRS) * seeds} pictures for each line; "
            f"{seconds / 60:.0f} minutes in all.",
            f"- Judges on 2000 drawn pictures that they had not seen: subject "
            f"{100 * accuracy['subject']:.1f} %, style {100 * accuracy['style']:.1f} % right. The "
            f"silhouette alone finds the right one of {len(judges.SUBJECTS)} subjects in "
            f"{100 * np.mean(right):.0f} % of drawn pictures.",
            f"- γ of the pairs: {min(gammas):.2f} to {max(gammas):.2f}, median "
            f"{np.median(gammas):.2f}.",
            f"- PyTorch {torch.__version__}, diffusers {diffusers.__version__}, Python "
            f"{platform.python_version()}, CPU.",
        ]
    )


def _figure(table: list[tuple[str, Scores]], path: Path) -> None:
    """Subject against style, as in the paper's comparisons: the best are in the upper right."""
    figure, axes = plt.subplots(figsize=(7.5, 6))
    for name, scores in table:
        x, y = scores.subject, scores.style
        ours = name in (K_LORA.name, K_LORA_STAR.name)
        error = [[[abs(100 * (v.mean() - edge))] for edge in interval(v)] for v in (x, y)]
        axes.errorbar(
            100 * x.mean(), 100 * y.mean(), xerr=error[0], yerr=error[1], fmt="o",
            color="#0072b2" if ours else "#888888", elinewidth=0.8,
        )  # fmt: skip
        axes.annotate(
            name,
            (100 * x.mean(), 100 * y.mean()),
            (6, 5),
            textcoords="offset points",
            fontsize=9,
            weight="bold" if ours else "normal",
        )
    axes.set(xlabel="subject score, %", ylabel="style score, %", xlim=(-3, 108), ylim=(-3, 106))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _pictures(shown: list[tuple[Way, dict]]):
    drawn = [
        world.draw(content, style, world.Context(), np.random.default_rng(1))
        for content, style in SHOWN_PAIRS
        for _ in range(2)
    ]
    rows = [("drawn", np.stack(drawn))]
    rows += [
        (way.name, np.concatenate([pictures[pair][:2] for pair in SHOWN_PAIRS]))
        for way, pictures in shown
    ]
    columns = [words for content, style in SHOWN_PAIRS for words in (content, f"× {style}")]
    return sheet(rows, columns, zoom=2)


def _write_blocks(path: Path, blocks: dict[str, str]) -> None:
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, block in blocks.items():
        text = text.replace(f"<!-- {name} -->", block)
    path.write_text(text, encoding="utf-8")


def _write_json(path: Path, tables: dict[str, list[tuple[str, Scores]]]) -> None:
    data = {
        group: {
            name: {c: round(float(getattr(scores, c).mean()), 4) for c in COLUMNS}
            for name, scores in table
        }
        for group, table in tables.items()
    }
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
