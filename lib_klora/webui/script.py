"""The accordion in txt2img and img2img, built from the table of settings."""

from __future__ import annotations

import html
import json

import gradio as gr
from modules import extra_networks, scripts
from modules.ui_common import create_refresh_button
from modules.ui_components import InputAccordion

from .. import infotext
from ..settings import BY_NAME, FIELDS, NO_LORA, Field
from ..texts import ADVANCED, DEFAULTS, OFF, PREVIEW
from . import copies, pasting, preview
from .controls import AT_ONCE, LORAS, UNLISTED, control, lora_choices, shown
from .options import default_values, own_defaults
from .report_html import HINT, error_html, keep_maps, notes_html

_PAIR = (*LORAS, "content_weight", "style_weight")
_SCHEDULE = ("scale", "alpha", "beta", "share_start", "share_end")


class KLoraScript(scripts.Script):
    """Shows the settings and hands them over; the tag's extra network does the work.

    The host passes the components' values in the order of ``settings.FIELDS``; the API may pass
    one object of named fields in their place.
    """

    def __init__(self) -> None:
        super().__init__()
        self._host_components: dict = {}
        """Components of the host's own that the accordion reads, by elem_id."""

    def title(self) -> str:
        return "K-LoRA"

    def show(self, is_img2img: bool):
        return scripts.AlwaysVisible

    # -- the page ----------------------------------------------------------------------------------

    def ui(self, is_img2img: bool) -> list:
        components: dict = {}
        label = BY_NAME["enabled"].label
        with InputAccordion(False, label=label, elem_id=self.elem_id("enabled")) as enabled:
            components["enabled"] = enabled
            self._first_rows(components)
            with gr.Row(elem_classes=["klora-buttons"]):
                preview_button = gr.Button(PREVIEW, elem_id=self.elem_id("preview"))
                defaults_button = gr.Button(DEFAULTS, elem_id=self.elem_id("defaults"))
            report = gr.HTML(
                _initial_html(), elem_id=self.elem_id("report"), elem_classes=["klora-report"]
            )
            with gr.Accordion(ADVANCED, open=False, elem_id=self.elem_id("advanced")):
                for field in FIELDS:
                    if field.name not in components:
                        components[field.name] = self._control(field)
        self._offer_defaults(components, defaults_button)
        self._preview_button, self._report = preview_button, report
        self._controls = [components[field.name] for field in FIELDS]
        self.infotext_fields = [
            (component, pasting.pasted(BY_NAME[name]))
            for name, component in components.items()
            if not isinstance(component, gr.State)
        ]
        self.infotext_fields.append((report, _pasted_notes))
        # “Send to” pairs off the two tabs' components, so only what both have.
        self.paste_field_names = [pasting.pasted(field) for field in FIELDS if not field.of_hires]
        return self._controls

    def after_component(self, component, **_) -> None:
        """Waits for the components of the host's that the accordion works with. The last of them
        is where the host tells the page what a generation made."""
        tab = "img2img" if self.is_img2img else "txt2img"
        if component.elem_id in preview.components_read(tab):
            self._host_components[component.elem_id] = component
        elif component.elem_id == f"generation_info_{tab}":
            self._follow_generations(component)

    def _first_rows(self, components: dict) -> None:
        with gr.Row(elem_classes=["klora-pair"]):  # style.css puts them in their places
            for name in _PAIR:
                components[name] = self._control(BY_NAME[name])
            network = _extra_network()
            create_refresh_button(
                [components[name] for name in LORAS],
                network.refresh_loras if network is not None else lambda: None,
                lambda: {"choices": lora_choices(_lora_names)},
                self.elem_id("refresh"),
            )
        self._offer_new_loras([components[name] for name in LORAS])
        with gr.Row(elem_classes=["klora-schedule-row"]):
            for name in _SCHEDULE:
                components[name] = self._control(BY_NAME[name])
            gr.HTML(
                '<div class="klora-schedule" role="img" aria-label="S(t) over the steps" '
                f'data-defaults="{html.escape(json.dumps(default_values()), quote=True)}"></div>',
                elem_id=self.elem_id("schedule"),
            )

    def _control(self, field: Field):
        if field.of_hires and self.is_img2img:
            return gr.State(shown(field))  # only for its place in the API's list
        return control(field, self.elem_id(field.name), _lora_names)

    def _offer_new_loras(self, pickers: list) -> None:
        """The page asks for them when somebody comes to the pickers (javascript/klora_loras.js).
        They go behind the others, because Gradio 4 remembers a choice by its place in the list."""
        known = gr.State(_lora_names())
        look = gr.Button("Look for new files", elem_id=self.elem_id("look"), visible=False)

        def new_choices(known: list[str]) -> list:
            network = _extra_network()
            names = [] if network is None else network.lora_names_now()
            new = [name for name in names if name not in known]
            if not new:
                return [*(gr.update() for _ in pickers), known]
            known = [*known, *new]
            return [*(gr.update(choices=lora_choices(lambda: known)) for _ in pickers), known]

        look.click(
            fn=new_choices,
            inputs=[known],
            outputs=[*pickers, known],
            **AT_ONCE,
        )

    def _offer_defaults(self, components: dict, button) -> None:
        """The paper's; and the person's, which the page asks for while the accordion is closed
        (javascript/klora_defaults.js). It is built with the paper's: the host takes what it is
        built with for what a program leaves out, and keeps it for the next start."""
        fields = [field for field in FIELDS if not field.per_pair]
        button.click(
            fn=lambda: [shown(field) for field in fields],
            inputs=[],
            outputs=[components[field.name] for field in fields],
            **AT_ONCE,
        )
        own = gr.Button("Own defaults", elem_id=self.elem_id("own_defaults"), visible=False)
        own.click(
            fn=lambda: list(own_defaults().values()),
            inputs=[],
            outputs=[components[name] for name in own_defaults()],
            **AT_ONCE,
        )

    def _follow_generations(self, generation_info) -> None:
        network, tab = _extra_network(), "img2img" if self.is_img2img else "txt2img"
        if network is None:
            return
        controls = dict(zip(BY_NAME, self._controls, strict=True))

        def report_of(info: str, enabled: bool, *pair: str) -> str:
            found = network.runs.html_of(info)
            chosen = any(name not in (None, "", NO_LORA) for name in pair)
            return notes_html([OFF]) if found == HINT and chosen and not enabled else found

        generation_info.change(
            fn=report_of,
            inputs=[generation_info, controls["enabled"], *(controls[name] for name in LORAS)],
            outputs=[self._report],
            **AT_ONCE,
        )
        names = [name for name in preview.components_read(tab) if name in self._host_components]
        self._preview_button.click(
            fn=preview.previewer(network, names),
            inputs=[*(self._host_components[name] for name in names), *self._controls],
            outputs=[self._report],
            **UNLISTED,
        )

    # -- generations -------------------------------------------------------------------------------

    def before_process(self, p, *args) -> None:
        """What an earlier generation left is taken back first, also where the host does not
        activate extra networks (``p.disable_extra_networks``)."""
        network = _extra_network()
        if network is not None:
            network.begin(p)

    def process_batch(self, p, *args, **kwargs) -> None:
        """After all extensions' ``after_extra_networks_activate``, before text is encoded."""
        network = _extra_network()
        if network is not None:
            network.session.settle(p)

    def process_before_every_sampling(self, p, *args, **kwargs) -> None:
        """The hires pass is activated by itself, too."""
        self.process_batch(p)

    def postprocess_batch(self, p, *args, **kwargs) -> None:
        """Before the batch's parameters are written."""
        network = _extra_network()
        if network is not None:
            network.finish(p)

    def postprocess(self, p, processed, *args) -> None:
        """Keeps what was done, for the page to ask for."""
        network = _extra_network()
        report = network.session.report(p) if network is not None else None
        if report is not None and (report.passes or report.error):
            network.runs.add(report)
            keep_maps(p, processed, report)


def _extra_network():
    """Ours, from the host's registry: it lives as long as the page does."""
    network = extra_networks.extra_network_registry.get("klora")
    return network if hasattr(network, "session") else None


def _initial_html() -> str:
    """What the page says before anything was generated: where K-LoRA cannot work, why; and that
    there are several copies of it."""
    sentence = getattr(extra_networks.extra_network_registry.get("klora"), "sentence", "")
    several = copies.sentence()
    return (notes_html([several]) if several else "") + (error_html(sentence) if sentence else HINT)


def _lora_names() -> list[str]:
    network = _extra_network()
    return [] if network is None else network.lora_names()


def _pasted_notes(params: dict) -> str | None:
    """What the page says about a paste; None leaves what it said before."""
    if infotext.KEY not in params:
        return None
    return notes_html(params.get(pasting.NOTES, []))
