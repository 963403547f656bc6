"""The X/Y/Z plot's K-LoRA axes."""

import json
import re

import pytest
from kloras import PAIR, script, tags

LABELS = (
    "Method", "Scale", "α: slope", "β: start", "K multiplier", "γ: balance", "Layers",
    "Content weight", "Style weight", "Content LoRA", "Style LoRA",
)  # fmt: skip


def plot(webui, label, values, **fields):
    """A plot with one axis, through the API."""
    (info,) = [
        entry
        for entry in webui.get("/sdapi/v1/script-info")
        if entry["name"] == "x/y/z plot" and not entry["is_img2img"]
    ]
    args = [arg.get("value") for arg in info["args"]]
    choices = info["args"][0]["choices"]
    args[0:3] = [choices.index(f"[K-LoRA] {label}"), values, []]
    args[3:9] = [0, "", [], 0, "", []]  # no second and third axis
    for i, arg in enumerate(info["args"]):
        if "text inputs" in arg["label"] or "Include Sub Images" in arg["label"]:
            args[i] = True
    args = ["" if value is None else value for value in args]
    return webui.txt2img(script_name="x/y/z plot", script_args=args, **fields)


def test_the_axes_are_there(webui):
    listed = json.dumps(webui.get("/sdapi/v1/script-info"), ensure_ascii=False)
    for label in LABELS:
        assert listed.count(f"[K-LoRA] {label}") > 0, label


@pytest.mark.parametrize(
    ("label", "name", "values"),
    [
        ("α: slope", "alpha", [0, 4]),
        ("β: start", "beta", [0, 2]),
        ("Scale", "scale", ["S", "none"]),
        ("K multiplier", "top_k", [1, 1000]),
        ("γ: balance", "gamma", ["paper", "authors"]),
        ("Layers", "layers", ["attention", "all"]),
    ],
)
def test_each_cell_is_the_picture_with_that_setting(webui, label, name, values):
    pair = dict(prompt=tags("sd15_content_all", "sd15_style_all"), steps=6)
    single = [webui.txt2img(**pair, alwayson_scripts=script(**{name: v})).sha for v in values]
    result = plot(webui, label, ",".join(map(str, values)), **pair)
    assert not result.error
    assert [sha for sha in single if sha in result.hashes] == single
    assert len(set(single)) == 2


def test_content_and_style(webui):
    for label, name in (("Content LoRA", "content"), ("Style LoRA", "style")):
        both = {"content": PAIR[0], "style": PAIR[1]}
        single = webui.txt2img(alwayson_scripts=script(**{**both, name: "sd15_other"}))
        result = plot(webui, label, f"{both[name]},sd15_other", alwayson_scripts=script(**both))
        assert single.sha in result.hashes
        assert any(f"{name}=sd15_other" in text for text in result.infotexts)


@pytest.mark.parametrize(
    ("label", "values", "word"),
    [
        ("α: slope", "1,-2", "alpha is -2.0"),
        ("Scale", "S,T", "scale is 'T'"),
        ("Content LoRA", "nowhere", "nowhere"),
        ("K multiplier", "0", "top_k"),
    ],
)
def test_a_wrong_value_is_told_before_the_first_image(webui, label, values, word):
    mark = webui.mark()
    result = plot(webui, label, values, alwayson_scripts=script(content=PAIR[0], style=PAIR[1]))
    log = webui.log_since(mark)
    assert result.error or not result.body.get("images")
    assert word in log or word in result.error
    assert not re.search(r"\d+/\d+ \[", log), "an image was begun"


def test_the_axes_of_the_pair_have_no_effect_beside_tags_and_say_so(webui):
    mark = webui.mark()
    result = plot(webui, "Content LoRA", PAIR[0], prompt=tags(*PAIR))
    assert "tags" in webui.log_since(mark) + result.error
