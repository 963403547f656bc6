"""Which WebUI this is, told by what its LoRA code can do: forks that look alike, with what their
source has. Those that K-LoRA works in are tried for real by the live tests."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from lib_klora.hosts import find_host

A1111_SHELLS = ("network_apply_weights", "network_Linear_forward", "load_network", "load_networks")
UNKNOWN = "this WebUI's LoRA code is not one that K-LoRA knows"


@pytest.fixture
def put(monkeypatch):
    """Puts a module with these attributes where a WebUI has its own."""

    def put(name, **attributes):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    yield put
    for name in ("a1111", "common", "engine", "lora_loader", "model_patcher"):
        sys.modules.pop(f"lib_klora.hosts.{name}", None)  # made from those modules


@pytest.fixture
def like_forge(put):
    """A WebUI with Forge's engine, as far as finding the host needs it: whose ModelPatcher this is,
    and whether its modules are called as Forge's or as reForge's."""

    def like_forge(patcher, backend="backend"):
        put("networks", load_lora_for_models=nothing)
        put("modules", shared=None, sd_models=None, sd_samplers=None)
        put("modules.paths", data_path="")
        put(backend, memory_management=None, utils=None)
        if backend == "backend":
            put("backend.args", dynamic_args={})
            put("backend.patcher", lora=put("backend.patcher.lora"))
            put("backend.patcher.base", ModelPatcher=patcher)
            put("backend.memory_management")
        else:
            put("ldm_patched.modules")
            put("ldm_patched.modules.model_patcher", ModelPatcher=patcher)
            put("ldm_patched.modules.model_management")

    return like_forge


def nothing(*_):
    """What the shells do."""


class LoadersPatcher:
    """Forge's, and Forge Neo's until July 2026."""

    refresh_loras = nothing


class ComfyPatcher:
    """reForge's, and Forge Neo's from July 2026 on."""

    def __init__(self):
        self.patches, self.backup, self.patches_uuid = {}, {}, None

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False):
        """What K-LoRA calls."""

    add_patches = clone = is_clone = partially_load = nothing


def without(name, kind=ComfyPatcher):
    """The same patcher without one of its methods."""
    methods = {key: value for key, value in vars(kind).items() if key != name}
    return type("ModelPatcher", (), methods)


def kind_of(host):
    return type(host).__name__


def refusal():
    with pytest.raises(RuntimeError) as error:
        find_host()
    return str(error.value)


def test_without_the_lora_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, "networks", None)
    assert "switch it on in the Extensions tab" in refusal()


def test_forge(like_forge):
    like_forge(LoadersPatcher)
    assert kind_of(find_host()) == "LoraLoaderEngine"


@pytest.mark.parametrize("backend", ["backend", "ldm_patched"])
def test_forge_neo_and_reforge(like_forge, put, backend):
    like_forge(ComfyPatcher, backend)
    # reForge has shells of A1111's functions, too.
    shells = dict.fromkeys(A1111_SHELLS, nothing)
    put("networks", load_lora_for_models=nothing, loaded_networks=[], **shells)
    assert kind_of(find_host()) == "ModelPatcherEngine"


def test_a_fork_without_a_patcher_that_is_known_by_name(put):
    put("networks", load_lora_for_models=nothing)
    assert UNKNOWN in refusal()


def test_forge_classic_merges_all_at_once(like_forge):
    class ClassicPatcher:
        def __init__(self):
            self.patches, self.backup = {}, {}

        add_patches = clone = is_clone = patch_model = unpatch_model = nothing

    like_forge(ClassicPatcher, "ldm_patched")
    sentence = refusal()
    assert UNKNOWN in sentence
    assert "no partially_load, patch_weight_to_device, patches_uuid" in sentence
    assert "use AUTOMATIC1111 1.10, Forge, Forge Neo or reForge" in sentence


@pytest.mark.parametrize("name", ["clone", "partially_load", "patch_weight_to_device"])
def test_a_later_patcher_that_lacks_something(like_forge, name):
    like_forge(without(name))
    assert f"(its ModelPatcher has no {name})" in refusal()


def test_a_later_patcher_that_merges_with_other_arguments(like_forge):
    class Later(ComfyPatcher):
        def patch_weight_to_device(self, key, device=None):
            """Other names."""

    like_forge(Later)
    assert "no device_to" in refusal()
