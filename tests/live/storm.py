"""Hostile input in a seeded random order: tags, fields, files, and pictures that end early.

    python tests/live/storm.py HOST [CASES] [SEED]

No case may raise into the WebUI what ``<lora:>`` does not raise as well, leave a traceback of ours
in the log, or change a plain picture.
"""

import json
import random
import sys
from contextlib import suppress

import torch
from hosts import HOSTS
from safetensors.torch import load_file, save_file
from soak import prepared
from webui import WebUI

STOP = 25
"""Cases between two plain pictures."""
GOOD = ("sd15_content", "sd15_style", "sd15_content_lokr", "sd15_style_full")
NAMES = (
    "sdxl_content", "nowhere", "", " ", "..", "../../etc/passwd", "none", "Ω", "猫", "a" * 300,
    "sd15_content\n", "%s%n", "{0}", "'\"", "\\", "\u202e", "bad_nan", "bad_truncated",
    "bad_empty", "bad_not_a_lora",
)  # fmt: skip
ITEMS = (
    "1", "0", "-1", "0.5", "1e308", "1e309", "-inf", "nan", "", " ", "x", "te=1", "te=", "unet=nan",
    "role=content", "role=style", "role=", "c", "s", "content", "style", "=", "==", "1=1",
    "0x10", "١", "½", "1_000", "1,5", "dyn=4", "lbw=ALL", "start=1", "\t", "�",
)  # fmt: skip
FIELDS = (
    "enabled", "alpha", "beta", "scale", "method", "layers", "gamma", "top_k", "unpaired", "seed",
    "text_encoder", "progress", "content", "style", "content_weight", "style_weight", "hires",
    "hires_scale", "hires_alpha", "hires_beta", "x", "", "__class__", "Ω",
)  # fmt: skip
VALUES = (
    None, True, False, 0, 1, -1, 2**62, 1.5, 1e308, "", "x", "S", "S*", "none", "all", "paper",
    "K-LoRA", "Direct merge", "sd15_content", "sd15_style", [], [1], {}, {"a": 1}, "a" * 3000,
    "Ω\n", "nan", "1.5",
)  # fmt: skip
ENDS = ("raise_at", "interrupt_at", "skip_at")


def damaged(good, dice):
    """Tensors of a file that somebody or something has spoilt."""
    tensors = dict(good)
    keys = sorted(tensors)
    for _ in range(dice.choice((1, 1, 3, 30))):
        key = dice.choice(keys)
        tensor = tensors.get(key)
        if tensor is None:
            continue
        what = dice.randrange(9)
        if what == 0:
            del tensors[key]
        elif what == 1:
            tensors[key] = tensor.flatten()[:0].clone()
        elif what == 2:
            tensors[key] = torch.full_like(
                tensor, dice.choice((float("nan"), float("inf"), 0, 1e4))
            )
        elif what == 3:
            tensors[key] = tensor.T.contiguous() if tensor.dim() == 2 else tensor.clone()
        elif what == 4:
            tensors[key] = (
                tensor[..., : max(1, tensor.shape[-1] // 2)].clone() if tensor.dim() else tensor
            )
        elif what == 5:
            tensors[f"{key}.{dice.choice(('x', 'weight', 'scale_weight'))}"] = tensor.clone()
        elif what == 6:
            shape = dice.choice(((), (1,), (7,), (4, 4), (0,), (1, 1, 1, 1, 1)))
            tensors[key.rpartition(".lora")[0] + ".dora_scale"] = torch.ones(shape)
        elif what == 7:
            tensors[key.rpartition(".lora")[0] + ".alpha"] = torch.tensor(
                dice.choice((0.0, 1e10, -1.0))
            )
        else:
            tensors[key] = tensor.to(dice.choice((torch.int8, torch.float64, torch.bool)))
    return tensors


def write_files(loras, dice):
    """Names of files that were spoilt in different ways."""
    names = []
    for number in range(40):
        good = load_file(
            loras / f"sd15_{dice.choice(('content', 'style', 'style_dora'))}.safetensors"
        )
        path = loras / f"storm_{number}.safetensors"
        save_file(damaged(good, dice), path)
        if number % 8 == 0:
            content = bytearray(path.read_bytes())
            for _ in range(dice.choice((1, 50))):
                content[dice.randrange(len(content))] = dice.randrange(256)
            path.write_bytes(content[: dice.choice((len(content), len(content) // 2, 9))])
        names.append(path.stem)
    return names


def case(dice, files):
    """(prompt, fields or None, how it ends or None)."""

    def tag():
        name = dice.choice(dice.choice((GOOD, GOOD, files, files, NAMES)))
        items = [dice.choice(ITEMS) for _ in range(dice.choice((0,) * 9 + (1, 2, 5)))]
        return f"<klora:{':'.join((name, *items))}>"

    count = dice.choices((0, 1, 2, 3, 9), (2, 1, 9, 1, 1))[0]
    prompt = (
        "a cat "
        + " ".join(tag() for _ in range(count))
        + dice.choice(("", " <lora:sd15_other:0.5>"))
    )
    fields = None
    if dice.random() < 0.2:
        fields = {
            dice.choice(FIELDS): dice.choice(VALUES) for _ in range(dice.choice((0, 1, 2, 8)))
        }
    end = dice.choice(ENDS) if dice.random() < 0.1 else None
    return prompt, fields, end


def weather(server, cases, seed):
    """How many pictures had K-LoRA, a sentence, or ended early; raises at the first wrong one."""
    dice = random.Random(seed)
    files = write_files(server.loras, dice)
    server.refresh_loras()
    server.load("tiny_sd15")
    plain, counts = (
        server.txt2img(steps=2).sha,
        {"K-LoRA": 0, "a sentence": 0, "neither": 0, "ended": 0},
    )
    for number in range(1, cases + 1):
        prompt, fields, end = case(dice, files)
        scripts = {} if fields is None else {"alwayson_scripts": {"K-LoRA": {"args": [fields]}}}
        shown = json.dumps([number, prompt, fields, end])[:600]
        mark = server.mark()
        if end:
            server.next(**{end: dice.randrange(2)})
        result = server.txt2img(prompt=prompt, steps=2, **scripts)
        if result.error and end != "raise_at":
            again = server.txt2img(prompt=prompt.replace("<klora:", "<lora:"), steps=2)
            assert again.error, f"{shown}: {result.error[:500]}"
        assert "lib_klora/" not in server.log_since(mark), (
            f"{shown}: {server.log_since(mark)[-3000:]}"
        )
        counts[kind_of(result, end)] += 1
        if number % STOP == 0:
            assert server.txt2img(steps=2).sha == plain, f"the plain picture after {shown}"
    return counts


def kind_of(result, end):
    if end or result.error:
        return "ended"
    text = result.infotexts[0]
    if "K-LoRA error: " in text:
        return "a sentence"
    return "K-LoRA" if "K-LoRA: " in text else "neither"


def main(host, cases=1000, seed=1):
    """Prints one row."""
    install, data = prepared(host, "storm")
    with WebUI(install, data) as server:
        counts = weather(server, int(cases), int(seed))
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    print(f"{HOSTS[host].title} {install.version}, {cases} cases, seed {seed}: {told}")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main(*sys.argv[1:])
