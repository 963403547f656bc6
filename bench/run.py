"""All measurements: ``python bench/run.py [--quick] [--hosts]``.

Writes build/bench.json, build/bench.md and plots. ``--hosts`` adds images in the installed WebUIs,
more than half an hour. bench/gpu.py is a program of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import machine, table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from analysis import bench_analysis  # noqa: E402
from switching import STEPS, bench_switching  # noqa: E402


def step(text: str, work: Callable[[], object]) -> object:
    """Runs a part and says how long it took."""
    begin = time.monotonic()
    print(f"{text} …", end=" ", file=sys.stderr, flush=True)
    result = work()
    print(f"{time.monotonic() - begin:.0f} s", file=sys.stderr)
    return result


# -- the report -----------------------------------------------------------------------------------


def markdown(report: dict, plots: list[str]) -> str:
    quick = " Quick run: fewer layers of each shape, scaled up." if report["quick"] else ""
    parts = [
        "# K-LoRA, measured",
        f"{', '.join(f'{k} {v}' for k, v in report['machine'].items())}. CPU seconds of one "
        f"thread, ways interleaved, medians.{quick}",
        *analysis_tables(report),
        *(["## Growth", *(f"![{name}]({name})" for name in plots)] if plots else []),
        *switching_tables(report["switching"]),
        *host_tables(report["hosts"]),
    ]
    return "\n\n".join(parts) + "\n"


def analysis_tables(report: dict) -> list[str]:
    ways = {
        **{"model": "model", "layers": "layers", "measured_layers": "measured", "rank": "rank"},
        **{"naive_s": "naive, s", "fast_s": "one K, s", "ratio_fast": "ratio"},
        **{"table_s": "all partners, s", "ratio_table": "ratio", "matmul_s": "matmul alone, s"},
        "largest_difference": "largest difference",
    }
    warm = {
        **{"model": "model", "rank": "rank", "cold_s": "cold, s", "warm_s": "warm, s"},
        **{"ratio_scores": "ratio", "hash_s": "hash, s", "read_s": "read, s"},
        **{"parse_s": "parse, s", "ratio_with_hash": "ratio with hash"},
        "ratio_with_hash_and_reading": "with hash, read, parse",
    }
    memory = {"layer": "layer", "rank": "rank", "naive_mib": "naive, MiB", "table_mib": "ours, MiB"}
    parts = [
        "## Scores of a pair, nothing cached",
        "“one K”: what this pair needs. “all partners”: the table that is kept, for every partner "
        "of rank 1 to 128.",
        table(report["analysis"], ways),
        "## Warm start",
        table(report["warm_start"], warm),
        "## Plan",
        table(report["plan"], {"layers": "layers", "steps": "steps", "plan_ms": "plan, ms"}),
    ]
    if report["memory"]:
        parts += ["## Memory beyond the factors", table([report["memory"]], memory)]
    return parts


def switching_tables(rows: list[dict]) -> list[str]:
    columns = {
        **{"size": "size", "rank": "rank", "way": "way", "flips": "layers switched"},
        **{"step_s": "a step, s", "extra_s": "more than merged, s"},
        **{"ratio": "ratio to merged", "ratio_quartiles": "quartiles"},
    }
    return [
        "## One step of SDXL's 560 attention projections",
        f"Batch 2 with the real token counts, fp32; {rows[0]['measured_layers']} layers measured "
        f"and scaled up. Costs between steps are spread over {STEPS} steps. “every forward”: B·A "
        f"of both LoRAs, both top-K sums and the comparison in each forward.",
        table(rows, columns),
    ]


def host_tables(hosts: list[dict] | None) -> list[str]:
    if hosts is None:
        return ["## In the WebUIs", "Not measured: `--hosts` was not given."]
    columns = {
        **{"way": "way", "flips": "flips", "first_s": "first image, s"},
        **{"repeating_s": "same again, s", "repeating_ratio": "ratio"},
        **{"repeating_ratio_quartiles": "quartiles", "fastest_ratio": "ratio of the fastest"},
        **{"switching_s": "after another way, s", "switching_ratio": "ratio"},
        "switching_ratio_quartiles": "quartiles",
    }
    memory = {"way": "way", "mib": "peak growth, MiB", "range_mib": "range"}
    parts = ["## In the WebUIs"]
    for host in hosts:
        if "skipped" in host:
            parts.append(f"{host['host']}: skipped, {host['skipped']}.")
            continue
        parts += [
            f"### {host['host']} {host['version']}",
            f"CPU seconds of the server per image: {host['checkpoint']} (560 projections), 64², "
            f"{host['steps']} steps, {host['rounds']} rounds. Ratios to one plain `<lora:>`.",
            table(host["rows"], columns),
        ]
        for files in host.get("memory", ()):
            parts += [
                "Memory of a fresh server over two plain images; the content file has "
                f"{files['content_mib']:.1f} MiB, the style file {files['style_mib']:.1f}:",
                table(files["rows"], memory),
            ]
    return parts


def draw(report: dict, folder: Path) -> list[str]:
    """The growth plots; none without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return []
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    sdxl = [x for x in report["analysis"] + report["growth"] if x["model"] == "SDXL"]
    sdxl.sort(key=lambda x: x["rank"])
    rank = report["layers_rank"]
    by_model = [x for x in report["analysis"] + report["growth"] if x["rank"] == rank]
    by_model.sort(key=lambda x: x["table_s"])
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for axis, rows, name in ((axes[0], sdxl, "rank"), (axes[1], by_model, "model")):
        for way in ("naive_s", "table_s", "matmul_s"):
            known = [x for x in rows if way in x]
            label = {"naive_s": "naive", "table_s": "all partners", "matmul_s": "matmul alone"}[way]
            line = "o-" if name == "rank" else "o"
            axis.plot([str(x[name]) for x in known], [x[way] for x in known], line, label=label)
        axis.set(yscale="log", ylabel="CPU seconds, a pair")
    axes[0].set(title="SDXL, 560 layers", xlabel="rank")
    axes[1].set(title=f"layers: 128, 560, 228 fused; rank {rank}")
    plan = report["plan"]
    axes[2].plot([x["steps"] for x in plan], [x["plan_ms"] for x in plan], "o-")
    axes[2].set(title="the plan of 560 layers", xlabel="steps", ylabel="ms", ylim=(0, None))
    axes[0].legend()
    figure.savefig(folder / "bench.png", dpi=110)
    return ["bench.png"]


# -- all of it ------------------------------------------------------------------------------------


def measure_hosts(quick: bool) -> list[dict]:
    from in_hosts import bench_hosts

    return bench_hosts(rounds=3 if quick else 12, memory_repeats=0 if quick else 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under two minutes without hosts")
    parser.add_argument("--hosts", action="store_true", help="images in the installed WebUIs too")
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="folder (build)")
    options = parser.parse_args()
    quick = options.quick
    torch.set_num_threads(1)
    report = {
        "quick": quick,
        "machine": machine(),
        **bench_analysis(quick, step),
        "switching": step("switching", lambda: bench_switching(quick)),
        "hosts": step("hosts", lambda: measure_hosts(quick)) if options.hosts else None,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report, draw(report, options.out))
    (options.out / "bench.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
