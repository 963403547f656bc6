"""Settings page, section K-LoRA: what tags get while the accordion is off."""

from __future__ import annotations

import gradio as gr
from modules import shared

from ..settings import FIELDS, Field, Settings, default_beta

_SECTION = ("klora", "K-LoRA")
_OFFERED = tuple(field for field in FIELDS if not field.per_pair and len(field.choices) != 1)


def add_options() -> None:
    """Adds one option per setting, ``klora_<field>``; β has one for S and one for S*."""
    for field in _OFFERED:
        if field.name == "beta":
            _add("klora_beta", default_beta("S"), f"{field.label} (S)", field)
            _add("klora_beta_s_star", default_beta("S*"), f"{field.label} (S*)", field)
        else:
            _add(f"klora_{field.name}", field.default, field.label, field)


def tag_defaults() -> Settings:
    """The settings for tags without the accordion. Raises KLoraError if one is out of range."""
    values = {
        field.name: getattr(shared.opts, f"klora_{field.name}", field.default) for field in _OFFERED
    }
    if values["scale"] == "S*":
        values["beta"] = getattr(shared.opts, "klora_beta_s_star", None)
    return Settings(enabled=False, **values)


def _add(key: str, default: bool | float | str, label: str, field: Field) -> None:
    if field.choices:
        component, arguments = gr.Radio, {"choices": list(field.choices)}
    else:
        component, arguments = (gr.Checkbox if isinstance(default, bool) else gr.Number), {}
    info = shared.OptionInfo(default, label, component, arguments, section=_SECTION)
    shared.opts.add_option(key, info.info(field.help))
