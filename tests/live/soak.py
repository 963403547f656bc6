"""A long day: pictures of every kind in a seeded random order, with K-LoRA and with ``<lora:>``.

    python tests/live/soak.py HOST [PICTURES] [SEED]

After every tenth picture the plain one must be bit-identical to the first, and the server's memory
and open files are looked at. Then the same day is gone through with two ``<lora:>`` tags in place
of the pair, in a server of its own: what grows there as well is the WebUI's.
"""

import os
import random
import sys
from contextlib import suppress
from pathlib import Path

import make_loras
import numpy as np
from hosts import HOSTS
from webui import REPOSITORY, WebUI, find, locate

STOP = 10
"""Pictures between two looks."""
FILES = {
    "content": ("content", "content_ldm", "content_lokr", "content_down", "content_all"),
    "style": ("style", "style_bf16", "style_dora", "style_full", "style_up", "style_all"),
}
METHODS = ("K-LoRA", "K-LoRA", "K-LoRA", "Direct merge", "LoRA Switch", "Random selection")
KINDS = {  # how often, and what it is beside a txt2img of six steps
    "picture": 10,
    "other LoRA": 2,
    "only other LoRA": 2,
    "hires": 2,
    "img2img": 2,
    "batch": 1,
    "raise_at": 1,
    "interrupt_at": 1,
    "skip_at": 1,
    "checkpoint": 1,
}
CHECKPOINTS = ("tiny_sd15", "tiny_sd15_b")


def day(pictures, seed):
    """(kind, the pair's tags, the same two as <lora:> tags, fields of the accordion)."""
    dice = random.Random(seed)
    for _ in range(pictures):
        kind = dice.choices(list(KINDS), list(KINDS.values()))[0]
        names = [f"sd15_{dice.choice(FILES[role])}" for role in ("content", "style")]
        weights = [round(dice.uniform(0.3, 1.2), 1) for _ in names]
        both = list(zip(names, weights, strict=True))
        fields = {
            "scale": dice.choice(("S", "S*", "none")),
            "method": dice.choice(METHODS),
            "layers": dice.choice(("attention", "attention", "all")),
            "alpha": round(dice.uniform(0.5, 2.5), 1),
        }
        tags = [" ".join(f"<{tag}:{name}:{x}>" for name, x in both) for tag in ("klora", "lora")]
        yield kind, *tags, fields


def make(server, kind, prompt, scripts, state):
    """One picture of this kind; what it answers is looked at by nobody but the server's errors."""
    request = {"prompt": f"a cat {prompt}", "steps": 6, "alwayson_scripts": scripts}
    if kind == "other LoRA":
        request["prompt"] += " <lora:sd15_other:0.6>"
    elif kind == "only other LoRA":
        request = {"prompt": "a cat <lora:sd15_other:0.6>", "steps": 6}
    elif kind == "hires":
        request |= {"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.6}
        request |= {"hr_upscaler": "Latent", **server.host.hires}
    elif kind == "batch":
        request |= {"batch_size": 2, "n_iter": 2}
    elif kind.endswith("_at"):
        server.next(**{kind: 3})
    elif kind == "checkpoint":
        state["checkpoint"] = CHECKPOINTS[state["checkpoint"] == CHECKPOINTS[0]]
        server.load(state["checkpoint"])
    if kind == "img2img":
        result = server.img2img(np.full((64, 64, 3), 128, np.uint8), **request)
    else:
        result = server.txt2img(**request)
    expected = kind == "raise_at"
    assert bool(result.error) == expected, f"{kind}: {result.error}"
    for text in () if expected else result.infotexts:
        assert "K-LoRA error" not in text, f"{kind}: {text}"


def memory_of(pid):
    """(MiB in memory, open files) of a process."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    return resident / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def go_through(install, data, pictures, seed, with_k_lora):
    """Memory and open files at every stop of a day; raises at the first picture that is wrong."""
    looks = []
    with WebUI(install, data) as server:
        plain, state = {}, {"checkpoint": CHECKPOINTS[0]}
        for checkpoint in reversed(CHECKPOINTS):
            server.load(checkpoint)
            plain[checkpoint] = server.txt2img().sha
        for number, (kind, klora, lora, fields) in enumerate(day(pictures, seed), 1):
            scripts = {"K-LoRA": {"args": [fields]}} if with_k_lora else {}
            make(server, kind, klora if with_k_lora else lora, scripts, state)
            if number % STOP == 0:
                sha = server.txt2img().sha
                assert sha == plain[state["checkpoint"]], f"after picture {number} ({kind})"
                looks.append(memory_of(server.process.pid))
    return looks


def prepared(host, name):
    """(the installed host, the folder of its servers' data), with checkpoints and LoRA files."""
    install = find(host)
    if install is None:
        sys.exit(locate(host).missing)
    data = Path(os.environ.get("KLORA_LIVE") or REPOSITORY / "build" / name) / host
    server = WebUI(install, data)
    server.make_models()
    make_loras.write_set(server.checkpoints, server.loras)
    return install, data


def main(host, pictures=300, seed=1):
    """Prints a row of the table for each of the two days."""
    install, data = prepared(host, "soak")
    print(f"{HOSTS[host].title} {install.version}, {pictures} pictures, seed {seed}\n")
    print("| day | plain pictures as the first | MiB: first stop | half | end | open files |")
    print("|---|---|---|---|---|---|")
    for with_k_lora in (True, False):
        looks = go_through(install, data, int(pictures), int(seed), with_k_lora)
        sizes = [f"{looks[i][0]:.0f}" for i in (0, len(looks) // 2, -1)]
        name = "K-LoRA" if with_k_lora else "two `<lora:>`"
        files = f"{looks[0][1]} → {looks[-1][1]}"
        print(
            f"| {name} | {len(looks)} of {len(looks)} | {' | '.join(sizes)} | {files} |", flush=True
        )


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main(*sys.argv[1:])
