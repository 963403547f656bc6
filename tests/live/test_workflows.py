"""What people do beside a single picture: the hosts' scripts, batches, several models at once,
another picture in between."""

import shutil
import time
from contextlib import contextmanager

import numpy as np
import pytest
from kloras import PAIR, Expectation, always, recorded, script, tags
from make_loras import layers_of, write
from safetensors.torch import load_file, save_file

TE = {"content": "sd15_content_te", "style": "sd15_style_te"}
HIRES = {"enable_hr": True, "hr_scale": 1, "denoising_strength": 0.5, "steps": 2}
STEPS = 6


@contextmanager
def options(webui, **values):
    """Options of the host for one test."""
    known = webui.get("/sdapi/v1/options")  # Forge names no option that was never set
    before = {name: known.get(name, False) for name in values}
    webui.post("/sdapi/v1/options", values)
    try:
        yield
    finally:
        webui.post("/sdapi/v1/options", before)


# text conditions ----------------------------------------------------------------------------------


def conditions(webui, **fields):
    """The hashes of the text conditions that each model call of an image used."""
    result = webui.txt2img(**{"prompt": "a cat", "steps": 2, **fields})
    assert not result.error
    return [call["cond"] for call in webui.last() if not call["nested"]]


def test_an_img2img_picture_in_between_leaves_no_stale_hires_conditions(webui):
    image = webui.txt2img().images[0]
    named = {"alwayson_scripts": script(**TE)}
    plain, fused = conditions(webui, **HIRES), conditions(webui, **HIRES, **named)
    assert plain[-1] != fused[-1]
    webui.img2img(image)
    assert conditions(webui, **HIRES) == plain
    webui.img2img(image, **named)
    assert conditions(webui, **HIRES, **named) == fused
    webui.img2img(image, alwayson_scripts=script(**TE, text_encoder=False))
    assert conditions(webui, **HIRES) == plain


def test_a_picture_without_extra_networks_reuses_no_conditions(webui):
    plain = conditions(webui, disable_extra_networks=True)
    fused = conditions(webui, alwayson_scripts=script(**TE))
    assert conditions(webui, disable_extra_networks=True) == plain != fused
    assert conditions(webui, alwayson_scripts=script(**TE)) == fused


@pytest.mark.parametrize("outer", ["fused", "plain"])
def test_a_nested_picture_with_caches_of_its_own(webui, outer):
    """As a detailer makes it, without our script."""
    named = {"alwayson_scripts": script(**TE)}
    plain, fused = conditions(webui), conditions(webui, **named)
    prompt = "a face" if outer == "fused" else f"a face {tags(*TE.values())}"
    webui.next(nested={"prompt": prompt, "scripts": None})
    assert conditions(webui, **(named if outer == "fused" else {})) == (
        fused if outer == "fused" else plain
    )
    assert conditions(webui) == plain
    assert conditions(webui, **named) == fused
    assert conditions(webui) == plain


@pytest.mark.needs("bundled embeddings")
def test_bundled_embeddings_count_without_the_text_encoder_too(webui):
    plain = conditions(webui, prompt="a sks_word")
    named = script(content="sd15_content_bundle", style=PAIR[1], text_encoder=False)
    fused = conditions(webui, prompt="a sks_word", alwayson_scripts=named)
    assert fused != plain
    assert conditions(webui, prompt="a sks_word") == plain
    assert conditions(webui, prompt="a sks_word", alwayson_scripts=named) == fused


# several models -----------------------------------------------------------------------------------


@pytest.mark.needs("several checkpoints")
def test_a_refiner_that_stays_in_memory_gets_every_flip(webui):
    """With room for two checkpoints the refiner's layers are not the first model's."""
    webui.load("tiny_sd15_b")
    refined = Expectation(webui)
    webui.load("tiny_sd15")
    expected = Expectation(webui)
    refiner = {"refiner_checkpoint": "tiny_sd15_b", "refiner_switch_at": 0.5}
    with options(webui, sd_checkpoints_limit=2):
        webui.txt2img(**refiner)  # when the host loads one it drops every LoRA
        for beta in (0.5, 1.0, 0.5):
            _, calls = recorded(
                webui, prompt=tags(*PAIR), steps=STEPS, alwayson_scripts=script(beta=beta),
                **refiner,
            )  # fmt: skip
            names = [call["checkpoint"] for call in calls]
            assert names[0] != names[-1]
            for call in calls:
                now = expected if call["checkpoint"] == names[0] else refined
                now.check(call, call["step"], STEPS, beta=beta)
        for call in recorded(webui, prompt="a cat", steps=STEPS, **refiner)[1]:
            now = expected if call["checkpoint"] == names[0] else refined
            now.check_base(call)


@pytest.mark.needs("img2img alternative")
def test_a_script_that_calls_the_model_itself_gets_the_passes_first_choice(webui):
    """It looks for the noise of a picture before the first step."""

    def picture(prompt, **fields):
        args = ["", True, False, "an orange", "", True, 5, True, 1.0, 0.0, False]
        # The script keeps the noise of the last picture whose settings were the same.
        webui.img2img(image, script_name="img2img alternative test", script_args=["", True, False,
            "something else", "", True, 5, True, 1.0, 0.0, False])  # fmt: skip
        webui.txt2img(prompt=tags(*PAIR), alwayson_scripts=fields.pop("before", {}))
        return webui.img2img(
            image, prompt=prompt, script_name="img2img alternative test", script_args=args, **fields
        )

    image = webui.txt2img().images[0]
    wanted = picture(f"a cat <lora:{PAIR[0]}:1>")
    assert not wanted.error
    for before in ("content", "style"):
        found = picture(tags(*PAIR), before=always(before), alwayson_scripts=always("content"))
        assert found.sha == wanted.sha


@pytest.mark.needs("foreign UNets")
def test_a_unet_of_an_extensions_own_is_told(webui):
    with_it = webui.txt2img(prompt=tags(*PAIR), steps=STEPS)
    with options(webui, sd_unet="klora-probe"):
        found = webui.txt2img(prompt=tags(*PAIR), steps=STEPS)
        assert found.sha == webui.txt2img(steps=STEPS).sha
    assert "K-LoRA error" in found.infotexts[0]
    assert "SD Unet “klora-probe”" in found.infotexts[0]
    assert "K-LoRA: files" not in found.infotexts[0]
    assert webui.txt2img(prompt=tags(*PAIR), steps=STEPS).sha == with_it.sha


# the map among the pictures -----------------------------------------------------------------------


def test_the_map_in_the_gallery_is_no_picture_to_a_script(webui, host):
    image = np.tile(webui.txt2img().images[0], (2, 2, 1))

    def matrix():
        return webui.txt2img(
            prompt=f"{tags(*PAIR)}|red|blue", steps=2, script_name="prompt matrix",
            script_args=[False, False, "positive", "comma", 0],
        )  # fmt: skip

    def upscale():
        return webui.img2img(
            image, prompt=tags(*PAIR), steps=2, width=64, height=64, script_name="sd upscale",
            script_args=host.sd_upscale,
        )  # fmt: skip

    wanted = [matrix(), upscale()]
    with options(webui, klora_append_map=True):
        found = [matrix(), upscale()]
    assert not any(result.error for result in (*wanted, *found))
    assert [result.hashes for result in found] == [result.hashes for result in wanted]


def matrix_batch(webui, prompt):
    """Two pictures in one batch, the second with what follows the bar."""
    return webui.txt2img(
        prompt=prompt, steps=2, batch_size=2, script_name="prompt matrix",
        script_args=[False, False, "positive", "comma", 0],
    )  # fmt: skip


def test_a_batch_whose_pictures_name_different_pairs(webui):
    """The host takes the first one's LoRAs for all: what a picture says is how it was made."""
    mark = webui.mark()
    result = matrix_batch(webui, "a cat|<klora:sd15_content> <klora:sd15_style>")
    first, second = result.infotexts[-2:]
    assert "K-LoRA" not in first.replace("<klora", "")
    assert "K-LoRA batch: " in second
    assert "no <klora:…> tags" in second
    assert "picture 2 has other <klora:…> tags" in webui.log_since(mark)
    plain = matrix_batch(webui, "a cat|red")
    assert result.hashes[-2] == plain.hashes[-2]
    with_pair = matrix_batch(webui, f"{tags(*PAIR)}|red")
    assert not any("K-LoRA batch" in text for text in with_pair.infotexts)


def test_there_is_one_map_for_each_kind_of_pass(webui):
    with options(webui, klora_append_map=True):
        for fields, maps in (
            ({"n_iter": 3, "steps": 4}, 1),
            ({"batch_size": 2, "steps": 4}, 1),
            ({"n_iter": 2, **HIRES}, 2),
        ):
            images = fields.get("n_iter", 1) * fields.get("batch_size", 1)
            result = webui.txt2img(prompt=tags(*PAIR), **fields)
            assert len(result.images) == images + maps
            # The host's Save button wants a seed and a prompt of every picture.
            assert set(result.infotexts[images:]) == {result.infotexts[0]}


def test_the_map_is_there_after_a_detailers_picture_too(webui):
    with options(webui, klora_append_map=True):
        webui.next(nested={"prompt": "a face", "scripts": None})
        result = webui.txt2img(prompt=tags(*PAIR), steps=2)
    assert any(call["nested"] for call in webui.last())
    assert len(result.images) == 2


def test_saved_maps_have_the_names_of_their_pictures(webui):
    def made(**fields):
        before = set(webui.data.rglob("*-klora*.png"))
        result = webui.txt2img(prompt=tags(*PAIR), save_images=True, **fields)
        assert not result.error
        return sorted(set(webui.data.rglob("*-klora*.png")) - before)

    saved = dict(samples_save=True, grid_save=True, return_grid=True)
    with options(webui, klora_save_map=True, **saved):
        (alone,) = made(batch_size=2, n_iter=2, steps=2)
        assert alone.with_name(alone.name.replace("-klora", "")).is_file()
        assert "grid" not in str(alone)
        names = [path.name for path in made(n_iter=2, **HIRES)]
        assert len(names) == 2
        assert [name.endswith("-klora-hires.png") for name in names] == [True, False]


# messages -----------------------------------------------------------------------------------------


def test_a_plan_is_made_after_an_interrupt(webui):
    webui.post("/sdapi/v1/interrupt")
    new = {"top_k": 1 + time.time() % 1}  # a K that no table has
    request = {"content": PAIR[0], "style": PAIR[1], "settings": new}
    assert webui.request("/klora/plan", request)[0] == 200


def test_an_error_in_the_hires_pass_leaves_the_first_passs_parameter(webui):
    first = webui.txt2img(prompt=tags(*PAIR)).infotexts[0]
    result = webui.txt2img(prompt=tags(*PAIR), hr_prompt=f"a dog <klora:{PAIR[0]}>", **HIRES)
    text = result.infotexts[0]
    assert "exactly two <klora:" in text
    assert "The first pass has K-LoRA, the hires pass does not." in text
    assert first.partition("K-LoRA: ")[2].split(",")[0] in text


def test_a_file_that_was_replaced_has_its_own_hash(webui):
    layers = layers_of(webui.checkpoints / "tiny_sd15.safetensors")
    path = webui.loras / "replaced.safetensors"

    def hashes():
        text = webui.txt2img(prompt=tags("replaced", PAIR[1])).infotexts[0]
        return text.partition("files=")[2][:12]

    try:
        write(path, layers, rank=2, seed=71)
        webui.refresh_loras()
        before = hashes()
        shutil.move(path, path.with_name("old_version.safetensors"))
        write(path, layers, rank=2, seed=72)
        after = hashes()
        assert len(before) == len(after) == 12
        assert after != before
        webui.refresh_loras()
        assert hashes() == after
    finally:
        for name in ("replaced", "old_version"):
            path.with_stem(name).unlink(missing_ok=True)
        webui.refresh_loras()


def test_a_link_to_nowhere_is_told_as_a_missing_file(webui):
    link = webui.loras / "dangling.safetensors"
    link.symlink_to(webui.loras / "not_there.safetensors")
    try:
        webui.refresh_loras()
        text = webui.txt2img(prompt=tags("dangling", PAIR[1])).infotexts[0]
    finally:
        link.unlink()
        webui.refresh_loras()
    assert "There is no LoRA “dangling”" in text


def test_the_name_in_a_file_counts_while_no_other_file_has_it(webui):
    """As for `<lora:>`, which would not know either which of them is meant."""
    paths = [webui.loras / f"{name}.safetensors" for name in ("first_twin", "second_twin")]
    tensors = load_file(webui.loras / f"{PAIR[0]}.safetensors")
    told = []
    try:
        for path in paths:
            save_file(tensors, path, {"ss_output_name": "twin"})
            webui.refresh_loras()
            text = webui.txt2img(prompt=tags("twin", PAIR[1]), steps=2).infotexts[0]
            told.append("2 LoRAs have the alias “twin”" in text)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
        webui.refresh_loras()
    assert told == [False, True]


@pytest.mark.needs("several LoRA folders")
def test_files_in_a_second_folder(webui, tmp_path):
    """`--lora-dirs`, once for each folder."""
    wanted = webui.txt2img(prompt=tags(*PAIR)).sha
    shutil.copy(webui.loras / f"{PAIR[1]}.safetensors", tmp_path / "elsewhere.safetensors")
    with webui.beside("folders", arguments=["--lora-dirs", str(tmp_path)]) as server:
        assert {"name": "elsewhere"} in server.get("/klora/loras")
        assert server.txt2img(prompt=tags(PAIR[0], "elsewhere")).sha == wanted
