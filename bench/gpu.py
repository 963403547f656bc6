"""K-LoRA on SDXL's real shapes with random weights: ``python bench/gpu.py [--smoke]``.

The whole denoising network in fp16 at 1024², batch 2, with two made-up LoRAs for its 560 attention
projections; no WebUI and no downloads. Per way the time of a step, ways interleaved, and the memory
beside the network. As in the hosts, backups and LoRA files lie in main memory and come to the
device when a layer is switched. Writes build/gpu.json and build/gpu.md. ``--smoke`` is a tiny
network on the CPU: it shows that the program works, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from loras import lora, sdxl_shapes
from report import machine, table
from sdxl_unet import SDXLUNet
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lib_klora import klora  # noqa: E402
from lib_klora.errors import get_log  # noqa: E402
from lib_klora.lora_file import parse_lora  # noqa: E402
from lib_klora.pair import Pair, pair_files  # noqa: E402
from lib_klora.plan import Plan, make_plan  # noqa: E402
from lib_klora.scores import compute_scores  # noqa: E402
from lib_klora.settings import Settings  # noqa: E402

MIB = 2**20


@dataclass(frozen=True)
class Size:
    """What is run."""

    width: int
    context: int
    latent: int
    rank: int
    steps: int
    rounds: int
    dtype: torch.dtype


REAL = Size(320, 2048, 128, 32, 30, 5, torch.float16)
SMOKE = Size(32, 64, 16, 4, 4, 2, torch.float32)


class Layer:
    """One projection of the network with two LoRAs, and the ways to apply them."""

    def __init__(self, linear: torch.nn.Linear, content: dict, style: dict, k: int) -> None:
        self.linear, self.k = linear, k
        self.backup = linear.weight.detach().to("cpu", copy=True)
        self.files = [
            tuple(side[name].to(linear.weight.dtype) for name in ("up", "down"))
            for side in (content, style)
        ]
        self.held: list[tuple[torch.Tensor, torch.Tensor]] = []
        """The factors on the device, for the ways that multiply with them."""

    def restore(self) -> None:
        self.linear.weight.copy_(self.backup)

    def merge(self, role: int) -> None:
        """Restores the weight and adds one LoRA's ΔW."""
        self.restore()
        up, down = (x.to(self.linear.weight.device) for x in self.files[role])
        self.linear.weight += up @ down

    def hold(self) -> None:
        device = self.linear.weight.device
        self.held = [tuple(x.to(device) for x in side) for side in self.files]

    def branch(self, x: torch.Tensor, role: int = 0) -> torch.Tensor:
        up, down = self.held[role]
        base = functional.linear(x, self.linear.weight, self.linear.bias)
        return base + functional.linear(functional.linear(x, down), up)

    def every_forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        """Both ΔW, both top-K sums and the comparison, in this forward; ``scale`` is γ·S(t)."""
        content, style = (
            (up @ down).abs().flatten().topk(self.k, sorted=False).values.float().sum()
            for up, down in self.held
        )
        return self.branch(x, 0 if content >= scale * style else 1)


class NoCPU(logging.Handler):
    """Ends the program where the analysis leaves the device for the CPU, which it only logs."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.exit(record.getMessage())


class Model:
    """The network, its inputs and its layers."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        torch.manual_seed(1)
        with torch.device(device):
            self.unet = SDXLUNet(size.width, size.context).to(size.dtype).requires_grad_(False)
            options = {"dtype": size.dtype}
            self.inputs = (
                torch.randn(2, 4, size.latent, size.latent, **options),
                torch.randn(2, self.unet.embedding, **options),
                torch.randn(2, 77, size.context, **options),
            )
        linears = self.unet.attention_projections()
        self.shapes = {name: tuple(linear.weight.shape) for name, linear in linears.items()}
        if size is REAL:
            assert self.shapes == sdxl_shapes()
        files = [parse_lora("", lora(self.shapes, size.rank, seed, spread=0.5)) for seed in (1, 2)]
        self.pair = pair_files(*files)
        by_prefix = {layer.content.prefix: layer for layer in self.pair.paired}
        self.layers = [
            Layer(linears[prefix], layer.content.tensors, layer.style.tensors, layer.k)
            for prefix, layer in by_prefix.items()
        ]

    def step(self) -> None:
        self.unet(*self.inputs)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time, with everything on the device done."""
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


# -- the ways: each is (before the first step, before each later step, after the last) ------------


def nothing(*_: object) -> None:
    """What most ways do at most times."""


def set_forwards(model: Model, forward: Callable[[Layer, torch.Tensor], torch.Tensor]) -> None:
    for layer in model.layers:
        layer.hold()
        layer.linear.forward = lambda x, layer=layer: forward(layer, x)


def clear(model: Model) -> None:
    """The network as it was."""
    for layer in model.layers:
        vars(layer.linear).pop("forward", None)
        layer.held = []
        layer.restore()


def merge_row(model: Model, row: list[bool], layers: list[int] | None = None) -> None:
    for i in range(len(model.layers)) if layers is None else layers:
        model.layers[i].merge(0 if row[i] else 1)


def run_plan(model: Model, plan: Plan, everything: bool) -> Callable[[int], None]:
    """Before step i: the layers that flip, or every layer if any does."""

    def before(i: int) -> None:
        flipped = (plan.content[i] != plan.content[i - 1]).nonzero()[0].tolist()
        if flipped:
            merge_row(model, plan.content[i], None if everything else flipped)

    return before


def ways(model: Model, plans: dict[str, Plan]) -> dict[str, tuple[Callable, Callable]]:
    """Name → (before the first step, before step i)."""
    scale = plans["S"].gamma

    def all_content() -> None:
        merge_row(model, [True] * len(model.layers))

    def beside() -> None:
        set_forwards(model, Layer.branch)

    def each_forward() -> None:
        set_forwards(model, lambda layer, x: layer.every_forward(x, scale))

    found = {
        "plain": (nothing, nothing),
        "merged": (all_content, nothing),
        "branch": (beside, nothing),
        "every forward": (each_forward, nothing),
    }
    for name, plan in plans.items():
        first = lambda plan=plan: merge_row(model, plan.content[0])  # noqa: E731
        found[f"K-LoRA, {name}"] = (first, run_plan(model, plan, everything=False))
        found[f"rebuild, {name}"] = (first, run_plan(model, plan, everything=True))
    return found


def run(model: Model, way: tuple[Callable, Callable]) -> tuple[float, float, float]:
    """(seconds before the first step, seconds per step, MiB beside the network)."""
    first, before = way
    device, steps = model.device, model.size.steps
    if device.type == "cuda":
        resting = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    applied = seconds(first, device)

    def all_steps() -> None:
        for i in range(steps):
            if i:
                before(i)
            model.step()

    step = seconds(all_steps, device) / steps
    peak = (torch.cuda.max_memory_allocated(device) - resting) / MIB if device.type == "cuda" else 0
    clear(model)
    return applied, step, peak


def step_times(model: Model, plans: dict[str, Plan]) -> list[dict]:
    """One row per way."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    chosen = ways(model, plans)
    order = list(chosen)
    for i in range(model.size.rounds + 1):
        for name in order:
            figures = run(model, chosen[name])
            if i:  # the first round is a warm-up
                found.setdefault(name, []).append(figures)
        order = order[1:] + order[:1]
    rows = []
    for name in chosen:
        applied, step, peak = (statistics.median(x) for x in zip(*found[name], strict=True))
        ratios = [a[1] / b[1] for a, b in zip(found[name], found["merged"], strict=True)]
        rows.append(
            {
                **{"way": name, "first_s": applied, "step_s": step, "peak_mib": peak},
                **{"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]},
            }
        )
    return rows


# -- the analysis ---------------------------------------------------------------------------------


def naive_scores(pair: Pair, device: torch.device) -> None:
    """ΔW on the device, all of |ΔW|, torch.topk of everything."""
    for layer in pair.paired:
        for side in (layer.content, layer.style):
            delta = side.tensors["up"].to(device).float() @ side.tensors["down"].to(device).float()
            klora.top_k_sum(delta, layer.k), klora.abs_sum(delta)


def analysis_times(pair: Pair, device: torch.device, rounds: int) -> list[dict]:
    """Seconds for both files, nothing cached."""
    chosen = {
        "naive": lambda: naive_scores(pair, device),
        "ours": lambda: compute_scores(pair, device),
    }
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for i, (name, work) in itertools.product(range(rounds + 1), chosen.items()):
        taken = seconds(work, device)
        if i:
            times[name].append(taken)
    middle = {name: statistics.median(values) for name, values in times.items()}
    return [
        {"way": name, "s": taken, "ratio": middle["naive"] / taken}
        for name, taken in middle.items()
    ]


def parity(pair: Pair, device: torch.device) -> dict:
    """How far the device's scores are from the CPU's, and how many choices differ that are not as
    good as equal (S_c within 1e-6 of γ·S·S_s)."""
    scale = klora.scale_s(np.linspace(0, 1, 200))
    cpu, other = compute_scores(pair, "cpu"), compute_scores(pair, device)
    names = ("s_content", "s_style", "abs_content", "abs_style")
    off = [np.abs(getattr(other, x) / getattr(cpu, x) - 1).max() for x in names]
    ratio = cpu.s_content / (cpu.gamma("paper") * cpu.s_style)
    clear = np.abs(ratio[None, :] / scale[:, None] - 1) > 1e-6
    one, two = (
        klora.chooses_content(x.s_content, x.s_style, x.gamma("paper"), scale) for x in (cpu, other)
    )
    return {
        "largest_difference": float(max(off)),
        "different_choices": int((one != two)[clear].sum()),
        "choices": one.size,
    }


# -- the report -----------------------------------------------------------------------------------


def markdown(report: dict) -> str:
    steps = {"way": "way", "step_s": "a step, s", "ratio": "ratio to merged", "flips": "flips"}
    steps |= {
        "first_s": "before the first step, s",
        "peak_mib": "peak memory beside the network, MiB",
    }
    return "\n\n".join(
        [
            f"# K-LoRA on {report['device']}",
            ", ".join(f"{k} {v}" for k, v in (report["machine"] | report["size"]).items()),
            table(report["steps"], steps),
            "## Analysis of the pair, nothing cached",
            table(report["analysis"], {"way": "way", "s": "s", "ratio": "times faster"}),
            "Against the CPU's scores: largest relative difference "
            "{largest_difference:.1e}, {different_choices} of {choices} choices differ.".format(
                **report["parity"]
            ),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="folder (build)")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("no GPU was found: try the program itself with --smoke")
    device = torch.device("cpu" if options.smoke else "cuda")
    size = SMOKE if options.smoke else REAL
    get_log().addHandler(NoCPU())
    with torch.inference_mode():
        model = Model(size, device)
        scores = compute_scores(model.pair, device)
        plans = {
            scale: make_plan(model.pair, scores, Settings(scale=scale), size.steps)
            for scale in ("S", "S*")
        }
        rows = step_times(model, plans)
        analysis = analysis_times(model.pair, device, size.rounds)
        same = parity(model.pair, device)
    for row in rows:
        plan = plans.get(row["way"].rpartition(" ")[2])
        content = plan.content[: size.steps] if plan else None
        row["flips"] = int((content[1:] != content[:-1]).sum()) if plan else 0
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU: a smoke test"
    report = {
        "device": name,
        "machine": machine(),
        "size": {k: str(v) for k, v in vars(size).items()} | {"layers": len(model.layers)},
        "steps": rows,
        "analysis": analysis,
        "parity": same,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = "gpu-smoke" if options.smoke else "gpu"
    (options.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / f"{stem}.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
