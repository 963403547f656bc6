"""Which WebUI this is, told by what its LoRA code can do: forks that look alike, with what their
source has. The two that K-LoRA works in are tried for real by the live tests."""

import sys
from types import ModuleType

import pytest

from lib_klora.hosts import find_host

A1111_SHELLS = ("network_apply_weights", "network_Linear_forward", "load_network", "load_networks")
NEITHER = "neither that of AUTOMATIC1111 1.10 nor that of Forge"


@pytest.fixture
def put(monkeypatch):
    """Puts a module with these attributes where a WebUI has its own."""

    def put(name, **attributes):
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    yield put
    for name in ("a1111", "forge", "forge_merge", "common"):  # made from those modules
        sys.modules.pop(f"lib_klora.hosts.{name}", None)


@pytest.fixture
def like_forge(put):
    """Forge's modules, as far as finding the host needs them."""

    def like_forge(patcher, dynamic_args):
        put("networks", load_lora_for_models=nothing)
        put("modules", shared=None, sd_models=None, sd_samplers=None)
        put("modules.paths", data_path="")
        put("backend", memory_management=None, utils=None)
        put("backend.args", dynamic_args=dynamic_args)
        put("backend.patcher", lora=put("backend.patcher.lora"))
        put("backend.patcher.base", ModelPatcher=type("ModelPatcher", (), {patcher: nothing}))

    return like_forge


def nothing(*_):
    """What the shells do."""


def refusal():
    with pytest.raises(RuntimeError) as error:
        find_host()
    return str(error.value)


def test_without_the_lora_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, "networks", None)
    assert "switch it on in the Extensions tab" in refusal()


def test_forge(like_forge):
    like_forge("refresh_loras", {})
    assert find_host().name == "Forge"


def test_reforge_has_shells_of_a1111s_functions(put):
    shells = dict.fromkeys(A1111_SHELLS, nothing)
    put("networks", load_lora_for_models=nothing, loaded_networks=[], **shells)
    assert NEITHER in refusal()


def test_forge_classic_has_no_backend(put):
    put("networks", load_lora_for_models=nothing)
    assert NEITHER in refusal()


@pytest.mark.parametrize(
    ("patcher", "dynamic_args"),
    [("add_patches", {}), ("refresh_loras", object())],
    ids=["patcher of ComfyUI", "arguments in an object"],
)
def test_forge_neo_has_another_backend(like_forge, patcher, dynamic_args):
    like_forge(patcher, dynamic_args)
    assert NEITHER in refusal()
