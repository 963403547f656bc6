"""A WebUI in memory: the protocol of lib_klora/hosts/protocol.py over a real folder of files.

What it does is what the FACTS say of both hosts, reduced to the names of layers: it lists files by
stem, can apply a layer if the model has one of that name, keeps the LoRA of each layer until it is
told otherwise, and rebuilds only what differs. It keeps a record of what it is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lib_klora.errors import KLoraError
from lib_klora.hosts import HostLora, OnDisk
from lib_klora.layer_names import common_names
from lib_klora.lora_file import parse_lora
from lib_klora.methods import BITS
from lib_klora.tensor_file import SafetensorsFile, TensorFile


class Model:
    """A checkpoint: its layers and their shapes."""

    def __init__(self, prefixes: Iterable[str], size: int = 8) -> None:
        _, names = common_names(prefixes)
        self.shapes = dict.fromkeys(names.values(), (size, size))
        self.network = torch.nn.Identity()


@dataclass(eq=False)
class FakeFusion:
    tags: object
    layers: tuple[str, ...]
    unpaired: dict[str, str]
    te: bool
    apart: bool
    changed: dict[str, torch.Tensor]
    """What the content's file was loaded with in the place of its own."""


@dataclass
class FakeHost:
    folder: Path
    present: Model
    asked: list = field(default_factory=list)
    attached: FakeFusion | None = None
    applied: dict[str, str] = field(default_factory=dict)
    rebuilt: list[int] = field(default_factory=list)
    began_with: list[np.ndarray] = field(default_factory=list)
    unread: tuple[str, ...] = ()
    """Beginnings of prefixes in a spelling that it does not read."""
    of_text: tuple[str, ...] = ()
    """Beginnings of prefixes that it applies to the text encoder."""
    fails_in: str | None = None
    error: type[BaseException] = RuntimeError

    def _record(self, what: str, *details) -> None:
        self.asked.append((what, *details))
        if self.fails_in == what:
            raise self.error(f"{what} broke")

    def count(self, what: str) -> int:
        return Counter(entry[0] for entry in self.asked)[what]

    def find(self, name: str) -> OnDisk | None:
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        stat = path.stat()
        return OnDisk(name, str(path), f"hash_{name}", (str(path), stat.st_mtime_ns), None)

    def lora_names(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.safetensors"))

    def refresh_loras(self) -> None:
        pass

    def model(self) -> Model:
        return self.present

    def network(self) -> torch.nn.Module:
        return self.present.network

    def layers(self) -> dict[str, tuple[int, int]]:
        return self.present.shapes

    def find_by_hash(self, short_hash):
        """Not asked for by the session."""

    def prepare_model(self):
        """Always there."""

    def device(self) -> torch.device:
        return torch.device("cpu")

    def cache_folder(self) -> Path:
        return self.folder / "cache"

    def show_progress(self, done: int, total: int) -> None:
        self._record("show_progress", done, total)

    def read(self, on_disk: OnDisk) -> TensorFile:
        self._record("read", on_disk.name)
        return SafetensorsFile(on_disk.path)

    def load(self, on_disk: OnDisk, tensors: TensorFile) -> HostLora:
        self._record("load", on_disk.name)
        layers = parse_lora(on_disk.name, tensors).layers
        names = {
            x.prefix: name
            for name, x in layers.items()
            if name in self.present.shapes and not x.prefix.startswith(self.unread)
        }
        shapes = {name: self.present.shapes[name] for name in names.values()}
        of_text = {x.prefix for x in layers.values() if x.prefix.startswith(self.of_text)}
        return HostLora(on_disk, names, shapes, frozenset(of_text), dict(tensors.changed))

    def fuse(self, tags, loras, pair, te, apart) -> FakeFusion:
        self._record("fuse")
        assert set(loras) == {"content", "style"}
        assert loras["content"] is not loras["style"]
        layers = tuple(layer.name for layer in pair.paired)
        assert not loras["style"].parts
        return FakeFusion(tags, layers, dict(pair.unpaired), te, apart, loras["content"].parts)

    def follow(self, p) -> None:
        self._record("follow")

    def attach(self, fusion: FakeFusion, choice: np.ndarray) -> None:
        self.attached = fusion
        self.began_with.append(choice)
        self._record("attach", fusion)
        if set(self.applied) != {*fusion.layers, *fusion.unpaired}:
            self.applied = {**fusion.unpaired, **self._roles(fusion, choice)}

    def settle(self, fusion) -> None:
        assert fusion is self.attached, "settled without being attached"
        self._record("settle")

    def select(self, fusion: FakeFusion, choice: np.ndarray) -> None:
        self._record("select", choice.copy())
        assert fusion is self.attached, "selected without being attached"
        wanted = self._roles(fusion, choice)
        flips = {name: role for name, role in wanted.items() if self.applied[name] != role}
        self.applied |= flips
        self.rebuilt.append(len(flips))

    def check(self, fusion: FakeFusion) -> None:
        if self.fails_in == "check":
            raise KLoraError("Not all layers have it.")

    def recover(self) -> None:
        self._record("recover")

    def detach(self) -> None:
        self.asked.append(("detach",))
        self.attached = None
        self.applied = {}

    def abandon(self) -> None:
        self.asked.append(("abandon",))
        self.detach()

    @staticmethod
    def _roles(fusion: FakeFusion, choice: np.ndarray) -> dict[str, str]:
        """Layer → content, style, the two in the order of the tags, as “style+content”, or nothing
        for a layer that only the other file has."""
        layers = (*fusion.layers, *(fusion.unpaired if fusion.apart else ()))
        assert choice.shape == (len(layers),)
        assert choice.dtype == np.uint8
        assert ((choice >= 1) & (choice <= 3))[: len(fusion.layers)].all()
        order = [tag.role for tag in fusion.tags.in_order()]
        roles = ("+".join(role for role in order if bits & BITS[role]) for bits in choice)
        return dict(zip(layers, roles, strict=True))


class Processing:
    """What the session uses of a generation."""

    def __init__(self, **attributes) -> None:
        self.comments: dict[str, int] = {}
        self.extra_generation_params: dict[str, object] = {"Other": "stays"}
        self.is_hr_pass = False
        self.enable_hr = False
        vars(self).update(attributes)

    def comment(self, text: str) -> None:
        self.comments[text] = 1
