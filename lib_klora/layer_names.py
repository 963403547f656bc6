"""One name for one layer, however a file spells it.

In a WebUI the name is that of the parameter which the WebUI changes, whatever the file calls it
(see ``hosts``). Here the same name is made from the file alone, for work without a WebUI.

A name is the path of the module in the original network with ``_`` for ``.``:
``input_blocks_4_1_transformer_blocks_0_attn1_to_q``, ``double_blocks_0_img_attn_qkv``. A part of a
fused projection has its letter behind a slash: ``double_blocks_0_img_attn_qkv/q``,
``single_blocks_3_linear1/mlp``.

Spellings that are read, with any of these prefixes, in any order, also doubled:

=====================  ===========================================================================
kohya, musubi          ``lora_unet_…`` with the network's own names or, of UNets, diffusers';
                       ``lora_te_…``
LyCORIS / SimpleTuner  ``lycoris_…`` with diffusers' names
OneTrainer             ``lora_transformer_…`` with diffusers' names
old diffusers          ``unet.….processor.to_q_lora.up``, with or without ``unet.``
diffusers / PEFT       ``unet.….to_q.lora_A``, ``transformer.…``, ``base_model.model.…``
ComfyUI / AI Toolkit   ``diffusion_model.…`` with the network's own names
DiffSynth              the bare names
=====================  ===========================================================================
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping

from .families import FLUX, KREA_2, NEXT_DIT, UNET, WAN, Family, family_of

TEXT_ENCODER_PREFIXES = ("lora_te", "text_encoder", "lora_prior_te")

_PREFIXES = re.compile(
    r"(base_model\.model\.|(model\.)?diffusion_model[._]|transformer\.|unet[._]|lora_unet_+"
    r"|lora_transformer_|lycoris_)+"
)


def is_text_encoder(prefix: str) -> bool:
    """Whether a key prefix of a LoRA file belongs to a text encoder."""
    return prefix.removeprefix("base_model.model.").startswith(TEXT_ENCODER_PREFIXES)


def bare_name(prefix: str) -> str:
    """A layer's name as a file has it, without what stands before the network's names.

    ``prefix`` is a LoRA file's key up to the part that names the tensor, or a module's path.
    """
    name = prefix[match.end() :] if (match := _PREFIXES.match(prefix)) else prefix
    name = name.replace(".", "_").replace("_processor_", "_")
    return _TO_OUT.sub(r"\1_0", name)


def common_names(prefixes: Iterable[str]) -> tuple[Family | None, dict[str, str]]:
    """The family that these layers are of, and the name of each one.

    A layer that no rule knows keeps its own name, so that two files of one spelling still pair.
    """
    bare = {prefix: bare_name(prefix) for prefix in prefixes}
    family = family_of(bare.values())
    rename = _FROM_DIFFUSERS.get(family, lambda name: name)
    # Equal names are one string: files and host have thousands of them.
    return family, {prefix: sys.intern(rename(name)) for prefix, name in bare.items()}


def common_name(prefix: str) -> str:
    """The name of a layer whose family its own name tells."""
    return common_names([prefix])[1][prefix]


_TO_OUT = re.compile(r"(_attn\d?_to_out|_attention_to_out)$")
"""Diffusers leaves out the index of that list in some spellings."""

# -- diffusers' names → the network's own ---------------------------------------------------------

_RESNET = {
    "norm1": "in_layers_0",
    "conv1": "in_layers_2",
    "norm2": "out_layers_0",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
_UNET_WHOLE = {
    "conv_in": "input_blocks_0_0",
    "conv_norm_out": "out_0",
    "conv_out": "out_2",
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0",
    "add_embedding_linear_2": "label_emb_0_2",
}
_FLUX_WHOLE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed_timestep_embedder_linear_1": "time_in_in_layer",
    "time_text_embed_timestep_embedder_linear_2": "time_in_out_layer",
    "time_text_embed_text_embedder_linear_1": "vector_in_in_layer",
    "time_text_embed_text_embedder_linear_2": "vector_in_out_layer",
    "time_text_embed_guidance_embedder_linear_1": "guidance_in_in_layer",
    "time_text_embed_guidance_embedder_linear_2": "guidance_in_out_layer",
    "time_guidance_embed_timestep_embedder_linear_1": "time_in_in_layer",
    "time_guidance_embed_timestep_embedder_linear_2": "time_in_out_layer",
    "double_stream_modulation_img_linear": "double_stream_modulation_img_lin",
    "double_stream_modulation_txt_linear": "double_stream_modulation_txt_lin",
    "single_stream_modulation_linear": "single_stream_modulation_lin",
    "proj_out": "final_layer_linear",
    "norm_out_linear": "final_layer_adaLN_modulation_1",
}
_FLUX_DOUBLE = {
    "attn_to_q": "img_attn_qkv/q",
    "attn_to_k": "img_attn_qkv/k",
    "attn_to_v": "img_attn_qkv/v",
    "attn_to_out_0": "img_attn_proj",
    "attn_add_q_proj": "txt_attn_qkv/q",
    "attn_add_k_proj": "txt_attn_qkv/k",
    "attn_add_v_proj": "txt_attn_qkv/v",
    "attn_to_add_out": "txt_attn_proj",
    "attn_norm_q": "img_attn_norm_query_norm",
    "attn_norm_k": "img_attn_norm_key_norm",
    "attn_norm_added_q": "txt_attn_norm_query_norm",
    "attn_norm_added_k": "txt_attn_norm_key_norm",
    "norm1_linear": "img_mod_lin",
    "norm1_context_linear": "txt_mod_lin",
    "ff_net_0_proj": "img_mlp_0",
    "ff_net_2": "img_mlp_2",
    "ff_context_net_0_proj": "txt_mlp_0",
    "ff_context_net_2": "txt_mlp_2",
    "ff_linear_in": "img_mlp_0",
    "ff_linear_out": "img_mlp_2",
    "ff_context_linear_in": "txt_mlp_0",
    "ff_context_linear_out": "txt_mlp_2",
}
_FLUX_SINGLE = {
    "attn_to_q": "linear1/q",
    "attn_to_k": "linear1/k",
    "attn_to_v": "linear1/v",
    "proj_mlp": "linear1/mlp",
    "proj_out": "linear2",
    "attn_norm_q": "norm_query_norm",
    "attn_norm_k": "norm_key_norm",
    "norm_linear": "modulation_lin",
    "attn_to_qkv_mlp_proj": "linear1",
    "attn_to_out_0": "linear2",
}
_NEXT_DIT = {
    "attention_to_q": "attention_qkv/q",
    "attention_to_k": "attention_qkv/k",
    "attention_to_v": "attention_qkv/v",
    "attention_to_out_0": "attention_out",
    "attention_norm_q": "attention_q_norm",
    "attention_norm_k": "attention_k_norm",
}
_KREA_2 = {
    "attn_to_q": "attn_wq",
    "attn_to_k": "attn_wk",
    "attn_to_v": "attn_wv",
    "attn_to_gate": "attn_gate",
    "attn_to_out_0": "attn_wo",
    "ff_gate": "mlp_gate",
    "ff_up": "mlp_up",
    "ff_down": "mlp_down",
}
_KREA_2_WHOLE = {
    "img_in": "first",
    "time_embed_linear_1": "tmlp_0",
    "time_embed_linear_2": "tmlp_2",
    "time_mod_proj": "tproj_1",
    "txt_in_linear_1": "txtmlp_1",
    "txt_in_linear_2": "txtmlp_3",
    "text_fusion_projector": "txtfusion_projector",
    "final_layer_linear": "last_linear",
}
_WAN = {
    **{
        f"attn{i}_{diffusers}": f"{kind}_attn_{own}"
        for i, kind in ((1, "self"), (2, "cross"))
        for diffusers, own in (
            ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out_0", "o"),
            ("add_k_proj", "k_img"), ("add_v_proj", "v_img"),
        )
    },
    "ffn_net_0_proj": "ffn_0",
    "ffn_net_2": "ffn_2",
}  # fmt: skip

_Rename = Callable[[str], str]


def _rename(whole: Mapping[str, str], *blocks: tuple[str, str, Mapping[str, str]]) -> _Rename:
    """Names by tables: those outside the blocks, and (beginning, its number last, as a pattern;
    the network's beginning; the rest) of each kind of block. Other names stay."""
    kinds = [(re.compile(pattern + "_(.+)"), own, inside) for pattern, own, inside in blocks]

    def rename(name: str) -> str:
        for pattern, own, inside in kinds:
            match = pattern.fullmatch(name)
            if match:
                rest = inside.get(match[match.lastindex])
                return name if rest is None else f"{match.expand(own)}_{rest}"
        return whole.get(name, name)

    return rename


# Diffusers counts blocks by resolution, the original network counts them through: three to a
# resolution (two residual blocks and a resampler going down, three residual blocks going up).
_UNET_RULES: list[tuple[re.Pattern, Callable[[re.Match], str]]] = [
    (
        re.compile(r"down_blocks_(\d+)_attentions_(\d+)_(.+)"),
        lambda m: f"input_blocks_{1 + 3 * int(m[1]) + int(m[2])}_1_{m[3]}",
    ),
    (
        re.compile(r"down_blocks_(\d+)_resnets_(\d+)_(.+)"),
        lambda m: f"input_blocks_{1 + 3 * int(m[1]) + int(m[2])}_0_{_RESNET.get(m[3], m[3])}",
    ),
    (
        re.compile(r"down_blocks_(\d+)_downsamplers_0_conv"),
        lambda m: f"input_blocks_{3 + 3 * int(m[1])}_0_op",
    ),
    (re.compile(r"mid_block_attentions_0_(.+)"), lambda m: f"middle_block_1_{m[1]}"),
    (
        re.compile(r"mid_block_resnets_(\d+)_(.+)"),
        lambda m: f"middle_block_{2 * int(m[1])}_{_RESNET.get(m[2], m[2])}",
    ),
    (
        re.compile(r"up_blocks_(\d+)_attentions_(\d+)_(.+)"),
        lambda m: f"output_blocks_{3 * int(m[1]) + int(m[2])}_1_{m[3]}",
    ),
    (
        re.compile(r"up_blocks_(\d+)_resnets_(\d+)_(.+)"),
        lambda m: f"output_blocks_{3 * int(m[1]) + int(m[2])}_0_{_RESNET.get(m[3], m[3])}",
    ),
    # The upsampler is module 1 or 2 of its block, depending on whether that block has attention;
    # its diffusers name does not say. The common name leaves the number out.
    (
        re.compile(r"up_blocks_(\d+)_upsamplers_0_conv"),
        lambda m: f"output_blocks_{2 + 3 * int(m[1])}_conv",
    ),
    (re.compile(r"output_blocks_(\d+)_[12]_conv"), lambda m: f"output_blocks_{m[1]}_conv"),
]


def _rename_unet(name: str) -> str:
    for pattern, replace in _UNET_RULES:
        match = pattern.fullmatch(name)
        if match:
            return replace(match)
    return _UNET_WHOLE.get(name, name)


_FROM_DIFFUSERS: Mapping[Family | None, _Rename] = {
    UNET: _rename_unet,
    FLUX: _rename(
        _FLUX_WHOLE,
        (r"single_transformer_blocks_(\d+)", r"single_blocks_\1", _FLUX_SINGLE),
        (r"transformer_blocks_(\d+)", r"double_blocks_\1", _FLUX_DOUBLE),
    ),
    NEXT_DIT: _rename(
        {
            **{
                f"all_final_layer_2-1_{layer}": f"final_layer_{layer}"
                for layer in ("linear", "adaLN_modulation_1")
            },
            "all_x_embedder_2-1": "x_embedder",
        },
        (r"(layers|noise_refiner|context_refiner)_(\d+)", r"\1_\2", _NEXT_DIT),
    ),
    KREA_2: _rename(
        _KREA_2_WHOLE,
        (r"transformer_blocks_(\d+)", r"blocks_\1", _KREA_2),
        (r"text_fusion_(layerwise|refiner)_blocks_(\d+)", r"txtfusion_\1_blocks_\2", _KREA_2),
    ),
    WAN: _rename({}, (r"blocks_(\d+)", r"blocks_\1", _WAN)),
}
"""For the families that diffusers names otherwise."""
