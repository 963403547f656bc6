"""What the page costs: its errors, its start, its idle time; and its Settings section."""

import json
import re

import pytest
from kloras import PAIR, tags

DEFAULTS = {
    "klora_tags_alone": True,
    "klora_append_map": False,
    "klora_save_map": False,
    "klora_log_level": "INFO",
}


def ours(errors):
    """Console errors that are not the host's own (its page has some without any extension)."""
    return [e for e in errors if "klora" in e.lower() or "is not defined" in e]


def test_no_error_of_ours_in_either_theme_and_the_idle_page_asks_nothing(webui, browser):
    from browser import Page

    for theme in ("light", "dark"):
        page = Page(browser, webui, theme=theme)
        try:
            page.switch_on(advanced=True)
            asked = []
            page.page.on("request", lambda request: asked.append(request.url))  # noqa: B023 - closed below
            page.page.wait_for_timeout(2000)
            assert not [url for url in asked if "klora" in url]
            assert ours(page.errors) == []
        finally:
            page.close()


def test_it_fits_a_narrow_window(webui, browser):
    from browser import Page

    page = Page(browser, webui, width=420)
    try:
        page.switch_on(advanced=True)
        frame = page.part("enabled").bounding_box()
        for name in ("content", "style", "scale", "alpha", "beta", "schedule", "preview", "gamma"):
            box = page.part(name).bounding_box()
            assert box["x"] >= frame["x"] - 1, name
            assert box["x"] + box["width"] <= frame["x"] + frame["width"] + 1, name
    finally:
        page.close()


def test_every_component_has_a_label_and_an_id(webui):
    """The host keeps a component's default by its label, and leaves out one without."""
    kinds = {"dropdown", "slider", "radio", "checkbox"}
    found = [part for part in webui.get("/config")["components"] if part["type"] in kinds]
    found = [
        part for part in found if re.match("script_.*_klora_", str(part["props"].get("elem_id")))
    ]
    assert len(found) == 2 * 19
    for part in found:
        assert part["props"]["label"], part["props"]["elem_id"]


def test_the_settings_page_has_our_section(webui):
    ids = {part["props"].get("elem_id") for part in webui.get("/config")["components"]}
    for name in (*DEFAULTS, "klora_alpha", "klora_beta_s_star", "klora_progress"):
        assert f"setting_{name}" in ids, name


@pytest.fixture
def options(webui):
    """Sets options, and sets them back."""
    yield lambda **values: webui.post("/sdapi/v1/options", values)
    webui.post("/sdapi/v1/options", {**DEFAULTS, "samples_save": False})


def test_the_map_in_the_gallery(webui, options):
    plain = webui.txt2img(prompt=tags(*PAIR))
    options(klora_append_map=True)
    result = webui.txt2img(prompt=tags(*PAIR))
    assert result.hashes[0] == plain.sha
    assert len(result.images) == len(plain.images) + 1
    assert "% content" in result.infotexts[-1]
    assert len(webui.txt2img().images) == 1


def test_the_map_beside_the_image(webui, options):
    options(klora_save_map=True, samples_save=True)
    mark = set(webui.data.rglob("*-klora.png"))
    webui.txt2img(prompt=tags(*PAIR), save_images=True)
    (saved,) = set(webui.data.rglob("*-klora.png")) - mark
    assert saved.with_name(saved.name.replace("-klora", "")).is_file()


def test_tags_can_be_made_to_need_the_accordion(webui, options):
    base = webui.txt2img()
    options(klora_tags_alone=False)
    result = webui.txt2img(prompt=tags(*PAIR))
    assert result.sha == base.sha
    assert "tags need it" in result.infotexts[0]
    on = {"K-LoRA": {"args": [{}]}}
    assert webui.txt2img(prompt=tags(*PAIR), alwayson_scripts=on).sha != base.sha


def test_the_log_level(webui, options):
    options(klora_log_level="ERROR")
    mark = webui.mark()
    webui.txt2img(prompt=tags("nowhere", PAIR[1]))
    assert "[K-LoRA]" not in webui.log_since(mark)


def test_translations_cover_every_word_of_the_table(webui):
    from webui import REPOSITORY

    for language in ("zh_CN", "ja_JP"):
        path = REPOSITORY / "localizations" / f"{language}.json"
        words = json.loads(path.read_text(encoding="utf8"))
        assert all(words.values())
        config = webui.get("/config")
        for part in config["components"]:
            props = part["props"]
            if re.match(r"script_\w+_klora_(?!enabled)", str(props.get("elem_id"))):
                for text in (props.get("label"), props.get("info")):
                    assert not text or text in words, (language, text)
