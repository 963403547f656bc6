"""The script “K-LoRA: compare”: each picture is the one that a person would make in that way."""

import pytest
from kloras import PAIR, script, tags

STEPS = 5
NAME = "k-lora: compare"
ONE_BY_ONE = {
    "Content alone": lambda: {"prompt": f"a cat <lora:{PAIR[0]}:0.8>"},
    "Style alone": lambda: {"prompt": f"a cat <lora:{PAIR[1]}:0.6>"},
    "Direct merge": lambda: {"alwayson_scripts": script(method="Direct merge", alpha=2)},
    "K-LoRA, S": lambda: {"alwayson_scripts": script(alpha=2)},
    "K-LoRA, S*": lambda: {"alwayson_scripts": script(scale="S*", alpha=2)},
    "K-LoRA, share": lambda: {"alwayson_scripts": script(scale="share", alpha=2)},
    "LoRA Switch": lambda: {"alwayson_scripts": script(method="LoRA Switch", alpha=2)},
    "EST-LoRA": lambda: {"alwayson_scripts": script(method="EST-LoRA", alpha=2)},
    "NP-LoRA": lambda: {"alwayson_scripts": script(method="NP-LoRA", alpha=2)},
}
TAGS = f"a cat <klora:{PAIR[0]}:0.8> <klora:{PAIR[1]}:0.6>"


def compare(webui, ways, seeds=1, **fields):
    return webui.txt2img(
        **{"prompt": TAGS, "steps": STEPS, **fields}, script_name=NAME, script_args=[ways, seeds]
    )


def one_by_one(webui, ways, **fields):
    return [
        webui.txt2img(**{"prompt": TAGS, "steps": STEPS, **ONE_BY_ONE[way](), **fields})
        for way in ways
    ]


def test_each_picture_is_the_one_made_in_that_way(webui):
    ways = list(ONE_BY_ONE)
    single = one_by_one(webui, ways)
    plain = webui.txt2img(steps=STEPS).sha
    result = compare(webui, ways, alwayson_scripts=script(alpha=2))
    assert not result.error
    assert result.hashes[1:] == [one.sha for one in single]
    assert len(set(result.hashes)) == len(ways) + 1
    sheet = result.images[0]
    assert sheet.shape[1] >= 64 * len(ways)
    assert "Script: K-LoRA: compare" in result.infotexts[0] or (
        'Script: "K-LoRA: compare"' in result.infotexts[0]
    )
    for one, text in zip(single, result.infotexts[1:], strict=True):
        assert one.infotexts[0].split("Time taken")[0] == text.split("Time taken")[0]
    assert webui.txt2img(steps=STEPS).sha == plain


def test_the_order_is_that_of_the_list_and_each_seed_has_a_row(webui):
    fields = {"alwayson_scripts": script(alpha=2), "seed": 7}
    result = compare(webui, ["K-LoRA, S", "Content alone"], 2, **fields)
    ways = ["Content alone", "K-LoRA, S"]
    single = [one for seed in (7, 8) for one in one_by_one(webui, ways, seed=seed)]
    assert result.hashes[1:] == [one.sha for one in single]
    assert result.images[0].shape[0] >= 2 * 64


def test_a_pair_by_names(webui):
    pair = dict(content=PAIR[0], style=PAIR[1], content_weight=0.8, style_weight=0.6)
    ways = ["Content alone", "K-LoRA, S*"]
    by_tags = compare(webui, ways)
    by_names = compare(webui, ways, prompt="a cat", alwayson_scripts=script(**pair))
    assert by_names.hashes[2] == by_tags.hashes[2]
    alone = webui.txt2img(prompt=f"a cat <lora:{PAIR[0]}:0.8>", steps=STEPS)
    assert by_names.hashes[1] == alone.sha
    assert "K-LoRA: " not in by_names.infotexts[1]


@pytest.mark.parametrize(
    ("prompt", "args", "words"),
    [
        ("a cat", [["K-LoRA, S"], 1], "nothing to compare"),
        (tags(*PAIR), [[], 1], "tick at least one"),
        (tags(*PAIR), [["K-LoRA, T"], 1], "no way “K-LoRA, T”"),
        (tags(*PAIR), [["K-LoRA, S"], 1.5], "whole number from 1 to 16"),
        (tags(*PAIR), ["K-LoRA, S", 1], "list of names"),
        (f"a cat <klora:{PAIR[0]}>", [["K-LoRA, S"], 1], "exactly two"),
    ],
)
def test_what_is_missing_is_said_before_the_first_picture(webui, prompt, args, words):
    mark = webui.mark()
    result = webui.txt2img(prompt=prompt, script_name=NAME, script_args=args)
    assert result.error
    assert words in result.error.encode().decode("unicode_escape") or words in webui.log_since(mark)


def test_interrupt_keeps_what_was_made(webui):
    webui.next(interrupt_at=2)
    result = compare(webui, ["Content alone", "K-LoRA, S", "K-LoRA, S*"], 2)
    assert not result.error
    assert len(result.images) == 2
    again = compare(webui, ["K-LoRA, S"])
    assert again.hashes[1] == webui.txt2img(prompt=TAGS, steps=STEPS).sha


def test_img2img(webui):
    image = webui.txt2img(steps=STEPS).images[0]
    fields = dict(prompt=TAGS, steps=STEPS, denoising_strength=0.6)
    result = webui.img2img(
        image, **fields, script_name=NAME, script_args=[["Style alone", "K-LoRA, share"], 1]
    )
    assert not result.error
    assert len(set(result.hashes)) == 3
    assert "scale=share" in result.infotexts[2]


def test_in_the_page(page):
    place = page.page.locator("#txt2img_script_container")
    page.pick(place.locator("#script_list"), "K-LoRA: compare")
    ways = place.locator("#script_txt2img_klora_compare_ways")
    ways.wait_for(state="visible")
    ticked = ways.locator("input:checked")
    assert ticked.count() == 6
    ways.locator("label", has_text="Direct merge").locator("input").set_checked(False)
    page.generate(TAGS, until="K-LoRA compared")
    sheet, *others = page.infotexts()
    assert len(others) == 5
    assert 'K-LoRA compared: "Content alone, Style alone, K-LoRA, S, K-LoRA, S*, ' in sheet
    assert page.image().shape[1] >= 64 * 5
    assert page.image().shape[1] > page.image().shape[0]
