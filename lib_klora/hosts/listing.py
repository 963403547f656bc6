"""The hosts' list of LoRAs, which both keep in the same way (networks.py of both)."""

from __future__ import annotations

import os
import time
from types import ModuleType

from .protocol import OnDisk

_PATIENCE = 10.0
"""Seconds spent on reading files whose hash nobody has asked for yet."""


def find_on_disk(networks: ModuleType, name: str) -> OnDisk | None:
    """Resolves ``name`` as the host's ``load_networks`` does: file stem or alias; an alias that
    several files share counts only as a file stem. Looks at the folder again if it is unknown."""

    def look_up():
        if name.lower() in networks.forbidden_network_aliases:
            return networks.available_networks.get(name)
        return networks.available_network_aliases.get(name)

    entry = look_up()
    if entry is None or not os.path.exists(entry.filename):
        networks.list_available_networks()
        entry = look_up()
    if entry is None:
        return None
    entry.read_hash()
    status = os.stat(entry.filename)
    version = (entry.filename, status.st_mtime_ns, status.st_size)
    return OnDisk(name, entry.filename, entry.shorthash or "", version, entry)


def find_by_hash(networks: ModuleType, short_hash: str) -> str | None:
    """The name of the file with this short hash. The hosts know a file's hash once it was used or
    where its header says it; the others are read now, as many as a person will wait for."""
    if not short_hash:
        return None
    entry = networks.available_network_hash_lookup.get(short_hash)
    others = [] if entry is not None else list(networks.available_networks.values())
    deadline = time.monotonic() + _PATIENCE
    for other in others:
        if time.monotonic() > deadline:
            break
        other.read_hash()
        if other.shorthash == short_hash:
            entry = other
            break
    return entry.name if entry is not None else None
