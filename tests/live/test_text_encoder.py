"""The text encoder's parts, and invariant 6: no stale text conditions."""

import pytest
from kloras import script
from make_loras import load_file, save

CONTENT, STYLE = "sd15_content_te", "sd15_style_te"


def conditions(webui, **fields):
    """The hash of the text conditions of an image."""
    result = webui.txt2img(steps=2, **fields)
    assert not result.error
    assert "K-LoRA error" not in result.infotexts[0]
    return webui.last()[0]["cond"]


def of_loras(webui, first, second):
    """The conditions under two `<lora:>` whose UNet weight is 0; each is (name, TE weight)."""
    tags = " ".join(f"<lora:{name}:{weight}:0>" for name, weight in (first, second))
    return conditions(webui, prompt=f"a cat {tags}")


@pytest.mark.parametrize("first", ["content", "style"])
def test_both_parts_apply_at_their_weights_in_the_order_of_the_tags(webui, first):
    parts = [(CONTENT, 0.7), (STYLE, -0.4)]
    roles = ["content", "style"]
    if first == "style":
        parts, roles = parts[::-1], roles[::-1]
    tags = " ".join(
        f"<klora:{name}:{weight}:1:{role}>"
        for (name, weight), role in zip(parts, roles, strict=True)
    )
    found = conditions(webui, prompt=f"a cat {tags}")
    assert found == of_loras(webui, *parts)
    assert found != conditions(webui, prompt="a cat")


def test_they_come_after_every_other_lora(webui):
    """Float sums depend on the order, so K-LoRA's parts have one: last."""
    more = "<lora:sd15_other_te:0.9:0>"
    found = conditions(webui, prompt=f"a cat <klora:{CONTENT}> {more} <klora:{STYLE}>")
    loras = f"{more} <lora:{CONTENT}:1:0> <lora:{STYLE}:1:0>"
    assert found == conditions(webui, prompt=f"a cat {loras}")


def test_the_picture_is_that_of_the_winner_with_both_text_parts(webui):
    wanted = webui.txt2img(prompt=f"a cat <lora:{CONTENT}:1:1> <lora:{STYLE}:1:0>")
    fields = script(alpha=0, beta=0)
    result = webui.txt2img(
        prompt=f"a cat <klora:{CONTENT}> <klora:{STYLE}>", alwayson_scripts=fields
    )
    assert result.sha == wanted.sha


@pytest.mark.models("sdxl$")
def test_both_encoders_of_sdxl(webui, model):
    content, style = "sdxl_content_te", "sdxl_style_te"
    found = conditions(webui, prompt=f"a cat <klora:{content}:0.5> <klora:{style}:0.8>")
    assert found == of_loras(webui, (content, 0.5), (style, 0.8))
    assert found != conditions(webui, prompt="a cat")


def test_the_setting_switches_them_off(webui):
    base = conditions(webui, prompt="a cat")
    prompt = f"a cat <klora:{CONTENT}> <klora:{STYLE}>"
    with_parts = conditions(webui, prompt=prompt)
    assert conditions(webui, prompt=prompt, alwayson_scripts=script(text_encoder=False)) == base
    assert conditions(webui, prompt=prompt) == with_parts != base


@pytest.mark.smoke
def test_a_change_beside_the_prompt_reuses_no_stale_conditions(webui):
    """Names and weights that come as fields are not in the host's own key."""
    pair = dict(content=CONTENT, style=STYLE)
    base = conditions(webui, prompt="a cat")
    seen = [base]
    for fields in (
        script(**pair),
        script(content="sd15_other_te", style=STYLE),
        script(**pair, content_weight=0.5),
        script(**pair, style_weight=0.5),
        script(content=STYLE, style=CONTENT, content_weight=0.3),
    ):
        seen.append(conditions(webui, prompt="a cat", alwayson_scripts=fields))
        assert conditions(webui, prompt="a cat", alwayson_scripts=fields) == seen[-1]
    assert len(set(seen)) == 6
    assert conditions(webui, prompt="a cat") == base


def test_after_an_error_they_are_gone(webui):
    base = conditions(webui, prompt="a cat")
    fields = script(content=CONTENT, style=STYLE)
    assert conditions(webui, prompt="a cat", alwayson_scripts=fields) != base
    result = webui.txt2img(steps=2, alwayson_scripts=script(content=CONTENT, style="nowhere"))
    assert "K-LoRA error" in result.infotexts[0]
    assert webui.last()[0]["cond"] == base


def test_after_an_end_while_they_were_applied_they_are_gone(webui):
    base = conditions(webui, prompt="a dog")
    conditions(webui, prompt="a cat")  # the hosts keep the last prompt's
    webui.next(apply_fails=[5, 10**6, "other"])
    assert webui.txt2img(prompt=f"a cat <klora:{CONTENT}> <klora:{STYLE}>").error
    assert conditions(webui, prompt="a dog") == base


def test_after_reload_ui_they_are_gone(webui):
    base = conditions(webui, prompt="a cat")
    fields = script(content=CONTENT, style=STYLE)
    with_parts = conditions(webui, prompt="a cat", alwayson_scripts=fields)
    webui.reload_ui()
    assert conditions(webui, prompt="a cat") == base
    assert conditions(webui, prompt="a cat", alwayson_scripts=fields) == with_parts != base


def test_in_a_hires_pass_with_tags_of_its_own(webui):
    """Each pass has the conditions of its own tags."""
    pair = f"<klora:{CONTENT}> <klora:{STYLE}>"
    wanted = conditions(webui, prompt=f"a cat {pair}"), conditions(webui, prompt="a cat")
    hires = dict(enable_hr=True, hr_scale=1, denoising_strength=0.5, steps=2)
    for prompts, order in (
        (dict(prompt=f"a cat {pair}", hr_prompt="a cat"), wanted),
        (dict(prompt="a cat", hr_prompt=f"a cat {pair}"), wanted[::-1]),
    ):
        assert not webui.txt2img(**prompts, **hires).error
        calls = webui.last()
        assert tuple(call["cond"] for call in (calls[0], calls[-1])) == order
    named = script(content=CONTENT, style=STYLE)  # as the hires pass had, which began without
    assert conditions(webui, prompt="a cat", alwayson_scripts=named) == wanted[0]


@pytest.mark.needs("bundled embeddings")
def test_embeddings_bundled_in_a_file_are_known(webui):
    """Pivotal-tuning files bring their trigger word along; `<lora:>` makes it known, so do we."""
    name = "sd15_content_bundle"
    prompt = "a sks_word"
    wanted = conditions(webui, prompt=f"{prompt} <lora:{name}:1>")
    plain = conditions(webui, prompt=prompt)
    assert wanted != plain
    assert conditions(webui, prompt=f"{prompt} <klora:{name}> <klora:sd15_style>") == wanted
    assert conditions(webui, prompt=prompt) == plain
    webui.next(empty_networks=True)
    assert conditions(webui, prompt=f"{prompt} <klora:{name}> <klora:sd15_style>") == wanted
    assert conditions(webui, prompt=prompt) == plain


@pytest.mark.needs("bundled embeddings")
def test_the_persons_own_embedding_of_that_word_goes_first_and_stays(webui):
    name, prompt = "sd15_content_bundle", "the sks_word"
    own = webui.data / "embeddings" / "sks_word.safetensors"
    own.parent.mkdir(exist_ok=True)
    bundled = load_file(webui.loras / f"{name}.safetensors")["bundle_emb.sks_word.emb"]
    save(own, {"emb_params": 2 * bundled})
    try:
        wanted = conditions(webui, prompt=prompt)
        assert conditions(webui, prompt=f"{prompt} <klora:{name}> <klora:sd15_style>") == wanted
        assert conditions(webui, prompt=prompt) == wanted
    finally:
        own.unlink()
    assert conditions(webui, prompt=f"{prompt} ") != wanted
