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
    PLAIN,
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
LORA_RANK, LORA_STEPS, LORA_BATCH, LORA_RATE = 8, 700, 8, 1.5e-3
PRIOR_PICTURES, MODULE_DROPOUT = 500, 0.3
BASE_PICTURES, BASE_STEPS, BASE_BATCH = 24_000, 8_000, 16
FIRST_STEPS, FIRST_NOISE = 2_000, 0.9
"""At first only high noise: what a word looks like is learnt faster there."""
GENERAL = 0.35
"""Share of pictures whose prompt says only “shape”, and of those that say only “art”."""


def _base_pictures(seed: int, count: int) -> tuple[np.ndarray, list[str]]:
    """Pictures of the base subjects and of made-up ones, in the base styles and made-up ones, with
    their prompts. A made-up one is called “shape” or “art”, and so is sometimes one with a name;
    some prompts hold a rare word that means nothing, and some are empty."""
    rng = np.random.default_rng(seed)
    pictures, prompts = [], []

    def choose(names, general: str, rare: str, make):
        name = word = str(rng.choice(names))
        if rng.random() < GENERAL:
            name, word = name if rng.random() < 0.25 else make(rng), general
        return name, f"{rare} {word}" if rng.random() < 0.2 else word

    for _ in range(count):
        context = world.random_context(rng)
        subject, a = choose(world.BASE_SUBJECTS, ANY_SUBJECT, NEW_SUBJECT, world.random_subject)
        style, b = choose(world.BASE_STYLES, ANY_STYLE, NEW_STYLE, world.random_style)
        pictures.append(world.draw(subject, style, context, rng))
        prompts.append("" if rng.random() < 0.1 else world.prompt(a, b, context))
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


CONTENT_PICTURES = 5
STYLE_SUBJECTS, STYLE_SHAPES = ("star", "house", "fish", "gift", "moon", "tree"), 10
CONTEXTS = (
    world.Context("one", "large", "middle", "bare"),
    world.Context("one", "small", "left", "hill"),
    world.Context("one", "large", "right", "sun"),
    world.Context("one", "small", "middle", "bare"),
    world.Context("one", "large", "left", "bare"),
)
"""Of the few pictures that a LoRA learns from, in turn."""


def _few_pictures(
    pairs: Sequence[tuple[str | list[world.Part], str]], words: Sequence[tuple[str, str]], seed: int
) -> tuple[np.ndarray, list[str]]:
    """A picture of each (subject, style), and its prompt with the given words for the two."""
    rng = np.random.default_rng(seed)
    contexts = [CONTEXTS[i % len(CONTEXTS)] for i in range(len(pairs))]
    pictures = [world.draw(*pair, c, rng) for pair, c in zip(pairs, contexts, strict=True)]
    prompts = [world.prompt(*pair, c) for pair, c in zip(words, contexts, strict=True)]
    return np.stack(pictures), prompts


def train_loras(seed: int = 0, names: Sequence[str] = ()) -> None:
    """A content LoRA for each held-out subject, from five plain pictures, and a style LoRA for each
    held-out style, from pictures of six common subjects and ten made-up ones. With PEFT, on the
    attention layers."""
    for i, name in enumerate((*world.HELD_OUT_SUBJECTS, *world.HELD_OUT_STYLES)):
        if names and name not in names:
            continue
        if name in world.HELD_OUT_SUBJECTS:
            pairs = [(name, PLAIN)] * CONTENT_PICTURES
            word, words = ANY_SUBJECT, [(f"{NEW_SUBJECT} {ANY_SUBJECT}", PLAIN)] * len(pairs)
        else:
            rng = np.random.default_rng(seed + i)
            things = [world.random_subject(rng) for _ in range(STYLE_SHAPES)]
            pairs = [(thing, name) for thing in (*STYLE_SUBJECTS, *things)]
            called = [*STYLE_SUBJECTS, *[ANY_SUBJECT] * STYLE_SHAPES]
            word, words = PLAIN, [(subject, f"{NEW_STYLE} {PLAIN}") for subject in called]
        _train_lora(name, *_few_pictures(pairs, words, seed + i), word, seed + i)


def _train_lora(name: str, pictures: np.ndarray, prompts: list[str], word: str, seed: int) -> None:
    """Half of each batch is pictures of the base model's own world whose prompts lack the general
    ``word`` that is to get a new meaning, so that the LoRA does not spoil the rest: DreamBooth's
    prior preservation (arXiv 2208.12242). And at each step some layers go without their change
    (“module dropout”), so that the others learn to do without them."""
    from peft import LoraConfig, get_peft_model_state_dict  # for training only
    from peft.tuners.lora import LoraLayer

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
    prior, prior_prompts = _base_pictures(seed, PRIOR_PICTURES)
    general = [i for i, prompt in enumerate(prior_prompts) if word not in prompt.split()]
    prior, prior_prompts = prior[general], [prior_prompts[i] for i in general]
    patches = to_patches(np.concatenate([pictures, prior]))
    with torch.no_grad():
        words = model.text_encoder(tokens(prompts + prior_prompts))
    started, losses = time.monotonic(), []
    layers = [module for module in model.unet.modules() if isinstance(module, LoraLayer)]
    for _ in range(LORA_STEPS):
        dropped = torch.rand(len(layers), generator=generator) < MODULE_DROPOUT
        for layer, off in zip(layers, dropped.tolist(), strict=True):
            layer.scaling["default"] = 0.0 if off else 1.0
        own = torch.randint(0, len(pictures), (LORA_BATCH // 2,), generator=generator)
        others = torch.randint(len(pictures), len(patches), own.shape, generator=generator)
        chosen = torch.cat([own, others])
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
