"""What a generation or a preview did, as the page shows it: a sentence and the selection map."""

from __future__ import annotations

import base64
import html
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

from modules import shared
from PIL import Image

from .. import texts
from ..plot import describe, png, selection_map
from ..session import Report

_RUNS_KEPT = 8
HINT = (
    f'<p class="klora-status">{texts.HINT[0]} '
    f"<code>&lt;klora:subject&gt; &lt;klora:style&gt;</code> {texts.HINT[1]}</p>"
)


class Runs:
    """The latest generations' reports, by the host's time stamp of the job.

    The page asks for its own job, so two people at one WebUI do not see each other's map.
    """

    def __init__(self) -> None:
        self._reports: OrderedDict[str, Report] = OrderedDict()

    def add(self, job: str, report: Report) -> None:
        self._reports[job] = report
        self._reports.move_to_end(job)
        while len(self._reports) > _RUNS_KEPT:
            self._reports.popitem(last=False)

    def html_of(self, generation_info: str) -> str:
        """The page's text for a run, found by what the host tells the page of it."""
        try:
            job = json.loads(generation_info)["job_timestamp"]
        except (TypeError, ValueError, KeyError):
            return HINT
        report = self._reports.get(job)
        return HINT if report is None else to_html(report)


def to_html(report: Report) -> str:
    """The sentences of a report and its map or maps."""
    notes = [note for note in report.notes if note != report.error]
    parts = [_sentence(report.error, "klora-error")] if report.error else []
    if report.pair is not None and not report.error:
        content, style = report.names
        parts.append(_sentence(f"Subject “{content}”, style “{style}”.", "klora-done"))
    parts += [_sentence(note, "klora-note") for note in notes]
    if report.pair is not None and not report.error:
        for i, plan in enumerate(report.plans):
            words = ("Hires: " if i else "") + describe(plan, report.pair)
            source = base64.b64encode(png(selection_map(plan, report.pair))).decode()
            parts.append(_sentence(words, "klora-words"))
            parts.append(
                f'<img class="klora-map" alt="{html.escape(words, quote=True)}" '
                f'src="data:image/png;base64,{source}">'
            )
    return "".join(parts) or HINT


def error_html(sentence: str) -> str:
    """An error of the page itself, such as a preview that cannot be made."""
    return _sentence(sentence, "klora-error")


def keep_maps(processed: Any, report: Report) -> None:
    """Shows the maps of a generation among its images, or saves them beside the first of them, as
    the Settings page says."""
    append, save = (getattr(shared.opts, f"klora_{do}_map", False) for do in ("append", "save"))
    if report.pair is None or report.error or not (append or save):
        return
    for i, plan in enumerate(report.plans):
        picture = Image.fromarray(selection_map(plan, report.pair))
        saved = getattr(processed.images[0], "already_saved_as", None) if processed.images else None
        if saved and save:
            path = Path(saved)
            picture.save(path.with_name(f"{path.stem}-klora{'-hires' if i else ''}.png"))
        if append:
            processed.images.append(picture)
            processed.infotexts.append(describe(plan, report.pair))


def notes_html(notes: list[str]) -> str:
    """Warnings of the page itself; the hint if there are none."""
    return "".join(_sentence(note, "klora-note") for note in notes) or HINT


def _sentence(text: str, kind: str) -> str:
    return f'<p class="klora-status {kind}">{texts.to_html(text)}</p>'
