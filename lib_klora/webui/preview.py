"""“Preview selection”: the map of a pair without a generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
import torch
from modules import shared
from modules.call_queue import queue_lock

from ..errors import KLoraError, get_log
from ..settings import BY_NAME, from_fields
from ..texts import ANALYSING, OFF
from .prompt import tags_of
from .report_html import error_html, to_html


def components_read(tab: str) -> tuple[str, ...]:
    """The elem_ids of the host's components that say what a generation would be."""
    return (f"{tab}_prompt", f"{tab}_styles", f"{tab}_steps", f"{tab}_denoising_strength")


def previewer(network: Any, names: Sequence[str]) -> Callable:
    """The click handler: the values of the host's components ``names``, then those of the
    accordion → the text for the page."""

    def preview(progress: Callable | None, *values) -> str:
        of_host = dict(zip([n.partition("_")[2] for n in names], values, strict=False))
        of_accordion = dict(zip(BY_NAME, values[len(names) :], strict=True))

        def tell(done: int, total: int) -> None:
            if progress is not None:
                progress((done, total), desc=ANALYSING, unit="layers")

        try:
            settings = from_fields({**of_accordion, "enabled": True})
            is_img2img = names[0].startswith("img2img")
            steps, t0 = _steps(of_host, is_img2img)
            with queue_lock, torch.no_grad():
                report = network.session.preview(
                    tags_of(of_host.get("prompt") or "", of_host.get("styles") or []),
                    settings,
                    steps,
                    settings.start(t0),
                    tell,
                )
        except KLoraError as error:
            return error_html(str(error))
        except Exception as error:
            get_log().exception("The preview failed.")
            return error_html(f"The preview failed ({type(error).__name__}: {error}).")
        if not of_accordion["enabled"]:
            report.notes.insert(0, OFF)
        return to_html(report)

    # In this order because gradio puts its progress where the argument stands.
    def with_progress(progress=gr.Progress(), *values) -> str:  # noqa: B008
        return preview(progress, *values)

    if shared.cmd_opts.no_gradio_queue:  # then Gradio 3 does not start with a progress bar
        return lambda *values: preview(None, *values)
    return with_progress


def _steps(of_host: dict, is_img2img: bool) -> tuple[int, float]:
    """Steps and first progress of the pass that these controls ask for."""
    steps = max(1, int(of_host.get("steps") or 20))
    strength = of_host.get("denoising_strength")
    if not is_img2img or strength is None:
        return steps, 0.0
    if not shared.opts.img2img_fix_steps:
        steps = int(min(strength, 0.999) * steps) + 1
    return steps, 1.0 - min(max(strength, 0.0), 1.0)
