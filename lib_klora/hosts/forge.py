"""Forge: extensions-builtin/sd_forge_lora/networks.py, backend/patcher/lora.py.

The host keeps, per patcher, ``lora_patches``: identifier → parameter key → entries
``[strength, (type, tensors), strength_model, offset, function]``. ``LoraLoader.refresh`` merges all
of them into the weights when the list of identifiers has changed, from backups, with its own rules
for every storage type. It runs once, before the first step.

So a pair is one more identifier at the end of that list, whose entries are those of the present
winners, which may be both. A flip changes the entries and then merges the flipped parameters anew,
from the host's backups and with its own function; what is not a plain tensor (GGUF, bitsandbytes)
goes through ``refresh``, reduced to those parameters. The entries therefore always say what is
merged; if a flip fails half-way, a full refresh without us puts everything right.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from backend import memory_management, utils
from backend.args import dynamic_args
from backend.patcher import lora as host_lora
from backend.patcher.base import ModelPatcher
from modules import sd_models

from ..errors import KLoraError
from ..layer_names import common_name
from ..methods import BITS
from ..pair import Pair
from ..tag import TagPair
from ..tensor_file import TensorFile, read_safetensors
from .common import CommonHost
from .protocol import HostLora, OnDisk

_UNET = "diffusion_model."
_MOST_UNMATCHED = 12
"""The host drops a file with more unmatched keys (load_lora_for_models)."""
_numbers = itertools.count(1)

_Where = Any
"""What ``load_lora`` calls a place in the model: parameter key, or (key, offset[, function])."""
_Patches = Mapping[_Where, Any]
"""What it makes: the place → (type, tensors)."""


@dataclass(eq=False)
class _Parts:
    number: int
    """Stands for this reading of this file in the host's identifiers."""
    text_encoder: _Patches
    unet: _Patches
    places: dict[str, tuple[_Where, ...]] = field(default_factory=dict)
    """Common layer name → the places of its weight and bias."""


@dataclass(eq=False)
class _Fusion:
    sides: Mapping[str, tuple[_Parts, float]]
    """Role, in the order of the tags → its file and strength."""
    pair: Pair
    summands: Mapping[str, Sequence[tuple[int | None, str, _Where]]]
    """Parameter key → what may be added to it, in order: (which paired layer, None for a layer of
    one file, which is added in every step; role; place). Several paired layers only for a fused
    parameter in parts."""
    text_encoder: tuple[tuple[str, _Patches, float], ...]
    """(file name for the host, patches, strength) in the order of the tags."""
    entries: dict[str, list[list]] = field(default_factory=dict)
    """What the host sees under ``identifier``: the winners' entries. Changed in place, so that
    every clone of the patcher sees it."""
    choice: np.ndarray | None = None
    """What ``entries`` holds."""
    identifier: tuple[str, float, float, bool] | None = None
    """Ours in ``lora_patches``; the last item: added at every forward instead of merged."""
    owners: dict[str, weakref.ref] = field(default_factory=dict)
    """Parameter key → its module. Looking it up from the model's root for each flip, through cold
    memory, would take a third of the flip's time."""
    unet: Callable[[], Any] = lambda: None
    """Weak reference to the patcher with us, which knows the one without: reused while that one is
    current, because the host reloads a patcher unless it loaded it last. Weak, because it holds
    the model, which must go when the checkpoint changes."""


class _Part:
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


class Forge(CommonHost):
    """The Host protocol for Forge."""

    name = "Forge"

    def __init__(self) -> None:
        """Raises ImportError in a fork of Forge that applies LoRAs in another way."""
        super().__init__()
        if not (hasattr(ModelPatcher, "refresh_loras") and isinstance(dynamic_args, dict)):
            raise ImportError("its patcher is not the one that K-LoRA knows")

    def model(self) -> object:
        return self._engine().forge_objects_original.unet.model

    def prepare_model(self) -> None:
        sd_models.forge_model_reload()

    def device(self) -> torch.device:
        return memory_management.get_torch_device()

    def read(self, on_disk: OnDisk) -> TensorFile:
        if not on_disk.path.lower().endswith(".safetensors"):
            # The host's own loader for these renames a file that fails (modules_forge/patch_basic).
            raise KLoraError(
                f"“{on_disk.name}” is not a .safetensors file: K-LoRA does not open other formats "
                f"on Forge, convert it or choose another file."
            )
        return read_safetensors(on_disk.path)

    def load(self, on_disk: OnDisk, tensors: TensorFile) -> HostLora:
        objects = self._engine().forge_objects_original
        model = objects.unet.model
        # An empty dict each time: the functions' default is shared and keeps other models' keys.
        known = host_lora.model_lora_keys_unet(model, {})
        unet, rest = host_lora.load_lora(tensors.read_all(), known)
        known = host_lora.model_lora_keys_clip(objects.clip.cond_stage_model, {})
        text_encoder, rest = host_lora.load_lora(rest, known)
        if len(rest) > _MOST_UNMATCHED:
            raise KLoraError(
                f"“{on_disk.name}” does not fit this model: Forge cannot place {len(rest)} of its "
                f"{len(tensors)} tensors (such as {next(iter(rest))}) and drops the whole file. "
                f"It was made for another model, or its spelling is one that Forge does not read."
            )
        parameters = dict(model.named_parameters())
        parts = _Parts(next(_numbers), text_encoder, unet)
        shapes: dict[str, tuple[int, ...]] = {}
        for where in unet:
            key, offset, _ = _place(where)
            if key not in parameters:
                continue
            name = _layer_name(key, offset)
            parts.places[name] = (*parts.places.get(name, ()), where)
            if not key.endswith(".bias"):
                shapes[name] = _shape(parameters[key], offset)
        return HostLora(on_disk, shapes, parts)

    def fuse(self, tags: TagPair, loras: Mapping[str, HostLora], pair: Pair, te: bool) -> _Fusion:
        sides = {tag.role: (loras[tag.role].parts, tag.unet) for tag in tags.in_order()}
        summands: dict[str, list[tuple[int | None, str, _Where]]] = {}

        def add(i: int | None, role: str, name: str) -> None:
            for where in sides[role][0].places[name]:
                summands.setdefault(_place(where)[0], []).append((i, role, where))

        for name, role in pair.unpaired.items():
            add(None, role, name)
        for i, layer in enumerate(pair.paired):
            for role in sides:
                for name in _names_in(getattr(layer, role)):
                    add(i, role, name)
        return _Fusion(
            sides,
            pair,
            summands,
            text_encoder=tuple(
                (f"K-LoRA {parts.number} {tag.role}", parts.text_encoder, tag.te)
                for tag in tags.in_order()
                if te and (parts := sides[tag.role][0]).text_encoder
            ),
        )

    def attach(self, fusion: _Fusion, choice: np.ndarray) -> None:
        self.detach()
        if fusion.identifier is None or fusion.identifier[3] != self._online():
            # Never seen by the host under this name, so that it merges everything.
            fusion.identifier = (f"K-LoRA {next(_numbers)}", 1.0, 1.0, self._online())
            fusion.choice = None
            fusion.unet = lambda: None
        if fusion.choice is None:
            fusion.choice = choice
            for key in fusion.summands:
                fusion.entries[key] = self._entries(fusion, key)
        engine = self._engine()
        clean = engine.forge_objects_after_applying_lora
        patched = self._patch(clean, fusion)
        # As load_networks does: the refiner takes forge_objects, everything else a copy of the
        # other (processing.py:957, 1373, 1518, 1851; sd_samplers_common.py, apply_refiner).
        engine.forge_objects_after_applying_lora = patched
        engine.forge_objects.unet, engine.forge_objects.clip = patched.unet, patched.clip

    def select(self, fusion: _Fusion, choice: np.ndarray) -> None:
        patcher = self._sampled()
        if patcher.lora_loader.loaded_hash != str(list(patcher.lora_patches)) or (
            fusion.identifier not in patcher.lora_patches
        ):
            raise KLoraError(
                "The picture is made without K-LoRA, because another extension samples with a "
                "model of its own that has no LoRAs: switch that extension off."
            )
        flipped = np.flatnonzero(fusion.choice != choice)
        if not len(flipped):
            return
        keys = {
            _place(where)[0]
            for i in flipped
            for role, (parts, _) in fusion.sides.items()
            for name in _names_in(getattr(fusion.pair.paired[i], role))
            for where in parts.places[name]
        }
        fusion.choice = choice
        for key in keys:
            fusion.entries[key] = self._entries(fusion, key)
        with _at_rest(patcher.load_device):
            if fusion.identifier[3]:
                for key in keys:
                    utils.nested_move_to_device(
                        fusion.entries[key],
                        device=patcher.current_device,
                        dtype=patcher.model.computation_dtype,
                    )
            _merge(patcher, keys, fusion.owners)

    def check(self, fusion: _Fusion) -> None:
        """Nothing: what the host cannot merge it leaves out with a line in its log, or raises."""

    def detach(self) -> None:
        engine = self._engine()
        patched = getattr(engine, "forge_objects_after_applying_lora", None)
        clean = getattr(patched, "klora_clean", None)
        if clean is None:
            return
        engine.forge_objects_after_applying_lora = clean
        for part in ("unet", "clip"):
            if getattr(engine.forge_objects, part) is getattr(patched, part):
                setattr(engine.forge_objects, part, getattr(clean, part))

    def abandon(self) -> None:
        """The host samples on with the patcher that it has, or with another clone of it: what is
        merged there must go now, and all that others have added to it stay."""
        patched = self._engine().forge_objects_after_applying_lora
        self.detach()
        clean = getattr(patched, "klora_clean", None)
        if clean is None:
            return
        for identifier in patched.unet.lora_patches.keys() - clean.unet.lora_patches.keys():
            patched.unet.lora_patches[identifier].clear()  # every clone has the same dictionary
        sampled = self._sampled()
        with _at_rest(sampled.load_device):
            sampled.lora_loader.refresh(
                sampled.lora_patches, offload_device=sampled.offload_device, force_refresh=True
            )

    def recover(self) -> None:
        """``refresh`` sets the record of what is merged at its end, and compares it first."""
        objects = getattr(self._engine(), "forge_objects_original", None)
        for patcher in (objects.unet, objects.clip.patcher) if objects else ():
            patcher.lora_loader.loaded_hash = "K-LoRA: to be applied again"

    def _patch(self, clean: Any, fusion: _Fusion) -> Any:
        """The host's objects with the fusion, as clones; ``clean`` stays as it is."""
        patched = clean.shallow_copy()
        patched.klora_clean = clean
        patched.unet = fusion.unet()
        if patched.unet is None or patched.unet.klora_clean is not clean.unet:
            patched.unet = clean.unet.clone()
            patched.unet.klora_clean = clean.unet
            patched.unet.lora_patches[fusion.identifier] = fusion.entries
            fusion.unet = weakref.ref(patched.unet)
        if fusion.text_encoder:
            patched.clip = clean.clip.clone()
            for name, patches, strength in fusion.text_encoder:
                patched.clip.add_patches(
                    filename=name,
                    patches=patches,
                    strength_patch=strength,
                    online_mode=fusion.identifier[3],
                )
        return patched

    def _entries(self, fusion: _Fusion, key: str) -> list[list]:
        """The entries of the present winners for one parameter."""
        entries = []
        for i, role, where in fusion.summands[key]:
            if i is None or fusion.choice[i] & BITS[role]:
                parts, strength = fusion.sides[role]
                _, offset, function = _place(where)
                entries.append([strength, parts.unet[where], 1.0, offset, function])
        return entries

    def _engine(self) -> Any:
        return sd_models.model_data.get_sd_model()

    def _sampled(self) -> Any:
        """The patcher whose LoRAs the host has merged: the one that it has loaded. An extension may
        have several clones of it loaded in turn (Fooocus inpaint does in a part of the steps)."""
        patcher = self._engine().forge_objects.unet
        loaded = (entry.model for entry in memory_management.current_loaded_models)
        return next((other for other in loaded if other.is_clone(patcher)), patcher)

    def _online(self) -> bool:
        """Whether the host adds LoRAs at every forward instead of merging (load_networks)."""
        storage = self._engine().forge_objects.unet.model.storage_dtype
        merged = (torch.float32, torch.float16, torch.bfloat16)
        return bool(dynamic_args.get("online_lora", False)) and storage not in merged


@contextmanager
def _at_rest(device: torch.device) -> Iterator[None]:
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


def _merge(patcher: Any, keys: Iterable[str], owners: dict[str, weakref.ref]) -> None:
    """Merges what the patcher's entries say now into the weights of ``keys``.

    ``refresh`` would put a new tensor in a weight's place each time, which fragments memory, and
    carry the backup to the device and back. So a merged weight is overwritten in place.
    """
    backups = patcher.lora_loader.backup
    remaining = set(keys)
    try:
        with torch.inference_mode():
            for key in keys:
                owner, name = _owner(patcher.model, key, owners), key.rpartition(".")[2]
                weight, backup = getattr(owner, name), backups.get(key)
                if not _is_merged(weight, backup):
                    continue
                entries = [
                    entry
                    for patches in patcher.lora_patches.values()
                    for entry in patches.get(key, ())
                ]
                weight.copy_(host_lora.merge_lora_to_weight(entries, backup.to(weight.device), key))
                # A parameter of its own on the same memory, because that is how one sees that a
                # weight was written: torch does not count it for what inference mode has made.
                setattr(owner, name, torch.nn.Parameter(weight, requires_grad=False))
                remaining.remove(key)
    except memory_management.OOM_EXCEPTION:
        pass  # refresh makes room
    if remaining:
        _refresh_part(patcher, remaining)


def _owner(model: Any, key: str, known: dict[str, weakref.ref]) -> Any:
    """The module of a parameter; ``known`` as in ``_Fusion.owners``, completed here."""
    owner = known[key]() if key in known else None
    if owner is None:
        owner, _, _ = utils.get_attr_with_parent(model, key)
        known[key] = weakref.ref(owner)
    return owner


def _is_merged(weight: torch.Tensor, backup: torch.Tensor | None) -> bool:
    """Whether the weight is a plain tensor that the host has made by merging: of its own, and with
    a backup (none where the host adds LoRAs at every forward)."""
    plain = type(weight) is torch.nn.Parameter  # quantised ones are subclasses of it
    return plain and backup is not None and weight.data_ptr() != backup.data_ptr()


def _refresh_part(patcher: Any, keys: Iterable[str]) -> None:
    """The host's own refresh, over ``keys`` alone: restore from backup, merge what the patcher's
    entries say now."""
    loader, model = patcher.lora_loader, _Part(patcher.model, keys)
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


def _names_in(layer: Any) -> list[str]:
    return [part.name for part in getattr(layer, "parts", (layer,))]


def _place(where: _Where) -> tuple[str, Any, Any]:
    """(parameter key, offset, function), as ``ModelPatcher.add_patches`` reads it."""
    return (where, None, None) if isinstance(where, str) else (*where, None, None)[:3]


def _layer_name(key: str, offset: tuple[int, int, int] | None) -> str:
    """The common name of a parameter, or of the part of it at ``offset`` (dim, start, length)."""
    name = common_name(key.removeprefix(_UNET).rpartition(".")[0])
    if offset is None:
        return name
    _, start, length = offset
    return f"{name}/{ {0: 'q', length: 'k', 2 * length: 'v'}.get(start, 'mlp') }"


def _shape(parameter: torch.Tensor, offset: tuple[int, int, int] | None) -> tuple[int, ...]:
    # A bitsandbytes weight is packed and keeps its true shape beside it; GGUF's reports it.
    shape = tuple(getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape))
    return shape if offset is None else (offset[2], *shape[1:])
