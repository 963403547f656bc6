"""The one family of errors that a person can cause, and the log they appear in."""

import logging
import re
import sys
from collections.abc import Iterable

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

    def __init__(self, sentence: str) -> None:
        super().__init__(readable(sentence))


def readable(sentence: str) -> str:
    """A sentence as a person reads it, whatever it quotes: what is too long is cut, and what no
    file or answer can hold (half of a UTF-16 pair, as JSON may have it) is a question mark."""
    sentence = sentence.encode("utf-8", "replace").decode("utf-8")
    for quoted in _QUOTED:
        sentence = quoted.sub(r"\1…\2", sentence)
    return short(sentence, _LONGEST)


_LONG = 120
"""Characters of a quote that are shown."""


def short(text: str, most: int = _LONG) -> str:
    """At most so many characters of a text."""
    return text if len(text) <= most else f"{text[:most]}…"


_LONGEST = 2000
_QUOTED = tuple(
    re.compile(rf"({begin}[^{end}]{{{_LONG}}})[^{end}]+({end})")
    for begin, end in (("“", "”"), ("<klora:", ">"))
)


def no_such_lora(name: str, known: Iterable[str] = ()) -> str:
    """The sentence for a name that is not in the host's list of LoRAs, which has ``known``."""
    cut_off = next(
        (
            x
            for x in known
            if x.strip() == name or (x.startswith(name) and x[len(name) :][:1] in (":", ">"))
        ),
        "",
    )
    if cut_off:
        return (
            f"There is no LoRA “{name}”: if you mean “{cut_off}”, no tag can hold that name, so "
            f"choose it in the K-LoRA accordion or in the API's fields content and style."
        )
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
