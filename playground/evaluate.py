"""``make evaluate``: every way to fuse, scored; the tables and figures of docs/EVALUATION.md.

The prose is evaluation.md beside this file; its ``<!-- NAME -->`` marks become the tables.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import diffusers
import matplotlib
import numpy as np
import torch

from . import world
from .generate import Playground, altered
from .judges import Judges, silhouette_iou
from .model import WEIGHTS
from .real_files import OUT as REAL_FILES
from .scores import COLUMNS, PAIRS, SEEDS, TITLES, Scores, Way, interval, judge, p_value
from .sheet import sheet
from .ways import (
    ALPHAS,
    BETAS,
    DIRECT,
    ENDS,
    FEWER_LAYERS,
    FEWER_STEPS,
    GAMMAS,
    GRID,
    K_LORA,
    KEPT,
    METHOD_WAYS,
    MULTIPLIERS,
    OURS,
    PARTS,
    SHARES,
    STARTS,
    STEP_COUNTS,
    STRENGTHS,
    STRONG,
)  # fmt: skip

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DOCS = Path("docs")
TEMPLATE = Path(__file__).parent / "evaluation.md"
SHOWN_PAIRS = (
    ("strawberry", "streamline"), ("turtle", "fluent-3d"), ("rocket", "fluent-black"),
    ("elephant", "streamline"), ("crown", "fluent-3d"), ("tulip", "fluent-black"),
)  # fmt: skip
FEW_PAIRS = tuple((c, world.STYLES[i % len(world.STYLES)]) for i, c in enumerate(world.SUBJECTS))
"""For one LoRA alone: every thing, every set a few times."""
MEASURED = Path("build/playground/measured")
"""A file for each way that was measured, so that a stopped evaluation goes on where it was."""
_MEASURED_WITH = (
    "lib_klora/*.py", "lib_klora/hosts/*.py", "playground/generate.py", "playground/judges.py",
    "playground/model.py", "playground/scores.py", "playground/world.py", "playground/weights/**/*",
)  # fmt: skip
"""What a measurement follows from, beside the way itself."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="pictures for each pair")
    parser.add_argument("--out", type=Path, default=DOCS)
    arguments = parser.parse_args()
    seeds = tuple(range(arguments.seeds))
    groups = {
        "methods": METHOD_WAYS,
        "grid": tuple(GRID.values()),
        "top_k": tuple(MULTIPLIERS.values()),
        "steps": tuple(STEP_COUNTS.values()),
        "gamma": tuple(GAMMAS.values()),
        "strength": tuple(STRENGTHS.values()),
        "shares": tuple(SHARES.values()),
        "layers": tuple(FEWER_LAYERS.values()),
        "parts": tuple(FEWER_STEPS.values()),
    }
    done = _measure({_nameless(way) for ways in groups.values() for way in ways}, seeds)
    tables = {
        name: [(way.name, done[_nameless(way)].scores) for way in ways]
        for name, ways in groups.items()
    }
    drawn = [("the true pictures", _true_scores())]
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    blocks = {name: _markdown(tables[name]) for name in ("top_k", "steps", "gamma", "strength")}
    blocks["methods"] = _markdown([*drawn, *tables["methods"]])
    blocks["grid"] = _grid_markdown(
        dict(tables["grid"]), GRID, down=("α", ALPHAS), across=("β", BETAS)
    )
    blocks["shares"] = _grid_markdown(
        dict(tables["shares"]), SHARES, down=("start", STARTS), across=("end", ENDS)
    )
    blocks["real"] = REAL_FILES.read_text(encoding="utf-8").strip()
    blocks["significance"] = _significance_markdown(dict(tables["methods"]), DIRECT)
    blocks["against_s"] = _significance_markdown(
        dict(tables["methods"]), K_LORA, ("subject", "style", "both", "truth")
    )
    blocks["pairs"] = _pairs_markdown(dict(tables["methods"]))
    seconds = sum(measured.seconds for measured in done.values())
    blocks["about"] = _about(Playground(), len(seeds), seconds)
    _validity(dict(tables["layers"]), dict(tables["parts"]), out / "evaluation-validity.png")
    _figure(tables["methods"], out / "evaluation-methods.png")
    shown = [(way, done[_nameless(way)].pictures) for way in METHOD_WAYS]
    _pictures(shown).quantize(256).save(out / "evaluation-pictures.png", optimize=True)
    _write_blocks(out / "EVALUATION.md", blocks)
    _write_json(out / "evaluation.json", {**tables, "drawn": drawn})


def _nameless(way: Way) -> Way:
    """Ways that differ in name only are measured once."""
    return replace(way, name="")


@dataclass(frozen=True)
class Measured:
    """What was found out about one way.

    Attributes:
        scores: of ``_pairs(way)``.
        pictures: (thing, set) → uint8 [seeds, SIZE, SIZE, 3], for those of SHOWN_PAIRS.
        seconds: of one core.
    """

    scores: Scores
    pictures: Mapping[tuple[str, str], np.ndarray]
    seconds: float

    @classmethod
    def read(cls, path: Path) -> Measured:
        with np.load(path) as file:
            arrays = dict(file)
        seconds = float(arrays.pop("seconds"))
        scores = Scores(**{column: arrays.pop(column) for column in COLUMNS})
        return cls(scores, {tuple(pair.split()): made for pair, made in arrays.items()}, seconds)

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        columns = {column: getattr(self.scores, column) for column in COLUMNS}
        pictures = {" ".join(pair): made for pair, made in self.pictures.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new.npz")
        np.savez(new, seconds=self.seconds, **columns, **pictures)
        new.replace(path)


def _measure(ways: Iterable[Way], seeds: Sequence[int]) -> dict[Way, Measured]:
    """What ``judge`` finds for each way, now or earlier; a process for each core, with one thread
    each."""
    started, state = time.monotonic(), _state()
    files = {way: MEASURED / f"{_key(way, seeds, state)}.npz" for way in ways}
    # The longest first, so that none is left to the end.
    missing = [way for way in files if not files[way].exists()]
    missing.sort(key=lambda way: -way.steps * len(_pairs(way)))
    context = multiprocessing.get_context("spawn")
    with context.Pool(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = [(way, seeds, files[way]) for way in missing]
        for done, _ in enumerate(pool.imap_unordered(_measure_one, jobs), 1):
            seconds = time.monotonic() - started
            print(f"{done}/{len(jobs)} ways, {seconds:.0f} s", file=sys.stderr, flush=True)
    return {way: Measured.read(path) for way, path in files.items()}


def _measure_one(job: tuple[Way, Sequence[int], Path]) -> None:
    way, seeds, path = job
    started = time.process_time()
    scores, pictures = judge(_playground(way.strong, way.kept), way, _pairs(way), seeds)
    shown = {pair: made for pair, made in pictures.items() if pair in SHOWN_PAIRS}
    Measured(scores, shown, time.process_time() - started).write(path)


def _pairs(way: Way) -> tuple[tuple[str, str], ...]:
    return FEW_PAIRS if way.kept != 1 or way.lora_between != (0, 1) else PAIRS


def _state() -> str:
    """A digest of the code and the weights that are measured with."""
    root, digest = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for pattern in _MEASURED_WITH:
        for path in sorted(path for path in root.glob(pattern) if path.is_file()):
            digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return f"{digest.hexdigest()} {torch.__version__} {diffusers.__version__}"


def _key(way: Way, seeds: Sequence[int], state: str) -> str:
    about = f"{state} {way} {STRONG} {_pairs(way)} {tuple(seeds)}"
    return hashlib.sha256(about.encode()).hexdigest()[:24]


@cache
def _playground(strong: str, kept: float) -> Playground:
    """With the LoRAs as they are, or with altered ones."""
    if not strong and kept == 1:
        return Playground()
    names = {"content": world.SUBJECTS, "style": world.STYLES}
    folder = Path(f"build/playground/altered-{strong}-{kept}-{os.getpid()}")
    if strong:
        return Playground(folder=altered(names[strong], folder, factor=STRONG))
    return Playground(folder=altered([*world.SUBJECTS, *world.STYLES], folder, kept=kept))


def _true_scores() -> Scores:
    """What the true pictures get: as good as it can be."""
    judges = Judges.load()
    return Scores.of(judges.score(judges.true[s, c][None], c, s) for c, s in PAIRS)


def _cell(values: np.ndarray) -> str:
    low, high = interval(values)
    return f"{100 * values.mean():.0f} ({100 * low:.0f}–{100 * high:.0f})"


def _markdown(table: list[tuple[str, Scores]]) -> str:
    lines = [
        "| | " + " | ".join(TITLES[c] for c in COLUMNS) + " |",
        "|---" + "|--:" * len(COLUMNS) + "|",
    ]
    for name, scores in table:
        lines.append(f"| {name} | " + " | ".join(_cell(getattr(scores, c)) for c in COLUMNS) + " |")
    return "\n".join(lines)


def _grid_markdown(table: dict[str, Scores], ways, *, down: tuple, across: tuple) -> str:
    """``down`` and ``across``: the name of a setting, and its values."""
    (down, rows), (across, columns) = down, across
    lines = ["| both named | " + " | ".join(f"{across} = {x:g}" for x in columns) + " |"]
    lines.append("|---" + "|--:" * len(columns) + "|")
    for y in rows:
        cells = [_cell(table[ways[y, x].name].both) for x in columns]
        lines.append(f"| {down} = {y:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pairs_markdown(table: dict[str, Scores]) -> str:
    """Of each pair, how often both are named: the plain merge and ours."""
    lines = ["| both named | " + " | ".join(world.STYLES) + " |"]
    lines.append("|---" + "|--:" * len(world.STYLES) + "|")
    means = [table[way.name].both.mean(1) for way in (DIRECT, *OURS)]
    for content in world.SUBJECTS:
        pairs = [PAIRS.index((content, style)) for style in world.STYLES]
        cells = [" / ".join(f"{100 * mean[i]:.0f}" for mean in means) for i in pairs]
        lines.append(f"| {content} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _significance_markdown(
    table: dict[str, Scores], base: Way, columns: Sequence[str] = ("both", "truth")
) -> str:
    """Differences to one way, and whether they are more than chance."""
    head = " | p | ".join(TITLES[column] for column in columns)
    lines = [f"| minus {base.name} | {head} | p |", "|---" + "|--:" * (2 * len(columns)) + "|"]
    for name, scores in table.items():
        if name == base.name:
            continue
        cells = []
        for column in columns:
            own, plain = getattr(scores, column), getattr(table[base.name], column)
            p = p_value(own, plain)
            cells += [f"{100 * (own - plain).mean():+.1f}", f"{p:.3f}" if p >= 0.001 else "< 0.001"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _about(playground: Playground, seeds: int, seconds: float) -> str:
    right = json.loads((WEIGHTS / "judges.json").read_text())
    judges, gammas = Judges.load(), []
    for content, style in PAIRS:
        _, report = playground.generate(K_LORA.prompt(content, style), [0], K_LORA.settings, 1)
        gammas.append(report.passes[-1].plan.gamma)
    outlines = [
        max(world.SUBJECTS, key=lambda c: silhouette_iou(
            judges.true[style, content], judges.true[world.CONTENT_SET, c])) == content
        for content, style in PAIRS
    ]  # fmt: skip
    return "\n".join(
        [
            f"- {len(PAIRS)} pairs × {seeds} seeds = {len(PAIRS) * seeds} pictures for each line; "
            f"{seconds / 60:.0f} minutes of one core in all.",
            f"- The judges on what they were not fitted to: the right one of "
            f"{len(judges.subject.classes)} things in a set that was left out "
            + _each(right, "subject")
            + f"; the right one of {len(judges.style.classes)} sets for things that were left out "
            + _each(right, "style")
            + f". The silhouette alone finds the right one of the {len(world.SUBJECTS)} held-out "
            f"things from another set for {100 * np.mean(outlines):.0f} % of the true pictures.",
            f"- γ of the pairs: {min(gammas):.2f} to {max(gammas):.2f}, median "
            f"{np.median(gammas):.2f}.",
            f"- PyTorch {torch.__version__}, diffusers {diffusers.__version__}, Python "
            f"{platform.python_version()}, CPU.",
        ]
    )


def _each(right: dict[str, float], kind: str) -> str:
    return ", ".join(f"{100 * right[f'{kind}, {s}']:.0f} % ({s})" for s in world.STYLES)


def _validity(layers: dict[str, Scores], parts: dict[str, Scores], path: Path) -> None:
    """The paper's two findings in this world: what is left of one LoRA's effect with a part of its
    layers, and with a part of the steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for role, colour in (("content", "#0072b2"), ("style", "#e69f00")):
        column = {"content": "subject", "style": "style"}[role]
        percent = 100 / max(_mean_of_few(layers[FEWER_LAYERS[role, 1.0].name], column), 1e-9)
        y = [percent * _mean_of_few(layers[FEWER_LAYERS[role, k].name], column) for k in KEPT]
        left.plot([100 * kept for kept in KEPT], y, "o-", color=colour, label=f"{role} LoRA")
        y = [percent * _mean_of_few(parts[FEWER_STEPS[role, part].name], column) for part in PARTS]
        right.plot(list(PARTS), y, "o-", color=colour, label=f"{role} LoRA")
    left.set(xlabel="% of the LoRA's layers, at random", ylabel="% of what it does with all")
    right.set(xlabel="steps in which the LoRA is there", ylabel="% of what it does in all")
    right.tick_params("x", rotation=25)
    for axes in (left, right):
        axes.set(ylim=(-3, 110))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _mean_of_few(scores: Scores, column: str) -> float:
    """Over FEW_PAIRS, whatever was measured."""
    values = getattr(scores, column)
    rows = [PAIRS.index(pair) for pair in FEW_PAIRS] if len(values) == len(PAIRS) else slice(None)
    return float(values[rows].mean())


def _figure(table: list[tuple[str, Scores]], path: Path) -> None:
    """Subject against style, as in the paper's comparisons: the best are in the upper right."""
    figure, axes = plt.subplots(figsize=(7.5, 6))
    for name, scores in table:
        x, y = scores.subject, scores.style
        ours = name in [way.name for way in OURS]
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
    axes.set(xlabel="subject named, %", ylabel="style named, %", xlim=(-3, 108), ylim=(-3, 106))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _pictures(shown: list[tuple[Way, dict]]):
    true = Judges.load().true
    rows = [("the true pictures", np.stack([true[s, c] for c, s in SHOWN_PAIRS for _ in range(2)]))]
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
