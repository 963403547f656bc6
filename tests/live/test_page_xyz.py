"""The X/Y/Z plot's K-LoRA axes."""

import json
import re

import numpy as np
import pytest
from kloras import PAIR, script, tags

LABELS = (
    "Method", "Scale S(t)", "α: slope", "β: start", "K multiplier", "γ: balance", "Layers",
    "Content weight", "Style weight", "Content LoRA", "Style LoRA",
    "Share at the start", "Share at the end",
)  # fmt: skip


def plot(webui, label, values, **fields):
    """A plot with one axis, through the API."""
    (info,) = [
        entry
        for entry in webui.get("/sdapi/v1/script-info")
        if entry["name"] == "x/y/z plot" and not entry["is_img2img"]
    ]
    args = [arg.get("value") for arg in info["args"]]
    choices = info["args"][0]["choices"]
    label = label if label in choices else f"[K-LoRA] {label}"
    args[0:3] = [choices.index(label), values, []]
    args[3:9] = [0, "", [], 0, "", []]  # no second and third axis
    for i, arg in enumerate(info["args"]):
        if "text inputs" in arg["label"] or "Include Sub Images" in arg["label"]:
            args[i] = True
    args = ["" if value is None else value for value in args]
    return webui.txt2img(script_name="x/y/z plot", script_args=args, **fields)


def test_the_axes_are_there(webui):
    listed = json.dumps(webui.get("/sdapi/v1/script-info"), ensure_ascii=False)
    for label in LABELS:
        assert listed.count(f"[K-LoRA] {label}") > 0, label


@pytest.mark.parametrize(
    ("label", "name", "values"),
    [
        ("α: slope", "alpha", [0, 4]),
        ("β: start", "beta", [0, 2]),
        ("Scale S(t)", "scale", ["S", "S*", "share", "none"]),
        ("K multiplier", "top_k", [1, 1000]),
        ("γ: balance", "gamma", ["paper", "authors"]),
        ("Layers", "layers", ["attention", "all"]),
    ],
)
def test_each_cell_is_the_picture_with_that_setting(webui, label, name, values):
    pair = dict(prompt=tags("sd15_content_all", "sd15_style_all"), steps=6)
    single = [webui.txt2img(**pair, alwayson_scripts=script(**{name: v})).sha for v in values]
    result = plot(webui, label, ",".join(map(str, values)), **pair)
    assert not result.error
    assert [sha for sha in single if sha in result.hashes] == single
    assert len(set(single)) == len(values)


def test_content_and_style(webui):
    for label, name in (("Content LoRA", "content"), ("Style LoRA", "style")):
        both = {"content": PAIR[0], "style": PAIR[1]}
        single = webui.txt2img(alwayson_scripts=script(**{**both, name: "sd15_other"}))
        result = plot(webui, label, f"{both[name]},sd15_other", alwayson_scripts=script(**both))
        assert single.sha in result.hashes
        assert any(f"{name}=sd15_other" in text for text in result.infotexts)


@pytest.mark.parametrize(
    ("label", "values", "word"),
    [
        ("α: slope", "1,-2", "alpha is -2.0"),
        ("Scale S(t)", "S,T", "scale is 'T'"),
        ("Content LoRA", "nowhere", "nowhere"),
        ("K multiplier", "0", "top_k"),
    ],
)
def test_a_wrong_value_is_told_before_the_first_image(webui, label, values, word):
    mark = webui.mark()
    result = plot(webui, label, values, alwayson_scripts=script(content=PAIR[0], style=PAIR[1]))
    log = webui.log_since(mark)
    assert result.error or not result.body.get("images")
    assert word in log or word in result.error
    assert not re.search(r"\d+/\d+ \[", log), "an image was begun"


def test_the_axes_of_the_pair_have_no_effect_beside_tags_and_say_so(webui):
    mark = webui.mark()
    result = plot(webui, "Content LoRA", PAIR[0], prompt=tags(*PAIR))
    assert "tags" in webui.log_since(mark) + result.error
    named = script(content=PAIR[0], style=PAIR[1])
    comment = plot(webui, "Content LoRA", PAIR[0], prompt="# <klora:x>", alwayson_scripts=named)
    assert not comment.error


def test_the_axis_of_the_scale_brings_the_beta_that_the_person_has_for_each(webui):
    options = {"klora_beta": 0.5, "klora_beta_s_star": 0.9}  # the first one is the paper's
    webui.post("/sdapi/v1/options", options)
    try:
        alone = plot(webui, "Scale S(t)", "S,S*", prompt=tags(*PAIR))
        papers = plot(webui, "Scale S(t)", "S,S*", prompt=tags(*PAIR), alwayson_scripts=script())
        given = plot(
            webui, "Scale S(t)", "S,S*", prompt=tags(*PAIR), alwayson_scripts=script(beta=0.6)
        )
    finally:
        webui.post("/sdapi/v1/options", {"klora_beta": 0.5, "klora_beta_s_star": 1.3})
    for result, first, second in (
        (alone, "K-LoRA: files", "beta=0.9; scale=S*; files"),
        (papers, "K-LoRA: files", "K-LoRA: scale=S*; files"),
        (given, "beta=0.6; files", "beta=0.6; scale=S*; files"),
    ):
        assert any(first in text for text in result.infotexts)
        assert any(second in text for text in result.infotexts)


def test_an_axis_without_any_pair_says_so(webui):
    result = plot(webui, "α: slope", "1,2")
    assert not result.error
    assert any("axis of K-LoRA, but no LoRAs are given" in text for text in result.infotexts)


def test_cells_without_tags_are_no_errors_where_others_have_them(webui):
    """Searched and replaced in the prompt, with the accordion on."""
    tagged = tags(*PAIR).removeprefix("a cat ")
    result = plot(
        webui, "Prompt S/R", f"HERE,{tagged}", prompt="a cat HERE", alwayson_scripts=script()
    )
    assert not result.error
    assert not any("K-LoRA error" in text for text in result.infotexts)
    assert any("K-LoRA: files=" in text for text in result.infotexts)


# by mouse and keyboard ----------------------------------------------------------------------------


class Plot:
    """The host's X/Y/Z plot in the page, chosen as the script."""

    def __init__(self, page):
        self.page = page
        self.place = page.page.locator("#txt2img_script_container")
        page.pick(self.place.locator("#script_list"), "X/Y/Z plot")
        self.part("x_type").wait_for(state="visible")

    def part(self, name):
        return self.place.locator(f"#script_txt2img_xyz_plot_{name}")

    def axis(self, label):
        """Chooses what the X axis changes."""
        self.page.pick(self.part("x_type"), f"[K-LoRA] {label}")
        self.page.wait_quiet()

    def fill(self):
        """Presses the button that offers every choice."""
        button = self.place.locator("#xyz_grid_fill_x_tool_button")
        button.wait_for(state="visible")
        button.click()
        self.place.locator(".token").first.wait_for(state="visible")

    def write(self, values):
        """Writes values, separated by commas."""
        field = self.part("x_values").locator("textarea, input").first
        field.fill(values)
        field.blur()


def cells(grid, count, size=64):
    """The labels above a grid of one row, and its images. Forge Neo folds a long row."""
    columns = min(count, grid.shape[1] // size)
    grid = np.concatenate(np.split(grid, count // columns), axis=1)
    height, width, _ = grid.shape
    left = width - count * size
    assert height > size, "there are no labels"
    row = grid[height - size :, left:]
    return grid[: height - size], [row[:, i * size : (i + 1) * size] for i in range(count)]


def ink(labels, count, size=64):
    """Whether something is written above each image, in letters of a few pixels."""
    left = labels.shape[1] - count * size
    columns = [labels[:, left + i * size : left + (i + 1) * size] for i in range(count)]
    return [bool((column < 200).any()) for column in columns]


def test_a_plot_with_every_choice_by_mouse(page):
    """Each cell is the image that the page makes with that choice in the accordion."""
    page.switch_on()
    page.set("alpha", 4)
    single = []
    for scale in ("S", "S*", "share", "none"):
        page.set("scale", scale)
        page.generate(tags(*PAIR), seed=7, until="" if scale == "S" else f"scale={scale}")
        single.append(page.image())
    assert len({image.tobytes() for image in single}) == 4
    page.set("scale", "S")
    plot = Plot(page)
    plot.axis("Scale S(t)")
    plot.fill()
    page.generate(seed=7, without="scale=")  # that of the first cell
    infotext = page.infotexts()[0]
    assert "X Type: [K-LoRA] Scale S(t)" in infotext
    assert 'X Values: "S,S*,share,none"' in infotext
    labels, found = cells(page.image(), 4)
    assert ink(labels, 4) == [True] * 4
    for scale, image, wanted in zip(("S", "S*", "share", "none"), found, single, strict=True):
        assert (image == wanted).all(), scale


def test_a_wrong_value_is_told_in_the_page_before_the_first_image(page, host):
    page.switch_on()
    page.prompt.fill(tags(*PAIR))
    plot = Plot(page)
    plot.axis("α: slope")
    plot.write("1, -2")
    before, mark = page.webui.last(), page.webui.mark()
    page.host("generate").click()
    log = page.page.locator("#html_log_txt2img .error")
    log.wait_for()
    shown = log.inner_text()
    if not host.can("errors in the page"):
        shown = page.webui.log_since(mark)
    assert "K-LoRA: alpha is -2.0: it must be a number from 0 to 1e+10." in shown
    assert page.webui.last() == before, "an image was begun"
    plot.write("1, 2")
    assert "alpha=1" in page.generate()
    assert 'X Values: "1, 2"' in page.infotexts()[0]
