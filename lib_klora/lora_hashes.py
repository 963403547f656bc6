"""The host's own parameter ``Lora hashes: "name: hash, …"``, by which Civitai and galleries know
the files of a picture: ours beside those of the ``<lora:>`` tags.

The host keeps the hashes of these tags in ``p.lora_hashes``, begins it anew for each batch, adds to
it in the hires pass, and writes the parameter if there are any (extra_networks_lora.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEY = "Lora hashes"
_OURS = "klora_lora_hashes"
_NO_PART_OF_A_NAME = str.maketrans("", "", ":,")
"""As the host leaves them out: its paste divides the parameter at them."""


class _Merged(str):
    """A value that we have written. Generations that a script makes of one another share their
    parameters, so it may be found in one that has nothing to do with us."""


def begin(p: Any) -> None:
    """A batch of generation ``p`` begins, and with it the list of our files."""
    setattr(p, _OURS, {})


def add(p: Any, hashes: Mapping[str, str]) -> None:
    """Adds files (name → short hash) to those of generation ``p``."""
    named = {name.translate(_NO_PART_OF_A_NAME).strip(): hash for name, hash in hashes.items()}
    found = {name: hash for name, hash in named.items() if name and hash}
    setattr(p, _OURS, {**getattr(p, _OURS, {}), **found})


def write(p: Any) -> None:
    """Puts our files behind the host's. To be called whenever either has changed."""
    parameters, ours = p.extra_generation_params, getattr(p, _OURS, {})
    of_host = getattr(p, "lora_hashes", None) or {}
    entries = {**of_host, **{name: hash for name, hash in ours.items() if name not in of_host}}
    text = ", ".join(f"{name}: {hash}" for name, hash in entries.items())
    if ours:
        parameters[KEY] = _Merged(text)
    elif isinstance(parameters.get(KEY), _Merged):
        del parameters[KEY]
        if text:
            parameters[KEY] = text
