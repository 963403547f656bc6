"""K-LoRA over a diffusers UNet, without a WebUI: the playground's host.

It holds W₀ of the layers that LoRAs change and writes W₀ + Σ weight · ΔW into the model whenever a
layer's LoRAs change. Nothing of diffusers is imported: any torch module with its layer names will
do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..errors import KLoraError
from ..layer_names import common_names
from ..lora_file import Layer, LoraFile, parse_lora
from ..methods import BITS
from ..pair import Pair
from ..score_cache import file_sha256
from ..tag import TagPair
from ..tensor_file import SafetensorsFile
from .protocol import HostLora, OnDisk

Weighted = tuple[float, Layer]
"""A summand of a layer's weight: weight and ΔW."""


@dataclass(eq=False)
class UNetFusion:
    """A pair for this host.

    Attributes:
        paired: for each layer of a choice its name and, by ``methods.BITS``, what is added to it.
        unpaired: layer → what is added all the time.
    """

    paired: tuple[tuple[str, tuple[tuple[Weighted, ...], ...]], ...]
    unpaired: Mapping[str, tuple[Weighted, ...]]


class DiffusersUNet:
    """The Host protocol for one model and one folder of ``.safetensors`` LoRAs.

    Args:
        unet: the denoising network; its parameters are changed in place, and given back by
            ``detach`` bit for bit.
        folder: where the LoRAs are; a LoRA's name is its file's stem.
        cache: where scores are kept.
        progress: is told how far an analysis is (done, total).
    """

    def __init__(
        self,
        unet: nn.Module,
        folder: Path,
        cache: Path,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._unet, self._folder, self._cache = unet, folder, cache
        self.show_progress = progress
        weights = {
            name.removesuffix(".weight"): parameter
            for name, parameter in unet.named_parameters()
            if name.endswith(".weight")
        }
        _, names = common_names(weights)
        self._weights = {names[path]: parameter for path, parameter in weights.items()}
        self._loras: Sequence[tuple[LoraFile, float]] = ()
        self._fusion: UNetFusion | None = None
        self._added: dict[str, tuple[Weighted, ...]] = {}
        """Layer → what its weight holds beside W₀."""
        self._original: dict[str, torch.Tensor] = {}
        """Layer → W₀, for the layers in ``_added``."""

    # -- the folder --------------------------------------------------------------------------------

    def find(self, name: str) -> OnDisk | None:
        path = self._folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        status = path.stat()
        version = (str(path), status.st_mtime_ns, status.st_size)
        return OnDisk(name, str(path), file_sha256(path)[:12], version, None)

    def find_by_hash(self, short_hash: str) -> str | None:
        for name in self.lora_names():
            if self.find(name).short_hash == short_hash:
                return name
        return None

    def lora_names(self) -> list[str]:
        return sorted(path.stem for path in self._folder.glob("*.safetensors"))

    def refresh_loras(self) -> None:
        """The folder is looked at each time anyway."""

    look_for_loras = refresh_loras

    def read(self, on_disk: OnDisk) -> SafetensorsFile:
        return SafetensorsFile(on_disk.path)

    def load(self, on_disk: OnDisk, tensors: SafetensorsFile) -> HostLora:
        file = parse_lora(on_disk.name, tensors.read_all())
        names = {x.prefix: name for name, x in file.layers.items() if name in self._weights}
        shapes = {name: tuple(self._weights[name].shape) for name in names.values()}
        return HostLora(on_disk, names, shapes, frozenset(), file)

    # -- the model ---------------------------------------------------------------------------------

    def model(self) -> nn.Module:
        return self._unet

    def network(self) -> nn.Module:
        return self._unet

    def layers(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self._weights.items()}

    def prepare_model(self) -> None:
        """It is there from the start."""

    def device(self) -> torch.device:
        return next(self._unet.parameters()).device

    def cache_folder(self) -> Path:
        return self._cache

    def use_loras(self, loras: Sequence[tuple[str, float]]) -> None:
        """What ``<lora:NAME:WEIGHT>`` does in a WebUI: these LoRAs, at these weights, until other
        ones are named. Raises KLoraError for an unknown name."""
        files = []
        for name, weight in loras:
            on_disk = self.find(name)
            if on_disk is None:
                raise KLoraError(f"There is no LoRA “{name}”: there are {self.lora_names()}.")
            files.append((self.load(on_disk, self.read(on_disk)).parts, weight))
        self._loras = files
        self._apply(self._wanted(None, None))

    def fuse(
        self, tags: TagPair, loras: Mapping[str, HostLora], pair: Pair, te: bool, apart: bool
    ) -> UNetFusion:
        by_role = {tag.role: (tag.unet, loras[tag.role].parts.layers) for tag in tags.in_order()}

        def added(name: str, bits: int) -> tuple[Weighted, ...]:
            return tuple(
                (weight, layers[name])
                for role, (weight, layers) in by_role.items()
                if bits & BITS[role]
            )

        every = range(1 + sum(BITS.values()))
        chosen = [
            (layer.name, tuple(added(layer.name, bits) for bits in every)) for layer in pair.paired
        ]
        unpaired = pair.unpaired.items()
        if not apart:
            return UNetFusion(
                tuple(chosen), {name: added(name, BITS[role]) for name, role in unpaired}
            )
        for name, role in unpaired:
            chosen.append((name, tuple(added(name, bits & BITS[role]) for bits in every)))
        return UNetFusion(tuple(chosen), {})

    def follow(self, p: object) -> None:
        """Nothing: there is one model."""

    def attach(self, fusion: UNetFusion, choice: np.ndarray) -> None:
        if self._fusion is not fusion:
            self.select(fusion, choice)

    def settle(self, fusion: object) -> None:
        """Nothing: there are no others."""

    def select(self, fusion: UNetFusion, choice: np.ndarray) -> None:
        self._fusion = fusion
        self._apply(self._wanted(fusion, choice))

    def check(self, fusion: UNetFusion) -> None:
        """Nothing: what cannot be applied raises."""

    def detach(self) -> None:
        self._fusion = None
        self._apply(self._wanted(None, None))

    abandon = detach

    def recover(self) -> None:
        self._added = dict.fromkeys(self._original, ((0.0, None),))  # what no layer wants

    def _wanted(
        self, fusion: UNetFusion | None, choice: np.ndarray | None
    ) -> dict[str, tuple[Weighted, ...]]:
        """Layer → everything that is to be added to it: the LoRAs first, then the fusion."""
        wanted: dict[str, tuple[Weighted, ...]] = {}
        for file, weight in self._loras:
            for name, layer in file.layers.items():
                if name in self._weights:
                    wanted[name] = (*wanted.get(name, ()), (weight, layer))
        if fusion is not None:
            chosen = {
                name: by_bits[bits]
                for (name, by_bits), bits in zip(fusion.paired, choice, strict=True)
            }
            for name, added in (chosen | fusion.unpaired).items():
                wanted[name] = (*wanted.get(name, ()), *added)
        return wanted

    @torch.no_grad()
    def _apply(self, wanted: Mapping[str, tuple[Weighted, ...]]) -> None:
        """Rewrites the layers whose summands differ from those that they hold now."""
        for name in [*wanted, *(self._added.keys() - wanted.keys())]:
            added, parameter = wanted.get(name, ()), self._weights[name]
            if self._same(added, self._added.get(name, ())):
                continue
            original = self._original.setdefault(name, parameter.detach().clone())
            parameter.copy_(original)
            for weight, layer in added:
                delta = layer.delta(parameter.device).reshape(parameter.shape)
                parameter.add_(delta.to(parameter.dtype), alpha=weight)
            if added:
                self._added[name] = added
            else:
                del self._added[name], self._original[name]

    @staticmethod
    def _same(a: Sequence[Weighted], b: Sequence[Weighted]) -> bool:
        return len(a) == len(b) and all(
            x[0] == y[0] and x[1] is y[1] for x, y in zip(a, b, strict=True)
        )
