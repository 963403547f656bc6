"""K-LoRA for the Stable Diffusion WebUI: subject LoRA + style LoRA, without training.

Reading order, the way the data flows: tag → lora_file (layer_names) → pair → scores → plan (klora,
the paper) → session → hosts; settings and infotext beside it; webui is the only part that knows a
page.
"""

__version__ = "0.1.0"
