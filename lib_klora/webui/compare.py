"""The script “K-LoRA: compare” of the page's list: the present prompt and pair in several ways."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import gradio as gr
from modules import errors, images, processing, scripts, shared
from PIL import Image

from .. import infotext
from ..errors import KLoraError
from ..methods import METHODS
from ..session import named_pair
from ..settings import SCALES
from ..tag import CONTENT, STYLE, Tag, TagPair, parse_tags
from ..texts import COMPARE, COMPARE_SEEDS, COMPARE_WAYS
from .extra_network import accordion_of
from .overrides import override
from .prompt import tags_of

_ALONE = {"Content alone": CONTENT, "Style alone": STYLE}
WAYS: Mapping[str, Mapping[str, str]] = {
    **{name: {} for name in _ALONE},
    "Direct merge": {"method": "Direct merge"},
    **{f"K-LoRA, {x}": {"method": "K-LoRA", "scale": x} for x in SCALES if x != "none"},
    **{name: {"method": name} for name in METHODS if name not in ("K-LoRA", "Direct merge")},
}
"""Name → the fields that it sets; everything else is as in the accordion."""
TICKED = tuple(WAYS)[:6]
MOST_SEEDS = 16
_TAG = re.compile(r"\s*<klora:[^>]*>")
_MARGIN = 4
"""Pixels between the pictures."""


class CompareScript(scripts.Script):
    """One picture for each way and seed, and a sheet of them all by the host's own grid."""

    def title(self) -> str:
        return COMPARE

    def show(self, is_img2img: bool) -> bool:
        return True

    def ui(self, is_img2img: bool) -> list:
        ways = gr.CheckboxGroup(
            list(WAYS), value=list(TICKED), label=COMPARE_WAYS, elem_id=self.elem_id("ways")
        )
        seeds = gr.Slider(
            1, MOST_SEEDS, value=1, step=1, label=COMPARE_SEEDS, elem_id=self.elem_id("seeds")
        )
        return [ways, seeds]

    def run(self, p: Any, ways: Sequence[str], seeds: float) -> Any:
        """Raises RuntimeError with a sentence, as X/Y/Z does, if something is missing."""
        try:
            ways, count = _checked(ways, seeds)
            pair, te = _pair_of(p)
            cells = [(way, _cell(p, way, pair, te)) for way in ways]
        except KLoraError as error:
            raise RuntimeError(f"K-LoRA: {error}") from error
        processing.fix_seed(p)
        made = _make(p, cells, count)
        if not made:
            return processing.Processed(p, [], p.seed, "")
        return _with_sheet(p, ways, made)


def _checked(ways: Any, seeds: Any) -> tuple[list[str], int]:
    known = ", ".join(WAYS)
    if not isinstance(ways, (list, tuple)) or not all(isinstance(way, str) for way in ways):
        raise KLoraError(f"the ways to compare must be a list of names: {known}.")
    unknown = [way for way in ways if way not in WAYS]
    if unknown:
        raise KLoraError(f"there is no way “{unknown[0]}” to compare: choose from {known}.")
    if not ways:
        raise KLoraError("no way to compare is ticked: tick at least one.")
    number = isinstance(seeds, (int, float)) and not isinstance(seeds, bool)
    if not number or seeds != seeds // 1 or not 1 <= seeds <= MOST_SEEDS:
        raise KLoraError(f"the number of seeds must be a whole number from 1 to {MOST_SEEDS}.")
    return [way for way in WAYS if way in ways], int(seeds)


def _pair_of(p: Any) -> tuple[TagPair, bool]:
    """The pair that the prompt or the accordion names, and whether the text encoder parts count."""
    tags = tags_of(str(p.prompt), p.styles or [])
    settings = accordion_of(p, bool(tags))
    pair = parse_tags(tags) or named_pair(settings)
    if pair is None:
        raise KLoraError(
            "there is nothing to compare, because no LoRAs are given: write two <klora:NAME> "
            "tags, or switch the accordion on and choose a content and a style LoRA."
        )
    return pair, settings.text_encoder


def _cell(p: Any, way: str, pair: TagPair, te: bool) -> Any:
    """The generation of one way."""
    cell = copy(p)
    cell.batch_size = cell.n_iter = 1
    cell.styles = list(p.styles or [])
    cell.extra_generation_params = dict(p.extra_generation_params)
    if way in _ALONE:
        _use_alone(cell, pair.content if _ALONE[way] == CONTENT else pair.style, te)
    else:
        override(cell, **WAYS[way])
    return cell


def _use_alone(cell: Any, tag: Tag, te: bool) -> None:
    """Puts a ``<lora:>`` tag in the place of the pair."""
    if re.search("[:<>]", tag.name):
        raise KLoraError(
            f"“{tag.name}” cannot stand in a <lora:…> tag, because of its name: rename the file, "
            f"or leave out the ways with one LoRA alone."
        )
    weights = dict.fromkeys((tag.te if te else 0.0, tag.unet))  # one if they are the same
    lora = f" <lora:{tag.name}:{':'.join(f'{x:g}' for x in weights)}>"
    styles = shared.prompt_styles
    cell.prompt = _TAG.sub("", styles.apply_styles_to_prompt(str(cell.prompt), cell.styles)) + lora
    cell.negative_prompt = styles.apply_negative_styles_to_prompt(
        str(cell.negative_prompt), cell.styles
    )
    cell.styles = []
    if getattr(cell, "hr_prompt", ""):
        cell.hr_prompt = _TAG.sub("", cell.hr_prompt) + lora
    override(cell, enabled=False, content="", style="")


def _make(p: Any, cells: list[tuple[str, Any]], count: int) -> dict[tuple[int, str], Any]:
    """(row, way) → what was made, until somebody interrupts it."""
    made: dict[tuple[int, str], Any] = {}
    total = len(cells) * count
    shared.state.job_count = total
    shared.total_tqdm.updateTotal(total * p.steps * (2 if getattr(p, "enable_hr", False) else 1))
    for row in range(count):
        for i, (way, of_way) in enumerate(cells):
            if shared.state.interrupted or getattr(shared.state, "stopping_generation", False):
                return made
            shared.state.job = f"{row * len(cells) + i + 1} out of {total}"
            cell = copy(of_way)
            cell.seed = p.seed + row
            cell.extra_generation_params = dict(of_way.extra_generation_params)
            try:
                done = processing.process_images(cell)
            except Exception as error:  # the others are kept, as in an X/Y/Z plot
                if row * len(cells) + i + 1 == total and not made:
                    raise
                errors.display(error, f"making “{way}” for {COMPARE}")
                continue
            if done.images:
                made[row, way] = (cell, done)
    return made


def _label(way: str, cells: list[Any]) -> list[Any]:
    """What stands above a column: also that a picture in it is without K-LoRA."""
    lines = [images.GridAnnotation(way)]
    if any(infotext.ERROR_KEY in cell.extra_generation_params for cell in cells):
        lines.append(images.GridAnnotation("(failed: without K-LoRA)"))
    return lines


def _with_sheet(p: Any, ways: list[str], made: dict[tuple[int, str], Any]) -> Any:
    """All pictures, behind a sheet of them."""
    rows = sorted({row for row, _ in made})
    ways = [way for way in ways if any((row, way) in made for row in rows)]
    first_cell, first = next(iter(made.values()))
    blank = Image.new("RGB", first.images[0].size, "white")
    pictures = [
        made[row, way][1].images[0] if (row, way) in made else blank for row in rows for way in ways
    ]
    width, height = (max(sizes) for sizes in zip(*(x.size for x in pictures), strict=True))
    seeds = [f"seed {p.seed + row}" if len(rows) > 1 else "" for row in rows]
    sheet = images.draw_grid_annotations(
        images.image_grid(pictures, rows=len(rows)),
        width,
        height,
        [_label(way, [made[at][0] for at in made if at[1] == way]) for way in ways],
        [[images.GridAnnotation(seed)] for seed in seeds],
        _MARGIN,
    )
    first_cell.extra_generation_params["Script"] = COMPARE
    first_cell.extra_generation_params["K-LoRA compared"] = ", ".join(ways)
    text = processing.create_infotext(
        first_cell, first_cell.all_prompts, first_cell.all_seeds, first_cell.all_subseeds
    )
    if shared.opts.grid_save:
        images.save_image(
            sheet, p.outpath_grids, "klora-compare", info=text, prompt=str(p.prompt), seed=p.seed,
            extension=shared.opts.grid_format, grid=True, p=p,
        )  # fmt: skip
    result = copy(first)
    found = [done for _, done in made.values()]
    result.images = [sheet, *(done.images[0] for done in found)]
    result.infotexts = [text, *(done.infotexts[0] for done in found)]
    result.all_prompts = [done.prompt for done in found]
    result.all_seeds = [done.seed for done in found]
    result.index_of_first_image = 1
    result.info = text
    return result
