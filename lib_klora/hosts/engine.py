"""What Forge, Forge Neo and reForge share: where the model and its LoRAs are.

Their engine (``shared.sd_model``) has the model's patchers three times (modules/processing.py of
all): ``forge_objects_original``, never patched; ``forge_objects_after_applying_lora``, with the
``<lora:>`` tags; ``forge_objects``, a copy of that for the pass that is sampled. A patcher is a
model and a list of *entries* for each of its parameters: what LoRAs add, ``(strength, patch,
strength_model, offset, function, …)``.

So a pair is a clone of the second one's patchers whose lists end with the entries of the present
winners, which may be both. Nothing of the host's own is changed, and taking K-LoRA back is putting
the original patchers back. How a changed list comes into the weights of a model in use is what
these WebUIs do differently: ``lora_loader`` and ``model_patcher`` have a subclass for each way.
"""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import networks
import numpy as np
import torch
from modules import sd_models, sd_samplers

from ..errors import KLoraError, is_full_memory
from ..lora_file import split_key
from ..methods import BITS, BOTH
from ..pair import Pair
from ..tag import TagPair
from ..tensor_file import SafetensorsFile
from .common import CommonHost, names_in
from .protocol import HostLora, OnDisk

_UNET = "diffusion_model."
WITHOUT_LORAS = (
    "The picture is made without K-LoRA, because another extension samples with a model of its own "
    "that has no LoRAs, or changes LoRAs between steps: switch that extension off."
)
numbers = itertools.count(1)
"""For names that the host has not seen."""

Entry = tuple
"""What a LoRA adds to a parameter, as the host has it in a patcher."""
PatchKey = Any
"""A place in the model, for ``add_patches``: parameter key, or (key, offset[, function])."""
Patches = Mapping[PatchKey, Any]
"""What ``add_patches`` takes: the place → what a LoRA adds there."""


@dataclass(eq=False)
class Parts:
    """A file as the host has read it."""

    number: int
    """Stands for this reading of this file."""
    text_encoder: Patches
    unet: Mapping[PatchKey, Entry]
    """At weight 1."""
    patch_keys: dict[str, tuple[PatchKey, ...]] = field(default_factory=dict)
    """Layer name → those of its weight and bias."""


class Contribution(NamedTuple):
    """What may be added to a parameter."""

    layer: int | None
    """Which paired layer; None for a layer of one file, which is added in every step."""
    bit: int
    """The role's of ``methods.BITS``."""
    entry: Entry


@dataclass(eq=False)
class EngineFusion:
    """A pair, ready to be put into a patcher."""

    contributions: Mapping[str, Sequence[Contribution]]
    """Parameter key → what may be added to it, in the order of the tags. Several paired layers only
    for a fused parameter in parts."""
    keys_of: Sequence[tuple[str, ...]]
    """Per paired layer: its parameter keys."""
    text_encoder: tuple[tuple[str, Patches, float], ...]
    """(a name for the host, patches, strength) in the order of the tags."""
    choice: np.ndarray | None = None
    """What the patchers hold. None: nothing yet."""
    modules: dict[str, weakref.ref] = field(default_factory=dict)
    """Parameter key → its module. Looking it up from the model's root for each
    flip, through cold memory, would take a third of the flip's time."""

    def entries_for(self, key: str) -> list[Entry]:
        """The entries of the present winners for one parameter."""
        return [
            entry
            for layer, bit, entry in self.contributions[key]
            if layer is None or self.choice[layer] & bit
        ]

    def flip(self, choice: np.ndarray) -> set[str]:
        """Takes another choice; the keys of the parameters whose entries are others now."""
        flipped = np.flatnonzero(self.choice != choice)
        self.choice = choice
        return {key for i in flipped for key in self.keys_of[i]}

    @cached_property
    def _elements(self) -> np.ndarray:
        """Numbers in each paired layer's entries, by what it gets; shape [layers, 4]."""
        elements = np.zeros((len(self.keys_of), BOTH + 1), np.int64)
        for contributions in self.contributions.values():
            for layer, bit, entry in contributions:
                if layer is not None:
                    elements[layer, [bit, BOTH]] += _elements_in(entry)
        return elements

    def most_growth(self) -> int:
        """How many numbers the entries may have more once other layers have flipped."""
        now = self._elements[np.arange(len(self.choice)), self.choice]
        either = self._elements[:, list(BITS.values())].max(1, initial=0)
        return int((either - now).clip(0).sum())


class Engine(CommonHost, ABC):
    """The Host protocol for them, but for how weights are rewritten."""

    make_fusion: type[EngineFusion] = EngineFusion

    def __init__(self, memory: Any) -> None:
        """``memory``: the host's module that loads models."""
        super().__init__()
        self.memory = memory

    # -- how weights are rewritten -----------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def entries_in(patcher: Any) -> Mapping[str, Sequence[Entry]]:
        """Parameter key → the entries of a patcher."""

    @abstractmethod
    def begin(self, fusion: EngineFusion, clean: Any, choice: np.ndarray) -> None:
        """Lets the fusion hold what the host has merged of it; ``choice`` if that is nothing."""

    @abstractmethod
    def patched_unet(self, fusion: EngineFusion, clean: Any) -> Any:
        """A clone of the patcher ``clean`` that holds the fusion."""

    @abstractmethod
    def patched_clip(self, fusion: EngineFusion, clean: Any) -> Any:
        """A clone of the text encoder ``clean`` that holds the fusion's text encoder parts."""

    @abstractmethod
    def settle(self, fusion: EngineFusion) -> None:
        """As in the protocol."""

    @abstractmethod
    def withdraw(self, fusion: EngineFusion, patched: Any) -> None:
        """Takes the fusion out of the weights of the model in use, and out of every patcher."""

    # -- the protocol ------------------------------------------------------------------------------

    def model(self) -> object:
        objects = getattr(self.engine(), "forge_objects_original", None)
        return objects and objects.unet.model

    def network(self) -> torch.nn.Module:
        return self.model().diffusion_model

    def layers(self) -> dict[str, tuple[int, ...]]:
        return {
            _layer_name(key): _shape(parameter)
            for key, parameter in self.model().named_parameters()
            if key.startswith(_UNET) and key.endswith(".weight")
        }

    def prepare_model(self) -> None:
        """Forge waits for the first generation; reForge loads it when asked for the model."""
        getattr(sd_models, "forge_model_reload", lambda: None)()

    def device(self) -> torch.device:
        return self.memory.get_torch_device()

    def read(self, on_disk: OnDisk) -> SafetensorsFile:
        if not on_disk.path.lower().endswith(".safetensors"):
            # The host's own loader for these renames a file that fails (modules_forge/patch_basic).
            raise KLoraError(
                f"“{on_disk.name}” is not a .safetensors file: in this WebUI K-LoRA opens no other "
                f"format, convert it or choose another file."
            )
        return SafetensorsFile(on_disk.path)

    def load(self, on_disk: OnDisk, tensors: SafetensorsFile) -> HostLora:
        """By the host's own function, so that names, conversions and what is refused are its."""
        clean = self.engine().forge_objects_original
        model = clean.unet.model
        if hasattr(model.diffusion_model, "loras"):  # Nunchaku's (svdq.py) has them as files
            raise KLoraError(
                "This checkpoint is a Nunchaku model, whose LoRAs cannot change between steps: "
                "choose another checkpoint to use K-LoRA."
            )
        read = tensors.read_all()
        try:
            patched = networks.load_lora_for_models(
                clean.unet, clean.clip, _renamed(read), 1.0, 1.0, filename=on_disk.path
            )
        except Exception as error:  # the host raises RuntimeError, KeyError, … for damaged files
            if is_full_memory(error):
                raise
            raise KLoraError(
                f"“{on_disk.name}” cannot be applied by this WebUI ({error}): choose another file."
            ) from error
        options = patched[0].model_options.get("transformer_options", {})
        if options.get("dynamic_loras"):  # Forge Neo of early 2026 (operations_int8.py)
            raise KLoraError(
                "This checkpoint is stored in int8, to which this WebUI adds LoRAs in a way that "
                "cannot change between steps: choose another checkpoint, or another way to store "
                "it, to use K-LoRA."
            )
        unet = self._added(patched[0], clean.unet)
        text_encoder = self._added(patched[1].patcher, clean.clip.patcher)
        # The host keeps the very tensors that it was given, so they tell which layer of the file
        # it has put where, whatever either of them calls it.
        prefix_of = {id(tensor): split_key(key)[0] for key, tensor in read.items()}
        parameters = dict(model.named_parameters())
        parts = Parts(next(numbers), {key: x[1] for key, x in text_encoder.items()}, unet)
        names: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for patch_key, entry in unet.items():
            key, offset, _ = unpacked(patch_key)
            if key not in parameters:
                continue
            name = _layer_name(key, offset, parameters[key])
            parts.patch_keys[name] = (*parts.patch_keys.get(name, ()), patch_key)
            names.update((prefix_of[id(x)], name) for x in _tensors_in(entry) if id(x) in prefix_of)
            if not key.endswith(".bias"):
                shapes[name] = _part_of(_shape(parameters[key]), offset)
        of_text = {
            prefix_of.get(id(x)) for entry in text_encoder.values() for x in _tensors_in(entry)
        }
        return HostLora(on_disk, names, shapes, frozenset(of_text - {None}), parts)

    def fuse(
        self, tags: TagPair, loras: Mapping[str, HostLora], pair: Pair, te: bool, apart: bool
    ) -> EngineFusion:
        sides = {tag.role: (loras[tag.role].parts, tag.unet) for tag in tags.in_order()}
        contributions: dict[str, list[Contribution]] = {}

        def add(layer: int | None, role: str, names: Sequence[str]) -> set[str]:
            parts, strength = sides[role]
            keys = set()
            for patch_key in (key for name in names for key in parts.patch_keys[name]):
                key, _, _ = unpacked(patch_key)
                entry = (strength, *parts.unet[patch_key][1:])
                contributions.setdefault(key, []).append(Contribution(layer, BITS[role], entry))
                keys.add(key)
            return keys

        paired = [{role: names_in(layer, role) for role in sides} for layer in pair.paired]
        unpaired = [{role: [name]} for name, role in pair.unpaired.items()]
        if apart:
            paired += unpaired
        else:
            for alone in unpaired:
                for role, names in alone.items():
                    add(None, role, names)
        return self.make_fusion(
            contributions,
            keys_of=tuple(
                tuple({key for role, names in layer.items() for key in add(i, role, names)})
                for i, layer in enumerate(paired)
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
        if model is not None and model.inner_model is not self.engine():
            p.sampler = sd_samplers.create_sampler(p.sampler_name, self.engine())

    def attach(self, fusion: EngineFusion, choice: np.ndarray) -> None:
        self.detach()
        engine = self.engine()
        clean = engine.forge_objects_after_applying_lora
        self.begin(fusion, clean, choice)
        patched = clean.shallow_copy()
        patched.klora_clean, patched.klora_fusion = clean, fusion
        patched.unet = self.patched_unet(fusion, clean.unet)
        if fusion.text_encoder:
            patched.clip = self.patched_clip(fusion, clean.clip)
        # As load_networks does: the refiner takes forge_objects, everything else a copy of the
        # other (processing.py; sd_samplers_common.py, apply_refiner).
        engine.forge_objects_after_applying_lora = patched
        engine.forge_objects.unet, engine.forge_objects.clip = patched.unet, patched.clip

    def check(self, fusion: EngineFusion) -> None:
        """Nothing: what the host cannot merge it leaves out with a line in its log, or raises."""

    def detach(self) -> None:
        engine = self.engine()
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
        patched = self.engine().forge_objects_after_applying_lora
        fusion = getattr(patched, "klora_fusion", None)
        self.detach()
        if fusion is not None:
            self.withdraw(fusion, patched)

    # -- for the subclasses ------------------------------------------------------------------------

    def engine(self) -> Any:
        """The host's model with everything that belongs to it."""
        return sd_models.model_data.get_sd_model()

    def patchers(self) -> Iterator[Any]:
        """Of the model that is being sampled and its text encoder, or would be."""
        objects = getattr(self.engine(), "forge_objects_original", None)
        if objects is not None:
            yield from (objects.unet, objects.clip.patcher)

    def loaded_patcher(self) -> Any:
        """The patcher whose LoRAs the host has merged: the one that it has loaded. An extension may
        have several clones of it loaded in turn (Fooocus inpaint does in a part of the steps)."""
        patcher = self.engine().forge_objects.unet
        loaded = (entry.model for entry in self.memory.current_loaded_models)
        return next((x for x in loaded if x is not None and x.is_clone(patcher)), patcher)

    def preserve_memory(self, patched: Any, clean: Any, fusion: EngineFusion) -> None:
        """Where the host adds LoRAs at every forward, it makes room for the present entries alone
        (sampling_prepare)."""
        size = torch.empty((), dtype=patched.model.computation_dtype).element_size()
        patched.extra_preserved_memory_during_sampling = (
            clean.extra_preserved_memory_during_sampling + size * fusion.most_growth()
        )

    def _added(self, patched: Any, clean: Any) -> dict[PatchKey, Entry]:
        """What a patcher has more than another."""
        before = self.entries_in(clean)
        added = {}
        for key, entries in self.entries_in(patched).items():
            for entry in entries[len(before.get(key, ())) :]:
                place = tuple(entry[3:5])  # offset, function
                added[key if place == (None, None) else (key, *place)] = entry
        return added


@contextmanager
def synchronized(device: torch.device) -> Iterator[None]:
    """Waits for the device, before and after, so that nothing else runs inside.

    The hosts read weights without waiting (``non_blocking``), with --cuda-stream in a stream that
    does not wait for the one that merges. That is safe for their own merging, long before the first
    step, and not for ours between two.
    """
    wait = getattr(getattr(torch, device.type, None), "synchronize", lambda: None)
    wait()
    try:
        yield
    finally:
        wait()


def module_of(model: Any, key: str, known: dict[str, weakref.ref]) -> Any:
    """The module of a parameter, which is noted in ``known`` and looked up there first."""
    module = known[key]() if key in known else None
    if module is None:
        module = model
        for name in key.split(".")[:-1]:
            module = getattr(module, name)
        known[key] = weakref.ref(module)
    return module


def unpacked(key: PatchKey) -> tuple[str, Any, Any]:
    """(parameter key, offset, function), as ``ModelPatcher.add_patches`` reads it."""
    return (key, None, None) if isinstance(key, str) else (*key, None, None)[:3]


def _renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As ``load_networks`` of Forge Neo names them before it loads a file; a dictionary that the
    host may change."""
    tensors = dict(tensors)
    replace = getattr(networks, "state_dict_prefix_replace", None)
    if replace is not None and any(key.startswith("lora_unet__") for key in tensors):
        tensors = replace(tensors, {"lora_unet__": "lora_unet_"})
    return tensors


Offset = tuple[int, int, int]
"""Part of a parameter: dimension, start, length."""


def _layer_name(
    key: str, offset: Offset | None = None, parameter: torch.Tensor | None = None
) -> str:
    """The name of a parameter's layer, or of the part of it at ``offset``."""
    path = key.removeprefix(_UNET).removesuffix(".weight").removesuffix(".bias")
    name = path.replace(".", "_")
    return name if offset is None else f"{name}/{_letter(offset, _shape(parameter)[1])}"


def _letter(offset: Offset, width: int) -> str:
    """What a part is called: q, as wide as the input; k and v, which may be narrower; the MLP, or
    all three of the first in one."""
    _, start, length = offset
    parts = {
        0: "q" if length <= width else "qkv",
        width: "k",
        width + length: "v",
        3 * width: "mlp",
    }
    return parts.get(start, str(start))


def _shape(parameter: torch.Tensor) -> tuple[int, ...]:
    # A bitsandbytes weight is packed and keeps its true shape beside it; GGUF's reports it.
    return tuple(getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape))


def _part_of(shape: tuple[int, ...], offset: Offset | None) -> tuple[int, ...]:
    return shape if offset is None else (offset[2], *shape[1:])


def _tensors_in(item: Any) -> Iterator[torch.Tensor]:
    """All tensors of an entry; ComfyUI's adapters have them as ``weights``."""
    if isinstance(item, torch.Tensor):
        yield item
    else:
        items = item if isinstance(item, (list, tuple)) else getattr(item, "weights", ())
        for inner in items:
            yield from _tensors_in(inner)


def _elements_in(item: Any) -> int:
    """Numbers in all tensors of an entry."""
    return sum(tensor.numel() for tensor in _tensors_in(item))
