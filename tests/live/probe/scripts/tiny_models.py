"""Let the host load the reduced models of make_models.py.

Hosts know models by their real sizes and take the sizes of text encoder and VAE from their own
configuration files. This points them at the files in DATA_FOLDER/tiny instead, while they run.
"""

import functools
import json
import sys
from pathlib import Path

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
        repo_path = str(tiny) if tiny.is_dir() else repo_path
        return load_component(guess, name, library, cls, repo_path, *state_dict)

    huggingface_guess.model_config_from_unet = model_config_from_unet
    loader.load_huggingface_component = load_huggingface_component


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
