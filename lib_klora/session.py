"""One generation: tags and settings → pair → plan → host.

The session follows the host's own LoRA activation: whatever makes the host activate its
``<lora:>`` tags (each batch, hires, the refiner, a nested generation) comes through ``activate``,
and the next activation without tags takes everything back. Nothing depends on a callback that an
interrupted or failed generation would skip.
"""

from __future__ import annotations

import os
import traceback
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import infotext
from .errors import KLoraError, get_log, is_full_memory
from .hosts import Fusion, Host, HostLora, OnDisk
from .layer_names import is_attention
from .lora_file import LoraFile, parse_lora
from .methods import METHODS
from .pair import Pair, pair_files
from .plan import Plan, make_plan
from .score_cache import ScoreCache, file_sha256
from .scores import Scores, compute_scores
from .settings import Settings
from .steps import finished_steps
from .tag import CONTENT, ROLES, STYLE, Tag, TagPair, pair_tags, parse_tags
from .tensor_file import or_refusal

log = get_log()

_TAGS_WIN = "The prompt's <klora:…> tags are used, not the LoRAs named beside them."
_HIRES_WITHOUT = "The first pass has K-LoRA, the hires pass has not."
_REFINER_WITHOUT = "The steps before the refiner have K-LoRA, the refiner's have not."
_REPORTS_KEPT = 4
_FUSIONS_KEPT = 4
"""Fusions only point at files that are kept anyway; a hires pass may alternate between two."""


@dataclass(frozen=True)
class Pass:
    """One sampling pass as the step callback sees it.

    Attributes:
        call: model calls so far; steps: N; calls_expected, sampler: see ``steps``.
        t0: progress at which the pass starts.
        hires: whether it is a hires pass.
    """

    call: int
    steps: int
    calls_expected: int
    sampler: str
    t0: float
    hires: bool = False


@dataclass(frozen=True)
class PassReport:
    """One kind of sampling pass of a generation.

    Attributes:
        names: of the content and the style LoRA.
        pair, plan: what was chosen from, and how.
        hires: whether it is a hires pass.
    """

    names: tuple[str, str]
    pair: Pair
    plan: Plan
    hires: bool = False

    def is_like(self, other: PassReport) -> bool:
        """Whether a person would see the same: each image of a batch count has a pass of its
        own."""
        return (self.names, self.hires) == (other.names, other.hires) and self.plan.is_like(
            other.plan
        )


@dataclass(eq=False)
class Report:
    """What one generation did, or a preview would do: what the page shows.

    Attributes:
        passes: one for each kind of sampling pass so far.
        notes: sentences that were told; ``error`` is the one that means “without K-LoRA”, at least
            for one pass.
    """

    passes: list[PassReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def has_picture_without(self) -> bool:
        """Whether one image of a batch count has K-LoRA and another has none of it."""
        parts = {_HIRES_WITHOUT, _REFINER_WITHOUT}
        return bool(self.passes and self.error) and parts.isdisjoint(self.notes)


@dataclass(eq=False)
class _Active:
    """The K-LoRA that the host has now."""

    settings: Settings
    names: tuple[str, str]
    pair: Pair
    scores: Scores | None
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
    plan_key: tuple | None = None
    plan: Plan | None = None

    def plan_for(self, steps: int, t0: float) -> Plan:
        if self.plan_key != (steps, t0):
            self.plan = make_plan(self.pair, self.scores, self.settings, steps, t0)
            self.plan_key = (steps, t0)
        return self.plan


class Session:
    """K-LoRA in one WebUI process; ``host`` does the applying.

    The pair stays in memory between generations, as the host keeps its own LoRAs. ``on_error`` gets
    every sentence that means “without K-LoRA”, of whichever generation.
    """

    def __init__(self, host: Host, on_error: Callable[[str], None] = lambda sentence: None) -> None:
        self._host = host
        self._on_error = on_error
        self._active: _Active | None = None
        self._model: Any = lambda: None
        self._report = Report()
        self._applying = False
        """Whether the host may be applying a fusion: from ``attach`` on, and in each model call.
        If it still may when a generation begins, the last one has ended in the middle of it."""
        self._given_up: tuple[Any, int, bool] = (lambda: None, 0, False)
        """The pass that K-LoRA has ended in: weak reference to its generation, which batch of it,
        whether hires."""
        self._reports: list[tuple[weakref.ref, Report]] = []
        """Of the latest generations: one may run within another."""
        self._loras: dict[tuple, HostLora] = {}
        self._pairs: dict[tuple, tuple[Pair, Scores | None, list[str]]] = {}
        self._fusions: dict[tuple, Fusion] = {}
        self._hashes: dict[tuple, str] = {}
        self._in_use: list[set] = []
        """Versions of the files of the latest pairs, the last one at the end."""
        self.score_cache = ScoreCache(host.cache_folder())

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
        if self._has_given_up(p):  # a refiner takes the pass over, whose error stays
            self.attach(p)
            return
        refiner = self._is_sampling(p)
        self._report = self._report_of(p)
        if not (refiner or getattr(p, "is_hr_pass", False)):
            for key in (infotext.KEY, infotext.ERROR_KEY):
                p.extra_generation_params.pop(key, None)
        try:
            active = self._prepare(p, tags, settings, t0)
        except KLoraError as error:
            self._tell(p, str(error), _REFINER_WITHOUT if refiner else "")
        except Exception as error:
            self._tell_unexpected(p, error)
        self._active = active
        self.attach(p)

    def attach(self, p: Any) -> None:
        """Puts the active pair last among the host's LoRAs, or takes it out if ``p`` has none.

        Called again after ``<lora:>``'s own activation, which begins a new list.
        """
        active = self._active
        try:
            if active is None or active.processing() is not p:
                self._host.detach()
            else:
                self._applying = True
                self._host.attach(active.fusion, active.plan_for(1, active.t0).row(0))
        except Exception as error:
            self._tell_unexpected(p, error)
            self._give_up(p)

    def before_model_call(self, read_pass: Callable[[], Pass]) -> None:
        """Gives every layer the LoRA that the plan has for this step. What ``read_pass`` raises,
        because the host is not as expected, ends K-LoRA for this generation like any failure."""
        active = self._active
        if active is None:
            return
        self._applying = True
        try:
            at = read_pass()
            t0 = active.settings.start(at.t0)
            step = finished_steps(at.call, at.steps, at.calls_expected, at.sampler)
            plan = active.plan_for(at.steps, t0)
            self._host.select(active.fusion, plan.row(step))
            self._show(active, plan, at.hires)
        except KLoraError as error:
            self._end(active, error)
        except Exception as error:
            self._hide(active)
            self._tell_unexpected(active.processing(), error)
            self._give_up(active.processing())
        except BaseException:
            self._give_up(active.processing())
            raise

    def after_model_call(self) -> None:
        """Where the host could not apply what was chosen, K-LoRA ends as after any failure."""
        active = self._active
        if active is None:
            return
        try:
            self._host.check(active.fusion)
        except KLoraError as error:
            self._end(active, error)
        else:
            self._applying = False

    def text_state(self, p: Any) -> tuple | None:
        """What encoded text depends on beside the prompt while generation ``p`` is prepared, as
        values that can be compared; None without K-LoRA."""
        active = self._active
        return active.text if active is not None and active.processing() is p else None

    def begin(self, p: Any) -> None:
        """Generation ``p`` begins: what an earlier one has left is taken back."""
        self._reports = [entry for entry in self._reports if entry[0]() is not p]
        self._given_up = (lambda: None, 0, False)
        self.detach()
        if self._applying:
            self._fusions.clear()
            self._host.recover()
            self._applying = False

    def detach(self) -> None:
        """Takes K-LoRA out of the host: before every generation, and when the page reloads."""
        self._active = None
        self._host.detach()

    def forget_other_models(self) -> None:
        """Lets go of what was read for a checkpoint that is no longer the host's."""
        if (self._loras or self._fusions) and self._model() is not self._host.model():
            self._loras.clear()
            self._fusions.clear()

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
    ) -> tuple[Report, Scores | None]:
        """The choice that a generation of ``steps`` steps from progress ``t0`` would make, and the
        scores if the method needs them; nothing is applied. The caller sees to it that no
        generation runs meanwhile.

        Raises KLoraError where the generation would be made without K-LoRA.
        """
        request = parse_tags(tags) or _named_pair(settings)
        if request is None:
            raise KLoraError(
                "No LoRAs are given: choose a content and a style LoRA, or write two "
                "<klora:NAME> tags."
            )
        report = Report()
        if tags and (settings.content or settings.style):
            report.notes.append(_TAGS_WIN)
        on_disk = {CONTENT: self._find(request.content), STYLE: self._find(request.style)}
        self._host.prepare_model()
        self.forget_other_models()
        self._model = weakref.ref(self._host.model())
        self._keep_only({entry.version for entry in on_disk.values()})
        _, pair, scores, notes = self._load(on_disk, settings, progress)
        report.notes += notes
        plan = make_plan(pair, scores, settings, steps, t0)
        report.passes.append(PassReport((request.content.name, request.style.name), pair, plan))
        return report, scores

    # -- request → pair → fusion ------------------------------------------------------------------

    def _prepare(
        self, p: Any, tags: Sequence[Sequence[str]], settings: Settings | KLoraError, t0: float
    ) -> _Active | None:
        hires = getattr(p, "is_hr_pass", False)
        if isinstance(settings, KLoraError):
            raise settings
        request = parse_tags(tags)
        if request is None and not (hires and prompts_have_tags(p)):
            request = _named_pair(settings)  # the first pass's tags go first in the hires pass too
        if request is None:
            if settings.enabled and not prompts_have_tags(p):
                raise KLoraError(
                    "K-LoRA is switched on, but no LoRAs are given: write two <klora:NAME> tags, "
                    "or name a content and a style LoRA."
                )
            return None
        if tags and (settings.content or settings.style):
            self._note(p, _TAGS_WIN)
        on_disk = {CONTENT: self._find(request.content), STYLE: self._find(request.style)}
        self.forget_other_models()
        self._model = weakref.ref(self._host.model())
        self._evict(p, {entry.version for entry in on_disk.values()})
        loras, pair, scores, notes = self._load(on_disk, settings)
        for note in notes:
            self._note(p, note)
        fusion = self._fuse(request, on_disk, loras, pair, settings)
        te = settings.text_encoder
        active = _Active(
            settings,
            (request.content.name, request.style.name),
            pair,
            scores,
            fusion,
            tuple((on_disk[tag.role].version, te and tag.te) for tag in request.in_order()),
            settings.start(t0),
            weakref.ref(p),
            getattr(p, "iteration", 0),
        )
        active.plan_for(1, active.t0)  # here, where what is wrong with a pair becomes a sentence
        if not hires or infotext.KEY not in p.extra_generation_params:
            written = replace(settings, content="", style="") if tags else settings
            p.extra_generation_params[infotext.KEY] = infotext.write(
                written, (on_disk[CONTENT].short_hash, on_disk[STYLE].short_hash)
            )
        return active

    def _is_sampling(self, p: Any) -> bool:
        """Whether a pass of ``p`` is under way with K-LoRA: then a refiner takes it over."""
        active = self._active
        return (
            active is not None
            and active.shown is not None
            and _is_in(p, active.processing, active.iteration, active.shown.hires)
        )

    def _has_given_up(self, p: Any) -> bool:
        """Whether K-LoRA has ended in the pass of ``p`` that is under way."""
        return _is_in(p, *self._given_up)

    def _find(self, tag: Tag) -> OnDisk:
        entry = self._host.find(tag.name)
        if entry is None:
            raise KLoraError(
                f"There is no LoRA “{tag.name}”: check the spelling against the Lora tab, and "
                f"press Refresh there if the file is new."
            )
        return entry

    def _evict(self, p: Any, wanted: set) -> None:
        """Keeps the files of the latest pair; of the latest two where there is a hires pass, which
        may have its own, because the hosts prepare both passes in turn."""
        kept = 2 if getattr(p, "enable_hr", False) else 1
        self._in_use = [*(files for files in self._in_use if files != wanted), wanted][-kept:]
        self._keep_only(set().union(*self._in_use))

    def _keep_only(self, wanted: set) -> None:
        for cache, versions in ((self._loras, 1), (self._pairs, 2), (self._fusions, 2)):
            for key in [key for key in cache if not wanted.issuperset(key[:versions])]:
                del cache[key]

    def _load(
        self,
        on_disk: dict[str, OnDisk],
        settings: Settings,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[dict[str, HostLora], Pair, Scores | None, list[str]]:
        """Both files in the host's form, their scores if the method needs them, and what to tell;
        from memory where possible."""
        versions = tuple(on_disk[role].version for role in ROLES)
        pair_key = (*versions, settings.layers, settings.top_k, settings.unpaired, self._model)
        needs_scores = METHODS[settings.method].needs_scores
        known = self._pairs.get(pair_key)
        if known is not None and known[1] is None and needs_scores:
            known = None
        loras, files, notes_on = {}, {}, {}
        # A host that keeps copies has a file twice while it reads it: the larger one first, then.
        for role in sorted(ROLES, key=lambda role: -os.path.getsize(on_disk[role].path)):
            # One file in both roles is read twice: the host's record of it holds one weight.
            key = (on_disk[role].version, role == STYLE and versions[0] == versions[1])
            lora = self._loras.get(key)
            if lora is None or known is None:
                tensors = self._host.read(on_disk[role])
                file = parse_lora(on_disk[role].name, tensors)
                tensors.release()
                lora = lora or self._host.load(on_disk[role], tensors)
                files[role], notes_on[role] = self._fitting(file, lora, settings.layers)
            loras[role] = self._loras[key] = lora
        if known is None:
            notes = [note for role in ROLES for note in notes_on[role]]
            pair = pair_files(
                files[CONTENT],
                files[STYLE],
                layers=settings.layers,
                top_k=settings.top_k,
                unpaired=settings.unpaired,
            )
            scores = None
            if needs_scores:
                scores = compute_scores(
                    pair,
                    self._host.device(),
                    progress=progress or self._host.show_progress,
                    cache=self.score_cache,
                    sha256=tuple(self._sha256(on_disk[role]) for role in ROLES),
                )
            for note in pair.notes:
                log.info(note)
            known = self._pairs[pair_key] = (pair.without_tensors(), scores, notes)
        return loras, *known

    def _sha256(self, on_disk: OnDisk) -> str:
        """Of the whole file: the hosts' own hash leaves out its header, which names the layers."""
        if on_disk.version not in self._hashes:
            self._hashes[on_disk.version] = or_refusal(on_disk.path, file_sha256, on_disk.path)
        return self._hashes[on_disk.version]

    def _fitting(self, file: LoraFile, lora: HostLora, layers: str) -> tuple[LoraFile, list[str]]:
        """The file without those layers in scope that the host cannot apply to the present model,
        and what to tell."""
        notes = []
        scope = [name for name in file.layers if layers == "all" or is_attention(name)]
        fitting = {}
        for name in scope:
            shape, layer = lora.shapes.get(name), file.layers[name]
            if shape and shape[0] == layer.shape[0] and torch.Size(shape).numel() == layer.entries:
                fitting[name] = layer
        missing = [file.layers[name].prefix for name in scope if name not in fitting]
        if len(missing) > len(fitting):
            raise KLoraError(
                f"“{file.name}” does not fit this model: {len(missing)} of its {len(scope)} layers "
                f"(such as {missing[0]}) have no counterpart that {self._host.name} can apply them "
                f"to. It was made for another kind of model, or its layer names are in a spelling "
                f"that {self._host.name} does not read: choose another file or checkpoint."
            )
        if missing:
            notes.append(_left_out(file, missing, "does not fit", "do not fit", "this model"))
        if file.unread:
            what = "of a type that K-LoRA cannot compare"
            notes.append(_left_out(file, file.unread, "is", "are", what))
        others = {name: file.layers[name] for name in file.layers.keys() - set(scope)}
        return replace(file, layers=others | fitting), notes

    def _fuse(
        self,
        request: TagPair,
        on_disk: dict[str, OnDisk],
        loras: dict[str, HostLora],
        pair: Pair,
        settings: Settings,
    ) -> Fusion:
        versions = tuple(on_disk[role].version for role in ROLES)
        key = (*versions, request, settings.layers, settings.unpaired, settings.text_encoder)
        fusion = self._fusions.pop(key, None)
        if fusion is None:
            fusion = self._host.fuse(request, loras, pair, settings.text_encoder)
        self._fusions[key] = fusion  # last in, so that the oldest goes first
        while len(self._fusions) > _FUSIONS_KEPT:
            del self._fusions[next(iter(self._fusions))]
        return fusion

    def _end(self, active: _Active, error: KLoraError) -> None:
        """After a choice that the host could not apply."""
        self._hide(active)
        self._tell(active.processing(), str(error))
        self._give_up(active.processing())

    def _give_up(self, p: Any) -> None:
        """After something went wrong with a fusion: what it has applied is not known any more."""
        if p is not None:
            hires = getattr(p, "is_hr_pass", False)
            self._given_up = weakref.ref(p), getattr(p, "iteration", 0), hires
        self._active = None
        self._fusions.clear()
        self._host.abandon()

    # -- report and messages ----------------------------------------------------------------------

    def _report_of(self, p: Any) -> Report:
        report = self.report(p)
        if report is None:
            report = Report()
            self._reports = [*self._reports, (weakref.ref(p), report)][-_REPORTS_KEPT:]
        return report

    def _show(self, active: _Active, plan: Plan, hires: bool) -> None:
        """Puts the plan that is being followed into the report, once."""
        if active.shown is not None and active.shown.plan is plan:
            return
        new = active.shown = PassReport(active.names, active.pair, plan, hires)
        if not any(new.is_like(known) for known in self._report.passes):
            self._report.passes.append(new)

    def _hide(self, active: _Active) -> None:
        """Takes a pass that was not completed out of the report again."""
        passes = self._report.passes
        self._report.passes = [known for known in passes if known is not active.shown]

    def _tell(self, p: Any, sentence: str, part: str = "") -> None:
        """Shows an error in the page, the picture's parameters and the log. ``part``: which part of
        the picture has K-LoRA all the same."""
        self._report.error = sentence
        self._on_error(sentence)
        self._note(p, sentence)
        if p is None:
            return
        parameters = p.extra_generation_params
        hires = getattr(p, "is_hr_pass", False)
        if not part and hires and any(not done.hires for done in self._report.passes):
            part = _HIRES_WITHOUT
        if part:
            # That part has what its parameter says.
            self._note(p, part)
            parameters[infotext.ERROR_KEY] = f"{sentence} {part}"
        else:
            parameters.pop(infotext.KEY, None)
            parameters[infotext.ERROR_KEY] = sentence

    def _note(self, p: Any, sentence: str) -> None:
        """Shows a sentence in the page and, once a generation, in the log."""
        comments = getattr(p, "comments", None)
        if comments is None or f"K-LoRA: {sentence}" not in comments:
            log.info(sentence)
        if p is not None:
            p.comment(f"K-LoRA: {sentence}")
        if sentence not in self._report.notes:
            self._report.notes.append(sentence)

    def _tell_unexpected(self, p: Any, error: Exception) -> None:
        log.error(traceback.format_exc().rstrip())
        if is_full_memory(error):
            self._tell(
                p,
                "Memory is full, so the picture is made without K-LoRA: choose a smaller size, or "
                "make room, and generate again.",
            )
            return
        self._tell(
            p,
            f"K-LoRA failed ({type(error).__name__}: {error}); the picture is made without it. "
            f"Please report this with the lines above in the WebUI's log.",
        )


def _left_out(file: LoraFile, prefixes: Sequence[str], one: str, more: str, why: str) -> str:
    """What to tell of these layers; ``one`` and ``more`` are the verb before ``why``."""
    such = f"of “{file.name}” (such as {prefixes[0]})"
    if len(prefixes) == 1:
        return f"1 layer {such} {one} {why} and is left out."
    return f"{len(prefixes)} layers {such} {more} {why} and are left out."


def _is_in(p: Any, processing: Callable[[], Any], iteration: int, hires: bool) -> bool:
    """Whether generation ``p`` is in this pass: of this generation and batch, hires or not."""
    return (
        processing() is p
        and iteration == getattr(p, "iteration", 0)
        and hires == getattr(p, "is_hr_pass", False)
    )


def prompts_have_tags(p: Any) -> bool:
    """Whether any of a generation's prompts has our tags; each pass is activated by itself."""
    prompts = ("extra_network_data", "hr_extra_network_data")
    return any("klora" in (getattr(p, name, None) or ()) for name in prompts)


def _named_pair(settings: Settings) -> TagPair | None:
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
