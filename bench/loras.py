"""LoRA files of real shape with random numbers, for the measurements."""

from __future__ import annotations

import torch

# SDXL: (transformer in the original network, transformer blocks in it, width)
_SDXL = (
    *((f"input_blocks_{i}_1", 2, 640) for i in (4, 5)),
    *((f"input_blocks_{i}_1", 10, 1280) for i in (7, 8)),
    ("middle_block_1", 10, 1280),
    *((f"output_blocks_{i}_1", 10, 1280) for i in (0, 1, 2)),
    *((f"output_blocks_{i}_1", 2, 640) for i in (3, 4, 5)),
)


def sdxl_shapes() -> dict[str, tuple[int, int]]:
    """The 560 attention projections: kohya prefix → (out, in)."""
    return {
        f"lora_unet_{path}_transformer_blocks_{i}_attn{n}_to_{to}": (
            width,
            2048 if n == 2 and to in ("k", "v") else width,
        )
        for path, depth, width in _SDXL
        for i in range(depth)
        for n in (1, 2)
        for to in ("q", "k", "v", "out_0")
    }


def sd15_shapes() -> dict[str, tuple[int, int]]:
    """The 128 attention projections of SD1.5."""
    widths = {
        **{f"input_blocks_{i}_1": w for i, w in ((1, 320), (2, 320), (4, 640), (5, 640))},
        **{f"input_blocks_{i}_1": 1280 for i in (7, 8)},
        "middle_block_1": 1280,
        **{f"output_blocks_{i}_1": 1280 for i in (3, 4, 5)},
        **{f"output_blocks_{i}_1": 640 for i in (6, 7, 8)},
        **{f"output_blocks_{i}_1": 320 for i in (9, 10, 11)},
    }
    return {
        f"lora_unet_{path}_transformer_blocks_0_attn{n}_to_{to}": (
            width,
            768 if n == 2 and to in ("k", "v") else width,
        )
        for path, width in widths.items()
        for n in (1, 2)
        for to in ("q", "k", "v", "out_0")
    }


def flux_shapes() -> dict[str, tuple[int, int]]:
    """The 228 fused matrices of Flux's 19 double and 38 single blocks."""
    d = 3072
    double = {"attn_qkv": (3 * d, d), "attn_proj": (d, d), "mlp_0": (4 * d, d), "mlp_2": (d, 4 * d)}
    return {
        **{
            f"lora_unet_double_blocks_{i}_{stream}_{name}": shape
            for i in range(19)
            for stream in ("img", "txt")
            for name, shape in double.items()
        },
        **{
            f"lora_unet_single_blocks_{i}_{name}": shape
            for i in range(38)
            for name, shape in (("linear1", (7 * d, d)), ("linear2", (d, 5 * d)))
        },
    }


def lora_layer(
    prefix: str, shape: tuple[int, int], rank: int, seed: int, spread: float = 0
) -> dict[str, torch.Tensor]:
    """One layer in fp16: a falling spectrum, and rows and columns of different size. Its strength
    is exp(N(0, ``spread``))."""
    g = torch.Generator().manual_seed(seed)
    out, in_ = shape
    spectrum = torch.exp(-torch.arange(rank) / max(rank / 4, 1))
    up = torch.randn(out, rank, generator=g) * spectrum
    down = torch.randn(rank, in_, generator=g)
    up *= torch.exp(0.4 * torch.randn(out, 1, generator=g)) * 0.02
    down *= torch.exp(0.4 * torch.randn(1, in_, generator=g)) * 0.02
    up *= torch.exp(spread * torch.randn(1, generator=g))
    return {
        f"{prefix}.lora_up.weight": up.half(),
        f"{prefix}.lora_down.weight": down.half(),
        f"{prefix}.alpha": torch.tensor(float(rank)),
    }


def lora(
    shapes: dict[str, tuple[int, int]], rank: int, seed: int, spread: float = 0
) -> dict[str, torch.Tensor]:
    """A whole file; with a ``spread`` its layers differ in strength, as trained ones do."""
    tensors: dict[str, torch.Tensor] = {}
    for i, (prefix, shape) in enumerate(shapes.items()):
        tensors |= lora_layer(prefix, shape, rank, 10_000 * seed + i, spread)
    return tensors
