"""Pictures with LoRAs: what a WebUI does around its model, in small.

The prompt holds the tags that one would write in a WebUI; the K-LoRA session gets the same calls
that a WebUI's callbacks make.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from lib_klora.errors import KLoraError
from lib_klora.hosts.diffusers_unet import DiffusersUNet
from lib_klora.report import Report
from lib_klora.session import Session
from lib_klora.settings import Settings
from lib_klora.steps import Pass

from .model import WEIGHTS, Model

STEPS = 20
_TAG = re.compile(r"<(lora|klora):([^>]*)>")


def altered(names: Sequence[str], folder: Path, *, factor: float = 1, kept: float = 1) -> Path:
    """Copies of the LoRAs, in ``folder``; those of ``names`` with a ΔW ``factor`` times as large,
    and with the part ``kept`` of their layers, drawn at random.

    At 1 / ``factor`` as its weight such a LoRA does what it did before, but a comparison of two
    files sees it: that is what γ is for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in (WEIGHTS / "loras").glob("*.safetensors"):
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        if path.stem in names:
            layers = sorted({name.partition(".lora_")[0] for name in tensors})
            draw = np.random.default_rng(list(path.stem.encode()))
            left = set(draw.permutation(layers)[: round(kept * len(layers))])
            tensors = {
                k: v * factor if "lora_B" in k else v
                for k, v in tensors.items()
                if k.partition(".lora_")[0] in left
            }
        save_file(tensors, folder / path.name)
    return folder


class Generation:
    """One generation as the session sees it: what a WebUI calls its processing object."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.extra_generation_params: dict[str, str] = {}
        self.comments: list[str] = []
        self.comment = self.comments.append


class Playground:
    """The model with its folder of LoRAs, ready to generate."""

    def __init__(
        self, model: Model | None = None, folder: Path = WEIGHTS / "loras",
        cache: Path = Path("build/playground/cache"),
    ) -> None:  # fmt: skip
        self.model = model or Model.load()
        self.host = DiffusersUNet(self.model.unet, folder, cache)
        self.session = Session(self.host)

    def generate(
        self,
        prompt: str,
        seeds: Sequence[int],
        settings: Settings | None = None,
        steps: int = STEPS,
        lora_between: tuple[float, float] = (0, 1),
    ) -> tuple[np.ndarray, Report]:
        """A picture for each seed, uint8 [seeds, SIZE, SIZE, 3], and what K-LoRA did.

        ``prompt`` may have ``<lora:NAME:WEIGHT>`` and two ``<klora:…>`` tags; what the former name
        is there in the part ``lora_between`` of the steps.
        Raises KLoraError where a WebUI would show the sentence and go on without K-LoRA.
        """
        tags = [(kind, items.split(":")) for kind, items in _TAG.findall(prompt)]
        words = " ".join(_TAG.sub("", prompt).split())
        p = Generation(prompt)
        loras = [(name, float(*weight or "1")) for kind, (name, *weight) in tags if kind == "lora"]
        first, last = (round(part * steps) for part in lora_between)
        self.host.use_loras(loras if first == 0 else [])
        self.session.activate(
            p,
            [items for kind, items in tags if kind == "klora"],
            settings or Settings(enabled=False),
        )

        def before_step(call: int) -> None:
            if call in (first, last) and call != 0:
                self.host.use_loras(loras if call == first else [])
            self.session.before_model_call(partial(Pass, call, steps, 0.0))

        try:
            pictures = self.model.sample(
                [words] * len(seeds), seeds, steps,
                before_step=before_step, after_step=self.session.after_model_call,
            )  # fmt: skip
            report = self.session.report(p)
            if report.error:
                raise KLoraError(report.error)
            return pictures, report
        finally:
            self.session.detach()
            self.host.use_loras([])
