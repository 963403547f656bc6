"""The methods beside K-LoRA: every layer is what the host makes of the LoRAs that it is to have."""

import itertools

import numpy as np
import pytest
from kloras import (
    PAIR,
    assert_weights,
    checkpoint_of,
    choice,
    recorded,
    script,
    tags,
    weights_under,
)
from make_loras import compose, layers_of, save, write
from paper import project
from safetensors.torch import load_file
from test_page_xyz import plot

STEPS = 6
METHODS = (
    "Direct merge", "LoRA Switch", "Fixed selection", "Random selection", "Top-K without scale",
    "Without γ", "EST-LoRA",
)  # fmt: skip
CHANGING = [method for method in METHODS if method not in ("Direct merge", "Top-K without scale")]


@pytest.fixture
def pair(model):
    """The names of the checkpoint's content and style LoRA."""
    return model.lora("content"), model.lora("style")


def wanted_of(webui, content, style, more=""):
    """{role: the weights that the host makes of it}."""
    prompts = {
        "content": f"<lora:{content}:1>",
        "style": f"<lora:{style}:1>",
        "both": f"<lora:{content}:1> <lora:{style}:1>",
    }
    return {role: weights_under(webui, f"a cat {more}{x}") for role, x in prompts.items()}


known = {}
"""What `known_of` has asked for, for the checkpoint and the way of storing it that was last."""


def known_of(webui, pair):
    """(the oracle, the weights of each role, of none) for a pair, which no method changes."""
    key = webui.host, webui.loaded, pair
    if known.get("key") != key:
        weights = wanted_of(webui, *pair), weights_under(webui, "a cat")
        known.update(key=key, found=(choice(webui, *pair), *weights))
    return known["found"]


def scale_at(i, steps, t0=0.0, alpha=1.5, beta=0.5):
    """S(t) after `i` of `steps` steps (Eq. 7)."""
    return alpha * (t0 + (1 - t0) * min(i / steps, 1)) + beta


# Direct merge is the host's own two tags ----------------------------------------------------------


@pytest.mark.parametrize("order", ["content first", "style first"])
@pytest.mark.parametrize("weights", [(1, 1), (1, 2), (0.7, -0.4)])
def test_direct_merge_is_the_hosts_two_loras(webui, model, pair, order, weights):
    """Bit for bit, all storage types; the order of two additions decides the last bit."""
    named = list(zip(pair, ("content", "style"), weights, strict=True))
    if order == "style first":
        named.reverse()
    ours = "a cat " + " ".join(f"<klora:{name}:{w}:{role}>" for name, role, w in named)
    theirs = "a cat " + " ".join(f"<lora:{name}:{w}>" for name, _, w in named)
    fields = script(method="Direct merge", layers="all")
    result, calls = recorded(webui, prompt=ours, alwayson_scripts=fields)
    wanted, calls_wanted = recorded(webui, prompt=theirs)
    assert result.sha == wanted.sha
    assert [call["weights"] for call in calls] == [call["weights"] for call in calls_wanted]
    assert result.sha != webui.txt2img(prompt=tags(*pair)).sha


@pytest.mark.parametrize(
    ("content", "style"),
    [
        ("content_all", "style_all"),
        ("content_te", "style_te"),
        ("content_lokr", "style_loha"),
        ("content_all", "style_dora"),
        ("content", "style_full"),
        ("content_down", "style_up"),
        ("content_down", "style_all"),
        ("content", "content"),
    ],
)
def test_direct_merge_of_files_of_every_kind(webui, content, style):
    """All layers, text encoder and biases; layers of one file; one file twice."""
    content, style = f"sd15_{content}", f"sd15_{style}"
    fields = script(method="Direct merge", layers="all")
    result = webui.txt2img(prompt=tags(content, style), alwayson_scripts=fields)
    assert "K-LoRA error" not in result.infotexts[0]
    if content == style:  # the host applies a file that is named twice only once
        wanted = webui.txt2img(prompt=f"a cat <lora:{content}:2>")
        assert np.abs(result.images[0].astype(int) - wanted.images[0]).max() <= 1
    else:
        wanted = webui.txt2img(prompt=f"a cat <lora:{content}:1> <lora:{style}:1>")
        assert result.sha == wanted.sha


@pytest.mark.needs("flux")
@pytest.mark.parametrize("content", ["flux_content", "flux_content_split"])
@pytest.mark.parametrize("style", ["flux_style", "flux_style_split"])
def test_direct_merge_of_flux_files_that_split_what_the_model_fuses(webui, host, content, style):
    webui.load(host.models["flux"])
    fields = script(method="Direct merge", layers="all")
    result = webui.txt2img(prompt=tags(content, style), alwayson_scripts=fields)
    assert result.sha == webui.txt2img(prompt=f"a cat <lora:{content}:1> <lora:{style}:1>").sha


def test_direct_merge_of_the_attention_layers_leaves_the_others(webui):
    pair = "sd15_content_all", "sd15_style_all"
    fields = script(method="Direct merge")
    _, (call, *_) = recorded(webui, prompt=tags(*pair), alwayson_scripts=fields)
    wanted = weights_under(webui, "a cat <lora:{}:1> <lora:{}:1>".format(*pair))
    base = weights_under(webui, "a cat")
    changed = {name for name in base if call["weights"][name] != base[name]}
    assert changed == {name for name in base if ".attn" in name and wanted[name] != base[name]}
    assert all(call["weights"][name] == wanted[name] for name in changed)


# what each layer has at each step, against the oracle ---------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_at_every_step_every_layer_is_what_the_method_says(webui, model, pair, method):
    """All storage types: the raw weights of each model call."""
    if method in METHODS[4:] and model.options:
        pytest.skip("K-LoRA's own tests have these storage types")
    reading, wanted, base = known_of(webui, pair)
    fields = script(method=method)
    result, calls = recorded(webui, prompt=tags(*pair), steps=STEPS, alwayson_scripts=fields)
    assert f"method={method}; files=" in result.infotexts[0]
    assert len(calls) == STEPS
    plan = [reading.other(method, i, scale_at(i, STEPS)) for i in range(STEPS)]
    if method in CHANGING:
        assert any(a != b for a, b in itertools.pairwise(plan)), "nothing flips: no test"
    for roles, call in zip(plan, calls, strict=True):
        assert_weights(call["weights"], wanted, roles, base)


@pytest.mark.parametrize(("start", "end"), [(100, 30), (10, 90)])
def test_at_every_step_the_layers_have_their_share(webui, model, pair, start, end):
    if model.options:
        pytest.skip("K-LoRA's own tests have these storage types")
    reading, wanted, base = known_of(webui, pair)
    fields = script(scale="share", share_start=start, share_end=end)
    _, calls = recorded(webui, prompt=tags(*pair), steps=STEPS, alwayson_scripts=fields)
    plan = [reading.with_share(start + (end - start) * i / STEPS) for i in range(STEPS)]
    assert all(a != b for a, b in itertools.pairwise(plan)), "nothing flips: no test"
    for roles, call in zip(plan, calls, strict=True):
        assert_weights(call["weights"], wanted, roles, base)


def test_hires_with_its_own_share(webui, expected):
    """After a first pass with S, from the progress at which the hires pass starts."""
    reading, wanted, base = expected
    fields = script(hires="own", hires_scale="share", hires_share_start=80, hires_share_end=0)
    _, calls = recorded(
        webui, prompt=tags(*PAIR), steps=3, enable_hr=True, hr_scale=2, denoising_strength=0.6,
        hr_second_pass_steps=4, alwayson_scripts=fields,
    )  # fmt: skip
    plan = [reading.step(i, 3) for i in range(3)]
    plan += [reading.with_share(80 * (1 - (0.4 + 0.6 * i / 4))) for i in range(4)]
    for roles, call in zip(plan, calls, strict=True):
        assert_weights(call["weights"], wanted, roles, base)


@pytest.fixture
def captured(webui, model, pair, last=[]):  # noqa: B006 - the server keeps what it captured
    """Lets the server hold the weights of each role under its name, once for all methods."""
    if last != [webui.process.pid, webui.loaded]:
        content, style = (f"<lora:{name}:1>" for name in pair)
        for role, loras in (("content", content), ("style", style), ("both", f"{content} {style}")):
            assert not webui.capture(role, f"a cat {loras}").error
        last[:] = [webui.process.pid, webui.loaded]


@pytest.mark.models("sd15$|sdxl$|flux$")
@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("method", METHODS)
def test_the_picture_is_that_of_whole_layers_swapped_per_step(webui, model, pair, method):
    """Captured weights copied in, without the host's LoRA code."""
    reading, _, _ = known_of(webui, pair)
    plan = {str(i): reading.other(method, i, scale_at(i, STEPS)) for i in range(STEPS)}
    webui.next(swap=plan)
    wanted = webui.txt2img(steps=STEPS)
    result = webui.txt2img(prompt=tags(*pair), steps=STEPS, alwayson_scripts=script(method=method))
    assert result.sha == wanted.sha


@pytest.fixture
def expected(webui):
    """What `known_of` says of the pair on tiny_sd15."""
    return known_of(webui, PAIR)


@pytest.mark.parametrize("seed", [1, 2, 10**9])
def test_the_seed_decides_a_random_selection_and_nothing_else(webui, expected, seed):
    reading, wanted, base = expected
    fields = script(method="Random selection", seed=seed)
    result, calls = recorded(webui, prompt=tags(*PAIR), steps=STEPS, alwayson_scripts=fields)
    assert f"seed={seed}; files=" in result.infotexts[0]
    for i, call in enumerate(calls):
        roles = reading.other("Random selection", i, None, seed)
        assert_weights(call["weights"], wanted, roles, base)


def test_another_seed_of_the_picture_is_the_same_selection(webui, expected):
    reading, wanted, base = expected
    fields = dict(steps=STEPS, alwayson_scripts=script(method="Random selection", seed=3))
    for seed in (1, 2):
        _, calls = recorded(webui, prompt=tags(*PAIR), seed=seed, batch_size=2, **fields)
        for i, call in enumerate(calls):
            roles = reading.other("Random selection", i, None, 3)
            assert_weights(call["weights"], wanted, roles, base)


@pytest.mark.parametrize("method", ["LoRA Switch", "Fixed selection"])
@pytest.mark.parametrize("sampler", ["Euler", "Heun"])
def test_img2img_and_two_calls_a_step(webui, expected, method, sampler):
    reading, wanted, base = expected
    image = np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)
    _, calls = recorded(
        webui, image, prompt=tags(*PAIR), steps=8, sampler_name=sampler, denoising_strength=0.9,
        alwayson_scripts=script(method=method),
    )  # fmt: skip
    for number, call in enumerate(calls):
        i = number // 2 if sampler == "Heun" else number
        roles = reading.other(method, i, scale_at(i, 8, t0=0.1))
        assert_weights(call["weights"], wanted, roles, base)


def test_hires_with_its_own_scale(webui, expected):
    """Fixed selection: content in the first pass, style in the second."""
    reading, wanted, base = expected
    fields = script(method="Fixed selection", alpha=0, hires="own", hires_alpha=0, hires_beta=1)
    _, calls = recorded(
        webui, prompt=tags(*PAIR), steps=3, enable_hr=True, hr_scale=2, denoising_strength=0.6,
        hr_second_pass_steps=3, alwayson_scripts=fields,
    )  # fmt: skip
    assert [call["hr"] for call in calls] == [False] * 3 + [True] * 3
    for call in calls:
        roles = reading.other("Fixed selection", 0, 1 if call["hr"] else 0.5)
        assert_weights(call["weights"], wanted, roles, base)


def test_other_loras_apply_as_without_us(webui, expected):
    reading = expected[0]
    other = "<lora:sd15_other:0.6> "
    base = weights_under(webui, f"a cat {other}")
    wanted = wanted_of(webui, *PAIR, more=other)
    for method in ("Direct merge", "LoRA Switch"):
        fields = dict(prompt=tags(*PAIR, f" {other}"), alwayson_scripts=script(method=method))
        _, calls = recorded(webui, steps=2, **fields)
        for i, call in enumerate(calls):
            assert_weights(call["weights"], wanted, reading.other(method, i, None), base)


# LoRA Composite -----------------------------------------------------------------------------------

COMPOSITE = script(method="LoRA Composite")


@pytest.mark.models(smoke="sd15$")
def test_composite_gives_the_model_one_lora_at_a_time(webui, model, pair):
    """All storage types: what the last prediction of each step has; the next begins with the same.
    A step has two, or two for each prompt where the host predicts for the prompts one by one."""
    reading, wanted, base = known_of(webui, pair)
    result, calls = recorded(webui, prompt=tags(*pair), steps=STEPS, alwayson_scripts=COMPOSITE)
    assert "method=LoRA Composite; files=" in result.infotexts[0]
    assert "K-LoRA error" not in result.infotexts[0]
    roles = {}
    for role in ("content", "style"):
        own = [*reading.top, *(layer for layer, of in reading.only.items() if of == role)]
        roles[role] = dict.fromkeys(own, role)
    apart = len({call["weights"] == calls[0]["weights"] for call in calls}) == 1
    for i, call in enumerate(calls):
        role = "content" if apart else ("style", "content")[i % 2]
        assert_weights(call["weights"], wanted, roles[role], base)


@pytest.mark.models("sd15$|sdxl$|flux$|zimage$|qwen$|krea$", smoke="sd15$")
@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("order", ["content first", "style first"])
def test_composite_is_the_mean_of_two_predictions(webui, model, pair, order):
    """Captured weights copied in, without the host's LoRA code."""
    webui.next(mean=["content", "style"])
    wanted = webui.txt2img(steps=STEPS)
    names = [f"<klora:{pair[0]}:1:content>", f"<klora:{pair[1]}:1:style>"]
    if order == "style first":
        names.reverse()
    prompt = f"a cat {' '.join(names)}"
    result = webui.txt2img(prompt=prompt, steps=STEPS, alwayson_scripts=COMPOSITE)
    assert result.sha == wanted.sha
    assert result.sha not in {
        webui.txt2img(prompt=tags(*pair), steps=STEPS, alwayson_scripts=script(method=method)).sha
        for method in ("Direct merge", "LoRA Switch")
    }
    webui.next(mean=["content", "content"])
    alone = webui.txt2img(steps=STEPS)
    assert alone.sha == webui.txt2img(prompt=f"a cat <lora:{pair[0]}:1>", steps=STEPS).sha


@pytest.mark.parametrize(
    ("content", "style"),
    [("content_all", "style_all"), ("content_te", "style_te"), ("content_down", "style_up"),
     ("content_lokr", "style_loha"), ("content_all", "style_dora"), ("content", "content")],
)  # fmt: skip
@pytest.mark.parametrize("weights", [(1, 1), (0.7, -0.4)])
def test_composite_of_files_of_every_kind(webui, content, style, weights):
    """All layers, layers of one file, biases; both are in the encoded text."""
    pair = f"sd15_{content}", f"sd15_{style}"
    for name, weight in zip(pair, weights, strict=True):
        assert not webui.capture(f"{name} {weight}", f"a cat <lora:{name}:0:{weight}>").error
    texts = " ".join(
        f"<lora:{name}:{weight}:0>"
        for name, weight in dict(zip(pair, weights, strict=True)).items()
    )
    if content == style:  # the host applies a file that is named twice only once
        texts = ""
    webui.next(mean=[f"{name} {weight}" for name, weight in zip(pair, weights, strict=True)])
    wanted = webui.txt2img(prompt=f"a cat {texts}", steps=STEPS)
    fields = script(method="LoRA Composite", layers="all", text_encoder=content != style)
    prompt = tags(*(f"{name}:{weight}" for name, weight in zip(pair, weights, strict=True)))
    result = webui.txt2img(prompt=prompt, steps=STEPS, alwayson_scripts=fields)
    assert "K-LoRA error" not in result.infotexts[0]
    assert result.sha == wanted.sha


@pytest.mark.usefixtures("captured")
def test_composite_in_every_pass_and_sampler(webui, model, pair):
    for fields in (
        {"sampler_name": "Heun"},
        {"sampler_name": "DPM++ SDE"},
        {"batch_size": 2, "n_iter": 2},
        {"cfg_scale": 1},
        {"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.6, "hr_second_pass_steps": 3},
    ):
        webui.next(mean=["content", "style"])
        wanted = webui.txt2img(steps=3, **fields)
        result = webui.txt2img(prompt=tags(*pair), steps=3, alwayson_scripts=COMPOSITE, **fields)
        assert result.sha == wanted.sha, fields


@pytest.mark.models("sd15$|sdxl$")
@pytest.mark.needs("patchers")
@pytest.mark.usefixtures("captured")
def test_composite_with_a_controlnet(webui, model, pair):
    """The UNet takes its tensors out of the lists that it is given, and is called twice."""
    plain = webui.txt2img(prompt=tags(*pair), steps=3, alwayson_scripts=COMPOSITE)
    webui.next(mean=["content", "style"], control=0.5)
    wanted = webui.txt2img(steps=3)
    webui.next(control=0.5)
    result = webui.txt2img(prompt=tags(*pair), steps=3, alwayson_scripts=COMPOSITE)
    assert result.sha == wanted.sha != plain.sha


def test_composite_beside_a_lora_of_the_hosts(webui):
    other = "<lora:sd15_other:0.6>"
    for role, name in zip(("one", "two"), PAIR, strict=True):
        assert not webui.capture(role, f"a cat {other} <lora:{name}:1>").error
    webui.next(mean=["one", "two"])
    wanted = webui.txt2img(steps=STEPS)
    prompt = f"{tags(*PAIR)} {other}"
    result = webui.txt2img(prompt=prompt, steps=STEPS, alwayson_scripts=COMPOSITE)
    assert result.sha == wanted.sha


# B-LoRA -------------------------------------------------------------------------------------------

BLOCKS = {"content": "output_blocks.0.1.", "style": "output_blocks.1.1."}
"""In SDXL's own names: up_blocks.0.attentions.0 and .1 of diffusers."""


def of_own_blocks(webui, pair):
    """The names of two files that have the block of each role alone, and nothing for the text
    encoders."""
    layers = layers_of(checkpoint_of(webui))
    names = []
    for name, beginning in zip(pair, BLOCKS.values(), strict=True):
        file = webui.loras / f"{name}.safetensors"
        winners = {part: file for part in layers if part.startswith(beginning)}
        names.append(f"{name}_block")
        compose(webui.loras / f"{name}_block.safetensors", winners, layers)
    webui.refresh_loras()
    return names


@pytest.mark.models("sdxl$")
@pytest.mark.parametrize("weights", [(1, 1), (0.7, -0.4)])
def test_b_lora_is_two_files_of_one_block_each(webui, model, weights):
    """Whole files, with text encoder parts; and the files of one block each as B-LoRAs are."""
    pair = model.lora("content_te"), model.lora("style_te")
    blocks = of_own_blocks(webui, pair)
    c, s = weights
    wanted, calls_wanted = recorded(
        webui, prompt=f"a cat <lora:{blocks[0]}:{c}> <lora:{blocks[1]}:{s}>"
    )
    fields = script(method="B-LoRA")
    for content, style in (pair, blocks, (pair[0], blocks[1])):
        result, calls = recorded(
            webui, prompt=tags(f"{content}:{c}", f"{style}:{s}"), alwayson_scripts=fields
        )
        assert "method=B-LoRA; files=" in result.infotexts[0]
        assert result.sha == wanted.sha
        assert [x["weights"] for x in calls] == [x["weights"] for x in calls_wanted]
        assert [x["cond"] for x in calls] == [x["cond"] for x in calls_wanted]
    assert wanted.sha not in (webui.txt2img().sha, webui.txt2img(prompt=tags(*pair)).sha)


@pytest.mark.models("sdxl$")
def test_b_lora_of_all_layers(webui, model):
    pair = model.lora("content_linear"), model.lora("style_linear")
    for name, seed in zip(pair, (11, 22), strict=True):
        layers = layers_of(checkpoint_of(webui))
        file = webui.loras / f"{name}.safetensors"
        write(file, layers, spelling="ldm", seed=seed, which="linear")
    blocks = of_own_blocks(webui, pair)
    fields = script(method="B-LoRA", layers="all")
    result = webui.txt2img(prompt=tags(*pair), alwayson_scripts=fields)
    wanted = webui.txt2img(prompt="a cat <lora:{}:1> <lora:{}:1>".format(*blocks))
    assert result.sha == wanted.sha
    attention = webui.txt2img(prompt=tags(*pair), alwayson_scripts=script(method="B-LoRA"))
    assert attention.sha != result.sha


@pytest.mark.models("sdxl$")
def test_b_lora_in_turn_with_the_others(webui, model):
    pair = model.lora("content_te"), model.lora("style_te")
    prompt, base = tags(*pair), webui.txt2img().sha
    found = []
    for method in ("K-LoRA", "B-LoRA", "LoRA Switch", "B-LoRA", "K-LoRA"):
        result = webui.txt2img(prompt=prompt, alwayson_scripts=script(method=method))
        assert "K-LoRA error" not in result.infotexts[0]
        found.append(result.sha)
        assert webui.txt2img().sha == base
    assert found[:2] == found[:-3:-1]
    assert len(set(found)) == 3


@pytest.mark.models("sdxl$")
def test_b_lora_in_the_plan_of_the_api(webui, model):
    pair = model.lora("content"), model.lora("style")
    request = {"content": pair[0], "style": pair[1], "steps": STEPS}
    plan = webui.post("/klora/plan", {**request, "settings": {"method": "B-LoRA"}})
    layers = [x for x in choice(webui, *pair).top if x.startswith(tuple(BLOCKS.values()))]
    assert [layer["name"] for layer in plan["layers"]] == sorted(
        x.replace(".", "_") for x in layers
    )
    for layer in plan["layers"]:
        content = layer["name"].startswith("output_blocks_0_1_")
        assert layer["content"] == [content] * STEPS
        assert layer["style"] == [not content] * STEPS
    assert plan["gamma"] is None
    assert "nothing else is applied" in plan["summary"]
    assert any("other layers are left out" in x for x in plan["warnings"])


@pytest.mark.models("sdxl$")
def test_b_lora_with_the_files_the_wrong_way_round(webui, model):
    content, style = of_own_blocks(webui, (model.lora("content"), model.lora("style")))
    fields = script(method="B-LoRA")
    result = webui.txt2img(prompt=tags(style, content), alwayson_scripts=fields)
    assert "swap the two" in result.infotexts[0]
    assert result.sha == webui.txt2img().sha
    both = webui.txt2img(prompt=tags(content, content), alwayson_scripts=fields)
    assert "K-LoRA error" not in both.infotexts[0]
    assert both.sha == webui.txt2img(prompt=f"a cat <lora:{content}:1>").sha


@pytest.mark.models("sd15$|flux$")
def test_b_lora_on_another_model_is_a_sentence(webui, model, pair):
    result = webui.txt2img(prompt=tags(*pair), alwayson_scripts=script(method="B-LoRA"))
    assert "K-LoRA error" in result.infotexts[0]
    words = "B-LoRA is for SDXL" if model.family == "flux" else "and B-LoRA applies nothing else"
    assert words in result.infotexts[0]
    assert result.sha == webui.txt2img().sha


# NP-LoRA ------------------------------------------------------------------------------------------


def projected(webui, content, style, **how):
    """(the name of the content's file as NP-LoRA has it beside the style, their overlap)."""
    files = [webui.loras / f"{name}.safetensors" for name in (content, style)]
    name = f"{content}_off_{style}"
    overlap = project(*files, checkpoint_of(webui), webui.loras / f"{name}.safetensors", **how)
    webui.refresh_loras()
    return name, overlap


@pytest.mark.models(smoke="sd15$")
@pytest.mark.parametrize("order", ["content first", "style first"])
def test_np_lora_is_two_loras_with_the_content_written_anew(webui, model, pair, order):
    """Bit for bit, all storage types, at weights of the tags."""
    content, _ = projected(webui, *pair)
    ours = [f"<klora:{pair[0]}:0.7:content>", f"<klora:{pair[1]}:-0.4:style>"]
    theirs = [f"<lora:{content}:0.7>", f"<lora:{pair[1]}:-0.4>"]
    if order == "style first":
        ours.reverse()
        theirs.reverse()
    fields = script(method="NP-LoRA")
    result, calls = recorded(webui, prompt=f"a cat {' '.join(ours)}", alwayson_scripts=fields)
    wanted, calls_wanted = recorded(webui, prompt=f"a cat {' '.join(theirs)}")
    assert "method=NP-LoRA; files=" in result.infotexts[0]
    assert result.sha == wanted.sha
    assert [call["weights"] for call in calls] == [call["weights"] for call in calls_wanted]
    fields = script(method="Direct merge")
    _, (merged, *_) = recorded(webui, prompt=f"a cat {' '.join(ours)}", alwayson_scripts=fields)
    # From a cached fp16 weight AUTOMATIC1111 begins with each LoRA anew (networks.py,
    # network_apply_weights): of two only the last is left.
    if not ("cache_fp16_weight" in model.options and order == "content first"):
        assert merged["weights"] != calls[0]["weights"], "the projection shows nowhere: no test"


@pytest.mark.parametrize(
    ("content", "style"),
    [
        ("content_all", "style_all"),
        ("style_all", "content_all"),
        ("content_te", "style_te"),
        ("content", "style_bf16"),
        ("style_bf16", "content"),
        ("content_lokr", "style_loha"),
        ("content_all", "style_dora"),
        ("style_dora", "content_all"),
        ("content", "style_full"),
        ("style_full", "content_all"),
        ("content_down", "style_all"),
        ("content", "content"),
    ],
)
def test_np_lora_of_files_of_every_kind(webui, content, style):
    """All layers, text encoder and biases; layers of one file; one file twice; full differences.
    What has no LoRA factors stays as in Direct merge."""
    content, style = f"sd15_{content}", f"sd15_{style}"
    fields = script(method="NP-LoRA", layers="all")
    name, overlap = projected(webui, content, style)
    result = webui.txt2img(prompt=tags(content, style), alwayson_scripts=fields)
    assert "K-LoRA error" not in result.infotexts[0]
    wanted = webui.txt2img(prompt=f"a cat <lora:{name}:1> <lora:{style}:1>")
    assert result.sha == wanted.sha
    request = {"content": content, "style": style, "settings": {"layers": "all"}}
    request["settings"]["method"] = "NP-LoRA"
    plan = webui.post("/klora/plan", request)
    assert plan["overlap"] == (overlap and pytest.approx(overlap, rel=1e-3))


@pytest.mark.needs("flux")
@pytest.mark.parametrize("content", ["flux_content", "flux_content_split"])
@pytest.mark.parametrize("style", ["flux_style", "flux_style_split"])
def test_np_lora_of_flux_files_that_split_what_the_model_fuses(webui, host, content, style):
    webui.load(host.models["flux"])
    name, overlap = projected(webui, content, style)
    fields = script(method="NP-LoRA")
    result = webui.txt2img(prompt=tags(content, style), alwayson_scripts=fields)
    assert result.sha == webui.txt2img(prompt=f"a cat <lora:{name}:1> <lora:{style}:1>").sha
    request = {"content": content, "style": style, "settings": {"method": "NP-LoRA"}}
    assert webui.post("/klora/plan", request)["overlap"] == pytest.approx(overlap, rel=1e-3)


def test_np_lora_leaves_the_content_to_others_as_it_is(webui):
    """With another style, with other methods, in the other role, and alone, right after."""
    content, style, other = *PAIR, "sd15_other"
    makers = [
        *(
            (tags(*names), method)
            for names in ((content, style), (content, other), (style, content))
            for method in ("NP-LoRA", "Direct merge", "K-LoRA")
        ),
        (f"a cat <lora:{content}:1>", "K-LoRA"),
        (f"a cat <lora:{content}:1> <lora:{style}:1>", "K-LoRA"),
        ("a cat", "K-LoRA"),
    ]

    def make(i):
        prompt, method = makers[i]
        fields = script(method=method, enabled="klora" in prompt)
        return webui.txt2img(prompt=prompt, alwayson_scripts=fields).sha

    first = [make(i) for i in range(len(makers))]
    assert first[1] == first[-2], "Direct merge is the two <lora:>"
    assert len({*first[:3], *first[3:6], first[6], first[8], first[-3], first[-1]}) == 10
    order = list(np.random.default_rng(1).permutation(len(makers)))
    assert [make(i) for i in order] == [first[i] for i in order]
    assert make(0) == first[0]
    name, _ = projected(webui, content, style)
    assert webui.txt2img(prompt=f"a cat <lora:{name}:1> <lora:{style}:1>").sha == first[0]


def test_np_lora_of_a_hires_picture(webui):
    name, _ = projected(webui, *PAIR)
    fields = dict(
        steps=2, enable_hr=True, hr_scale=2, denoising_strength=0.6, hr_second_pass_steps=2
    )
    result = webui.txt2img(prompt=tags(*PAIR), alwayson_scripts=script(method="NP-LoRA"), **fields)
    wanted = webui.txt2img(prompt=f"a cat <lora:{name}:1> <lora:{PAIR[1]}:1>", **fields)
    assert result.sha == wanted.sha


def test_np_lora_of_row_spaces_apart_is_direct_merge_and_says_so(webui):
    """The content answers to the even inputs, the style to the odd ones."""
    names = "sd15_content_even", "sd15_style_odd"
    for name, source, start in zip(names, PAIR, (1, 0), strict=True):
        held = load_file(webui.loras / f"{source}.safetensors")
        for key, tensor in held.items():
            if "lora_down" in key:
                tensor[:, start::2] = 0
        save(webui.loras / f"{name}.safetensors", held)
    webui.refresh_loras()
    mark = webui.mark()
    found = {
        method: webui.txt2img(prompt=tags(*names), alwayson_scripts=script(method=method))
        for method in ("NP-LoRA", "Direct merge")
    }
    assert found["NP-LoRA"].sha == found["Direct merge"].sha
    said = "hardly overlap (0.0 % of content in the style's directions)"
    assert webui.log_since(mark).count(said) == 1
    request = {"content": names[0], "style": names[1], "settings": {"method": "NP-LoRA"}}
    plan = webui.post("/klora/plan", request)
    assert plan["overlap"] < 1e-6
    assert any(said in sentence for sentence in plan["warnings"])
    request["settings"] = {}
    assert webui.post("/klora/plan", request)["overlap"] is None


# one after the other ------------------------------------------------------------------------------


def test_methods_in_turn_leave_nothing_behind(webui):
    """Each image is the one of a first time, whichever method went before; so is the base."""
    base = webui.txt2img(steps=STEPS).sha
    both = webui.txt2img(prompt="a cat <lora:{}:0.9> <lora:{}:1>".format(*PAIR), steps=STEPS).sha
    # At a weight that no other test has, so that the pair is fused anew, for K-LoRA at first.
    fields = dict(prompt=tags(f"{PAIR[0]}:0.9", PAIR[1]), steps=STEPS)

    def images(order, between):
        found = {}
        for method in order:
            found[method] = webui.txt2img(**fields, alwayson_scripts=script(method=method)).sha
            if between:
                assert webui.txt2img(steps=STEPS).sha == base
        return found

    methods = ["K-LoRA", *METHODS, "NP-LoRA", "LoRA Composite"]
    first = images(methods, between=True)
    assert len({*first.values(), base}) == len(methods) + 1
    assert first["Direct merge"] == both
    assert images(methods[::-1], between=False) == first
    assert images([*methods[::2], *methods[1::2]], between=False) == first
    assert webui.txt2img(steps=STEPS).sha == base


@pytest.mark.parametrize("method", ["Direct merge", "LoRA Switch", "LoRA Composite"])
def test_an_image_that_ended_early_leaves_nothing_behind(webui, method):
    base = webui.txt2img(steps=STEPS).sha
    fields = dict(prompt=tags(*PAIR), steps=STEPS, alwayson_scripts=script(method=method))
    whole = webui.txt2img(**fields).sha
    for end in ("raise_at", "interrupt_at"):
        webui.next(**{end: 3})
        webui.txt2img(**fields)
        assert webui.txt2img(steps=STEPS).sha == base
        webui.next(**{end: 3})
        webui.txt2img(**fields)
        assert webui.txt2img(**fields).sha == whole


# what the person is told --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["K-LoRA", *METHODS, "NP-LoRA", "LoRA Composite"])
def test_the_plan_of_the_api(webui, expected, method):
    reading = expected[0]
    request = {"content": PAIR[0], "style": PAIR[1], "steps": STEPS}
    plan = webui.post("/klora/plan", {**request, "settings": {"method": method}})
    assert plan["method"] == method
    compares = method in ("K-LoRA", *METHODS[4:])
    assert (plan["gamma"] is not None) == compares
    assert all((layer["ratio"] is not None) == compares for layer in plan["layers"])
    for i in range(STEPS):
        scale = scale_at(i, STEPS)
        roles = reading.at(scale) if method == "K-LoRA" else reading.other(method, i, scale)
        for role in ("content", "style"):
            share = sum(found in (role, "both") for found in roles.values()) / len(roles)
            assert plan[f"{role}_share"][i] == pytest.approx(share)
            assert sum(layer[role][i] for layer in plan["layers"]) == round(share * len(roles))
    assert plan["summary"].startswith(f"{method}: ") == (method != "K-LoRA")


@pytest.mark.parametrize(
    ("label", "name", "values", "more"),
    [
        ("Method", "method", ["K-LoRA", *METHODS, "NP-LoRA", "LoRA Composite"], {}),
        ("Selection seed", "seed", [0, 1, 2], {"method": "Random selection"}),
        ("Share at the start", "share_start", [100, 50], {"scale": "share"}),
        ("Share at the end", "share_end", [100, 0], {"scale": "share"}),
    ],
)
def test_the_axes_of_a_plot(webui, label, name, values, more):
    fields = [script(**{**more, name: value}) for value in values]
    single = [webui.txt2img(prompt=tags(*PAIR), alwayson_scripts=x).sha for x in fields]
    written = ",".join(map(str, values))
    result = plot(webui, label, written, prompt=tags(*PAIR), alwayson_scripts=script(**more))
    assert not result.error
    assert [sha for sha in single if sha in result.hashes] == single
    assert len(set(single)) == len(values)


def test_the_default_method_comes_from_the_settings_page(webui):
    wanted = webui.txt2img(prompt=tags(*PAIR), alwayson_scripts=script(method="Direct merge"))
    webui.post("/sdapi/v1/options", {"klora_method": "Direct merge"})
    try:
        result = webui.txt2img(prompt=tags(*PAIR))
    finally:
        webui.post("/sdapi/v1/options", {"klora_method": "K-LoRA"})
    assert result.sha == wanted.sha
    assert "method=Direct merge" in result.infotexts[0]


@pytest.mark.needs("infotext field")
def test_an_infotext_makes_the_same_picture_again(webui):
    for more in (dict(method="Without γ"), dict(method="Random selection", seed=5)):
        fields = script(content=PAIR[0], style=PAIR[1], **more)
        first = webui.txt2img(alwayson_scripts=fields)
        again = webui.txt2img(infotext=first.infotexts[0])
        assert not again.error
        assert again.sha == first.sha
        assert again.infotexts[0] == first.infotexts[0]
