"""What all hosts do alike: the list of LoRAs (networks.py), the cache folder, the progress bar."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import networks
from modules import shared
from modules.paths import data_path

from ..errors import KLoraError
from ..pair import LayerPair
from ..tensor_file import read_or_raise
from .protocol import OnDisk

_EXTENSIONS = (".pt", ".ckpt", ".safetensors")
"""Of the files that the hosts list."""
_PATIENCE = 10.0
"""Seconds spent on reading files whose hash nobody has asked for yet."""


class CommonHost:
    """The part of the Host protocol that does not depend on the host."""

    def __init__(self) -> None:
        self._versions: dict[str, tuple] = {}
        """Path → version of the file that the host's hash of it belongs to."""
        self._names_on_disk: set[str] = set()
        """What the LoRA folders had when they were last looked at."""

    def find(self, name: str) -> OnDisk | None:
        """File stem or alias, as in the host's ``load_networks``; an alias that several files
        share counts only as a file stem. Looks at the folder again if the name is unknown.

        Raises KLoraError for such an alias.
        """

        def look_up():
            if name.lower() in networks.forbidden_network_aliases:
                return networks.available_networks.get(name)
            return networks.available_network_aliases.get(name)

        entry = look_up()
        if entry is None or not os.path.exists(entry.filename):
            networks.list_available_networks()
            entry = look_up()
        if entry is None or not os.path.exists(entry.filename):
            same = [x for x, e in networks.available_networks.items() if _alias(e) == name.lower()]
            if len(same) > 1:
                raise KLoraError(
                    f"{len(same)} LoRAs have the alias “{name}”: write the name of one of them, "
                    f"{' or '.join(f'“{x}”' for x in sorted(same))}."
                )
            return None
        status = os.stat(entry.filename)
        version = (entry.filename, status.st_mtime_ns, status.st_size)
        if self._versions.setdefault(entry.filename, version) != version:
            self._versions[entry.filename] = version
            networks.list_available_networks()  # the host keeps the hash of the file that was there
            entry = look_up() or entry
        read_or_raise(entry.filename, entry.read_hash)
        return OnDisk(name, entry.filename, entry.shorthash or "", version, entry)

    def find_by_hash(self, short_hash: str) -> str | None:
        """The hosts know a file's hash once it was used, or if its header has it; the others are
        read now, for as long as a person will wait."""
        if not short_hash:
            return None
        known = networks.available_network_hash_lookup.get(short_hash)
        if known is not None:
            return known.name
        deadline = time.monotonic() + _PATIENCE
        for entry in list(networks.available_networks.values()):
            if time.monotonic() > deadline:
                break
            with suppress(OSError):  # one that may not be read is not the one that was used
                entry.read_hash()
            if entry.shorthash == short_hash:
                return entry.name
        return None

    def lora_names(self) -> list[str]:
        return sorted(networks.available_networks)

    def refresh_loras(self) -> None:
        networks.list_available_networks()

    def look_for_loras(self) -> None:
        """The host's list is by file name, and making it opens every file."""
        options = shared.cmd_opts
        folders = [getattr(options, name, None) for name in ("lora_dir", "lyco_dir_backcompat")]
        found = {
            Path(path).stem
            for folder in (*folders, *(getattr(options, "lora_dirs", None) or ()))
            if folder
            for path in shared.walk_files(folder, allowed_extensions=_EXTENSIONS)
        }
        # One that cannot be read is never in the list.
        if found not in (self._names_on_disk, set(networks.available_networks)):
            networks.list_available_networks()
        self._names_on_disk = found

    def follow(self, p: Any) -> None:
        """Nothing: the host samples with the model that it has."""

    def cache_folder(self) -> Path:
        """Ours inside the host's cache folder (modules/cache.py)."""
        folder = os.environ.get("SD_WEBUI_CACHE_DIR", os.path.join(data_path, "cache"))
        return Path(folder) / "klora"

    def show_progress(self, done: int, total: int) -> None:
        """In the host's progress bar. After Interrupt or Skip the host ends the generation by
        itself at its first step."""
        state = shared.state
        state.textinfo = f"K-LoRA: comparing layers, {done} of {total}" if done < total else None
        if state.interrupted or state.skipped:
            state.textinfo = None
            raise KLoraError(
                "The comparison of the two LoRAs was interrupted: generate again and it goes on "
                "where it stopped."
            )


def _alias(entry: Any) -> str:
    """Of a file in the host's list: what its trainer called it."""
    return str(getattr(entry, "alias", "")).lower()


def names_in(layer: LayerPair, role: str) -> list[str]:
    """Of the layers that a paired layer is made of in one file: several for a fused one."""
    own = getattr(layer, role)
    return [part.name for part in getattr(own, "parts", (own,))]
