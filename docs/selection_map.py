"""Draws docs/selection-map.png, the README's picture: a K-LoRA of two made-up SD1.5 LoRAs.

The files are random numbers of an ordinary LoRA's shape; each layer has a strength of its own, as
trained ones have.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib_klora import picture, plot
from lib_klora.lora_file import LoraFile, parse_lora
from lib_klora.pair import pair_files
from lib_klora.plan import make_plan
from lib_klora.scores import compute_scores
from lib_klora.settings import Settings

WIDTHS = {1: 320, 2: 320, 4: 640, 5: 640, 7: 1280, 8: 1280}
BLOCKS = {
    **{f"input_blocks_{i}_1": width for i, width in WIDTHS.items()},
    "middle_block_1": 1280,
    **{f"output_blocks_{i}_1": (1280, 640, 320)[i // 3 - 1] for i in range(3, 12)},
}


def made_up(name: str, rank: int, seed: int) -> LoraFile:
    """A LoRA for every attention projection of SD1.5."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for block, width in BLOCKS.items():
        for attention in ("attn1", "attn2"):
            for part in ("to_q", "to_k", "to_v", "to_out_0"):
                inputs = 768 if attention == "attn2" and part in ("to_k", "to_v") else width
                layer = f"lora_unet_{block}_transformer_blocks_0_{attention}_{part}"
                strength = torch.exp(0.5 * torch.randn(1, generator=generator))
                tensors[f"{layer}.lora_down.weight"] = torch.randn(
                    rank, inputs, generator=generator
                )
                tensors[f"{layer}.lora_up.weight"] = strength * torch.randn(
                    width, rank, generator=generator
                )
    return parse_lora(name, tensors)


def main() -> None:
    """Writes the picture beside this file."""
    pair = pair_files(made_up("subject", 8, 1), made_up("style", 16, 2))
    plan = make_plan(pair, compute_scores(pair), Settings(), steps=30)
    target = Path(__file__).with_name("selection-map.png")
    target.write_bytes(picture.png(picture.selection_map(plan, pair)))
    print(plot.describe(plan, pair))


if __name__ == "__main__":
    main()
