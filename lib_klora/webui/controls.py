"""One component for each setting, made from the table of settings."""

from __future__ import annotations

from collections.abc import Callable

import gradio as gr

from ..settings import NO_LORA, Field, default_beta

LORAS = ("content", "style")

_DESCRIBES_EVENTS = not gr.__version__.startswith("3.")
"""Gradio 4 describes every event with all its components in the page, which the browser reads at
each start, and numbers ours among the host's (``/lambda_1``). Gradio 3 does neither, and its
components describe themselves in another form."""
UNLISTED = {"api_name": False} if _DESCRIBES_EVENTS else {}
"""For every event: keeps it out of that description."""
AT_ONCE = {"queue": False, "show_progress": "hidden", **UNLISTED}
"""For an event that is answered at once. Not through Gradio's queue: Gradio 3 never closes a
connection that waits there when the page reloads, and Reload UI waits for it."""
_FEW = 4
"""Words that are shown beside each other, as radio buttons."""


def lora_choices(names: Callable[[], list[str]]) -> list[str]:
    """What the dropdown of a LoRA offers."""
    return [NO_LORA, *names()]


def shown(field: Field):
    """The value that a component of this field has at first: the paper's default."""
    if field.name in LORAS:
        return NO_LORA
    return default_beta("S") if field.default is None else field.default


def choice(field: Field) -> type:
    """The component for a word; a long list of radio buttons makes the page slow."""
    return gr.Radio if len(field.choices) <= _FEW else gr.Dropdown


def control(field: Field, elem_id: str, names: Callable[[], list[str]]):
    """The component of one field."""
    common = {"label": field.label, "elem_id": elem_id, "info": field.help}
    value = shown(field)
    if field.name in LORAS:
        dropdown = gr.Dropdown(lora_choices(names), value=value, allow_custom_value=True, **common)
        if _DESCRIBES_EVENTS:  # each time with the names of all LoRAs
            dropdown.api_info = lambda: {"type": "string"}
        return dropdown
    if field.choices:
        return choice(field)(list(field.choices), value=value, **common)
    if isinstance(value, bool):
        return gr.Checkbox(value=value, **common)
    if field.slider is None:
        return gr.Number(value=value, precision=0 if field.whole else None, **common)
    low, high, step = field.slider
    return gr.Slider(low, high, value=value, step=step, **common)
