"""Weights by Forge's ``LoraLoader`` (backend/patcher/lora.py; Forge Neo had it until July 2026).

A patcher has its entries under an identifier for each LoRA: ``lora_patches[file name, strength,
strength_model, online][key]``. ``LoraLoader.refresh`` merges all of them into the weights when the
list of identifiers has changed, from backups, with its own rules for every storage type. It runs
once, before the first step; between two steps it has to be less, and the device may be busy.

So a pair is one more identifier at the end of that list. A flip changes its entries and then merges
the flipped parameters again, from the host's backups and with its own function. The entries
therefore always say what is merged; if a flip fails half-way, a full refresh without us puts
everything right.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from backend import memory_management, utils
from backend.args import dynamic_args
from backend.patcher import lora as host_lora

from ..errors import KLoraError
from .engine import WITHOUT_LORAS, Engine, EngineFusion, module_of, numbers, synchronized


@dataclass(eq=False)
class _Fusion(EngineFusion):
    entries: dict[str, list[list]] = field(default_factory=dict)
    """What the host sees under ``identifier``: the winners' entries. Changed in place, so that
    every clone of the patcher sees it."""
    identifier: tuple[str, float, float, bool] | None = None
    """Ours in ``lora_patches``; the last item is ``is_online``. None: to begin anew."""
    unet: Callable[[], Any] = lambda: None
    """Weak reference to the patcher with us, which knows the one without: reused while that one is
    current, because the host reloads a patcher unless it loaded it last. Weak, because it holds
    the model, which must go when the checkpoint changes."""

    @property
    def is_online(self) -> bool:
        """Whether the host adds the entries at every forward instead of merging them."""
        return self.identifier is not None and self.identifier[3]

    def lists_for(self, key: str) -> list[list]:
        """``entries_for``, in lists: the host moves their tensors in place."""
        return [list(entry) for entry in self.entries_for(key)]


class LoraLoaderEngine(Engine):
    """The Host protocol where a ``LoraLoader`` rewrites the weights."""

    make_fusion = _Fusion

    def __init__(self, memory: Any) -> None:
        super().__init__(memory)
        self._last: Callable[[], _Fusion | None] = lambda: None
        """Weak reference to the fusion that was attached last."""

    @staticmethod
    def entries_in(patcher: Any) -> Mapping[str, list[list]]:
        entries: dict[str, list[list]] = {}
        for patches in patcher.lora_patches.values():
            for key, found in patches.items():
                entries.setdefault(key, []).extend(found)
        return entries

    def begin(self, fusion: _Fusion, clean: Any, choice: np.ndarray) -> None:
        last, self._last = self._last(), weakref.ref(fusion)
        if last is not None and last is not fusion and last.is_online:
            last.identifier = None
            last.entries = {}  # the host has moved their tensors to the device: they are copies now
        if fusion.identifier is None or fusion.is_online != self._adds_online():
            # Never seen by the host under this name, so that it merges everything.
            fusion.identifier = (f"K-LoRA {next(numbers)}", 1.0, 1.0, self._adds_online())
            fusion.choice, fusion.unet = choice, lambda: None
            fusion.entries = {key: fusion.lists_for(key) for key in fusion.contributions}

    def patched_unet(self, fusion: _Fusion, clean: Any) -> Any:
        patched = fusion.unet()
        if patched is None or patched.klora_clean is not clean:
            patched = clean.clone()
            patched.klora_clean = clean
            patched.lora_patches[fusion.identifier] = fusion.entries
            fusion.unet = weakref.ref(patched)
        if fusion.is_online:
            self.preserve_memory(patched, clean, fusion)
        return patched

    def patched_clip(self, fusion: _Fusion, clean: Any) -> Any:
        patched = clean.clone()
        for name, patches, strength in fusion.text_encoder:
            patched.add_patches(
                filename=name,
                patches=patches,
                strength_patch=strength,
                online_mode=fusion.is_online,
            )
        return patched

    def settle(self, fusion: _Fusion) -> None:
        """Puts ours last again. LoRA Block Weight gives the identifiers of the ``<lora:>`` tags new
        names, which moves them behind ours, and later takes the first ones for theirs."""
        patched = self.engine().forge_objects_after_applying_lora
        if getattr(patched, "klora_fusion", None) is fusion:
            patches = patched.unet.lora_patches
            patches[fusion.identifier] = patches.pop(fusion.identifier, fusion.entries)

    def select(self, fusion: _Fusion, choice: np.ndarray) -> None:
        patcher = self.loaded_patcher()
        if patcher.lora_loader.loaded_hash != str(list(patcher.lora_patches)) or (
            fusion.identifier not in patcher.lora_patches
        ):
            raise KLoraError(WITHOUT_LORAS)
        keys = fusion.flip(choice)
        if not keys:
            return
        for key in keys:
            fusion.entries[key] = fusion.lists_for(key)
        with synchronized(patcher.load_device):
            if fusion.is_online:
                for key in keys:
                    utils.nested_move_to_device(
                        fusion.entries[key],
                        device=patcher.current_device,
                        dtype=patcher.model.computation_dtype,
                    )
            _merge(patcher, keys, fusion.modules)

    def withdraw(self, fusion: _Fusion, patched: Any) -> None:
        fusion.entries.clear()  # every clone has the same dictionary
        sampled = self.loaded_patcher()
        with synchronized(sampled.load_device):
            sampled.lora_loader.refresh(
                sampled.lora_patches, offload_device=sampled.offload_device, force_refresh=True
            )

    def recover(self) -> None:
        """``refresh`` sets the record of what is merged at its end, and compares it first."""
        for patcher in self.patchers():
            patcher.lora_loader.loaded_hash = "K-LoRA: to be applied again"

    def _adds_online(self) -> bool:
        """Whether the host adds LoRAs at every forward instead of merging (load_networks)."""
        storage = self.engine().forge_objects.unet.model.storage_dtype
        merged = (torch.float32, torch.float16, torch.bfloat16)
        return bool(dynamic_args.get("online_lora", False)) and storage not in merged


# -- merging between steps -------------------------------------------------------------------------


def _merge(patcher: Any, keys: Iterable[str], modules: dict[str, weakref.ref]) -> None:
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
                module, name = module_of(patcher.model, key, modules), key.rpartition(".")[2]
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
