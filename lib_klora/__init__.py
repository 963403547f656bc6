"""K-LoRA for the Stable Diffusion WebUI: subject LoRA + style LoRA, without training.

klora is the paper, formula by formula; README.md has the reading order of the rest. webui is the
only part that knows a page; ``python -m lib_klora`` works without any.
"""

__version__ = "0.6.0"
