"""Start a WebUI on a second torch device, for machines without a GPU.

For `python launch.py` in the WebUI's folder, call this file there with the same arguments. The
WebUI's code is as it was; where it asks for the device to compute on, it is told this one
(device.cpp), on which a tensor that was left on the CPU ends in an error, as on a GPU. Forge is
told besides that the device has little memory, so a part of a model's layers stays on the CPU.

What this cannot show: CUDA's own kernels and rounding, its times, its asynchrony.
"""

import importlib.abc
import importlib.machinery
import runpy
import sys
import types
from pathlib import Path

import torch
from torch.utils import cpp_extension

NAME = "second"
MEMORY = 4_000_000
"""Bytes that Forge sees: less than each of the tiny models needs."""


def load():
    """Build the device with the WebUI's own torch (once), and make it known."""
    build = f"klora_second_device_{torch.__version__}".translate(str.maketrans(".+", "__"))
    source = Path(__file__).with_name("device.cpp")
    cpp_extension.load(name=build, sources=[str(source)], extra_cflags=["-O1"])
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.synchronize = lambda device=None: None
    # torch calls these where it seeds, or forks, its random numbers
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.empty(0, dtype=torch.uint8)
    module.set_rng_state = lambda state, device=None: None
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return torch.device(NAME, 0)


def choose_in_a1111(devices):
    """modules/devices.py"""
    devices.get_optimal_device_name = lambda: str(device)


def choose_in_forge(memory_management):
    """backend/memory_management.py"""
    free_on_cpu = memory_management.get_free_memory

    def free(dev=None, torch_free_too=False):
        if dev is not None and dev.type == "cpu":
            return free_on_cpu(dev, torch_free_too)
        return (MEMORY, MEMORY) if torch_free_too else MEMORY

    memory_management.get_torch_device = lambda: device
    memory_management.get_free_memory = free
    memory_management.minimum_inference_memory = lambda: 0
    memory_management.vram_state = memory_management.VRAMState.NORMAL_VRAM
    # Half precision is asked for by a test where it wants it; the CPU lacks some of its kernels.
    memory_management.should_use_fp16 = lambda *_, **__: False
    memory_management.should_use_bf16 = lambda *_, **__: False


CHOOSE = {"modules.devices": choose_in_a1111, "backend.memory_management": choose_in_forge}


class Finder(importlib.abc.MetaPathFinder):
    """Lets these modules be changed once they have been imported, before anybody uses them."""

    def find_spec(self, name, path, target=None):
        """The module's own spec, with a loader that changes the module at its end."""
        if name not in CHOOSE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def run_and_choose(module):
            run(module)
            CHOOSE[name](module)

        spec.loader.exec_module = run_and_choose
        return spec


if __name__ == "__main__":
    device = load()
    sys.meta_path.insert(0, Finder())
    sys.argv[0], sys.path[0] = "launch.py", str(Path.cwd())
    runpy.run_path("launch.py", run_name="__main__")
