"""AUTOMATIC1111 1.10: extensions-builtin/Lora/networks.py.

The host applies LoRAs lazily: every forward of a layer calls ``network_apply_weights``, which
compares the names of ``networks.loaded_networks`` with those it applied last; where they differ it
restores the layer from its backup and adds ``net.modules[layer].calc_updown`` of each network.

So a pair is a network of our own at the end of that list, whose ``modules`` hold for each layer
the entry of the file that wins it; an entry knows its own file's weight. A flip swaps the entry and
invalidates the layer's own record of what is applied; the layer's next forward does the rest. Where
a layer may have both (text encoders, Direct merge) it is two networks, one for each file. One is
better where it will do: the host walks the list in every forward of every layer. Besides that list
and the records, only embeddings bundled in a file are touched, as by ``<lora:>``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import network
import networks
import numpy as np
import torch
from modules import devices, sd_hijack, sd_models, sd_unet, shared

from ..errors import KLoraError, is_full_memory
from ..lora_file import split_key
from ..methods import BITS, BOTH
from ..pair import Pair
from ..tag import CONTENT, ROLES, STYLE, TagPair
from ..tensor_file import SafetensorsFile, TensorFile, UnpickledFile
from .common import CommonHost, names_in
from .protocol import HostLora, OnDisk

_UNET = "diffusion_model_"
_INVALID = ("K-LoRA: to be applied again",)
_numbers = itertools.count(1)


@dataclass(eq=False)
class _Fusion:
    nets: Mapping[str, network.Network]
    """Role → the file's own network, which knows its weights and embeddings."""
    order: tuple[str, str]
    """Roles in the order of the tags."""
    multipliers: Mapping[str, tuple[float, float]]
    """Role → (text encoder, UNet) weight."""
    fixed: Mapping[str, Mapping[str, Any]]
    """Role → module key → module, applied in every step: text encoder, layers of one file."""
    layers: tuple[Mapping[str, Mapping[str, Any]], ...]
    """Per layer of a choice: role → module key → module."""
    both_encode: bool
    """Whether both files have text encoder parts."""
    carriers: Mapping[str, network.Network] = field(default_factory=dict)
    """Role → what stands in the host's list for it; one and the same for both where that will do.
    The host compares its name, so it has a new one whenever it is filled."""
    choice: np.ndarray | None = None
    """What the carriers hold."""
    failed_before: int = 0
    """``_failed_layers`` before this model call: those of the text encoders."""

    @property
    def is_one(self) -> bool:
        return self.carriers[ROLES[0]] is self.carriers[ROLES[1]]


@dataclass(eq=False)
class _Parts:
    net: network.Network
    text_encoder: dict[str, Any] = field(default_factory=dict)
    unet: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Layer name → module key → module."""


class A1111(CommonHost):
    """The Host protocol for AUTOMATIC1111 1.10."""

    def __init__(self) -> None:
        super().__init__()
        self._registered: tuple[network.Network, ...] = ()
        """The files whose embeddings are known now. The host's list does not tell: extensions such
        as LoRA Block Weight empty it after every generation."""

    def model(self) -> object:
        return shared.sd_model

    def network(self) -> torch.nn.Module:
        return shared.sd_model.model.diffusion_model

    def layers(self) -> dict[str, tuple[int, ...]]:
        weights = (
            (key, getattr(module, "weight", None))
            for key, module in shared.sd_model.network_layer_mapping.items()
            if key.startswith(_UNET)
        )
        return {key.removeprefix(_UNET): tuple(x.shape) for key, x in weights if x is not None}

    def prepare_model(self) -> None:
        """Nothing: asking for the model loads it."""

    def device(self) -> torch.device:
        return devices.device

    def read(self, on_disk: OnDisk) -> TensorFile:
        if on_disk.path.lower().endswith(".safetensors"):
            return SafetensorsFile(on_disk.path)

        def read() -> Mapping[str, torch.Tensor]:
            try:
                return sd_models.read_state_dict(on_disk.path)  # the host's restricted unpickler
            except Exception as error:
                raise KLoraError(
                    f"“{on_disk.name}” is refused by the WebUI's safe loader ({error}): convert it "
                    f"to .safetensors, or choose another file."
                ) from error

        return UnpickledFile(on_disk.path, read)

    def load(self, on_disk: OnDisk, tensors: TensorFile) -> HostLora:
        """The host reads the file itself, and keeps copies: what is changed is put into these.

        The network is never in the host's list, and its name never occurs in a ``<lora:>``:
        extensions that set weights by name (loractl) mean that one.
        """
        try:
            net = networks.load_network(f"K-LoRA {on_disk.name}", on_disk.entry)
        except Exception as error:  # the host raises AssertionError, KeyError, RuntimeError …
            raise KLoraError(
                f"“{on_disk.name}” cannot be applied by this WebUI ({error}): choose another file."
            ) from error
        changed = {split_key(key)[0]: tensor for key, tensor in tensors.changed.items()}
        parts = _Parts(net)
        names, shapes, of_text = {}, {}, set()
        for key, module in net.modules.items():
            prefix, _ = split_key(module.network_key)
            if key.startswith(_UNET):
                module.__class__ = _counting_class(type(module))
                if prefix in changed:
                    _replace_factor(module, changed[prefix])
                name = names[prefix] = key.removeprefix(_UNET)
                parts.unet.setdefault(name, {})[key] = module
                weight = getattr(module.sd_module, "weight", None)
                if weight is not None:
                    shapes[name] = tuple(weight.shape)
            else:
                parts.text_encoder[key] = module
                of_text.add(prefix)
        net.modules = {}
        net.klora_uncomputable = 0
        return HostLora(on_disk, names, shapes, frozenset(of_text), parts)

    def fuse(
        self, tags: TagPair, loras: Mapping[str, HostLora], pair: Pair, te: bool, apart: bool
    ) -> _Fusion:
        parts: dict[str, _Parts] = {role: lora.parts for role, lora in loras.items()}
        tag_of = {tag.role: tag for tag in tags.in_order()}
        fixed: dict[str, dict[str, Any]] = {
            role: dict(parts[role].text_encoder) if te else {} for role in ROLES
        }
        layers = [
            {role: _modules(parts[role].unet, names_in(layer, role)) for role in ROLES}
            for layer in pair.paired
        ]
        for name, role in pair.unpaired.items():
            if apart:
                layers.append({CONTENT: {}, STYLE: {}, role: parts[role].unet[name]})
            else:
                fixed[role].update(parts[role].unet[name])
        return _Fusion(
            nets={role: parts[role].net for role in ROLES},
            order=tuple(tag_of),
            multipliers={role: (tag_of[role].te, tag_of[role].unet) for role in ROLES},
            fixed=fixed,
            layers=tuple(layers),
            both_encode=te and all(parts[role].text_encoder for role in ROLES),
        )

    def attach(self, fusion: _Fusion, choice: np.ndarray) -> None:
        self.detach()
        for role, net in fusion.nets.items():
            net.te_multiplier, net.unet_multiplier = fusion.multipliers[role]
        if fusion.choice is None:
            self._fill(fusion, choice)
        else:  # what the last generation ended with, and a script may call the model before us
            self._flip(fusion, choice)
        self._put_into_list(fusion)
        self._registered = tuple(fusion.nets[role] for role in fusion.order)
        for net in self._registered:
            _register_embeddings(net)

    def settle(self, fusion: _Fusion) -> None:
        """Nothing: extensions change the networks whose names they know, and ours has its own."""

    def select(self, fusion: _Fusion, choice: np.ndarray) -> None:
        if sd_unet.current_unet is not None:  # such as TensorRT's
            label = sd_unet.current_unet.option.label
            raise KLoraError(
                f"The WebUI applies no LoRAs to the SD Unet “{label}”, so the picture is made "
                f"without K-LoRA. To use it, choose None in Settings → Stable Diffusion → SD Unet."
            )
        carriers = fusion.carriers
        fusion.failed_before = _failed_layers(fusion)
        self._flip(fusion, choice)
        if fusion.carriers is not carriers:
            self._remove_from_list()
            self._put_into_list(fusion)

    def detach(self) -> None:
        self._remove_from_list()
        for net in self._registered:
            _unregister_embeddings(net)
        self._registered = ()

    abandon = detach  # the host looks at its list in every forward

    def check(self, fusion: _Fusion) -> None:
        if _failed_layers(fusion) > fusion.failed_before:
            raise KLoraError(
                "The WebUI could not apply K-LoRA to every layer, most often because memory is "
                "full, so the picture is made without it: choose a smaller size, or generate again."
            )

    def recover(self) -> None:
        for model in _models():
            for layer in model.network_layer_mapping.values():
                if _has_backups(layer):
                    _invalidate(layer)

    @staticmethod
    def _put_into_list(fusion: _Fusion) -> None:
        for role in fusion.order[: 1 if fusion.is_one else 2]:
            networks.loaded_networks.append(fusion.carriers[role])

    @staticmethod
    def _remove_from_list() -> None:
        for carrier in [net for net in networks.loaded_networks if hasattr(net, "klora")]:
            networks.loaded_networks.remove(carrier)

    def _flip(self, fusion: _Fusion, choice: np.ndarray) -> None:
        """Puts another choice into the carriers; into new ones where one is not enough any more."""
        flipped = np.flatnonzero(fusion.choice != choice)
        if not len(flipped):
            return
        if fusion.is_one and (choice == BOTH).any():
            self._fill(fusion, choice)
            return
        models = [model.network_layer_mapping for model in _models()]
        for i in flipped:
            entries = fusion.layers[i]
            for role in ROLES:
                for key in entries[role]:
                    fusion.carriers[role].modules.pop(key, None)
                    for layers in models:
                        _invalidate(layers.get(key))
            for role, bit in BITS.items():
                if choice[i] & bit:
                    fusion.carriers[role].modules.update(entries[role])
        fusion.choice = choice

    @staticmethod
    def _fill(fusion: _Fusion, choice: np.ndarray) -> None:
        """Makes new carriers with exactly these modules; every layer is applied again then."""
        if fusion.both_encode or (choice == BOTH).any():
            fusion.carriers = {role: _carrier(fusion.nets[role]) for role in ROLES}
        else:
            fusion.carriers = dict.fromkeys(ROLES, _carrier(*fusion.nets.values()))
        for role, bit in BITS.items():
            modules = fusion.carriers[role].modules
            modules.update(fusion.fixed[role])
            for layer, bits in zip(fusion.layers, choice, strict=True):
                if bits & bit:
                    modules.update(layer[role])
        fusion.choice = choice


def _modules(of_layer: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    """Module key → module of these layers of a file."""
    return {key: module for name in names for key, module in of_layer[name].items()}


def _replace_factor(module: Any, factor: torch.Tensor) -> None:
    """Puts another down, or another full difference, into the host's module of a layer, as it
    would have been read."""
    down = getattr(module, "down_model", None)
    if down is None:
        module.weight = factor
    else:
        with torch.no_grad():
            down.weight.copy_(factor.reshape(down.weight.shape))


def _carrier(*nets: network.Network) -> network.Network:
    """A network for the host's list that stands for one file or both."""
    files = " + ".join(net.network_on_disk.name for net in nets)
    carrier = network.Network(f"K-LoRA {next(_numbers)} {files}", nets[0].network_on_disk)
    carrier.klora = True
    return carrier


def _failed_layers(fusion: _Fusion) -> int:
    """UNet layers that the host could not apply the fusion to although their modules can be
    computed. It goes on without such a layer, and only counts it."""
    counted = networks.extra_network_lora.errors
    carriers = {carrier.name for carrier in fusion.carriers.values()}
    nets = set(fusion.nets.values())
    return sum(counted.get(name, 0) for name in carriers) - sum(
        net.klora_uncomputable for net in nets
    )


@functools.cache
def _counting_class(kind: type) -> type:
    """The host's module class, extended to count in its network how often one was refused: what
    torch cannot compute at all (LoHa in fp16 on a CPU) fails for ``<lora:>`` too, in any picture.
    """

    class Counting(kind):
        def calc_updown(self, orig_weight: torch.Tensor) -> Any:
            try:
                return super().calc_updown(orig_weight)
            except RuntimeError as error:
                if not is_full_memory(error):
                    self.network.klora_uncomputable += 1
                raise

    Counting.__name__ = kind.__name__
    return Counting


def _models() -> list[Any]:
    """All models in memory: with more than one allowed the refiner is another than the
    checkpoint, both apply the same networks, and each layer of either has its own record."""
    models = sd_models.model_data.loaded_sd_models
    return [model for model in models if hasattr(model, "network_layer_mapping")]


def _invalidate(layer: Any) -> None:
    """Lets the host apply the networks again at the layer's next forward.

    Only a layer with a backup has anything applied; for one without, the host would take a changed
    record for lost weights and raise (networks.py, network_apply_weights).
    """
    if getattr(layer, "network_weights_backup", None) is not None:
        layer.network_current_names = _INVALID


def _has_backups(layer: Any) -> bool:
    """Whether the host has backed up all of a layer. It does so before it applies anything, the
    weight first; where that ended at the bias, a changed record would cost the layer its bias."""
    bias = getattr(getattr(layer, "out_proj", layer), "bias", None)
    return bias is None or getattr(layer, "network_bias_backup", None) is not None


def _register_embeddings(net: network.Network) -> None:
    """Makes the textual inversions bundled in the file known, as ``load_networks`` does."""
    known = sd_hijack.model_hijack.embedding_db
    for name, embedding in net.bundle_embeddings.items():
        if embedding.loaded is None and name in known.word_embeddings:
            continue  # the person's own one of that name goes first
        embedding.loaded = known.expected_shape in (-1, embedding.shape)
        if embedding.loaded:
            known.register_embedding(embedding, shared.sd_model)


def _unregister_embeddings(net: network.Network) -> None:
    known = sd_hijack.model_hijack.embedding_db
    for name, embedding in net.bundle_embeddings.items():
        if embedding.loaded:
            known.register_embedding_by_name(None, shared.sd_model, name)
        embedding.loaded = None
