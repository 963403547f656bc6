"""Forge: extensions-builtin/sd_forge_lora/networks.py, backend/patcher/lora.py.

The host keeps, per patcher, ``lora_patches``: identifier → parameter key → entries
``[strength, (type, tensors), strength_model, offset, function]``. ``LoraLoader.refresh`` merges all
of them into the weights when the list of identifiers has changed, from backups, with its own rules
for every storage type. It runs once, before the first step.

So a pair is one more identifier at the end of that list, whose entries are those of the present
winners, which may be both. A flip changes the entries and then merges the flipped parameters
again (``forge_merge``), from the host's backups and with its own function. The entries therefore
always say what is merged; if a flip fails half-way, a full refresh without us puts everything
right.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from backend import memory_management, utils
from backend.args import dynamic_args
from backend.patcher import lora as host_lora
from backend.patcher.base import ModelPatcher
from modules import sd_models, sd_samplers

from ..errors import KLoraError
from ..layer_names import common_name
from ..methods import BITS, BOTH
from ..pair import Pair
from ..tag import TagPair
from ..tensor_file import TensorFile, read_safetensors
from . import forge_merge
from .common import CommonHost
from .protocol import HostLora, OnDisk

_UNET = "diffusion_model."
_MOST_UNMATCHED = 12
"""The host drops a file with more unmatched keys (load_lora_for_models)."""
_numbers = itertools.count(1)

_PatchKey = Any
"""What ``load_lora`` calls a place in the model: parameter key, or (key, offset[, function])."""
_Patches = Mapping[_PatchKey, Any]
"""What it makes: the place → (type, tensors)."""


@dataclass(eq=False)
class _Parts:
    number: int
    """Stands for this reading of this file in the host's identifiers."""
    text_encoder: _Patches
    unet: _Patches
    patch_keys: dict[str, tuple[_PatchKey, ...]] = field(default_factory=dict)
    """Common layer name → those of its weight and bias."""


class _Contribution(NamedTuple):
    """What may be added to a parameter."""

    layer: int | None
    """Which paired layer; None for a layer of one file, which is added in every step."""
    bit: int
    """The role's of ``methods.BITS``."""
    entry: tuple
    """The host's."""


@dataclass(eq=False)
class _Fusion:
    contributions: Mapping[str, Sequence[_Contribution]]
    """Parameter key → what may be added to it, in the order of the tags. Several paired layers only
    for a fused parameter in parts."""
    keys_of: Sequence[tuple[str, ...]]
    """Per paired layer: its parameter keys."""
    text_encoder: tuple[tuple[str, _Patches, float], ...]
    """(file name for the host, patches, strength) in the order of the tags."""
    entries: dict[str, list[list]] = field(default_factory=dict)
    """What the host sees under ``identifier``: the winners' entries. Changed in place, so that
    every clone of the patcher sees it."""
    choice: np.ndarray | None = None
    """What ``entries`` holds."""
    identifier: tuple[str, float, float, bool] | None = None
    """Ours in ``lora_patches``; the last item is ``is_online``. None: to begin anew."""
    modules: forge_merge.Modules = field(default_factory=dict)
    unet: Callable[[], Any] = lambda: None
    """Weak reference to the patcher with us, which knows the one without: reused while that one is
    current, because the host reloads a patcher unless it loaded it last. Weak, because it holds
    the model, which must go when the checkpoint changes."""

    @property
    def is_online(self) -> bool:
        """Whether the host adds the entries at every forward instead of merging them."""
        return self.identifier is not None and self.identifier[3]

    def entries_for(self, key: str) -> list[list]:
        """The entries of the present winners for one parameter."""
        return [
            list(entry)  # the host moves its tensors in place
            for layer, bit, entry in self.contributions[key]
            if layer is None or self.choice[layer] & bit
        ]

    @cached_property
    def _elements(self) -> np.ndarray:
        """Numbers in each paired layer's entries, by what it gets; shape [layers, 4]."""
        elements = np.zeros((len(self.keys_of), BOTH + 1), np.int64)
        for contributions in self.contributions.values():
            for layer, bit, entry in contributions:
                if layer is not None:
                    elements[layer, [bit, BOTH]] += utils.nested_compute_size(entry, 1)
        return elements

    def most_growth(self) -> int:
        """How many numbers ``entries`` may have more once other layers have flipped."""
        now = self._elements[np.arange(len(self.choice)), self.choice]
        either = self._elements[:, list(BITS.values())].max(1, initial=0)
        return int((either - now).clip(0).sum())


class Forge(CommonHost):
    """The Host protocol for Forge."""

    name = "Forge"

    def __init__(self) -> None:
        """Raises ImportError in a fork of Forge that applies LoRAs in another way."""
        super().__init__()
        self._last: Callable[[], _Fusion | None] = lambda: None
        """Weak reference to the fusion that was attached last."""
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
        for patch_key in unet:
            key, offset, _ = _unpacked(patch_key)
            if key not in parameters:
                continue
            name = _layer_name(key, offset)
            parts.patch_keys[name] = (*parts.patch_keys.get(name, ()), patch_key)
            if not key.endswith(".bias"):
                shapes[name] = _shape(parameters[key], offset)
        return HostLora(on_disk, shapes, parts)

    def fuse(self, tags: TagPair, loras: Mapping[str, HostLora], pair: Pair, te: bool) -> _Fusion:
        sides = {tag.role: (loras[tag.role].parts, tag.unet) for tag in tags.in_order()}
        contributions: dict[str, list[_Contribution]] = {}

        def add(layer: int | None, role: str, names: Sequence[str]) -> set[str]:
            parts, strength = sides[role]
            keys = set()
            for patch_key in (key for name in names for key in parts.patch_keys[name]):
                key, offset, function = _unpacked(patch_key)
                entry = (strength, parts.unet[patch_key], 1.0, offset, function)
                contributions.setdefault(key, []).append(_Contribution(layer, BITS[role], entry))
                keys.add(key)
            return keys

        for name, role in pair.unpaired.items():
            add(None, role, [name])
        return _Fusion(
            contributions,
            keys_of=tuple(
                tuple({key for role in sides for key in add(i, role, _names_in(layer, role))})
                for i, layer in enumerate(pair.paired)
            ),
            text_encoder=tuple(
                (f"K-LoRA {parts.number} {tag.role}", parts.text_encoder, tag.te)
                for tag in tags.in_order()
                if te and (parts := sides[tag.role][0]).text_encoder
            ),
        )

    def follow(self, p: Any) -> None:
        """img2img makes its sampler once for all batches (processing.py, init). After a refiner the
        host loads the base model anew, and that sampler would go on with the old one, in which
        the first batch's last choice is merged."""
        model = getattr(getattr(p, "sampler", None), "model_wrap", None)
        if model is not None and model.inner_model is not self._engine():
            p.sampler = sd_samplers.create_sampler(p.sampler_name, self._engine())

    def attach(self, fusion: _Fusion, choice: np.ndarray) -> None:
        self.detach()
        last, self._last = self._last(), weakref.ref(fusion)
        if last is not None and last is not fusion and last.is_online:
            last.identifier = None
            last.entries = {}  # the host has moved their tensors to the device: they are copies now
        if fusion.identifier is None or fusion.is_online != self._adds_online():
            # Never seen by the host under this name, so that it merges everything.
            fusion.identifier = (f"K-LoRA {next(_numbers)}", 1.0, 1.0, self._adds_online())
            fusion.choice, fusion.unet = choice, lambda: None
            fusion.entries = {key: fusion.entries_for(key) for key in fusion.contributions}
        engine = self._engine()
        clean = engine.forge_objects_after_applying_lora
        patched = self._patch(clean, fusion)
        # As load_networks does: the refiner takes forge_objects, everything else a copy of the
        # other (processing.py:957, 1373, 1518, 1851; sd_samplers_common.py, apply_refiner).
        engine.forge_objects_after_applying_lora = patched
        engine.forge_objects.unet, engine.forge_objects.clip = patched.unet, patched.clip

    def select(self, fusion: _Fusion, choice: np.ndarray) -> None:
        patcher = self._loaded_patcher()
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
        keys = {key for i in flipped for key in fusion.keys_of[i]}
        fusion.choice = choice
        for key in keys:
            fusion.entries[key] = fusion.entries_for(key)
        with forge_merge.synchronized(patcher.load_device):
            if fusion.is_online:
                for key in keys:
                    utils.nested_move_to_device(
                        fusion.entries[key],
                        device=patcher.current_device,
                        dtype=patcher.model.computation_dtype,
                    )
            forge_merge.merge(patcher, keys, fusion.modules)

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
        sampled = self._loaded_patcher()
        with forge_merge.synchronized(sampled.load_device):
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
        if fusion.is_online:
            # The host makes room for the present entries alone (sampling_prepare).
            size = utils.dtype_to_element_size(patched.unet.model.computation_dtype)
            patched.unet.extra_preserved_memory_during_sampling = (
                clean.unet.extra_preserved_memory_during_sampling + size * fusion.most_growth()
            )
        if fusion.text_encoder:
            patched.clip = clean.clip.clone()
            for name, patches, strength in fusion.text_encoder:
                patched.clip.add_patches(
                    filename=name,
                    patches=patches,
                    strength_patch=strength,
                    online_mode=fusion.is_online,
                )
        return patched

    def _engine(self) -> Any:
        return sd_models.model_data.get_sd_model()

    def _loaded_patcher(self) -> Any:
        """The patcher whose LoRAs the host has merged: the one that it has loaded. An extension may
        have several clones of it loaded in turn (Fooocus inpaint does in a part of the steps)."""
        patcher = self._engine().forge_objects.unet
        loaded = (entry.model for entry in memory_management.current_loaded_models)
        return next((other for other in loaded if other.is_clone(patcher)), patcher)

    def _adds_online(self) -> bool:
        """Whether the host adds LoRAs at every forward instead of merging (load_networks)."""
        storage = self._engine().forge_objects.unet.model.storage_dtype
        merged = (torch.float32, torch.float16, torch.bfloat16)
        return bool(dynamic_args.get("online_lora", False)) and storage not in merged


def _names_in(paired: Any, role: str) -> list[str]:
    """Of the layers that a paired layer is made of in one file: several for a fused one."""
    layer = getattr(paired, role)
    return [part.name for part in getattr(layer, "parts", (layer,))]


def _unpacked(key: _PatchKey) -> tuple[str, Any, Any]:
    """(parameter key, offset, function), as ``ModelPatcher.add_patches`` reads it."""
    return (key, None, None) if isinstance(key, str) else (*key, None, None)[:3]


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
