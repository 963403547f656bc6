"""The accordion: every control reaches the picture, the report says what was done."""

import re
import shutil
from contextlib import closing

import pytest
from browser import Page
from kloras import PAIR, tags

from lib_klora.settings import BY_NAME

VALUES = {
    "scale": "none",  # before β, because it brings its own
    "alpha": 2.5,
    "beta": 1.1,
    "method": "Without γ",
    "layers": "all",
    "gamma": "authors",
    "top_k": 3,
    "unpaired": "drop",
    "text_encoder": False,
    "progress": "restart",
    "seed": 11,
}
HIRES_VALUES = {"hires": "own", "hires_scale": "S*", "hires_alpha": 2, "hires_beta": 0.9}
SHARES = (  # the scale again, because its sliders are shown with it
    ("scale", "share"), ("share_start", 90), ("share_end", 20),
    ("hires_scale", "share"), ("hires_share_start", 80), ("hires_share_end", 10),
)  # fmt: skip
PAIR_VALUES = {"content": PAIR[0], "style": PAIR[1], "content_weight": 0.8, "style_weight": 0.6}


def test_no_control_is_forgotten_here():
    shares = {name for name, _ in SHARES}
    assert {*VALUES, *HIRES_VALUES, *shares, *PAIR_VALUES, "enabled"} == set(BY_NAME)


def written(infotext):
    """The `K-LoRA` parameter of an infotext, as {name: text}."""
    text = re.search(r'K-LoRA: "?([^,\n"]*)', infotext)
    return dict(part.split("=", 1) for part in text[1].split("; ")) if text else {}


def test_the_first_row_is_visible_and_the_rest_is_under_advanced(page):
    page.switch_on()
    for name in ("content", "content_weight", "style", "style_weight", "scale", "alpha", "beta"):
        assert page.part(name).is_visible(), name
    for name in ("layers", "gamma", "top_k", "unpaired", "text_encoder", "progress", "hires"):
        assert not page.part(name).is_visible(), name
    page.part("advanced").locator("> .label-wrap").click()
    page.page.wait_for_timeout(300)
    assert page.part("gamma").is_visible()
    assert page.value("content") == "None (use tags)"


def test_every_control_reaches_the_infotext(page):
    page.switch_on(advanced=True)
    plain = written(page.generate(tags(*PAIR)))
    assert list(plain) == ["files"]
    for name, value in {**VALUES, **HIRES_VALUES}.items():
        page.set(name, value)
        assert page.value(name) == value
        if name == "hires_scale":
            assert page.value("hires_beta") == 1.3  # until a hand writes another
    found = written(page.generate())
    del found["files"]
    assert found == {
        name: str(value).lower() if value is False else str(value)
        for name, value in {**VALUES, **HIRES_VALUES}.items()
    }
    for name, value in SHARES:
        page.set(name, value)
        assert page.value(name) == value
    changed = written(page.generate(until="share_end=20"))
    assert changed.pop("files")
    assert changed == {**found, **{name: str(value) for name, value in SHARES}}
    page.part("defaults").click()
    page.page.wait_for_timeout(1000)
    assert list(written(page.generate())) == ["files"]


def test_each_scale_has_its_own_sliders(page):
    def shown(*names):
        return [page.part(name).is_visible() for name in names]

    page.switch_on(advanced=True)
    for scale, of_share in (("S", False), ("share", True), ("S*", False), ("share", True)):
        page.set("scale", scale)
        page.page.wait_for_timeout(300)
        assert (
            shown("alpha", "beta", "share_start", "share_end")
            == [not of_share] * 2 + [of_share] * 2
        )
    beta = page.value("beta")
    page.paste("a cat\nSteps: 4, Seed: 1, K-LoRA: alpha=3")
    assert shown("alpha", "share_start") == [True, False]
    page.set("scale", "share")
    assert page.value("beta") == 0.5, f"the scale share has none ({beta})"
    assert shown("hires_alpha", "hires_share_end") == [True, False]
    page.set("hires_scale", "share")
    page.page.wait_for_timeout(300)
    assert shown("hires_alpha", "hires_beta", "hires_share_start", "hires_share_end") == [
        False, False, True, True,
    ]  # fmt: skip


def test_picking_two_loras_does_what_two_tags_do(page):
    page.switch_on()
    for name, value in PAIR_VALUES.items():
        page.set(name, value)
    found = written(page.generate("a cat"))
    del found["files"]
    assert found == {name: str(value) for name, value in PAIR_VALUES.items()}
    assert f"Subject “{PAIR[0]}”, style “{PAIR[1]}”" in page.wait_report("img")


@pytest.mark.parametrize("by", ["pointer", "key"])
def test_the_pickers_know_a_file_that_was_added_since(page, by):
    name = f"sd15_a_new_one_by_{by}"
    path = page.webui.loras / f"{name}.safetensors"
    page.switch_on()
    page.set("content", PAIR[0])
    page.page.mouse.move(5, 5)
    page.page.wait_for_timeout(2500)  # it does not look twice in a short time
    shutil.copy(path.with_stem("sd15_other"), path)
    try:
        if by == "pointer":
            page.part("content").hover()
            page.wait_quiet()
            page.part("style").locator("input").first.click()
            page.part("style").locator(f"li[aria-label='{name}']").wait_for()
            page.set("style", name)
            page.set("content", name)
        else:
            page.part("content_weight").locator("input[type=number]").focus()
            page.part("style").locator("input").first.focus()
            page.page.keyboard.type(name)
            page.part("style").locator(f"li[aria-label='{name}']").wait_for()
            page.page.keyboard.press("Tab")
        assert page.value("style") == name
        assert f"style={name}" in page.generate("a cat")
    finally:
        path.unlink()
        page.webui.refresh_loras()


def test_no_look_for_files_where_nobody_comes_to_the_pickers(page):
    page.switch_on()
    page.wait_quiet()
    asked = []
    page.page.on("request", lambda request: asked.append(request.url))
    page.part("preview").hover()
    page.set("alpha", 2)
    page.page.wait_for_timeout(1000)
    assert not [url for url in asked if "heartbeat" not in url]
    page.part("style_weight").hover()
    page.page.wait_for_timeout(1000)
    assert asked


def test_whoever_types_into_the_field_of_a_lora_looks_for_one(page):
    page.switch_on()
    field = page.part("content").locator("input").first
    field.click()
    page.page.keyboard.type(PAIR[0])
    assert field.input_value() == PAIR[0]
    field.click()
    assert field.evaluate("input => input.selectionStart === input.selectionEnd")
    page.part("content").locator(f"li[aria-label='{PAIR[0]}']").click()
    assert page.value("content") == PAIR[0]


def test_whoever_comes_into_the_field_by_tab_and_clicks_looks_for_one_too(page):
    page.switch_on()
    page.part("content").locator("input").first.click()
    page.page.keyboard.type(PAIR[0])
    page.page.keyboard.press("Tab")
    field = page.part("style").locator("input").first
    field.click()
    field.click()
    page.page.keyboard.type(PAIR[1])
    assert field.input_value() == PAIR[1]


def test_the_button_beside_the_pickers_has_a_name(page):
    page.switch_on()
    button = page.part("enabled").get_by_role("button", name="Refresh the LoRA lists", exact=True)
    assert button.get_attribute("id") == page.part("refresh").get_attribute("id")
    assert button.get_attribute("title") == "Refresh the LoRA lists"


def test_what_is_chosen_but_switched_off_is_told(page):
    """A click on the box alone leaves the accordion open."""
    page.switch_on()
    for name in ("content", "style"):
        page.set(name, PAIR_VALUES[name])
    page.page.locator("#script_txt2img_klora_enabled-visible-checkbox").first.click()
    assert not page.is_on
    assert "K-LoRA:" not in page.generate("a cat")
    assert "not ticked" in page.wait_report(".klora-note")
    page.part("preview").click()
    assert "not ticked" in page.wait_report(".klora-map img")


def test_tags_win_and_the_page_says_so(page):
    page.switch_on()
    page.set("content", "sd15_other")
    page.set("style", "sd15_other")
    page.generate(tags(*PAIR))
    assert "tags are used" in page.wait_report(".klora-note")
    assert f"Subject “{PAIR[0]}”" in page.report.inner_text()


def test_the_report_of_a_run_and_of_an_error(page):
    page.switch_on()
    page.generate(tags(*PAIR))
    text = page.wait_report(".klora-map img")
    assert re.search(r"\d+ % content", text)
    page.generate(tags("nowhere", PAIR[1]))
    assert "There is no LoRA “nowhere”" in page.wait_report(".klora-error")
    page.generate(tags(*PAIR))
    page.wait_report(".klora-map img")
    assert not page.report.locator(".klora-error").count()


def test_an_error_in_a_picture_within_the_picture_is_told(page):
    """A detailer's own prompt with a tag too few, beside one that is right."""
    page.webui.next(nested={"prompt": f"a face <klora:{PAIR[0]}>", "scripts": None})
    page.generate(tags(*PAIR))
    text = page.wait_report(".klora-map img")
    assert "exactly two <klora:" in text
    assert "Not every picture" in text
    page.generate(tags(*PAIR))
    page.report.locator(".klora-error").wait_for(state="detached")
    assert "Not every picture" not in page.wait_report(".klora-map img")


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_a_preview_is_what_the_run_then_does(page, tab):
    if tab == "img2img":
        page.generate("a cat")
        page.page.locator("#txt2img_send_to_img2img").click()
        page.page.wait_for_timeout(2500)
        page.tab = tab
    page.switch_on()
    page.prompt.fill(tags(*PAIR))
    page.part("preview").click()
    preview = page.wait_report(".klora-map img")
    picture = page.report.locator("img").get_attribute("src")
    page.generate()
    page.page.wait_for_timeout(1000)
    page.wait_report(".klora-map img")
    assert page.report.inner_text() == preview
    assert page.report.locator("img").get_attribute("src") == picture


def test_a_preview_without_gradios_queue(webui, browser):
    """--no-gradio-queue: Gradio 3 refuses to start then if anything asks for a progress bar."""
    arguments = ["--no-gradio-queue"]
    with (
        webui.beside("no-queue", arguments=arguments) as server,
        closing(Page(browser, server)) as page,
    ):
        page.switch_on()
        page.prompt.fill(tags(*PAIR))
        page.part("preview").click()
        assert PAIR[0] in page.wait_report(".klora-map img")


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a cat  # <klora:sd15_content> <klora:sd15_style>", "No LoRAs are given"),
        ("a cat <klora:sd15_style>", "exactly two"),
    ],
)
def test_a_preview_without_a_pair_says_what_to_do(page, prompt, word):
    page.switch_on()
    page.prompt.fill(prompt)
    page.part("preview").click()
    assert word in page.wait_report(".klora-error")


def test_the_schedule_follows_the_sliders(page):
    def drawn():
        return page.part("schedule").locator(".klora-line").get_attribute("d")

    page.switch_on()
    first = drawn()
    page.set("alpha", 3)
    steep = drawn()
    assert steep != first
    slider = page.part("beta").locator("input[type=range]")
    slider.focus()
    slider.press("ArrowRight")
    page.page.wait_for_timeout(300)
    assert drawn() not in (first, steep)
    page.part("defaults").click()
    page.page.wait_for_timeout(1000)
    assert drawn() == first
    page.set("scale", "S*")
    page.page.wait_for_timeout(800)
    assert page.value("beta") == 1.3
    assert drawn().count("M") == 2, "S* is broken where it wraps"
    page.paste("a cat\nSteps: 4, Seed: 1, K-LoRA: alpha=3")
    assert drawn() == steep
    page.paste("a cat\nSteps: 4, Seed: 1, K-LoRA: alpha=3; scale=none")
    assert drawn() != steep, "nothing but the scale has changed"
    page.paste("a cat\nSteps: 4, Seed: 1, K-LoRA: scale=share; share_end=20")
    falling = drawn()
    assert falling.startswith("M24 4L"), "from all layers"
    page.set("share_start", 50)
    assert drawn() != falling


def test_the_sliders_have_no_event(webui):
    """After each event Gradio renders the whole page anew: a tenth of a second at every move."""
    config = webui.get("/config")
    ids = {part["id"]: str(part["props"].get("elem_id")) for part in config["components"]}
    with_event = {
        ids.get(target[0] if isinstance(target, list) else target)
        for event in config["dependencies"]
        for target in event["targets"]
    }
    assert "script_txt2img_klora_preview" in with_event
    for tab in ("txt2img", "img2img"):
        assert (
            not {f"script_{tab}_klora_{name}" for name in ("alpha", "beta", "share_start")}
            & with_event
        )


def test_hires_with_its_own_schedule(webui):
    """Its own α and β change the picture; the same ones as the first pass do not."""
    from kloras import script

    hires = dict(
        prompt=tags(*PAIR), enable_hr=True, hr_scale=2, denoising_strength=0.7,
        hr_second_pass_steps=4,
    )  # fmt: skip
    plain = webui.txt2img(**hires, alwayson_scripts=script())
    same = webui.txt2img(**hires, alwayson_scripts=script(hires="own", hires_beta=0.5))
    other = webui.txt2img(**hires, alwayson_scripts=script(hires="own", hires_beta=4.0))
    first = webui.txt2img(**hires, alwayson_scripts=script(beta=4.0))
    assert plain.sha == same.sha
    assert len({plain.sha, other.sha, first.sha}) == 3
    assert "hires=own; hires_beta=4" in other.infotexts[0]
