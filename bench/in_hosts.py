"""K-LoRA in the installed WebUIs: CPU seconds of the server per image, and its memory.

The checkpoint is a tiny SDXL of full depth: all 70 transformers with their 560 attention
projections, 64 wide. So the model's own work is as small as it can be while the number of layers to
switch is the real one, and every overhead counts for more than on a real checkpoint.

In each round every way makes an image after one of another way (``switching``: LoRAs must be
applied and taken back) and then two with the very same settings (``repeating``: nothing is
reloaded). A way's ratio is taken to one plain ``<lora:>`` within its round. Other work on the
machine only ever adds to CPU time, by emptying the caches, so the ratio of the fastest images is
given as well.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "live")]

import make_loras  # noqa: E402
from hosts import HOSTS  # noqa: E402
from webui import Install, WebUI, find, locate  # noqa: E402

from lib_klora.lora_file import parse_lora  # noqa: E402
from lib_klora.pair import pair_files  # noqa: E402
from lib_klora.plan import make_plan  # noqa: E402
from lib_klora.scores import compute_scores  # noqa: E402
from lib_klora.settings import Settings  # noqa: E402
from lib_klora.tag import ROLES  # noqa: E402
from lib_klora.tensor_file import SafetensorsFile  # noqa: E402

DATA = Path(os.environ.get("KLORA_LIVE") or ROOT / "build" / "bench-live")
STEPS = 30
REFERENCE = "one <lora:>"
REPEATS = 2
OF_MEMORY = ("plain", REFERENCE, "two <lora:>", "K-LoRA, S")
LARGE = {"content": 128, "style": 256}
"""Ranks of the files that weigh something."""
_TICK = os.sysconf("SC_CLK_TCK")


def ways(family: str) -> dict[str, dict]:
    """Name → fields of the request. The one LoRA is the larger of the two files."""
    content, style = f"{family}_content", f"{family}_style"
    klora = f"a cat <klora:{content}> <klora:{style}>"

    def scale(name: str) -> dict:
        return {"K-LoRA": {"args": [{"scale": name}]}}

    return {
        "plain": {"prompt": "a cat"},
        REFERENCE: {"prompt": f"a cat <lora:{style}:1>"},
        "two <lora:>": {"prompt": f"a cat <lora:{content}:1> <lora:{style}:1>"},
        "K-LoRA, S": {"prompt": klora, "alwayson_scripts": scale("S")},
        "K-LoRA, S*": {"prompt": klora, "alwayson_scripts": scale("S*")},
    }


# -- the server's process -------------------------------------------------------------------------


def cpu_seconds(group: int) -> float:
    """User and system time so far of all processes of a process group."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended
            continue
        if int(fields[2]) == group:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICK


def status_mib(pid: int, name: str) -> float:
    """A memory field of /proc/PID/status, such as VmRSS or VmHWM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(name)


@contextmanager
def server_of(install: Install) -> Iterator[WebUI]:
    """The host's server with its tiny SDXL loaded."""
    host = install.host
    with WebUI(install, DATA / host.name) as server:
        server.load(host.models[host.full_depth])
        yield server


def image(server: WebUI, fields: dict) -> float:
    """CPU seconds of one image that must succeed."""
    begin = cpu_seconds(server.process.pid)
    result = server.txt2img(steps=STEPS, **fields)
    taken = cpu_seconds(server.process.pid) - begin
    if result.error or any("K-LoRA error" in text for text in result.infotexts):
        raise RuntimeError(result.error or result.infotexts[0])
    return taken


# -- time -----------------------------------------------------------------------------------------


def measure(server: WebUI, requests: dict[str, dict], rounds: int) -> dict[str, dict]:
    """Way → {"first": seconds, "switching": seconds per round, "repeating": seconds per round}."""
    seconds = {}
    for name, fields in requests.items():
        seconds[name] = {"first": image(server, fields), "switching": [], "repeating": []}
    order, dice = list(requests), random.Random(4)
    for _ in range(rounds):
        last = order[-1]
        while order[0] == last:  # else the first image of a round would repeat
            dice.shuffle(order)
        for name in order:
            seconds[name]["switching"].append(image(server, requests[name]))
            again = [image(server, requests[name]) for _ in range(REPEATS)]
            seconds[name]["repeating"].append(statistics.mean(again))
            seconds[name]["fastest"] = min(seconds[name].get("fastest", again[0]), *again)
    return seconds


def spread(values: list[float]) -> list[float]:
    """The quartiles."""
    return [float(value) for value in np.percentile(values, (25, 75))]


def row(host: str, name: str, seconds: dict[str, dict]) -> dict:
    """One way's figures, each with its ratio to one plain ``<lora:>``."""
    figure = {"host": host, "way": name, "first_s": seconds[name]["first"]}
    for kind in ("repeating", "switching"):
        own, reference = seconds[name][kind], seconds[REFERENCE][kind]
        ratios = [a / b for a, b in zip(own, reference, strict=True)]
        figure |= {
            f"{kind}_s": statistics.median(own),
            f"{kind}_all_s": own,
            f"{kind}_ratio": statistics.median(ratios),
            f"{kind}_ratio_quartiles": spread(ratios),
        }
    figure["fastest_s"] = seconds[name]["fastest"]
    figure["fastest_ratio"] = figure["fastest_s"] / seconds[REFERENCE]["fastest"]
    return figure


def flips(server: WebUI, family: str) -> dict[str, int]:
    """How many layers change their LoRA during an image, per scale."""
    files = [
        parse_lora(role, SafetensorsFile(server.loras / f"{family}_{role}.safetensors"))
        for role in ("content", "style")
    ]
    pair = pair_files(*files)
    scores = compute_scores(pair)
    found = {}
    for scale in ("S", "S*"):
        content = make_plan(pair, scores, Settings(scale=scale), STEPS).content[:STEPS]
        found[f"K-LoRA, {scale}"] = int((content[1:] != content[:-1]).sum())
    return found


# -- memory ---------------------------------------------------------------------------------------


def memory_growth(install: Install, fields: dict, images: int) -> float:
    """MiB by which a fresh server's largest resident size exceeds its size after plain images."""
    with server_of(install) as server:
        pid = server.process.pid
        for _ in range(2):
            image(server, {"prompt": "a cat"})
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        before = status_mib(pid, "VmRSS")
        for _ in range(images):
            image(server, fields)
        return status_mib(pid, "VmHWM") - before


def memory(install: Install, family: str, loras: Path, repeats: int) -> dict:
    """Growth of the server's memory per way, each in servers of its own, and the files' sizes."""
    requests = {name: ways(family)[name] for name in OF_MEMORY}
    growth: dict[str, list[float]] = {name: [] for name in requests}
    for _ in range(repeats):
        for name, fields in requests.items():
            growth[name].append(memory_growth(install, fields, images=2))
    return {
        **{
            f"{role}_mib": (loras / f"{family}_{role}.safetensors").stat().st_size / 2**20
            for role in ROLES
        },
        "rows": [
            {
                "way": name,
                "mib": statistics.median(values),
                "range_mib": [min(values), max(values)],
            }
            for name, values in growth.items()
        ],
    }


def write_large_pair(checkpoint: Path, loras: Path, family: str) -> None:
    """Two files that weigh something beside the rest of a server."""
    layers = make_loras.layers_of(checkpoint)
    for role, rank in LARGE.items():
        path = loras / f"{family}_{role}.safetensors"
        make_loras.write(path, layers, rank=rank, seed=rank, spelling="ldm", te=True)


# -- all of it ------------------------------------------------------------------------------------


def bench_host(host: str, rounds: int, memory_repeats: int) -> dict:
    """All figures of one host; {"skipped": why} where it is not installed."""
    install = find(host)
    if install is None:
        return {"host": host, "skipped": locate(host).missing}
    model = HOSTS[host].models[HOSTS[host].full_depth]
    family = model.family
    server = WebUI(install, DATA / host)
    server.make_models()
    make_loras.write_set(server.checkpoints, server.loras)
    requests = ways(family)
    with server_of(install) as running:
        image(running, requests["plain"])
        seconds = measure(running, requests, rounds)
        flipped = flips(running, family)
    rows = [row(host, name, seconds) | {"flips": flipped.get(name, 0)} for name in requests]
    result = {
        "host": host,
        "version": install.version,
        "checkpoint": model.checkpoint,
        "steps": STEPS,
        "rounds": rounds,
        "rows": rows,
    }
    if memory_repeats:
        large = f"{family}_large"
        write_large_pair(server.checkpoints / model.file, server.loras, large)
        result["memory"] = [
            memory(install, files, server.loras, memory_repeats) for files in (family, large)
        ]
    return result


def bench_hosts(rounds: int, memory_repeats: int, hosts: Iterable[str] = HOSTS) -> list[dict]:
    """Every host after the other."""
    return [bench_host(host, rounds, memory_repeats) for host in hosts]
