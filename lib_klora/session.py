"""One generation: tags and settings → pair → plan → host.

The session follows the host's own LoRA activation: whatever makes the host activate its
``<lora:>`` tags (each batch, hires, the refiner, a nested generation) comes through ``activate``,
and the next activation without tags takes everything back. Nothing depends on a callback that an
interrupted or failed generation would skip.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from . import infotext
from .composite import TwoPredictions
from .errors import KLoraError, get_log, is_full_memory
from .hosts import Fusion, Host
from .loading import LoadedPair, PairLoader
from .methods import BITS, METHODS
from .plan import Plan, make_plan
from .report import REFINER_WITHOUT, PassReport, Report
from .settings import Settings
from .steps import Pass
from .tag import CONTENT, STYLE, Tag, TagPair, pair_tags, parse_tags

log = get_log()

_TAGS_WIN = "The prompt's <klora:…> tags are used, not the LoRAs named beside them."
_REPORTS_KEPT = 4


@dataclass(frozen=True)
class _PassKey:
    """Which pass of which generation."""

    processing: Callable[[], Any]
    """Weak reference to the generation."""
    iteration: int
    """Which batch of it."""
    hires: bool

    @classmethod
    def present(cls, p: Any) -> _PassKey:
        """The pass that generation ``p`` is in."""
        return cls(
            weakref.ref(p), getattr(p, "iteration", 0), bool(getattr(p, "is_hr_pass", False))
        )

    def is_of(self, p: Any) -> bool:
        """Whether generation ``p`` is in this pass."""
        now = _PassKey.present(p)
        return self.processing() is p and (self.iteration, self.hires) == (now.iteration, now.hires)


@dataclass(eq=False)
class _Active:
    """The K-LoRA that the host has now."""

    settings: Settings
    names: tuple[str, str]
    loaded: LoadedPair
    fusion: Fusion
    text: tuple
    """All that encoded text depends on: files with their text encoder weights, in order."""
    t0: float
    """Progress at which the pass starts, as far as it is known before its first step."""
    processing: Any
    """Weak reference to the generation."""
    iteration: int
    """Which batch of the generation."""
    shown: PassReport | None = None
    """What the report has of it."""
    at: Pass | None = None
    """The step that is being made."""
    plan_key: tuple | None = None
    plan: Plan | None = None
    turn: str = CONTENT
    """Whose prediction comes next, if the LoRAs predict apart."""
    calls: int | None = None
    """Of the network, in the present model call; None outside of one."""

    @property
    def predicts_apart(self) -> bool:
        return METHODS[self.settings.method].apart

    def choice(self, row: np.ndarray) -> np.ndarray:
        """A row of the plan as the host is to apply it now."""
        if not self.predicts_apart:
            return row
        alone = [BITS[role] for role in self.loaded.pair.unpaired.values()]
        return np.append(row, np.array(alone, np.uint8)) & BITS[self.turn]

    def plan_for(self, steps: int, t0: float) -> Plan:
        if self.plan_key != (steps, t0):
            self.plan = make_plan(self.loaded.pair, self.loaded.scores, self.settings, steps, t0)
            self.plan_key = (steps, t0)
        return self.plan


class Session:
    """K-LoRA in one WebUI process; ``host`` does the applying.

    The pair stays in memory between generations, as the host keeps its own LoRAs. ``on_error`` gets
    every message that a generation, whichever it is, is without K-LoRA.
    """

    def __init__(self, host: Host, on_error: Callable[[str], None] = lambda sentence: None) -> None:
        self._host = host
        self._on_error = on_error
        self._active: _Active | None = None
        self._report = Report()
        self._applying = False
        """Whether the host may be applying a fusion: from ``attach`` on, and in each model call.
        If this is still set when a generation begins, the last one ended half-way."""
        self._sampling: _PassKey | None = None
        """The latest pass that was sampled with K-LoRA. The present one may be another: a host that
        loads a refiner activates the LoRAs of an empty generation meanwhile (get_empty_cond)."""
        self._given_up: _PassKey | None = None
        """The pass that K-LoRA has ended in."""
        self._has_sampled = False
        """Whether any step of the present batch was made with K-LoRA."""
        self._two: TwoPredictions | None = None
        """Where the active pair's LoRAs predict apart."""
        self._reports: list[tuple[weakref.ref, Report]] = []
        """Of the latest generations: one may run within another."""
        self._loader = PairLoader(host)
        self.score_cache = self._loader.score_cache

    # -- what the host calls ----------------------------------------------------------------------

    def activate(
        self,
        p: Any,
        tags: Sequence[Sequence[str]],
        settings: Settings | KLoraError,
        t0: float = 0.0,
    ) -> None:
        """The host activates the LoRAs of generation ``p``.

        Args:
            tags: the items of each of our tags, in order; empty if there are none.
            settings: with ``enabled`` if they are the accordion's, else the defaults for tags; or
                the error that reading them gave.
            t0: progress at which the pass starts.
        """
        active = None
        if self._has_given_up(p):  # a refiner takes over: the pass's error stays
            self.attach(p)
            return
        refiner = self.is_sampling(p)
        self._report = self._report_of(p)
        if not (refiner or getattr(p, "is_hr_pass", False)):
            self._has_sampled = False
            for key in (infotext.KEY, infotext.ERROR_KEY):
                p.extra_generation_params.pop(key, None)
        try:
            active = self._prepare(p, tags, settings, t0)
            if active is not None and not refiner:
                self._host.follow(p)
        except Exception as error:
            active = None
            self._tell(p, _sentence_of(error), REFINER_WITHOUT if refiner else "")
        self._active = active
        self.attach(p)

    def tell(self, p: Any, sentence: str) -> None:
        """Tells the person who generates ``p``."""
        self._report_of(p).note(p, sentence)

    def attach(self, p: Any) -> None:
        """Puts the active pair last among the host's LoRAs, or takes it out if ``p`` has none.

        Called again after ``<lora:>``'s own activation, which begins a new list.
        """
        active = self._active
        self._predict_once()
        if active is None or active.processing() is not p:
            self._attempt(p, self._host.detach)
            return
        self._applying = True
        self._attempt(p, lambda: self._attach(active))

    def settle(self, p: Any) -> None:
        """Other extensions have had their say on the LoRAs of generation ``p``: before text is
        encoded, and before each pass."""
        active = self._active
        if active is not None and active.processing() is p:
            self._attempt(p, lambda: self._host.settle(active.fusion))

    def before_model_call(self, read_pass: Callable[[], Pass]) -> None:
        """Gives every layer the LoRA that the plan has for this step. What ``read_pass`` raises,
        because the host is not as expected, ends K-LoRA for this generation like any failure."""
        active = self._active
        if active is None:
            return
        self._applying = True
        active.calls = 0
        self._attempt(active.processing(), lambda: self._follow_plan(active, read_pass()))

    def after_model_call(self) -> None:
        """Ends K-LoRA, as any failure does, if the host could not apply what was chosen."""
        active = self._active
        if active is not None and self._attempt(active.processing(), lambda: self._check(active)):
            active.calls = None
            self._applying = False

    def finish(self, p: Any) -> None:
        """A batch of ``p`` is sampled. Where the sampler made no step (DDIM, told to make one), its
        pictures do not have what their parameter says."""
        active = self._active
        if active is None or active.processing() is not p:
            return
        self._predict_once()
        if not self._has_sampled:
            p.extra_generation_params.pop(infotext.KEY, None)

    def text_state(self, p: Any) -> tuple | None:
        """What encoded text depends on beside the prompt while generation ``p`` is prepared, as
        values that can be compared; None without K-LoRA."""
        active = self._active
        return active.text if active is not None and active.processing() is p else None

    def hashes(self, p: Any) -> dict[str, str]:
        """Name → short hash of the files that generation ``p`` is prepared with."""
        active = self._active
        if active is None or active.processing() is not p:
            return {}
        return {entry.name: entry.short_hash for entry in active.loaded.on_disk.values()}

    def is_sampling(self, p: Any) -> bool:
        """Whether a pass of ``p`` is under way with K-LoRA: then a refiner takes it over."""
        return self._sampling is not None and self._sampling.is_of(p)

    def begin(self, p: Any) -> None:
        """Generation ``p`` begins: what an earlier one has left is taken back."""
        self._reports = [entry for entry in self._reports if entry[0]() is not p]
        self._sampling = self._given_up = None
        self.detach()
        if self._applying:
            self._loader.forget_fusions()
            self._host.recover()
            self._applying = False

    def detach(self) -> None:
        """Takes K-LoRA out of the host: before every generation, and when the page reloads."""
        self._active = None
        self._predict_once()
        self._host.detach()

    def forget_other_models(self) -> None:
        """Lets go of what was read for a checkpoint that is no longer the host's."""
        self._loader.forget_other_models()

    # -- what the page asks ------------------------------------------------------------------------

    def report(self, p: Any) -> Report | None:
        """What has been done for generation ``p``; None if that was long ago."""
        return next((report for of, report in self._reports if of() is p), None)

    def preview(
        self,
        tags: Sequence[Sequence[str]],
        settings: Settings,
        steps: int,
        t0: float = 0.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Report:
        """The choice that a generation of ``steps`` steps from progress ``t0`` would make; nothing
        is applied. The caller ensures that no generation runs meanwhile.

        Raises KLoraError where the generation would be made without K-LoRA.
        """
        request = parse_tags(tags) or named_pair(settings)
        if request is None:
            raise KLoraError(
                "No LoRAs are given: choose a content and a style LoRA, or write two "
                "<klora:NAME> tags."
            )
        report = Report()
        if tags and (settings.content or settings.style):
            report.notes.append(_TAGS_WIN)
        on_disk = self._loader.find(request)
        self._host.prepare_model()
        loaded = self._loader.load(on_disk, settings, progress=progress)
        report.notes += loaded.notes
        plan = make_plan(loaded.pair, loaded.scores, settings, steps, t0)
        report.show(PassReport((request.content.name, request.style.name), loaded.pair, plan))
        return report

    # -- request → pair → fusion ------------------------------------------------------------------

    def _prepare(
        self, p: Any, tags: Sequence[Sequence[str]], settings: Settings | KLoraError, t0: float
    ) -> _Active | None:
        hires = getattr(p, "is_hr_pass", False)
        if isinstance(settings, KLoraError):
            raise settings
        if tags and (settings.content or settings.style):
            self._report.note(p, _TAGS_WIN)
        request = parse_tags(tags)
        if request is None and not (hires and prompts_have_tags(p)):
            request = named_pair(settings)  # the first pass's tags go first in the hires pass too
        if request is None:
            if settings.enabled and not job_has_tags(p):
                raise KLoraError(
                    "K-LoRA is switched on, but no LoRAs are given: write two <klora:NAME> tags, "
                    "or name a content and a style LoRA."
                )
            return None
        on_disk = self._loader.find(request)
        # The hosts prepare both passes in turn, and the hires pass may have a pair of its own.
        pairs_kept = 2 if getattr(p, "enable_hr", False) else 1
        loaded = self._loader.load(on_disk, settings, pairs_kept)
        for note in loaded.notes:
            self._report.note(p, note)
        te = settings.with_text_encoder
        active = _Active(
            settings,
            (request.content.name, request.style.name),
            loaded,
            self._loader.fusion(request, loaded, settings),
            tuple((on_disk[tag.role].version, te and tag.te) for tag in request.in_order()),
            settings.start(t0),
            weakref.ref(p),
            getattr(p, "iteration", 0),
        )
        active.plan_for(1, active.t0)  # here, where an error in the pair is reported
        if not hires or infotext.KEY not in p.extra_generation_params:
            written = replace(settings, content="", style="") if tags else settings
            p.extra_generation_params[infotext.KEY] = infotext.write(
                written, (on_disk[CONTENT].short_hash, on_disk[STYLE].short_hash)
            )
        return active

    def _has_given_up(self, p: Any) -> bool:
        """Whether K-LoRA has ended in the pass of ``p`` that is under way."""
        return self._given_up is not None and self._given_up.is_of(p)

    # -- steps, and what may fail in them ----------------------------------------------------------

    def _attach(self, active: _Active) -> None:
        self._host.attach(active.fusion, active.choice(active.plan_for(1, active.t0).row(0)))
        if active.predicts_apart:
            self._two = TwoPredictions(self._host.network(), lambda: self._take_turns(active))

    def _take_turns(self, active: _Active) -> bool | None:
        """One LoRA has predicted: gives the network the other, as ``TwoPredictions`` asks. What
        calls it outside of a step has nothing to do with the plan."""
        if active is not self._active or active.calls is None:
            return None
        active.calls += 1

        def turn() -> None:
            self._host.check(active.fusion)
            active.turn = STYLE if active.turn == CONTENT else CONTENT
            self._select(active)

        return self._attempt(active.processing(), turn)

    def _predict_once(self) -> None:
        if self._two is not None:
            self._two.remove()
            self._two = None

    def _select(self, active: _Active) -> None:
        at = active.at
        plan = active.plan_for(at.steps, active.settings.start(at.t0))
        self._host.select(active.fusion, active.choice(plan.row(at.finished_steps)))

    def _check(self, active: _Active) -> None:
        """Raises KLoraError if a model call was not what it was said to be."""
        self._host.check(active.fusion)
        if active.predicts_apart and not active.calls:
            raise KLoraError(
                f"{active.settings.method} needs two predictions in each step, and another "
                f"extension calls the model in a way of its own: switch that extension off, or "
                f"choose another method."
            )

    def _follow_plan(self, active: _Active, at: Pass) -> None:
        """Gives every layer what the plan has for this step, and puts the plan into the report."""
        active.at = at
        self._select(active)
        plan = active.plan
        if active.shown is None or active.shown.plan is not plan:
            self._sampling = _PassKey(active.processing, active.iteration, at.hires)
            self._has_sampled = True
            active.shown = PassReport(active.names, active.loaded.pair, plan, at.hires)
            self._report.show(active.shown)

    def _attempt(self, p: Any, work: Callable[[], None]) -> bool:
        """Whether ``work`` succeeded. If not, K-LoRA ends in this pass of ``p``, and says why."""
        try:
            work()
            return True
        except Exception as error:
            sentence = _sentence_of(error)
        except BaseException:
            self._give_up(p)
            raise
        # Not before the error is gone, because it holds the tensors of the calls that failed, and
        # taking K-LoRA back needs memory too.
        if self._active is not None:
            self._report.hide(self._active.shown)
            sentence += _steps_before(self._active.at)
        self._tell(p, sentence)
        self._give_up(p)
        return False

    def _give_up(self, p: Any) -> None:
        """After something went wrong with a fusion: what it has applied is not known any more."""
        if p is not None:
            self._given_up = _PassKey.present(p)
        self._active = None
        self._predict_once()
        self._loader.forget_fusions()
        self._host.abandon()

    # -- report and messages ----------------------------------------------------------------------

    def _report_of(self, p: Any) -> Report:
        report = self.report(p)
        if report is None:
            report = Report()
            self._reports = [*self._reports, (weakref.ref(p), report)][-_REPORTS_KEPT:]
        return report

    def _tell(self, p: Any, sentence: str, part: str = "") -> None:
        """Tells that ``p`` is without K-LoRA, but for ``part`` of it."""
        self._on_error(sentence)
        self._report.fail(p, sentence, part)


def _steps_before(at: Pass | None) -> str:
    """What is to be said beside an error in a step."""
    if at is None or not at.finished_steps:
        return ""
    return f" It ended in step {at.finished_steps + 1} of {at.steps}: the steps before have K-LoRA."


def _sentence_of(error: Exception) -> str:
    """What the person is told of an error; the log has all of one that is not the person's."""
    if isinstance(error, KLoraError):
        return str(error)
    log.error(traceback.format_exc().rstrip())
    if is_full_memory(error):
        return (
            "Memory is full, so the picture is made without K-LoRA: choose a smaller size, or "
            "make room, and generate again."
        )
    return (
        f"K-LoRA failed ({type(error).__name__}: {error}); the picture is made without it. "
        f"Please report this with the lines above in the WebUI's log."
    )


def prompts_have_tags(p: Any) -> bool:
    """Whether any of a generation's prompts has our tags; each pass is activated by itself."""
    prompts = ("extra_network_data", "hr_extra_network_data")
    return any("klora" in (getattr(p, name, None) or ()) for name in prompts)


def job_has_tags(p: Any) -> bool:
    """The same of the whole job that makes generation ``p``: all of its batches, and what the
    script of the page's list that runs it was told (the values of a plot, a list of prompts)."""
    prompts = (getattr(p, name, None) or () for name in ("all_prompts", "all_hr_prompts"))
    texts = chain(*prompts, _told_to_script(p))
    return prompts_have_tags(p) or any(isinstance(x, str) and "<klora:" in x for x in texts)


def _told_to_script(p: Any) -> Sequence[Any]:
    """The arguments of the script that was chosen; the first of all is its number, from 1 on."""
    args, runner = getattr(p, "script_args", None), getattr(p, "scripts", None)
    scripts = getattr(runner, "selectable_scripts", None) or ()
    if not isinstance(args, (list, tuple)) or not args or not isinstance(args[0], int):
        return ()
    if not 1 <= args[0] <= len(scripts):
        return ()
    script = scripts[args[0] - 1]
    return args[script.args_from : script.args_to]


def named_pair(settings: Settings) -> TagPair | None:
    """The pair that the settings name instead of tags."""
    if not settings.content and not settings.style:
        return None
    if not settings.content or not settings.style:
        given, missing = (CONTENT, STYLE) if settings.content else (STYLE, CONTENT)
        raise KLoraError(
            f"K-LoRA has a {given} LoRA but no {missing} LoRA: name both, or neither and write "
            f"two <klora:…> tags."
        )
    weights = settings.content_weight, settings.style_weight
    return pair_tags(
        Tag(settings.content, weights[0], weights[0], CONTENT),
        Tag(settings.style, weights[1], weights[1], STYLE),
    )
