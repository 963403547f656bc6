"""Makes weights/ from the world: ``make playground-train``. Everything follows from a seed.

The base model takes 40 minutes on two cores, the LoRAs half an hour. The base model can be stopped
and started again: what it has learnt lies in build/playground.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.multiprocessing import spawn

from . import emoji, judges, world
from .model import (
    ANY_STYLE,
    ANY_SUBJECT,
    NEW_STYLE,
    NEW_SUBJECT,
    TRAIN_STEPS,
    WEIGHTS,
    Model,
    TextEncoder,
    new_unet,
    predict,
    scheduler,
    to_patches,
)  # fmt: skip

BASE_STEPS, BASE_BATCH, BASE_RATE = 6_000, 16, 8e-4
PROCESSES = 2
"""Each with one core, and ``BASE_BATCH`` pictures in a step."""
WARM_UP, COOL_DOWN = 200, 0.5
"""Steps until the rate is whole, and the last part of all steps, in which it falls to 0."""
FIRST_STEPS, FIRST_NOISE = 2_000, 0.9
"""At first only high noise: what a word looks like is learnt faster there."""
GENERAL, RARE, EMPTY = 0.2, 0.2, 0.1
"""Shares of the prompts that say only “thing”; only “drawing”; a rare word too; nothing at all."""
RECOLOURED = 0.5
"""Of the pictures that are called only “drawing”."""
STATE = Path("build/playground/base.pt")
KEEP_EVERY = 250

LORA_RANK, LORA_BATCH, LORA_RATE = 4, 16, 1.5e-3
CONTENT_STEPS, STYLE_STEPS = 500, 1_200
MODULE_DROPOUT = 0.3

Batch = tuple[torch.Tensor, list[str]]
"""Pictures, float [batch, 3, SIZE, SIZE], -1..1, and their prompts."""


def vocabulary(arrays: world.Arrays) -> list[str]:
    rare = (ANY_SUBJECT, NEW_SUBJECT, ANY_STYLE, NEW_STYLE)
    return ["", *rare, *world.BASE_SETS, *world.base_things(arrays)]


def base_batches(arrays: world.Arrays, size: int, seed: int) -> Iterator[Batch]:
    """Pictures of the base model's things and sets, without end. Some are called “thing”, and so
    are some “drawing”, half of these in colours that nobody chose; some prompts hold a rare word
    that means nothing, and some are empty."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    things = world.base_things(arrays)
    drawn = {s: [thing for thing in things if thing in arrays[s]] for s in world.BASE_SETS}

    def called(word: str, general: str, rare: str) -> str:
        word = general if rng.random() < GENERAL else word
        return f"{rare} {word}" if rng.random() < RARE else word

    while True:
        masters, prompts, recolour = [], [], []
        for _ in range(size):
            style = str(rng.choice(world.BASE_SETS))
            thing = drawn[style][rng.integers(len(drawn[style]))]
            masters.append(arrays[style][thing])
            a = called(thing, ANY_SUBJECT, NEW_SUBJECT)
            b = called(style, ANY_STYLE, NEW_STYLE)
            recolour.append(b.endswith(ANY_STYLE) and rng.random() < RECOLOURED)
            prompts.append("" if rng.random() < EMPTY else f"{a} {b}")
        pictures = world.shown(torch.from_numpy(np.stack(masters)), generator)
        chosen = torch.tensor(recolour)
        pictures[chosen] = world.recoloured(pictures[chosen], generator)
        yield pictures, prompts


def diffusion_loss(unet, x, words, noise_plan, generator, *, lowest: float = 0.0) -> torch.Tensor:
    """Squared error of the predicted clean picture, at noise levels from ``lowest`` (0..1) on. High
    noise is drawn more often (density ∝ t): there it is decided what a picture shows, and little is
    seen of it in the error elsewhere."""
    u = torch.rand(len(x), generator=generator)
    t = (TRAIN_STEPS * (lowest**2 + (1 - lowest**2) * u).sqrt()).long().clamp(max=TRAIN_STEPS - 1)
    noise = torch.randn(x.shape, generator=generator)
    predicted = predict(unet, noise_plan.add_noise(x, noise, t), t, words)
    return ((predicted.float() - x) ** 2).mean()


def train_base(seed: int = 0) -> None:
    """The base model: no held-out thing, no held-out set."""
    emoji.pictures()  # fetched and drawn once
    with tempfile.TemporaryDirectory() as folder:
        spawn(_train_base, (seed, f"file://{folder}/meeting"), PROCESSES)


def _train_base(rank: int, seed: int, meeting: str) -> None:
    """One of PROCESSES, which differ in the pictures that they see, and average their gradients."""
    from diffusers.training_utils import EMAModel  # for training only

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=PROCESSES
    )
    arrays = emoji.pictures()
    torch.manual_seed(seed)
    unet, text_encoder = new_unet(), TextEncoder(vocabulary(arrays))
    noise_plan = scheduler()
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    ema = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75, foreach=True)
    optimizer = torch.optim.AdamW(parameters, BASE_RATE, weight_decay=0.01, foreach=True)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1.0, (i + 1) / WARM_UP, (BASE_STEPS - i) / (BASE_STEPS * COOL_DOWN)),
    )
    parts = {"unet": unet, "text": text_encoder, "ema": ema, "optimizer": optimizer, "rate": rate}
    done = 0
    if STATE.exists():
        kept = torch.load(STATE, weights_only=True)
        done = kept.pop("done")
        for name, state in kept.items():
            parts[name].load_state_dict(state)
    own_seed = seed + PROCESSES * done + rank
    batches = base_batches(arrays, BASE_BATCH, own_seed)
    generator = torch.Generator().manual_seed(own_seed)
    started, losses = time.monotonic(), []
    for step in range(done + 1, BASE_STEPS + 1):
        pictures, prompts = next(batches)
        lowest = FIRST_NOISE if step <= FIRST_STEPS else 0.0
        with torch.autocast("cpu", torch.bfloat16):
            words, patches = text_encoder(prompts), to_patches(pictures)
            loss = diffusion_loss(unet, patches, words, noise_plan, generator, lowest=lowest)
        optimizer.zero_grad()
        loss.backward()
        _average([parameter.grad for parameter in parameters])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
        ema.step(parameters)
        losses.append(loss.item())
        if rank == 0 and (step % KEEP_EVERY == 0 or step == BASE_STEPS):
            _say(f"base {step}/{BASE_STEPS} loss {np.mean(losses[-KEEP_EVERY:]):.4f}", started)
            state = {name: part.state_dict() for name, part in parts.items()} | {"done": step}
            torch.save(state, STATE.with_suffix(".new"))
            STATE.with_suffix(".new").replace(STATE)
            ema.store(parameters)
            ema.copy_to(parameters)
            Model(unet, text_encoder).save()
            unet.train()
            ema.restore(parameters)


def _average(tensors: list[torch.Tensor]) -> None:
    """Over all processes, in place."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= PROCESSES
    for tensor, mean in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


# -- LoRAs -----------------------------------------------------------------------------------------


def lora_batches(arrays: world.Arrays, name: str, size: int, seed: int) -> Iterator[Batch]:
    """What the LoRA of a held-out thing or set learns from: the one drawing of the thing in
    CONTENT_SET, or the drawings of STYLE_SUBJECTS in the set."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    if name in world.SUBJECTS:
        pairs = [(arrays[world.CONTENT_SET][name], f"{NEW_SUBJECT} {ANY_SUBJECT} {ANY_STYLE}")]
    else:
        pairs = [
            (arrays[name][thing], f"{word} {NEW_STYLE} {ANY_STYLE}")
            for thing in world.STYLE_SUBJECTS
            if thing in arrays[name]
            for word in (thing, ANY_SUBJECT)
        ]
    while True:
        chosen = rng.integers(len(pairs), size=size)
        masters = torch.from_numpy(np.stack([pairs[i][0] for i in chosen]))
        yield world.shown(masters, generator), [pairs[i][1] for i in chosen]


def train_lora(name: str, seed: int = 0) -> None:
    """With PEFT, on the attention layers. Half of each batch is pictures of the base model's own
    world whose prompts lack the general word that is to get a new meaning, so that the LoRA does
    not spoil the rest: DreamBooth's prior preservation (arXiv 2208.12242). And at each step some
    layers go without their change (“module dropout”), so that the others learn to do without."""
    from peft import LoraConfig, get_peft_model_state_dict  # for training only
    from peft.tuners.lora import LoraLayer

    arrays = emoji.pictures()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, noise_plan = Model.load(), scheduler()
    model.unet.requires_grad_(False)
    model.text_encoder.requires_grad_(False)
    model.unet.add_adapter(
        LoraConfig(
            r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"]
        )
    )
    parameters = [p for p in model.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LORA_RATE, weight_decay=0.01)
    steps = CONTENT_STEPS if name in world.SUBJECTS else STYLE_STEPS
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    own = lora_batches(arrays, name, LORA_BATCH // 2, seed)
    word = ANY_SUBJECT if name in world.SUBJECTS else ANY_STYLE
    prior = base_batches(arrays, LORA_BATCH, seed)
    started, losses = time.monotonic(), []
    layers = [module for module in model.unet.modules() if isinstance(module, LoraLayer)]
    for _ in range(steps):
        dropped = torch.rand(len(layers), generator=generator) < MODULE_DROPOUT
        for layer, off in zip(layers, dropped.tolist(), strict=True):
            layer.scaling["default"] = 0.0 if off else 1.0
        pictures, prompts = next(own)
        others, other_prompts = next(prior)
        kept = [i for i, prompt in enumerate(other_prompts) if word not in prompt.split()]
        kept = kept[: len(pictures)]
        with torch.autocast("cpu", torch.bfloat16):
            words = model.text_encoder(prompts + [other_prompts[i] for i in kept])
            patches = to_patches(torch.cat([pictures, others[kept]]))
            loss = diffusion_loss(model.unet, patches, words, noise_plan, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        losses.append(loss.item())
    _say(f"LoRA {name} loss {np.mean(losses[:50]):.4f} → {np.mean(losses[-50:]):.4f}", started)
    tensors = get_peft_model_state_dict(model.unet)
    path = WEIGHTS / "loras" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"unet.{k}": v.half().contiguous() for k, v in tensors.items()}, path)


def train_loras(seed: int = 0, names: Sequence[str] = ()) -> None:
    """A content LoRA for each held-out thing and a style LoRA for each held-out set; a process for
    each core, with one thread each."""
    emoji.pictures()  # fetched and drawn once
    context = get_context("spawn")
    with context.Pool(os.cpu_count(), torch.set_num_threads, (1,)) as pool:
        names = names or (*world.SUBJECTS, *world.STYLES)
        for _ in pool.imap(partial(train_lora, seed=seed), names, chunksize=1):
            pass


def fit_judges(seed: int = 0) -> None:
    """The judges, on the emoji alone. Nothing in it is random."""
    right = judges.fit(emoji.pictures())
    (WEIGHTS / "judges.json").write_text(json.dumps(right, indent=1) + "\n")


def _say(what: str, started: float) -> None:
    print(f"{what}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = {"base": train_base, "loras": train_loras, "judges": fit_judges}
    parser.add_argument("part", nargs="*", metavar="|".join(parts), help="default: all, in order")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if unknown := set(arguments.part) - parts.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown))}: there are {', '.join(parts)}")
    for part in arguments.part or parts:
        parts[part](arguments.seed)


if __name__ == "__main__":
    main()
