"""The one family of errors that a person can cause, and the log they appear in."""

import logging
import re
import sys

import torch

_FULL_MEMORY = re.compile(
    r"(out of|not enough|allocate)\b.*\bmemory"
    r"|ALLOC_FAILED"  # cuBLAS and cuDNN
    r"|OUT_OF_(DEVICE|HOST)_MEMORY|OUT_OF_RESOURCES"  # Level Zero, Intel's GPUs
)


class KLoraError(Exception):
    """What was written, what is wrong with it, and what to do: one sentence for the person.

    Raised anywhere in ``lib_klora``. For a generation the session catches it: it shows the sentence
    in the page, the picture's parameters and the log, and lets the picture be made. The preview,
    ``/klora/plan``, the X/Y/Z plot and the command line answer with it.
    """


def no_such_lora(name: str) -> str:
    """The sentence for a name that the host's list of LoRAs does not have."""
    return (
        f"There is no LoRA “{name}”: check the spelling against the Lora tab, and press Refresh "
        f"there if the file is new."
    )


def is_full_memory(error: BaseException) -> bool:
    """Whether memory was full, the computer's or a device's; only CUDA has a class of its own."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and _FULL_MEMORY.search(str(error)) is not None
    )


def get_log() -> logging.Logger:
    """The logger of the extension; every line starts with ``[K-LoRA]``.

    It has a handler of its own because no host sets up the root logger for INFO.
    """
    log = logging.getLogger("lib_klora")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("[K-LoRA] %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    return log
