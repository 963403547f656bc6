"""Forge Neo's refiners: at a noise level or after some steps, with another checkpoint's weights in
the same model, and with other names in the `<lora:>` tags."""

import pytest
from kloras import (
    PAIR,
    Expectation,
    assert_weights,
    choice,
    recorded,
    script,
    tags,
    weights_under,
)

STEPS = 6
REFINER = {"refiner_checkpoint": "tiny_sd15_b", "refiner_switch_at": 0.5}

pytestmark = pytest.mark.needs("refiner at a noise level")
FAST = pytest.param(True, marks=pytest.mark.needs("fast refiner"))


@pytest.fixture
def both(webui, host, once={}):  # noqa: B006 - kept for the module, per host
    """What the pair gives in the checkpoint and in its refiner."""
    if host not in once:
        webui.load("tiny_sd15_b")
        refined = Expectation(webui)
        webui.load("tiny_sd15")
        once[host] = Expectation(webui), refined
        assert once[host][0].base != refined.base
    return once[host]


def check(calls, both, first):
    """Each call has the pair's weights: in the refiner from call `first` on."""
    assert 0 < first < len(calls)
    for i, call in enumerate(calls):
        both[i >= first].check(call, i, STEPS)


def assert_base_is_back(webui, both):
    """Pictures without tags have the checkpoint's own weights, and with them the pair's."""
    both[0].check_base(recorded(webui, prompt="a cat", steps=1)[1][0])
    for i, call in enumerate(recorded(webui, prompt=tags(*PAIR), steps=STEPS)[1]):
        both[0].check(call, i, STEPS)
    both[0].check_base(recorded(webui, prompt="a cat", steps=1)[1][0])


@pytest.mark.parametrize("fast", [False, FAST])
def test_after_some_steps(webui, both, fast):
    """The fast one loads the other weights into the model that is in use, and tells nobody."""
    options = {"refiner_use_steps": True, "refiner_fast_sd": fast}
    result, calls = recorded(
        webui, prompt=tags(*PAIR), steps=STEPS, override_settings=options, **REFINER
    )
    assert "K-LoRA error" not in result.infotexts[0]
    check(calls, both, first=3)
    assert_base_is_back(webui, both)


@pytest.mark.parametrize("fast", [False, FAST])
def test_at_a_noise_level(webui, both, fast):
    options = {"refiner_use_steps": False, "refiner_fast_sd": fast}
    sigmas = [call["sigma"] for call in recorded(webui, steps=STEPS)[1]]
    level = (sigmas[1] + sigmas[2]) / 2
    assert level < 14
    _, calls = recorded(
        webui, prompt=tags(*PAIR), steps=STEPS, override_settings=options,
        **{**REFINER, "refiner_switch_at": level},
    )  # fmt: skip
    check(calls, both, first=2)
    assert_base_is_back(webui, both)


@pytest.mark.parametrize("fast", [False, FAST])
def test_other_loras_change_their_names_and_k_lora_goes_on(webui, both, fast):
    """`refiner_lora_replacement`: in Wan's two halves each has its own files."""
    options = {
        "refiner_use_steps": True,
        "refiner_fast_sd": fast,
        "refiner_lora_replacement": "sd15_other=sd15_content_ldm",
    }
    prompts = {"tiny_sd15": "<lora:sd15_other:0.6>", "tiny_sd15_b": "<lora:sd15_content_ldm:0.6>"}
    reading, wanted, base = choice(webui, *PAIR), {}, {}
    for checkpoint in ("tiny_sd15_b", "tiny_sd15"):
        webui.load(checkpoint)
        other = f"a cat {prompts[checkpoint]}"
        base[checkpoint] = weights_under(webui, other)
        wanted[checkpoint] = {
            role: weights_under(webui, f"{other} <lora:{name}:1>")
            for role, name in zip(("content", "style"), PAIR, strict=True)
        }
    result, calls = recorded(
        webui, prompt=tags(*PAIR, f" {prompts['tiny_sd15']}"), steps=STEPS,
        override_settings=options, **REFINER,
    )  # fmt: skip
    assert "K-LoRA error" not in result.infotexts[0]
    for i, call in enumerate(calls):
        checkpoint = "tiny_sd15" if i < 3 else "tiny_sd15_b"
        assert_weights(
            call["weights"], wanted[checkpoint], reading.step(i, STEPS), base[checkpoint]
        )
    for checkpoint in base:  # a fast refiner leaves `<lora:>` on, until a checkpoint is loaded
        webui.load(checkpoint)
        webui.txt2img(steps=1)
    assert_base_is_back(webui, both)


@pytest.mark.parametrize("fast", [False, FAST])
def test_a_refiner_and_an_error_after_it(webui, both, fast):
    options = {"refiner_use_steps": True, "refiner_fast_sd": fast}
    webui.next(record=True, merge_fails_after=[3, "other"])
    result = webui.txt2img(prompt=tags(*PAIR), steps=STEPS, override_settings=options, **REFINER)
    assert "K-LoRA error" in result.infotexts[0]
    calls = webui.last()
    both[1].check_base(calls[-1])
    assert_base_is_back(webui, both)


@pytest.mark.parametrize("where", ["tags", "accordion"])
def test_other_names_in_k_lora_too(webui, both, where):
    """What the host does to `<lora:>` tags."""
    webui.load("tiny_sd15_b")
    refined = Expectation(webui, PAIR[0], "sd15_other")
    webui.load("tiny_sd15")
    options = {"refiner_use_steps": True, "refiner_lora_replacement": "sd15_style=sd15_other"}
    fields = {"prompt": tags(*PAIR)}
    if where == "accordion":
        fields = {"alwayson_scripts": script(content=PAIR[0], style=PAIR[1])}
    result, calls = recorded(webui, steps=STEPS, override_settings=options, **fields, **REFINER)
    assert "K-LoRA error" not in result.infotexts[0]
    check(calls, (both[0], refined), first=3)
    assert_base_is_back(webui, both)
