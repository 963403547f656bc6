"""Settings page, section K-LoRA: what tags get while the accordion is off, and what is kept."""

from __future__ import annotations

import gradio as gr
from modules import shared

from ..errors import get_log
from ..settings import FIELDS, Field, Settings, default_beta

_SECTION = ("klora", "K-LoRA")
_OFFERED = tuple(
    field
    for field in FIELDS
    if not field.per_pair and len(field.choices) != 1 and not field.name.startswith("hires")
)
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

OTHERS = (  # (key, default, label, what it means)
    (
        "klora_tags_alone",
        True,
        "Tags without the accordion",
        "Two <klora:…> tags work while the accordion is off, with the defaults below.",
    ),
    (
        "klora_append_map",
        False,
        "Selection map in the gallery",
        "Show which LoRA each layer got, after the images.",
    ),
    (
        "klora_save_map",
        False,
        "Save the selection map",
        "Beside the first image, as NAME-klora.png.",
    ),
)
LOG_LEVEL = ("klora_log_level", "INFO", "Log level", "How much K-LoRA writes to the log.")


def add_options() -> None:
    """Adds the section: a few of our own, and one per setting, ``klora_<field>``; β has one for S
    and one for S*."""
    for key, default, label, meaning in OTHERS:
        info = shared.OptionInfo(default, label, gr.Checkbox, {}, section=_SECTION)
        shared.opts.add_option(key, info.info(_html(meaning)))
    key, default, label, meaning = LOG_LEVEL
    info = shared.OptionInfo(
        default, label, gr.Radio, {"choices": list(_LEVELS)}, set_log_level, section=_SECTION
    )
    shared.opts.add_option(key, info.info(meaning))
    for field in _OFFERED:
        if field.name == "beta":
            _add("klora_beta", default_beta("S"), f"{field.label} (S)", field)
            _add("klora_beta_s_star", default_beta("S*"), f"{field.label} (S*)", field)
        else:
            _add(f"klora_{field.name}", field.default, field.label, field)
    set_log_level()


def set_log_level() -> None:
    """The log as the Settings page wants it."""
    level = getattr(shared.opts, LOG_LEVEL[0], "INFO")
    get_log().setLevel(level if level in _LEVELS else "INFO")


def tags_work_alone() -> bool:
    """Whether tags work while the accordion is off."""
    return bool(getattr(shared.opts, "klora_tags_alone", True))


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
    shared.opts.add_option(key, info.info(_html(field.help)))


def _html(text: str) -> str:
    """The host puts it into the page as it is, and a ``<tag>`` would vanish."""
    return text.replace("<", "&lt;").replace(">", "&gt;")
