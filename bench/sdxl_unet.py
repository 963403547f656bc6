"""SDXL's denoising network with random weights: its shapes and its work, nothing else.

Modules are laid out and named as in the original, so that the attention projections have the names
of LoRA files. ``width`` = 320 is SDXL; a smaller one is for trying things out.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

HEAD = 64


class ResBlock(nn.Module):
    """Two convolutions, with the time embedding between."""

    def __init__(self, in_: int, out: int, embedding: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, in_), nn.SiLU(), nn.Conv2d(in_, out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out), nn.SiLU(), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if in_ == out else nn.Conv2d(in_, out, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Multi-head attention to a context."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.heads = max(width // HEAD, 1)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        attended = functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(attended.transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    """GEGLU and a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(value * functional.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(width, width), Attention(width, context)
        self.ff = GatedFeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Transformer blocks over the pixels of a feature map."""

    def __init__(self, width: int, depth: int, context: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width)
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, context) for _ in range(depth)
        )

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[2:])


class Upsample(nn.Module):
    """Twice the size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0))


class SDXLUNet(nn.Module):
    """(latent, embedding of time and size, text) → noise."""

    depths = (0, 2, 10)

    def __init__(self, width: int = 320, context: int = 2048) -> None:
        super().__init__()
        self.embedding = 4 * width
        self.context = context
        widths = (width, 2 * width, 4 * width)
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(4, width, 3, padding=1)])])
        skips, now = [width], width
        for level, (out, depth) in enumerate(zip(widths, self.depths, strict=True)):
            for _ in range(2):
                self.input_blocks.append(self._block(now, out, depth))
                now = out
                skips.append(now)
            if level < 2:
                self.input_blocks.append(
                    nn.ModuleList([nn.Conv2d(now, now, 3, stride=2, padding=1)])
                )
                skips.append(now)
        self.middle_block = self._block(now, now, self.depths[-1])
        self.middle_block.append(ResBlock(now, now, self.embedding))
        self.output_blocks = nn.ModuleList()
        for level in (2, 1, 0):
            for i in range(3):
                block = self._block(now + skips.pop(), widths[level], self.depths[level])
                now = widths[level]
                if level and i == 2:
                    block.append(Upsample(now))
                self.output_blocks.append(block)
        self.out = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, 4, 3, padding=1))

    def _block(self, in_: int, out: int, depth: int) -> nn.ModuleList:
        block = nn.ModuleList([ResBlock(in_, out, self.embedding)])
        if depth:
            block.append(Transformer(out, depth, self.context))
        return block

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        def run(block: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
            for part in block:
                if isinstance(part, ResBlock):
                    x = part(x, emb)
                elif isinstance(part, Transformer):
                    x = part(x, context)
                else:
                    x = part(x)
            return x

        skips = []
        for block in self.input_blocks:
            x = run(block, x)
            skips.append(x)
        x = run(self.middle_block, x)
        for block in self.output_blocks:
            x = run(block, torch.cat([x, skips.pop()], dim=1))
        return self.out(x)

    def attention_projections(self) -> dict[str, nn.Linear]:
        """LoRA files' name → layer."""
        return {
            "lora_unet_" + name.replace(".", "_"): module
            for name, module in self.named_modules()
            if isinstance(module, nn.Linear) and (".attn1.to_" in name or ".attn2.to_" in name)
        }
