"""The hosts' list of LoRAs, which both keep in the same way (networks.py of both)."""

from __future__ import annotations

import os
from types import ModuleType

from .protocol import OnDisk


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
