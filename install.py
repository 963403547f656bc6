"""Run by the WebUI at start. All that K-LoRA needs is part of a WebUI: nothing is installed."""

import importlib.util

missing = [
    name
    for name in ("torch", "safetensors", "gradio", "numpy")
    if importlib.util.find_spec(name) is None
]
if missing:
    print(
        f"[K-LoRA] This Python has no {', '.join(missing)}: K-LoRA needs the WebUI's own "
        f"environment, start it from the WebUI."
    )
