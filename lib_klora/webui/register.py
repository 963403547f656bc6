"""Registers the extension with the host's callbacks. Reload UI clears them and calls this again."""

from __future__ import annotations

import sys
from functools import partial
from weakref import WeakKeyDictionary

from modules import extra_networks, script_callbacks

from ..errors import get_log
from ..hosts import find_host
from ..steps import Pass, StepCounter, loop_index
from . import copies
from .api import add_api
from .extra_network import KLoraNetwork, UnavailableNetwork, start_of
from .options import add_options
from .pasting import resolve_pasted
from .xyz import add_axes


def register() -> bool:
    """Called once each time the host loads its scripts, by each copy of the extension. Whether this
    is the copy that is used."""
    if copies.used():
        get_log().warning(copies.sentence())
        return False
    _register()
    return True


def _register() -> None:
    try:
        network = KLoraNetwork(find_host())
    except RuntimeError as error:
        get_log().error("K-LoRA is not available: %s.", error)
        stand_in = UnavailableNetwork(str(error))
        script_callbacks.on_before_ui(lambda: extra_networks.register_extra_network(stand_in))
        return

    def before_ui() -> None:
        # Not at import: the host empties its registry after loading the scripts.
        extra_networks.register_extra_network(network)
        add_axes(network.host)

    counters: WeakKeyDictionary = WeakKeyDictionary()
    """Denoiser → its steps: the hosts make a new denoiser for every pass."""

    def before_model_call(params) -> None:
        counter = counters.setdefault(params.denoiser, StepCounter())
        network.session.before_model_call(partial(_pass_of, params.denoiser, counter))

    def model_loaded(_) -> None:
        network.session.forget_other_models()

    script_callbacks.on_before_ui(before_ui)
    script_callbacks.on_ui_settings(lambda: add_options(network.session.score_cache))
    script_callbacks.on_cfg_denoiser(before_model_call)
    script_callbacks.on_cfg_after_cfg(lambda _: network.session.after_model_call())
    script_callbacks.on_model_loaded(model_loaded)
    script_callbacks.on_app_started(lambda _, app: add_api(network, app))
    script_callbacks.on_infotext_pasted(lambda _, params: resolve_pasted(network, params))
    script_callbacks.on_script_unloaded(network.unload)


def _pass_of(denoiser, counter: StepCounter) -> Pass:
    """Where a sampling pass stands. The denoiser's ``step`` counts model calls, ``steps`` are the
    steps of this pass."""
    p, steps, i = denoiser.p, denoiser.steps, loop_index(sys._getframe())
    return Pass(
        finished_steps=counter.finished(denoiser.step, steps, denoiser.total_steps, i),
        steps=steps,
        t0=start_of(p),
        hires=bool(getattr(p, "is_hr_pass", False)),
    )
