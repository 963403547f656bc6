"""What a person reads on the page beside the table of settings, and how a sentence is written so
that the WebUI's languages can translate it. Without page code, for tools/make_localizations.py."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import NamedTuple

from .families import FAMILIES
from .methods import METHODS
from .settings import FIELDS


class Option(NamedTuple):
    """An entry of the Settings page that is no default of a field."""

    key: str
    default: bool | str
    label: str
    help: str


OPTIONS = (
    Option(
        "klora_tags_alone",
        True,
        "Tags without the accordion",
        "Two <klora:…> tags work while the accordion is off, with the defaults below.",
    ),
    Option(
        "klora_append_map",
        False,
        "Selection map in the gallery",
        "Show which LoRA each layer got, after the images.",
    ),
    Option(
        "klora_save_map",
        False,
        "Save the selection map",
        "Beside the first image, as NAME-klora.png.",
    ),
)
LOG_LEVEL = Option("klora_log_level", "INFO", "Log level", "How much K-LoRA writes to the log.")
TAG_DEFAULTS = tuple(field for field in FIELDS if not field.per_pair and not field.of_hires)
"""The fields whose default for tags the Settings page offers."""

PREVIEW, DEFAULTS, ADVANCED = "Preview selection", "Paper defaults", "Advanced"
CLEAR_CACHE = "Clear cache"
ANALYSING = "Analysing"
HINT = "Choose a content and a style LoRA, or write", "in the prompt."
"""Before and after an example of two tags."""
COMPARE, COMPARE_WAYS, COMPARE_SEEDS = "K-LoRA: compare", "Ways", "Seeds, one row each"
STEP, CONTENT_SHARE, ALONE, AS_TABLE = "step", "content %", "in one file only", "As a table"
MAP_HINT = "Point at the map, or go through it with the arrow keys."
MAP_BLOCK_COLUMNS = "block", "layers", "S_c/(γ·S_s), median", "content, of its steps"
MAP_STEP_COLUMNS = "step", "content, of the layers"
MAP_WORDS = "content", "style", "both", "neither", "changes"
"""Of what is told of a cell."""
NOT_EVERY = "Not every picture of this run has K-LoRA."
OFF = "The K-LoRA box is not ticked: pictures do not use what is chosen here."

_NAMES = "|".join(re.escape(x) for family in FAMILIES for x in (*family.models, family.name))
_BASE_MODEL = rf"(?:{_NAMES})(?: or (?:{_NAMES}))*"
_VARIABLE = re.compile(
    r"“[^”]*”"  # what somebody else has named
    r"|<klora:(?!…|NAME>)[^>]*>"  # a tag as it was written, not one that explains
    r"|(?<=such as )[^),]+"
    r"|(?<=\()[0-9a-f]{12}(?=\))"  # a file's hash
    r"|(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)"
    rf"|(?:{'|'.join(map(re.escape, METHODS))}): "
    rf"|(?<= for ){_BASE_MODEL}(?=,)"
    rf"|(?<=checkpoint is ){_BASE_MODEL}(?=[,:])"
    r"|; "  # not variable, but either side of it can occur alone
)


def cache_sentence(size: int, limit: int) -> str:
    """How large the cache is, both in bytes."""
    return (
        f"The analysis cache takes {size / 2**20:.1f} MiB, of {limit / 2**20:.0f} MiB at most. It "
        f"keeps the analysis of each LoRA file, so that none is analysed twice."
    )


def not_cleared_sentence(folder: object) -> str:
    """``folder``: of the cache."""
    return (
        f"Not all of the cache could be removed: allow the WebUI to write to the folder "
        f"“{folder}”, or remove its files yourself."
    )


def copies_sentence(used: str, folders: Sequence[str]) -> str:
    """``folders``: of all copies of the extension; ``used``: of the one that is used."""
    named = ", ".join(f"“{x}”" for x in folders[:-1]) + f" and “{folders[-1]}”"
    return (
        f"K-LoRA is installed {len(folders)} times, in the folders {named}: only the one in "
        f"“{used}” is used. Remove all others, then restart the WebUI."
    )


def fragments(sentence: str) -> list[tuple[str, bool]]:
    """The parts of a sentence in order, each with whether it is fixed: the same whatever the names
    and numbers are."""
    parts, end = [], 0
    for match in _VARIABLE.finditer(sentence):
        parts += [(sentence[end : match.start()], True), (match[0], False)]
        end = match.end()
    parts.append((sentence[end:], True))
    return [(text, fixed) for text, fixed in parts if text]


def to_html(sentence: str) -> str:
    """A sentence for the page. The WebUI translates a text node if the whole of it is known to the
    language, so names and numbers get elements of their own."""
    return "".join(
        html.escape(text) if fixed else f"<span>{html.escape(text)}</span>"
        for text, fixed in fragments(sentence)
    )
