"""What the page costs: its errors, its start, its idle time; and its Settings section."""

import json
import re
from contextlib import closing

import pytest
from browser import Page
from kloras import PAIR, tags
from webui import HERE

from lib_klora.settings import FIELDS

DEFAULTS = {
    "klora_tags_alone": True,
    "klora_append_map": False,
    "klora_save_map": False,
    "klora_log_level": "INFO",
}


# Counts what happens while nobody does anything, and which timers are set by our scripts.
WATCH = """
    window.kloraWatch = {on: false, mutations: 0, timers: 0, last: 0};
    for (const name of ['setTimeout', 'setInterval', 'requestAnimationFrame']) {
        const real = window[name];
        window[name] = function(run, ...more) {
            const ours = new Error().stack.includes('klora_');
            return real.call(window, typeof run !== 'function' ? run : function(...args) {
                if (ours && window.kloraWatch.on) window.kloraWatch.timers++;
                return run.apply(this, args);
            }, ...more);
        };
    }
    new MutationObserver((found) => {
        window.kloraWatch.last = performance.now();
        if (window.kloraWatch.on) window.kloraWatch.mutations += found.length;
    }).observe(document, {childList: true, subtree: true, attributes: true, characterData: true});
"""
QUIET = "performance.now() - window.kloraWatch.last > 1500"
SECONDS = 4000


def tour(browser, webui, theme, ours=False):
    """(errors of the page, what happens while it is idle) after opening all of its tabs, and the
    Lora cards; with ours, K-LoRA's parts as well."""
    page = Page(browser, webui, theme=theme, script=WATCH)
    try:
        tabs = page.page.evaluate(
            "[...document.querySelectorAll('#tabs > div[id]')].map(e => e.id)"
        )
        assert len(tabs) > 5
        for tab in (*tabs, "tab_img2img", "tab_txt2img"):
            page.open_tab(tab.removeprefix("tab_"))
            if tab in ("tab_txt2img", "tab_img2img"):
                page.page.locator(f"#{tab[4:]}_extra_tabs button", has_text="Lora").first.click()
                page.page.locator(f"#{tab[4:]}_lora_cards .card").first.wait_for()
        if ours:
            page.page.locator("#txt2img_lora_cards .klora-role").first.wait_for()
            page.open_settings()
            page.open_tab("txt2img")
            page.page.locator("#txt2img_extra_tabs button").first.click()
            page.switch_on(advanced=True)
        page.page.wait_for_function(QUIET)
        asked = []
        page.page.on("request", lambda request: asked.append(request.url))
        page.page.evaluate("window.kloraWatch.on = true")
        page.page.wait_for_timeout(SECONDS)  # there is no sign of nothing
        watch = page.page.evaluate("window.kloraWatch")
        idle = {"requests": len(asked), "mutations": watch["mutations"], "timers": watch["timers"]}
        return set(page.errors), idle
    finally:
        page.close()


@pytest.fixture
def plain(webui, browser):
    """The same tour without K-LoRA, on a server of its own with the same models."""
    if webui.host not in seen:
        with webui.beside("plain", extensions={"klora-probe": HERE / "probe"}) as server:
            seen[webui.host] = {t: tour(browser, server, t) for t in ("light", "dark")}
    return seen[webui.host]


seen = {}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_error_that_the_host_does_not_have_and_nothing_done_while_idle(
    webui, browser, plain, theme
):
    errors, idle = tour(browser, webui, theme, ours=True)
    plain_errors, plain_idle = plain[theme]
    assert not errors - plain_errors
    assert idle["timers"] == 0
    for what, count in idle.items():
        assert count <= plain_idle[what], what


@pytest.mark.smoke
def test_the_accordion_and_a_picture_with_its_map(page, host):
    page.switch_on()
    assert page.part("content").is_visible()
    assert "K-LoRA: " in page.generate(tags(*PAIR))
    page.wait_report(".klora-map img")
    assert not [text for text in page.errors if not re.search(host.page_errors, text)]


@pytest.mark.parametrize("width", [420, 750])
def test_it_fits_a_narrow_window(webui, browser, width):
    """The second one has two columns, each of them as narrow as the first window."""
    with closing(Page(browser, webui, width=width)) as page:
        page.switch_on(advanced=True)
        assert page.part("content").bounding_box()["x"] == page.part("style").bounding_box()["x"]
        frame = page.part("enabled").bounding_box()
        for name in ("content", "style", "scale", "alpha", "beta", "schedule", "preview", "gamma"):
            box = page.part(name).bounding_box()
            assert box["x"] >= frame["x"] - 1, name
            assert box["x"] + box["width"] <= frame["x"] + frame["width"] + 1, name


def test_the_picture_of_the_scale_fits_its_row(webui, browser):
    with closing(Page(browser, webui, width=1366)) as page:
        page.switch_on()
        picture = page.part("schedule").locator("svg")
        row = page.page.locator(".klora-schedule-row").first
        for width in (1366, 1440, 1920):
            page.page.set_viewport_size({"width": width, "height": 900})
            page.page.wait_for_timeout(200)
            inner, outer = picture.bounding_box(), row.bounding_box()
            assert inner["x"] + inner["width"] <= outer["x"] + outer["width"] + 0.5, width


def test_the_map_is_no_wider_in_a_wide_window(webui, browser):
    with closing(Page(browser, webui, width=2400)) as page:
        page.switch_on()
        page.prompt.fill(tags(*PAIR))
        page.part("preview").click()
        page.wait_report(".klora-map img")
        assert page.report.locator(".klora-map").bounding_box()["width"] == 760


def test_every_component_has_a_label_and_an_id(webui):
    """The host keeps a component's default by its label, and leaves out one without."""
    kinds = {"dropdown", "slider", "radio", "checkbox", "checkboxgroup", "number"}
    found = [part for part in webui.get("/config")["components"] if part["type"] in kinds]
    found = [
        part for part in found if re.match("script_.*_klora_", str(part["props"].get("elem_id")))
    ]
    of_compare = [part for part in found if "_klora_compare_" in part["props"]["elem_id"]]
    assert len(of_compare) == 2 * 2
    in_accordion = len(found) - len(of_compare)
    assert in_accordion == 2 * len(FIELDS) - sum(field.of_hires for field in FIELDS)
    for part in found:
        assert part["props"]["label"], part["props"]["elem_id"]


def test_gradio_4_describes_our_components_but_not_our_events(webui):
    """The browser reads the description at each start, and its numbered names are the host's."""
    config, described = webui.get("/config"), webui.get("/info")["named_endpoints"]
    ids = {part["id"]: str(part["props"].get("elem_id")) for part in config["components"]}
    ours = re.compile(r"klora_(preview|defaults|own_defaults|look|clear_cache|cache_size)$")
    seen, dropdowns = set(), set()
    for event in config["dependencies"] if webui.host.gradio == 4 else ():
        at = [ids.get(target[0], "") for target in event["targets"]]
        if any(ours.search(name) for name in at):
            seen.update(at)
            assert event["api_name"] is False, at
    for endpoint in described.values():
        for part in endpoint["parameters"]:
            if part["label"] in ("Content LoRA", "Style LoRA"):
                dropdowns.add(json.dumps(part["type"]))
    assert len(seen) == (2 * 4 + 2 if webui.host.gradio == 4 else 0)
    assert dropdowns == ({'{"type": "string"}'} if webui.host.gradio == 4 else set())


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
    assert result.infotexts[-1] == result.infotexts[0]
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
