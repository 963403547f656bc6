"""Let the host load the reduced models of make_models.py.

Hosts know models by their real sizes and take the sizes of text encoder and VAE from their own
configuration files. This points them at the files in DATA_FOLDER/tiny instead, while they run.
"""

import sys
from pathlib import Path

from modules import paths

TINY = Path(paths.data_path) / "tiny"


def patch_forge():
    """Read sizes from the checkpoint's tensors, and text encoder and VAE sizes from TINY."""
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


# Reload UI runs this file again; the patches stay.
if TINY.is_dir() and not hasattr(sys, "klora_tiny_models"):
    sys.klora_tiny_models = True
    patch_forge() if "huggingface_guess" in sys.modules else patch_a1111()
