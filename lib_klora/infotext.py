"""The picture's ``K-LoRA`` parameter: text ↔ settings.

``alpha=2; scale=S*; files=1a2b3c4d5e6f+6f5e4d3c2b1a``: the settings that differ from the paper's
defaults, and the short hashes of the content and the style file. Characters that the hosts'
infotext gives a meaning (``, : " ; = %`` and line ends) are written ``%XX``. A file whose hash the
host does not know (``--no-hashing``) has an empty one; ``files`` is left out if neither is known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .errors import KLoraError
from .settings import BY_NAME, Field, Settings, checked

KEY = "K-LoRA"
ERROR_KEY = "K-LoRA error"


def write(settings: Settings, hashes: tuple[str, str]) -> str:
    """The value of the ``K-LoRA`` key; ``hashes`` of the content and the style file."""
    values = settings.changed()
    parts = [f"{name}={_text(value)}" for name, value in values.items() if name != "enabled"]
    if any(hashes):
        parts.append(f"files={_escape('+'.join(hashes))}")
    # The hosts' paste drops a key without a value.
    return "; ".join(parts or [f"method={_text(settings.method)}"])


def read(text: str) -> dict[str, Any]:
    """The fields that a ``K-LoRA`` value holds, typed; ``unread`` says what is left out."""
    return {name: value for _, name, value in _parts(text) if name is not None}


def unread(text: str) -> list[str]:
    """The parts of a ``K-LoRA`` value that are unknown or malformed: an infotext may come from a
    later version or from a person's hand."""
    return [part for part, name, _ in _parts(text) if name is None]


def hashes(text: str) -> tuple[str, str] | None:
    """The short hashes of the content and the style file; None if the text names none."""
    match = re.search(r"(?:^|; )files=([^;]*)", text)
    found = _unescape(match[1]).split("+") if match else []
    return (found[0], found[1]) if len(found) == 2 else None


def with_fields(text: str, values: dict[str, Any]) -> str:
    """The same text with other values for some of its fields."""
    kept = [part for part in text.split("; ") if part.partition("=")[0] not in values]
    return "; ".join([*(f"{name}={_text(value)}" for name, value in values.items()), *kept])


def _parts(text: str) -> Iterator[tuple[str, str | None, Any]]:
    """(part as written, field or None, typed value) of all parts but the files."""
    for part in filter(None, (part.strip(" ") for part in text.split(";"))):
        name, equals, value = part.partition("=")
        if name == "files":
            continue
        field = BY_NAME.get(name) if equals else None
        try:
            read = checked(field, _typed(field, _unescape(value))) if field else None
        except (KLoraError, ValueError):
            field, read = None, None
        yield part, field and name, read


def _typed(field: Field, text: str) -> Any:
    if isinstance(field.default, bool):
        return {"true": True, "false": False}.get(text)
    return text if isinstance(field.default, str) else float(text)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return _escape(value) if isinstance(value, str) else repr(value).removesuffix(".0")


def _escape(text: str) -> str:
    return re.sub(r'[%;=,:"\\\n\r\t]|^ | $', lambda m: f"%{ord(m[0]):02X}", text)


def _unescape(text: str) -> str:
    return re.sub(r"%([0-9A-F]{2})", lambda m: chr(int(m[1], 16)), text)
