"""Prompt → picture: a text-conditioned diffusion model for the world, on diffusers.

A picture is cut into patches of 4 × 4 pixels, so the UNet works on 12 × 12 places of 48 numbers,
as a latent diffusion model would, without an autoencoder. The UNet predicts the clean picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .world import SIZE

PATCH = 4
WEIGHTS = Path(__file__).parent / "weights"
TRAIN_STEPS = 1000
"""Noise levels that the model knows."""

ANY_SUBJECT, ANY_STYLE = "thing", "drawing"
"""The words for any subject and any style."""
NEW_SUBJECT, NEW_STYLE = "sks", "zwx"
"""Rare words that mean nothing to the base model; a LoRA gives them their meaning."""
WORDS = 4
"""Length of a prompt in words; shorter ones are filled up."""
_WIDTH = 64


class TextEncoder(nn.Module):
    """One learnt vector for each word and one for each place: prompts → [batch, WORDS, _WIDTH].

    Raises KeyError for a word unknown to the model.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        super().__init__()
        self.vocabulary = tuple(vocabulary)
        self._numbers = {word: i for i, word in enumerate(self.vocabulary)}
        self.word = nn.Embedding(len(self.vocabulary), _WIDTH)
        self.place = nn.Embedding(WORDS, _WIDTH)
        self.norm = nn.LayerNorm(_WIDTH)

    def forward(self, prompts: Sequence[str]) -> torch.Tensor:
        rows = [[self._numbers[word] for word in prompt.split()] for prompt in prompts]
        tokens = torch.tensor([row + [self._numbers[""]] * (WORDS - len(row)) for row in rows])
        return self.norm(self.word(tokens) + self.place.weight)


class UNet(UNet2DConditionModel):
    """Its output is a tensor, as that of a WebUI's network: LoRA Composite averages two."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return super().forward(x, t, words).sample


def new_unet() -> UNet:
    """Ten transformers with 80 attention projections; called through ``predict``."""
    channels = 3 * PATCH**2
    return UNet(
        sample_size=SIZE // PATCH,
        in_channels=channels + 2,  # and where the place is
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(64, 96, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=_WIDTH,
        attention_head_dim=2,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Begins in pure noise (zero terminal SNR), in which nothing tells how bright a picture is."""
    return DDIMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def predict(unet: UNet, x: torch.Tensor, t: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """The clean picture in patches, from a noisy one at noise level ``t``.

    The UNet also gets each place's x and y, -1..1: at high noise nothing else says where it is.
    """
    line = torch.linspace(-1, 1, x.shape[-1])
    places = torch.stack(torch.meshgrid(line, line, indexing="xy")).expand(len(x), -1, -1, -1)
    return unet(torch.cat([x, places], 1), t, words)


def to_patches(pictures: torch.Tensor) -> torch.Tensor:
    """float [batch, 3, SIZE, SIZE] → [batch, 3·PATCH², SIZE/PATCH, SIZE/PATCH], both -1..1."""
    return torch.pixel_unshuffle(pictures, PATCH)


def to_pictures(patches: torch.Tensor) -> np.ndarray:
    """The inverse of ``to_patches``, as uint8 [batch, SIZE, SIZE, 3]."""
    return to_uint8(torch.pixel_shuffle(patches, PATCH))


def to_uint8(pictures: torch.Tensor) -> np.ndarray:
    """float [batch, 3, SIZE, SIZE], -1..1 → uint8 [batch, SIZE, SIZE, 3]; values beyond are
    clipped."""
    pixels = pictures.clamp(-1, 1).add(1).mul(127.5).round()
    return pixels.permute(0, 2, 3, 1).to(torch.uint8).numpy()


class Model:
    """The diffusion model, for making pictures."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder) -> None:
        self.unet, self.text_encoder = unet.eval(), text_encoder.eval()

    @classmethod
    def load(cls, path: Path = WEIGHTS / "model.safetensors") -> Model:
        with safe_open(path, "pt") as file:
            vocabulary = json.loads(file.metadata()["vocabulary"])
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        unet, text_encoder = new_unet(), TextEncoder(vocabulary)
        for prefix, part in (("unet.", unet), ("text_encoder.", text_encoder)):
            part.load_state_dict(
                {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            )
        return cls(unet, text_encoder)

    def save(self, path: Path = WEIGHTS / "model.safetensors") -> None:
        tensors = {f"unet.{k}": v for k, v in self.unet.state_dict().items()}
        tensors |= {f"text_encoder.{k}": v for k, v in self.text_encoder.state_dict().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.half().contiguous() for k, v in tensors.items()}, path,
            {"vocabulary": json.dumps(self.text_encoder.vocabulary)},
        )  # fmt: skip

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int = 20,
        guidance: float = 2.0,
        *,
        before_step: Callable[[int], None] = lambda finished: None,
        after_step: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """One picture for each prompt and seed, uint8 [batch, SIZE, SIZE, 3].

        ``before_step`` is called with the number of finished steps before each model call, and
        ``after_step`` behind it: where a WebUI has its denoiser callbacks.
        """
        plan = scheduler()
        plan.set_timesteps(steps)
        side = SIZE // PATCH
        x = torch.stack(
            [
                torch.randn(3 * PATCH**2, side, side, generator=torch.Generator().manual_seed(seed))
                for seed in seeds
            ]
        )
        words = self.text_encoder([*prompts, *[""] * len(prompts)])
        for i, t in enumerate(plan.timesteps):
            before_step(i)
            with_prompt, without = predict(self.unet, torch.cat([x, x]), t, words).chunk(2)
            after_step()
            x = plan.step(without + guidance * (with_prompt - without), t, x).prev_sample
        return to_pictures(x)
