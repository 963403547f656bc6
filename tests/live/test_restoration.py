"""Invariant 2: whatever happens, the next image without tags is that of a fresh server."""

from pathlib import Path

import pytest
from kloras import PAIR, script, tags
from webui import HERE

STEPS = 6


@pytest.fixture
def fresh(webui, host, once={}):  # noqa: B006 - kept for the module, per host
    """Hashes of images that a server makes before it has seen a K-LoRA: base, a LoRA."""
    if host not in once:
        webui.restart()
        base = webui.txt2img(steps=STEPS)
        lora = webui.txt2img(steps=STEPS, prompt="a cat <lora:sd15_content:1>")
        assert not base.error
        assert not lora.error
        once[host] = {"base": base.sha, "lora": lora.sha}
    return once[host]


def assert_as_fresh(webui, fresh):
    """No trace: the base image, a LoRA's image, and the base image again."""
    assert webui.txt2img(steps=STEPS).sha == fresh["base"]
    assert webui.txt2img(steps=STEPS, prompt="a cat <lora:sd15_content:1>").sha == fresh["lora"]
    assert webui.txt2img(steps=STEPS).sha == fresh["base"]


@pytest.mark.smoke
def test_after_a_finished_image(webui, fresh):
    result = webui.txt2img(prompt=tags(*PAIR), steps=STEPS)
    assert result.sha not in fresh.values()
    assert_as_fresh(webui, fresh)


@pytest.mark.parametrize("end", ["raise_at", "interrupt_at", "skip_at"])
@pytest.mark.parametrize("step", [0, 1, STEPS - 1])
def test_after_an_image_that_ended_early(webui, fresh, end, step):
    whole = webui.txt2img(prompt=tags(*PAIR), steps=STEPS)
    webui.next(**{end: step})
    ended = webui.txt2img(prompt=tags(*PAIR), steps=STEPS)
    assert bool(ended.error) == (end == "raise_at")
    assert_as_fresh(webui, fresh)
    webui.next(**{end: step})
    webui.txt2img(prompt=tags(*PAIR), steps=STEPS)
    assert webui.txt2img(prompt=tags(*PAIR), steps=STEPS).sha == whole.sha


@pytest.mark.smoke
def test_an_exception_then_a_lora(webui, fresh):
    """The host's own LoRA must not take our weights for its backup."""
    webui.next(raise_at=3)
    assert webui.txt2img(prompt=tags(*PAIR), steps=STEPS).error
    lora = webui.txt2img(steps=STEPS, prompt="a cat <lora:sd15_content:1>")
    assert lora.sha == fresh["lora"]
    assert_as_fresh(webui, fresh)


def test_after_an_end_while_layers_were_applied(webui, fresh):
    """Neither host's record of what is in a weight is right then."""
    assert not webui.txt2img().error  # so that every layer has to be applied
    webui.next(apply_fails=[60, 10**6, "other"])
    assert webui.txt2img(
        prompt=tags(*PAIR), steps=STEPS, alwayson_scripts=script(method="Direct merge")
    ).error
    assert_as_fresh(webui, fresh)


def test_after_a_layer_that_did_not_find_memory(webui, host, fresh):
    """Forge tries again; AUTOMATIC1111 goes on without the layer, and would in later pictures;
    ComfyUI's patcher gives up, for `<lora:>` too."""
    whole = webui.txt2img(prompt=tags(*PAIR), steps=STEPS)
    assert_as_fresh(webui, fresh)
    webui.next(apply_fails=[30, 30, "memory"])
    result = webui.txt2img(prompt=tags(*PAIR), steps=STEPS)
    if host.patcher == "ModelPatcher":
        assert "raised by klora-probe" in result.error
        assert_as_fresh(webui, fresh)
        webui.next(apply_fails=[30, 30, "memory"])
        assert webui.txt2img(prompt="a cat <lora:sd15_style:1>", steps=STEPS).error
    else:
        assert (result.sha == whole.sha) == ("K-LoRA error" not in result.infotexts[0])
    assert webui.txt2img(prompt=tags(*PAIR), steps=STEPS).sha == whole.sha


@pytest.mark.needs("backups one by one")
def test_after_a_bias_that_could_not_be_backed_up(webui, fresh):
    """The layer's weight has a backup then, and nothing is applied to either."""
    for bias in (30, 250):  # of a text encoder, whose results the host keeps, and of the UNet
        webui.load("tiny_sd15_b")  # loading a checkpoint takes the backups away
        webui.load("tiny_sd15")
        webui.next(backup_fails=bias)
        assert webui.txt2img(prompt=tags(*PAIR), steps=STEPS).error
        assert_as_fresh(webui, fresh)


def test_after_a_checkpoint_switch(webui, fresh):
    first = webui.txt2img(prompt=tags(*PAIR), steps=STEPS)
    webui.load("tiny_sd15_b")
    other = webui.txt2img(prompt=tags(*PAIR), steps=STEPS)
    webui.load("tiny_sdxl")
    xl = webui.txt2img(prompt=tags("sdxl_content", "sdxl_style"), steps=STEPS)
    webui.load("tiny_sd15")
    assert_as_fresh(webui, fresh)
    assert len({first.sha, other.sha, xl.sha}) == 3
    assert webui.txt2img(prompt=tags(*PAIR), steps=STEPS).sha == first.sha


@pytest.mark.needs("checkpoints held")
def test_a_checkpoint_is_not_kept_beside_the_next(webui):
    """While that is being loaded, memory would have to hold both, or of the old one some layers."""
    counts = []
    for prompt in ("a cat", "a cat", tags(*PAIR)):  # reForge keeps a layer more from its first on
        assert not webui.txt2img(prompt=prompt, steps=STEPS).error
        webui.load("tiny_sd15" if webui.loaded.checkpoint == "tiny_sd15_b" else "tiny_sd15_b")
        assert not webui.txt2img(steps=1).error
        counts.append(webui.get("/klora-probe/layers"))
    assert counts[1] == counts[2]


def test_the_other_checkpoints_base_is_its_own(webui, fresh):
    webui.load("tiny_sd15_b")
    wanted = webui.txt2img(steps=STEPS)
    webui.load("tiny_sd15")
    assert not webui.txt2img(prompt=tags(*PAIR), steps=STEPS).error
    webui.load("tiny_sd15_b")
    assert webui.txt2img(steps=STEPS).sha == wanted.sha


def test_after_reload_ui(webui, fresh):
    first = webui.txt2img(prompt=tags(*PAIR), steps=STEPS)
    webui.reload_ui()
    assert_as_fresh(webui, fresh)
    assert webui.txt2img(prompt=tags(*PAIR), steps=STEPS).sha == first.sha
    webui.reload_ui()
    assert webui.txt2img(prompt=tags(*PAIR), steps=STEPS).sha == first.sha
    assert_as_fresh(webui, fresh)


def test_after_reload_ui_without_the_extension(webui, fresh):
    """Switched off in the Extensions tab; the model stays, and nobody is left to take it back."""
    assert not webui.txt2img(prompt=tags(*PAIR), steps=STEPS).error
    try:
        webui.post("/sdapi/v1/options", {"disabled_extensions": ["sd-webui-k-lora"]})
        webui.reload_ui()
        assert webui.txt2img(steps=STEPS).sha == fresh["base"]
    finally:
        webui.post("/sdapi/v1/options", {"disabled_extensions": []})
        webui.reload_ui()
    assert_as_fresh(webui, fresh)


def test_where_the_host_does_not_activate_extra_networks(webui, fresh):
    """`disable_extra_networks`: no activation would take K-LoRA back."""
    assert not webui.txt2img(prompt=tags(*PAIR), steps=STEPS).error
    result = webui.txt2img(steps=STEPS, disable_extra_networks=True)
    assert result.sha == fresh["base"]
    assert_as_fresh(webui, fresh)


def test_a_training_may_save_over_the_files_in_use(webui):
    """A file that is mapped ends the process if it is truncated meanwhile."""
    pair = "sd15_content_down", "sd15_style_up"  # which no test here gives to the host itself
    result = webui.txt2img(prompt=tags(*pair), steps=STEPS)
    assert "K-LoRA: " in result.infotexts[0]
    mapped = Path(f"/proc/{webui.process.pid}/maps").read_text()
    assert "python" in mapped
    assert not [name for name in pair if name in mapped]


def test_no_error_of_ours_in_the_log(webui, fresh):
    mark = webui.mark()
    webui.txt2img(prompt=tags(*PAIR), steps=STEPS)
    webui.txt2img(steps=STEPS)
    log = webui.log_since(mark)
    assert "Traceback" not in log
    assert str(HERE.parents[1] / "lib_klora") not in log
