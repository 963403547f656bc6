"""Models of which a part stays off the device: those layers are merged at every forward, and a flip
in one of them is a change of its entries. In fp32 the pictures are those of the whole model."""

import pytest
from kloras import PAIR, always, recorded, script, tags

STEPS = 8
SIZES = [0.1, 10]
"""MiB that may be loaded: of the weights none, or some."""

pytestmark = pytest.mark.needs("partly loaded")


@pytest.fixture
def whole(webui, host, once={}):  # noqa: B006 - kept for the module, per host
    """Pictures of a model that is loaded whole."""
    if host not in once:
        once[host] = {
            "base": webui.txt2img(steps=STEPS).sha,
            "lora": webui.txt2img(steps=STEPS, prompt=f"a cat <lora:{PAIR[0]}:1>").sha,
            "K-LoRA": webui.txt2img(steps=STEPS, prompt=tags(*PAIR)).sha,
        }
        assert len(set(once[host].values())) == 3
    return once[host]


@pytest.fixture
def room(webui):
    """Lets the host load no more than so many MiB of the UNet."""

    def room(mib):
        webui.post("/klora-probe/memory", {"mib": mib})
        webui.txt2img(steps=1, prompt=f"a cat <lora:{PAIR[1]}:0.1>")  # loads the model anew

    yield room
    webui.post("/klora-probe/memory", {"mib": None})


def layers_outside(call):
    """How many parameters the layers add their entries to at every forward."""
    return sum(name.endswith("#online") for name in call["weights"])


@pytest.mark.parametrize("mib", SIZES)
def test_the_picture_is_that_of_the_whole_model(webui, whole, room, mib):
    room(mib)
    result, calls = recorded(webui, prompt=tags(*PAIR), steps=STEPS)
    assert all(layers_outside(call) for call in calls)
    assert result.sha == whole["K-LoRA"]
    assert webui.txt2img(steps=STEPS, prompt=tags(*PAIR)).sha == whole["K-LoRA"]
    assert webui.txt2img(steps=STEPS, prompt=f"a cat <lora:{PAIR[0]}:1>").sha == whole["lora"]
    assert webui.txt2img(steps=STEPS).sha == whole["base"]


@pytest.mark.parametrize("method", ["Direct merge", "LoRA Switch"])
def test_other_methods(webui, room, method):
    fields = dict(prompt=tags(*PAIR), steps=STEPS, alwayson_scripts=script(method=method))
    wanted = webui.txt2img(**fields).sha
    room(10)
    assert webui.txt2img(**fields).sha == wanted


@pytest.mark.parametrize("step", [1, 4])
def test_layers_that_go_out_in_mid_sampling(webui, whole, step):
    """The host makes room for something else, such as a ControlNet or a preview."""
    webui.next(record=True, unload_at=step)
    result = webui.txt2img(steps=STEPS, prompt=tags(*PAIR))
    calls = webui.last()
    assert [bool(layers_outside(call)) for call in calls] == [i >= step for i in range(STEPS)]
    assert "K-LoRA error" not in result.infotexts[0]
    assert result.sha == whole["K-LoRA"]
    assert webui.txt2img(steps=STEPS, prompt=tags(*PAIR)).sha == whole["K-LoRA"]
    assert webui.txt2img(steps=STEPS).sha == whole["base"]


def test_more_room_between_two_pictures(webui, whole, room):
    room(0.1)
    for mib in (0.1, 10, None, 10):
        webui.post("/klora-probe/memory", {"mib": mib})
        assert webui.txt2img(steps=STEPS, prompt=tags(*PAIR)).sha == whole["K-LoRA"]
    assert webui.txt2img(steps=STEPS).sha == whole["base"]


@pytest.mark.parametrize("end", ["raise_at", "interrupt_at"])
def test_a_picture_that_ended_early(webui, whole, room, end):
    room(10)
    webui.next(**{end: 3})
    webui.txt2img(steps=STEPS, prompt=tags(*PAIR))
    assert webui.txt2img(steps=STEPS).sha == whole["base"]
    assert webui.txt2img(steps=STEPS, prompt=tags(*PAIR)).sha == whole["K-LoRA"]


def test_a_flip_that_fails(webui, whole, room):
    """In a layer outside the host's own forward raises, in any other K-LoRA ends."""
    room(10)
    for call in (0, 2, 4):
        webui.next(merge_fails_after=[call, "other"])
        result = webui.txt2img(prompt=tags(*PAIR), steps=STEPS)
        assert result.error or "K-LoRA error" in result.infotexts[0]
        assert webui.txt2img(steps=STEPS).sha == whole["base"]
        assert webui.txt2img(prompt=tags(*PAIR), steps=STEPS).sha == whole["K-LoRA"]


def test_an_extensions_clones(webui, whole, room):
    """They are loaded in turn, and a layer that is outside keeps the function of the first."""
    room(10)
    webui.next(patchers="clones")
    plain = webui.txt2img(steps=STEPS).sha
    webui.next(patchers="clones")
    wanted = webui.txt2img(steps=STEPS, prompt=f"a cat <lora:{PAIR[1]}:1>").sha
    webui.next(patchers="clones")
    found = webui.txt2img(steps=STEPS, prompt=tags(*PAIR), alwayson_scripts=always("style"))
    assert "K-LoRA error" not in found.infotexts[0]
    assert found.sha == wanted != plain
    assert webui.txt2img(steps=STEPS).sha == whole["base"]
