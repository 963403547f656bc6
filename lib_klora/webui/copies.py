"""Several copies of the extension in one WebUI, such as a folder that was linked and cloned: the
one that the host loads first is used. The others would do everything a second time."""

from __future__ import annotations

from pathlib import Path

from modules import extensions, scripts

from ..texts import copies_sentence


def used() -> str:
    """The folder of the copy that is used; empty before any is loaded.

    The host lists what a file in scripts/ has once it has run it, and empties the list when it
    loads them anew.
    """
    found = (x.basedir for x in scripts.scripts_data if x.script_class.__name__ == "KLoraScript")
    return Path(next(found, "")).name


def sentence() -> str:
    """What to tell of the copies; empty if there is one."""
    names = [
        extension.name
        for extension in extensions.active()
        if Path(extension.path, "lib_klora", "webui").is_dir()
    ]
    return copies_sentence(used(), names) if len(names) > 1 else ""
