"""The prompt tag.

Grammar (items are separated by ``:``, the host strips the tag from the prompt)::

    tag   = "<klora:" NAME { ":" item } ">"
    item  = weight                    first TE weight (1), then UNet weight (as TE)
          | "te=" weight | "unet=" weight
          | role | "role=" role
    role  = "content" | "c" | "subject" | "style" | "s"

NAME, without spaces around it, is resolved as ``<lora:NAME>`` is. Exactly two tags make a K-LoRA;
without roles the first is the content (the subject), the second the style.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .errors import KLoraError

CONTENT, STYLE = "content", "style"
ROLES = (CONTENT, STYLE)
_ROLE_WORDS = {"content": CONTENT, "c": CONTENT, "subject": CONTENT, "style": STYLE, "s": STYLE}


@dataclass(frozen=True)
class Tag:
    """One LoRA as the person named it: its weights and its role, which may be open."""

    name: str
    te: float = 1.0
    unet: float = 1.0
    role: str | None = None


@dataclass(frozen=True)
class TagPair:
    """The two LoRAs of one K-LoRA. ``style_first`` keeps the order in which they were written:
    the text encoder parts are added in that order, and float sums depend on it."""

    content: Tag
    style: Tag
    style_first: bool = False

    def in_order(self) -> tuple[Tag, Tag]:
        return (self.style, self.content) if self.style_first else (self.content, self.style)


def parse_tag(items: Sequence[str]) -> Tag:
    """One tag from its items, as the host splits them: ``["NAME", "0.8", "role=style"]``.

    Raises KLoraError for a weight that is no finite number, an unknown item or a repeated one.
    """
    written = f"<klora:{':'.join(items)}>"
    name, *rest = (item.strip() for item in items)
    if not name:
        raise KLoraError(f"{written} names no LoRA: write <klora:NAME>, as in <lora:NAME>.")
    weights: list[float] = []
    named: dict[str, float | None] = {"te": None, "unet": None}
    role = None
    for item in rest:
        key, equals, value = item.partition("=")
        key = key.strip().lower()
        if not equals and key in _ROLE_WORDS:
            key, value = "role", key
        if key == "role":
            if role is not None:
                raise KLoraError(f"{written} gives a role twice: keep one, content or style.")
            role = _ROLE_WORDS.get(value.strip().lower())
            if role is None:
                raise KLoraError(
                    f"{written}: “{value}” is no role: write role=content or role=style."
                )
        elif equals and key in named:
            if named[key] is not None:
                raise KLoraError(f"{written} gives {key}= twice: keep one of them.")
            named[key] = _weight(written, value)
        elif equals:
            raise KLoraError(f"{written}: “{item}” is unknown: te=, unet= and role= are possible.")
        else:
            weights.append(_weight(written, item))
    if len(weights) > 2:
        raise KLoraError(
            f"{written} has {len(weights)} weights: write at most two, for text encoder and UNet."
        )
    te = named["te"] if named["te"] is not None else (weights[0] if weights else 1.0)
    unet = named["unet"] if named["unet"] is not None else (weights[1] if weights[1:] else te)
    return Tag(name, te, unet, role)


def parse_tags(tags: Sequence[Sequence[str]]) -> TagPair | None:
    """All K-LoRA tags of one prompt → the pair; None without tags.

    Raises KLoraError for a wrong number of tags, a role given to both, or a malformed tag.
    """
    if not tags:
        return None
    parsed = [parse_tag(items) for items in tags]
    if len(parsed) != 2:
        names = ", ".join(f"“{tag.name}”" for tag in parsed)
        raise KLoraError(
            f"K-LoRA needs exactly two <klora:…> tags, one for the subject and one for the style, "
            f"but the prompt has {len(parsed)} ({names}): "
            + ("add a second one." if len(parsed) == 1 else "keep two; others can be <lora:…>.")
        )
    return pair_tags(*parsed)


def pair_tags(first: Tag, second: Tag) -> TagPair:
    """Gives the open roles and checks that there is one of each."""
    if first.role is not None and first.role == second.role:
        raise KLoraError(
            f"<klora:{first.name}> and <klora:{second.name}> both have the role {first.role}: "
            f"make one of them content and the other style."
        )
    style_first = first.role == STYLE or second.role == CONTENT
    content, style = (second, first) if style_first else (first, second)
    return TagPair(replace(content, role=CONTENT), replace(style, role=STYLE), style_first)


def _weight(written: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise KLoraError(
            f"{written}: “{text}” is no finite number: write a weight such as 0.8, or a role "
            f"(content, style)."
        )
    return value
