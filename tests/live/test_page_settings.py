"""Our section of the Settings page, and the languages."""

import json
import re
import shutil
from contextlib import closing

import pytest
from browser import Page
from kloras import PAIR, tags

from lib_klora.settings import FIELDS


def preview(page, top_k=1):
    """Fills the cache; a K that was not used yet makes the analysis begin anew."""
    page.switch_on()
    if not page.part("top_k").is_visible():
        page.part("advanced").locator("> .label-wrap").click()
    page.set("top_k", top_k)
    page.prompt.fill(tags(*PAIR))
    page.part("preview").click()
    page.wait_report(".klora-map img")


def wait_size(page, wanted):
    """Waits until the cache is shown to take so many MiB. A page that was just opened shows for a
    moment what the cache took when the server started."""
    page.page.wait_for_function(
        """wanted => {
            const text = document.querySelector('#setting_klora_cache .klora-cache').innerText;
            return text.match(/[\\d.]+/)[0] === wanted;
        }""",
        arg=f"{wanted:.1f}",
    )


def mib_in(folder):
    """What the files of a folder take."""
    return sum(path.stat().st_size for path in folder.iterdir()) / 2**20


def test_the_cache_is_shown_at_its_present_size_and_can_be_cleared(page):
    folder = page.webui.data / "cache" / "klora"
    shutil.rmtree(folder, ignore_errors=True)
    page.open_settings()
    wait_size(page, 0)
    page.open_tab("txt2img")
    preview(page, 0.55)
    page.open_settings()  # without a new page
    size = mib_in(folder)
    assert size > 0.1
    wait_size(page, size)

    page.page.reload()
    page.page.wait_for_selector("#txt2img_generate")
    page.open_settings()
    wait_size(page, size)
    page.page.locator("#klora_clear_cache").click()
    wait_size(page, 0)
    assert not list(folder.iterdir())
    page.page.reload()
    page.page.wait_for_selector("#txt2img_generate")
    page.open_settings()
    wait_size(page, 0)


def test_a_cache_that_cannot_be_removed_is_told(page):
    kept = page.webui.data / "cache" / "klora" / "kept.npz"
    kept.mkdir(parents=True)  # no file, so it cannot be removed as one
    try:
        page.open_settings()
        page.page.locator("#klora_clear_cache").click()
        note = page.page.locator("#klora_cache_row .klora-note")
        note.wait_for()
        assert "Not all of the cache could be removed" in note.inner_text()
        assert f"“{kept.parent}”" in note.inner_text()
    finally:
        kept.rmdir()


def test_applying_the_settings_keeps_what_is_ours_and_nothing_of_the_cache(page):
    webui = page.webui
    preview(page, 0.65)
    page.open_settings()
    size = mib_in(webui.data / "cache" / "klora")
    wait_size(page, size)
    field = page.page.locator("#setting_klora_alpha input")
    field.fill("2.25")
    field.blur()
    try:
        page.page.locator("#settings_submit").click()
        result = page.page.locator("#settings_result", has_text="settings changed").first
        result.wait_for()
        assert "klora_alpha" in result.inner_text()
        assert "klora_cache" not in result.inner_text()
        webui.post("/sdapi/v1/options", {"klora_cache": "a program that sends all options back"})
        saved = json.loads((webui.data / "config.json").read_text())
        assert saved["klora_alpha"] == 2.25
        assert "klora_cache" not in saved
        wait_size(page, size)
        assert "alpha=2.25" in webui.txt2img(prompt=tags(*PAIR)).infotexts[0]
    finally:
        webui.restart()  # the button has written every option of the host's as well


def test_a_default_out_of_range_is_refused_and_an_emptied_one_is_the_papers(page):
    webui = page.webui
    page.open_settings()
    field = page.page.locator("#setting_klora_alpha input")
    field.fill("-2")
    field.blur()
    page.page.locator("#settings_submit").click()
    page.page.locator(".toast-wrap, .toast-body").first.wait_for()
    assert "K-LoRA error" not in webui.txt2img(prompt=tags(*PAIR)).infotexts[0]
    webui.post("/sdapi/v1/options", {"klora_alpha": None})
    try:
        infotext = webui.txt2img(prompt=tags(*PAIR)).infotexts[0]
        assert "K-LoRA error" not in infotext
        assert "alpha=" not in infotext
    finally:
        webui.post("/sdapi/v1/options", {"klora_alpha": 1.5})


OWN = {
    "klora_alpha": 2.25, "klora_scale": "S*", "klora_beta": 0.75, "klora_beta_s_star": 0.9,
    "klora_method": "Without γ", "klora_layers": "all", "klora_text_encoder": False,
    "klora_top_k": 3, "klora_seed": 7,
}  # fmt: skip
OWN_SHOWN = {
    "alpha": 2.25, "scale": "S*", "beta": 0.9, "method": "Without γ", "layers": "all",
    "text_encoder": False, "top_k": 3, "seed": 7, "gamma": "paper", "unpaired": "keep",
}  # fmt: skip
PAPERS = {
    "klora_alpha": 1.5, "klora_scale": "S", "klora_beta": 0.5, "klora_beta_s_star": 1.3,
    "klora_method": "K-LoRA", "klora_layers": "attention", "klora_text_encoder": True,
    "klora_top_k": 1, "klora_seed": 0,
}  # fmt: skip


@pytest.fixture
def own(webui):
    """The person's defaults are other than the paper's."""
    webui.post("/sdapi/v1/options", OWN)
    yield OWN
    webui.post("/sdapi/v1/options", PAPERS)


def shown(page):
    """What the accordion of a page shows, once it is opened."""
    page.switch_on(advanced=True)
    return {name: page.value(name) for name in OWN_SHOWN}


def test_the_accordion_opens_with_the_persons_defaults(webui, browser, own):
    for again in (False, True):
        if again:
            webui.reload_ui()
        with closing(Page(browser, webui)) as page:
            assert shown(page) == OWN_SHOWN
            page.set("scale", "S")
            assert page.value("beta") == 0.75
            page.set("scale", "S*")
            assert page.value("beta") == 0.9
            page.tab = "img2img"
            page.open_tab("img2img")
            assert shown(page) == OWN_SHOWN
            page.part("defaults").click()
            page.page.wait_for_timeout(1000)
            assert [page.value(name) for name in ("alpha", "scale", "beta")] == [1.5, "S", 0.5]


def test_a_paste_and_a_program_still_have_the_papers_for_what_is_left_out(webui, browser, own):
    for arguments in ([{}], [True]):
        on = {"K-LoRA": {"args": arguments}}
        infotext = webui.txt2img(prompt=tags(*PAIR), alwayson_scripts=on).infotexts[0]
        assert "K-LoRA: files=" in infotext
    with closing(Page(browser, webui)) as page:
        page.paste(infotext)
        assert page.is_on
        assert [page.value(name) for name in ("alpha", "scale", "beta")] == [1.5, "S", 0.5]


def test_defaults_that_no_picture_could_have_are_the_papers(webui, browser, own):
    webui.post("/sdapi/v1/options", {"klora_alpha": -1, "klora_top_k": None})
    with closing(Page(browser, webui)) as page:
        assert shown(page) == {**OWN_SHOWN, "alpha": 1.5, "top_k": 1}


def test_settings_that_are_applied_reach_a_closed_accordion_and_leave_an_open_one(page):
    def apply(alpha):
        page.open_settings()
        field = page.page.locator("#setting_klora_alpha input")
        field.fill(str(alpha))
        field.blur()
        page.page.locator("#settings_submit").click()
        page.page.locator("#settings_result", has_text="settings changed").first.wait_for()
        page.wait_quiet()
        page.open_tab("txt2img")

    try:
        apply(2.75)
        page.switch_on()
        assert page.value("alpha") == 2.75
        page.set("alpha", 3.5)
        apply(1.25)
        assert page.value("alpha") == 3.5
    finally:
        page.webui.restart()  # the button has written every option of the host's as well


# languages ----------------------------------------------------------------------------------------

LEFT = {
    "K-LoRA", "LoRA", "MiB", "DEBUG", "INFO", "WARNING", "ERROR", "β", "α", "γ", "t = 0",
    *(word for field in FIELDS for word in field.choices),
}  # fmt: skip
"""What every language writes the same: names, and the words that are the API's."""
VISIBLE_WORDS = """place => {
    const found = [], walk = document.createTreeWalker(place, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const text = walk.currentNode.textContent.trim();
        const parent = walk.currentNode.parentElement;
        const names = '.klora-map-blocks, .klora-map-table th[scope="row"]'; // the network's own
        const others = `code, script, style, .hidden, .hide, ${names}`;
        if (text && !parent.closest(others)) found.push(text);
    }
    return found;
}"""


@pytest.fixture
def chinese(webui, browser):
    """A page in Chinese."""
    webui.post("/sdapi/v1/options", {"localization": "zh_CN"})
    try:
        webui.reload_ui()
        page = Page(browser, webui)
        yield page
        page.close()
    finally:
        webui.post("/sdapi/v1/options", {"localization": "None"})
        webui.reload_ui()


def english(place):
    """The texts of a part of the page that have no Chinese in them."""
    words = place.evaluate(VISIBLE_WORDS)
    assert words
    names = re.compile(r"“.*”|[\W\d_]*")
    return {w for w in words if not re.search(r"[\u4e00-\u9fff]", w) and not names.fullmatch(w)}


def test_everything_that_is_ours_is_translated(chinese):
    page = chinese
    page.switch_on(advanced=True)
    page.prompt.fill(tags(*PAIR))
    page.part("preview").click()
    page.wait_report(".klora-map img")
    assert f"主体“{PAIR[0]}”，风格“{PAIR[1]}”" in page.report.inner_text().replace(" ", "")
    assert re.search(r"\d+ ?% 内容", page.report.inner_text())
    assert english(page.part("enabled")) <= LEFT
    page.prompt.fill(tags("nowhere", PAIR[1]))
    page.part("preview").click()
    page.wait_report(".klora-error")
    assert "没有这个 LoRA：“nowhere”" in page.report.inner_text()
    page.prompt.fill(tags("sdxl_content", "sdxl_style"))
    page.part("preview").click()
    page.page.wait_for_function("document.querySelector('.klora-error').innerText.includes('sdxl')")
    assert not {text for text in english(page.report) if " " in text}  # a layer's name has none
    for place in ("title", "aria-label"):
        assert page.part("refresh").get_attribute(place) == "刷新 LoRA 列表"
    page.open_settings()
    left = english(page.page.locator("#settings_klora"))
    assert {text.strip("() ") for text in left} <= LEFT
    scale = page.page.locator("#img2img_scale span").first
    assert scale.text_content().strip() == "Scale", "the host's slider is not the function S(t)"
    label = page.part("scale").locator("span").first
    assert label.text_content().strip() == "缩放因子 S(t)"
