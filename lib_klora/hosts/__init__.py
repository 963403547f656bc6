"""The WebUIs. Only the modules of this folder import a host's LoRA code.

Each is told by what its LoRA code offers, not by its name or version. There are three ways in which
they put a LoRA into a weight, each in a file of its own:

==============================  =====================================  ==========================
``a1111``                       lazily, in each layer's forward        AUTOMATIC1111
``engine``, ``lora_loader``     a loader merges a list of identifiers  Forge, Forge Neo until 2026
``engine``, ``model_patcher``   ComfyUI's ``ModelPatcher``             Forge Neo, reForge
==============================  =====================================  ==========================
"""

from importlib import import_module
from importlib.util import find_spec

from .protocol import Fusion, Host, HostLora, OnDisk

__all__ = ["Fusion", "Host", "HostLora", "OnDisk", "find_host"]

_BACKENDS = (
    ("backend.patcher.base", "backend.memory_management"),  # Forge, Forge Neo
    ("ldm_patched.modules.model_patcher", "ldm_patched.modules.model_management"),  # reForge
)
"""What a WebUI calls its modules: of ``ModelPatcher``, and of ``current_loaded_models``."""
_USE = "use AUTOMATIC1111 1.10, Forge, Forge Neo or reForge"


def find_host() -> Host:
    """The WebUI that this process is.

    Raises RuntimeError with a sentence if it is none that K-LoRA knows.
    """
    try:
        import networks  # the host's built-in Lora extension, loaded before other extensions
    except ImportError as error:
        raise RuntimeError(
            "the built-in Lora extension is not loaded: switch it on in the Extensions tab"
        ) from error
    # reForge has A1111's functions as empty shells, but no kinds of LoRA that they would apply.
    if hasattr(networks, "module_types"):
        from .a1111 import A1111

        return A1111()
    if hasattr(networks, "load_lora_for_models"):
        for patcher, memory in _BACKENDS:
            if _exists(patcher) and _exists(memory):
                return _engine(import_module(patcher).ModelPatcher, import_module(memory))
    raise RuntimeError(f"this WebUI's LoRA code is not one that K-LoRA knows: {_USE}")


def _engine(patcher: type, memory: object) -> Host:
    """A WebUI with Forge's engine and this class of patchers."""
    if hasattr(patcher, "refresh_loras"):
        from .lora_loader import LoraLoaderEngine

        return LoraLoaderEngine(memory)
    from .model_patcher import ModelPatcherEngine, missing_in

    missing = missing_in(patcher)
    if missing:
        raise RuntimeError(
            f"this WebUI's LoRA code is not one that K-LoRA knows (its ModelPatcher has no "
            f"{', '.join(missing)}): {_USE}"
        )
    return ModelPatcherEngine(memory)


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # not even its package, or one without a spec
        return False
