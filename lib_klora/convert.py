"""A LoRA file in names that every WebUI of its family reads; its numbers stay as they are.

A layer is written as kohya's and musubi's trainers do, ``lora_unet_`` and its name in the network,
which is also what ComfyUI and its relatives read for every network. A part of a fused projection
has no such name: it is written as SimpleTuner does, ``lycoris_`` and its name in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .errors import KLoraError
from .families import UNET, BaseModel
from .layer_names import bare_name, is_text_encoder
from .lora_file import parse_lora, split_key

_ENDINGS = {"down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight"}
"""Of tensors that spellings call differently; the others keep their ending."""
_OF_DIFFUSERS = re.compile(r"(down|up)_blocks_\d|mid_block_|single_transformer_blocks_\d")
"""Beginnings of a name that only diffusers has, not the network."""
_UPSAMPLER = re.compile(r"up_blocks_(\d+)_upsamplers_0_conv")


@dataclass(frozen=True)
class Converted:
    """What ``convert`` makes of a file.

    Attributes:
        key_of: new key → the key in the file, for each of its tensors.
        base_model: what the file is for.
        unplaced: the keys that stay as they are, because their place is not known.
    """

    key_of: Mapping[str, str]
    base_model: BaseModel
    unplaced: tuple[str, ...]


def convert(name: str, tensors: Mapping[str, torch.Tensor]) -> Converted:
    """New keys for the tensors of a file.

    Raises KLoraError as ``parse_lora`` does, or if the file's family is not known.
    """
    file = parse_lora(name, tensors)
    if file.layers and file.family is None:
        raise KLoraError(
            f"“{name}” is for a network that K-LoRA does not know (such as "
            f"{next(iter(file.layers.values())).prefix}), so its layers cannot be named: leave it "
            f"as it is."
        )
    name_of = {layer.prefix: layer.name for layer in file.layers.values()}
    key_of: dict[str, str] = {}
    unplaced = []
    for key in tensors:
        prefix, part = split_key(key)
        if part is None:
            place = None
        elif is_text_encoder(prefix):
            place = _of_text_encoder(prefix, file.base_model)
        else:
            place = prefix in name_of and _of_network(prefix, name_of[prefix], file.base_model)
        new = place and place + _ENDINGS.get(part, key[len(prefix) :])
        if not new or new in key_of:
            unplaced.append(key)
            new = key
        key_of[new] = key
    return Converted(key_of, file.base_model, tuple(unplaced))


def _of_network(prefix: str, name: str, base_model: BaseModel) -> str | None:
    bare = bare_name(prefix)
    if "/" in name:
        return f"lycoris_{bare}"
    if base_model.family is UNET and name.endswith("_conv"):
        upsampler = _UPSAMPLER.fullmatch(bare)
        if upsampler is None or base_model.models != ("SDXL",):
            return f"lora_unet_{bare}"
        # Both have attention in SDXL, which the name from diffusers does not say.
        return f"lora_unet_output_blocks_{2 + 3 * int(upsampler[1])}_2_conv"
    return None if _OF_DIFFUSERS.match(name) else f"lora_unet_{name}"


def _of_text_encoder(prefix: str, base_model: BaseModel) -> str | None:
    """``text_encoder_2.text_model.…`` → ``lora_te2_text_model_…``."""
    if prefix.startswith("lora_"):
        return prefix
    path = prefix.removeprefix("base_model.model.")
    match = re.fullmatch(r"text_encoder(?:_(\d))?\.(?:text_model\.)?(encoder\..+)", path)
    if match is None:
        return None
    one_of_several = match[1] or base_model.family is not UNET or base_model.models == ("SDXL",)
    number = (match[1] or "1") if one_of_several else ""
    return f"lora_te{number}_text_model_{match[2].replace('.', '_')}"
