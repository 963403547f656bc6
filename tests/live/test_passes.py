"""Invariant 5: the step that each model call belongs to, in every kind of generation."""

import itertools

import numpy as np
import pytest
from kloras import (
    PAIR,
    Expectation,
    always,
    assert_weights,
    choice,
    is_attention,
    recorded,
    script,
    tags,
    weights_under,
)

STEPS = 6
ONE_CALL = (
    "Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE", "DPM++ 3M SDE", "LMS", "DPM fast",
    "DPM adaptive", "DDIM", "DDIM CFG++", "UniPC", "LCM", "IPNDM", "IPNDM_V", "DEIS", "DDPM",
)  # fmt: skip
TWO_CALLS = ("Heun", "DPM2", "DPM2 a", "DPM++ SDE", "DPM++ 2S a", "Restart")
HEUN_PP2 = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5]
"""Six steps: three calls each, then two, then one."""


@pytest.fixture
def expected(webui, host, once={}):  # noqa: B006 - kept for the module, per host
    """The weights that the pair must give on tiny_sd15."""
    if host not in once:
        once[host] = Expectation(webui)
    return once[host]


def step_of(sampler, call):
    """Finished steps before a model call, from the samplers' published algorithms."""
    if sampler == "HeunPP2":
        return HEUN_PP2[call]
    if sampler == "PLMS":  # its first step is improved Euler, two evaluations
        return max(call - 1, 0)
    return call // 2 if sampler in TWO_CALLS else call


@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(name, marks=pytest.mark.smoke if name in ("Euler", "Heun") else ())
        for name in (*ONE_CALL, *TWO_CALLS, "PLMS", "HeunPP2")
    ],
)
def test_every_sampler(webui, host, expected, sampler):
    if sampler in host.no_samplers:
        pytest.skip(f"{host.title} does not have the sampler {sampler}")
    result, calls = recorded(webui, prompt=tags(*PAIR), steps=STEPS, sampler_name=sampler)
    assert {call["sampler"] for call in calls} == {sampler}
    assert "K-LoRA error" not in result.infotexts[0]
    for number, call in enumerate(calls):
        expected.check(call, step_of(sampler, number), STEPS)
    steps = {step_of(sampler, number) for number in range(len(calls))}
    assert len(steps) >= STEPS - 1, "too few calls to be a test"


@pytest.mark.parametrize("steps", [20, 40])
def test_restart_goes_back_in_noise_but_not_in_progress(webui, expected, steps):
    _, calls = recorded(webui, prompt=tags(*PAIR), steps=steps, sampler_name="Restart")
    sigmas = [call["sigma"] for call in calls]
    assert any(b > a + 1e-6 for a, b in itertools.pairwise(sigmas))
    for number, call in enumerate(calls):
        expected.check(call, number // 2, steps)


@pytest.mark.parametrize(
    ("scale", "settings", "reading"),
    [
        ("S", {}, {}),
        ("S", {"alpha": 3, "beta": 0.2}, {"alpha": 3, "beta": 0.2}),
        ("none", {"scale": "none"}, {"alpha": 0, "beta": 1}),
    ],
)
def test_alpha_beta_and_no_scale(webui, expected, scale, settings, reading):
    fields = script(**settings)
    result, calls = recorded(webui, prompt=tags(*PAIR), steps=STEPS, alwayson_scripts=fields)
    for number, call in enumerate(calls):
        expected.check(call, number, STEPS, **reading)
    if settings:
        assert f"{next(iter(settings))}=" in result.infotexts[0]


def test_s_star_wraps_to_content_and_comes_back(webui, expected):
    """S*(t) = (1.5·t + 1.3) mod 1.5: above every ratio at first, 0 after two fifteenths."""
    steps = 15
    fields = script(scale="S*")
    _, calls = recorded(webui, prompt=tags(*PAIR), steps=steps, alwayson_scripts=fields)
    for number, call in enumerate(calls):
        scale = (1.5 * number / steps + 1.3) % 1.5
        expected.check(call, 0, 1, alpha=0, beta=scale)


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("sampler", ["Euler", "Heun"])
@pytest.mark.parametrize("progress", ["continue", "restart"])
def test_img2img(webui, expected, strength, sampler, progress):
    image = np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)
    steps = 8
    _, calls = recorded(
        webui, image, prompt=tags(*PAIR), steps=steps, sampler_name=sampler,
        denoising_strength=strength, alwayson_scripts=script(progress=progress),
    )  # fmt: skip
    count = int(min(strength, 0.999) * steps) + 1
    t0 = 1 - strength if progress == "continue" else 0
    assert len(calls) == (2 * count - 1 if sampler == "Heun" else count)
    for number, call in enumerate(calls):
        expected.check(call, step_of(sampler, number), count, t0)


def test_img2img_with_fixed_steps(webui, expected):
    """The host's option “do exactly the amount of steps the slider specifies”."""
    image = np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)
    _, calls = recorded(
        webui, image, prompt=tags(*PAIR), steps=STEPS, denoising_strength=0.5,
        override_settings={"img2img_fix_steps": True},
    )  # fmt: skip
    assert len(calls) == STEPS
    for number, call in enumerate(calls):
        expected.check(call, number, STEPS, 0.5)


@pytest.mark.parametrize("progress", ["continue", "restart"])
@pytest.mark.parametrize("hr_sampler", ["", "Heun"])
def test_hires(webui, expected, progress, hr_sampler):
    more = {"hr_sampler_name": hr_sampler} if hr_sampler else {}
    _, calls = recorded(
        webui, prompt=tags(*PAIR), steps=STEPS, enable_hr=True, hr_scale=2, denoising_strength=0.6,
        hr_second_pass_steps=5, alwayson_scripts=script(progress=progress), **more,
    )  # fmt: skip
    first = [call for call in calls if not call["hr"]]
    second = [call for call in calls if call["hr"]]
    assert len(first) == STEPS
    assert len(second) == (9 if hr_sampler else 5)
    for number, call in enumerate(first):
        expected.check(call, number, STEPS)
    t0 = 0.4 if progress == "continue" else 0
    for number, call in enumerate(second):
        expected.check(call, step_of(hr_sampler, number), 5, t0)


@pytest.mark.parametrize("where", ["main", "hires"])
def test_hires_with_other_tags(webui, expected, where):
    """K-LoRA in one pass only, as `<lora:>` does."""
    prompts = {"main": tags(*PAIR), "hires": "a cat"}
    if where == "hires":
        prompts = {"main": "a cat", "hires": tags(*PAIR)}
    result, calls = recorded(
        webui, prompt=prompts["main"], hr_prompt=prompts["hires"], steps=STEPS, enable_hr=True,
        hr_scale=2, denoising_strength=0.5,
    )  # fmt: skip
    assert "K-LoRA: " in result.infotexts[0]
    for call in calls:
        if call["hr"] == (where == "hires"):
            expected.check(call, call["step"], STEPS, 0.5 if call["hr"] else 0)
        else:
            expected.check_base(call)


def test_hires_with_the_roles_swapped(webui, expected):
    """Two pairs in one image, and the same two in the next."""
    swapped = Expectation(webui, *PAIR[::-1])
    fields = dict(
        prompt=tags(*PAIR), hr_prompt=tags(*PAIR[::-1]), steps=STEPS, enable_hr=True, hr_scale=2,
        denoising_strength=0.5,
    )  # fmt: skip
    results = []
    for _ in range(2):
        result, calls = recorded(webui, **fields)
        results.append(result.sha)
        for call in calls:
            if call["hr"]:
                swapped.check(call, call["step"], STEPS, 0.5)
            else:
                expected.check(call, call["step"], STEPS)
    assert results[0] == results[1]


def test_batches(webui, expected):
    _, calls = recorded(webui, prompt=tags(*PAIR), steps=STEPS, batch_size=2, n_iter=2)
    assert [call["iteration"] for call in calls] == [0] * STEPS + [1] * STEPS
    for call in calls:
        expected.check(call, call["step"], STEPS)


def test_the_second_of_a_batch_count_is_the_image_of_its_seed(webui):
    alone = webui.txt2img(prompt=tags(*PAIR), steps=STEPS, seed=2)
    assert alone.sha in webui.txt2img(prompt=tags(*PAIR), steps=STEPS, seed=1, n_iter=2).hashes


def test_without_a_negative_condition(webui, expected):
    """At CFG 1 some hosts have none, and make one evaluation a step."""
    result, calls = recorded(webui, prompt=tags(*PAIR), steps=STEPS, cfg_scale=1)
    assert "K-LoRA error" not in result.infotexts[0]
    for call in calls:
        expected.check(call, call["step"], STEPS)


def test_prompt_editing_and_composition(webui, expected):
    for prompt in (
        "a [cat:dog:0.5] <klora:{}> <klora:{}>",
        "a cat AND a dog <klora:{}> <klora:{}>",
    ):
        _, calls = recorded(webui, prompt=prompt.format(*PAIR), steps=STEPS)
        for call in calls:
            expected.check(call, call["step"], STEPS)


def test_a_refiner_of_the_same_kind_goes_on_with_k_lora(webui, expected):
    webui.load("tiny_sd15_b")
    refined = Expectation(webui)
    webui.load("tiny_sd15")
    _, calls = recorded(
        webui, prompt=tags(*PAIR), steps=STEPS, refiner_checkpoint="tiny_sd15_b",
        refiner_switch_at=0.5,
    )  # fmt: skip
    names = [call["checkpoint"] for call in calls]
    assert names[0] != names[-1]
    for call in calls:
        now = expected if call["checkpoint"] == names[0] else refined
        now.check(call, call["step"], STEPS)
    assert_base_is_back(webui, expected)


def test_each_batch_of_img2img_begins_with_the_base_model_after_a_refiner(webui, expected):
    """Forge makes img2img's sampler once, and it would keep the first batch's model."""
    image = webui.txt2img(prompt="a cat", steps=1).images[0]
    result, calls = recorded(
        webui, image, prompt=tags(*PAIR), steps=STEPS, n_iter=2, denoising_strength=0.99,
        refiner_checkpoint="tiny_sd15_b", refiner_switch_at=0.5,
    )  # fmt: skip
    assert all("K-LoRA error" not in text for text in result.infotexts)
    base = [call for call in calls if call["checkpoint"] == calls[0]["checkpoint"]]
    assert {call["iteration"] for call in base} == {0, 1}
    assert len(base) < len(calls)
    for call in base:
        expected.check(call, call["step"], call["steps"], t0=0.01)
    assert_base_is_back(webui, expected)


@pytest.mark.needs("a refiner drops LoRAs")
def test_a_refiner_of_another_kind_drops_every_lora(webui, expected):
    """AUTOMATIC1111 loads it anew and clears its LoRAs; then K-LoRA stops as `<lora:>` does."""
    webui.load("tiny_sd15_c")
    refined = Expectation(webui)
    webui.load("tiny_sd15")
    _, calls = recorded(
        webui, prompt=tags(*PAIR), steps=STEPS, refiner_checkpoint="tiny_sd15_c",
        refiner_switch_at=0.5,
    )  # fmt: skip
    names = [call["checkpoint"] for call in calls]
    assert names[0] != names[-1]
    for call in calls:
        if call["checkpoint"] == names[0]:
            expected.check(call, call["step"], STEPS)
        else:
            refined.check_base(call)
    assert_base_is_back(webui, expected)


def test_a_refiner_that_the_loras_do_not_fit_leaves_the_steps_before_it_theirs(
    webui, host, expected
):
    if host.can("a refiner drops LoRAs"):
        pytest.skip(f"{host.title} is asked by the test above")
    result = webui.txt2img(
        prompt=tags(*PAIR), steps=STEPS, refiner_checkpoint="tiny_sdxl", refiner_switch_at=0.5
    )
    (infotext,) = result.infotexts
    assert "K-LoRA: files=" in infotext
    assert "does not fit this model" in infotext
    assert "before the refiner have K-LoRA, the refiner's do not." in infotext
    assert_base_is_back(webui, expected)


def assert_base_is_back(webui, expected):
    """The next image without tags has the checkpoint's own weights."""
    for call in recorded(webui, prompt="a cat", steps=2)[1]:
        expected.check_base(call)


@pytest.mark.parametrize("scripts", [None, "all", ["klora_probe"]])
def test_a_generation_nested_in_another(webui, host, expected, scripts):
    """As ADetailer does it: with no scripts, all, or some that leave ours out. Tags work in it,
    with the accordion's settings where it has the arguments."""
    settings = {"alpha": 3, "beta": 0.4}
    has_runner = scripts or not host.can("pictures without scripts")
    webui.next(record=True, nested={"prompt": tags(*PAIR), "scripts": scripts, "steps": 10})
    result = webui.txt2img(
        prompt=tags(*PAIR), steps=STEPS, batch_size=1, n_iter=2, alwayson_scripts=script(**settings)
    )
    assert not result.error
    calls = webui.last()
    steps = 20 if has_runner else 10  # the host's own sampler script sets the page's default
    count = int(0.4 * steps) + 1
    assert [call["nested"] for call in calls] == 2 * ([False] * STEPS + [True] * count)
    for call in calls:
        if not call["nested"]:
            expected.check(call, call["step"], STEPS, **settings)
        else:
            expected.check(call, call["step"], count, 0.6, **(settings if has_runner else {}))
    assert_base_is_back(webui, expected)


@pytest.mark.parametrize("scripts", [None, "all", ["klora_probe"]])
def test_a_nested_generation_without_tags(webui, expected, scripts):
    webui.next(record=True, nested={"prompt": "a dog", "scripts": scripts})
    assert not webui.txt2img(prompt=tags(*PAIR), steps=STEPS, n_iter=2).error
    for call in webui.last():
        if call["nested"]:
            expected.check_base(call)
        else:
            expected.check(call, call["step"], STEPS)


@pytest.mark.smoke
def test_only_what_flips_is_touched(webui, host, expected):
    """Invariant 4, from the weights' own identity: between two steps only layers whose winner
    changes have been written, and those where they are, if the host itself does it so: new tensors
    would leave holes in memory."""
    webui.next(record=True)
    assert not webui.txt2img(prompt=tags(*PAIR), steps=12).error
    calls = webui.last()
    plan = [expected.reading.step(i, 12) for i in range(12)]
    flips = 0
    for i in range(1, 12):
        flipped = {layer for layer in plan[i] if plan[i][layer] != plan[i - 1][layer]}
        assert {name.rpartition(".")[0] for name in calls[i]["touched"]} <= flipped
        assert bool(calls[i]["touched"]) == bool(flipped)
        assert not calls[i]["moved"] or not host.can("weights in place")
        flips += len(flipped)
    assert flips > 10


@pytest.mark.needs("merging between steps")
@pytest.mark.parametrize(
    ("kind", "pair"),
    [("memory", PAIR), ("memory", ("sd15_style_full", "sd15_content")), ("other", PAIR)],
    ids=["memory", "memory, biases in one file", "other"],
)
def test_a_flip_that_fails(webui, kind, pair):
    """The host deals with full memory; anything else ends K-LoRA for this picture at once."""
    expected = Expectation(webui, *pair, layers=is_attention)
    webui.next(record=True, merge_fails_after=[1, kind])
    result = webui.txt2img(prompt=tags(*pair), steps=12)
    assert not result.error
    calls = webui.last()
    plan = [expected.reading.step(i, 12) for i in range(12)]
    failed = next(i for i in range(2, 12) if plan[i] != plan[1])
    for i, call in enumerate(calls):
        if kind == "memory" or i < failed:
            expected.check(call, i, 12)
        else:
            expected.check_base(call)
    assert ("ValueError: raised by klora-probe" in result.infotexts[0]) == (kind == "other")
    _, calls = recorded(webui, prompt=tags(*pair), steps=12)
    for i, call in enumerate(calls):
        expected.check(call, i, 12)
    _, calls = recorded(webui, steps=1)
    expected.check_base(calls[0])


@pytest.mark.needs("merging between steps")
@pytest.mark.parametrize("more", [{}, {"merge_fails_after": [2, "other"]}], ids=["", "fails"])
def test_weights_change_while_the_device_rests(webui, more):
    """A GPU may still read what is written next, or already what is being written."""
    webui.next(merging=True, **more)
    result = webui.txt2img(prompt=tags(*PAIR) + "<lora:sd15_content:0.5>", steps=STEPS)
    assert ("K-LoRA error" in result.infotexts[0]) == bool(more)
    notes = [call["merging"] for call in webui.last()[1:]]
    assert sum("merge" in note for note in notes) > 1
    for note in notes:
        if "merge" in note:
            assert note[0] == note[-1] == "wait"


@pytest.mark.needs("patchers")
@pytest.mark.parametrize("merging", ["works", "fails"])
def test_an_extension_that_samples_with_patchers_of_its_own(webui, expected, merging):
    """Forge's Fooocus inpaint, in a part of the steps: its patch stays whatever becomes of us."""
    theirs = "out.2.weight"
    webui.next(record=True, patchers="clones")
    plain = webui.txt2img(steps=STEPS)
    changed = webui.last()[0]["weights"][theirs]
    assert changed != expected.base[theirs]
    more = {"merge_fails_after": [2, "other"]} if merging == "fails" else {}
    webui.next(record=True, patchers="clones", **more)
    result = webui.txt2img(prompt=tags(*PAIR), steps=STEPS)
    assert ("K-LoRA error" in result.infotexts[0]) == (merging == "fails")
    for i, call in enumerate(webui.last()):
        assert call["weights"].pop(theirs) == changed
        call["weights"][theirs] = expected.base[theirs]
        if merging == "works" or i <= 2:
            expected.check(call, i, STEPS)
        else:
            expected.check_base(call)
    webui.next(patchers="clones")
    assert webui.txt2img(steps=STEPS).sha == plain.sha
    assert_base_is_back(webui, expected)


@pytest.mark.parametrize("hires", [False, True])
def test_an_extension_that_weighs_loras_by_block(webui, host, hires):
    """LoRA Block Weight puts lists of its own into the patchers: its weights stay those of the
    `<lora:>` tags, and ours those of ours."""
    if host.patcher != "ModelPatcher":
        pytest.skip(f"{host.title} has no such lists")
    pair, other = ("sd15_content_te", "sd15_style_te"), "sd15_content_down"  # a part of the layers
    reading = choice(webui, *pair)
    halved = f"a cat <lora:{other}:0.4>"
    base, text = weights_under(webui, halved), []
    wanted = {
        role: weights_under(webui, f"{halved} <lora:{name}:1>")
        for role, name in zip(("content", "style"), pair, strict=True)
    }
    more = dict(enable_hr=True, hr_scale=1, denoising_strength=0.99) if hires else {}
    for lists, weight in ((None, 0.4), (0.5, 0.8)):
        webui.next(record=True, **({} if lists is None else {"lists": lists}))
        result = webui.txt2img(
            prompt=tags(*pair, f" <lora:{other}:{weight}>"), steps=STEPS, **more,
            alwayson_scripts=script(progress="restart"),
        )  # fmt: skip
        assert "K-LoRA error" not in result.infotexts[0]
        calls = webui.last()
        assert {call["hr"] for call in calls} == {False, hires}
        for call in calls:
            roles = reading.step(call["step"], call["steps"])
            assert_weights(call["weights"], wanted, roles, base)
        text.append({call["cond"] for call in calls})
    # With a hires pass some hosts activate once more in the middle of encoding both passes' text.
    assert hires or text[0] == text[1]
    webui.txt2img(prompt=f"a cat <lora:{PAIR[0]}:0.1>", steps=1)  # drops the lists
    assert weights_under(webui, halved) == base


@pytest.mark.needs("patchers")
def test_an_extension_that_samples_without_loras(webui, expected):
    """It is told, and no layer is touched."""
    webui.next(record=True, patchers="original")
    result = webui.txt2img(prompt=tags(*PAIR), steps=STEPS, alwayson_scripts=always("style"))
    assert "another extension samples with a model of its own" in result.infotexts[0]
    assert result.sha == webui.txt2img(steps=STEPS).sha
    assert_base_is_back(webui, expected)


def test_a_host_that_does_not_say_where_it_is(webui, expected):
    """The rest of the picture is made without K-LoRA, from the next model call on; then all is as
    it was."""
    webui.next(record=True, steps_unknown_after=2)
    result = webui.txt2img(prompt=tags(*PAIR), steps=STEPS)
    assert not result.error
    for i, call in enumerate(webui.last()):
        if i <= 2:
            expected.check(call, i, STEPS)
        else:
            expected.check_base(call)
    assert "K-LoRA error" in result.infotexts[0]
    for i, call in enumerate(recorded(webui, prompt=tags(*PAIR), steps=STEPS)[1]):
        expected.check(call, i, STEPS)
    assert_base_is_back(webui, expected)


def test_a_sampler_that_makes_no_step_has_no_parameter(webui):
    """DDIM, told to make one, makes none in the WebUIs that subtract one from it."""
    webui.next(record=True)
    result = webui.txt2img(prompt=tags(*PAIR), steps=1, sampler_name="DDIM")
    assert not result.error
    assert ("K-LoRA: " in result.infotexts[0]) == bool(webui.last())
