"""What K-LoRA adds to the WebUI's page: ``python bench/page.py [--loads N] [--host HOST]``.

Two servers of one host, with and without the extension, are loaded in turn by chromium, each time
with an empty cache. Prints a Markdown table per host:

- *UI loaded*: from the navigation's start to the end of the host's onUiLoaded callbacks; *fastest*
  is the fastest of all loads, because other programs on the machine only ever lengthen one;
- *main thread*: all work of the page's main thread until its DOM has been quiet for a second;
- *document*: bytes of the page itself, in which gradio describes all components.

And from the server with the extension, the time for building K-LoRA's part of the page.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "live")]

from browser import CHROMIUM, chromium  # noqa: E402
from report import table  # noqa: E402
from webui import HERE, HOSTS, WebUI, find, locate  # noqa: E402

DATA = Path(os.environ.get("KLORA_LIVE") or ROOT / "build" / "bench-live")
WATCH = """
    window.bench = {loaded: 0, last: 0};
    document.addEventListener('DOMContentLoaded', () => {
        onUiLoaded(() => { window.bench.loaded = performance.now(); });
    });
    new MutationObserver(() => { window.bench.last = performance.now(); }).observe(
        document, {childList: true, subtree: true});
"""
FIGURES = "loaded_ms", "main_thread_ms", "document_kib"
QUIET = "window.bench.loaded && performance.now() - window.bench.last > 1000"
TIMER = '''
"""Tells the log how long K-LoRA needs to build its part of the page."""
import functools, time
from modules import script_callbacks, scripts

def timed(function):
    @functools.wraps(function)
    def run(*args):
        begin = time.perf_counter()
        try:
            return function(*args)
        finally:
            print(f"klora-timer {(time.perf_counter() - begin) * 1000:.2f}", flush=True)
    return run

def wrap():
    for data in scripts.scripts_data:
        if data.script_class.__name__ == "KLoraScript":
            data.script_class.ui = timed(data.script_class.ui)

script_callbacks.on_before_ui(wrap)
for callback in script_callbacks.callback_map["callbacks_ui_settings"]:
    if "klora" in str(callback.script).lower() or "k-lora" in str(callback.script).lower():
        callback.callback = timed(callback.callback)
'''


@contextmanager
def servers(host: str) -> Iterator[dict[str, WebUI]]:
    """The host with and without the extension, both running."""
    install = find(host)
    ours = WebUI(install, DATA / host)
    ours.make_models()
    probe = {"klora-probe": HERE / "probe"}
    with tempfile.TemporaryDirectory() as folder:
        timer = Path(folder) / "zz-timer"
        (timer / "scripts").mkdir(parents=True)
        (timer / "scripts" / "timer.py").write_text(TIMER)
        plain = ours.beside("plain", extensions=probe)
        ours.extensions = {**probe, "sd-webui-k-lora": ROOT, "zz-timer": timer}
        with plain, ours:
            yield {"without": plain, "with K-LoRA": ours}


def load(browser, server: WebUI) -> dict[str, float]:
    """One load of the page."""
    page = browser.new_page(viewport={"width": 1500, "height": 1500})
    try:
        metrics = page.context.new_cdp_session(page)
        metrics.send("Performance.enable")
        page.add_init_script(WATCH)
        document = page.goto(server.url)
        page.wait_for_function(QUIET, timeout=120_000)
        found = {m["name"]: m["value"] for m in metrics.send("Performance.getMetrics")["metrics"]}
        return {
            "loaded_ms": page.evaluate("window.bench.loaded"),
            "main_thread_ms": found["TaskDuration"] * 1000,
            "document_kib": len(document.body()) / 1024,
        }
    finally:
        page.close()


def bench_page(host: str, loads: int) -> tuple[list[dict], list[float]]:
    """A row for each way and one for the difference, which is taken within each pair of loads; and
    the milliseconds that the server took for each time that it built our part."""
    found: dict[str, list[dict]] = {}
    with servers(host) as ways, chromium() as browser:
        for server in ways.values():
            load(browser, server)  # what is done once
        for i in range(loads):
            for name in list(ways)[:: 1 if i % 2 else -1]:
                found.setdefault(name, []).append(load(browser, ways[name]))
        log = ways["with K-LoRA"].log_since()
    pairs = list(zip(found["with K-LoRA"], found["without"], strict=True))
    found["more, in each pair"] = [{k: a[k] - b[k] for k in a} for a, b in pairs]
    rows = []
    for name in ("without", "with K-LoRA", "more, in each pair"):
        columns = {k: [load[k] for load in found[name]] for k in FIGURES}
        rows.append({"way": name, **{k: statistics.median(v) for k, v in columns.items()}})
        rows[-1]["quartiles"] = [float(q) for q in np.percentile(columns["loaded_ms"], (25, 75))]
        if name in ways:
            rows[-1]["fastest_ms"] = min(columns["loaded_ms"])
    rows[-1]["fastest_ms"] = rows[1]["fastest_ms"] - rows[0]["fastest_ms"]
    built = [float(line.split()[1]) for line in log.splitlines() if line.startswith("klora-timer")]
    return rows, built


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loads", type=int, default=15, help="of each way (15)")
    parser.add_argument("--host", choices=HOSTS, help="one host only")
    options = parser.parse_args()
    if not CHROMIUM.is_file():
        sys.exit(f"no chromium at {CHROMIUM}: install it, or set KLORA_CHROMIUM")
    columns = {
        **{"way": "way", "loaded_ms": "UI loaded, ms", "quartiles": "quartiles"},
        **{"fastest_ms": "fastest, ms", "main_thread_ms": "main thread, ms"},
        "document_kib": "document, KiB",
    }
    for host in [options.host] if options.host else HOSTS:
        if find(host) is None:
            print(f"### {host}\n\nSkipped: {locate(host).missing}.\n")
            continue
        rows, built = bench_page(host, options.loads)
        print(f"### {host} {find(host).version}\n\n{options.loads} loads of each.\n")
        print(table(rows, columns))
        print(
            f"\nBuilding K-LoRA's part on the server: {statistics.median(built):.1f} ms each time, "
            f"{sum(built):.0f} ms for all {len(built)} times of a start.\n"
        )


if __name__ == "__main__":
    main()
