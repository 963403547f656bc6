"""The networks that LoRAs are made for: what their attention and their blocks are called.

A *family* is one network with its names, and may have several models, such as SDXL. A new family is
a row in ``FAMILIES``, and a table in ``layer_names`` if diffusers calls its layers otherwise.

Names are those of ``layer_names``: the path of the module in the network, with ``_`` for ``.``, and
a part of a fused projection behind a slash.

Read from the WebUIs' own code, the file is named in each row: paths in Forge Neo where no other
WebUI is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

Shapes = Mapping[str, tuple[int, ...]]
"""Layer name → shape of its weight, or of the ΔW."""


@dataclass(frozen=True, eq=False)
class Family:
    """One network.

    Attributes:
        name: what its base models have in common, for messages.
        signs: matches the beginning of a name that only this network has, by its own names or by
            those of diffusers.
        attention: matches the whole name of an attention projection.
        blocks: (beginning of a name, what people call that block), in the network's order. The
            pattern's first group, if it has one, is the block's number; a second one is a part of
            the block that has a name of its own.
        models: what people call its models, if there are several.
        model: from the layers of a network or of a LoRA to which of these it can be; none if they
            do not tell.
    """

    name: str
    signs: re.Pattern
    attention: re.Pattern
    blocks: tuple[tuple[re.Pattern, str], ...]
    models: tuple[str, ...] = ()
    model: Callable[[Shapes], tuple[str, ...]] = lambda shapes: ()


def family_of(names: Iterable[str]) -> Family | None:
    """The family that most of these names are a sign of, as the network or as diffusers has them;
    None if there is none."""
    signs = dict.fromkeys(FAMILIES, 0)
    shared = False
    for name in names:
        found = next((family for family in FAMILIES if family.signs.match(name)), None)
        if found:
            signs[found] += 1
        shared = shared or _SHARED.match(name) is not None
    best = max(signs, key=signs.__getitem__)
    if signs[best]:
        return best
    # Most trainers' files for Flux have more than that.
    return QWEN_IMAGE if shared else None


@dataclass(frozen=True)
class BaseModel:
    """What a network is, or a LoRA is for.

    Attributes:
        family: None if it is not known.
        models: which of the family's models it can be; none if nothing tells, or there is only one.
    """

    family: Family | None
    models: tuple[str, ...] = ()

    @classmethod
    def of(cls, family: Family | None, shapes: Shapes) -> BaseModel:
        """Of a network with these layers, or of a LoRA for some of them."""
        return cls(family, family.model(shapes) if family else ())

    def __str__(self) -> str:
        return " or ".join(self.models) or (self.family.name if self.family else "not recognised")

    def excludes(self, other: BaseModel) -> bool:
        """Whether the two are known to be different."""
        if self.family is None or other.family is None:
            return False
        if self.family is not other.family:
            return True
        known = bool(self.models and other.models)
        return known and set(self.models).isdisjoint(other.models)


def is_attention(name: str, family: Family | None) -> bool:
    """Whether a layer is an attention projection, which are what the paper fuses.

    Of a network that is not in the table, a layer whose path says attention.
    """
    pattern = family.attention if family else _SAYS_ATTENTION
    return pattern.fullmatch(name) is not None


def block(name: str) -> str:
    """What the block that a layer is in is called: “down 4”, “double”, “self 12”."""
    _, number, part, word = _place(name)
    return f"{part or word} {number}".rstrip()


def network_order(name: str) -> tuple:
    """Sorts names as their layers come in the network."""
    kind, number, part, _ = _place(name)
    inside = [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)]
    return kind, int(number or 0), _PARTS.index(part), inside


def _place(name: str) -> tuple[int, str, str, str]:
    """Of a layer's block: where its kind comes in the network, its number, part and word."""
    for kind, (pattern, word) in enumerate(_BLOCKS):
        match = pattern.match(name)
        if match:
            number, part = (*match.groups(""), "", "")[:2]
            return kind, number, part, word
    return len(_BLOCKS), "", "", "other"


_PARTS = ("self", "cross", "")
"""Of a block, as they come in it."""
_SHARED = re.compile(r"transformer_blocks_\d+_attn_")
"""Qwen-Image's own names of its attention, and diffusers' of several other networks."""
_SAYS_ATTENTION = re.compile(r"(.*_)?(attn|attention)\d?(_.*)?")


def _blocks(*rows: tuple[str, str]) -> tuple[tuple[re.Pattern, str], ...]:
    return tuple((re.compile(pattern), word) for pattern, word in rows)


def _first(shapes: Shapes, pattern: str) -> tuple[int, int] | None:
    """Rows and columns of the first layer of that name."""
    found = re.compile(pattern)
    matches = (shape for name, shape in shapes.items() if found.fullmatch(name))
    return next(((shape[0], shape[1]) for shape in matches if len(shape) > 1), None)


def _has(shapes: Shapes, pattern: str) -> bool:
    found = re.compile(pattern)
    return any(found.match(name) for name in shapes)


# -- what the base models of one family differ in -------------------------------------------------

_TEXT_WIDTH = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    1280: "SDXL refiner",
    2048: "SDXL",
}


def _unet(shapes: Shapes) -> tuple[str, ...]:
    text = _first(shapes, r".*_attn2_to_[kv]")
    return (_TEXT_WIDTH[text[1]],) if text and text[1] in _TEXT_WIDTH else ()


_FLUX_MODELS = ("Flux.1", "Flux.2", "Chroma")


def _flux(shapes: Shapes) -> tuple[str, ...]:
    """Flux.1 has a modulation in every block, Flux.2 one for all, and Chroma a network for them.
    Flux.2's MLPs have a gate, which makes them wider."""
    for signs, model in (
        ("distilled_guidance_layer", "Chroma"),
        ("(double|single)_stream_modulation", "Flux.2"),
        (
            r"double_blocks_\d+_(img|txt)_mod|single_blocks_\d+_modulation|vector_in|guidance_in",
            "Flux.1",
        ),
    ):
        if _has(shapes, signs):
            return (model,)
    for layer, wide in (
        (r"single_blocks_\d+_linear1", 9),  # q, k, v and twice three for the MLP
        (r"double_blocks_\d+_(img|txt)_mlp_0", 6),
    ):
        shape = _first(shapes, layer)
        if shape:
            return ("Flux.2",) if shape[0] == wide * shape[1] else ("Flux.1", "Chroma")
    shape = _first(shapes, r"single_blocks_\d+_linear2")
    if shape:
        return ("Flux.2",) if shape[1] == 4 * shape[0] else ("Flux.1", "Chroma")
    return ()


_NEXT_DIT_MODELS = ("Z-Image", "Lumina 2")


def _next_dit(shapes: Shapes) -> tuple[str, ...]:
    """Z-Image modulates after no activation and has as many heads for keys as for queries."""
    for number, name in enumerate(_NEXT_DIT_MODELS):
        if _has(shapes, rf"(layers|noise_refiner)_\d+_adaLN_modulation_{number}"):
            return (name,)
    fused, key = _first(shapes, r".*_attention_qkv"), _first(shapes, r".*_attention_qkv/k")
    if fused:
        return _NEXT_DIT_MODELS[:1] if fused[0] == 3 * fused[1] else _NEXT_DIT_MODELS[1:]
    if key:
        return _NEXT_DIT_MODELS[:1] if key[0] == key[1] else _NEXT_DIT_MODELS[1:]
    return ()


# -- the table ------------------------------------------------------------------------------------

_LAYERS = (r"layers_(\d+)_", "layer")
_PLAIN_BLOCKS = (r"blocks_(\d+)_(?:(self|cross)_attn)?", "block")

CONTROLNET = Family(  # not what samples a picture: here to say so of a file that is for one
    "a ControlNet",
    signs=re.compile(r"(lora_)?(controlnet|control_model|lllite)(_|$)|input_hint_block|zero_convs"),
    attention=re.compile("(?!)"),
    blocks=(),
)
UNET = Family(  # backend/nn/unet.py, CrossAttention; A1111: modules/sd_hijack_optimizations.py
    "Stable Diffusion",
    signs=re.compile(r"(input|output|down|up)_blocks_\d|mid(dle)?_block_"),
    attention=re.compile(r".*_attn\d_to_(q|k|v|out_0)"),
    blocks=_blocks(
        (r"input_blocks_(\d+)_", "down"),
        (r"middle_block_", "mid"),
        (r"output_blocks_(\d+)_", "up"),
    ),
    models=tuple(_TEXT_WIDTH.values()),
    model=_unet,
)
SD3 = Family(  # A1111: modules/models/sd3/mmdit.py; Forge: backend/nn/mmditx.py
    "Stable Diffusion 3",
    signs=re.compile(r"joint_blocks_\d"),
    attention=re.compile(r"joint_blocks_\d+_(x|context)_block_attn2?_(qkv(/\w+)?|proj)"),
    blocks=_blocks((r"joint_blocks_(\d+)_", "joint")),
)
FLUX = Family(  # backend/nn/flux.py and chroma.py: SelfAttention, SingleStreamBlock
    "Flux",
    signs=re.compile(
        r"(double_blocks|single_blocks|single_transformer_blocks)_\d|distilled_guidance_layer"
        r"|transformer_blocks_\d+_(norm1_(context_)?linear|ff_(context_)?(net|linear_(in|out)))"
        r"|(double|single)_stream_modulation"
    ),
    # The single blocks' linear1 and linear2 hold the projections together with the MLP.
    attention=re.compile(
        r"double_blocks_\d+_(img|txt)_attn_(qkv(/\w+)?|proj)|single_blocks_\d+_linear[12](/\w+)?"
    ),
    blocks=_blocks((r"double_blocks_", "double"), (r"single_blocks_", "single")),
    models=_FLUX_MODELS,
    model=_flux,
)
NEXT_DIT = Family(  # backend/nn/lumina.py, JointAttention
    "Z-Image or Lumina 2",
    signs=re.compile(
        r"(layers|(noise|context)_refiner)_\d+"
        r"_(attention_|feed_forward_w|adaLN_modulation|attention_norm|ffn_norm)"
    ),
    attention=re.compile(r"(layers|(noise|context)_refiner)_\d+_attention_(qkv(/\w+)?|out)"),
    blocks=_blocks(
        (r"noise_refiner_(\d+)_", "noise"),
        (r"context_refiner_(\d+)_", "context"),
        _LAYERS,
    ),
    models=_NEXT_DIT_MODELS,
    model=_next_dit,
)
KREA_2 = Family(  # backend/nn/krea.py, Attention: its output goes through a gate
    "Krea 2",
    signs=re.compile(
        r"blocks_\d+_(attn_(w[qkvo]|gate)$|mlp_(gate|up|down)$)|txtfusion_|text_fusion_"
        r"|transformer_blocks_\d+_(attn_to_gate|ff_(gate|up|down))$"
    ),
    attention=re.compile(r"(txtfusion_(layerwise|refiner)_)?blocks_\d+_attn_(w[qkvo]|gate)"),
    blocks=_blocks(
        (r"txtfusion_layerwise_blocks_(\d+)_", "fusion"),
        (r"txtfusion_refiner_blocks_(\d+)_", "refiner"),
        _PLAIN_BLOCKS,
    ),
)
ANIMA = Family(  # backend/nn/anima.py, SelfCrossAttention
    "Anima",
    signs=re.compile(
        r"blocks_\d+_((self|cross)_attn_(q|k|v|output)_(proj|norm)|mlp_layer\d|adaln_modulation)"
        r"|llm_adapter_"
    ),
    attention=re.compile(r"blocks_\d+_(self|cross)_attn_(q|k|v|output)_proj"),
    blocks=_blocks(_PLAIN_BLOCKS),
)
WAN = Family(  # backend/nn/wan.py, WanSelfAttention and its subclasses
    "Wan",
    signs=re.compile(r"blocks_\d+_((self|cross)_attn_([qkvo]|[kv]_img|norm_\w+)$|ffn_|attn[12]_)"),
    attention=re.compile(r"blocks_\d+_(self|cross)_attn_([qkvo]|[kv]_img)"),
    blocks=_blocks(_PLAIN_BLOCKS),
)
ERNIE = Family(  # backend/nn/ernie.py, ErnieImageAttention
    "Ernie-Image",
    signs=re.compile(r"layers_\d+_(self_attention_|mlp_(gate_proj|up_proj|linear_fc2))"),
    attention=re.compile(r"layers_\d+_self_attention_to_(q|k|v|out_0)"),
    blocks=_blocks(_LAYERS),
)
QWEN_IMAGE = Family(  # backend/nn/qwen.py, Attention
    "Qwen-Image",
    signs=re.compile(r"transformer_blocks_\d+_(img|txt)_(mlp|mod)_"),
    attention=re.compile(
        r"transformer_blocks_\d+_attn_(to_[qkv]|add_[qkv]_proj|to_out_0|to_add_out)"
    ),
    blocks=_blocks((r"transformer_blocks_(\d+)_", "block")),
)

SDXL = BaseModel(UNET, ("SDXL",))


class Block(NamedTuple):
    """A block of a network: what diffusers calls it, and how its layers' names begin."""

    name: str
    beginning: str


FAMILIES = (CONTROLNET, UNET, SD3, FLUX, NEXT_DIT, KREA_2, ANIMA, WAN, ERNIE, QWEN_IMAGE)
_BLOCKS = tuple(row for family in FAMILIES for row in family.blocks)
