"""One forward of SDXL's 560 attention projections, and what K-LoRA costs beside it.

The ways, all on the same layers:

plain           the checkpoint's own weights
merged          one LoRA merged into them before the first step: the reference
branch          one LoRA beside the layer: x·Wᵀ + (x·Aᵀ)·Bᵀ
K-LoRA          merged weights; between steps the layers that flip, and only those, are restored
                from their backup and merged with the other LoRA
rebuild         the same choice, but whenever anything changes every layer is restored and merged,
                as weight schedulers do
every forward   each forward of each layer computes B·A of both LoRAs and both top-K sums, compares
                them and adds the winner's branch, as the authors' program does (written from the
                paper's formulas)
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass

import torch
from loras import lora, lora_layer, sdxl_shapes

from lib_klora import klora
from lib_klora.lora_file import parse_lora
from lib_klora.pair import pair_files
from lib_klora.plan import Plan, make_plan
from lib_klora.scores import compute_scores
from lib_klora.settings import Settings

BATCH = 2
"""A picture's conditional and unconditional half."""
TEXT_TOKENS = 77
STEPS = 30
SHAPES = sdxl_shapes()
Factors = tuple[torch.Tensor, torch.Tensor]
"""(up, down), with ΔW = up · down."""


@dataclass
class Projection:
    """One linear layer with two LoRAs."""

    weight: torch.Tensor
    backup: torch.Tensor
    content: Factors
    style: Factors
    k: int


def make_projection(
    shape: tuple[int, int], rank: int, seed: int, dtype=torch.float32, device="cpu"
) -> Projection:
    """Random weights, and two LoRAs of ``rank``."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[1] ** 0.5
    weight = weight.to(device, dtype)
    sides = []
    for number in (0, 1):
        layer = lora_layer("q", shape, rank, 2 * seed + number)
        up, down = layer["q.lora_up.weight"], layer["q.lora_down.weight"]
        sides.append((up.to(device, dtype), down.to(device, dtype)))
    entries = shape[0] * shape[1]
    return Projection(weight.clone(), weight, *sides, klora.top_k(rank, rank, entries))


# -- the ways -------------------------------------------------------------------------------------


def forward(layer: Projection, x: torch.Tensor) -> torch.Tensor:
    """With the weights as they are: plain, or merged."""
    return torch.nn.functional.linear(x, layer.weight)


def branch(layer: Projection, x: torch.Tensor, factors: Factors | None = None) -> torch.Tensor:
    """With a LoRA beside the layer."""
    up, down = factors or layer.content
    linear = torch.nn.functional.linear
    return linear(x, layer.weight) + linear(linear(x, down), up)


def flip(layer: Projection, factors: Factors) -> None:
    """Restores the weight and merges a LoRA, as both hosts do."""
    layer.weight.copy_(layer.backup)
    layer.weight += factors[0] @ factors[1]


def every_forward(layer: Projection, x: torch.Tensor, scale: float) -> torch.Tensor:
    """Chooses the LoRA from its whole ΔW, now; ``scale`` is γ·S(t)."""
    sums = []
    for up, down in (layer.content, layer.style):
        sums.append((up @ down).abs().flatten().topk(layer.k, sorted=False).values.sum())
    return branch(layer, x, layer.content if sums[0] >= scale * sums[1] else layer.style)


WAYS = {
    "plain": forward,
    "merged": forward,
    "branch": branch,
    "flip": lambda layer, x: flip(layer, layer.style),
    "every forward": lambda layer, x: every_forward(layer, x, 1.0),
}


# -- the plan -------------------------------------------------------------------------------------


def real_plan(scale: str, rank: int = 8) -> Plan:
    """The plan of two made-up files whose layers differ in strength."""
    files = [parse_lora("", lora(SHAPES, rank, seed, spread=0.5)) for seed in (1, 2)]
    pair = pair_files(*files)
    return make_plan(pair, compute_scores(pair), Settings(scale=scale), STEPS)


def flips_of(plan: Plan) -> tuple[Counter, int]:
    """(shape → flips during all steps, number of steps before which anything flips)."""
    content = plan.content[: plan.steps]
    changed = content[1:] != content[:-1]
    shapes = list(SHAPES.values())
    flips: Counter = Counter()
    for shape, count in zip(shapes, changed.sum(axis=0), strict=True):
        flips[shape] += int(count)
    return flips, int(changed.any(axis=1).sum())


# -- measuring ------------------------------------------------------------------------------------


def tokens(shape: tuple[int, int], size: int) -> int:
    """Rows of the layer's input per picture of ``size``² pixels."""
    if shape[1] == 2048:
        return TEXT_TOKENS
    return (size // {640: 16, 1280: 32}[shape[1]]) ** 2


def layer_seconds(
    rank: int, size: int, samples: int
) -> dict[str, dict[tuple[int, int], list[float]]]:
    """Way → shape → CPU seconds of ``samples`` layers, the ways interleaved layer by layer."""
    seconds: dict[str, dict] = {way: {shape: [] for shape in set(SHAPES.values())} for way in WAYS}
    order = list(WAYS)
    for seed in range(samples + 1):  # the first is a warm-up
        for shape in sorted(set(SHAPES.values())):
            layer = make_projection(shape, rank, seed)
            x = torch.randn(BATCH, tokens(shape, size), shape[1])
            for way in order:
                if way == "merged":
                    flip(layer, layer.content)
                begin = time.thread_time()
                WAYS[way](layer, x)
                if seed:
                    seconds[way][shape].append(time.thread_time() - begin)
        order = order[1:] + order[:1]
    return seconds


def total(
    per_layer: dict[tuple[int, int], list[float]], counts: Counter
) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile), each summed over the layers."""
    cuts = {shape: statistics.quantiles(values, n=4) for shape, values in per_layer.items()}
    low, middle, high = (sum(n * cuts[s][i] for s, n in counts.items()) for i in range(3))
    return middle, low, high


def switching(rank: int, size: int, samples: int, plans: dict[str, Plan]) -> list[dict]:
    """One row per way: seconds of the 560 projections per step, and the ratio to merged."""
    with torch.inference_mode():
        seconds = layer_seconds(rank, size, samples)
    counts = Counter(SHAPES.values())
    step = {way: total(per_shape, counts) for way, per_shape in seconds.items() if way != "flip"}
    merged = step["merged"][0]
    rebuild = total(seconds["flip"], counts)
    extra, flips = {}, {}
    for name, plan in plans.items():
        of_shape, changes = flips_of(plan)
        flips[name], flips[f"rebuild{name[6:]}"] = of_shape.total(), changes * len(SHAPES)
        extra[name] = tuple(x / STEPS for x in total(seconds["flip"], of_shape))
        extra[f"rebuild{name[6:]}"] = tuple(x * changes / STEPS for x in rebuild)
    for name, more in extra.items():
        step[name] = tuple(merged + x for x in more)
    return [
        {
            **{"way": way, "rank": rank, "size": size, "layers": len(SHAPES)},
            "measured_layers": samples * len(counts),
            "flips": flips.get(way, 0),
            "step_s": values[0],
            "extra_s": values[0] - merged,
            "ratio": values[0] / merged,
            "ratio_quartiles": [values[1] / merged, values[2] / merged],
        }
        for way, values in step.items()
    ]


def bench_switching(quick: bool) -> list[dict]:
    """All rows: 1024² at several ranks, and 512²."""
    plans = {f"K-LoRA, {scale}": real_plan(scale) for scale in ("S", "S*")}
    samples = 4 if quick else 16
    cases = ((32, 1024), (32, 512)) if quick else ((8, 1024), (32, 1024), (128, 1024), (32, 512))
    return [row for rank, size in cases for row in switching(rank, size, samples, plans)]
