"""What K-LoRA asks of a WebUI.

The host applies; K-LoRA only says which LoRA a layer gets. Life cycle, all on the host's own
generation thread::

    find → read, load (twice) → fuse → attach, settle → select, check, select, … → detach
                                   ↑____________________________________________|  next generation
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from ..pair import Pair
from ..tag import TagPair
from ..tensor_file import TensorFile


@dataclass(frozen=True)
class OnDisk:
    """A LoRA in the host's list. ``version`` changes when the file does; ``entry`` is the host's
    own record of it."""

    name: str
    path: str
    short_hash: str
    version: tuple[Any, ...]
    entry: Any


@dataclass(frozen=True)
class HostLora:
    """A file as the host's LoRA code has read it for the present model.

    Attributes:
        on_disk: where it came from.
        names: for every layer of the denoising network that the host can apply: the prefix that it
            has in the file → the name of what the host changes for it, as in ``Host.layers``; of a
            part of a fused projection with its letter behind a slash.
        shapes: name → shape of the weight, or of that part of it.
        text_encoder: the prefixes of what the host applies to text encoders.
        parts: the host's own objects, opaque to the rest of the program.
    """

    on_disk: OnDisk
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    text_encoder: frozenset[str]
    parts: Any


class Fusion(Protocol):
    """A pair, ready in the host: what ``attach`` takes. Owned by the host adapter."""


class Host(Protocol):
    """One WebUI."""

    def find(self, name: str) -> OnDisk | None:
        """Resolves a name as ``<lora:NAME>`` does; None if there is none of that name. Raises
        KLoraError if the file cannot be read."""

    def find_by_hash(self, short_hash: str) -> str | None:
        """The name of the LoRA with this hash (as in ``OnDisk``); None if there is none."""

    def lora_names(self) -> list[str]:
        """The names of all LoRAs in the host's list."""

    def refresh_loras(self) -> None:
        """Looks at the LoRA folder again."""

    def look_for_loras(self) -> None:
        """The same, but only if files have come or gone; cheap otherwise."""

    def model(self) -> object:
        """The present model's identity: what ``load`` returns holds for that object only."""

    def network(self) -> nn.Module:
        """The present model's denoising network, as it is called in every step."""

    def layers(self) -> Mapping[str, tuple[int, ...]]:
        """The weights of the present model's denoising network: name, which is the module's path
        with ``_`` for ``.``, → shape."""

    def prepare_model(self) -> None:
        """Loads the chosen checkpoint if the host puts that off until the first generation."""

    def device(self) -> torch.device:
        """Where the scores may be computed."""

    def cache_folder(self) -> Path:
        """Where the scores may be kept; need not exist."""

    def show_progress(self, done: int, total: int) -> None:
        """Shows how far the analysis is. Raises KLoraError if the person stops it."""

    def read(self, on_disk: OnDisk) -> TensorFile:
        """The tensors of a file; never unpickled by us. Raises KLoraError."""

    def load(self, on_disk: OnDisk, tensors: TensorFile) -> HostLora:
        """The file, with what ``tensors.changed`` says, through the host's LoRA code, for the
        present model. Raises KLoraError."""

    def fuse(
        self, tags: TagPair, loras: Mapping[str, HostLora], pair: Pair, te: bool, apart: bool
    ) -> Fusion:
        """Prepares a pair; ``loras`` by role; ``te``: with the text encoder parts; ``apart``: a
        choice has the layers of one file too, behind the paired ones, which are applied in every
        step else."""

    def follow(self, p: Any) -> None:
        """Before the first step of a batch of generation ``p``: sees to it that what will be
        sampled is what ``attach`` changes."""

    def attach(self, fusion: Fusion, choice: np.ndarray) -> None:
        """Makes the fusion part of the host's current LoRAs, after all ``<lora:>``.

        ``choice`` (as in ``select``) is what to begin with, unless the host still holds
        another one.
        """

    def settle(self, fusion: Fusion) -> None:
        """After other extensions had their say on the host's current LoRAs, before text is encoded
        and before each pass: what they have changed stays, with the fusion behind it."""

    def select(self, fusion: Fusion, choice: np.ndarray) -> None:
        """Before a model call: layer i of the pair (``Pair.paired``; with ``apart`` the
        ``unpaired`` too) gets the LoRAs whose ``methods.BITS`` are in ``choice[i]``, both in the
        order of the tags. Touches only what differs from what is applied now. Raises KLoraError if
        the host samples with a model that does not have the fusion."""

    def check(self, fusion: Fusion) -> None:
        """After a model call: raises KLoraError if the fusion was not applied to all of its layers
        and the host went on nevertheless."""

    def detach(self) -> None:
        """Leaves the host's current LoRAs as they are without K-LoRA. Idempotent."""

    def abandon(self) -> None:
        """``detach`` for a generation that goes on: its next model call is without K-LoRA."""

    def recover(self) -> None:
        """After a generation that ended while the host was applying LoRAs, so its records may not
        match its weights: makes it apply whatever comes next from scratch. Earlier fusions are not
        reused."""
