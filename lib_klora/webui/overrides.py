"""Settings of one generation that a script of the page sets, whatever the accordion says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..settings import Settings

_ATTRIBUTE = "klora_overrides"


def override(p: Any, **values: Any) -> None:
    """Sets fields of generation ``p``, beside those that are set already."""
    setattr(p, _ATTRIBUTE, {**overrides(p), **values})


def overrides(p: Any) -> Mapping[str, Any]:
    """The fields that are set."""
    return getattr(p, _ATTRIBUTE, {})


def overridden(p: Any, settings: Settings, betas: Sequence[Callable[[str], float]]) -> Settings:
    """The settings of generation ``p`` with what is set. A scale brings its own β in the place of
    that of the other scale; ``betas``: which one each has, by the person's defaults and by the
    paper's."""
    values = dict(overrides(p))
    beta_of = next((of for of in betas if settings.beta == of(settings.scale)), None)
    if "scale" in values and "beta" not in values and beta_of is not None:
        values["beta"] = beta_of(values["scale"])
    return replace(settings, **values)
