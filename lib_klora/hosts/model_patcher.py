"""Weights by ComfyUI's ``ModelPatcher``, as Forge Neo (from July 2026 on) and reForge have it
(backend/patcher/base.py, ldm_patched/modules/model_patcher.py).

A patcher has ``patches[key]``, the entries of each parameter, and ``patches_uuid``, which is new
whenever they are. Before the first step the host compares it with the one that the model was loaded
with (``partially_load``); where they differ it puts every weight back from ``backup`` and loads the
model anew. A parameter of a layer that is loaded whole is merged then (``patch_weight_to_device``).
One of a layer that stays off the device, or whose LoRAs are to be added online, gets a function
that the layer calls in every forward, and which looks its entries up each time (``LowVramPatch``).

So a flip changes the entries, in every patcher that the host may ask, under the same uuid. Where
the layer has that function there is nothing more to do; else the weight is put back from the backup
and merged by the host's own method. The entries always say what is merged; if a flip fails
half-way, an unknown uuid makes the host begin from its backups.
"""

from __future__ import annotations

import inspect
import itertools
import operator
import uuid
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import torch

from ..errors import KLoraError, is_full_memory
from .engine import WITHOUT_LORAS, Engine, EngineFusion, Entry, module_of, synchronized

_METHODS = ("add_patches", "clone", "is_clone", "partially_load", "patch_weight_to_device")
_ATTRIBUTES = ("patches", "patches_uuid", "backup")
_ARGUMENTS = ("device_to", "inplace_update")
"""Of ``patch_weight_to_device``."""
_NOTHING = (0.0, ("diff", (torch.empty(0),)), 1.0, None, None, True)
"""An entry that adds nothing, online: a parameter without one would get no function."""


@dataclass(eq=False)
class _Fusion(EngineFusion):
    is_online: bool = False
    """Whether the host adds the entries at every forward instead of merging them."""
    present: uuid.UUID | None = None
    """Stands for ``choice`` in the host."""
    clean: uuid.UUID | None = None
    """Stands for the entries of others that ``present`` goes with."""
    others: dict[str, int] = field(default_factory=dict)
    """Parameter key → how many of these there are; ours stand behind them."""
    texts: dict[tuple, uuid.UUID] = field(default_factory=dict)
    """(``clean`` of the text encoder, whether online) → what stands for it with our entries, which
    do not change."""
    flipped: tuple[weakref.ref, uuid.UUID] | None = None
    """The patcher that the last flip was made in, and its uuid then."""

    def others_in(self, patcher: Any, key: str) -> list[Entry]:
        """A patcher's entries for a parameter that are not ours."""
        ours = [_NOTHING, *(contribution.entry for contribution in self.contributions[key])]
        entries = patcher.patches.get(key, ())
        return [entry for entry in entries if not any(entry is one for one in ours)]

    def list_for(self, patcher: Any, key: str) -> list[Entry]:
        """What a patcher is to have for a parameter: also what others have added after us."""
        others, count = self.others_in(patcher, key), self.others[key]
        return [*others[:count], *self.entries_for(key), *others[count:]]

    def is_in(self, patcher: Any) -> bool:
        """Whether a patcher has any of our entries."""
        return any(
            entry is one
            for key, contributions in self.contributions.items()
            for _, _, one in contributions
            for entry in patcher.patches.get(key, ())
        )


class ModelPatcherEngine(Engine):
    """The Host protocol where ComfyUI's ``ModelPatcher`` rewrites the weights."""

    make_fusion = _Fusion

    @staticmethod
    def entries_in(patcher: Any) -> Mapping[str, list[Entry]]:
        return patcher.patches

    def begin(self, fusion: _Fusion, clean: Any, choice: np.ndarray) -> None:
        patcher = clean.unet
        online = _adds_online(patcher)
        is_held = patcher.model.current_weight_patches_uuid == fusion.present is not None
        if is_held and (fusion.clean, fusion.is_online) == (patcher.patches_uuid, online):
            return
        fusion.choice = choice
        fusion.present, fusion.clean = uuid.uuid4(), patcher.patches_uuid
        fusion.others = {key: len(patcher.patches.get(key, ())) for key in fusion.contributions}
        if fusion.is_online != online:
            fusion.is_online = online
            fusion.contributions = {
                key: [one._replace(entry=(*one.entry[:-1], online)) for one in contributions]
                for key, contributions in fusion.contributions.items()
            }

    def patched_unet(self, fusion: _Fusion, clean: Any) -> Any:
        patched = clean.clone()
        for key in fusion.contributions:
            entries = fusion.list_for(patched, key)
            patched.patches[key] = entries or [_NOTHING] * fusion.is_online
        patched.patches_uuid = fusion.present
        if fusion.is_online:
            self.preserve_memory(patched, clean, fusion)
        return patched

    def patched_clip(self, fusion: _Fusion, clean: Any) -> Any:
        patched = clean.clone()
        how = {"online_mode": True} if fusion.is_online else {}
        for _, patches, strength in fusion.text_encoder:
            patched.patcher.add_patches(patches, strength, **how)
        key = clean.patcher.patches_uuid, fusion.is_online
        patched.patcher.patches_uuid = fusion.texts.setdefault(key, patched.patcher.patches_uuid)
        return patched

    def select(self, fusion: _Fusion, choice: np.ndarray) -> None:
        patcher = self.loaded_patcher()
        state = patcher.patches_uuid
        if state != patcher.model.current_weight_patches_uuid or not fusion.is_in(patcher):
            raise KLoraError(WITHOUT_LORAS)
        keys = fusion.flip(choice)
        if fusion.flipped is None or (fusion.flipped[0](), fusion.flipped[1]) != (patcher, state):
            # A pass begins, or an extension's clone was loaded, which may hold an earlier choice.
            _check_places(patcher, fusion)
            keys = {
                key
                for key in fusion.contributions
                if not _are_same(patcher.patches[key], fusion.list_for(patcher, key))
            }
            fusion.flipped = weakref.ref(patcher), state
        if keys:
            for holder in self._holders(state):
                for key in keys:
                    holder.patches[key] = fusion.list_for(holder, key)
            self._rewrite(patcher, keys, fusion)

    def withdraw(self, fusion: _Fusion, patched: Any) -> None:
        patcher = self.loaded_patcher()
        for holder in (*self._holders(patcher.patches_uuid), patched.unet):
            for key in fusion.contributions:
                holder.patches[key] = fusion.others_in(holder, key)
        try:
            self._rewrite(patcher, fusion.contributions, fusion)
        except BaseException:
            _forget_what_is_merged(patcher)
            raise

    def recover(self) -> None:
        for patcher in self.patchers():
            _forget_what_is_merged(patcher)

    def _holders(self, state: uuid.UUID) -> list[Any]:
        """The patchers whose entries are those that the model was loaded with: the host may ask any
        of them when it moves layers between devices, or prepares the next pass."""
        engine = self.engine()
        asked = {
            id(patcher): patcher
            for patcher in (
                self.loaded_patcher(),
                engine.forge_objects.unet,
                engine.forge_objects_after_applying_lora.unet,
            )
        }
        return [patcher for patcher in asked.values() if patcher.patches_uuid == state]

    def _rewrite(self, patcher: Any, keys: Iterable[str], fusion: _Fusion) -> None:
        """Lets the weights of the model be what the patcher's entries for ``keys`` say now."""
        with synchronized(patcher.load_device), torch.inference_mode():
            for key in keys:
                module = module_of(patcher.model, key, fusion.modules)
                functions = _functions_for(module, key)
                for function in functions:
                    # Of the clone that was loaded first, when this layer got its function.
                    function.patches[key] = list(patcher.patches[key])
                    getattr(function, "clear_prepared", lambda: None)()  # later ComfyUIs'
                if not functions:
                    self._merge(patcher, key, module)

    def _merge(self, patcher: Any, key: str, module: Any) -> None:
        """Merges a parameter anew from its backup, by the host's own method.

        That puts a new tensor in the weight's place, which fragments memory; a plain one is
        overwritten in place.
        """
        name = key.rpartition(".")[2]
        weight, backup = getattr(module, name), patcher.backup[key].weight
        if _can_be_overwritten(module, name, backup):
            try:
                weight.data.copy_(backup)
                if patcher.patches[key]:
                    patcher.patch_weight_to_device(
                        key, device_to=patcher.load_device, inplace_update=True
                    )
            except RuntimeError as error:  # another shape, or memory is full
                if is_full_memory(error):
                    self.memory.soft_empty_cache()
            else:
                # A parameter of its own on the same memory, because that is how one sees that a
                # weight was written: torch does not count it for what inference mode has made.
                setattr(module, name, torch.nn.Parameter(weight.data, requires_grad=False))
                return
        # As in unpatch_model.
        if patcher.backup[key].inplace_update:
            weight.data.copy_(backup)
        else:
            setattr(module, name, torch.nn.Parameter(backup, requires_grad=False))
        if patcher.patches[key]:
            patcher.patch_weight_to_device(key, device_to=patcher.load_device)


def missing_in(patcher: type) -> list[str]:
    """What a host's ``ModelPatcher`` would need for this and does not have; empty if all is
    there."""
    missing = [name for name in _METHODS if not hasattr(patcher, name)]
    set_there = patcher.__init__.__code__.co_names
    missing += [name for name in _ATTRIBUTES if name not in set_there]
    if "patch_weight_to_device" not in missing:
        accepted = inspect.signature(patcher.patch_weight_to_device).parameters
        missing += [name for name in _ARGUMENTS if name not in accepted]
    return missing


def _adds_online(patcher: Any) -> bool:
    """Whether the host adds LoRAs at every forward instead of merging them: Forge Neo, on request
    and for GGUF (load_networks). Its entries say so themselves, at their end."""
    if "online_mode" not in inspect.signature(patcher.add_patches).parameters:
        return False
    return bool(import_module("backend.args").dynamic_args.online_lora)


def _forget_what_is_merged(patcher: Any) -> None:
    """The host puts all weights back from its backups before it loads whatever comes next."""
    if patcher.model.current_weight_patches_uuid is not None:
        patcher.model.current_weight_patches_uuid = uuid.uuid4()


def _are_same(entries: Sequence[Entry], others: Sequence[Entry]) -> bool:
    """Whether two lists hold the very same entries; comparing them would compare tensors."""
    return len(entries) == len(others) and all(map(operator.is_, entries, others))


def _functions_for(module: Any, key: str) -> list[Any]:
    """What a layer that is not loaded whole, or whose LoRAs are added online, calls in its forward
    for a parameter (``LowVramPatch``)."""
    functions = (getattr(module, f"{name}_function", ()) for name in ("weight", "bias"))
    return [
        function
        for function in itertools.chain.from_iterable(functions)
        if getattr(function, "key", None) == key and hasattr(function, "patches")
    ]


def _check_places(patcher: Any, fusion: _Fusion) -> None:
    """Raises KLoraError if the host has a parameter neither merged nor given to its layer: then it
    loads models in a way that is not known here, and the picture would be silently wrong."""
    for key in fusion.contributions:
        if key not in patcher.backup:
            module = module_of(patcher.model, key, fusion.modules)
            if not _functions_for(module, key):
                raise KLoraError(
                    f"This WebUI loads models in a way that K-LoRA does not know (nothing is "
                    f"applied to {key}), so the picture is made without it: please report this, "
                    f"with the WebUI's version."
                )


def _can_be_overwritten(module: Any, name: str, backup: torch.Tensor) -> bool:
    """Whether a parameter is a plain tensor of its own, and no layer packs or unpacks it."""
    weight = getattr(module, name)
    return (
        type(weight) is torch.nn.Parameter
        and type(weight.data) is torch.Tensor
        and not hasattr(module, f"set_{name}")
        and weight.shape == backup.shape
        and weight.dtype == backup.dtype
        and weight.data_ptr() != backup.data_ptr()
    )
