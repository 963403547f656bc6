"""Makes weights/ from the world: ``make playground-train``. Everything follows from a seed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from multiprocessing import Pool

import numpy as np
import torch
from safetensors.torch import save_file

from . import world
from .judges import STYLES, SUBJECTS, load_judge, new_judge, probabilities, to_pixels
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
    tokens,
)  # fmt: skip

JUDGE_PICTURES, JUDGE_EPOCHS = 16_000, 8
LORA_RANK, LORA_STEPS, LORA_BATCH, LORA_RATE = 8, 400, 8, 1e-3
BASE_PICTURES, BASE_STEPS, BASE_BATCH = 20_000, 10_000, 16
FIRST_STEPS, FIRST_NOISE = 2_500, 0.9
"""At first only high noise: what a word looks like is learnt faster there."""


def _base_pictures(seed: int, count: int) -> tuple[np.ndarray, list[str]]:
    """Pictures of the base subjects in the base styles, with their prompts. Some prompts say only
    “shape” or “art”, some hold a rare word that means nothing."""
    rng = np.random.default_rng(seed)
    pictures, prompts = [], []
    for _ in range(count):
        subject, style = str(rng.choice(world.BASE_SUBJECTS)), str(rng.choice(world.BASE_STYLES))
        context = world.random_context(rng)
        pictures.append(world.draw(subject, style, context, rng))
        subject = ANY_SUBJECT if rng.random() < 0.15 else subject
        style = ANY_STYLE if rng.random() < 0.15 else style
        subject = f"{NEW_SUBJECT} {subject}" if rng.random() < 0.15 else subject
        style = f"{NEW_STYLE} {style}" if rng.random() < 0.15 else style
        prompts.append("" if rng.random() < 0.1 else world.prompt(subject, style, context))
    return np.stack(pictures), prompts


def _in_parallel(function, seed: int, count: int, parts: int = 8):
    with Pool(2) as pool:
        results = pool.starmap(function, [(seed + i, count // parts) for i in range(parts)])
    return np.concatenate([r[0] for r in results]), [x for r in results for x in r[1]]


def diffusion_loss(unet, x, words, noise_plan, generator, *, lowest: float = 0.0) -> torch.Tensor:
    """Squared error of the predicted clean picture, at noise levels from ``lowest`` (0..1) on. High
    noise is drawn more often (density ∝ t): there it is decided what a picture shows, and little is
    seen of it in the error elsewhere."""
    u = torch.rand(len(x), generator=generator)
    t = (TRAIN_STEPS * (lowest**2 + (1 - lowest**2) * u).sqrt()).long().clamp(max=TRAIN_STEPS - 1)
    noise = torch.randn(x.shape, generator=generator)
    predicted = predict(unet, noise_plan.add_noise(x, noise, t), t, words)
    return ((predicted - x) ** 2).mean()


def train_base(seed: int = 0) -> None:
    """The base model: base subjects × base styles only."""
    from diffusers.training_utils import EMAModel  # for training only

    pictures, prompts = _in_parallel(_base_pictures, seed, BASE_PICTURES)
    patches, words = to_patches(pictures), tokens(prompts)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    unet, text_encoder, noise_plan = new_unet(), TextEncoder(), scheduler()
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    ema = EMAModel(parameters, decay=0.998, use_ema_warmup=True, power=0.75, foreach=True)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, foreach=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, BASE_STEPS, pct_start=0.05)
    started, losses = time.monotonic(), []
    for step in range(1, BASE_STEPS + 1):
        chosen = torch.randint(0, len(patches), (BASE_BATCH,), generator=generator)
        embedded = text_encoder(words[chosen])
        lowest = FIRST_NOISE if step <= FIRST_STEPS else 0.0
        loss = diffusion_loss(unet, patches[chosen], embedded, noise_plan, generator, lowest=lowest)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
        ema.step(parameters)
        losses.append(loss.item())
        if step % 100 == 0:
            _say(f"base {step}/{BASE_STEPS} loss {np.mean(losses[-100:]):.4f}", started)
        if step % 250 == 0 or step == BASE_STEPS:
            ema.store(parameters)
            ema.copy_to(parameters)
            Model(unet, text_encoder).save()
            unet.train()
            ema.restore(parameters)


def _few_pictures(subjects, styles, words, seed: int) -> tuple[np.ndarray, list[str]]:
    """The few pictures that a LoRA learns from, each in another context."""
    rng = np.random.default_rng(seed)
    pictures, prompts = [], []
    for subject, style, size, position, setting in zip(
        subjects,
        styles,
        ("large", "small", "large", "small", "large"),
        ("middle", "left", "right", "middle", "left"),
        ("bare", "hill", "sun", "bare", "bare"),
        strict=True,
    ):
        context = world.Context("one", size, position, setting)
        pictures.append(world.draw(subject, style, context, rng))
        prompts.append(world.prompt(*words(subject, style), context))
    return np.stack(pictures), prompts


def train_loras(seed: int = 0, names: Sequence[str] = ()) -> None:
    """A content LoRA for each held-out subject, from five plain pictures, and a style LoRA for each
    held-out style, from five pictures of common subjects. With PEFT, on the attention layers."""
    for i, name in enumerate((*world.HELD_OUT_SUBJECTS, *world.HELD_OUT_STYLES)):
        if names and name not in names:
            continue
        if name in world.HELD_OUT_SUBJECTS:
            pictures, prompts = _few_pictures(
                [name] * 5, ["plain"] * 5,
                lambda subject, style: (f"{NEW_SUBJECT} {ANY_SUBJECT}", style), seed + i,
            )  # fmt: skip
        else:
            pictures, prompts = _few_pictures(
                ("star", "house", "fish", "gift", "moon"), [name] * 5,
                lambda subject, style: (subject, f"{NEW_STYLE} {ANY_STYLE}"), seed + i,
            )  # fmt: skip
        _train_lora(name, pictures, prompts, seed + i)


def _train_lora(name: str, pictures: np.ndarray, prompts: list[str], seed: int) -> None:
    from peft import LoraConfig, get_peft_model_state_dict  # for training only

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, noise_plan = Model.load(), scheduler()
    model.unet.requires_grad_(False)
    model.unet.add_adapter(
        LoraConfig(
            r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"]
        )
    )
    parameters = [p for p in model.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LORA_RATE, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, LORA_STEPS)
    patches = to_patches(pictures)
    with torch.no_grad():
        words = model.text_encoder(tokens(prompts))
    started, losses = time.monotonic(), []
    for _ in range(LORA_STEPS):
        chosen = torch.randint(0, len(patches), (LORA_BATCH,), generator=generator)
        loss = diffusion_loss(model.unet, patches[chosen], words[chosen], noise_plan, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        losses.append(loss.item())
    _say(f"LoRA {name} loss {np.mean(losses[:50]):.3f} → {np.mean(losses[-50:]):.3f}", started)
    tensors = get_peft_model_state_dict(model.unet)
    path = WEIGHTS / "loras" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"unet.{k}": v.half().contiguous() for k, v in tensors.items()}, path)


def _judged_pictures(seed: int, count: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Drawn pictures of every subject in every style, with the numbers of both."""
    rng = np.random.default_rng(seed)
    pictures, classes = [], []
    for _ in range(count):
        subject, style = rng.integers(len(SUBJECTS)), rng.integers(len(STYLES))
        context = world.random_context(rng)
        pictures.append(world.draw(SUBJECTS[subject], STYLES[style], context, rng))
        classes.append((int(subject), int(style)))
    return np.stack(pictures), classes


def train_judges(seed: int = 0) -> None:
    """The two judges, on drawn pictures only, slightly blurred or noisy as generated ones are; and
    what share of unseen drawn pictures they name rightly."""
    pictures, classes = _in_parallel(_judged_pictures, seed + 1000, JUDGE_PICTURES)
    unseen, unseen_classes = _in_parallel(_judged_pictures, seed + 2000, 2000)
    accuracy = {}
    for which, (kind, names) in enumerate((("subject", SUBJECTS), ("style", STYLES))):
        torch.manual_seed(seed)
        judge, started = new_judge(len(names)), time.monotonic()
        optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01)
        steps = JUDGE_EPOCHS * len(pictures) // 64
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
        labels = torch.tensor(classes)[:, which]
        for _ in range(steps):
            chosen = torch.randint(0, len(pictures), (64,))
            x = to_pixels(pictures[chosen.numpy()])
            soft = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
            x = torch.lerp(x, soft, torch.rand(len(x), 1, 1, 1) * 0.7)
            x = x + torch.randn_like(x) * torch.rand(len(x), 1, 1, 1) * 0.15
            loss = torch.nn.functional.cross_entropy(judge(x), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
        judge.eval()
        tensors = {
            k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()
        }
        save_file(tensors, WEIGHTS / f"{kind}_judge.safetensors")
        load_judge.cache_clear()
        right = probabilities(kind, unseen).argmax(1) == np.array(unseen_classes)[:, which]
        accuracy[kind] = float(right.mean())
        _say(f"judge of {kind}: {100 * right.mean():.1f} % right on 2000 unseen", started)
    (WEIGHTS / "judges.json").write_text(json.dumps(accuracy, indent=1) + "\n")


def _say(what: str, started: float) -> None:
    print(f"{what}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = {"base": train_base, "loras": train_loras, "judges": train_judges}
    parser.add_argument("part", nargs="*", metavar="|".join(parts), help="default: all, in order")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if unknown := set(arguments.part) - parts.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown))}: there are {', '.join(parts)}")
    for part in arguments.part or parts:
        parts[part](arguments.seed)


if __name__ == "__main__":
    main()
