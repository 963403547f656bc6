"""K-LoRA for the Stable Diffusion WebUI: subject LoRA + style LoRA, without training.

Reading order, the way the data flows: tag → lora_file (layer_names) → pair → scores (blocks,
score_cache) → plan (klora, the paper) → session → hosts; settings and infotext beside it; webui is
the only part that knows a page; ``python -m lib_klora`` works without any.
"""

__version__ = "0.1.0"
