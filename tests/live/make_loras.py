"""Write small random LoRA files, in every spelling and type that LoRA files come in.

    python make_loras.py CHECKPOINT OUT.safetensors [--spelling S] [--kind K] [--rank R] ...

A layer is called by its dotted LDM name (`input_blocks.1.1.transformer_blocks.0.attn1.to_q`), or
by that and its output rows (`double_blocks.0.img_attn.qkv[0:256]`) where a file splits a fused
weight. Each layer's ΔW is scaled by a factor of its own, exp(N(0, spread)), so that not all
layers of a pair turn from one file to the other at the same step.
"""

import argparse
import json
import math
import re
import shutil
import struct
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ATTENTION = (
    r"\.attn[12]\.to_(q|k|v|out\.0)$|self_attn\.(q|k|v|out)_proj$"
    r"|\.(img|txt)_attn\.(qkv|proj)$|^single_blocks\.\d+\.linear[12]$"
    r"|\.attention\.(qkv|out)$"  # Z-Image, Lumina 2
    r"|\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)$"  # Qwen-Image
    r"|(self|cross)_attn\.([qkvo]|output)_proj$"  # Anima
    r"|\.attn\.(w[qkvo]|gate)$"  # Krea 2
    r"|\.self_attention\.(to_[qkv]|to_out\.0)$"  # Ernie-Image
    r"|\.(self|cross)_attn\.[qkvo]$"  # Wan
)
LINEAR = ATTENTION + (
    r"|\.ff\.net\.(0\.proj|2)$|\.1\.proj_(in|out)$|mlp\.fc[12]$"
    r"|\.(img|txt)_mlp\.[02]$|\.(img|txt)_mod\.lin$|\.modulation\.lin$"
    r"|\.feed_forward\.w[123]$|\.\d+\.adaLN_modulation\.[01]$"
    r"|\.(img|txt)_mlp\.net\.(0\.proj|2)$|\.(img|txt)_mod\.1$"
    r"|\.mlp\.(layer[12]|gate|up|down|(gate|up)_proj|linear_fc2)$|\.ffn\.[02]$"
    r"|\.adaln_modulation_\w+\.[12]$"
)
CONVOLUTION = r"\.(in_layers\.2|out_layers\.3|emb_layers\.1|skip_connection|op|conv)$"
WHICH = {"attention": ATTENTION, "linear": LINEAR, "all": f"{LINEAR}|{CONVOLUTION}"}
ENCODER = re.compile(r"te\d?\.|llm_adapter\.")  # Anima's checkpoint holds a part of the encoder
WITHOUT_BIAS = r"\.attn[12]\.to_[qkv]$"


# layers and their names -------------------------------------------------------------------------


def layers_of(*files):
    """{layer: weight's shape} of a checkpoint's matrices and kernels, from the files' headers.

    Text encoder layers are called `te.` (SD1.5), `te1.` or `te2.`, and their CLIP name.
    """
    shapes = {}
    for file in files:
        with open(file, "rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        for key, entry in header.items():
            if key.endswith("weight") and len(entry["shape"]) > 1:
                shapes.update(layers_in(key, tuple(entry["shape"])))
    return shapes


def layers_in(key, shape):
    """(layer, shape) pairs in one weight of a checkpoint; OpenCLIP fuses three layers in one."""
    unet = re.fullmatch(r"model\.diffusion_model\.(.+)\.weight", key)
    if unet:
        yield unet[1], shape
    clip = re.fullmatch(
        r"(cond_stage_model\.|conditioner\.embedders\.0\.)?(?:transformer\.)?"
        r"(text_model\.encoder\.layers\.\d+\.(?:self_attn|mlp)\..+)\.weight",
        key,
    )
    if clip:
        yield f"{'te' if clip[1] == 'cond_stage_model.' else 'te1'}.{clip[2]}", shape
    openclip = re.fullmatch(
        r"conditioner\.embedders\.1\.model\.transformer\.resblocks\.(\d+)\.(?:attn|mlp)\.(\w+?)"
        r"[._]weight",
        key,
    )
    if openclip:
        layer = f"te2.text_model.encoder.layers.{openclip[1]}."
        names = {"out_proj": "self_attn.out_proj", "c_fc": "mlp.fc1", "c_proj": "mlp.fc2"}
        if openclip[2] == "in_proj":
            for part in "qkv":
                yield f"{layer}self_attn.{part}_proj", (shape[0] // 3, shape[1])
        else:
            yield layer + names[openclip[2]], shape


def diffusers_name(layer):
    """A Stable Diffusion UNet layer's name in diffusers."""
    resnet = {
        "in_layers.2": "conv1",
        "out_layers.3": "conv2",
        "emb_layers.1": "time_emb_proj",
        "skip_connection": "conv_shortcut",
    }
    middle = re.fullmatch(r"middle_block\.(\d)\.(.+)", layer)
    if middle:
        number, rest = int(middle[1]), middle[2]
        if number == 1:
            return f"mid_block.attentions.0.{rest}"
        return f"mid_block.resnets.{number // 2}.{resnet[rest]}"
    side, number, rest = re.fullmatch(r"(in|out)put_blocks\.(\d+)\.\d\.(.+)", layer).groups()
    side = {"in": "down", "out": "up"}[side]
    block, position = divmod(int(number) - (side == "down"), 3)
    if rest in ("op", "conv"):
        return f"{side}_blocks.{block}.{side}samplers.0.conv"
    if rest in resnet:
        return f"{side}_blocks.{block}.resnets.{position}.{resnet[rest]}"
    return f"{side}_blocks.{block}.attentions.{position}.{rest}"


FUSED = {
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "attention.qkv": ["attention.to_q", "attention.to_k", "attention.to_v"],
}
WHOLE = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
    "attention.out": "attention.to_out.0",
    **{f"attn.w{part}": f"attn.to_{part}" for part in "qkv"},
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    **{f"mlp.{part}": f"ff.{part}" for part in ("gate", "up", "down")},
}
FLUX2 = {
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
}
# its feed forward has the ratio 3, not 4, and a gate
FLUX2_SHAPES = dict(zip(FLUX2, (6, 1 / 3, 6, 1 / 3, 9, 1 / 4), strict=True))
BLOCKS = {
    "double_blocks": "transformer_blocks",
    "single_blocks": "single_transformer_blocks",
    "blocks": "transformer_blocks",
    "txtfusion.layerwise_blocks": "text_fusion.layerwise_blocks",
    "txtfusion.refiner_blocks": "text_fusion.refiner_blocks",
}
UNET = re.compile(r"te\d?\.|(input|middle|output)_block|time_embed\.|label_emb|out\.")
BLOCK = re.compile(r"((?:\w+\.)*?\w+)\.(\d+)\.(.+)")


def diffusers_parts(layer, shape):
    """(name, first row, end row) of each part that diffusers makes of a transformer's layer."""
    rows, width = shape
    blocks, number, part = BLOCK.fullmatch(layer).groups()
    prefix = f"{BLOCKS.get(blocks, blocks)}.{number}."
    if FLUX2_SHAPES.get(part) == rows / width:
        return [(prefix + FLUX2[part], 0, rows)]
    if part not in FUSED:
        return [(prefix + WHOLE.get(part, part), 0, rows)]
    names = FUSED[part]
    half = (rows - width) // 2 if part.endswith("qkv") else width  # Lumina 2 has fewer keys
    bounds = [0, width, width + half, width + 2 * half, rows][: len(names) + 1]
    spans = zip(names, pairwise(bounds), strict=True)
    return [(prefix + name, first, end) for name, (first, end) in spans]


def spelled(layer, shape, spelling):
    """(name in the file, layer or rows of it, shape) of each part that a spelling makes of it.

    kohya: kohya with diffusers' block names.   ldm: kohya with LDM's block names; Flux as well.
    diffusers: old diffusers.   peft: diffusers with PEFT.
    comfy: the network's own names.   transformer: diffusers' names of Flux and newer families.
    """
    encoder, _, name = layer.partition(".")
    if encoder in ("te", "te1", "te2"):
        if spelling in ("kohya", "ldm"):
            yield "lora_" + layer.replace(".", "_"), layer, shape
        else:
            yield f"text_encoder{'_2' if encoder == 'te2' else ''}.{name}", layer, shape
    elif spelling == "comfy":
        yield f"diffusion_model.{layer}", layer, shape
    elif spelling == "transformer":
        for name, first, end in diffusers_parts(layer, shape):
            part = layer if end - first == shape[0] else f"{layer}[{first}:{end}]"
            yield f"transformer.{name}", part, (end - first, shape[1])
    elif spelling == "ldm":
        yield "lora_unet_" + layer.replace(".", "_"), layer, shape
    elif spelling == "kohya":
        yield "lora_unet_" + diffusers_name(layer).replace(".", "_"), layer, shape
    elif spelling == "peft":
        yield "unet." + diffusers_name(layer), layer, shape
    else:
        name = diffusers_name(layer).replace(".to_", ".processor.to_").replace("out.0", "out")
        yield "unet." + name, layer, shape


def spellings_of(layer):
    """The spellings that can name a layer."""
    if not UNET.match(layer):
        return ("ldm", "comfy", "transformer")[: 3 if BLOCK.fullmatch(layer) else 2]
    if layer.startswith("te") or re.search(WHICH["all"], layer):
        return ("kohya", "ldm", "diffusers", "peft")
    return ("ldm",)


LORA_ENDINGS = {
    "diffusers": {"lora_down.weight": "_lora.down.weight", "lora_up.weight": "_lora.up.weight"},
    "peft": {"lora_down.weight": ".lora_A.weight", "lora_up.weight": ".lora_B.weight"},
}
LORA_ENDINGS["comfy"] = LORA_ENDINGS["transformer"] = LORA_ENDINGS["peft"]


# what a layer holds -----------------------------------------------------------------------------


def lora(shape, rank, scale, noise):
    """LoRA: up · down."""
    return {
        "lora_down.weight": noise(rank, *shape[1:]) / math.sqrt(math.prod(shape[1:])),
        "lora_up.weight": noise(shape[0], rank, *[1] * (len(shape) - 2)) * scale / rank**0.5,
    }


def tucker(shape, rank, scale, noise):
    """LoRA of a convolution with a middle tensor (CP); plain LoRA of anything else."""
    if shape[2:] in ((), (1, 1)):
        return lora(shape, rank, scale, noise)
    return {
        **lora((shape[0], shape[1], 1, 1), rank, scale, noise),
        "lora_mid.weight": noise(rank, rank, *shape[2:]) / math.sqrt(rank * math.prod(shape[2:])),
    }


def dora(shape, rank, scale, noise):
    """DoRA: LoRA, and the length of every input column, here about a random weight's."""
    length = math.sqrt(shape[0] / shape[1])
    columns = (1, shape[1], *[1] * (len(shape) - 2))
    return {
        **lora(shape, rank, scale, noise),
        "dora_scale": length * (1 + 0.1 * noise(*columns)),
    }


def loha(shape, rank, scale, noise):
    """LoHa: (a₁ · b₁) ∘ (a₂ · b₂)."""
    columns = math.prod(shape[1:])
    return {
        "hada_w1_a": noise(shape[0], rank) * scale / rank**0.5,
        "hada_w1_b": noise(rank, columns) / columns**0.5,
        "hada_w2_a": noise(shape[0], rank) / rank**0.5,
        "hada_w2_b": noise(rank, columns),
    }


def lokr(shape, rank, scale, noise):
    """LoKr w₁ ⊗ w₂ with neither decomposed, so that no rank is declared and alpha says nothing."""
    width = scale / math.sqrt(math.prod(shape[1:]))
    return {
        "lokr_w1": noise(4, 4),
        "lokr_w2": noise(shape[0] // 4, shape[1] // 4, *shape[2:]) * width,
    }


def lokr_low(shape, rank, scale, noise):
    """LoKr w₁ ⊗ (a · b), of linear layers."""
    return {
        "lokr_w1": noise(4, 4),
        "lokr_w2_a": noise(shape[0] // 4, rank) * scale / rank**0.5,
        "lokr_w2_b": noise(rank, shape[1] // 4) / shape[1] ** 0.5,
    }


def full(shape, rank, scale, noise):
    """ΔW itself."""
    return {"diff": noise(*shape) * scale / math.sqrt(math.prod(shape[1:]))}


KINDS = {kind.__name__: kind for kind in (lora, tucker, dora, loha, lokr, lokr_low, full)}
FIRST = ("lora_up.weight", "hada_w1_a", "lokr_w1", "diff")  # ΔW is linear in this tensor


# files ------------------------------------------------------------------------------------------


def write(
    path, layers, *, spelling="kohya", kind="lora", rank=4, seed=1, alpha=None, scale=0.3,
    spread=0.7, dtype="float16", which="attention", only="", te=False,
):  # fmt: skip
    """Write a random LoRA file for `layers` (see `layers_of`).

    `which` layers (attention, linear, all), those that match the regex `only`, and with `te` the
    text encoders' too. `scale` is ΔW's size relative to a random weight's, before `spread`.
    Without `alpha`, kohya's spellings declare alpha = rank, the others nothing.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    tensors = {}
    for layer, shape in layers.items():
        wanted = re.search(WHICH[which], layer) and re.search(only, layer)
        if not wanted or (ENCODER.match(layer) and not te):
            continue
        for name, part, part_shape in spelled(layer, shape, spelling):
            held = KINDS[kind](part_shape, rank, scale, noise)
            factor = math.exp(spread * noise(1).item())
            held.update((item, held[item] * factor) for item in FIRST if item in held)
            if kind == "full" and not re.search(WITHOUT_BIAS, part):
                held["diff_b"] = noise(part_shape[0]) * 0.02
            if alpha is not None or spelling in ("kohya", "ldm"):
                held["alpha"] = torch.tensor(float(rank if alpha is None else alpha))
            endings = LORA_ENDINGS.get(spelling, {})
            for item, tensor in held.items():
                key = name + endings.get(item, f".{item}")
                tensors[key] = tensor.to(getattr(torch, dtype)).contiguous()
    assert tensors, f"no layer matches {which} {only}"
    save(path, tensors)


def save(path, tensors):
    """Write a file with the metadata that kohya writes."""
    name = Path(path).stem
    metadata = {"ss_network_module": "networks.lora", "ss_output_name": name}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)


def parts_of(path, layers):
    """{layer, or rows of it: its keys} of a LoRA file, text encoders included."""
    names = {
        name: part
        for layer, shape in layers.items()
        for spelling in spellings_of(layer)
        for name, part, _ in spelled(layer, shape, spelling)
    }
    ending = re.compile(
        r"(_lora\.(down|up)\.weight|\.lora_(down|up|mid|A|B)\.weight|\.(hada|lokr)_\w+|\.diff(_b)?"
        r"|\.alpha|\.dora_scale)$"
    )
    parts = {}
    for key in load_file(path):
        parts.setdefault(names[ending.sub("", key)], []).append(key)
    return parts


def compose(path, winners, layers):
    """Write a file whose every layer comes from the file that `winners` names for it.

    winners: {layer, or rows of it as in `parts_of`: LoRA file}; rows may be given by their layer.
    """
    tensors = {}
    for source in sorted(set(winners.values())):
        held = load_file(source)
        for part, keys in parts_of(source, layers).items():
            if winners.get(part, winners.get(part.partition("[")[0])) == source:
                tensors.update((key, held[key]) for key in keys)
    save(path, tensors)


def write_bad(folder, layers):
    """Write files that must be refused: {what is wrong: path}."""
    names = ("nan", "zero_rank", "truncated", "not_a_lora", "empty")
    files = {name: Path(folder) / f"bad_{name}.safetensors" for name in names}
    write(files["nan"], layers)
    good = load_file(files["nan"])
    some = next(key for key in good if key.endswith("lora_up.weight"))
    save(files["nan"], {**good, some: torch.full_like(good[some], math.nan)})
    none = {
        key: tensor[:0] if "lora_down" in key else tensor[:, :0] if "lora_up" in key else tensor
        for key, tensor in good.items()
    }
    save(files["zero_rank"], {key: tensor.contiguous() for key, tensor in none.items()})
    files["truncated"].write_bytes(files["nan"].read_bytes()[:-1000])
    save(files["not_a_lora"], {"emb_params": torch.zeros(2, 32)})
    files["empty"].write_bytes(b"")
    return files


# the live tests' set ----------------------------------------------------------------------------

CONTENT, STYLE = {"rank": 4, "seed": 11}, {"rank": 8, "seed": 22}
PAIRS = {  # checkpoint without "tiny_": the spelling that its LoRA files usually have
    "sd15": "kohya",
    "sdxl": "ldm",
    "sdxl_full": "ldm",
    "flux": "ldm",
    "zimage": "comfy",
    "qwen": "transformer",
    "chroma": "ldm",
    "flux2": "comfy",
    "anima": "ldm",
    "lumina": "ldm",
    "krea": "comfy",
    "ernie": "ldm",
    "wan": "comfy",
}
LDM, COMFY = {"ldm": "ldm"}, {"comfy": "comfy"}
DIFFUSERS, SPLIT = {"diffusers": "transformer"}, {"split": "transformer"}  # SPLIT: q, k and v
SPELLINGS = {  # {ending of a file's name: spelling}, of the families that only Forge Neo has
    "zimage": {**LDM, **SPLIT},
    "qwen": {**LDM, **COMFY},
    "chroma": {**COMFY, **SPLIT},
    "flux2": {**LDM, **SPLIT},
    "anima": COMFY,
    "lumina": COMFY,
    "krea": {**LDM, **DIFFUSERS},
    "ernie": {**COMFY, **DIFFUSERS},
    "wan": LDM,
}
MORE = {
    "sd15": {
        "other": {"rank": 4, "seed": 33},
        "other_te": {"rank": 4, "seed": 33, "te": True},
        "content_te": dict(CONTENT, te=True),
        "style_te": dict(STYLE, te=True),
        "content_all": dict(CONTENT, which="all", kind="tucker", dtype="float32"),
        "style_all": dict(STYLE, which="all", alpha=4),
        "content_ldm": dict(CONTENT, spelling="ldm"),
        "style_diffusers": dict(STYLE, spelling="diffusers"),
        "style_peft": dict(STYLE, spelling="peft"),
        "style_bf16": dict(STYLE, dtype="bfloat16"),
        "style_dora": dict(STYLE, kind="dora"),
        "style_loha": dict(STYLE, kind="loha", which="all"),
        "content_lokr": dict(CONTENT, kind="lokr", alpha=100_000),  # infinite in fp16
        "style_lokr_low": dict(STYLE, kind="lokr_low"),
        "style_full": dict(STYLE, kind="full", which="all"),
        "content_down": dict(CONTENT, only="input_blocks|middle"),
        "style_up": dict(STYLE, only="output_blocks"),
    },
    "sdxl": {
        "content_te": dict(CONTENT, te=True, spelling="ldm"),
        "style_te": dict(STYLE, te=True, spelling="ldm"),
    },
    "flux": {
        "content_split": dict(CONTENT, spelling="transformer"),
        "style_split": dict(STYLE, spelling="transformer"),
    },
}
MORE["anima"] = {"content_te": dict(CONTENT, te=True), "style_te": dict(STYLE, te=True)}
for family, spellings in SPELLINGS.items():
    more = MORE.setdefault(family, {})
    more["content_lokr"] = dict(CONTENT, kind="lokr")
    more["style_lokr_low"] = dict(STYLE, kind="lokr_low", alpha=8)
    for name, spelling in spellings.items():
        more[f"content_{name}"] = dict(CONTENT, spelling=spelling)
        more[f"style_{name}"] = dict(STYLE, spelling=spelling)


def write_set(checkpoints, folder):
    """Write `FAMILY_content`, `FAMILY_style` and the rest for every tiny checkpoint there is.

    What the folder held before is removed; Forge renames files that it cannot read.
    """
    checkpoints, folder = Path(checkpoints), Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    for family, spelling in PAIRS.items():
        checkpoint = checkpoints / f"tiny_{family}.safetensors"
        if not checkpoint.is_file():
            continue
        layers = layers_of(checkpoint)
        pair = {"content": CONTENT, "style": STYLE}
        for name, options in {**pair, **MORE.get(family, {})}.items():
            file = folder / f"{family}_{name}.safetensors"
            write(file, layers, **{"spelling": spelling, **options})
    layers = layers_of(checkpoints / "tiny_sd15.safetensors")
    write_bad(folder, layers)
    bundle(folder / "sd15_content.safetensors", folder / "sd15_content_bundle.safetensors", layers)


def bundle(source, path, layers):
    """Write a copy of a LoRA file with a textual inversion in it, for the word `sks_word`."""
    width = layers["te.text_model.encoder.layers.0.self_attn.q_proj"][1]
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(5))
    save(path, {**load_file(source), "bundle_emb.sks_word.emb": vectors})


def main():
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", nargs="+", help="checkpoint, and text encoder files")
    parser.add_argument("out")
    parser.add_argument("--spelling", default="kohya")
    parser.add_argument("--kind", default="lora", choices=KINDS)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--alpha", type=float)
    parser.add_argument("--scale", type=float, default=0.3)
    parser.add_argument("--spread", type=float, default=0.7)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--which", default="attention", choices=WHICH)
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--te", action="store_true")
    options = vars(parser.parse_args())
    write(options.pop("out"), layers_of(*options.pop("checkpoint")), **options)


if __name__ == "__main__":
    main()
