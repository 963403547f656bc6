"""One name for one layer, however a file or a host spells it.

The common name is the path of the module in the original (LDM or Black Forest Labs) network with
``_`` for ``.``: ``input_blocks_4_1_transformer_blocks_0_attn1_to_q``,
``double_blocks_0_img_attn_qkv``. A part of a fused projection has its letter behind a slash:
``double_blocks_0_img_attn_qkv/q``, ``single_blocks_3_linear1/mlp``.

Spellings that are read:

=====================  ===========================================================================
kohya                  ``lora_unet_…`` with diffusers or LDM block names; ``lora_te_…``
LyCORIS / SimpleTuner  ``lycoris_…`` with diffusers block names
OneTrainer             ``lora_transformer_…`` with diffusers block names
old diffusers          ``unet.….processor.to_q_lora.up``, with or without ``unet.``
diffusers / PEFT       ``unet.….to_q.lora_A``, ``transformer.….to_q.lora_A``
ComfyUI / BFL          ``diffusion_model.input_blocks.…``, ``diffusion_model.double_blocks.…``
=====================  ===========================================================================
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

TEXT_ENCODER_PREFIXES = ("lora_te", "text_encoder", "lora_prior_te")

_NETWORK_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "diffusion_model_",
    "transformer.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)

_RESNET = {
    "norm1": "in_layers_0",
    "conv1": "in_layers_2",
    "norm2": "out_layers_0",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
_FLUX_DOUBLE = {
    "attn_to_q": "img_attn_qkv/q",
    "attn_to_k": "img_attn_qkv/k",
    "attn_to_v": "img_attn_qkv/v",
    "attn_to_out_0": "img_attn_proj",
    "attn_to_out": "img_attn_proj",
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
}
_WHOLE = {
    "conv_in": "input_blocks_0_0",
    "conv_norm_out": "out_0",
    "conv_out": "out_2",
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0",
    "add_embedding_linear_2": "label_emb_0_2",
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed_timestep_embedder_linear_1": "time_in_in_layer",
    "time_text_embed_timestep_embedder_linear_2": "time_in_out_layer",
    "time_text_embed_text_embedder_linear_1": "vector_in_in_layer",
    "time_text_embed_text_embedder_linear_2": "vector_in_out_layer",
    "time_text_embed_guidance_embedder_linear_1": "guidance_in_in_layer",
    "time_text_embed_guidance_embedder_linear_2": "guidance_in_out_layer",
    "proj_out": "final_layer_linear",
    "norm_out_linear": "final_layer_adaLN_modulation_1",
}

# Diffusers counts blocks by resolution, the original network counts them through: three to a
# resolution (two residual blocks and a resampler going down, three residual blocks going up).
_RULES: list[tuple[re.Pattern, Callable[[re.Match], str | None]]] = [
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
    (
        re.compile(r"single_transformer_blocks_(\d+)_(.+)"),
        lambda m: f"single_blocks_{m[1]}_{_FLUX_SINGLE[m[2]]}" if m[2] in _FLUX_SINGLE else None,
    ),
    (
        re.compile(r"transformer_blocks_(\d+)_(.+)"),
        lambda m: f"double_blocks_{m[1]}_{_FLUX_DOUBLE[m[2]]}" if m[2] in _FLUX_DOUBLE else None,
    ),
]

_ATTENTION = re.compile(
    r".*_attn\d_to_(q|k|v|out_0)"
    r"|double_blocks_\d+_(img|txt)_attn_(qkv(/[qkv])?|proj)"
    r"|single_blocks_\d+_linear[12](/\w+)?"
)


def is_text_encoder(prefix: str) -> bool:
    """Whether a key prefix of a LoRA file belongs to a text encoder."""
    return prefix.startswith(TEXT_ENCODER_PREFIXES)


def common_name(prefix: str) -> str:
    """The common name of a layer of the denoising network.

    ``prefix`` is a LoRA file's key up to the part that names the tensor, or a host's module path.
    A layer that no rule knows keeps its own name, so that two files of one spelling still pair.
    Equal names are one string: files and host have thousands of them.
    """
    name = prefix
    for network in _NETWORK_PREFIXES:
        name = name.removeprefix(network)
    name = name.replace(".", "_").replace("_processor_", "_")
    name = _WHOLE.get(name, name)
    for pattern, replace in _RULES:
        match = pattern.fullmatch(name)
        if match:
            name = replace(match) or name
            break
    return sys.intern(re.sub(r"_attn(\d)_to_out$", r"_attn\1_to_out_0", name))


def is_attention(name: str) -> bool:
    """Whether the common name is an attention projection, the layers the paper fuses.

    On Flux these are the qkv and proj of both streams and, in the single blocks, linear1 and
    linear2, which hold the projections together with the MLP.
    """
    return _ATTENTION.fullmatch(name) is not None


def fused_name(name: str) -> str:
    """The name of the parameter that a layer lives in: ``…_qkv/q`` → ``…_qkv``."""
    return name.partition("/")[0]
