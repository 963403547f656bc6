"""Make the tiny random checkpoints that the live tests sample with.

    <the WebUI's python> make_models.py HOST WEBUI_FOLDER DATA_FOLDER

Key names, block layout and file layout are those of the real models, so every LoRA key name is a
real one; only widths and text encoder depths are small. The hosts take the sizes of text encoder
and VAE from configuration files, so small versions of those are written to DATA_FOLDER/tiny, and
probe/scripts/tiny_models.py points the running host there.

all           tiny_sd15, tiny_sd15_b (other weights), tiny_sdxl (70 transformers; AUTOMATIC1111: 19)
AUTOMATIC1111 tiny_sd15_c (other weights, with a .yaml of its own), tiny_sdxl_full (70 transformers)
Forge, Neo    tiny_flux.safetensors, tiny_flux_q8_0.gguf (transformer only; they need the files
              text_encoder/tiny_clip_l, text_encoder/tiny_t5 and VAE/tiny_ae)
Neo           tiny_zimage, tiny_qwen, tiny_chroma, tiny_flux2, tiny_anima, tiny_lumina, tiny_krea,
              tiny_ernie, tiny_wan, tiny_wan_b (transformer only; hosts.py says which text_encoder
              and VAE each of them needs)
"""

import argparse
import gzip
import inspect
import json
import math
import os
import re
import shutil
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from hosts import HOSTS

RECIPE = "3"  # raise it when a change here must remake the files


def main():
    """Make what is missing and note the recipe, so that the next call returns at once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("host", choices=HOSTS)
    parser.add_argument("webui", type=Path)
    parser.add_argument("data", type=Path)
    args = parser.parse_args()
    args.webui, args.data = args.webui.absolute(), args.data.absolute()
    host = HOSTS[args.host]
    stamp = args.data / "tiny" / "recipe"
    if stamp.is_file() and stamp.read_text() == RECIPE:
        return
    for folder in ("tiny", "models/Stable-diffusion", "models/text_encoder", "models/VAE"):
        (args.data / folder).mkdir(parents=True, exist_ok=True)
    os.chdir(args.webui)
    # The host's modules read the command line.
    sys.argv = ["launch.py", "--skip-torch-cuda-test", *host.arguments]
    sys.path[:0] = [str(args.webui / folder) for folder in ("", *host.packages)]
    globals()[host.maker](args.webui, args.data)
    stamp.write_text(RECIPE)


def random_weights(shapes, seed):
    """Random fp16 tensors for a {name: tensor on any device} dictionary, of a usable scale."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, like in shapes.items():
        shape = tuple(like.shape)
        if not like.is_floating_point():  # position_ids, or a counter
            out[name] = torch.arange(77).expand(1, -1).clone() if shape else torch.tensor(0)
            continue
        noise = torch.randn(shape, generator=generator)
        if name.endswith("logit_scale"):
            value = torch.tensor(4.6055)
        elif like.ndim <= 1 or name.endswith("gamma"):
            value = noise * 0.02 + (0 if name.endswith("bias") else 1)  # biases, norms
        elif "embedding" in name or name.endswith("shared.weight"):
            value = noise * 0.5
        else:
            value = noise / math.sqrt(math.prod(shape[1:]))
        out[name] = value.half().contiguous()
    return out


def prefixed(prefix, tensors):
    """The same dictionary with a prefix on every name."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def edit_json(source, target, **changes):
    """Copy a JSON file with some values changed."""
    content = json.loads(source.read_text(encoding="utf8"))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**content, **changes}, indent=1), encoding="utf8")


# the Forges -------------------------------------------------------------------------------------

CHANNELS = 64
CLIP_WIDTH = 64
CLIP = {"num_hidden_layers": 2, "num_attention_heads": 2}
CLIP_SMALL = dict(CLIP, hidden_size=CLIP_WIDTH, intermediate_size=128, projection_dim=CLIP_WIDTH)
CLIP_FLUX = dict(CLIP, intermediate_size=256)  # a CLIP-L file of its own is known by its 768
T5 = {"num_layers": 2, "d_model": 64, "d_ff": 128, "num_heads": 1}
VAE = {"block_out_channels": [32] * 4, "layers_per_block": 1}
VAE_LDM = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1] * 4,
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
SD15, SDXL = "runwayml/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
FLUX = "black-forest-labs/FLUX.1-dev"
CONFIGS = {
    SD15: {"text_encoder": CLIP_SMALL, "vae": VAE},
    SDXL: {"text_encoder": CLIP_SMALL, "text_encoder_2": CLIP_SMALL, "vae": VAE},
    FLUX: {"text_encoder": CLIP_FLUX, "text_encoder_2": T5, "vae": VAE},
}
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": CHANNELS,
    "use_spatial_transformer": True,
}
UNET_SD15 = dict(
    UNET, num_res_blocks=[2] * 4, channel_mult=[1] * 4, transformer_depth=[1] * 6 + [0] * 2,
    transformer_depth_output=[1] * 9 + [0] * 3, transformer_depth_middle=1, num_heads=8,
    context_dim=CLIP_WIDTH, use_linear_in_transformer=False, adm_in_channels=None,
)  # fmt: skip
UNET_SDXL = dict(
    UNET, num_res_blocks=[2] * 3, channel_mult=[1] * 3, transformer_depth=[0, 0, 2, 2, 10, 10],
    transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], transformer_depth_middle=10,
    num_head_channels=64, context_dim=2 * CLIP_WIDTH, use_linear_in_transformer=True,
    adm_in_channels=CLIP_WIDTH + 6 * 256, num_classes="sequential",
)  # fmt: skip
TRANSFORMER = {
    "in_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": T5["d_model"],
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "out_channels": 16,
    "patch_size": 2,
}


def make_backend(webui, data):
    """Write the small configurations, checkpoints and GGUF file of a host with Forge's backend."""
    import torch
    from backend.nn.flux import IntegratedFluxTransformer2DModel
    from backend.nn.t5 import T5 as T5Model
    from backend.nn.unet import IntegratedUNet2DConditionModel
    from backend.nn.vae import IntegratedAutoencoderKL
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    configs = data / "tiny" / "huggingface"
    for repo, components in CONFIGS.items():
        source = webui / "backend" / "huggingface" / repo
        shutil.copytree(source, configs / repo, dirs_exist_ok=True)
        for component, changes in components.items():
            name = Path(component, "config.json")
            edit_json(source / name, configs / repo / name, **changes)

    def shapes(cls, *args, **kwargs):
        with torch.device("meta"):
            return cls(*args, **kwargs).state_dict()

    def clip(repo):
        return shapes(
            CLIPTextModel, CLIPTextConfig.from_pretrained(configs / repo / "text_encoder")
        )

    def vae(repo):
        config = IntegratedAutoencoderKL.load_config(configs / repo / "vae")
        return shapes(IntegratedAutoencoderKL.from_config, config)

    def unet(config):
        return shapes(IntegratedUNet2DConditionModel, **config)

    sd15 = {
        **prefixed("model.diffusion_model.", unet(UNET_SD15)),
        **prefixed("cond_stage_model.transformer.", clip(SD15)),
        **prefixed("first_stage_model.", vae(SD15)),
    }
    sdxl = {
        **prefixed("model.diffusion_model.", unet(UNET_SDXL)),
        **prefixed("conditioner.embedders.0.transformer.", clip(SDXL)),
        **prefixed("conditioner.embedders.1.model.", openclip(**CLIP_SMALL)),
        **prefixed("first_stage_model.", vae(SDXL)),
    }
    save_stable_diffusion(data, sd15, sdxl)
    checkpoints = data / "models" / "Stable-diffusion"
    known = inspect.signature(IntegratedFluxTransformer2DModel).parameters  # Neo asks for more
    config = {name: value for name, value in TRANSFORMER.items() if name in known}
    flux = random_weights(shapes(IntegratedFluxTransformer2DModel, **config), 4)
    save_file(prefixed("model.diffusion_model.", flux), checkpoints / "tiny_flux.safetensors")
    save_gguf(flux, checkpoints / "tiny_flux_q8_0.gguf")
    encoders = data / "models" / "text_encoder"
    t5 = json.loads((configs / FLUX / "text_encoder_2" / "config.json").read_text())
    save_file(random_weights(clip(FLUX), 5), encoders / "tiny_clip_l.safetensors")
    save_file(random_weights(shapes(T5Model, t5), 6), encoders / "tiny_t5.safetensors")
    save_file(random_weights(vae(FLUX), 7), data / "models" / "VAE" / "tiny_ae.safetensors")


# the families that only Neo has, with two blocks of every kind
ZIMAGE, QWEN = "Tongyi-MAI/Z-Image-Turbo", "Qwen/Qwen-Image"
FLUX2, ANIMA = "black-forest-labs/FLUX.2-klein-4B", "circlestone-labs/Anima"
LUMINA, KREA = "neta-art/Neta-Lumina", "krea/Krea-2-Raw"
ERNIE, WAN = "baidu/ERNIE-Image", "Wan-AI/Wan2.1-T2V-14B"
UMT5 = {**T5, "d_model": 32}  # it has a large vocabulary, as Gemma has
WAN_VAE = {"base_dim": 8, "num_res_blocks": 1}
NEO_CONFIGS = {
    ZIMAGE: {"vae": VAE},
    QWEN: {"vae": WAN_VAE},
    "Chroma": {"text_encoder": T5, "vae": VAE},
    FLUX2: {"vae": VAE},
    ANIMA: {"vae": WAN_VAE},
    LUMINA: {"vae": VAE},
    KREA: {"vae": WAN_VAE},
    ERNIE: {"vae": VAE},
    WAN: {"text_encoder": UMT5, "vae": WAN_VAE},
}
LLM_WIDTH = 64
LLM = {
    "hidden_size": LLM_WIDTH,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
GEMMA = {**LLM, "hidden_size": 32}
DEEP = 27  # layers: Flux.2 takes the results of the 9th, 18th and 27th
DEEPER = 36  # Krea 2 takes every third
NEXT_DIT = {
    "in_channels": 16, "dim": 256, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "qk_norm": True,
    "cap_feat_dim": LLM_WIDTH, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True,
    "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip
LUMINA_DIT = {
    "in_channels": 16, "dim": 288, "n_layers": 2, "n_heads": 3, "n_kv_heads": 1, "qk_norm": True,
    "cap_feat_dim": GEMMA["hidden_size"], "axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512],
}  # fmt: skip
QWEN_IMAGE = {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": LLM_WIDTH}
CHROMA = {
    "in_channels": 64, "out_channels": 64, "context_in_dim": T5["d_model"], "hidden_size": 256,
    "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "in_dim": 64,
    "out_dim": 256, "hidden_dim": 64, "n_layers": 2, "txt_ids_dims": [], "vec_in_dim": None,
}  # fmt: skip
KLEIN = {
    "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": 3 * LLM_WIDTH,
    "hidden_size": 256, "mlp_ratio": 3.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
    "axes_dim": [32, 32, 32, 32], "theta": 2000, "patch_size": 1, "qkv_bias": False,
    "guidance_embed": False, "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
}  # fmt: skip
COSMOS = {
    "in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1,
    "model_channels": 256, "crossattn_emb_channels": LLM_WIDTH, "adaln_lora_dim": 32,
    "num_blocks": 2, "num_heads": 2,
}  # fmt: skip
ADAPTER = {
    "source_dim": LLM_WIDTH, "target_dim": LLM_WIDTH, "model_dim": LLM_WIDTH, "num_layers": 2,
    "num_heads": 2,
}  # fmt: skip
KREA_DIT = {
    "features": 256, "heads": 2, "kvheads": 1, "layers": 2, "txtdim": LLM_WIDTH, "txtheads": 2,
    "txtkvheads": 2,
}  # fmt: skip
ERNIE_DIT = {
    "hidden_size": 256, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 512,
    "text_in_dim": LLM_WIDTH,
}  # fmt: skip
WAN_DIT = {
    "dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2, "text_dim": UMT5["d_model"],
}  # fmt: skip


def make_neo(webui, data):
    """As make_backend, and one checkpoint of every family that only Neo has."""
    make_backend(webui, data)
    import torch
    from backend.nn import anima, chroma, ernie, flux, krea, lumina, qwen, t5, vae, wan, wan_vae
    from backend.nn.llm import llama
    from backend.operations import using_forge_operations
    from safetensors.torch import save_file

    configs = data / "tiny" / "huggingface"
    for repo, components in NEO_CONFIGS.items():
        for component, changes in components.items():
            name = Path(repo, component, "config.json")
            edit_json(webui / "backend" / "huggingface" / name, configs / name, **changes)
    # the same one, and not every copy of Neo has Chroma's
    shutil.copytree(
        configs / FLUX / "tokenizer_2", configs / "Chroma" / "tokenizer", dirs_exist_ok=True
    )

    def shapes(cls, *args, **kwargs):
        meta = torch.device("meta")
        with using_forge_operations(device=meta, dtype=torch.float32), meta:
            return cls(*args, **kwargs).state_dict()

    def autoencoder(cls, repo):
        return shapes(cls.from_config, cls.load_config(configs / repo / "vae"))

    def llm(config, layers, sizes=LLM, prefix="model."):
        config = replace(config, **sizes, num_hidden_layers=layers)
        return prefixed(prefix, shapes(llama.Llama2_, config))

    transformers = {
        "zimage": shapes(lumina.NextDiT, **NEXT_DIT),
        "qwen": shapes(qwen.QwenImageTransformer2DModel, **QWEN_IMAGE),
        "chroma": {
            # real files call it so, and it is what the host knows them by
            re.sub(r"(_norm|norms\.\d+)\.weight$", r"\1.scale", name): like
            for name, like in shapes(chroma.IntegratedChromaTransformer2DModel, **CHROMA).items()
        },
        "flux2": shapes(flux.IntegratedFluxTransformer2DModel, **KLEIN),
        "anima": {
            **shapes(anima.Anima, **COSMOS),
            **prefixed("llm_adapter.", shapes(anima.LLMAdapter, **ADAPTER)),
        },
        "lumina": shapes(lumina.NextDiT, **LUMINA_DIT),
        "krea": shapes(krea.SingleStreamDiT, **KREA_DIT),
        "ernie": shapes(ernie.ErnieImageModel, **ERNIE_DIT),
        "wan": shapes(wan.WanModel, **WAN_DIT),
        "wan_b": shapes(wan.WanModel, **WAN_DIT),  # for less noise
    }
    models = data / "models"
    for seed, (name, like) in enumerate(transformers.items(), 8):
        tensors = prefixed("model.diffusion_model.", random_weights(like, seed))
        save_file(tensors, models / "Stable-diffusion" / f"tiny_{name}.safetensors")
    umt5 = json.loads((configs / WAN / "text_encoder" / "config.json").read_text())
    qwen3vl = llm(llama.Qwen3VL_4BConfig(), DEEPER, prefix="model.language_model.")
    for name in ("deepstack_merger_list.0.norm", "merger.linear_fc2"):  # it is known by these
        qwen3vl[f"model.visual.{name}.weight"] = torch.empty(LLM_WIDTH, device="meta")
    modules = {
        "text_encoder/tiny_gemma": llm(llama.Gemma2_2B_Config(), 2, GEMMA),
        "text_encoder/tiny_ministral": llm(llama.Ministral3_3BConfig(), 2),
        "text_encoder/tiny_umt5": shapes(t5.T5, umt5),
        "text_encoder/tiny_qwen3vl": qwen3vl,
        "text_encoder/tiny_qwen3": llm(llama.Qwen3_4BConfig(), DEEP),
        "text_encoder/tiny_qwen25": llm(llama.Qwen25_7BVLI_Config(), 2),
        "VAE/tiny_flux2_vae": autoencoder(vae.AutoencoderKLFlux2, FLUX2),
        "VAE/tiny_wan_vae": autoencoder(wan_vae.WanVAE, QWEN),
    }
    for seed, (name, like) in enumerate(modules.items(), 20):
        save_file(random_weights(like, seed), models / f"{name}.safetensors")


def make_reforge(webui, data):
    """Write reForge's small configurations and checkpoints."""
    from ldm_patched.modules import args_parser

    args_parser.args = args_parser.parser.parse_known_args()[0]
    import torch
    from ldm_patched.ldm.models.autoencoder import AutoencoderKL
    from ldm_patched.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tiny = data / "tiny"
    # SDXL takes the 11th layer's result from the one, and the last but one's from the other.
    first, second = (dict(CLIP_SMALL, num_hidden_layers=layers) for layers in (12, 3))
    for name, encoder in (("sd1_clip_config.json", first), ("clip_config_bigg.json", second)):
        edit_json(webui / "ldm_patched" / "modules" / name, tiny / name, **encoder)
    vae = {"embed_dim": 4, "ddconfig": VAE_LDM}
    (tiny / "vae.json").write_text(json.dumps({"params": vae}))

    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig.from_json_file(tiny / "sd1_clip_config.json"))
        unets = [  # which empty the lists that they are given
            UNetModel(image_size=32, legacy=False, device="meta", **deepcopy(config))
            for config in (UNET_SD15, UNET_SDXL)
        ]
        vae = AutoencoderKL(**vae).state_dict()
    clip = clip.state_dict()
    if "text_model.final_layer_norm.weight" not in clip:  # newer transformers leave the prefix out
        clip = prefixed("text_model.", clip)
    sd15, sdxl = (prefixed("model.diffusion_model.", unet.state_dict()) for unet in unets)
    sd15.update(prefixed("cond_stage_model.transformer.", clip))
    sdxl.update(prefixed("conditioner.embedders.0.transformer.", clip))
    sdxl.update(prefixed("conditioner.embedders.1.model.", openclip(**second)))
    for tensors in (sd15, sdxl):
        tensors.update(prefixed("first_stage_model.", vae))
    save_stable_diffusion(data, sd15, sdxl)


def save_stable_diffusion(data, sd15, sdxl):
    """Write two checkpoints of the one kind and one of the other, from names and shapes."""
    from safetensors.torch import save_file

    for name, tensors, seed in (("sd15", sd15, 1), ("sd15_b", sd15, 2), ("sdxl", sdxl, 3)):
        path = data / "models" / "Stable-diffusion" / f"tiny_{name}.safetensors"
        save_file(random_weights(tensors, seed), path)


def openclip(hidden_size, intermediate_size, num_hidden_layers, vocabulary=49408, **_):
    """Names and shapes of an OpenCLIP text encoder, as real SDXL files hold CLIP-G."""
    import torch

    width, wide = hidden_size, intermediate_size
    shapes = {
        "positional_embedding": (77, width),
        "token_embedding.weight": (vocabulary, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, width),
        "logit_scale": (),
    }
    block = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (wide, width),
        "mlp.c_fc.bias": (wide,),
        "mlp.c_proj.weight": (width, wide),
        "mlp.c_proj.bias": (width,),
    }
    for layer in range(num_hidden_layers):
        shapes.update(prefixed(f"transformer.resblocks.{layer}.", block))
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def save_gguf(tensors, path):
    """Write a transformer as GGUF as city96 does: the blocks' matrices as Q8_0, the rest float."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), "flux")
    for name, tensor in tensors.items():
        array = tensor.float().numpy()
        if array.ndim == 2 and "blocks." in name and array.shape[1] % 32 == 0:
            blocks = array.reshape(-1, 32)  # Q8_0: one fp16 scale and 32 int8 per block
            scale = np.abs(blocks).max(1, keepdims=True) / 127
            scaled = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
            packed = [scale.astype(np.float16), np.round(scaled).astype(np.int8)]
            packed = np.concatenate([part.view(np.uint8) for part in packed], 1)
            packed = packed.reshape(array.shape[0], -1)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, array.astype(np.float32 if array.ndim < 2 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# AUTOMATIC1111 ----------------------------------------------------------------------------------

WIDTH = 32  # of the text encoders and of the UNet's first level
TIME_WIDTH = 32  # of each of SDXL's six size embeddings
ARCHITECTURE = "tiny-bigG"  # OpenCLIP knows its models by name


def make_a1111(webui, data):
    """Write AUTOMATIC1111's small configurations, tokenizer and checkpoints."""
    import open_clip
    import safetensors.torch
    import torch
    from modules import initialize_util

    initialize_util.fix_pytorch_lightning()  # ldm imports a module that newer versions moved
    from modules import paths  # noqa: F401  (puts ldm and sgm on the path)

    # isort: split
    from ldm.util import instantiate_from_config
    from transformers import CLIPTextConfig, CLIPTextModel

    tiny = data / "tiny"
    save_clip(tiny / "clip", Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz"))
    text = {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 4, "layers": 12}
    vision = {"image_size": 32, "layers": 1, "width": WIDTH, "head_width": 8, "patch_size": 16}
    architecture = tiny / f"{ARCHITECTURE}.json"
    architecture.write_text(
        json.dumps({"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text})
    )
    open_clip.add_model_config(architecture)

    # the modules load pretrained text encoders by themselves: give them new ones
    create = open_clip.create_model_and_transforms

    def create_new(*args, pretrained=None, **kwargs):
        return create(*args, **kwargs)

    def clip_new(name, **kwargs):
        return CLIPTextModel(CLIPTextConfig.from_pretrained(name))

    open_clip.create_model_and_transforms = create_new
    CLIPTextModel.from_pretrained = clip_new

    checkpoints = data / "models" / "Stable-diffusion"
    configs = {
        tiny / "sd15.yaml": sd15_config(str(tiny / "clip")),
        tiny / "sdxl.yaml": sdxl_config(str(tiny / "clip"), [1, 1, 2]),
        checkpoints / "tiny_sd15_c.yaml": sd15_config(str(tiny / "clip")),
        checkpoints / "tiny_sdxl_full.yaml": sdxl_config(str(tiny / "clip"), [1, 2, 10]),
    }
    for path, config in configs.items():
        path.write_text(json.dumps(config, indent=1))  # JSON is YAML
    for seed, name in enumerate(("sd15", "sd15_b", "sd15_c", "sdxl", "sdxl_full"), 1):
        near = checkpoints / f"tiny_{name}.yaml"
        config = configs.get(near) or configs[tiny / f"{name.removesuffix('_b')}.yaml"]
        with torch.no_grad():
            state = instantiate_from_config(config["model"]).state_dict()
        networks = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.",
                    "conditioner.")  # fmt: skip
        tensors = random_weights({k: v for k, v in state.items() if k.startswith(networks)}, seed)
        schedule = {k: v for k, v in state.items() if not k.startswith((*networks, "model_ema"))}
        if "sd15" in name:  # real SD1.5 files hold the noise schedule too
            tensors.update((k, v.float().contiguous()) for k, v in schedule.items())
        safetensors.torch.save_file(tensors, checkpoints / f"tiny_{name}.safetensors")


def save_clip(folder, merges_file):
    """Write the real CLIP vocabulary (from OpenCLIP's merges) and a small text model's config."""
    from open_clip.tokenizer import bytes_to_unicode

    folder.mkdir(exist_ok=True)
    with gzip.open(merges_file, "rt", encoding="utf8") as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["".join(merge.split()) for merge in merges]
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = {word: number for number, word in enumerate([*words, start, end])}
    special = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    model = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
        "max_position_embeddings": 77,
        "vocab_size": len(vocabulary),
        "hidden_act": "quick_gelu",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    tokenizer = dict(special, tokenizer_class="CLIPTokenizer", model_max_length=77)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf8")
    for name, content in {
        "vocab.json": vocabulary,
        "special_tokens_map.json": special,
        "tokenizer_config.json": tokenizer,
        "config.json": model,
    }.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf8")


def module(target, **params):
    """One entry of an ldm or sgm configuration."""
    return {"target": target, "params": params}


def vae_config(target):
    """A VAE with the real one's levels."""
    loss = module("torch.nn.Identity")
    return module(target, embed_dim=4, monitor="val/rec_loss", lossconfig=loss, ddconfig=VAE_LDM)


def unet_config(**params):
    """A UNet of either family."""
    return module(
        "ldm.modules.diffusionmodules.openaimodel.UNetModel" if "num_heads" in params
        else "sgm.modules.diffusionmodules.openaimodel.UNetModel",
        in_channels=4, out_channels=4, model_channels=WIDTH, num_res_blocks=2, legacy=False,
        use_spatial_transformer=True, use_checkpoint=False, **params,
    )  # fmt: skip


def sd15_config(clip):
    """SD1.5: 12 input, one middle and 12 output blocks, 16 transformers."""
    unet = unet_config(
        image_size=32, attention_resolutions=[4, 2, 1], channel_mult=[1, 2, 2, 2], num_heads=4,
        transformer_depth=1, context_dim=WIDTH,
    )  # fmt: skip
    encoder = module("ldm.modules.encoders.modules.FrozenCLIPEmbedder", version=clip, device="cpu")
    return {
        "model": module(
            "ldm.models.diffusion.ddpm.LatentDiffusion",
            linear_start=0.00085,
            linear_end=0.0120,
            num_timesteps_cond=1,
            log_every_t=200,
            timesteps=1000,
            first_stage_key="jpg",
            cond_stage_key="txt",
            image_size=8,
            channels=4,
            cond_stage_trainable=False,
            conditioning_key="crossattn",
            monitor="val/loss_simple_ema",
            scale_factor=0.18215,
            use_ema=False,
            unet_config=unet,
            cond_stage_config=encoder,
            first_stage_config=vae_config("ldm.models.autoencoder.AutoencoderKL"),
        )
    }


def sdxl_config(clip, depth):
    """SDXL: 9 input, one middle and 9 output blocks, of the given transformer depths."""
    encoders, diffusion = "sgm.modules.encoders.modules.", "sgm.modules.diffusionmodules."
    unet = unet_config(
        adm_in_channels=WIDTH + 6 * TIME_WIDTH, num_classes="sequential",
        attention_resolutions=[4, 2], channel_mult=[1, 2, 2], num_head_channels=8,
        use_linear_in_transformer=True, transformer_depth=depth, context_dim=2 * WIDTH,
        spatial_transformer_attn_type="softmax-xformers",
    )  # fmt: skip
    text = [
        module(encoders + "FrozenCLIPEmbedder", version=clip, device="cpu", layer="hidden",
               layer_idx=11),
        module(encoders + "FrozenOpenCLIPEmbedder2", arch=ARCHITECTURE, version="none",
               device="cpu", freeze=True, layer="penultimate", always_return_pooled=True,
               legacy=False),
    ]  # fmt: skip
    sizes = [module(encoders + "ConcatTimestepEmbedderND", outdim=TIME_WIDTH) for _ in range(3)]
    keys = ["txt", "txt", "original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple"]
    embedders = [
        dict(is_trainable=False, input_key=key, **embedder)
        for key, embedder in zip(keys, text + sizes, strict=True)
    ]
    denoiser = module(
        diffusion + "denoiser.DiscreteDenoiser", num_idx=1000,
        weighting_config=module(diffusion + "denoiser_weighting.EpsWeighting"),
        scaling_config=module(diffusion + "denoiser_scaling.EpsScaling"),
        discretization_config=module(diffusion + "discretizer.LegacyDDPMDiscretization"),
    )  # fmt: skip
    return {
        "model": module(
            "sgm.models.diffusion.DiffusionEngine",
            scale_factor=0.13025,
            disable_first_stage_autocast=True,
            denoiser_config=denoiser,
            network_config=unet,
            conditioner_config=module("sgm.modules.GeneralConditioner", emb_models=embedders),
            first_stage_config=vae_config("sgm.models.autoencoder.AutoencoderKLInferenceWrapper"),
        )
    }


if __name__ == "__main__":
    main()
