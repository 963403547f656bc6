"""A pasted infotext restores every control; renamed files are found again."""

import re
import shutil
from contextlib import closing

import pytest
from browser import Page
from kloras import PAIR, tags
from test_page_controls import HIRES_VALUES, PAIR_VALUES, VALUES

ALL = {**VALUES, **PAIR_VALUES, **HIRES_VALUES}


def values(page):
    """What each control shows; img2img has no hires pass and no controls for it."""
    names = ALL if page.tab == "txt2img" else ALL.keys() - HIRES_VALUES.keys()
    return {name: page.value(name) for name in names}


def filled(page):
    """A page with every control set, its values and the infotext of an image made with them."""
    page.switch_on(advanced=True)
    for name, value in ALL.items():
        page.set(name, value)
    return values(page), page.generate("a cat")


def test_paste_restores_every_control(page):
    wanted, infotext = filled(page)
    page.part("defaults").click()
    for name in ("content", "style"):
        page.set(name, "None (use tags)")
    page.page.wait_for_timeout(500)
    assert values(page) != wanted
    page.paste(infotext)
    assert values(page) == wanted
    again = page.generate()
    assert (
        again.partition("K-LoRA:")[2].split("files")[0]
        == (infotext.partition("K-LoRA:")[2].split("files")[0])
    )


def test_paste_of_a_plain_picture_switches_it_off(page):
    plain = page.generate("a dog")
    page.switch_on()
    page.paste(plain)
    assert not page.is_on


def test_paste_switches_it_on_with_the_papers_values(page):
    infotext = page.generate(tags(*PAIR))
    page.switch_on()
    page.set("alpha", 3)
    page.part("enabled").locator("> .label-wrap").click()
    page.paste(infotext)
    assert page.is_on
    assert (page.value("alpha"), page.value("beta"), page.value("scale")) == (1.5, 0.5, "S")
    assert page.prompt.input_value() == tags(*PAIR)
    page.paste("a cat\nSteps: 4, Seed: 1, K-LoRA: scale=S*; hires=own; hires_scale=S*")
    assert (page.value("beta"), page.value("hires_beta")) == (1.3, 1.3)


def test_the_hosts_entry_of_hashes_changes_nothing_in_a_paste(page):
    prompt = tags(*PAIR, " <lora:sd15_other:0.5>")
    infotext = page.generate(prompt)
    plain = re.sub(r', Lora hashes: "[^"]*"', "", infotext)
    assert plain != infotext
    seen = []
    for text in (plain, infotext):
        page.paste(text)
        seen.append((page.prompt.input_value(), page.is_on, page.report.inner_text(), values(page)))
    assert seen[0] == seen[1]
    assert seen[1][0] == prompt


def test_a_paste_says_what_it_cannot_read(page):
    infotext = page.generate(tags(*PAIR))
    page.paste(infotext.replace("K-LoRA: ", "K-LoRA: alpha=2; sharpness=3; "))
    text = page.wait_report(".klora-note")
    assert "“sharpness=3”" in text
    assert "alpha" not in text
    assert page.value("alpha") == 2


def test_send_to_img2img(page):
    wanted, _ = filled(page)
    page.page.locator("#txt2img_send_to_img2img").click()
    page.page.wait_for_timeout(2500)
    page.tab = "img2img"
    assert page.is_on
    assert values(page) == {name: wanted[name] for name in wanted.keys() - HIRES_VALUES.keys()}
    assert not any(page.part(name).count() for name in HIRES_VALUES)


@pytest.mark.needs("hires prompt in a paste")
def test_a_renamed_file_is_found_in_the_hires_prompt_too(page):
    """Beside tags in the prompt, and alone."""
    loras = page.webui.loras
    hires = {"enable_hr": True, "hr_scale": 1, "denoising_strength": 0.5, "steps": 2}
    (loras / "was_here.safetensors").write_bytes(
        (loras / f"{PAIR[0]}.safetensors").read_bytes()[:-4] + b"1235"
    )
    page.webui.refresh_loras()
    infotexts = [
        page.webui.txt2img(prompt=prompt, hr_prompt=hr_prompt, **hires).infotexts[0]
        for prompt, hr_prompt in (
            (tags("was_here", PAIR[1]), "a dog <klora:was_here:0.5> <klora:sd15_other>"),
            ("a cat", tags("was_here", PAIR[1])),
        )
    ]
    (loras / "was_here.safetensors").rename(loras / "is_there.safetensors")
    try:
        page.webui.refresh_loras()
        found = []
        for infotext in infotexts:
            page.paste(infotext)
            hires_prompt = page.page.locator("#hires_prompt textarea")
            found.append((page.prompt.input_value(), hires_prompt.input_value()))
    finally:
        (loras / "is_there.safetensors").unlink()
        page.webui.refresh_loras()
    assert found == [
        (tags("is_there", PAIR[1]), "a dog <klora:is_there:0.5> <klora:sd15_other>"),
        ("a cat", tags("is_there", PAIR[1])),
    ]


def test_renamed_files_are_found_by_their_hash(page):
    """Both ways to name a file: in the accordion, and in a tag."""
    loras = page.webui.loras
    (loras / "was_here.safetensors").write_bytes(
        (loras / f"{PAIR[0]}.safetensors").read_bytes()[:-4] + b"1234"
    )
    page.webui.refresh_loras()
    in_tags = page.generate(tags("was_here", PAIR[1]))
    page.switch_on()
    page.part("refresh").click()
    page.page.wait_for_timeout(1000)
    page.set("content", "was_here")
    page.set("style", PAIR[1])
    in_fields = page.generate("a cat")
    (loras / "was_here.safetensors").rename(loras / "is_there.safetensors")
    try:
        page.webui.refresh_loras()
        page.paste(in_fields)
        assert page.value("content") == "is_there"
        assert "is now called “is_there”" in page.wait_report(".klora-note")
        page.paste(in_tags)
        assert page.prompt.input_value() == tags("is_there", PAIR[1])
        assert page.value("content") == "None (use tags)"
    finally:
        (loras / "is_there.safetensors").unlink()
        page.webui.refresh_loras()
    page.paste(in_tags)
    assert "“was_here” of this picture" in page.wait_report(".klora-note")


def test_without_hashes_a_picture_says_nothing_of_them_and_can_be_pasted(webui, browser):
    with (
        webui.beside("no-hashing", arguments=["--no-hashing"]) as server,
        closing(Page(browser, server)) as page,
    ):
        infotext = page.generate(tags(*PAIR))
        assert "K-LoRA: method=K-LoRA," in infotext
        assert "files=" not in infotext
        assert "Lora hashes" not in infotext
        page.paste(infotext)
        assert page.is_on
        assert not page.report.locator(".klora-note").count()
        page.paste(infotext.replace(PAIR[0], "nowhere"))
        assert "There is no LoRA “nowhere”" in page.wait_report(".klora-note")


def test_another_file_of_the_same_name_is_told(page):
    path = page.webui.loras / "same_name.safetensors"
    try:
        path.write_bytes((path.parent / f"{PAIR[0]}.safetensors").read_bytes()[:-4] + b"1236")
        page.webui.refresh_loras()
        infotext = page.generate(tags(path.stem, PAIR[1]))
        shutil.copy(path.with_stem("sd15_other"), path)
        page.paste(infotext)
    finally:
        path.unlink()
        page.webui.refresh_loras()
    assert "is not the file that" in page.wait_report(".klora-note")
