"""A pasted infotext → the accordion; LoRA files that were renamed are found again by their hash."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from .. import infotext
from ..errors import KLoraError, get_log, no_such_lora
from ..settings import NO_LORA, Field, default_beta
from ..tag import ROLES, pair_tags, parse_tag
from .controls import LORAS, shown

NOTES = "K-LoRA notes"
"""Where the warnings of a paste travel to the page, within the host's own dictionary."""
_TAG = re.compile(r"<klora:([^>]+)>")
_PROMPTS = ("Prompt", "Hires prompt")


@cache
def pasted(field: Field) -> Callable[[dict], Any]:
    """What an infotext puts into a component; None leaves it alone.

    One function for each field, whichever tab asks: “Send to img2img” carries over the components
    that have the same one in both tabs.
    """

    def value(params: dict):
        if field.name == "enabled":
            return infotext.KEY in params
        if infotext.KEY not in params:
            return None
        values = infotext.read(params[infotext.KEY])
        if field.name in ("beta", "hires_beta"):
            scale = values.get(field.name.replace("beta", "scale"), "S")
            return values.get(field.name, default_beta(scale))
        return values.get(field.name, shown(field))

    return value


def resolve_pasted(network: Any, params: dict) -> None:
    """Puts the present names of files that were renamed into the parameters, and the sentences for
    the page: about these, and about what this version cannot read.

    Called by the host for every infotext that is pasted, before it fills the page.
    """
    text = params.get(infotext.KEY)
    if not text:
        return
    notes = [
        f"This picture's parameters say “{part}”, which this version of K-LoRA does not know: it "
        f"is left out."
        for part in infotext.unread(text)
    ]
    _find_renamed(network, params, notes)
    if notes:
        params[NOTES] = notes
        for note in notes:
            get_log().warning(note)


def _find_renamed(network: Any, params: dict, notes: list[str]) -> None:
    """Adds what it finds to ``notes``."""
    text = params[infotext.KEY]
    hashes = infotext.hashes(text) or ("", "")
    values = infotext.read(text)
    if any(name in values for name in LORAS):
        for role, short_hash in zip(ROLES, hashes, strict=True):
            name = _present_name(network, values.get(role, ""), short_hash, notes)
            values[role] = name or NO_LORA
        params[infotext.KEY] = infotext.with_fields(text, {role: values[role] for role in ROLES})
        return
    prompts = [key for key in _PROMPTS if _TAG.search(params.get(key) or "")]
    names = {}
    if prompts:  # the hashes are those of the first pass that has a pair
        of_role = dict(zip(ROLES, hashes, strict=True))
        names = _present_names(network, params[prompts[0]], of_role, notes)
    for key in prompts:
        params[key] = _renamed(params[key], names)


def _present_names(
    network: Any, prompt: str, hashes: dict[str, str], notes: list[str]
) -> dict[str, str]:
    """Name in a tag of the prompt → the present name of its file."""
    tags = [match[1].split(":") for match in _TAG.finditer(prompt)]
    try:
        if len(tags) != len(ROLES):
            return {}
        pair = pair_tags(*(parse_tag(items) for items in tags))
    except KLoraError:
        return {}  # the generation says what is wrong with it
    return {
        tag.name: _present_name(network, tag.name, hashes[tag.role], notes)
        for tag in pair.in_order()
    }


def _renamed(prompt: str, names: dict[str, str]) -> str:
    """The prompt with other names in its tags."""

    def tag(match: re.Match) -> str:
        name, colon, rest = match[1].partition(":")
        return f"<klora:{names.get(name.strip(), name)}{colon}{rest}>"

    return _TAG.sub(tag, prompt)


def _present_name(network: Any, name: str, short_hash: str, notes: list[str]) -> str:
    """The name under which the file with this hash is in the host's list; ``name`` if it is."""
    entry = network.host.find(name) if name else None
    # Without a hash on either side (--no-hashing) nobody can say that it is another file.
    if entry is not None and (
        entry.short_hash == short_hash or not (short_hash and entry.short_hash)
    ):
        return name
    found = network.host.find_by_hash(short_hash)
    if found:
        notes.append(f"The LoRA “{name}” of this picture is now called “{found}”.")
        return found
    if entry is None and not short_hash:
        notes.append(no_such_lora(name))
    elif entry is None:
        notes.append(f"The LoRA “{name}” of this picture ({short_hash}) is not here.")
    else:
        notes.append(f"“{name}” is not the file that this picture was made with ({short_hash}).")
    return name
