"""Small LoRA files and real layer layouts for the tests of this folder."""

from __future__ import annotations

import torch

PROJECTIONS = tuple(
    f"{attention}.{to}"
    for attention in ("attn1", "attn2")
    for to in ("to_q", "to_k", "to_v", "to_out.0")
)

# (path of the transformer in diffusers, path in the original network, transformer blocks in it),
# read off the two networks' definitions. SD1.5 has 16 transformers of one block.
SD15 = (
    ("down_blocks.0.attentions.0", "input_blocks.1.1", 1),
    ("down_blocks.0.attentions.1", "input_blocks.2.1", 1),
    ("down_blocks.1.attentions.0", "input_blocks.4.1", 1),
    ("down_blocks.1.attentions.1", "input_blocks.5.1", 1),
    ("down_blocks.2.attentions.0", "input_blocks.7.1", 1),
    ("down_blocks.2.attentions.1", "input_blocks.8.1", 1),
    ("mid_block.attentions.0", "middle_block.1", 1),
    ("up_blocks.1.attentions.0", "output_blocks.3.1", 1),
    ("up_blocks.1.attentions.1", "output_blocks.4.1", 1),
    ("up_blocks.1.attentions.2", "output_blocks.5.1", 1),
    ("up_blocks.2.attentions.0", "output_blocks.6.1", 1),
    ("up_blocks.2.attentions.1", "output_blocks.7.1", 1),
    ("up_blocks.2.attentions.2", "output_blocks.8.1", 1),
    ("up_blocks.3.attentions.0", "output_blocks.9.1", 1),
    ("up_blocks.3.attentions.1", "output_blocks.10.1", 1),
    ("up_blocks.3.attentions.2", "output_blocks.11.1", 1),
)
# SDXL has 11 transformers of 2 or 10 blocks, 70 blocks in all.
SDXL = (
    ("down_blocks.1.attentions.0", "input_blocks.4.1", 2),
    ("down_blocks.1.attentions.1", "input_blocks.5.1", 2),
    ("down_blocks.2.attentions.0", "input_blocks.7.1", 10),
    ("down_blocks.2.attentions.1", "input_blocks.8.1", 10),
    ("mid_block.attentions.0", "middle_block.1", 10),
    ("up_blocks.0.attentions.0", "output_blocks.0.1", 10),
    ("up_blocks.0.attentions.1", "output_blocks.1.1", 10),
    ("up_blocks.0.attentions.2", "output_blocks.2.1", 10),
    ("up_blocks.1.attentions.0", "output_blocks.3.1", 2),
    ("up_blocks.1.attentions.1", "output_blocks.4.1", 2),
    ("up_blocks.1.attentions.2", "output_blocks.5.1", 2),
)


def transformer_layers(layout) -> list[tuple[str, str, str]]:
    """(diffusers path, original path, layer in the block) of every linear layer of a layout."""
    others = ("ff.net.0.proj", "ff.net.2")
    return [
        (f"{diffusers}.transformer_blocks.{i}", f"{ldm}.transformer_blocks.{i}", layer)
        for diffusers, ldm, depth in layout
        for i in range(depth)
        for layer in (*PROJECTIONS, *others)
    ]


# How each family of files writes one layer: (key prefix, ending of up, ending of down).
SPELLINGS = {
    "kohya, diffusers blocks": lambda diffusers, ldm, layer: (
        "lora_unet_" + f"{diffusers}.{layer}".replace(".", "_"),
        ".lora_up.weight",
        ".lora_down.weight",
    ),
    "kohya, LDM blocks": lambda diffusers, ldm, layer: (
        "lora_unet_" + f"{ldm}.{layer}".replace(".", "_"),
        ".lora_up.weight",
        ".lora_down.weight",
    ),
    "old diffusers": lambda diffusers, ldm, layer: (
        f"unet.{diffusers}.{layer}".replace(".to_", ".processor.to_").removesuffix(".0"),
        "_lora.up.weight",
        "_lora.down.weight",
    ),
    "old diffusers without unet.": lambda diffusers, ldm, layer: (
        f"{diffusers}.{layer}".replace(".to_", ".processor.to_").removesuffix(".0"),
        "_lora.up.weight",
        "_lora.down.weight",
    ),
    "diffusers dotted": lambda diffusers, ldm, layer: (
        f"unet.{diffusers}.{layer}",
        ".lora.up.weight",
        ".lora.down.weight",
    ),
    "PEFT": lambda diffusers, ldm, layer: (
        f"unet.{diffusers}.{layer}",
        ".lora_B.weight",
        ".lora_A.weight",
    ),
    "PEFT, saved by get_peft_model": lambda diffusers, ldm, layer: (
        f"base_model.model.{diffusers}.{layer}",
        ".lora_B.default.weight",
        ".lora_A.default.weight",
    ),
    "ComfyUI": lambda diffusers, ldm, layer: (
        f"diffusion_model.{ldm}.{layer}",
        ".lora_B.weight",
        ".lora_A.weight",
    ),
    "LyCORIS (SimpleTuner)": lambda diffusers, ldm, layer: (
        "lycoris_" + f"{diffusers}.{layer}".replace(".", "_"),
        ".lora_up.weight",
        ".lora_down.weight",
    ),
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def linear(
    prefix: str,
    rank: int = 4,
    size: int = 8,
    seed: int = 0,
    *,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """One kohya-style linear LoRA layer of shape [size, size]."""
    tensors = {
        f"{prefix}.lora_up.weight": randn(size, rank, seed=2 * seed, dtype=dtype),
        f"{prefix}.lora_down.weight": randn(rank, size, seed=2 * seed + 1, dtype=dtype),
    }
    if alpha is not None:
        tensors[f"{prefix}.alpha"] = torch.tensor(float(alpha))
    return tensors


def linears(prefixes, rank: int = 4, size: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """A kohya-style file with these layers, each with its own random numbers."""
    return {
        key: tensor
        for i, prefix in enumerate(prefixes)
        for key, tensor in linear(prefix, rank, size, seed=1000 * seed + i).items()
    }


def attention_prefixes(count: int) -> list[str]:
    """The first ``count`` attention projections of SD1.5, as kohya spells them."""
    names = [
        SPELLINGS["kohya, diffusers blocks"](*layer)[0]
        for layer in transformer_layers(SD15)
        if layer[2] in PROJECTIONS
    ]
    return names[:count]
