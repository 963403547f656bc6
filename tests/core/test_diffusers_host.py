"""The host for a diffusers UNet: a host of the session like the WebUIs, so what they promise holds
here too. The model is any torch module with the layers' names."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lib_klora.errors import KLoraError
from lib_klora.hosts.diffusers_unet import DiffusersUNet
from lib_klora.session import Session
from lib_klora.settings import Settings
from lib_klora.steps import Pass

STEPS = 8
LAYERS = tuple(
    f"down_blocks.0.attentions.{i}.transformer_blocks.0.attn1.{to}"
    for i in range(2)
    for to in ("to_q", "to_k", "to_v")
)
ALONE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
"""A layer that only the content file has."""


def unet() -> nn.Module:
    root = nn.Module()
    generator = torch.Generator().manual_seed(0)
    for path in (*LAYERS, ALONE, "conv_in"):
        module = root
        *above, last = path.split(".")
        for name in above:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module._modules[name]
        linear = nn.Linear(12, 12, bias=False)
        linear.weight.data = torch.randn(12, 12, generator=generator)
        module.add_module(last, linear)
    return root


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(("content", "style", "other")):
        generator = torch.Generator().manual_seed(seed + 1)
        tensors = {}
        for i, layer in enumerate((*LAYERS, ALONE) if name == "content" else LAYERS):
            strength = 1 + i if name == "content" else 4
            for part, shape in (("lora_A", (2, 12)), ("lora_B", (12, 2))):
                tensors[f"unet.{layer}.{part}.weight"] = (
                    torch.randn(shape, generator=generator) * strength
                )
        save_file(tensors, tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.fixture
def host(folder):
    return DiffusersUNet(unet(), folder, folder / "cache")


def weights(host: DiffusersUNet) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in host.model().named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def under(host: DiffusersUNet, *loras: tuple[str, float]) -> dict[str, torch.Tensor]:
    """Every weight as plain LoRAs make it."""
    host.use_loras(loras)
    result = weights(host)
    host.use_loras([])
    return result


def run(host, settings, tags=(("content",), ("style",))):
    """The weights at each model call, and the report."""
    session = Session(host)
    p = SimpleNamespace(extra_generation_params={}, comments={}, comment=lambda text: None)
    p = type("Generation", (), vars(p))()
    session.activate(p, [list(tag) for tag in tags], settings)
    seen = []
    for call in range(STEPS):
        session.before_model_call(partial(Pass, call, STEPS, 0.0))
        seen.append(weights(host))
    report = session.report(p)
    assert not report.error, report.error
    session.detach()
    return seen, report


def test_np_lora_is_the_two_files_with_the_content_written_anew(host, folder):
    """By numpy's QR, in fp64 and then fp32, in the layers that both have."""
    content, style = (load_file(folder / f"{x}.safetensors") for x in ("content", "style"))
    for layer in LAYERS:
        key = f"unet.{layer}.lora_A.weight"
        basis, _ = np.linalg.qr(style[key].double().numpy().T)
        a = content[key].double().numpy()
        content[key] = torch.from_numpy((a - a @ basis @ basis.T / 3).astype(np.float32))
    save_file(content, folder / "projected.safetensors")
    before = weights(host)
    plain = under(host, ("content", 0.7), ("style", 1.0))
    wanted = under(host, ("projected", 0.7), ("style", 1.0))
    assert not same(wanted, plain)
    tags = (("content", "0.7"), ("style",))
    for method, right in (("NP-LoRA", wanted), ("Direct merge", plain), ("NP-LoRA", wanted)):
        seen, report = run(host, Settings(method=method), tags)
        assert all(same(now, right) for now in seen)
        assert same(weights(host), before)
        assert (report.passes[-1].pair.overlap is None) == (method == "Direct merge")


def test_recover_applies_anew_what_is_wanted(host):
    host.use_loras([("content", 1.0)])
    wanted = weights(host)
    host.model().get_submodule(LAYERS[0]).weight.data.zero_()
    host.detach()
    assert not same(weights(host), wanted)
    host.recover()
    host.detach()
    assert same(weights(host), wanted)


@pytest.mark.parametrize("scale", ["S", "S*"])
def test_each_layer_is_bit_for_bit_as_the_winner_alone_makes_it(host, scale):
    before = weights(host)
    alone = {name: under(host, (name, 1.0)) for name in ("content", "style")}
    seen, report = run(host, Settings(scale=scale))
    plan, pair = report.passes[-1].plan, report.passes[-1].pair
    assert 0 < plan.content.mean() < 1, "one LoRA has it all: the test would show little"
    for call, now in enumerate(seen):
        for name, content in zip(pair.paired, plan.content[call], strict=True):
            path = next(p for p in LAYERS if p.replace(".", "_") == common_path(name.name))
            winner = alone["content" if content else "style"]
            assert torch.equal(now[f"{path}.weight"], winner[f"{path}.weight"])
        assert torch.equal(now[f"{ALONE}.weight"], alone["content"][f"{ALONE}.weight"])
        assert torch.equal(now["conv_in.weight"], before["conv_in.weight"])
    assert same(weights(host), before)


def common_path(name: str) -> str:
    """``input_blocks_1_1_transformer…`` → the path in diffusers, with ``_``."""
    number, _, rest = name.removeprefix("input_blocks_").partition("_1_")
    return f"down_blocks_0_attentions_{int(number) - 1}_{rest}"


def test_a_direct_merge_is_both_loras_at_their_weights(host):
    settings = Settings(method="Direct merge")
    seen, _ = run(host, settings, (("content", "0.5"), ("style", "0.8")))
    expected = under(host, ("content", 0.5), ("style", 0.8))
    assert all(same(now, expected) for now in seen)


def test_a_plain_lora_stays_beside_the_pair(host):
    plain = under(host, ("other", 0.3), ("style", 1.0))
    host.use_loras([("other", 0.3)])
    with_other = weights(host)
    seen, _ = run(host, Settings(alpha=0, beta=1e9, unpaired="drop"))  # style has every layer
    assert same(seen[0], plain)
    assert same(weights(host), with_other)


def test_only_what_flips_is_written(host, monkeypatch):
    written = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, other: (written.append(1), copy(self, other))[1]
    )
    session = Session(host)
    p = type("Generation", (), {"extra_generation_params": {}, "comments": {}})()
    session.activate(p, [["content"], ["style"]], Settings())
    counts = []
    for call in range(STEPS):
        written.clear()
        session.before_model_call(partial(Pass, call, STEPS, 0.0))
        counts.append(len(written))
    content = session.report(p).passes[-1].plan.content
    flips = (content[1:STEPS] != content[: STEPS - 1]).sum(1)
    assert counts[1:] == list(flips)
    assert sum(flips) > 0


def test_the_folder_is_the_list_of_loras(host, folder):
    assert host.lora_names() == ["content", "other", "style"]
    assert host.find("nobody") is None
    found = host.find("style")
    assert host.find_by_hash(found.short_hash) == "style"
    assert host.find_by_hash("0" * 12) is None
    version = found.version
    save_file({"unet.x.lora_A.weight": torch.ones(1, 1)}, folder / "style.safetensors")
    assert host.find("style").version != version


def test_an_unknown_lora_is_a_sentence(host):
    with pytest.raises(KLoraError, match="There is no LoRA “nobody”"):
        host.use_loras([("nobody", 1.0)])


def test_layers_that_the_model_lacks_are_not_offered(host, folder):
    tensors = {
        f"unet.{path}.{part}.weight": torch.ones(shape)
        for path in (LAYERS[0], "up_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q")
        for part, shape in (("lora_A", (1, 12)), ("lora_B", (12, 1)))
    }
    save_file(tensors, folder / "more.safetensors")
    on_disk = host.find("more")
    lora = host.load(on_disk, host.read(on_disk))
    assert list(lora.shapes.values()) == [(12, 12)]
    assert np.prod((12, 12)) == next(iter(lora.parts.layers.values())).entries
