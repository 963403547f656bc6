"""Settings page, section K-LoRA: the person's defaults, which tags get while the accordion is off
and with which the accordion opens; and what is kept."""

from __future__ import annotations

from typing import Any

import gradio as gr
from modules import shared

from ..errors import KLoraError, get_log
from ..score_cache import ScoreCache
from ..settings import BY_NAME, Field, Settings, checked, default_beta
from ..texts import (
    CLEAR_CACHE,
    LOG_LEVEL,
    OPTIONS,
    TAG_DEFAULTS,
    cache_sentence,
    not_cleared_sentence,
    to_html,
)
from .controls import AT_ONCE, choice
from .report_html import notes_html

_SECTION = ("klora", "K-LoRA")
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def add_options(cache: ScoreCache) -> None:
    """Adds the section: a few of our own, and one per setting, ``klora_<field>``; β has one for S
    and one for S*."""
    for option in OPTIONS:
        info = shared.OptionInfo(option.default, option.label, gr.Checkbox, {}, section=_SECTION)
        shared.opts.add_option(option.key, info.info(_html(option.help)))
    key, default, label, meaning = LOG_LEVEL
    info = shared.OptionInfo(
        default, label, gr.Radio, {"choices": list(_LEVELS)}, set_log_level, section=_SECTION
    )
    shared.opts.add_option(key, info.info(meaning))
    shared.opts.add_option("klora_cache", _CacheOption(cache))
    for field in TAG_DEFAULTS:
        if field.name == "beta":
            _add("klora_beta", default_beta("S"), f"{field.label} (S)", field)
            _add("klora_beta_s_star", default_beta("S*"), f"{field.label} (S*)", field)
        else:
            _add(f"klora_{field.name}", field.default, field.label, field)
    set_log_level()


def set_log_level() -> None:
    """The log as the Settings page wants it."""
    level = getattr(shared.opts, LOG_LEVEL.key, "INFO")
    get_log().setLevel(level if level in _LEVELS else "INFO")


def tags_work_alone() -> bool:
    """Whether tags work while the accordion is off."""
    return bool(getattr(shared.opts, "klora_tags_alone", True))


def tag_defaults() -> Settings:
    """The settings for tags without the accordion. Raises KLoraError if one is out of range."""
    values = {
        field.name: getattr(shared.opts, f"klora_{field.name}", field.default)
        for field in TAG_DEFAULTS
    }
    if values["scale"] == "S*":
        values["beta"] = getattr(shared.opts, "klora_beta_s_star", None)
    values = {name: value for name, value in values.items() if value is not None}  # emptied fields
    try:
        return Settings(enabled=False, **values)
    except KLoraError as error:
        raise KLoraError(f"Settings → K-LoRA: {error}") from error


def own_defaults() -> dict[str, Any]:
    """Field → the person's default, for the accordion to open with; the paper's where that is out
    of range or emptied."""
    values = {field.name: _own(field, f"klora_{field.name}") for field in TAG_DEFAULTS}
    return {**values, "beta": own_beta(values["scale"])}


def own_beta(scale: str) -> float:
    """The person's β for a scale."""
    own = _own(BY_NAME["beta"], "klora_beta_s_star" if scale == "S*" else "klora_beta")
    return default_beta(scale) if own is None else own


def default_values() -> dict[str, Any]:
    """Option → the paper's default, for each default on the page."""
    defaults = {f"klora_{field.name}": field.default for field in TAG_DEFAULTS}
    return {**defaults, "klora_beta": default_beta("S"), "klora_beta_s_star": default_beta("S*")}


def _own(field: Field, key: str) -> Any:
    try:
        value = checked(field, getattr(shared.opts, key, None))
    except KLoraError:
        value = None
    return field.default if value is None else value


class _CacheOption(shared.OptionHTML):
    """The size of the cache and a button that clears it, as the host shows explanations: a
    component without a value to save.

    When a page opens, the host fills in each option's value, or its default if none is saved. So
    the default is the present size. While the page stays open, the Settings tab asks for it again
    (javascript/klora_settings.js).
    """

    def __init__(self, cache: ScoreCache) -> None:
        self._cache = cache
        super().__init__("")
        self.section = _SECTION
        self.component = self._row

    @property
    def default(self) -> str:
        sentence = cache_sentence(self._cache.size(), self._cache.limit)
        return f'<p class="klora-cache">{to_html(sentence)}</p>'

    @default.setter
    def default(self, _) -> None:
        """The host's own text, of which there is none."""

    def _row(self, value: str, elem_id: str, **_) -> gr.HTML:
        with gr.Row(elem_id="klora_cache_row"):
            shown = gr.HTML(value, elem_id=elem_id)
            clear = gr.Button(CLEAR_CACHE, elem_id="klora_clear_cache", size="sm")
            look = gr.Button("Look again", elem_id="klora_cache_size", visible=False)
        at_once = {"inputs": [], "outputs": [shown], **AT_ONCE}
        clear.click(fn=self._clear, **at_once)
        look.click(fn=lambda: self.default, **at_once)
        return shown

    def _clear(self) -> str:
        left = self._cache.clear()
        notes = notes_html([not_cleared_sentence(self._cache.folder)]) if left else ""
        return self.default + notes


def _add(key: str, default: bool | float | str, label: str, field: Field) -> None:
    if field.choices:
        component, arguments = choice(field), {"choices": list(field.choices)}
    elif isinstance(default, bool):
        component, arguments = gr.Checkbox, {}
    else:
        component, arguments = gr.Number, {"minimum": field.low, "maximum": field.high}
    info = shared.OptionInfo(default, label, component, arguments, section=_SECTION)
    shared.opts.add_option(key, info.info(_html(field.help)))


def _html(text: str) -> str:
    """The host puts it into the page as it is, and a ``<tag>`` would vanish."""
    return text.replace("<", "&lt;").replace(">", "&gt;")
