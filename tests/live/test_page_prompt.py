"""The LoRA cards' buttons and Ctrl+Up/Down in the prompt."""

import json

from playwright.sync_api import expect


def open_cards(page):
    page.page.locator("#txt2img_extra_tabs button", has_text="Lora").first.click()
    page.page.wait_for_selector(
        "#txt2img_lora_cards .card[data-name=sd15_style] .klora-role", timeout=20000
    )


def button(page, name, role):
    return page.page.locator(
        f"#txt2img_lora_cards .card[data-name='{name}'] .klora-role[data-role={role}]"
    )


def test_the_buttons_put_in_take_out_and_swap(page):
    open_cards(page)
    page.prompt.fill("a cat")
    for name, role, wanted in (
        ("sd15_content", "content", "a cat <klora:sd15_content:1:content>"),
        ("sd15_style", "style", "a cat <klora:sd15_content:1:content> <klora:sd15_style:1:style>"),
        (
            "sd15_content",
            "style",
            "a cat <klora:sd15_content:1:style> <klora:sd15_style:1:content>",
        ),
        ("sd15_other", "style", "a cat <klora:sd15_other:1:style> <klora:sd15_style:1:content>"),
        ("sd15_other", "style", "a cat <klora:sd15_style:1:content>"),
        ("sd15_style", "content", "a cat"),
    ):
        button(page, name, role).click()
        assert page.prompt.input_value() == wanted


def test_weights_and_other_tags_stay(page):
    open_cards(page)
    page.prompt.fill("<klora:sd15_content:0.5:0.7> a <lora:sd15_other:0.3> <klora:sd15_style:te=0>")
    button(page, "sd15_style", "content").click()
    assert page.prompt.input_value() == (
        "<klora:sd15_content:0.5:0.7:style> a <lora:sd15_other:0.3> <klora:sd15_style:te=0:content>"
    )


def test_a_new_tag_has_what_the_card_prefers(page, host):
    """Weight, activation text and negative text, as the card's own click; all go with the tag."""
    notes = page.webui.loras / "sd15_style.json"
    wishes = {"preferred weight": 0.65, "activation text": "ink, wash", "negative text": "photo"}
    notes.write_text(json.dumps(wishes))
    negative = page.page.locator("#txt2img_neg_prompt textarea")
    photo = host.negative.format("photo")
    try:
        open_cards(page)
        page.page.locator("#txt2img_lora_extra_refresh:visible").first.click()
        page.page.wait_for_timeout(3000)
        page.prompt.fill("a cat")
        negative.fill("ugly")
        for name, role, wanted, unwanted in (
            ("sd15_style", "style", "a cat <klora:sd15_style:0.65:style> ink, wash", photo),
            ("sd15_style", "content", "a cat <klora:sd15_style:0.65:content> ink, wash", photo),
            ("sd15_content", "content", "a cat <klora:sd15_content:1:content>", ""),
            ("sd15_style", "style", "a cat <klora:sd15_content:1:content> "
             "<klora:sd15_style:0.65:style> ink, wash", photo),
            ("sd15_style", "style", "a cat <klora:sd15_content:1:content>", ""),
        ):  # fmt: skip
            button(page, name, role).click()
            assert page.prompt.input_value() == wanted
            assert negative.input_value() == f"ugly {unwanted}".rstrip()
    finally:
        notes.unlink()
        page.page.locator("#txt2img_lora_extra_refresh:visible").first.click()
        page.page.wait_for_timeout(3000)


def test_they_work_with_the_keyboard_and_show_their_state(page):
    open_cards(page)
    page.prompt.fill("a cat")
    one = button(page, "sd15_style", "style")
    one.focus()
    page.page.keyboard.press("Enter")
    assert page.prompt.input_value() == "a cat <klora:sd15_style:1:style>"
    assert one.get_attribute("aria-pressed") == "true"
    page.page.keyboard.press("Space")
    assert page.prompt.input_value() == "a cat"
    assert one.get_attribute("aria-pressed") == "false"


FOCUSED = "(e => e.classList.contains('klora-role') && [e.closest('.card').dataset.name, \
    e.dataset.role])(document.activeElement)"


def test_the_cards_are_one_stop_of_the_tab_key_and_the_arrows_lead_on(page):
    open_cards(page)
    every = page.page.locator("#txt2img_lora_cards .klora-role")
    names = every.evaluate_all("all => all.map(e => e.closest('.card').dataset.name)")[::2]
    assert len(names) > 3

    def stops():
        """Those that the Tab key would come to."""
        return every.evaluate_all(
            "all => all.filter(e => e.tabIndex === 0).map(e => e.closest('.card').dataset.name)"
        )

    def press(key):
        page.page.keyboard.press(key)
        return page.page.evaluate(FOCUSED)

    assert stops() == names[:1]
    page.prompt.fill("a cat")
    button(page, names[0], "content").focus()
    for key, card, role in (
        ("ArrowLeft", 0, "content"), ("ArrowUp", 0, "content"), ("ArrowRight", 0, "style"),
        ("ArrowRight", 1, "content"), ("ArrowDown", 2, "content"), ("ArrowLeft", 1, "style"),
        ("ArrowUp", 0, "style"), ("End", -1, "style"), ("ArrowDown", -1, "style"),
        ("ArrowRight", -1, "style"), ("Home", 0, "content"), ("ArrowDown", 1, "content"),
    ):  # fmt: skip
        assert press(key) == [names[card], role], key
        assert stops() == [names[card]]
    assert press("Enter") == [names[1], "content"]
    assert page.prompt.input_value() == f"a cat <klora:{names[1]}:1:content>"
    assert not press("Tab"), "the next stop is behind the cards"
    assert press("Shift+Tab") == [names[1], "content"]

    page.page.locator("#txt2img_lora_extra_search:visible").first.fill("style")
    page.page.wait_for_timeout(1500)
    assert "style" in stops()[0], "a card that is not shown is no stop"
    shown = [name for name in names if "style" in name]
    button(page, shown[0], "content").focus()
    assert press("ArrowDown") == [shown[1], "content"], "nor do the arrows lead to one"


def test_their_state_follows_what_is_typed(page):
    """Also the role of a tag that says none: what the other leaves, else the first's is content."""
    open_cards(page)
    for text, content, style in (
        ("a <klora:sd15_style> <klora:sd15_content>", "sd15_style", "sd15_content"),
        ("a <klora:sd15_style:s> <klora:sd15_content>", "sd15_content", "sd15_style"),
        ("a <klora: sd15_style > <klora:sd15_content: subject >", "sd15_content", "sd15_style"),
    ):
        page.prompt.fill(text)
        for name, role, other in ((content, "content", "style"), (style, "style", "content")):
            expect(button(page, name, role)).to_have_attribute("aria-pressed", "true")
            expect(button(page, name, other)).to_have_attribute("aria-pressed", "false")


def test_they_survive_refresh_and_search_and_leave_the_card_alone(page):
    open_cards(page)
    page.page.locator("#txt2img_lora_extra_refresh:visible").first.click()
    page.page.wait_for_timeout(3000)
    cards = page.page.locator("#txt2img_lora_cards .card").count()
    assert page.page.locator("#txt2img_lora_cards .klora-role").count() == 2 * cards > 0
    page.page.locator("#txt2img_lora_extra_search:visible").first.fill("style")
    page.page.wait_for_timeout(1500)
    page.prompt.fill("a cat")
    button(page, "sd15_style", "style").click()
    assert page.prompt.input_value() == "a cat <klora:sd15_style:1:style>"
    page.prompt.fill("a cat")
    card = page.page.locator("#txt2img_lora_cards .card[data-name='sd15_style']")
    card.locator(".name").click()
    assert "<lora:sd15_style" in page.prompt.input_value()


def test_they_do_not_cover_the_hosts_buttons(page):
    """Also on a narrow card: its width is the person's choice, on the Settings page."""
    open_cards(page)
    card = page.page.locator("#txt2img_lora_cards .card[data-name='sd15_style']")
    card.hover()
    for width in (256, 150):
        card.evaluate("(card, width) => { card.style.width = `${width}px`; }", width)
        hosts = [button.bounding_box() for button in card.locator(".card-button:visible").all()]
        assert len(hosts) >= 2
        left, bottom = hosts[0]["x"], hosts[0]["y"] + hosts[0]["height"]
        for role in ("content", "style"):
            ours = button(page, "sd15_style", role).bounding_box()
            assert ours["x"] + ours["width"] <= left or ours["y"] >= bottom, width


def test_control_and_arrows_change_the_weight(page):
    for text, up, down in (
        ("a <klora:x> b", "a <klora:x:1.05> b", "a <klora:x:0.95> b"),
        ("a <klora:x:0.8:style>", "a <klora:x:0.85:style>", "a <klora:x:0.75:style>"),
        ("a <klora:x:style>", "a <klora:x:1.05:style>", "a <klora:x:0.95:style>"),
        ("a <klora:x:0.5:0.9:c>", "a <klora:x:0.55:0.9:c>", "a <klora:x:0.45:0.9:c>"),
        ("a <klora:x:te=0.5>", "a <klora:x:te=0.55>", "a <klora:x:te=0.45>"),
        ("a <klora:x:te=0:unet=1>", "a <klora:x:te=0.05:unet=1.05>",
         "a <klora:x:te=-0.05:unet=0.95>"),
        ("a <klora:x:0.95>", "a <klora:x:1.0>", "a <klora:x:0.9>"),
    ):  # fmt: skip
        for key, wanted in (("ArrowUp", up), ("ArrowDown", down)):
            page.prompt.fill(text)
            page.prompt.evaluate("e => { e.focus(); e.selectionStart = e.selectionEnd = 6; }")
            page.page.keyboard.press(f"Control+{key}")
            assert page.prompt.input_value() == wanted


def test_control_and_arrows_at_a_tags_edges(page):
    """One stands behind a tag that one has just typed; the host would tear it apart."""
    text, wanted = "a <klora:x:style> b", "a <klora:x:1.05:style> b"
    for first, last, then in ((17, 17, 22), (2, 2, 2), (0, 9, 0), (9, 19, 9)):
        page.prompt.fill(text)
        page.prompt.evaluate("(e, range) => { e.focus(); e.setSelectionRange(...range); }",
                             [first, last])  # fmt: skip
        page.page.keyboard.press("Control+ArrowUp")
        assert page.prompt.input_value() == wanted
        assert page.prompt.evaluate("e => e.selectionStart") == then
        page.page.keyboard.press("Control+ArrowDown")
        assert page.prompt.input_value() == "a <klora:x:1.0:style> b"


def test_what_buttons_and_arrows_write_can_be_undone(page):
    open_cards(page)
    page.prompt.click()
    page.prompt.fill("")
    page.page.keyboard.type("a dog")
    button(page, "sd15_style", "style").click()
    assert page.prompt.input_value() == "a dog <klora:sd15_style:1:style>"
    page.prompt.focus()
    page.page.keyboard.press("Control+z")
    assert page.prompt.input_value() == "a dog"
    page.page.keyboard.type(" <klora:x:0.5>")
    page.page.keyboard.press("Control+ArrowUp")
    assert page.prompt.input_value() == "a dog <klora:x:0.55>"
    page.page.keyboard.press("Control+z")
    assert page.prompt.input_value() == "a dog <klora:x:0.5>"


def test_other_tags_are_still_the_hosts(page):
    page.prompt.fill("a <lora:x:0.5> (b:1.1)")
    page.prompt.evaluate("e => { e.focus(); e.selectionStart = e.selectionEnd = 6; }")
    page.page.keyboard.press("Control+ArrowUp")
    assert page.prompt.input_value() == "a <lora:x:0.55> (b:1.1)"
