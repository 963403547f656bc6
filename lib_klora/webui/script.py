"""The accordion in txt2img and img2img, built from the table of settings."""

from __future__ import annotations

import gradio as gr
from modules import scripts
from modules.ui_common import create_refresh_button
from modules.ui_components import FormRow, InputAccordion

from .. import infotext
from ..settings import BY_NAME, FIELDS, Field, default_beta

_FIRST_ROW = ("alpha", "beta", "scale")
_HIDDEN = ("method",)  # one choice only, so far


class KLoraScript(scripts.Script):
    """Shows the settings and hands them over; the tag's extra network does the work.

    The host passes the components' values in the order of ``settings.FIELDS``; the API may pass
    one object of named fields in their place.
    """

    def title(self) -> str:
        return "K-LoRA"

    def show(self, is_img2img: bool):
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list:
        components = {}
        with InputAccordion(
            False, label=BY_NAME["enabled"].label, elem_id=self.elem_id("enabled")
        ) as components["enabled"]:
            gr.HTML(
                "<p>A subject LoRA and a style LoRA in one picture: write "
                "<code>&lt;klora:subject&gt; &lt;klora:style&gt;</code> in the prompt.</p>"
            )
            with gr.Row():
                for name in _FIRST_ROW:
                    components[name] = self._component(BY_NAME[name])
            with gr.Accordion("Advanced", open=False, elem_id=self.elem_id("advanced")):
                for field in FIELDS:
                    if field.name not in components:
                        components[field.name] = self._component(field)
        components["scale"].input(
            fn=default_beta,
            inputs=components["scale"],
            outputs=components["beta"],
            show_progress="hidden",
        )
        self.infotext_fields = [
            (component, _pasted(BY_NAME[name])) for name, component in components.items()
        ]
        self.paste_field_names = [infotext.KEY]
        return [components[field.name] for field in FIELDS]

    def before_process(self, p, *args) -> None:
        """What an earlier generation left is taken back first, also where the host does not
        activate extra networks (``p.disable_extra_networks``)."""
        network = _extra_network()
        if network is not None:
            network.detach()

    def _component(self, field: Field):
        common = {"label": field.label, "elem_id": self.elem_id(field.name)}
        if field.name in ("content", "style"):
            return self._lora_dropdown(field, common)
        common["info"] = field.help
        if field.name in _HIDDEN:
            return gr.Radio(list(field.choices), value=field.default, visible=False, **common)
        if field.choices:
            return gr.Radio(list(field.choices), value=field.default, **common)
        if isinstance(field.default, bool):
            return gr.Checkbox(value=field.default, **common)
        low, high, step = field.slider
        value = default_beta("S") if field.default is None else field.default
        return gr.Slider(low, high, value=value, step=step, **common)

    def _lora_dropdown(self, field: Field, common: dict):
        network = _extra_network()
        with FormRow():
            names = network.lora_names if network is not None else list
            dropdown = gr.Dropdown(
                ["", *names()], value="", allow_custom_value=True, info=field.help, **common
            )
            create_refresh_button(
                dropdown,
                network.refresh_loras if network is not None else lambda: None,
                lambda: {"choices": ["", *names()]},
                self.elem_id(f"{field.name}_refresh"),
            )
        return dropdown


def _extra_network():
    """Ours, from the host's registry: it lives as long as the page does."""
    from modules import extra_networks

    return extra_networks.extra_network_registry.get("klora")


def _pasted(field: Field):
    """What a pasted infotext puts into a component; None leaves it alone."""

    def value(params: dict):
        if field.name == "enabled":
            return infotext.KEY in params
        if infotext.KEY not in params:
            return None
        values = infotext.read(params[infotext.KEY])
        if field.name == "beta":
            return values.get("beta", default_beta(values.get("scale", "S")))
        return values.get(field.name, field.default)

    return value
