"""The extension's folder twice among the extensions: one is used, the other says so."""

import json
from contextlib import closing

from browser import Page
from kloras import PAIR, tags
from webui import HERE, REPOSITORY

NAMES = "sd-webui-k-lora", "sd-webui-k-lora-again"
SENTENCE = (
    f"K-LoRA is installed 2 times, in the folders “{NAMES[0]}” and “{NAMES[1]}”: only the one in "
    f"“{NAMES[0]}” is used. Remove all others, then restart the WebUI."
)


def check(server, browser):
    """All that is ours is there once, and works."""
    listed = server.get("/sdapi/v1/script-info")
    for tab in (False, True):
        names = [entry["name"] for entry in listed if entry["is_img2img"] == tab]
        assert (names.count("k-lora"), names.count("k-lora: compare")) == (1, 1)
        (plot,) = [x for x in listed if x["name"] == "x/y/z plot" and x["is_img2img"] == tab]
        axes = [axis for axis in plot["args"][0]["choices"] if axis.startswith("[K-LoRA]")]
        assert len(axes) == len(set(axes)) > 10
    config = json.dumps([x["props"].get("elem_id") for x in server.get("/config")["components"]])
    for name in ("script_txt2img_klora_content", "script_img2img_klora_report", "klora_cache_row"):
        assert config.count(f'"{name}"') == 1, name
    with closing(Page(browser, server)) as page:
        page.switch_on()
        assert SENTENCE in page.wait_report(".klora-note")
        page.prompt.fill("a <klora:x:0.5>")
        page.prompt.evaluate("e => { e.focus(); e.selectionStart = e.selectionEnd = 6; }")
        page.page.keyboard.press("Control+ArrowUp")
        assert page.prompt.input_value() == "a <klora:x:0.55>"
        page.page.locator("#txt2img_extra_tabs button", has_text="Lora").first.click()
        page.page.locator("#txt2img_lora_cards .klora-role").first.wait_for()
        cards = page.page.locator("#txt2img_lora_cards .card").count()
        assert page.page.locator("#txt2img_lora_cards .klora-role").count() == 2 * cards
        page.page.locator("#txt2img_extra_tabs button").first.click()
        page.set("alpha", 2.5)
        assert "alpha=2.5; files=" in page.generate(tags(*PAIR))
        page.wait_quiet()


def test_the_second_copy_steps_back_and_says_so(webui, browser):
    extensions = {**dict.fromkeys(NAMES, REPOSITORY), "klora-probe": HERE / "probe"}
    with webui.beside("twice", extensions=extensions) as server:
        assert server.log_since().count(f"[K-LoRA] {SENTENCE}") == 1
        check(server, browser)
        mark = server.mark()
        server.reload_ui()
        assert server.log_since(mark).count(f"[K-LoRA] {SENTENCE}") == 1
        check(server, browser)


def test_one_copy_says_nothing_of_copies(page):
    page.switch_on()
    assert "is installed" not in page.report.inner_text()
    assert "is installed" not in page.webui.log_since()
