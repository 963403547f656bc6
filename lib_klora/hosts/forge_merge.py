"""Forge: merging what a patcher's LoRA entries say now into some parameters of a model in use.

The host merges everything at once, before the first step (backend/patcher/lora.py,
``LoraLoader.refresh``). Between two steps it has to be less, and the device may be busy.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from backend import memory_management, utils
from backend.patcher import lora as host_lora

Modules = MutableMapping[str, weakref.ref]
"""Parameter key → its module. Looking it up from the model's root for each flip, through cold
memory, would take a third of the flip's time."""


def merge(patcher: Any, keys: Iterable[str], modules: Modules) -> None:
    """Merges what the patcher's entries say now into the weights of ``keys``.

    ``refresh`` would put a new tensor in a weight's place each time, which fragments memory, and
    carry the backup to the device and back. So a merged weight is overwritten in place. What is
    not a plain tensor (GGUF, bitsandbytes) or does not keep its shape goes through ``refresh``.

    Args:
        patcher: the host's ModelPatcher whose model is sampled.
        modules: completed here; to be kept for the next call.
    """
    backups = patcher.lora_loader.backup
    remaining = set(keys)
    try:
        with torch.inference_mode():
            for key in keys:
                module, name = _module_of(patcher.model, key, modules), key.rpartition(".")[2]
                weight, backup = getattr(module, name), backups.get(key)
                if not _is_merged(weight, backup):
                    continue
                entries = [
                    entry
                    for patches in patcher.lora_patches.values()
                    for entry in patches.get(key, ())
                ]
                merged = host_lora.merge_lora_to_weight(entries, backup.to(weight.device), key)
                if merged.shape != weight.shape:
                    continue
                weight.copy_(merged)
                # A parameter of its own on the same memory, because that is how one sees that a
                # weight was written: torch does not count it for what inference mode has made.
                setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
                remaining.remove(key)
    except memory_management.OOM_EXCEPTION:
        memory_management.soft_empty_cache()  # and refresh makes more room
    if remaining:
        _refresh_part(patcher, remaining)


@contextmanager
def synchronized(device: torch.device) -> Iterator[None]:
    """Waits for the device, before and after, so that nothing else runs inside.

    The host reads weights without waiting (``non_blocking``), with --cuda-stream in a stream that
    does not wait for the one that merges. That is safe for its own merging, long before the first
    step, and not for ours between two.
    """
    wait = getattr(getattr(torch, device.type, None), "synchronize", lambda: None)
    wait()
    try:
        yield
    finally:
        wait()


def _module_of(model: Any, key: str, known: Modules) -> Any:
    module = known[key]() if key in known else None
    if module is None:
        module, _, _ = utils.get_attr_with_parent(model, key)
        known[key] = weakref.ref(module)
    return module


def _is_merged(weight: torch.Tensor, backup: torch.Tensor | None) -> bool:
    """Whether the weight is a plain tensor that the host has made by merging: of its own, and with
    a backup (none where the host adds LoRAs at every forward)."""
    plain = type(weight) is torch.nn.Parameter  # quantised ones are subclasses of it
    return plain and backup is not None and weight.data_ptr() != backup.data_ptr()


class _ModelSubset:
    """The model, reduced to the parameters that a flip concerns, for ``LoraLoader.refresh``.

    The host looks a parameter up by its path several times for each refresh, module by module. Here
    a path has one step: ``a/b/c.weight`` for ``a.b.c.weight``.
    """

    def __init__(self, model: Any, keys: Iterable[str]) -> None:
        self.short = {}
        """The host's key → the key here."""
        for key in keys:
            path, _, name = key.rpartition(".")
            step = path.replace(".", "/")
            setattr(self, step, utils.get_attr(model, path))
            self.short[key] = f"{step}.{name}"

    def named_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        return ((short, utils.get_attr(self, short)) for short in self.short.values())


def _refresh_part(patcher: Any, keys: Iterable[str]) -> None:
    """The host's own refresh, over ``keys`` alone: restore from backup, merge what the patcher's
    entries say now."""
    loader, model = patcher.lora_loader, _ModelSubset(patcher.model, keys)
    part = type(loader)(model)
    part.backup = {
        short: loader.backup[key] for key, short in model.short.items() if key in loader.backup
    }
    patches = {
        identifier: {
            # An emptied list must still replace an online one; where the host merges, restoring
            # the backup is enough.
            short: entries[key]
            for key, short in model.short.items()
            if key in entries and (entries[key] or identifier[3])
        }
        for identifier, entries in patcher.lora_patches.items()
    }
    empty_cache = memory_management.signal_empty_cache
    try:
        part.refresh(patches, offload_device=patcher.offload_device, force_refresh=True)
    finally:
        # A GGUF weight is requantised in place, in the very object that was its backup: the new
        # backup is the only copy of the original then.
        for key, short in model.short.items():
            if short in part.backup:
                loader.backup[key] = part.backup[short]
        memory_management.signal_empty_cache = empty_cache
