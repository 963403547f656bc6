"""Weights by ComfyUI's ``ModelPatcher``, as Forge Neo (from July 2026 on) and reForge have it
(backend/patcher/base.py, ldm_patched/modules/model_patcher.py).

A patcher has ``patches[key]``, the entries of each parameter, and ``patches_uuid``, which is new
whenever they are. Before the first step the host compares it with the one that the model was loaded
with (``partially_load``); where they differ it puts every weight back from ``backup`` and loads the
model anew. A parameter of a layer that is loaded whole is merged then (``patch_weight_to_device``).
One of a layer that stays off the device, or whose LoRAs are to be added online, gets a function
that the layer calls in every forward, and which looks its entries up each time (``LowVramPatch``).

So a flip changes the entries, in every clone of the patcher, under the same uuid. Where
the layer has that function there is nothing more to do; else the weight is put back from the backup
and merged by the host's own method. The entries always say what is merged; if a flip fails
half-way, an unknown uuid makes the host begin from its backups.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ..errors import KLoraError, is_full_memory
from .engine import WITHOUT_LORAS, Engine, EngineFusion, Entry, module_of, synchronized

_METHODS = ("add_patches", "clone", "is_clone", "partially_load", "patch_weight_to_device")
_ATTRIBUTES = ("patches", "patches_uuid", "backup")
_ARGUMENTS = ("device_to",)
"""Of ``patch_weight_to_device``."""
_NOTHING = (0.0, ("diff", (torch.empty(0),)), 1.0, None, None, True)
"""An entry that adds nothing, online: a parameter without one would get no function."""


class _Entries(list):
    """The entries of one parameter in a patcher, ours among them.

    Clones copy it, the host's and extensions', and any of them may be loaded at any time: so each
    copy is noted, and a flip changes all of them.
    """

    def __init__(self, fusion: _Fusion, key: str, entries: Iterable[Entry]) -> None:
        super().__init__(entries)
        self._fusion, self._key = fusion, key
        self.present = fusion.present
        fusion.copies.setdefault(key, []).append(weakref.ref(self))

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if index != slice(None):
            return found
        copy = _Entries(self._fusion, self._key, found)
        copy.present = self.present
        return copy


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
    copies: dict[str, list[weakref.ref]] = field(default_factory=dict)
    """Parameter key → every list that has our entries for it."""
    checked: uuid.UUID | None = None
    """What the model was loaded with when ``_check_places`` looked at it."""

    @functools.cached_property
    def patches(self) -> set[int]:
        """Identities of what our entries add, at whatever weight."""
        ours = {id(one.entry[1]) for key in self.contributions for one in self.contributions[key]}
        texts = {id(patch) for _, patches, _ in self.text_encoder for patch in patches.values()}
        return ours | texts | {id(_NOTHING[1])}

    def alive(self, key: str) -> list[_Entries]:
        """The lists that somebody still has; the others are forgotten."""
        lists = [copy for copy in (ref() for ref in self.copies.get(key, ())) if copy is not None]
        self.copies[key] = [weakref.ref(copy) for copy in lists]
        return lists

    def put(self, key: str, entries: Iterable[Entry] | None = None) -> None:
        """Gives all copies these entries of ours, or those of the present winners."""
        ours = {id(one.entry) for one in self.contributions[key]} | {id(_NOTHING)}
        new = self.own(key) if entries is None else entries
        for copy in self.alive(key):
            others, count = [entry for entry in copy if id(entry) not in ours], self.others[key]
            copy[:] = [*others[:count], *new, *others[count:]]  # others may have added some after

    def own(self, key: str) -> list[Entry]:
        """Ours for a parameter now."""
        return self.entries_for(key) or [_NOTHING] * self.is_online


class _Alone:
    """A patcher whose model is one parameter, for the host's own method: that looks a parameter up
    from the model's root, each step through torch's modules, and puts the merged one in its place,
    which is here."""

    weight_inplace_update = False

    def __init__(self, patcher: Any, key: str, weight: torch.Tensor) -> None:
        self._patcher, self.model = patcher, weight
        for name in reversed(key.split(".")):
            self.model = SimpleNamespace(**{name: self.model})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._patcher, name)


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
        fusion.copies = {}
        if fusion.is_online != online:
            fusion.is_online = online
            fusion.contributions = {
                key: [one._replace(entry=(*one.entry[:-1], online)) for one in contributions]
                for key, contributions in fusion.contributions.items()
            }

    def patched_unet(self, fusion: _Fusion, clean: Any) -> Any:
        patched = clean.clone()
        for key in fusion.contributions:
            entries = [*patched.patches.get(key, ()), *fusion.own(key)]
            fusion.alive(key)
            patched.patches[key] = _Entries(fusion, key, entries)
        patched.patches_uuid = fusion.present
        patched.klora_lists = dict(patched.patches)
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
        patched.patcher.klora_lists = dict(patched.patcher.patches)
        return patched

    def settle(self, fusion: _Fusion) -> None:
        """LoRA Block Weight puts lists of its own in the place of a patcher's: what it has left of
        others is what ours belong behind."""
        engine = self.engine()
        patched = engine.forge_objects_after_applying_lora
        if getattr(patched, "klora_fusion", None) is not fusion or not _is_changed(patched):
            return
        left = patched.shallow_copy()
        for part in ("unet", "clip"):
            setattr(left, part, getattr(patched, part).clone())
            patcher = getattr(getattr(left, part), "patcher", getattr(left, part))
            for key, entries in patcher.patches.items():
                patcher.patches[key] = [e for e in entries if id(e[1]) not in fusion.patches]
            patcher.patches_uuid = uuid.uuid4()
        self.begin(fusion, left, fusion.choice)
        before = patched.unet, patched.clip
        patched.unet = self.patched_unet(fusion, left.unet)
        patched.clip = self.patched_clip(fusion, left.clip)
        for part, old in zip(("unet", "clip"), before, strict=True):
            if getattr(engine.forge_objects, part) is old:
                setattr(engine.forge_objects, part, getattr(patched, part))
        if _is_clone_of(engine.forge_objects.unet, before[0]):  # an extension's, for this pass
            clone = engine.forge_objects.unet
            for key in fusion.contributions:
                others = [e for e in clone.patches.get(key, ()) if id(e[1]) not in fusion.patches]
                clone.patches[key] = _Entries(fusion, key, others)
                fusion.put(key)
            clone.patches_uuid = uuid.uuid4()

    def select(self, fusion: _Fusion, choice: np.ndarray) -> None:
        patcher = self.loaded_patcher()
        loaded_with = patcher.model.current_weight_patches_uuid
        if patcher.patches_uuid != loaded_with or not _is_in(fusion, patcher):
            raise KLoraError(WITHOUT_LORAS)
        if fusion.checked != loaded_with:
            _check_places(patcher, fusion)
            fusion.checked = loaded_with
        keys = fusion.flip(choice)
        if keys:
            for key in keys:
                fusion.put(key)
            self._rewrite(patcher, keys, fusion)

    def withdraw(self, fusion: _Fusion, patched: Any) -> None:
        patcher = self.loaded_patcher()
        for key in fusion.contributions:
            fusion.put(key, ())
            for holder in (patcher, patched.unet):
                entries = holder.patches.get(key)
                if entries and not isinstance(entries, _Entries):  # another extension's list
                    holder.patches[key] = [e for e in entries if id(e[1]) not in fusion.patches]
        try:
            self._rewrite(patcher, fusion.contributions, fusion)
        except BaseException:
            _forget_what_is_merged(patcher)
            raise

    def recover(self) -> None:
        for patcher in self.patchers():
            _forget_what_is_merged(patcher)

    def _rewrite(self, patcher: Any, keys: Iterable[str], fusion: _Fusion) -> None:
        """Lets the weights of the model be what the patcher's entries for ``keys`` say now."""
        with synchronized(patcher.load_device), torch.inference_mode(), _remembered_seeds(patcher):
            for key in keys:
                module = module_of(patcher.model, key, fusion.modules)
                functions = _functions_for(module, key)
                for function in functions:
                    getattr(function, "clear_prepared", lambda: None)()  # later ComfyUIs'
                if not functions and key in patcher.backup:
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
                merged = backup
                if patcher.patches.get(key):
                    here = backup.device == weight.device
                    alone = _Alone(patcher, key, backup if here else weight.data.copy_(backup))
                    type(patcher).patch_weight_to_device(alone, key, device_to=patcher.load_device)
                    merged = attrgetter(key)(alone.model)
                weight.data.copy_(merged)
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
        if patcher.patches.get(key):
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


@functools.cache
def _seeds(string_to_seed: Callable[[str], int]) -> Callable[[str], int]:
    return functools.cache(string_to_seed)


@contextmanager
def _remembered_seeds(patcher: Any) -> Iterator[None]:
    """Lets the host work out the seed of a parameter's rounding once: it does so letter by letter
    for every weight that it merges, which would take a third of a flip's time."""
    module = sys.modules[type(patcher).patch_weight_to_device.__module__]
    own = getattr(module, "string_to_seed", None)
    if own is None:
        yield
        return
    module.string_to_seed = _seeds(own)
    try:
        yield
    finally:
        module.string_to_seed = own


def _forget_what_is_merged(patcher: Any) -> None:
    """The host puts all weights back from its backups before it loads whatever comes next."""
    if patcher.model.current_weight_patches_uuid is not None:
        patcher.model.current_weight_patches_uuid = uuid.uuid4()


def _is_clone_of(patcher: Any, other: Any) -> bool:
    """Whether a patcher was made from another, by way of others or not."""
    while patcher is not None and patcher is not other:
        patcher = patcher.parent
    return patcher is other


def _is_changed(patched: Any) -> bool:
    """Whether another extension has put lists of its own into our clones."""
    return any(
        patcher.patches.get(key) is not entries
        for patcher in (patched.unet, patched.clip.patcher)
        for key, entries in getattr(patcher, "klora_lists", {}).items()
    )


def _is_in(fusion: _Fusion, patcher: Any) -> bool:
    """Whether a patcher is a clone of one with the fusion."""
    entries = patcher.patches.get(next(iter(fusion.contributions)))
    return getattr(entries, "present", None) == fusion.present


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
