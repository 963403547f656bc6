"""Settings of one generation that a script of the page sets, whatever the accordion says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..settings import Settings, default_beta

_ATTRIBUTE = "klora_overrides"


def override(p: Any, **values: Any) -> None:
    """Sets fields of generation ``p``, beside those that are set already."""
    setattr(p, _ATTRIBUTE, {**overrides(p), **values})


def overrides(p: Any) -> Mapping[str, Any]:
    """The fields that are set."""
    return getattr(p, _ATTRIBUTE, {})


def overridden(p: Any, settings: Settings) -> Settings:
    """The settings of generation ``p`` with what is set."""
    values = dict(overrides(p))
    if "scale" in values and "beta" not in values and settings.beta == default_beta(settings.scale):
        values["beta"] = default_beta(values["scale"])  # each scale with its own start
    return replace(settings, **values)
