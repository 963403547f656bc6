"""What each schedule does on LoRA files that other people trained:
``python -m playground.real_files FILE …`` writes real-files.md beside this file, which becomes a
section of docs/EVALUATION.md. The files themselves are not part of the project.
"""

from __future__ import annotations

import argparse
from itertools import permutations
from pathlib import Path

import numpy as np

from lib_klora.lora_file import LoraFile, parse_lora
from lib_klora.pair import pair_files
from lib_klora.plan import Plan, make_plan
from lib_klora.scores import compute_scores
from lib_klora.settings import Settings
from lib_klora.tensor_file import SafetensorsFile

OUT = Path(__file__).parent / "real-files.md"
STEPS = 100
SCHEDULES = ("S", "S*", "share")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    files = [
        parse_lora(path.stem, SafetensorsFile(str(path)).read_all())
        for path in sorted(arguments.files)
    ]
    rows = [
        _row(content, style)
        for content, style in permutations(files, 2)
        if not content.base_model.excludes(style.base_model)
    ]
    arguments.out.write_text(_markdown(rows), encoding="utf-8")
    print(arguments.out.read_text(encoding="utf-8"))


def _row(content: LoraFile, style: LoraFile) -> list[str]:
    """A line of the table."""
    pair = pair_files(content, style)
    scores = compute_scores(pair)
    plans = {kind: make_plan(pair, scores, Settings(scale=kind), STEPS) for kind in SCHEDULES}
    gamma = plans["S"].gamma
    spread = " / ".join(f"{q:.2f}" for q in np.quantile(plans["S"].ratio, (0.05, 0.5, 0.95)))
    cells = [" × ".join(f.name for f in (content, style)), f"{gamma:.2f}", spread]
    for plan in plans.values():
        cells += [_leaving(plan), f"{100 * plan.content[:-1].mean():.0f}"]
    return cells


def _leaving(plan: Plan) -> str:
    """When 10, 50 and 90 % of the layers have left content for good, as % of all steps."""
    steps = np.arange(plan.steps)[:, None]
    last = np.where(plan.content[:-1], steps + 1, 0).max(0)
    times = [np.quantile(last, q, method="inverted_cdf") / plan.steps for q in (0.1, 0.5, 0.9)]
    return " / ".join("–" if time == 1 else f"{100 * time:.0f}" for time in times)


def _markdown(rows: list[list[str]]) -> str:
    head = ["content × style", "γ", "S_c/(γ·S_s), 5 / 50 / 95 %"]
    for kind in SCHEDULES:
        head += [f"{kind}: 10 / 50 / 90 % have left", "content has"]
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
