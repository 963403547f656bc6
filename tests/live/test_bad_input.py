"""What bad input gets: the image without K-LoRA, one sentence, and nothing else."""

import hashlib
import math
import re
import subprocess
import sys

import pytest
import torch
from kloras import PAIR, always, script, tags
from safetensors.torch import load_file, save_file
from webui import REPOSITORY

GOOD = dict(content=PAIR[0], style=PAIR[1])
BOTH = tags(*PAIR)

PROMPTS = {
    "one tag only": ("a cat <klora:sd15_content>", "sd15_content"),
    "three tags": (BOTH + " <klora:sd15_other>", "has 3"),
    "twice the same role": ("a cat <klora:sd15_content:s> <klora:sd15_style:s>", "style"),
    "an unknown role": ("a cat <klora:sd15_content:role=boss> <klora:sd15_style>", "boss"),
    "an unknown name": ("a cat <klora:nowhere> <klora:sd15_style>", "nowhere"),
    "a weight that is no number": ("a cat <klora:sd15_content:much> <klora:sd15_style>", "much"),
    "a weight that is NaN": ("a cat <klora:sd15_content:nan> <klora:sd15_style>", "nan"),
    "a weight that is infinite": ("a cat <klora:sd15_content> <klora:sd15_style:te=inf>", "inf"),
    "an unknown item": ("a cat <klora:sd15_content:dyn=4> <klora:sd15_style>", "dyn=4"),
    "a file full of NaN": ("a cat <klora:bad_nan> <klora:sd15_style>", "bad_nan"),
    "a rank of zero": ("a cat <klora:sd15_content> <klora:bad_zero_rank>", "zero"),
    "a truncated file": ("a cat <klora:bad_truncated> <klora:sd15_style>", "bad_truncated"),
    "a file that is no LoRA": ("a cat <klora:sd15_content> <klora:bad_not_a_lora>", "not_a_lora"),
    "an empty file": ("a cat <klora:bad_empty> <klora:sd15_style>", "bad_empty"),
    "a name of a megabyte": (f"a cat <klora:{'x' * 10**6}> <klora:sd15_style>", "no LoRA"),
    "magnitudes that fit no weight": ("a cat <klora:odd_dora> <klora:sd15_style>", "odd_dora"),
    "another model's file": ("a cat <klora:sdxl_content> <klora:sd15_style>", "sdxl_content"),
}
FIELDS = {
    "only content": (dict(content="sd15_content"), "style"),
    "only style": (dict(style="sd15_style"), "content"),
    "an unknown field": (dict(GOOD, strength=1), "strength"),
    "alpha as text": (dict(GOOD, alpha="1.5"), "alpha"),
    "alpha as true": (dict(GOOD, alpha=True), "alpha"),
    "alpha below its range": (dict(GOOD, alpha=-0.1), "alpha"),
    "alpha above its range": (dict(GOOD, alpha=1e11), "alpha"),
    "alpha NaN": (dict(GOOD, alpha=math.nan), "alpha"),
    "beta infinite": (dict(GOOD, beta=math.inf), "beta"),
    "top_k zero": (dict(GOOD, top_k=0), "top_k"),
    "an unknown scale": (dict(GOOD, scale="T"), "scale"),
    "an unknown method": (dict(GOOD, method="Zip"), "method"),
    "layers as a list": (dict(GOOD, layers=["attention"]), "layers"),
    "text_encoder as a number": (dict(GOOD, text_encoder=1), "text_encoder"),
    "enabled as text": (dict(GOOD, enabled="yes"), "enabled"),
    "10 000 fields": ({**GOOD, **{f"f{i}": 1 for i in range(10_000)}}, "the fields are"),
    "a weight that is NaN": (dict(GOOD, content_weight=math.nan), "content_weight"),
    "a name that is a number": (dict(GOOD, content=3), "content"),
    "S* with alpha 0": (dict(GOOD, scale="S*", alpha=0), "alpha"),
}


def folder_state(webui):
    """Every LoRA file's name and content."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in webui.loras.rglob("*")
        if path.is_file()
    }


def assert_one_sentence(webui, base, word, **fields):
    """The request makes the base image; the reason is told everywhere; the queue goes on."""
    before = folder_state(webui)
    mark = webui.mark()
    result = webui.txt2img(**fields)
    assert not result.error
    assert result.sha == base.sha
    text = result.infotexts[0]
    assert "K-LoRA error: " in text
    assert "K-LoRA: " not in text
    sentence = text.partition("K-LoRA error: ")[2]
    assert word in sentence
    log = webui.log_since(mark)
    assert "[K-LoRA] " in log
    assert "lib_klora/" not in log, "a traceback of ours"
    assert log.count("[K-LoRA] ") == 1
    assert folder_state(webui) == before
    good = webui.txt2img(prompt=BOTH)
    assert "K-LoRA error" not in good.infotexts[0]
    assert good.sha != base.sha


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=pytest.mark.smoke if what == "an unknown name" else ())
        for what in PROMPTS
    ],
)
def test_in_the_prompt(webui, what):
    prompt, word = PROMPTS[what]
    assert_one_sentence(webui, webui.txt2img(), word, prompt=prompt)


@pytest.mark.parametrize("what", FIELDS)
def test_in_the_fields(webui, what):
    fields, word = FIELDS[what]
    assert_one_sentence(webui, webui.txt2img(), word, alwayson_scripts=script(**fields))


def write_odd_files(loras):
    """Files with a part that cannot be applied."""
    good = load_file(loras / f"{PAIR[0]}.safetensors")
    ups = [key for key in good if key.endswith(".lora_up.weight")]
    scales = {key.replace("lora_up.weight", "dora_scale"): torch.ones(7) for key in ups}
    save_file({**good, **scales}, loras / "odd_dora.safetensors")
    one = next(iter(scales))
    save_file({**good, one: scales[one]}, loras / "odd_dora_in_one_layer.safetensors")
    first = ups[0].removesuffix("lora_up.weight")
    rank_zero = {
        f"{first}lora_up.weight": good[ups[0]][:, :0].contiguous(),
        f"{first}lora_down.weight": good[f"{first}lora_down.weight"][:0].contiguous(),
    }
    save_file({**good, **rank_zero}, loras / "odd_rank_zero.safetensors")
    magnitudes = {
        key.replace("lora_up.weight", "lora_magnitude_vector"): torch.ones(1) for key in ups[:5]
    }
    save_file({**good, **magnitudes}, loras / "odd_magnitudes.safetensors")
    words = {
        f"bundle_emb.word{i}.{clip}": torch.ones(1, width)
        for i in range(7)
        for clip, width in (("clip_l", 768), ("clip_g", 1280))
    }
    save_file({**good, **words}, loras / "odd_bundle.safetensors")
    fp8 = {key.replace("weight", "scale_weight"): torch.ones(1) for key in ups[:5]}
    save_file({**good, **fp8}, loras / "odd_scaled.safetensors")


@pytest.fixture(autouse=True)
def odd_files(webui, once=set()):  # noqa: B006 - kept for the module, per server
    if webui.loras not in once:
        once.add(webui.loras)
        write_odd_files(webui.loras)
        webui.refresh_loras()


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("odd_dora_in_one_layer", "1 layer of “odd_dora_in_one_layer” (such as"),
        ("odd_rank_zero", "has rank zero: left out"),
        ("odd_magnitudes", "is a DoRA as PEFT saves it: its magnitudes (such as"),
        ("odd_scaled", "5 tensors of “odd_scaled” (such as"),
    ],
)
def test_what_cannot_be_applied_is_left_out_and_said(webui, host, name, note):
    mark = webui.mark()
    result = webui.txt2img(prompt=tags(name, PAIR[1]))
    if name == "odd_rank_zero" and host.can("one refusal for a file"):  # as to `<lora:>`
        assert "“odd_rank_zero” cannot be applied by this WebUI" in result.infotexts[0]
    else:
        assert "K-LoRA error" not in result.infotexts[0]
        assert note in webui.log_since(mark)
    assert not webui.txt2img().error


def test_embeddings_for_which_a_host_drops_the_whole_file(webui):
    base = webui.txt2img()
    lora = webui.txt2img(prompt="a cat <lora:odd_bundle:1>")
    result = webui.txt2img(prompt=tags("odd_bundle", PAIR[1]))
    if lora.sha == base.sha:
        told = result.infotexts[0]
        assert "drops the whole file for the 14 tensors" in told
        assert "convert --only-layers FILE OUT" in told
        assert result.sha == base.sha
    else:
        assert "K-LoRA error" not in result.infotexts[0]


def test_an_alias_of_two_files_is_told_with_their_names(webui):
    paths = [webui.loras / f"alias_{i}.safetensors" for i in range(2)]
    for path in paths:
        tensors = load_file(webui.loras / f"{PAIR[0]}.safetensors")
        save_file(tensors, path, {"ss_output_name": "SharedAlias"})
    webui.refresh_loras()
    try:
        result = webui.txt2img(prompt=tags("SharedAlias", PAIR[1]))
        assert "2 LoRAs have the alias “SharedAlias”" in result.infotexts[0]
        assert "“alias_0” or “alias_1”" in result.infotexts[0]
    finally:
        for path in paths:
            path.unlink()
        webui.refresh_loras()


def test_in_the_positional_list(webui):
    arguments = {"K-LoRA": {"args": [True, 1.5, 0.5, "T"]}}
    assert_one_sentence(webui, webui.txt2img(), "scale", prompt=BOTH, alwayson_scripts=arguments)


def test_a_file_that_cannot_be_read(webui):
    """As on a broken disk, or without the permission."""
    path = webui.loras / "unreadable.safetensors"
    path.symlink_to("/proc/self/mem")
    webui.refresh_loras()
    try:
        result = webui.txt2img(prompt=tags(path.stem, "sd15_style"))
        assert "“unreadable.safetensors” cannot be read (" in result.infotexts[0]
        assert result.sha == webui.txt2img().sha
    finally:
        path.unlink()
        webui.refresh_loras()


@pytest.mark.needs("one refusal for a file")
def test_a_file_that_the_host_refuses_is_told_with_its_reason(webui):
    """A layer of no type that AUTOMATIC1111 knows costs the whole file there, in `<lora:>` too."""
    path = webui.loras / "sd15_content_odd.safetensors"
    odd = {"lora_unet_mid_block_attentions_0_proj_in.odd": torch.zeros(1)}
    save_file({**load_file(webui.loras / f"{PAIR[0]}.safetensors"), **odd}, path)
    webui.refresh_loras()
    try:
        reason = "accept those keys: odd): choose another file."
        assert_one_sentence(webui, webui.txt2img(), reason, prompt=tags(path.stem, PAIR[1]))
    finally:
        path.unlink()
        webui.refresh_loras()


PARTS = "up", "down"


@pytest.mark.parametrize("count", [5, 500])
def test_a_file_with_keys_that_the_host_cannot_place(webui, count):
    """Each host drops a whole file at another number of them; K-LoRA does what `<lora:>` does, but
    for a file of which less than half fits."""
    path = webui.loras / f"sd15_content_{count}_more.safetensors"  # Forge keeps what it has read
    names = [f"lora_unet_nowhere_{i}.lora_{part}.weight" for i in range(count) for part in PARTS]
    more = {name: torch.ones(1, 1) for name in names}
    save_file({**load_file(webui.loras / f"{PAIR[0]}.safetensors"), **more}, path)
    webui.refresh_loras()
    try:
        base, lora = webui.txt2img().sha, webui.txt2img(prompt=f"a cat <lora:{path.stem}:1>").sha
        assert lora in (base, webui.txt2img(prompt=f"a cat <lora:{PAIR[0]}:1>").sha)
        result = webui.txt2img(prompt=tags(path.stem, PAIR[1]), alwayson_scripts=always("content"))
        refused = f"“{path.stem}” does not fit this model" in result.infotexts[0]
        assert refused == (lora == base or count == 500)  # of which most fit nowhere
        assert result.sha == (base if refused else lora)
    finally:
        path.unlink()
        webui.refresh_loras()


def test_everything_else_the_prompt_asks_for_is_there(webui):
    wanted = webui.txt2img(prompt="a cat <lora:sd15_other:0.7>")
    prompt = "a cat <klora:nowhere> <lora:sd15_other:0.7> <klora:sd15_style>"
    result = webui.txt2img(prompt=prompt)
    assert result.sha == wanted.sha
    assert "nowhere" in result.infotexts[0]


def test_a_spelling_that_the_host_does_not_apply_gets_a_sentence(webui, host):
    """PEFT's `unet.….lora_A` is read by no host, old diffusers' names not by A1111."""
    applied = host.can("old diffusers names")
    names = ["sd15_style_peft"] + ([] if applied else ["sd15_style_diffusers"])
    base = webui.txt2img()
    for name in names:
        assert_one_sentence(webui, base, name, prompt=tags("sd15_content", name))
    if applied:
        result = webui.txt2img(prompt=tags("sd15_content", "sd15_style_diffusers"))
        assert "K-LoRA error" not in result.infotexts[0]


UNREAD = {  # how two trainers write a layer and its two matrices
    "diffusers' own script": (lambda prefix: prefix, ".lora.down.weight", ".lora.up.weight"),
    "a doubled prefix": (
        lambda prefix: "lora_unet_" + prefix.replace(".", "_"),
        ".lora_down.weight",
        ".lora_up.weight",
    ),
}


@pytest.mark.parametrize("how", UNREAD)
def test_what_no_webui_reads_is_converted_by_the_command_in_its_sentence(webui, how):
    """… and is the same LoRA then."""
    spell, down, up = UNREAD[how]
    files = [webui.loras / f"sd15_style_{name}.safetensors" for name in ("unread", "converted")]
    tensors = {}
    for key, tensor in load_file(webui.loras / "sd15_style_peft.safetensors").items():
        prefix, letter, _ = re.split(r"\.lora_([AB])", key)
        tensors[spell(prefix) + (down if letter == "A" else up)] = tensor
    save_file(tensors, files[0])
    webui.refresh_loras()
    try:
        base = webui.txt2img()
        assert webui.txt2img(prompt=f"a cat <lora:{files[0].stem}:1>").sha == base.sha
        told = "“python -m lib_klora convert FILE OUT”"
        assert_one_sentence(webui, base, told, prompt=tags(PAIR[0], files[0].stem))
        command = [sys.executable, "-m", "lib_klora", "convert", *map(str, files)]
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
        webui.refresh_loras()
        converted = webui.txt2img(prompt=tags(PAIR[0], files[1].stem))
        assert converted.sha == webui.txt2img(prompt=BOTH).sha
    finally:
        for path in files:
            path.unlink(missing_ok=True)
        webui.refresh_loras()


def test_a_pickle_is_not_opened_by_us(webui, tmp_path):
    """A1111 reads it through its own safe loader; Forge's would rename it, so it is refused."""
    path = webui.loras / "pickled.pt"
    trace = tmp_path / "was-here"
    path.write_bytes(f"cos\nsystem\n(S'touch {trace}'\ntR.".encode())
    webui.refresh_loras()
    base = webui.txt2img()
    before = folder_state(webui)
    result = webui.txt2img(prompt=tags("pickled", "sd15_style"))
    assert result.sha == base.sha
    assert "K-LoRA error" in result.infotexts[0]
    assert "pickled" in result.infotexts[0].partition("K-LoRA error")[2]
    assert folder_state(webui) == before
    assert not trace.exists()
    path.unlink()
    webui.refresh_loras()
