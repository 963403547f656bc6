"""What a generation or a preview did, as the page shows it: a sentence and the selection map."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules import shared

from .. import texts
from ..map_html import map_html
from ..picture import selection_map
from ..plot import SelectionMap, describe
from ..report import Report

_RUNS_KEPT = 8
HINT = (
    f'<p class="klora-status">{texts.HINT[0]} '
    f"<code>&lt;klora:subject&gt; &lt;klora:style&gt;</code> {texts.HINT[1]}</p>"
)


@dataclass
class _Run:
    started: float
    """When, by the host's clock: its time stamp of the job has whole seconds only."""
    report: Report | None = None
    """Of the generation that ended last."""
    errors: list[str] = field(default_factory=list)
    """Of all of its generations: a script makes several, a detailer one within another."""


class Runs:
    """What the latest jobs did, by the host's time stamp of the job.

    The page asks for its own job, so two people at one WebUI do not see each other's map.
    """

    def __init__(self) -> None:
        self._runs: OrderedDict[str, _Run] = OrderedDict()

    def add(self, report: Report) -> None:
        """A generation of the present job has ended."""
        self._present().report = report

    def add_error(self, sentence: str) -> None:
        """A generation of the present job is without K-LoRA. Kept for the job, because a detailer
        has no place where a person would see what its generations tell."""
        errors = self._present().errors
        if sentence not in errors:
            errors.append(sentence)

    def html_of(self, generation_info: str) -> str:
        """The page's text for a run, found by what the host tells the page of it."""
        try:
            job = json.loads(generation_info)["job_timestamp"]
        except (TypeError, ValueError, KeyError):
            return HINT
        run = self._runs.get(job)
        return HINT if run is None else to_html(run.report or Report(), run.errors)

    def _present(self) -> _Run:
        job, started = shared.state.job_timestamp, shared.state.time_start
        run = self._runs.get(job)
        if run is None or run.started != started:
            run = self._runs[job] = _Run(started)
        self._runs.move_to_end(job)
        while len(self._runs) > _RUNS_KEPT:
            self._runs.popitem(last=False)
        return run


def to_html(report: Report, errors: Sequence[str] = ()) -> str:
    """The sentences of a report, and the map of each of its passes. ``errors``: of all generations
    of the job, which may be more than the one that is reported."""
    notes = [note for note in report.notes if note != report.error]
    others = [error for error in errors if error not in report.notes]
    if (others and report.passes) or report.has_picture_without:
        notes.insert(0, texts.NOT_EVERY)
    parts = [_sentence(error, "klora-error") for error in (report.error, *others) if error]
    names = [done.names for done in report.passes]
    if names:
        parts.append(_pair_sentence(names[0]))
    parts += [_sentence(note, "klora-note") for note in notes]
    for i, done in enumerate(report.passes):
        if i and names[i] != names[i - 1]:
            parts.append(_pair_sentence(names[i]))
        words = ("Hires: " if done.hires else "") + describe(done.plan, done.pair)
        parts.append(_sentence(words, "klora-words"))
        parts.append(map_html(SelectionMap.of(done.plan, done.pair), words))
    return "".join(parts) or HINT


def error_html(sentence: str) -> str:
    """An error of the page itself, such as a preview that cannot be made."""
    return _sentence(sentence, "klora-error")


def keep_maps(p: Any, processed: Any, report: Report) -> None:
    """Shows the maps of a generation after its images, or saves them beside the first of them, as
    the Settings page says."""
    append, save = (getattr(shared.opts, f"klora_{do}_map", False) for do in ("append", "save"))
    append = append and not _is_within_script(p)
    images, first = processed.images, processed.index_of_first_image
    if not (append or save) or first >= len(images):
        return
    saved = getattr(images[first], "already_saved_as", None)
    stems: Counter[str] = Counter()
    for done in report.passes:
        picture = selection_map(done.plan, done.pair)
        if saved and save:
            path = Path(saved)
            stem = f"{path.stem}-klora{'-hires' if done.hires else ''}"
            stems[stem] += 1
            number = f"-{stems[stem]}" if stems[stem] > 1 else ""
            picture.save(path.with_name(f"{stem}{number}.png"))
        if append:
            images.append(picture)
            # What the host's Save button asks of every picture, its seed for one.
            processed.infotexts.append(processed.infotexts[first])


def _is_within_script(p: Any) -> bool:
    """Whether a script of the page's list (SD upscale, prompt matrix …) is running: it takes every
    image of its generations for one that it has asked for. The first argument is its number."""
    args = getattr(p, "script_args", None)
    return bool(args and args[0])


def notes_html(notes: list[str]) -> str:
    """Warnings of the page itself; the hint if there are none."""
    return "".join(_sentence(note, "klora-note") for note in notes) or HINT


def _pair_sentence(names: tuple[str, str]) -> str:
    return _sentence(f"Subject “{names[0]}”, style “{names[1]}”.", "klora-done")


def _sentence(text: str, kind: str) -> str:
    return f'<p class="klora-status {kind}">{texts.to_html(text)}</p>'
