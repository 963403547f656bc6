"""The harness and the probe do what they say, without K-LoRA."""

import subprocess

import numpy as np
import pytest
from make_loras import compose, layers_of, parts_of
from webui import DEVICE, HERE, find

STEPS = 4


def prompt_with(name):
    """A prompt with one LoRA."""
    return f"a cat <lora:{name}:1>"


LORA = prompt_with("sd15_content")


def layers(webui):
    """The loaded checkpoint's layers."""
    return layers_of(webui.checkpoints / webui.loaded.plain_file)


def lora_parts(webui, name):
    """A LoRA file's layers."""
    return parts_of(webui.loras / f"{name}.safetensors", layers(webui))


def recorded(webui, **fields):
    """The weights at each model call of an image."""
    webui.next(record=True)
    result = webui.txt2img(**fields)
    assert not result.error
    return [call["weights"] for call in webui.last()]


def test_the_same_seed_makes_the_same_image(webui, model):
    first, second, other = (webui.txt2img(seed=seed) for seed in (1, 1, 2))
    assert first.images[0].shape == (64, 64, 3)
    assert first.images[0].std() > 10, "the tiny model must make a picture, not a plain colour"
    assert first.sha == second.sha != other.sha


def test_the_device_that_it_computes_on(webui, host):
    """A second device's memory is so small that some layers stay on the CPU, if the host can."""
    webui.txt2img()
    found = {call["device"] for call in webui.last()}
    assert found == {"second:0" if DEVICE == "second" else "cpu"}
    swapped = "CPU Swap Loaded" in webui.log_since(0)
    assert swapped == (DEVICE == "second" and host.can("layers swapped"))


def test_the_second_device_takes_no_tensor_of_the_cpu(host):
    """As a GPU does not; but a copy, and a number without dimensions."""
    if DEVICE != "second":
        pytest.skip("KLORA_DEVICE is not “second”")
    code = """
import torch, launch
own, other = torch.ones(2, 3, device=launch.load()), torch.ones(3, 2)
print((own @ other.to(own.device) + torch.tensor(1.0)).sum().item())
for operation in (torch.matmul, lambda a, b: torch.cat([a, b.T]), lambda a, b: a.mul_(b.T)):
    try:
        operation(own, other)
    except RuntimeError as error:
        print("on the same device" in str(error))
"""
    run = subprocess.run(
        [find(host.name).python, "-c", code],
        cwd=HERE / "second_device",
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines()[-4:] == ["16.0", "True", "True", "True"]


def test_a_lora_changes_the_image_and_the_base_comes_back(webui, model):
    base = webui.txt2img()
    changed = webui.txt2img(prompt=prompt_with(model.lora("content")))
    assert changed.sha != base.sha
    assert webui.txt2img().sha == base.sha
    assert prompt_with(model.lora("content")) in changed.infotexts[0]


def test_weights_are_recorded_at_every_model_call(webui, model):
    """Under a LoRA exactly the weights of its layers differ, from the first call to the last."""
    name = model.lora("content")
    base = recorded(webui)
    changed = recorded(webui, prompt=prompt_with(name))
    assert len(base) == len(changed) == STEPS
    assert all(call == base[0] for call in base)
    assert all(call == changed[0] for call in changed)
    differing = {
        key.partition("#")[0]
        for key in changed[0].keys() | base[0].keys()
        if changed[0].get(key) != base[0].get(key)
    }
    assert differing == {f"{layer}.weight" for layer in lora_parts(webui, name)}


def test_swapped_weights_are_the_lora(webui, model):
    """The independent oracle: whole layers put in per step, without the host's LoRA code."""
    name = model.lora("content")
    base = webui.txt2img()
    wanted = webui.capture("A", prompt_with(name))
    assert wanted.sha != base.sha
    every = dict.fromkeys(lora_parts(webui, name), "A")
    webui.next(swap={"0": every})
    assert webui.txt2img().sha == wanted.sha
    webui.next(swap={"0": every, "2": dict.fromkeys(every, "base")})
    half = webui.txt2img()
    assert half.sha not in (base.sha, wanted.sha)
    assert webui.txt2img().sha == base.sha


def test_a_composed_file_is_its_parts(webui, model):
    """Layers from two files by turns: as one file, and swapped in."""
    found, files = layers(webui), {}
    for name in ("content", "style"):
        files[name] = webui.loras / f"{model.lora(name)}.safetensors"
        assert not webui.capture(name, prompt_with(files[name].stem)).error
    parts = sorted(parts_of(files["content"], found))
    turns = {part: ("content", "style")[number % 2] for number, part in enumerate(parts)}
    composed = webui.loras / f"{model.lora('composed')}.safetensors"
    compose(composed, {part: files[name] for part, name in turns.items()}, found)
    webui.refresh_loras()
    webui.next(swap={"0": turns})
    swapped = webui.txt2img()
    assert swapped.sha == webui.txt2img(prompt=prompt_with(composed.stem)).sha


@pytest.mark.models("flux|zimage|chroma")
def test_rows_of_a_fused_weight_can_be_swapped(webui, model):
    """Files that split q, k and v."""
    name = model.lora("content_split")
    wanted = webui.capture("split", prompt_with(name))
    parts = dict.fromkeys(lora_parts(webui, name), "split")
    assert any("[" in part for part in parts)
    webui.next(swap={"0": parts})
    assert webui.txt2img().sha == wanted.sha


@pytest.mark.parametrize("end", ["raise_at", "interrupt_at", "skip_at"])
def test_an_image_that_ends_early_leaves_a_server_that_answers(webui, end):
    base = webui.txt2img()
    webui.next(**{end: 1})
    ended = webui.txt2img(prompt=LORA)
    assert len(webui.last()) == 2
    if end == "raise_at":
        assert "raised by klora-probe" in ended.error
    else:
        assert not ended.error
        assert len(ended.images) == 1
    assert webui.txt2img().sha == base.sha


def test_the_hires_pass_has_its_own_calls(webui):
    """Both can be swapped and ended by themselves."""
    hires = {"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.5}
    base, wanted = (webui.txt2img(**hires, prompt=text) for text in ("a cat", LORA))
    assert not webui.capture("A", LORA).error
    every = dict.fromkeys(lora_parts(webui, "sd15_content"), "A")
    webui.next(swap={"0": every})
    assert webui.txt2img(**hires).sha == wanted.sha
    webui.next(hr_swap={"1": every})
    assert webui.txt2img(**hires).sha not in (base.sha, wanted.sha)
    webui.next(raise_at=1, hr=True)
    assert "raised by klora-probe" in webui.txt2img(**hires).error
    assert [call["hr"] for call in webui.last()] == [False] * STEPS + [True] * 2
    assert webui.txt2img(**hires).sha == base.sha


@pytest.mark.parametrize("scripts", [None, "all", ["klora_probe"]])
def test_a_nested_image_replaces_the_outer_one(webui, scripts):
    base = webui.txt2img()
    webui.next(nested={"prompt": "a dog", "scripts": scripts})
    nested = webui.txt2img()
    assert not nested.error
    assert nested.sha != base.sha
    assert {call["nested"] for call in webui.last()} == {False, True}
    assert webui.txt2img().sha == base.sha


def test_the_calls_of_a_two_call_sampler(webui):
    webui.txt2img(sampler_name="Heun")
    assert [call["step"] for call in webui.last()] == list(range(2 * STEPS - 1))
    assert {call["total_steps"] for call in webui.last()} == {2 * STEPS}
    assert {call["sampler"] for call in webui.last()} == {"Heun"}


def test_hires_and_img2img(webui):
    result = webui.txt2img(enable_hr=True, hr_scale=2, denoising_strength=0.5)
    assert result.images[0].shape == (128, 128, 3)
    assert [call["hr"] for call in webui.last()] == [False] * STEPS + [True] * STEPS
    image = np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)
    assert not webui.img2img(image).error
    assert [call["step"] for call in webui.last()] == list(range(STEPS))


def test_the_text_encoders_part_reaches_the_conditions(webui):
    conditions = set()
    for name in ("sd15_content", "sd15_content_te"):
        assert not webui.txt2img(prompt=prompt_with(name)).error
        conditions.add(webui.last()[0]["cond"])
    assert len(conditions) == 2


def test_a_batch_has_an_image_per_seed(webui):
    result = webui.txt2img(batch_size=2, n_iter=2)
    assert len(result.images) == len(result.infotexts) == len(set(result.hashes)) == 4
    assert [call["iteration"] for call in webui.last()] == [0] * STEPS + [1] * STEPS
    assert webui.txt2img(n_iter=2).sha == webui.txt2img().sha


def test_reload_ui(webui):
    base = webui.txt2img()
    webui.reload_ui()
    assert webui.txt2img().sha == base.sha
    assert len(webui.last()) == STEPS
