"""What both hosts offer around a generation: a cache folder and a progress bar."""

from __future__ import annotations

import os
from pathlib import Path

from modules import shared
from modules.paths import data_path

from ..errors import KLoraError


def cache_folder() -> Path:
    """Ours inside the host's cache folder (modules/cache.py of both)."""
    folder = os.environ.get("SD_WEBUI_CACHE_DIR", os.path.join(data_path, "cache"))
    return Path(folder) / "klora"


def show_progress(done: int, total: int) -> None:
    """Shows how far the analysis is in the host's progress bar.

    Raises KLoraError if the person presses Interrupt or Skip meanwhile; the host then ends the
    generation by itself at its first step.
    """
    state = shared.state
    state.textinfo = f"K-LoRA: comparing layers, {done} of {total}" if done < total else None
    if state.interrupted or state.skipped:
        state.textinfo = None
        raise KLoraError(
            "The comparison of the two LoRAs was interrupted: generate again and it goes on where "
            "it stopped."
        )
