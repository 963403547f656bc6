"""Let the host load the reduced models of make_models.py.

Hosts know models by their real sizes and take the sizes of text encoder and VAE from their own
configuration files. This points them at the files in DATA_FOLDER/tiny instead, while they run.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from klora_live_host import record
from modules import paths

TINY = Path(paths.data_path) / "tiny"


def patch_backend():
    """Forge, Neo: read sizes from the checkpoint's tensors, and text encoder and VAE sizes from
    TINY."""
    import huggingface_guess
    from backend import loader
    from huggingface_guess import detection, model_list

    guess = huggingface_guess.model_config_from_unet
    load_component = loader.load_huggingface_component

    def model_config_from_unet(state_dict, prefix, *args, **kwargs):
        config = detection.detect_unet_config(state_dict, prefix)
        if config.get("image_model") == "flux":
            # a GGUF tensor's shape holds NumPy numbers
            config["hidden_size"] = int(state_dict[f"{prefix}img_in.weight"].shape[0])
            config["context_in_dim"] = int(state_dict[f"{prefix}txt_in.weight"].shape[1])
            config["num_heads"] = config["hidden_size"] // sum(config["axes_dim"])
            for depth, kind in (("depth", "double"), ("depth_single_blocks", "single")):
                blocks = f"{prefix}{kind}_blocks." + "{}."
                config[depth] = detection.count_blocks(list(state_dict), blocks)
            return model_list.Flux(config)
        if config.get("model_channels", 320) < 320:
            return (model_list.SDXL if config["adm_in_channels"] else model_list.SD15)(config)
        return guess(state_dict, prefix, *args, **kwargs)

    def load_huggingface_component(guess, name, library, cls, repo_path, *state_dict):
        tiny = TINY / "huggingface" / guess.huggingface_repo
        repo_path = str(tiny) if (tiny / name).is_dir() else repo_path
        return load_component(guess, name, library, cls, repo_path, *state_dict)

    huggingface_guess.model_config_from_unet = model_config_from_unet
    loader.load_huggingface_component = load_huggingface_component


def patch_neo():
    """As patch_backend. Neo knows its newer families and their text encoders by the real ones'
    widths: let it see those while it looks, and build what is in the files."""
    patch_backend()
    import huggingface_guess
    import torch
    from backend import loader
    from backend.nn.llm import llama

    guess = huggingface_guess.model_config_from_unet
    replace = loader.replace_state_dict
    load_component = loader.load_huggingface_component

    def disguised(tensors, rows):
        shown = {name: (count, *tensors[name].shape[1:]) for name, count in rows.items()}
        shown = {name: torch.empty(shape, device="meta") for name, shape in shown.items()}
        return {**tensors, **shown}

    def model_config_from_unet(state_dict, prefix, *args, **kwargs):
        own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        rows = {prefix + name: count for name, count in family_rows(own).items()}
        config = guess(disguised(state_dict, rows), prefix, *args, **kwargs)
        if config is not None:
            config.unet_config.update(family_sizes(type(config).__name__, own, config.unet_config))
        return config

    def replace_state_dict(sd, asd, guess, path):
        rows = encoder_rows(asd, Path(loader.HF, guess.huggingface_repo, "text_encoder"))
        sd = replace(sd, disguised(asd, rows), guess, path)
        for key in [key for key in sd if key.endswith(tuple(rows))]:
            sd[key] = next(asd[name] for name in rows if key.endswith(name))
        return sd

    def load_huggingface_component(guess, name, library, cls, repo_path, *state_dict):
        tensors = state_dict[-1] or {}
        build, build_adapter = llama.Llama2_, llama.LLMAdapter

        def build_small(config):
            sizes = encoder_sizes(tensors, config.head_dim)
            return build(dataclasses.replace(config, **sizes))

        def no_eyes(*args, **kwargs):  # they would have more parameters than all the rest
            return torch.nn.Module()

        with mock.patch.multiple(
            llama,
            Llama2_=build_small,
            LLMAdapter=lambda: build_adapter(**adapter_sizes(tensors)),
            qwen_vl=SimpleNamespace(Qwen2VLVisionTransformer=no_eyes),
            Qwen3VLVisionModel=no_eyes,
        ):
            return load_component(guess, name, library, cls, repo_path, *state_dict)

    huggingface_guess.model_config_from_unet = model_config_from_unet
    loader.replace_state_dict = replace_state_dict
    loader.load_huggingface_component = load_huggingface_component


def family_rows(own):
    """{weight that Neo knows a family by: the rows that it must have}; own: the transformer's."""
    if "cap_embedder.1.weight" in own:
        return {"cap_embedder.1.weight": 3840 if "cap_pad_token" in own else 2304}
    if "double_stream_modulation_img.lin.weight" in own:  # Flux.2
        return {"img_in.weight": 3072, "txt_in.weight": 3072}
    if "x_embedder.proj.1.weight" in own:  # Anima
        return {"x_embedder.proj.1.weight": 2048}
    return {}


def family_sizes(family, own, config):
    """Those of a transformer's sizes that Neo takes from the family and not from the file."""

    def size(name, axis=0):
        return int(own[f"{name}.weight"].shape[axis])

    sizes = {}
    if family in ("ZImage", "Lumina2"):
        dim, head = size("x_embedder"), sum(config["axes_dims"])
        both = size("layers.0.attention.qkv") - dim
        sizes = {"dim": dim, "n_heads": dim // head, "n_kv_heads": both // 2 // head}
    elif family == "QwenImage":
        heads = size("img_in") // 128
        sizes = {"num_attention_heads": heads, "joint_attention_dim": size("txt_norm")}
    elif family == "Chroma":
        guidance = "distilled_guidance_layer."
        sizes = {
            "out_dim": size(guidance + "out_proj"),
            "hidden_dim": size(guidance + "in_proj"),
            "n_layers": count(own, guidance + "layers."),
        }
    elif family == "Flux2K4B":
        sizes = {"hidden_size": size("img_in"), "num_heads": size("img_in") // 128}
    elif family == "Anima":
        sizes = {
            "model_channels": size("x_embedder.proj.1"),
            "num_heads": size("x_embedder.proj.1") // 128,
            "num_blocks": count(own, "blocks."),
            "crossattn_emb_channels": size("blocks.0.cross_attn.k_proj", 1),
            "adaln_lora_dim": size("blocks.0.adaln_modulation_mlp.1"),
        }
    elif family == "Krea2":
        attention = "txtfusion.layerwise_blocks.0.attn"
        heads = size(f"{attention}.wq") // len(own[f"{attention}.qknorm.qnorm.scale"])
        sizes = {"txtheads": heads, "txtkvheads": heads}
    elif family == "ErnieImage":
        sizes = {
            "hidden_size": size("final_linear", 1),
            "num_attention_heads": size("final_linear", 1) // 128,
            "num_layers": count(own, "layers."),
            "ffn_hidden_size": size("layers.0.mlp.gate_proj"),
            "text_in_dim": size("text_proj", 1),
        }
    elif family == "WAN21_T2V":
        sizes = {"text_dim": size("text_embedding.0", 1)}
    return sizes


def count(names, prefix):
    """How many blocks have names that begin so."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def encoder_rows(tensors, folder):
    """{weight that Neo knows a text encoder's kind by: the rows that it must have}; folder: of the
    family's configuration."""
    known = (
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.0.self_attn.k_proj.bias",
        "model.visual.merger.linear_fc2.weight",
    )
    known = [name for name in known if name in tensors]
    if not known:
        return {}
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    config = config.get("text_config", config)
    heads = config.get("num_key_value_heads")
    return {name: 128 * heads if "bias" in name else config["hidden_size"] for name in known}


def encoder_sizes(tensors, head):
    """The sizes of the language model in a file whose heads have this width."""
    prefix = "model.language_model." if "model.language_model.norm.weight" in tensors else "model."

    def size(name, axis=0):
        return int(tensors[f"{prefix}{name}.weight"].shape[axis])

    return {
        "hidden_size": size("embed_tokens", 1),
        "intermediate_size": size("layers.0.mlp.gate_proj"),
        "num_hidden_layers": count(tensors, f"{prefix}layers."),
        "num_attention_heads": size("layers.0.self_attn.q_proj") // head,
        "num_key_value_heads": size("layers.0.self_attn.k_proj") // head,
    }


def adapter_sizes(tensors):
    """The sizes of the adapter behind Anima's language model."""

    def size(name, axis=0):
        return int(tensors[f"llm_adapter.{name}.weight"].shape[axis])

    return {
        "source_dim": size("blocks.0.cross_attn.k_proj", 1),
        "target_dim": size("embed", 1),
        "model_dim": size("out_proj", 1),
        "num_layers": count(tensors, "llm_adapter.blocks."),
        "num_heads": size("out_proj", 1) // size("blocks.0.self_attn.q_norm"),
    }


def patch_a1111():
    """Make TINY's configurations those of checkpoints without a .yaml beside them."""
    import open_clip
    from modules import sd_models_config

    open_clip.add_model_config(TINY)
    sd_models_config.config_default = str(TINY / "sd15.yaml")
    sd_models_config.config_sdxl = str(TINY / "sdxl.yaml")


def patch_reforge():
    """Read the UNet's sizes from its tensors, and text encoder and VAE sizes from TINY."""
    from ldm_patched.modules import model_detection, sd1_clip, supported_models
    from modules_forge import forge_loader

    known = model_detection.model_config_from_unet_config
    make_encoder, make_vae = sd1_clip.SDClipModel.__init__, forge_loader.VAE

    def model_config_from_unet_config(unet_config, state_dict=None):
        if unet_config.get("model_channels", 320) < 320:
            sdxl = unet_config["adm_in_channels"] is not None
            return (supported_models.SDXL if sdxl else supported_models.SD15)(unet_config)
        return known(unet_config, state_dict)

    @functools.wraps(make_encoder)
    def encoder(self, *args, textmodel_json_config=None, **kwargs):
        file = textmodel_json_config or Path(sd1_clip.__file__).with_name("sd1_clip_config.json")
        kwargs["textmodel_json_config"] = str(TINY / Path(file).name)
        model_options = {"model_name": "clip_l", **kwargs.pop("model_options", {})}
        make_encoder(self, *args, model_options=model_options, **kwargs)

    def vae(sd, metadata=None):
        return make_vae(sd, config=json.loads((TINY / "vae.json").read_text()), metadata=metadata)

    model_detection.model_config_from_unet_config = model_config_from_unet_config
    sd1_clip.SDClipModel.__init__ = encoder
    forge_loader.VAE = vae


# Reload UI runs this file again; the patches stay.
if TINY.is_dir() and not hasattr(sys, "klora_tiny_models"):
    sys.klora_tiny_models = True
    globals()[record.tiny]()
