"""The API, the infotext, the Settings page."""

import re

import pytest
from kloras import PAIR, script, tags

from lib_klora.settings import FIELDS


def text_of(result):
    """A result's `K-LoRA` parameter."""
    assert not result.error
    return result.infotexts[0].partition("K-LoRA: ")[2].partition(",")[0].partition("\n")[0]


def test_it_is_listed_in_both_tabs(webui):
    scripts = webui.get("/sdapi/v1/scripts")
    assert "k-lora" in scripts["txt2img"]
    assert "k-lora" in scripts["img2img"]
    (info,) = [
        entry
        for entry in webui.get("/sdapi/v1/script-info")
        if entry["name"] == "k-lora" and not entry["is_img2img"]
    ]
    assert [arg["label"] for arg in info["args"]] == [field.label for field in FIELDS]
    assert info["args"][0]["value"] is False


def test_names_instead_of_tags(webui):
    wanted = webui.txt2img(prompt="a cat <klora:sd15_content:0.8> <klora:sd15_style:0.6>")
    fields = script(content=PAIR[0], style=PAIR[1], content_weight=0.8, style_weight=0.6)
    result = webui.txt2img(alwayson_scripts=fields)
    assert result.sha == wanted.sha
    assert "content=sd15_content; style=sd15_style" in text_of(result)
    assert "content=" not in text_of(wanted)


def test_tags_go_before_names(webui):
    wanted = webui.txt2img(prompt=tags(*PAIR))
    fields = script(content="sd15_other", style="sd15_other")
    assert webui.txt2img(prompt=tags(*PAIR), alwayson_scripts=fields).sha == wanted.sha


def test_positional_and_named_are_the_same(webui):
    positional = {"K-LoRA": {"args": [True, 2.5, 0.7, "S"]}}
    first = webui.txt2img(prompt=tags(*PAIR), alwayson_scripts=positional)
    second = webui.txt2img(prompt=tags(*PAIR), alwayson_scripts=script(alpha=2.5, beta=0.7))
    assert first.sha == second.sha
    assert text_of(first) == text_of(second)
    assert text_of(first).startswith("alpha=2.5; beta=0.7; files=")


@pytest.mark.parametrize("arguments", [[], [False], [{"enabled": False, "alpha": 4}]])
def test_switched_off_tags_work_with_the_defaults(webui, arguments):
    wanted = webui.txt2img(prompt=tags(*PAIR))
    fields = {"K-LoRA": {"args": arguments}}
    assert webui.txt2img(prompt=tags(*PAIR), alwayson_scripts=fields).sha == wanted.sha
    base = webui.txt2img()
    assert webui.txt2img(alwayson_scripts=fields).sha == base.sha
    assert "K-LoRA" not in base.infotexts[0]


def test_the_defaults_for_tags_come_from_the_settings_page(webui):
    wanted = webui.txt2img(prompt=tags(*PAIR), alwayson_scripts=script(alpha=0, beta=1e10))
    options = {"klora_alpha": 0, "klora_beta": 1e10}
    webui.post("/sdapi/v1/options", options)
    try:
        result = webui.txt2img(prompt=tags(*PAIR))
    finally:
        webui.post("/sdapi/v1/options", {"klora_alpha": 1.5, "klora_beta": 0.5})
    assert result.sha == wanted.sha
    assert text_of(result) == text_of(wanted)


def test_a_wrong_default_concerns_tags_without_the_accordion_alone_and_says_where_it_is(webui):
    wanted = webui.txt2img(prompt=tags(*PAIR), alwayson_scripts=script())
    webui.post("/sdapi/v1/options", {"klora_alpha": -1})
    try:
        alone = webui.txt2img(prompt=tags(*PAIR))
        found = webui.txt2img(prompt=tags(*PAIR), alwayson_scripts=script())
    finally:
        webui.post("/sdapi/v1/options", {"klora_alpha": 1.5})
    assert found.infotexts == wanted.infotexts
    assert found.sha == wanted.sha
    assert "Settings → K-LoRA: alpha is -1: it must be" in alone.infotexts[0]


def test_s_star_has_its_own_beta_unless_one_is_given(webui):
    fields = dict(prompt=tags(*PAIR), steps=8)
    paper = webui.txt2img(**fields, alwayson_scripts=script(scale="S*"))
    given = webui.txt2img(**fields, alwayson_scripts=script(scale="S*", beta=1.3))
    other = webui.txt2img(**fields, alwayson_scripts=script(scale="S*", beta=0.5))
    webui.post("/sdapi/v1/options", {"klora_scale": "S*"})
    try:
        alone = webui.txt2img(**fields)
    finally:
        webui.post("/sdapi/v1/options", {"klora_scale": "S"})
    assert paper.sha == given.sha == alone.sha != other.sha
    assert text_of(paper).startswith("scale=S*; files=")
    assert text_of(other).startswith("beta=0.5; scale=S*; files=")


def hashes_of(result):
    """Each infotext's `Lora hashes`; None where it has none."""
    assert not result.error
    found = [re.search(r'Lora hashes: "([^"]*)"', text) for text in result.infotexts]
    return [text and text[1] for text in found]


def test_the_hashes_of_both_files_are_where_those_of_lora_tags_are(webui):
    """Word for word what `<lora:>` writes, so whoever reads these reads ours."""
    both = hashes_of(webui.txt2img(prompt=f"a cat <lora:{PAIR[0]}:1> <lora:{PAIR[1]}:1>"))
    more = "<lora:sd15_other:0.5>"
    (other,) = hashes_of(webui.txt2img(prompt=f"a cat {more}"))
    assert re.fullmatch(r"sd15_content: [0-9a-f]{12}, sd15_style: [0-9a-f]{12}", both[0])
    assert hashes_of(webui.txt2img(prompt=tags(*PAIR))) == both
    named = script(content=PAIR[0], style=PAIR[1])
    assert hashes_of(webui.txt2img(alwayson_scripts=named)) == both
    merged = [f"{other}, {both[0]}"]
    assert hashes_of(webui.txt2img(prompt=tags(*PAIR, f" {more}"))) == merged
    assert hashes_of(webui.txt2img(prompt=f"{more} {tags(*PAIR)}")) == merged
    assert hashes_of(webui.txt2img(prompt=tags(*PAIR, f" <lora:{PAIR[0]}:0>"))) == both
    for without in ("a cat", tags("nowhere", PAIR[1])):
        assert hashes_of(webui.txt2img(prompt=without)) == [None]


def test_each_picture_and_pass_has_its_own_hashes(webui):
    both = hashes_of(webui.txt2img(prompt=tags(*PAIR)))[0]
    matrix = webui.txt2img(
        prompt="a cat| <klora:sd15_content> <klora:sd15_style>", script_name="prompt matrix",
        script_args=[False, False, "positive", "comma", 0], alwayson_scripts=script(),
    )  # fmt: skip
    assert hashes_of(matrix)[1:] == [None, both]
    (text,) = hashes_of(
        webui.txt2img(
            prompt=tags(*PAIR), hr_prompt=tags(PAIR[0], "sd15_other"), enable_hr=True, hr_scale=1,
            denoising_strength=0.5, steps=2,
        )
    )  # fmt: skip
    assert text.startswith(f"{both}, sd15_other: ")


def test_no_hashes_where_the_host_writes_none(webui):
    webui.post("/sdapi/v1/options", {"lora_add_hashes_to_infotext": False})
    try:
        assert hashes_of(webui.txt2img(prompt=tags(*PAIR))) == [None]
    finally:
        webui.post("/sdapi/v1/options", {"lora_add_hashes_to_infotext": True})


def test_every_setting_reaches_the_picture(webui):
    """Each one changes the image or is undone by it; none is decoration."""
    pair = dict(prompt=tags("sd15_content_all", "sd15_style_all"), steps=8)
    plain = webui.txt2img(**pair)
    seen = {"default": plain.sha}
    for name, value in (
        ("alpha", 4), ("beta", 1), ("scale", "none"), ("layers", "all"), ("gamma", "authors"),
        ("top_k", 1000),
    ):  # fmt: skip
        result = webui.txt2img(**pair, alwayson_scripts=script(**{name: value}))
        assert f"{name}=" in text_of(result)
        seen[name] = result.sha
    assert len(set(seen.values())) == len(seen), seen


@pytest.mark.needs("infotext field")
def test_an_infotext_makes_the_same_picture_again(webui):
    fields = script(
        content=PAIR[0], style=PAIR[1], alpha=2, beta=0.8, gamma="authors", top_k=3,
        text_encoder=False, style_weight=0.7,
    )  # fmt: skip
    first = webui.txt2img(alwayson_scripts=fields)
    assert not first.error
    again = webui.txt2img(infotext=first.infotexts[0])
    assert not again.error
    assert text_of(again) == text_of(first)
    assert again.sha == first.sha


def test_prompt_matrix_and_xyz(webui):
    """Tags in a part of a prompt matrix, and searched and replaced in an X/Y/Z plot."""
    base = webui.txt2img()
    lora = webui.txt2img(prompt=tags(*PAIR))
    matrix = webui.txt2img(
        prompt="a cat| <klora:sd15_content> <klora:sd15_style>", script_name="prompt matrix",
        script_args=[False, False, "positive", "comma", 0],
    )  # fmt: skip
    assert not matrix.error
    assert base.sha in matrix.hashes
    assert len(set(matrix.hashes)) == 3
    assert any("K-LoRA: files=" in text for text in matrix.infotexts)
    assert lora.sha != base.sha


def test_with_the_accordion_on_the_parts_of_a_matrix_without_tags_are_no_errors(webui):
    """Nor a plot's; but a matrix that has no tags anywhere says so in each of its pictures."""
    matrix = {"script_name": "prompt matrix", "script_args": [False, False, "positive", "comma", 0]}
    fields = dict(**matrix, alwayson_scripts=script(alpha=2))
    some = webui.txt2img(prompt="a cat| <klora:sd15_content> <klora:sd15_style>", **fields)
    assert not some.error
    told = ["K-LoRA" in text for text in some.infotexts[1:]]  # the first is that of the grid
    assert told == [False, True]
    assert not any("K-LoRA error" in text for text in some.infotexts)
    assert webui.txt2img().sha in some.hashes
    none = webui.txt2img(prompt="a cat| a dog", **fields)
    assert all("no LoRAs are given" in text for text in none.infotexts)


def test_the_queue_of_many(webui):
    """K-LoRA, plain and `<lora:>` in turn, twice: each image is always the same."""
    prompts = [
        tags(*PAIR), "a cat", "a cat <lora:sd15_content:1>", tags(*PAIR[::-1]), tags(*PAIR),
        tags(f"{PAIR[0]}:0.5", PAIR[1]),
    ]  # fmt: skip
    runs = [[webui.txt2img(prompt=prompt).sha for prompt in prompts] for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 5
