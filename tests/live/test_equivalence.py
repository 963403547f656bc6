"""Invariants 1 and 3: every layer is what the host's `<lora:WINNER>` alone makes of it."""

import itertools

import pytest
import torch
from kloras import (
    PAIR,
    always,
    assert_weights,
    checkpoint_of,
    choice,
    is_attention,
    recorded,
    script,
    tags,
    weights_under,
)
from make_loras import compose, layers_of
from safetensors.torch import load_file

STEPS = 8


@pytest.fixture
def pair(model):
    """The names of the checkpoint's content and style LoRA."""
    return model.lora("content"), model.lora("style")


@pytest.mark.models(smoke="sd15$")
@pytest.mark.parametrize("role", ["content", "style"])
def test_one_winner_everywhere_is_that_lora(webui, model, pair, role):
    winner = pair[role == "style"]
    wanted = webui.txt2img(prompt=f"a cat <lora:{winner}:1>")
    result = webui.txt2img(prompt=tags(*pair), alwayson_scripts=always(role))
    assert not result.error
    assert result.sha == wanted.sha
    assert result.sha != webui.txt2img().sha


@pytest.mark.models(smoke="sd15$")
def test_a_fixed_choice_is_the_file_composed_of_the_winners(webui, model, pair):
    """α = 0 and a β between two layers' ratios, so that both files win layers."""
    reading = choice(webui, *pair)
    ratios = reading.ratios()
    middle = len(ratios) // 2
    beta = (ratios[middle - 1] + ratios[middle]) / 2
    roles = reading.at(beta)
    assert set(roles.values()) == {"content", "style"}
    files = {
        role: webui.loras / f"{name}.safetensors"
        for role, name in zip(("content", "style"), pair, strict=True)
    }
    composed = webui.loras / f"{model.lora('winners')}.safetensors"
    found = layers_of(checkpoint_of(webui))
    compose(composed, {part: files[role] for part, role in roles.items()}, found)
    webui.refresh_loras()
    wanted = webui.txt2img(prompt=f"a cat <lora:{composed.stem}:1>")
    result = webui.txt2img(prompt=tags(*pair), alwayson_scripts=script(alpha=0, beta=beta))
    assert result.sha == wanted.sha


@pytest.mark.models(smoke="sd15$")
def test_at_every_step_every_layer_is_what_its_lora_makes_of_it(webui, model, pair):
    """The default α and β, all storage types: the raw weights of each model call."""
    assert_every_step(webui, pair)


@pytest.mark.models("sd15_fp8_online")
def test_a_bias_of_one_file_goes_with_it(webui, model):
    """Also where the host adds LoRAs at every forward: nothing is left in the bias then."""
    assert_every_step(webui, (model.lora("style_full"), model.lora("content")), layers=is_attention)


@pytest.mark.needs("room for online LoRAs")
@pytest.mark.models("sd15_fp8_online")
def test_room_is_kept_for_the_larger_lora(webui, model, pair):
    """Where the host adds LoRAs at every forward, it makes room for what the layers have before the
    first step; the style's file here is twice as large as the content's."""
    result, calls = recorded(webui, prompt=tags(f"{pair[0]}:0.9", pair[1]), steps=STEPS)
    assert "K-LoRA error" not in result.infotexts[0]
    sizes = [call["online"] for call in calls]
    assert max(sizes) > sizes[0]
    assert max(sizes) <= sizes[0] + calls[0]["preserved"]
    _, calls = recorded(webui, prompt=f"a cat <lora:{pair[1]}:1>", steps=1)
    assert calls[0]["preserved"] == 0


@pytest.mark.models("sd15_fp8_online")
def test_weights_that_were_tried_leave_no_copies(webui, model, pair):
    """The host moves the tensors that it adds at every forward to the device, and keeps the copies
    in the pair's entries."""
    sizes = []
    for weight in (0.8, 0.7, 0.6, 0.5):
        assert not webui.txt2img(prompt=tags(f"{pair[0]}:{weight}", pair[1])).error
        sizes.append(webui.get("/klora-probe/tensors"))
    file = (webui.loras / f"{pair[1]}.safetensors").stat().st_size
    assert max(sizes) - sizes[0] < file / 2


def assert_every_step(webui, pair, **how):
    """The weights of each model call are those that the paper asks for; `how` as for `choice`."""
    reading = choice(webui, *pair, **how)
    base = weights_under(webui, "a cat")
    wanted = {
        role: weights_under(webui, f"a cat <lora:{name}:1>")
        for role, name in zip(("content", "style"), pair, strict=True)
    }
    _, calls = recorded(webui, prompt=tags(*pair), steps=STEPS)
    assert len(calls) == STEPS
    plan = [reading.step(i, STEPS) for i in range(STEPS)]
    assert any(a != b for a, b in itertools.pairwise(plan)), "nothing flips: no test"
    for roles, call in zip(plan, calls, strict=True):
        assert_weights(call["weights"], wanted, roles, base)


def test_the_picture_is_that_of_whole_layers_swapped_per_step(webui, model, pair):
    """The independent oracle: captured weights copied in, without the host's LoRA code."""
    reading = choice(webui, *pair)
    for role, name in zip(("content", "style"), pair, strict=True):
        assert not webui.capture(role, f"a cat <lora:{name}:1>").error
    webui.next(swap={str(i): reading.step(i, STEPS) for i in range(STEPS)})
    wanted = webui.txt2img(steps=STEPS)
    result = webui.txt2img(prompt=tags(*pair), steps=STEPS)
    assert result.sha == wanted.sha
    assert webui.txt2img(prompt=tags(*pair), steps=STEPS).sha == result.sha


@pytest.mark.parametrize("order", ["before", "after"])
def test_other_loras_apply_exactly_as_without_us(webui, model, pair, order):
    """Weights as those of `<lora:other> <lora:WINNER>`, wherever the tags stand."""
    if model.checkpoint != "tiny_sd15":
        pytest.skip("one family is enough: there are no third LoRAs for the others")
    reading = choice(webui, *pair)
    other = "<lora:sd15_other:0.6>"
    base = weights_under(webui, f"a cat {other}")
    wanted = {
        role: weights_under(webui, f"a cat {other} <lora:{name}:1>")
        for role, name in zip(("content", "style"), pair, strict=True)
    }
    prompt = tags(*pair, f" {other}") if order == "before" else f"a cat {other} {tags(*pair)[5:]}"
    _, calls = recorded(webui, prompt=prompt, steps=STEPS)
    for i, call in enumerate(calls):
        assert_weights(call["weights"], wanted, reading.step(i, STEPS), base)


def test_a_weight_scales_what_is_applied_and_not_the_choice(webui):
    pair = "sd15_content", "sd15_style"
    reading = choice(webui, *pair)
    base = weights_under(webui, "a cat")
    wanted = {
        "content": weights_under(webui, "a cat <lora:sd15_content:0.3>"),
        "style": weights_under(webui, "a cat <lora:sd15_style:-0.8>"),
    }
    prompt = "a cat <klora:sd15_content:0.3> <klora:sd15_style:1:-0.8>"
    _, calls = recorded(webui, prompt=prompt, steps=STEPS)
    for i, call in enumerate(calls):
        assert_weights(call["weights"], wanted, reading.step(i, STEPS), base)


@pytest.mark.needs("networks")
def test_weights_that_an_extension_sets_by_name_are_those_of_lora_tags(webui):
    """sd-webui-loractl gives every network that is called as in a `<lora:>` that tag's weight."""
    lora = f"a cat <lora:{PAIR[0]}:1>"
    webui.next(weights_of={PAIR[0]: 0.5})
    assert webui.txt2img(prompt=lora).sha == webui.txt2img(prompt=lora.replace(":1", ":0.5")).sha
    wanted = webui.txt2img(prompt=tags(*PAIR)).sha
    webui.next(weights_of={PAIR[0]: 0.5})
    assert webui.txt2img(prompt=tags(*PAIR)).sha == wanted


@pytest.mark.parametrize(
    ("content", "style"),
    [
        ("sd15_content_ldm", "sd15_style"),
        ("sd15_content", "sd15_style_bf16"),
        ("sd15_content", "sd15_style_dora"),
        ("sd15_content", "sd15_style_loha"),
        ("sd15_content_lokr", "sd15_style"),
        ("sd15_content", "sd15_style_lokr_low"),
        ("sd15_content", "sd15_style_full"),
        ("sd15_content_down", "sd15_style_up"),
        ("sd15_content_down", "sd15_style"),
    ],
)
def test_every_type_and_spelling_that_the_host_applies(webui, content, style):
    reading = choice(webui, content, style, layers=is_attention)
    base = weights_under(webui, "a cat")
    wanted = {
        "content": weights_under(webui, f"a cat <lora:{content}:1>"),
        "style": weights_under(webui, f"a cat <lora:{style}:1>"),
    }
    result, calls = recorded(webui, prompt=tags(content, style), steps=STEPS)
    assert "K-LoRA error" not in result.infotexts[0]
    for i, call in enumerate(calls):
        assert_weights(call["weights"], wanted, reading.step(i, STEPS), base)


def test_all_layers(webui):
    pair = "sd15_content_all", "sd15_style_all"
    reading = choice(webui, *pair)
    base = weights_under(webui, "a cat")
    wanted = {
        role: weights_under(webui, f"a cat <lora:{name}:1>")
        for role, name in zip(("content", "style"), pair, strict=True)
    }
    fields = dict(prompt=tags(*pair), steps=STEPS)
    _, calls = recorded(webui, **fields, alwayson_scripts=script(layers="all"))
    for i, call in enumerate(calls):
        assert_weights(call["weights"], wanted, reading.step(i, STEPS), base)
    # … and of the same files the attention layers alone
    reading = choice(webui, *pair, layers=is_attention)
    _, calls = recorded(webui, **fields)
    for i, call in enumerate(calls):
        assert_weights(call["weights"], wanted, reading.step(i, STEPS), base)


def test_layers_of_one_file_can_be_dropped(webui):
    base = webui.txt2img()
    prompt = tags("sd15_content_down", "sd15_style")
    kept = webui.txt2img(prompt=prompt, alwayson_scripts=script(alpha=0, beta=0))
    fields = script(alpha=0, beta=0, unpaired="drop")
    dropped = webui.txt2img(prompt=prompt, alwayson_scripts=fields)
    assert dropped.sha == webui.txt2img(prompt="a cat <lora:sd15_content_down:1>").sha
    assert len({base.sha, kept.sha, dropped.sha}) == 3


@pytest.mark.needs("flux")
@pytest.mark.parametrize(
    ("content", "style"),
    [
        ("flux_content_split", "flux_style_split"),
        ("flux_content", "flux_style_split"),
        ("flux_content_split", "flux_style"),
    ],
)
def test_flux_files_that_split_what_the_model_fuses(webui, host, content, style):
    """Both split: every part is a layer of its own. One fused: the whole parameter is."""
    webui.load(host.models["flux"])
    wanted = {}
    for role, name in (("content", content), ("style", style)):
        wanted[role] = webui.capture(role, f"a cat <lora:{name}:1>").sha
    for role, sha in wanted.items():
        result = webui.txt2img(prompt=tags(content, style), alwayson_scripts=always(role))
        assert result.sha == sha
    if content.endswith("split") and style.endswith("split"):
        reading = choice(webui, content, style)
        assert any("[" in part for part in reading.top)
        webui.next(swap={str(i): reading.step(i, STEPS) for i in range(STEPS)})
        swapped = webui.txt2img(steps=STEPS)
        assert webui.txt2img(prompt=tags(content, style), steps=STEPS).sha == swapped.sha


@pytest.mark.needs("functional mode")
@pytest.mark.parametrize("role", ["content", "style"])
def test_the_hosts_functional_mode(webui, role):
    """AUTOMATIC1111's option that adds LoRAs in each layer's forward instead of to its weight."""
    functional = {"lora_functional": True}
    pair = "sd15_content", "sd15_style"
    merged = webui.txt2img(prompt=tags(*pair), steps=STEPS)
    fields = dict(steps=STEPS, override_settings=functional)
    wanted = webui.txt2img(prompt=f"a cat <lora:{pair[role == 'style']}:1>", **fields)
    result = webui.txt2img(prompt=tags(*pair), alwayson_scripts=always(role), **fields)
    assert result.sha == wanted.sha
    plan = webui.txt2img(prompt=tags(*pair), **fields)
    assert plan.sha not in (wanted.sha, result.sha)
    assert webui.txt2img(prompt=tags(*pair), steps=STEPS).sha == merged.sha


def test_a_pt_file_is_read_through_the_hosts_safe_loader(webui, host):
    name = "sd15_content_pt"
    path = webui.loras / f"{name}.pt"
    tensors = load_file(webui.loras / "sd15_content.safetensors")
    torch.save(tensors, path, _use_new_zipfile_serialization=False)  # newer ones it does not know
    webui.refresh_loras()
    try:
        result = webui.txt2img(prompt=tags(name, "sd15_style"))
        if host.can("pickled LoRAs"):
            assert result.sha == webui.txt2img(prompt=tags("sd15_content", "sd15_style")).sha
        else:  # its loader would rename a file that fails, so it is not asked
            assert "not a .safetensors file" in result.infotexts[0]
            assert result.sha == webui.txt2img().sha
    finally:
        path.unlink()
        webui.refresh_loras()


@pytest.mark.needs("fp8 by a flag")
def test_every_step_in_fp8(webui):
    """Where only a flag at the start asks for it."""
    with webui.beside("fp8", arguments=["--unet-in-fp8-e4m3fn"]) as server:
        server.load("tiny_sd15")
        assert_every_step(server, ("sd15_content", "sd15_style"))
        base = server.txt2img().sha
        assert not server.txt2img(prompt=tags("sd15_content", "sd15_style")).error
        assert server.txt2img().sha == base != webui.txt2img().sha
