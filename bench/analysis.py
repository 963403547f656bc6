"""The analysis: scores of a pair, warm start, plan, memory.

Every figure is CPU time of one thread, ways interleaved layer by layer, medians; what counts are
the ratios within one run. Where not every layer of a model is measured, some of each shape are and
their medians are multiplied by the number of such layers; the table says so.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from loras import flux_shapes, lora, lora_layer, sd15_shapes, sdxl_shapes
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lib_klora import klora, scores  # noqa: E402
from lib_klora.lora_file import Layer, parse_lora  # noqa: E402
from lib_klora.pair import pair_files  # noqa: E402
from lib_klora.plan import make_plan  # noqa: E402
from lib_klora.score_cache import ScoreCache, file_sha256  # noqa: E402
from lib_klora.settings import Settings  # noqa: E402
from lib_klora.tensor_file import SafetensorsFile  # noqa: E402

MODELS = {"SD1.5": sd15_shapes(), "SDXL": sdxl_shapes(), "Flux": flux_shapes()}


def cpu_time(work: Callable[[], object]) -> float:
    begin = time.thread_time()
    work()
    return time.thread_time() - begin


def naive(layer: Layer, k: int) -> tuple[float, float]:
    """As the formulas say it: ΔW, the absolute value of everything, the top K of everything."""
    delta = layer.delta()
    return klora.top_k_sum(delta, k), klora.abs_sum(delta)


def matmul(layer: Layer, buffer: torch.Tensor) -> None:
    """What no analysis can do without: every entry of ΔW once, and nothing else."""
    up, down = layer.tensors["up"].float(), layer.tensors["down"].float()
    step = len(buffer) // down.shape[1]
    for start in range(0, len(up), step):
        part = up[start : start + step]
        torch.mm(part, down, out=buffer[: len(part) * down.shape[1]].view(len(part), -1))


def analysis(model: str, rank: int, samples: int | None, plain: bool = True) -> dict:
    """Seconds for a pair of this model, both of ``rank``; ``samples`` layers of each shape, None
    for all. Not ``plain``: without the naive way."""
    ways = ("naive", "fast", "table", "matmul") if plain else ("fast", "table", "matmul")
    seconds: dict[tuple, dict[str, list[float]]] = {}
    counts = Counter(MODELS[model].values())
    buffer, error, seen = torch.empty(2**18), 0.0, Counter()
    for i, (prefix, shape) in enumerate(MODELS[model].items()):
        seen[shape] += 1
        if samples is not None and seen[shape] > samples:
            continue
        (layer,) = parse_lora("", lora_layer(prefix, shape, rank, i)).layers.values()
        k = klora.top_k(rank, rank, layer.entries)
        results = {}

        def run(way, layer=layer, k=k, results=results):
            if way == "naive":
                results[way] = naive(layer, k)
            elif way == "matmul":
                matmul(layer, buffer)
            else:
                ks = np.array([k]) if way == "fast" else scores.partner_ks(layer)
                results[way] = scores._analyse("content", layer, ks, "cpu")

        with torch.inference_mode():
            if seen[shape] == 1:
                run("table")  # the first touch of a shape pays for memory and code
            # Each way comes first in turn: whoever follows the naive one finds a cold cache.
            turn = i % len(ways)
            for way in ways[turn:] + ways[:turn]:
                taken = cpu_time(lambda way=way: run(way))
                seconds.setdefault(shape, {}).setdefault(way, []).append(taken)
        if plain:
            for way in ("fast", "table"):
                found = results[way].at(k), results[way].total
                error = max(
                    error, *(abs(a / b - 1) for a, b in zip(found, results["naive"], strict=True))
                )
    total = {
        way: 2 * sum(n * statistics.median(seconds[shape][way]) for shape, n in counts.items())
        for way in ways
    }
    figure = {
        "model": model,
        "layers": len(MODELS[model]),
        "rank": rank,
        "measured_layers": sum(min(n, samples or n) for n in counts.values()),
        **{f"{way}_s": taken for way, taken in total.items()},
    }
    if plain:
        figure |= {
            "ratio_fast": total["naive"] / total["fast"],
            "ratio_table": total["naive"] / total["table"],
            "largest_difference": error,
        }
    return figure


# -- warm start, plan, memory ---------------------------------------------------------------------


def warm_start(rank: int, repeats: int) -> dict:
    """Two SDXL files on disk: scores without and with a filled cache."""
    times: dict[str, list[float]] = {}

    def measure(name: str, work: Callable[[], object]) -> object:
        begin = time.thread_time()
        result = work()
        times.setdefault(name, []).append(time.thread_time() - begin)
        return result

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{seed}.safetensors" for seed in (1, 2)]
        for seed, path in enumerate(paths, 1):
            save_file(lora(MODELS["SDXL"], rank, seed), path)
        for i in range(repeats):
            cache = ScoreCache(Path(folder) / f"cache{i}")
            hashes = measure("hash", lambda: tuple(file_sha256(path) for path in paths))
            tensors = measure("read", lambda: [SafetensorsFile(path) for path in paths])
            pair = measure("parse", lambda t=tensors: pair_files(*(parse_lora("", x) for x in t)))

            def score(pair=pair, cache=cache, hashes=hashes):
                return scores.compute_scores(pair, cache=cache, sha256=hashes)

            measure("cold", score)
            measure("warm", score)
    seconds = {f"{name}_s": statistics.median(values) for name, values in times.items()}
    both = seconds["hash_s"] + seconds["read_s"] + seconds["parse_s"]
    return {
        "model": "SDXL",
        "rank": rank,
        **seconds,
        "ratio_scores": seconds["cold_s"] / seconds["warm_s"],
        "ratio_with_hash": (seconds["hash_s"] + seconds["cold_s"])
        / (seconds["hash_s"] + seconds["warm_s"]),
        "ratio_with_hash_and_reading": (both + seconds["cold_s"]) / (both + seconds["warm_s"]),
    }


def plan_times(layers: int, step_counts: list[int], repeats: int = 200) -> list[dict]:
    shapes = dict(list(MODELS["SDXL"].items())[:layers])
    small = dict.fromkeys(shapes, (8, 8))
    pair = pair_files(*(parse_lora("", lora(small, 2, seed)) for seed in (1, 2)))
    found = scores.compute_scores(pair)
    times = {steps: [] for steps in step_counts}
    for _ in range(repeats):
        for steps in step_counts:
            times[steps].append(cpu_time(lambda n=steps: make_plan(pair, found, Settings(), n)))
    return [
        {"layers": layers, "steps": steps, "plan_ms": 1000 * statistics.median(values)}
        for steps, values in times.items()
    ]


_MEMORY = """
import ctypes, re, sys, torch
sys.path[:0] = sys.argv[1:3]
torch.set_num_threads(1)
from lib_klora import klora, scores
from lib_klora.lora_file import parse_lora
from loras import lora_layer

def status(name):
    return int(re.search(name + r":\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

def run(layer):
    with torch.inference_mode():
        if sys.argv[3] == "naive":
            delta = layer.delta()
            klora.top_k_sum(delta, 256), klora.abs_sum(delta)
        else:
            scores._analyse("content", layer, scores.partner_ks(layer), "cpu")

small, large = (
    next(iter(parse_lora("", lora_layer("q", shape, 16, 0)).layers.values()))
    for shape in ((8, 64), (21504, 3072))
)
run(small)
ctypes.CDLL(None).malloc_trim(0)  # what was freed so far does not count as there
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
run(large)
print(status("VmHWM") - before)
"""


def memory() -> dict | None:
    """MiB beyond the factors for Flux' largest layer, rank 16; None where it cannot be read."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    figure = {"layer": "21504 x 3072", "rank": 16}
    for way in ("naive", "table"):
        call = [sys.executable, "-c", _MEMORY, str(ROOT), str(ROOT / "bench"), way]
        figure[f"{way}_mib"] = float(subprocess.run(call, capture_output=True, check=True).stdout)
    return figure


# -- all of it ------------------------------------------------------------------------------------


def bench_analysis(quick: bool, step: Callable[[str, Callable[[], object]], object]) -> dict:
    """All figures; ``step`` runs a part under a name."""

    def analyse(model: str, rank: int, samples: int | None) -> dict:
        return step(f"{model}, rank {rank}", lambda: analysis(model, rank, samples))

    return {
        "analysis": [
            *(analyse("SDXL", rank, 12 if quick else None) for rank in (8, 32, 128)),
            *(analyse("Flux", rank, 1 if quick else 4) for rank in (8, 16, 64)),
        ],
        # For the plots only: the ranks between, and the smaller model.
        "growth": [
            *(analyse("SDXL", rank, 12 if quick else 40) for rank in (16, 64)),
            analyse("SD1.5", 16, 6 if quick else None),
        ],
        "layers_rank": 16,
        "warm_start": [
            step(f"warm start, rank {rank}", lambda r=rank: warm_start(r, 3 if quick else 7))
            for rank in ((8, 32) if quick else (8, 32, 128))
        ],
        "plan": step("plan", lambda: plan_times(560, [10, 20, 30, 50, 100])),
        "memory": step("memory", memory),
    }
