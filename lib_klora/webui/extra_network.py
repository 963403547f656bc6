"""The ``<klora:…>`` tag as the host's extra network (modules/extra_networks.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

from modules import extra_networks, processing, shared

from .. import infotext, lora_hashes
from ..errors import KLoraError
from ..hosts import Host
from ..session import Session, job_has_tags
from ..settings import Settings, default_beta, from_args
from .options import own_beta, tag_defaults, tags_work_alone
from .overrides import overridden, overrides
from .prompt import tags_of_batch
from .report_html import Runs
from .script import KLoraScript

_TEXT_STATE = "klora text state"
"""Shows the hosts' caches of encoded text what K-LoRA adds to the text encoders: their key includes
the prompt's extra networks (processing.py, cached_params). No network has this name."""

_OTHER_TAGS = "K-LoRA batch"
"""The parameter of a picture whose own tags were not used."""


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
        self.runs = Runs()
        self.session = Session(host, on_error=self.runs.add_error)

    def activate(self, p: Any, params_list: list) -> None:
        self._follow_lora()
        tags = [list(params.items) for params in params_list]
        try:
            settings: Settings | KLoraError = _settings_of(p, bool(tags))
        except KLoraError as error:
            settings = error
        refiner = self.session.is_sampling(p)
        if not (refiner or getattr(p, "is_hr_pass", False)):
            self._tell_of_other_tags(p, tags)
            lora_hashes.begin(p)
        if refiner:
            tags, settings = _for_refiner(tags, settings)
        self.session.activate(p, tags, settings, start_of(p))
        if getattr(shared.opts, "lora_add_hashes_to_infotext", False):
            lora_hashes.add(p, self.session.hashes(p))
        lora_hashes.write(p)
        self._tell_caches(p)

    def deactivate(self, p: Any) -> None:
        """Nothing: the next activation undoes the last one, and the host may skip this call."""

    def begin(self, p: Any) -> None:
        self.session.begin(p)

    def finish(self, p: Any) -> None:
        """A batch is sampled, and its parameters are about to be written."""
        self.session.finish(p)
        if infotext.KEY not in p.extra_generation_params:  # all of it is without K-LoRA
            lora_hashes.begin(p)
            lora_hashes.write(p)

    def lora_names(self) -> list[str]:
        return self.host.lora_names()

    def refresh_loras(self) -> None:
        self.host.refresh_loras()

    def lora_names_now(self) -> list[str]:
        """After a look whether files have come or gone."""
        self.host.look_for_loras()
        return self.host.lora_names()

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
                lora_hashes.write(p)
                self._tell_caches(p)

        activate.klora = self
        lora.activate = activate

    def _tell_of_other_tags(self, p: Any, tags: list[list[str]]) -> None:
        """The host takes the LoRAs of a batch's first prompt for all of its pictures
        (extra_networks.py, parse_prompts)."""
        of_pictures = tags_of_batch(p)
        others = [number for number, own in enumerate(of_pictures, 1) if own != tags]
        p.extra_generation_params.pop(_OTHER_TAGS, None)
        if not others:
            return
        made = " and ".join(f"“{items[0]}”" for items in tags) or "no <klora:…> tags"
        sentence = (
            f"The pictures of a batch have the LoRAs of its first prompt ({made}), and picture "
            f"{', '.join(map(str, others))} has other <klora:…> tags: use the batch count instead "
            f"of the batch size."
        )
        self.session.tell(p, sentence)
        # A list has a value for each picture's parameters (processing.py, create_infotext).
        p.extra_generation_params[_OTHER_TAGS] = [
            sentence if number in others else None for number in range(1, len(of_pictures) + 1)
        ]

    def _tell_caches(self, p: Any) -> None:
        """For both passes, because the host may encode the hires prompt ahead of its pass. New
        dictionaries, since the caches keep the old ones as their keys."""
        state = self.session.text_state(p)
        for name in ("extra_network_data", "hr_extra_network_data"):
            data = getattr(p, name, None)
            if data is None:
                continue
            data = copy(data)
            data.pop(_TEXT_STATE, None)
            if state is not None:
                data[_TEXT_STATE] = [extra_networks.ExtraNetworkParams([repr(state)])]
            setattr(p, name, data)


class UnavailableNetwork(extra_networks.ExtraNetwork):
    """Stands in where the host's LoRA code cannot be used, and tells whoever writes a tag why."""

    def __init__(self, reason: str) -> None:
        super().__init__("klora")
        self.sentence = f"K-LoRA is not available: {reason}."

    def activate(self, p: Any, params_list: list) -> None:
        try:
            wanted = bool(params_list) or accordion_of(p, False).enabled
        except KLoraError:
            wanted = True
        if wanted:
            p.extra_generation_params[infotext.ERROR_KEY] = self.sentence
            p.comment(self.sentence)

    def deactivate(self, p: Any) -> None:
        """Nothing was done."""


def _settings_of(p: Any, has_tags: bool) -> Settings:
    """The settings of a generation, for the pass that is being prepared."""
    args = _arguments_of(p)
    by_program = bool(args) and isinstance(args[0], Mapping)
    betas = (default_beta,) if by_program else (own_beta, default_beta)
    settings = overridden(p, accordion_of(p, has_tags), betas)
    named = settings.content or settings.style
    asked = bool(overrides(p)) and overrides(p).get("enabled", True)
    if asked and not (job_has_tags(p) or named or settings.enabled):
        raise KLoraError(
            "The plot has an axis of K-LoRA, but no LoRAs are given: write two <klora:NAME> tags, "
            "or name a content and a style LoRA."
        )
    if has_tags and not settings.enabled and not tags_work_alone():
        raise KLoraError(
            "The prompt has <klora:…> tags, but the K-LoRA accordion is off, and Settings → K-LoRA "
            "says that tags need it: switch one of the two on."
        )
    return settings.for_hires() if getattr(p, "is_hr_pass", False) else settings


def _for_refiner(
    tags: list[list[str]], settings: Settings | KLoraError
) -> tuple[list[list[str]], Settings | KLoraError]:
    """The names of the LoRAs as the refiner is to have them: Forge Neo has an option for that, with
    a line ``before=after`` for each replacement, and applies it to the ``<lora:>`` tags by itself
    (sd_samplers_common.py, apply_lora_for_refiner)."""
    lines = str(getattr(shared.opts, "refiner_lora_replacement", "")).splitlines()
    replacements = [[part.strip() for part in line.split("=", 1)] for line in lines if "=" in line]

    def renamed(name: str) -> str:
        for before, after in replacements:
            name = name.replace(before, after) if before else name
        return name

    tags = [[renamed(items[0]), *items[1:]] if items else items for items in tags]
    if isinstance(settings, Settings):
        settings = replace(
            settings, content=renamed(settings.content), style=renamed(settings.style)
        )
    return tags, settings


def accordion_of(p: Any, has_tags: bool) -> Settings:
    """The accordion's settings of a generation, or the defaults for tags where it is off or the
    generation has no scripts (a nested one may not)."""
    settings = from_args(_arguments_of(p))
    if settings is not None:
        return settings
    return tag_defaults() if has_tags else Settings(enabled=False)


def _arguments_of(p: Any) -> Sequence[Any]:
    """What the accordion or a program has given; empty if the generation has no scripts.

    Read from ``p.script_args`` rather than from a script callback: an extension that runs a
    generation of its own may leave our script out of it but copies the arguments.
    """
    runner, args = getattr(p, "scripts", None), getattr(p, "script_args", None)
    if runner is None or not isinstance(args, (list, tuple)):
        return ()
    script = next((s for s in runner.scripts if isinstance(s, KLoraScript)), None)
    if script is None or script.args_from is None:
        return ()
    return args[script.args_from : script.args_to]


def start_of(p: Any) -> float:
    """Progress at which the pass of ``p`` that is being prepared or sampled starts."""
    img2img = isinstance(p, processing.StableDiffusionProcessingImg2Img)
    if not (img2img or getattr(p, "is_hr_pass", False)) or p.denoising_strength is None:
        return 0.0
    return 1.0 - min(max(p.denoising_strength, 0.0), 1.0)
