"""The ``<klora:…>`` tag as the host's extra network (modules/extra_networks.py of both)."""

from __future__ import annotations

from typing import Any

from modules import extra_networks

from .. import infotext
from ..errors import KLoraError
from ..hosts import Host
from ..session import Session
from ..settings import Settings, from_args
from .options import tag_defaults, tags_work_alone
from .reading import Runs
from .script import KLoraScript
from .xyz import with_axes


class KLoraNetwork(extra_networks.ExtraNetwork):
    """Registered under ``klora``, so that the host finds and strips our tags.

    The host activates the extra networks in the order of their tags and those without a tag last,
    and ``<lora:>``'s activation begins its list anew. K-LoRA's parts must come after all of it, so
    they are put there by whichever activation comes later: ours, or ``<lora:>``'s, whose
    ``activate`` this class extends for that purpose (undone in ``unload``).
    """

    def __init__(self, host: Host) -> None:
        super().__init__("klora")
        self.host = host
        self.session = Session(host)
        self.runs = Runs()

    def activate(self, p: Any, params_list: list) -> None:
        self._follow_lora()
        tags = [params.items for params in params_list]
        try:
            settings: Settings | KLoraError = _settings_of(p, bool(tags))
        except KLoraError as error:
            settings = error
        self.session.activate(p, tags, settings)

    def deactivate(self, p: Any) -> None:
        """Nothing: the next activation begins with taking back, and the host may skip this call."""

    def detach(self) -> None:
        self.session.detach()

    def lora_names(self) -> list[str]:
        return self.host.lora_names()

    def refresh_loras(self) -> None:
        self.host.refresh_loras()

    def unload(self) -> None:
        """Leaves the host as it was: the page reloads, and everything is made anew."""
        self.session.detach()
        lora = extra_networks.extra_network_registry.get("lora")
        if lora is not None:
            vars(lora).pop("activate", None)

    def _follow_lora(self) -> None:
        lora = extra_networks.extra_network_registry.get("lora")
        if lora is None or getattr(vars(lora).get("activate"), "klora", None) is self:
            return
        vars(lora).pop("activate", None)
        activate_lora = lora.activate

        def activate(p: Any, params_list: list) -> None:
            try:
                activate_lora(p, params_list)
            finally:
                self.session.attach(p)

        activate.klora = self
        lora.activate = activate


class UnavailableNetwork(extra_networks.ExtraNetwork):
    """Stands in where the host's LoRA code cannot be used, and tells whoever writes a tag why."""

    def __init__(self, reason: str) -> None:
        super().__init__("klora")
        self._sentence = f"K-LoRA is not available: {reason}."

    def activate(self, p: Any, params_list: list) -> None:
        if params_list:
            p.extra_generation_params[infotext.ERROR_KEY] = self._sentence
            p.comment(self._sentence)

    def deactivate(self, p: Any) -> None:
        """Nothing was done."""


def _settings_of(p: Any, has_tags: bool) -> Settings:
    """The settings of a generation, for the pass that is being prepared."""
    settings = with_axes(p, _accordion_of(p, has_tags))
    if has_tags and not settings.enabled and not tags_work_alone():
        raise KLoraError(
            "The prompt has <klora:…> tags, but the K-LoRA accordion is off, and Settings → K-LoRA "
            "says that tags need it: switch one of the two on."
        )
    return settings.for_hires() if getattr(p, "is_hr_pass", False) else settings


def _accordion_of(p: Any, has_tags: bool) -> Settings:
    """The accordion's settings of a generation, or the defaults for tags where it is off or the
    generation has no scripts (a nested one may not).

    Read from ``p.script_args`` rather than from a script callback: an extension that runs a
    generation of its own may leave our script out of it but copies the arguments.
    """
    off = tag_defaults() if has_tags else Settings(enabled=False)
    runner, args = getattr(p, "scripts", None), getattr(p, "script_args", None)
    if runner is None or not isinstance(args, (list, tuple)):
        return off
    script = next((s for s in runner.scripts if isinstance(s, KLoraScript)), None)
    if script is None or script.args_from is None:
        return off
    return from_args(args[script.args_from : script.args_to], off)
