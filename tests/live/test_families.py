"""Networks that only Forge Neo runs: their attention, in every spelling that it reads."""

import re
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from kloras import (
    Expectation,
    always,
    checkpoint_of,
    choice,
    is_attention,
    recorded,
    tags,
    weights_under,
)
from make_loras import ENCODER, PAIRS, SPELLINGS, layers_of, write
from safetensors.torch import load_file, save_file
from test_equivalence import STEPS, assert_every_step

pytestmark = pytest.mark.models("|".join(SPELLINGS))

NAMES = {
    "zimage": "Z-Image",
    "qwen": "Qwen-Image",
    "chroma": "Chroma",
    "flux2": "Flux.2",
    "anima": "Anima",
    "lumina": "Lumina 2",
    "krea": "Krea 2",
    "ernie": "Ernie-Image",
    "wan": "Wan",
}
"""What people call the model of each family."""
FILES = {
    "content in another spelling": ("_{0}", ""),
    "style in another spelling": ("", "_{0}"),
    "both in another spelling": ("_{0}", "_{0}"),
    "content in a third spelling": ("_{1}", ""),
    "style in a third spelling": ("", "_{1}"),
    "both in a third spelling": ("_{1}", "_{1}"),
    "LoKr and LoRA": ("_lokr", ""),
    "LoRA and LoKr of low rank": ("_{0}", "_lokr_low"),
}
"""Endings of a content and a style file's name; numbers count the family's SPELLINGS."""


@pytest.mark.parametrize("files", FILES)
def test_every_spelling_and_lokr_fused_and_split(webui, model, files):
    """Where both files split q, k and v, each of them is a layer of its own, else all three are."""
    spellings = list(SPELLINGS[model.family])
    if "{1}" in "".join(FILES[files]) and len(spellings) < 2:
        pytest.skip(f"{model.family} has two spellings")
    content, style = (ending.format(*spellings) for ending in FILES[files])
    pair = model.lora(f"content{content}"), model.lora(f"style{style}")
    for role, name in zip(("content", "style"), pair, strict=True):
        wanted = webui.capture(role, f"a cat <lora:{name}:1>")
        result = webui.txt2img(prompt=tags(*pair), alwayson_scripts=always(role))
        assert "K-LoRA error" not in result.infotexts[0]
        assert result.sha == wanted.sha
    reading = choice(webui, *pair)
    webui.next(swap={str(i): reading.step(i, STEPS) for i in range(STEPS)})
    swapped = webui.txt2img(steps=STEPS)
    assert webui.txt2img(prompt=tags(*pair), steps=STEPS).sha == swapped.sha


def test_the_weights_of_every_step(webui, model):
    assert_every_step(webui, (model.lora("content"), model.lora("style")))


@pytest.mark.parametrize("end", [None, "raise_at", "interrupt_at"])
def test_the_plain_picture_and_its_weights_are_as_before(webui, model, end):
    base, weights = webui.txt2img().sha, weights_under(webui, "a cat")
    if end:
        webui.next(**{end: 3})
    pair = model.lora("content"), model.lora("style")
    result = webui.txt2img(prompt=tags(*pair), steps=STEPS)
    assert bool(result.error) == (end == "raise_at")
    assert webui.txt2img().sha == base
    assert weights_under(webui, "a cat") == weights


@contextmanager
def lora_file(webui, model, name, change=lambda path: None, **how):
    """A LoRA file of this name for as long as the block lasts; `how` as for make_loras.write."""
    path = webui.loras / f"{model.lora(name)}.safetensors"
    how = {"spelling": PAIRS[model.family], **how}
    write(path, layers_of(checkpoint_of(webui)), **how)
    change(path)
    webui.refresh_loras()
    try:
        yield path.stem
    finally:
        path.unlink()
        webui.refresh_loras()


def test_the_paper_s_layers_are_the_attention_of_the_network(webui, model):
    """Of files with every linear layer."""
    with (
        lora_file(webui, model, "linear_c", which="linear", seed=1) as content,
        lora_file(webui, model, "linear_s", which="linear", seed=2) as style,
    ):
        request = {"content": content, "style": style, "steps": STEPS}
        attention = webui.post("/klora/plan", request)
        everything = webui.post("/klora/plan", {**request, "settings": {"layers": "all"}})
    layers = layers_of(checkpoint_of(webui))
    found = [layer["name"] for layer in attention["layers"]]
    own = {layer for layer in layers if is_attention(layer) and not ENCODER.match(layer)}
    assert set(found) == {layer.replace(".", "_") for layer in own}
    assert set(found) < {layer["name"] for layer in everything["layers"]}
    assert not attention["warnings"]


MADE_FOR = {"qwen": "Qwen-Image", "flux": "Flux.1 or Chroma", "sdxl": "Stable Diffusion"}
"""What a file's names and shapes tell; SDXL is told by a width, which is small here."""


@pytest.mark.parametrize("other", MADE_FOR)
def test_a_file_of_another_family_is_told_with_both_names(webui, model, other):
    if other == model.family or (other, model.family) == ("flux", "chroma"):
        pytest.skip("that is this family")
    own, base, mark = model.lora("style"), webui.txt2img().sha, webui.mark()
    result = webui.txt2img(prompt=tags(f"{other}_content", own))
    told = "K-LoRA error" in result.infotexts[0]
    sentence = f"made for {MADE_FOR[other]}, {'' if told else 'and '}the checkpoint is"
    assert f"{sentence} {NAMES[model.family]}" in webui.log_since(mark)
    lora = webui.txt2img(prompt=f"a cat <lora:{other}_content:1>").sha
    if told:
        assert sentence in result.infotexts[0]
        assert result.sha == base
    else:  # it has names and shapes of this network: in the small, as many blocks as well
        assert lora != base


def add_strange_layers(path):
    """More than half of the file then."""
    own = load_file(path)
    strange = {
        f"lora_unet_nowhere_{i}_attn.lora_{part}.weight": torch.ones(4, 4)
        for i in range(len(own))
        for part in ("up", "down")
    }
    save_file({**own, **strange}, path)


def test_a_few_layers_that_fit_by_accident_are_no_plan(webui, model):
    with lora_file(webui, model, "accident", change=add_strange_layers) as name:
        result = webui.txt2img(prompt=tags(name, model.lora("style")))
    assert "does not fit this model: " in result.infotexts[0]
    assert result.sha == webui.txt2img().sha


@pytest.mark.models("wan")
@pytest.mark.parametrize("fast", [False, True])
def test_both_experts_of_wan(webui, model, fast):
    """One for much noise and one for little, which is the first one's refiner in the WebUI."""
    pair, other = (model.lora("content"), model.lora("style")), "tiny_wan_b"
    expected = []
    for expert in (replace(model, checkpoint=other), model):
        webui.load(expert)
        expected.insert(0, Expectation(webui, *pair))
    assert expected[0].base != expected[1].base
    result, calls = recorded(
        webui, prompt=tags(*pair), steps=STEPS, refiner_checkpoint=other, refiner_switch_at=0.5,
        override_settings={"refiner_use_steps": True, "refiner_fast_sd": fast},
    )  # fmt: skip
    assert "K-LoRA error" not in result.infotexts[0]
    assert len(calls) == STEPS
    for i, call in enumerate(calls):
        expected[i >= STEPS // 2].check(call, i, STEPS)
    expected[0].check_base(recorded(webui, prompt="a cat", steps=1)[1][0])


@pytest.mark.models("zimage|qwen|chroma|flux2|anima")
def test_the_page(webui, model, page, host):
    pair = model.lora("content"), model.lora("style")
    page.switch_on()
    page.prompt.fill(tags(*pair))
    page.part("preview").click()
    page.wait_report(".klora-map img")
    assert "K-LoRA: " in page.generate()
    page.wait_report(".klora-map img")
    assert f"Subject “{pair[0]}”, style “{pair[1]}”" in page.report.inner_text()
    assert not [text for text in page.errors if not re.search(host.page_errors, text)]
