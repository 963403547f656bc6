"""The selection map in the page: what it tells of a cell, by every way to get there."""

import re
from contextlib import closing

import pytest
from browser import Page
from kloras import PAIR, tags

STEPS = 4  # of the page


def preview(page):
    page.switch_on()
    page.prompt.fill(tags(*PAIR))
    page.part("preview").click()
    page.wait_report(".klora-map img")
    return page.report.locator(".klora-map")


def told(shown):
    return shown.locator(".klora-map-told").inner_text().split("\n")


def point(page, shown, row, step, rows):
    """The middle of a cell; rows from 0, steps from 1."""
    box = shown.locator(".klora-map-cells").bounding_box()
    x = box["x"] + box["width"] * (step - 0.5) / STEPS
    y = box["y"] + box["height"] * (row + 0.5) / rows
    page.page.mouse.move(x, y)


def expected(plan, name, step):
    """The lines for a cell, from the API's plan."""
    layer = next(one for one in plan["layers"] if one["name"] == name)
    roles = ["content" if content else "style" for content in layer["content"]]
    runs, first = [], 1
    for i in range(1, STEPS + 1):
        if i == STEPS or roles[i] != roles[i - 1]:
            runs.append(f"{roles[i - 1]} {first}" + (f"–{i}" if i > first else ""))
            first = i + 1
    share = round(100 * plan["content_share"][step - 1])
    return name, " → ".join(runs), layer["ratio"], f"step {step}: content {share} %"


def check(shown, plan, step):
    """What is told belongs together; the layer's name."""
    name, got, column = told(shown)
    _, runs, ratio, share = expected(plan, name, step)
    assert column == share
    assert got.partition(" · ")[0] == runs
    assert float(re.search(r"= ([\d.e+-]+)", got)[1]) == pytest.approx(ratio, rel=0.01)
    return name


def test_the_pointer_is_told_the_layer_its_ratio_and_when_it_changes(page, webui):
    shown = preview(page)
    shown.scroll_into_view_if_needed()
    plan = webui.post("/klora/plan", {"content": PAIR[0], "style": PAIR[1], "steps": STEPS})
    rows, names = len(plan["layers"]), []
    for row, step in ((0, 1), (1, STEPS), (rows // 2, 2), (rows - 1, 3)):
        point(page, shown, row, step, rows)
        names.append(check(shown, plan, step))
    assert len(set(names)) == len(names)
    assert names[0].startswith("input_blocks_1_")
    assert names[-1].startswith("output_blocks_11_")


def test_the_keyboard_goes_through_it(page, webui):
    shown = preview(page)
    plan = webui.post("/klora/plan", {"content": PAIR[0], "style": PAIR[1], "steps": STEPS})
    page.part("preview").focus()
    is_there = "document.activeElement.classList.contains('klora-map')"
    for _ in range(20):  # what else there is behind the button
        page.page.keyboard.press("Tab")
        if page.page.evaluate(is_there):
            break
    assert page.page.evaluate(is_there)
    first = check(shown, plan, 1)
    page.page.keyboard.press("ArrowDown")
    assert check(shown, plan, 1) != first
    page.page.keyboard.press("ArrowUp")
    page.page.keyboard.press("End")
    assert check(shown, plan, STEPS) == first
    page.page.keyboard.press("ArrowLeft")
    page.page.keyboard.press("PageDown")
    assert check(shown, plan, STEPS - 1) != first
    assert shown.locator(".klora-map-cells > b").is_visible()


def test_a_finger_is_told_too(page, webui):
    shown = preview(page)
    plan = webui.post("/klora/plan", {"content": PAIR[0], "style": PAIR[1], "steps": STEPS})
    shown.locator(".klora-map-cells img").evaluate(
        """image => {
            const box = image.getBoundingClientRect();
            image.dispatchEvent(new PointerEvent('pointerdown', {bubbles: true,
                pointerType: 'touch', clientX: box.right - 1, clientY: box.bottom - 1}));
        }"""
    )
    assert check(shown, plan, STEPS).startswith("output_blocks_11_")


def test_the_table_says_the_same(page, webui):
    shown = preview(page)
    plan = webui.post("/klora/plan", {"content": PAIR[0], "style": PAIR[1], "steps": STEPS})
    shown.locator("summary").click()
    of_steps = shown.locator("table").nth(1).locator("tbody tr").all_inner_texts()
    assert [row.split("\t") for row in of_steps] == [
        [str(i), f"{100 * share:.0f} %"] for i, share in enumerate(plan["content_share"], 1)
    ]
    blocks = shown.locator("table").nth(0).locator("tbody tr").all_inner_texts()
    assert sum(int(row.split("\t")[1]) for row in blocks) == len(plan["layers"])


@pytest.mark.parametrize(("theme", "width"), [("light", 1500), ("dark", 1500), ("dark", 420)])
def test_it_takes_the_themes_colours_and_fits(webui, browser, host, theme, width):
    with closing(Page(browser, webui, theme=theme, width=width)) as page:
        shown = preview(page)
        colours = shown.evaluate(
            """map => [map, ...map.querySelectorAll('.klora-map-axis, .klora-map-told')]
                .map(e => getComputedStyle(e).color)"""
        )
        bright = [sum(map(float, re.findall(r"[\d.]+", colour)[:3])) for colour in colours]
        assert all((b > 384) == (theme == "dark") for b in bright), colours
        page.page.wait_for_timeout(300)
        over = "e => e.scrollWidth > e.clientWidth + 1"
        assert not shown.evaluate(over)
        cells = shown.locator(".klora-map-cells").bounding_box()
        assert cells["width"] > (150 if width == 420 else 300)
        assert cells["height"] >= 60
        assert not [text for text in page.errors if not re.search(host.page_errors, text)]
