"""The WebUIs. Only the modules of this folder import a host's LoRA code."""

from ..errors import get_log
from .protocol import Fusion, Host, HostLora, OnDisk

__all__ = ["Fusion", "Host", "HostLora", "OnDisk", "find_host"]

_log = get_log()


def find_host() -> Host:
    """The WebUI that this process is, told by what its LoRA code offers, not by its name.

    Raises RuntimeError with a sentence if it is neither.
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
        try:
            from .forge import Forge

            return Forge()
        except ImportError as error:  # forks with another backend: Classic, the later Neo
            _log.info("This WebUI is like Forge, but %s.", error)
    raise RuntimeError(
        "this WebUI's LoRA code is neither that of AUTOMATIC1111 1.10 nor that of Forge"
    )
