"""``python -m lib_klora``, and the pictures and words that it shows."""

import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib_klora import picture, plot
from lib_klora.__main__ import main
from lib_klora.lora_file import parse_lora
from lib_klora.pair import LayerPair, Pair, pair_files
from lib_klora.plan import Plan, make_plan, progress
from lib_klora.projection import project
from lib_klora.scores import compute_scores
from lib_klora.settings import FIELDS, Settings
from lib_klora.tensor_file import SafetensorsFile

ROOT = Path(__file__).resolve().parents[2]
BLOCK = "lora_unet_mid_block_attentions_0_transformer_blocks_{}_attn2_to_{}"


def lora(path: Path, rank: int = 4, seed: int = 0, names=None, **more: torch.Tensor) -> Path:
    names = names or [BLOCK.format(i, x) for i in range(3) for x in "qk"]
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(more)
    for name in names:
        size = 2048 if name.endswith("_k") else 64
        tensors[f"{name}.lora_up.weight"] = torch.randn(64, rank, generator=generator).half()
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, size, generator=generator).half()
    save_file(tensors, path)
    return path


@pytest.fixture
def files(tmp_path) -> tuple[str, str]:
    return (
        str(lora(tmp_path / "Katze ☂.safetensors", seed=1)),
        str(lora(tmp_path / "ink.safetensors", rank=8, seed=2)),
    )


# -- plan -----------------------------------------------------------------------------------------


def test_plan_prints_the_pair_and_its_reading(files, capsys):
    assert main(["plan", *files, "--steps", "7"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    pair = pair_files(*(parse_lora("x", SafetensorsFile(path)) for path in files))
    plan = make_plan(pair, compute_scores(pair), Settings(), 7)
    assert "Katze ☂.safetensors  6 layers, LoRA, rank 4" in out
    assert "paired   6 layers, K 32" in out
    assert f"γ        {plan.gamma:.6g} (paper)" in out
    shares = [int(x) for x in re.findall(r"^ +\d+ .* (\d+) %$", out, re.MULTILINE)]
    assert shares == [round(100 * x) for x in plot.content_share(plan)]
    assert out.endswith(plot.describe(plan, pair) + "\n")


def test_plan_writes_what_the_library_computes(files, tmp_path, capsys):
    options = ["--scale", "S*", "--alpha", "1.2", "--beta", "1", "--gamma", "authors"]
    options += ["--top-k", "2", "--layers", "all", "--unpaired", "drop", "--steps", "9"]
    png, record = tmp_path / "map.png", tmp_path / "plan.json"
    assert main(["plan", *files, *options, "--png", str(png), "--json", str(record)]) == 0
    capsys.readouterr()
    settings = Settings(
        scale="S*", alpha=1.2, beta=1, gamma="authors", top_k=2, layers="all", unpaired="drop"
    )
    pair = pair_files(
        *(parse_lora("x", SafetensorsFile(path)) for path in files),
        layers="all",
        top_k=2,
        unpaired="drop",
    )
    scores = compute_scores(pair)
    plan = make_plan(pair, scores, settings, 9)
    assert set(plan.choice.flat) == {1, 2}
    found = json.loads(record.read_text(encoding="utf-8"))
    assert found["content"]["file"] == files[0]
    assert re.fullmatch("[0-9a-f]{64}", found["style"]["sha256"])
    assert found["settings"] == {name: getattr(settings, name) for name in found["settings"]}
    assert found["gamma"] == plan.gamma
    assert found["reading"] == plot.describe(plan, pair)
    assert [layer["k"] for layer in found["layers"]] == [layer.k for layer in pair.paired]
    for i, layer in enumerate(found["layers"]):
        assert layer["name"] == plan.layers[i]
        assert layer["s_style"] == pytest.approx(scores.s_style[i])
        assert layer["choice"] == "".join(" cs"[x] for x in plan.choice[:9, i])
    assert png.read_bytes() == picture.png(picture.selection_map(plan, pair))


@pytest.mark.parametrize(
    ("method", "letters"),
    [
        ("Direct merge", "bbbb"),
        ("LoRA Switch", "cscs"),
        ("Fixed selection", "ccss"),
        ("Random selection", None),
        ("Top-K without scale", None),
        ("Without γ", None),
    ],
)
def test_plan_of_another_method(files, capsys, monkeypatch, method, letters):
    gamma = {"Top-K without scale": "paper", "Without γ": "Without γ"}.get(method)
    if gamma is None:
        monkeypatch.setattr("lib_klora.__main__.compute_scores", lambda *_, **__: pytest.fail("!"))
    call = ["plan", *files, "--method", method, "--steps", "4", "--seed", "3"]
    assert main([*call, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["method"] == method
    assert found["settings"]["seed"] == 3
    assert (found["gamma"] is None) == (gamma is None)
    for layer in found["layers"]:
        assert (layer["s_content"] is None) == (layer["abs_style"] is None) == (gamma is None)
        assert letters in (None, layer["choice"])
    assert main(call) == 0
    out = capsys.readouterr().out
    assert f"{method}: " in out
    assert ("γ        " in out) == (gamma is not None)
    assert gamma is None or re.search(rf"^γ        .* \({gamma}\)$", out, re.MULTILINE)


OF_BLOCK = "lora_unet_output_blocks_{}_1_transformer_blocks_0_attn2_to_{}"


def test_plan_of_b_lora(tmp_path, capsys):
    names = [OF_BLOCK.format(i, x) for i in range(3) for x in "qk"]
    files = [str(lora(tmp_path / f"{x}.safetensors", names=names)) for x in ("cat", "ink")]
    call = ["plan", *files, "--method", "B-LoRA", "--steps", "3"]
    assert main([*call, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(layer["name"], layer["choice"]) for layer in found["layers"]] == [
        (OF_BLOCK.format(i, x).removeprefix("lora_unet_"), letter * 3)
        for i, letter in enumerate("cs")
        for x in "kq"
    ]
    assert found["gamma"] is None
    assert "4 and 4 other layers are left out" in found["notes"][0]
    assert main([*call, "--png", str(tmp_path / "map.png")]) == 0
    assert capsys.readouterr().out.endswith(
        "B-LoRA: content in its block, style in its own, nothing else is applied\n"
    )


def test_b_lora_of_files_for_another_model(files, tmp_path, capsys):
    other = lora(tmp_path / "flux.safetensors", names=["lora_unet_double_blocks_0_img_attn_proj"])
    assert main(["plan", files[0], str(other), "--method", "B-LoRA"]) == 1
    assert "B-LoRA is for SDXL, and “flux.safetensors” was made for Flux" in capsys.readouterr().err
    assert main(["plan", *files, "--method", "B-LoRA"]) == 1, "the middle block alone"
    assert "has no layer in up_blocks.0.attentions.0, nor" in capsys.readouterr().err


def test_plan_of_np_lora(files, capsys):
    call = ["plan", *files, "--method", "NP-LoRA", "--steps", "3"]
    assert main([*call, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {layer["choice"] for layer in found["layers"]} == {"bbb"}
    pair = pair_files(*(parse_lora("x", SafetensorsFile(path)) for path in files))
    assert found["overlap"] == project(pair).overlap
    assert main(call) == 0
    assert capsys.readouterr().out.endswith(
        f"NP-LoRA: every layer gets both in every step; {100 * found['overlap']:.1f} % of content "
        f"in the style's directions\n"
    )
    assert main(["plan", *files, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["overlap"] is None


def test_bars_of_content_both_and_style(files, capsys):
    for method, bars in (("LoRA Switch", ["#" * 40, "." * 40]), ("Direct merge", ["+" * 40] * 2)):
        assert main(["plan", *files, "--method", method, "--steps", "2"]) == 0
        assert re.findall(r"[#+.]{40}", capsys.readouterr().out) == bars


def test_no_layer_in_common_has_no_bars(tmp_path, capsys):
    """Two B-LoRAs of different blocks: neither has a share of a step."""
    content = lora(tmp_path / "c.safetensors", names=[BLOCK.format(0, x) for x in "qk"])
    style = lora(tmp_path / "s.safetensors", names=[BLOCK.format(1, x) for x in "qk"])
    assert main(["plan", str(content), str(style)]) == 0
    out = capsys.readouterr().out
    assert "paired   0 layers\n" in out
    assert "%" not in out
    assert "no layer is in both files; 2 layers only in the content file" in out


@pytest.mark.parametrize("option", ["--png", "--json"])
def test_what_cannot_be_written_is_told(files, tmp_path, capsys, option):
    for path, reason in ((tmp_path, "directory"), (tmp_path / "no" / "x", "No such file")):
        assert main(["plan", *files, option, str(path)]) == 1
        out, err = capsys.readouterr()
        assert f"“{path}” cannot be written (" in err
        assert reason in err
        assert out == ""


@pytest.mark.parametrize("option", ["--png", "--json"])
def test_no_lora_is_written_over(files, capsys, option):
    before = Path(files[0]).read_bytes()
    for path in (files[0], files[0].upper(), ""):
        with pytest.raises(SystemExit) as error:
            main(["plan", *files, option, path])
        assert error.value.code == 2
        assert option in capsys.readouterr().err
    assert Path(files[0]).read_bytes() == before


@pytest.mark.parametrize("missing", ["torch", "numpy", "safetensors"])
def test_a_python_without_what_it_needs(missing):
    program = f"import sys; sys.modules[{missing!r}] = None; import lib_klora.__main__"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        f"K-LoRA: this Python has no {missing}: use one that has, such as the WebUI's.\n"
    )


def test_json_to_standard_output_is_nothing_but_json(files, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    call = ["plan", *files, "--json", "-", "--cache", str(tmp_path / "file" / "x")]
    assert main(call) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["steps"] == 30
    assert "could not be kept" in err  # the log does not get in between


def test_png_to_standard_output_is_nothing_but_the_picture(files, tmp_path, capsysbinary):
    there = str(tmp_path / "map.png")
    assert main(["plan", *files, "--png", there]) == 0
    capsysbinary.readouterr()
    assert main(["plan", *files, "--png", "-"]) == 0
    assert capsysbinary.readouterr().out == Path(there).read_bytes()


def test_every_setting_of_a_plan_is_an_option_with_the_tables_choices(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for field in FIELDS:
        if not field.per_pair and not field.of_hires and field.name not in (
            "text_encoder", "progress",
        ):  # fmt: skip
            option = "--" + field.name.replace("_", "-")
            assert option in text
            if field.choices:
                assert f"{option} {{{','.join(field.choices)}}}" in text


def test_cache_is_filled_and_used(files, tmp_path, capsys, monkeypatch):
    call = ["plan", *files, "--cache", str(tmp_path / "cache")]
    assert main(call) == 0
    first = capsys.readouterr().out
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr("lib_klora.scores._analyse", lambda *_: pytest.fail("it is cached"))
    assert main(call) == 0
    assert capsys.readouterr().out == first


def test_layers_that_do_not_pair_are_told(tmp_path, capsys):
    content = lora(tmp_path / "c.safetensors", seed=1)
    style = lora(
        tmp_path / "s.safetensors",
        names=[BLOCK.format(i, x) for i in range(2, 5) for x in "qk"],
        **{"lora_unet_odd.glora_a": torch.ones(2)},
    )
    assert main(["plan", str(content), str(style)]) == 0
    out = capsys.readouterr().out
    assert "4 layers are only in “c.safetensors” (keep)." in out
    assert "1 layer of “s.safetensors” cannot be compared, such as lora_unet_odd" in out
    assert "; 4 layers only in the content file; 4 layers only in the style file" in out


# -- inspect --------------------------------------------------------------------------------------


def test_inspect(tmp_path, capsys):
    other = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    path = lora(
        tmp_path / "x.safetensors",
        rank=16,
        **{
            f"{other}.diff": torch.ones(8, 8),
            "lora_unet_time_embedding_linear_1.hada_w1_a": torch.ones(8, 2),
            "lora_unet_time_embedding_linear_1.hada_w1_b": torch.ones(2, 8),
            "lora_unet_time_embedding_linear_1.hada_w2_a": torch.ones(8, 2),
            "lora_unet_time_embedding_linear_1.hada_w2_b": torch.ones(2, 8),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(8, 1),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(1, 8),
        },
    )
    record = tmp_path / "x.json"
    assert main(["inspect", str(path), "--json", str(record)]) == 0
    out = capsys.readouterr().out
    found = json.loads(record.read_text(encoding="utf-8"))
    assert found["types"] == {"LoRA": 6, "full": 1, "LoHa": 1}
    assert found["ranks"] == {"16": 6, "none": 1, "2": 1}
    assert found["base_model"] == "SDXL"
    assert found["spelling"] == ["kohya"]
    assert (found["attention_layers"], found["other_layers"]) == (7, 1)
    assert found["text_encoder_layers"] == 1
    assert found["dtypes"] == ["float16", "float32"]
    assert found["bytes"] == path.stat().st_size
    assert f"SHA-256  {found['sha256']}" in out
    assert "LoRA (6), full (1), LoHa (1)" in out
    assert "16 (6 layers), none (1 layer), 2 (1 layer)" in out
    assert "7 attention, 1 other, 1 text encoder" in out


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [
        (BLOCK.format(0, "k"), 768, ("kohya", "Stable Diffusion 1.x")),
        (BLOCK.format(0, "k"), 1024, ("kohya", "Stable Diffusion 2.x")),
        (BLOCK.format(0, "k"), 4096, ("kohya", "Stable Diffusion")),
        ("diffusion_model.middle_block.1.x", 64, ("ComfyUI", "Stable Diffusion")),
        ("diffusion_model.some.block.1.x", 64, ("ComfyUI", "not recognised")),
        ("transformer.transformer_blocks.0.attn.to_q", 64, ("diffusers", "Qwen-Image")),
        (
            "lora_transformer_single_transformer_blocks_0_proj_out",
            64,
            ("OneTrainer", "Flux.1 or Chroma"),
        ),
        ("diffusion_model.double_blocks.0.img_mod.lin", 64, ("ComfyUI", "Flux.1")),
        ("diffusion_model.double_stream_modulation_img.lin", 64, ("ComfyUI", "Flux.2")),
        ("diffusion_model.distilled_guidance_layer.in_proj", 64, ("ComfyUI", "Chroma")),
        ("diffusion_model.layers.0.adaLN_modulation.0", 64, ("ComfyUI", "Z-Image")),
        ("diffusion_model.layers.0.adaLN_modulation.1", 64, ("ComfyUI", "Lumina 2")),
        ("diffusion_model.single_blocks.0.linear2", 32, ("ComfyUI", "Flux.2")),
        ("diffusion_model.single_blocks.0.linear2", 40, ("ComfyUI", "Flux.1 or Chroma")),
        ("diffusion_model.double_blocks.0.img_attn.proj", 8, ("ComfyUI", "Flux")),
        ("diffusion_model.blocks.0.attn.wq", 64, ("ComfyUI", "Krea 2")),
        ("diffusion_model.blocks.0.self_attn.q", 64, ("ComfyUI", "Wan")),
        ("lora_unet_blocks_0_cross_attn_q_proj", 64, ("kohya", "Anima")),
        ("lora_unet_layers_0_self_attention_to_q", 64, ("kohya", "Ernie-Image")),
    ],
)
def test_inspect_recognises(tmp_path, capsys, name, width, expected):
    tensors = {f"{name}.lora_A.weight": torch.ones(2, width)}
    tensors[f"{name}.lora_B.weight"] = torch.ones(8, 2)
    save_file(tensors, tmp_path / "x.safetensors")
    assert main(["inspect", str(tmp_path / "x.safetensors"), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (*found["spelling"], found["base_model"]) == expected


def test_inspect_of_a_text_encoder_file(tmp_path, capsys):
    prefix = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{prefix}.lora_up.weight": torch.ones(8, 1)}
    save_file(
        tensors | {f"{prefix}.lora_down.weight": torch.ones(1, 8)}, tmp_path / "x.safetensors"
    )
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "file     x.safetensors, 0.0 MiB"
    assert last == "layers   0 attention, 0 other, 1 text encoder"


# -- convert --------------------------------------------------------------------------------------


def layer_file(path, layers: dict[str, int], **others) -> Path:
    """A file of rank 2 with these prefixes, each with its input's width, and the endings of PEFT
    or, of a prefix that ends in a bar, of what follows it."""
    tensors = dict(others)
    for i, (layer, width) in enumerate(layers.items()):
        prefix, _, ending = layer.partition("|")
        down, up = (ending or "lora_A.weight,lora_B.weight").split(",")
        tensors[f"{prefix}.{down}"] = torch.randn(2, width) + i
        tensors[f"{prefix}.{up}"] = torch.randn(8, 2, dtype=torch.float16) - i
    save_file(tensors, path, {"trained by": "somebody"})
    return path


DOWN = "down_blocks.0.attentions.0.transformer_blocks.0"
LDM = "lora_unet_input_blocks_1_1_transformer_blocks_0"


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (  # what diffusers' own script writes today
            {f"unet.{DOWN}.attn2.to_k|lora.down.weight,lora.up.weight": 768},
            [f"{LDM}_attn2_to_k"],
        ),
        (
            {f"lora_unet_unet_{DOWN}.attn2.to_k".replace(".", "_"): 2048},
            [f"{LDM}_attn2_to_k"],
        ),
        (
            {
                f"base_model.model.unet.{DOWN}.attn2.to_out.0": 768,
                "unet.up_blocks.0.upsamplers.0.conv": 8,
                "text_encoder.text_model.encoder.layers.3.self_attn.q_proj": 8,
            },
            [
                f"{LDM}_attn2_to_out_0",
                "lora_unet_up_blocks_0_upsamplers_0_conv",
                "lora_te_text_model_encoder_layers_3_self_attn_q_proj",
            ],
        ),
        (
            {
                f"unet.{DOWN}.attn2.to_v": 2048,
                "unet.up_blocks.0.upsamplers.0.conv": 8,
                "text_encoder.text_model.encoder.layers.3.mlp.fc1": 8,
                "text_encoder_2.text_model.encoder.layers.3.mlp.fc1": 8,
            },
            [
                f"{LDM}_attn2_to_v",
                "lora_unet_output_blocks_2_2_conv",
                "lora_te1_text_model_encoder_layers_3_mlp_fc1",
                "lora_te2_text_model_encoder_layers_3_mlp_fc1",
            ],
        ),
        (
            {
                "transformer.single_transformer_blocks.3.attn.to_q": 8,
                "transformer.single_transformer_blocks.3.proj_out": 8,
                "transformer.transformer_blocks.3.attn.to_q": 8,
                "transformer.transformer_blocks.3.attn.to_out.0": 8,
            },
            [
                "lycoris_single_transformer_blocks_3_attn_to_q",
                "lora_unet_single_blocks_3_linear2",
                "lycoris_transformer_blocks_3_attn_to_q",
                "lora_unet_double_blocks_3_img_attn_proj",
            ],
        ),
        (
            {
                "base_model.model.diffusion_model.layers.3.attention.to_q": 8,
                "diffusion_model.transformer.layers.3.attention.to_out.0": 8,
                "transformer.layers.3.feed_forward.w1": 8,
            },
            [
                "lycoris_layers_3_attention_to_q",
                "lora_unet_layers_3_attention_out",
                "lora_unet_layers_3_feed_forward_w1",
            ],
        ),
        (
            {"base_model.model.transformer_blocks.3.attn.add_q_proj": 8},
            ["lora_unet_transformer_blocks_3_attn_add_q_proj"],
        ),
    ],
    ids=["SD1", "SDXL", "SD1 by PEFT", "SDXL whole", "Flux", "Z-Image", "Qwen-Image"],
)
def test_convert_writes_names_that_every_webui_reads(tmp_path, capsys, layers, expected):
    old = layer_file(tmp_path / "old.safetensors", layers)
    out = tmp_path / "new.safetensors"
    assert main(["convert", str(old), str(out)]) == 0
    assert "under the old name" not in capsys.readouterr().out
    before, after = load_file(old), load_file(out)
    assert sorted(after) == sorted(
        f"{name}.lora_{which}.weight" for name in expected for which in ("down", "up")
    )
    assert with_bytes(before) == with_bytes(after)
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"trained by": "somebody"}


def with_bytes(tensors) -> list[tuple]:
    """All tensors, whatever they are called."""
    return sorted((str(x.dtype), tuple(x.shape), x.numpy().tobytes()) for x in tensors.values())


def test_converting_again_changes_nothing(tmp_path):
    layers = {f"unet.{DOWN}.attn2.to_v": 2048, "unet.mid_block.resnets.0.conv1": 8}
    old = layer_file(tmp_path / "0.safetensors", layers)
    for i in (1, 2):
        assert main(["convert", str(old), str(old := tmp_path / f"{i}.safetensors")]) == 0
    assert load_file(tmp_path / "1.safetensors").keys() == load_file(old).keys()


def test_convert_tells_what_it_could_not_place_and_loses_nothing(tmp_path, capsys):
    layers = {f"unet.{DOWN}.attn2.to_v": 768, f"lora_unet_{DOWN}.attn2.to_v".replace(".", "_"): 768}
    strange = {"unet.down_blocks.7.what.3.a.lora_A.weight": torch.ones(2, 8)}
    strange["unet.down_blocks.7.what.3.a.lora_B.weight"] = torch.ones(8, 2)
    strange["some.thing.else"] = torch.ones(3)
    old = layer_file(tmp_path / "old.safetensors", layers, **strange)
    out = tmp_path / "new.safetensors"
    assert main(["convert", str(old), str(out)]) == 0
    told = capsys.readouterr().out
    assert "5 tensors under the old name" in told
    assert all(key in told for key in strange)
    before, after = load_file(old), load_file(out)
    assert with_bytes(before) == with_bytes(after)
    assert set(strange) < set(after)
    lean = tmp_path / "lean.safetensors"
    assert main(["convert", "--only-layers", str(old), str(lean)]) == 0
    assert "5 tensors left out" in capsys.readouterr().out
    assert len(load_file(lean)) == 2


def test_convert_writes_over_nothing(tmp_path, capsys):
    old = layer_file(tmp_path / "old.safetensors", {f"unet.{DOWN}.attn2.to_v": 768})
    content = old.read_bytes()
    assert_fails(capsys, ["convert", str(old), str(old)], "is there already")
    nowhere = tmp_path / "none" / "new.safetensors"
    assert_fails(capsys, ["convert", str(old), str(nowhere)], "cannot be written")
    assert_fails(capsys, ["convert", str(nowhere), str(tmp_path / "x.safetensors")], "no file")
    unknown = layer_file(tmp_path / "u.safetensors", {"lora_unet_some_new_block_3_w": 8})
    assert_fails(capsys, ["convert", str(unknown), str(nowhere)], "does not know", "some_new_block")
    assert old.read_bytes() == content


# -- errors, as a person at a terminal or a script expects them -----------------------------------


def assert_fails(capsys, call: list[str], *words: str) -> None:
    assert main(call) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_file_that_cannot_be_used_is_exit_code_1(files, tmp_path, capsys):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no safetensors file")
    other = lora(tmp_path / "o.safetensors", names=["lora_unet_x"])
    assert_fails(capsys, ["plan", "nowhere.safetensors", files[1]], "“nowhere.safetensors”")
    assert_fails(capsys, ["inspect", str(tmp_path)], "is a folder", "give a .safetensors file")
    assert_fails(capsys, ["inspect", str(damaged)], "damaged.safetensors", "damaged")
    assert_fails(capsys, ["plan", files[0], str(other)], "o.safetensors", "attention")
    no_folder = str(tmp_path / "none" / "map.png")
    assert_fails(capsys, ["plan", *files, "--png", no_folder], "map.png")
    for device in ("nonsense", "hpu"):  # no such word; its package is not there
        assert_fails(capsys, ["plan", *files, "--device", device], f"no device “{device}”")


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", "0"],
        ["--steps", "many"],
        ["--alpha", "-1"],
        ["--top-k", "0"],
        ["--alpha", "nan"],
        ["--scale", "S+"],
        ["--scale", "S*", "--alpha", "0"],
        ["--unknown"],
        ["--png", "a\0b"],
        ["--cache", "a\0b"],
        ["--png", "-", "--json", "-"],
    ],
)
def test_a_wrong_call_is_exit_code_2(files, capsys, monkeypatch, options):
    monkeypatch.setattr("lib_klora.__main__._read", lambda _: pytest.fail("it is refused at once"))
    with pytest.raises(SystemExit) as exit_:
        main(["plan", *files, *options])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "usage: python -m lib_klora" in err


@pytest.mark.parametrize("steps", ["many", "0", "10001", "1.5", "9" * 5000])
def test_steps_are_refused_in_words(capsys, steps):
    with pytest.raises(SystemExit):
        main(["plan", "a", "b", "--steps", steps])
    assert f"a whole number from 1 to 10000, not “{steps}”" in capsys.readouterr().err


def test_interrupted(files, capsys, monkeypatch):
    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("lib_klora.__main__.compute_scores", interrupt)
    assert main(["plan", *files]) == 130


def run(*call: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "lib_klora", *call],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        check=False,
    )


def test_from_a_clone_at_a_console_without_greek_letters(files, tmp_path):
    result = run("plan", *files, PYTHONIOENCODING="ascii")
    assert result.returncode == 0
    assert result.stderr == b""
    assert b"?        " in result.stdout  # γ
    assert run("plan", files[0]).returncode == 2
    assert run("inspect", "nowhere").returncode == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_help_at_a_console_without_greek_letters(encoding):
    result = run("plan", "--help", PYTHONIOENCODING=encoding)
    assert result.returncode == 0
    assert result.stderr == b""
    assert b"--alpha" in result.stdout


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_is_whole_at_any_console(files, encoding):
    call = ("plan", *files, "--method", "Without γ", "--json", "-")
    found = json.loads(run(*call, PYTHONIOENCODING=encoding).stdout)
    assert found["settings"]["method"] == "Without γ"
    assert found["content"]["file"] == files[0]  # with an umbrella


def test_closed_streams_take_nothing(files, tmp_path):
    """``>&-`` and ``2>&-``: Python has no stream there at all."""
    program = (
        "import sys; from lib_klora.__main__ import main; "
        "closed = sys.argv.pop(1); setattr(sys, closed, None); sys.exit(main(sys.argv[1:]))"
    )

    def call(closed: str, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", program, closed, *arguments],
            cwd=ROOT,
            capture_output=True,
            check=False,
        )

    done = call("stdout", "plan", *files, "--json", str(tmp_path / "plan.json"))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (tmp_path / "plan.json").exists()
    done = call("stderr", "plan", *files)
    assert done.returncode == 0
    assert b"paired   6 layers" in done.stdout
    done = call("stderr", "plan", files[0], "nowhere")
    assert (done.returncode, done.stdout) == (1, b"")


def test_head_has_seen_enough(files):
    """A closed pipe is no error worth a traceback."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lib_klora", "plan", *files, "--steps", "10000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 0
    assert error == b""


def test_needs_nothing_but_torch_safetensors_and_numpy():
    """Neither of the packages for development is imported, nor anything of a WebUI."""
    program = (
        "import sys, lib_klora.__main__ as m; "
        "print(*sorted({x.partition('.')[0] for x in sys.modules} & set(sys.argv[1:])))"
    )
    unwanted = ("matplotlib", "PIL", "hypothesis", "gradio", "modules", "networks", "scipy")
    result = subprocess.run(
        [sys.executable, "-c", program, *unwanted], cwd=ROOT, capture_output=True, check=True
    )
    assert result.stdout.strip() == b""


def test_progress_bar_is_for_people_only(files, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal, clock = Terminal(), iter(range(1000))
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    assert main(["plan", *files]) == 0
    shown = terminal.getvalue()
    assert "3/12" in shown
    assert shown.endswith("\r\033[K")  # and it goes when it is done


# -- the map and its reading ----------------------------------------------------------------------


def plan_of(content: list[list[int]], unpaired=None, method="K-LoRA") -> tuple[Plan, Pair]:
    """A plan from a table of steps × layers: 1 for content, 0 for style, 2 for both."""
    table = np.array([2, 1, 3], np.uint8)[np.array([*content, content[-1]])]
    names = tuple(f"middle_block_1_x_{i}" for i in range(table.shape[1]))
    pair = Pair(tuple(LayerPair(name, None, None, 1) for name in names), unpaired or {}, ())
    return Plan(names, table, progress(len(content)), 1.0, method), pair


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([[1, 1, 1], [1, 1, 0], [0, 0, 0]], "56 % content; style takes over at step 3 of 3"),
        (
            [[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]],
            "33 % content; content takes over at step 2, style at step 3 of 4",
        ),
        ([[1], [1]], "100 % content; every step is content, style is never used"),
        ([[0], [0]], "0 % content; every step is style, content is never used"),
        ([[1, 1, 0]], "67 % content; content has more layers in every step"),
        ([[1, 0], [0, 0], [1, 0]], "33 % content; style takes over at step 2 of 3"),
        ([[0, 1], [1, 0]], "50 % content; content has more layers in every step"),
        ([[1] * 200] * 5 + [[1] * 199 + [0]], "above 99 % content; content has more layers"),
        ([[0] * 200] * 5 + [[0] * 199 + [1]], "below 1 % content; style has more layers"),
        ([[2, 2], [2, 2]], "every layer gets both in every step"),
        ([[2, 1, 1, 0]], "50 % content; 25 % both; content has more layers in every step"),
        ([[2, 2], [0, 0]], "0 % content; 50 % both; style takes over at step 2 of 2"),
        ([[1, 1], [0, 0]] * 5, "50 % content; content and style take turns, 9 times in 10 steps"),
        ([[1, 0]] * 5 + [[0, 0]] * 5, "25 % content; style takes over at step 6 of 10"),
    ],
)
def test_reading(content, words):
    plan, pair = plan_of(content)
    assert plot.describe(plan, pair).startswith(words)


def test_reading_of_unpaired_layers():
    plan, pair = plan_of([[1]], {"a": "style", "b": "style", "c": "content"})
    assert plot.describe(plan, pair).endswith(
        "; 1 layer only in the content file; 2 layers only in the style file"
    )
    nothing = Pair((), {"a": "style"}, ())
    plan = Plan((), np.empty((4, 0), np.uint8), progress(3), 1.0, "K-LoRA")
    assert plot.describe(plan, nothing) == (
        "no layer is in both files; 1 layer only in the style file"
    )
    assert drawn(plan, nothing).ndim == 3


ROLES = ("", "content", "style", "both")
"""By their number in a plan."""


def test_reading_names_a_method_other_than_k_lora():
    plan, pair = plan_of([[2]], method="Direct merge")
    assert plot.describe(plan, pair) == "Direct merge: every layer gets both in every step"


LEGEND = picture._LETTERS + picture._GAP
"""Height of the last line."""


def drawn(plan: Plan, pair: Pair) -> np.ndarray:
    """uint8 [height, width, 3]"""
    return np.asarray(picture.selection_map(plan, pair))


def pixels(shown: np.ndarray, colour) -> np.ndarray:
    return (shown == np.array(colour, np.uint8)).all(-1)


def test_map_has_a_cell_for_each_layer_and_step():
    """Two blocks and an unpaired layer between the two of the second, in the network's order."""
    names = ("middle_block_1_b", "middle_block_1_c", "input_blocks_10_1_x", "input_blocks_4_1_x")
    choice = np.array([[1, 3, 1, 2], [2, 1, 2, 1], [2, 2, 2, 2]], np.uint8)
    pair = Pair(
        tuple(LayerPair(n, None, None, 1) for n in names), {"middle_block_1_bb": "style"}, ()
    )
    shown = drawn(Plan(names, choice, progress(2), 1.0, "K-LoRA"), pair)
    wide, high = 640 // 2, 560 // 5
    left = int(np.flatnonzero(pixels(shown[:200], picture.COLOURS["content"]).any(0))[0])
    rows = [3, 2, 0, None, 1]  # column of the plan, from top to bottom
    y = picture._GAP
    for row, column in enumerate(rows):
        for step in range(2):
            cell = shown[y : y + high, left + step * wide : left + (step + 1) * wide]
            role = "style" if column is None else ROLES[choice[step, column]]
            colour = picture.COLOURS[role]
            expected = picture._lighter(colour) if column is None else colour
            assert pixels(cell, expected).all(), (row, step)
        y += high + (row in (0, 1))  # the white line after a block


def test_strip_below_is_the_share_of_each_step():
    plan, pair = plan_of([[1, 1, 1, 1], [1, 0, 0, 0]])
    shown = drawn(plan, pair)
    left = int(np.flatnonzero(pixels(shown[:100], picture.COLOURS["content"]).any(0))[0])
    top = picture._GAP + 560 + 1 + picture._GAP
    strip = pixels(shown[top : top + 40], picture.COLOURS["content"])
    assert strip[:, left + 10].sum() == 40
    assert strip[:, left + 330].sum() == 10
    assert strip[-10:, left + 330].all()  # content below, style above


def test_strip_below_has_both_between_content_and_style():
    plan, pair = plan_of([[2, 2, 2, 2], [1, 2, 2, 0]])
    shown = drawn(plan, pair)
    left = int(np.flatnonzero(pixels(shown[:100], picture.COLOURS["both"]).any(0))[0])
    top = picture._GAP + 560 + 1 + picture._GAP
    strip = shown[top : top + 40]
    assert pixels(strip[:, left + 10], picture.COLOURS["both"]).all()
    for role, rows in (("style", (0, 10)), ("both", (10, 30)), ("content", (30, 40))):
        assert pixels(strip[slice(*rows), left + 330], picture.COLOURS[role]).all()


def test_no_layer_in_common_has_no_strip_below():
    pair = Pair((), {"middle_block_1_a": "content", "middle_block_1_b": "style"}, ())
    shown = drawn(Plan((), np.empty((3, 0), np.uint8), progress(2), 1.0, "K-LoRA"), pair)
    above_the_legend = shown[: -2 * LEGEND]
    for role in ("content", "style"):
        assert pixels(shown, picture._lighter(picture.COLOURS[role])).any()
        assert not pixels(above_the_legend, picture.COLOURS[role]).any()


def test_both_is_in_the_legend_only_where_it_is_in_the_map():
    def legend(table):
        shown = drawn(*plan_of(table))
        return [role for role, x in picture.COLOURS.items() if pixels(shown[-LEGEND:], x).any()]

    assert legend([[1, 1], [1, 0]]) == ["content", "style"]
    assert legend([[2, 1], [1, 0]]) == ["content", "style", "both"]


@given(st.integers(1, 150), st.integers(0, 700), st.integers(0, 5))
def test_map_of_any_size(steps, layers, alone):
    names = tuple(f"input_blocks_{i}_1_x" for i in range(layers))
    pair = Pair(
        tuple(LayerPair(n, None, None, 1) for n in names),
        {f"output_blocks_{i}_1_x": "content" for i in range(alone)},
        (),
    )
    choice = np.full((steps + 1, layers), 2, np.uint8)
    shown = drawn(Plan(names, choice, progress(steps), 1.0, "K-LoRA"), pair)
    assert shown.dtype == np.uint8
    assert shown.ndim == 3
    assert shown.shape[2] == 3


# Machado, Oliveira and Fernandes 2009, severity 1: linear RGB as it is seen.
SEEN = {
    "all colours": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                 [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


@pytest.mark.parametrize("eyes", SEEN)
def test_colours_differ_for_everyone(eyes):
    """In lightness too (WCAG's relative luminance), so that a grey print shows the map."""

    def luminance(colour):
        x = np.array(colour) / 255
        x = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
        return np.clip(SEEN[eyes] @ x, 0, 1) @ [0.2126, 0.7152, 0.0722]

    ordered = sorted(luminance(colour) for colour in picture.COLOURS.values())
    assert len(ordered) == 3
    for darker, lighter in itertools.pairwise(ordered):
        assert (lighter + 0.05) / (darker + 0.05) > (2 if eyes == "all colours" else 1.75)
