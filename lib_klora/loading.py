"""Two names → both files in the host's form, the pair of their layers and its scores.

Read and compared once, then kept in memory for the next generation, as the host keeps its own
LoRAs: what the latest pair needs, and nothing of a checkpoint that is no longer there.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .errors import KLoraError, get_log, no_such_lora
from .families import BaseModel, Family, family_of, is_attention
from .hosts import Fusion, Host, HostLora, OnDisk
from .lora_file import Layer, LoraFile, parse_lora
from .methods import METHODS
from .pair import Pair, pair_files
from .projection import project
from .score_cache import ScoreCache, file_sha256
from .scores import Scores, compute_scores
from .settings import Settings
from .tag import CONTENT, ROLES, STYLE, Tag, TagPair
from .tensor_file import TensorFile, read_or_raise

log = get_log()

_FUSIONS_KEPT = 4
"""Fusions only point at files that are kept anyway; a hires pass may alternate between two."""


@dataclass(frozen=True)
class LoadedPair:
    """Two LoRAs that fit the present model.

    Attributes:
        on_disk, loras: by role.
        pair: their layers, without tensors.
        scores: None if the method needs none.
        notes: what the person is to be told.
    """

    on_disk: Mapping[str, OnDisk]
    loras: Mapping[str, HostLora]
    pair: Pair
    scores: Scores | None
    notes: Sequence[str]

    @property
    def versions(self) -> tuple[tuple, ...]:
        """Of both files, content first."""
        return tuple(self.on_disk[role].version for role in ROLES)


@dataclass(frozen=True)
class _Network:
    """The present model's denoising network: ``layers`` as in ``Host.layers``."""

    layers: Mapping[str, tuple[int, ...]]
    family: Family | None

    @property
    def base_model(self) -> BaseModel:
        return BaseModel.of(self.family, self.layers)


class PairLoader:
    """Reads pairs for ``host``, and remembers them."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._model: Any = lambda: None
        """Weak reference to the model that everything in memory was read for."""
        self._loras: dict[tuple, HostLora] = {}
        self._pairs: dict[tuple, tuple[Pair, Scores | None, list[str]]] = {}
        self._projected: dict[tuple, tuple[HostLora, float | None, list[str]]] = {}
        """The content's file once more, taken off the style's row space; its overlap; notes."""
        self._fusions: dict[tuple, Fusion] = {}
        self._hashes: dict[tuple, str] = {}
        self._in_use: list[set] = []
        """Versions of the files of the latest pairs, the last one at the end."""
        self.score_cache = ScoreCache(host.cache_folder())

    def find(self, tags: TagPair) -> dict[str, OnDisk]:
        """Both files by role. Raises KLoraError for a name that the host does not know."""
        return {CONTENT: self._find(tags.content), STYLE: self._find(tags.style)}

    def load(
        self,
        on_disk: Mapping[str, OnDisk],
        settings: Settings,
        pairs_kept: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> LoadedPair:
        """Both files for the present model, paired, and compared if the method needs it.

        Args:
            on_disk: as from ``find``.
            pairs_kept: how many of the latest pairs, with this one, keep their files in memory.
            progress: of the comparison; None for the host's progress bar.

        Raises KLoraError where the two cannot be fused in this model.
        """
        self.forget_other_models()
        model = self._host.model()
        if model is None:
            raise KLoraError("No checkpoint is loaded: choose one, then try again.")
        self._model = weakref.ref(model)
        self._evict_others(pairs_kept, {entry.version for entry in on_disk.values()})
        versions = tuple(on_disk[role].version for role in ROLES)
        method = METHODS[settings.method]
        in_blocks = method.blocks is not None
        pair_key = (*versions, settings.layers, settings.top_k, settings.unpaired, in_blocks)
        projected_key = (*versions, settings.layers)
        known = self._pairs.get(pair_key)
        compares = method.compares and (known is None or known[1] is None)
        projects = method.projects and projected_key not in self._projected
        is_known = not (known is None or compares or projects)
        loras, files, read = {}, {}, {}
        # A host that keeps copies holds a file twice while reading it, so the larger one first.
        for role in sorted(ROLES, key=lambda role: -os.path.getsize(on_disk[role].path)):
            # One file in both roles is read twice: the host's record of it holds one weight.
            key = (on_disk[role].version, role == STYLE and versions[0] == versions[1])
            if not is_known or key not in self._loras:
                tensors = read[role] = self._host.read(on_disk[role])
                files[role] = parse_lora(on_disk[role].name, tensors)
                tensors.release()
                if key not in self._loras:
                    self._loras[key] = self._host.load(on_disk[role], tensors)
            loras[role] = self._loras[key]
        if not is_known:
            progress = progress or self._host.show_progress
            pair, notes = self._pair(loras, files, settings)
            scores = known and known[1]
            if compares:
                scores = self._scores(on_disk, pair, progress)
            if projects:
                self._projected[projected_key] = self._project(on_disk, read, pair, progress)
            known = self._pairs[pair_key] = pair.without_tensors(), scores, notes
        pair, scores, notes = known
        if method.projects:
            loras[CONTENT], overlap, told = self._projected[projected_key]
            pair, notes = replace(pair, overlap=overlap), [*notes, *told]
        return LoadedPair(on_disk, loras, pair, scores, notes)

    def fusion(self, tags: TagPair, loaded: LoadedPair, settings: Settings) -> Fusion:
        """The loaded pair as the host applies it, at the weights of the tags."""
        te, method = settings.with_text_encoder, METHODS[settings.method]
        kind = method.blocks is not None, method.projects, method.apart
        key = (*loaded.versions, tags, settings.layers, settings.unpaired, te, *kind)
        fusion = self._fusions.pop(key, None)
        if fusion is None:
            fusion = self._host.fuse(tags, loaded.loras, loaded.pair, te, method.apart)
        self._fusions[key] = fusion  # last in, so that the oldest goes first
        while len(self._fusions) > _FUSIONS_KEPT:
            del self._fusions[next(iter(self._fusions))]
        return fusion

    def forget_fusions(self) -> None:
        """What they have applied is not known any more."""
        self._fusions.clear()

    def forget_other_models(self) -> None:
        """Lets go of what was read for a checkpoint that is no longer the host's."""
        caches = self._loras, self._pairs, self._projected, self._fusions
        if any(caches) and self._model() is not self._host.model():
            for cache in caches:
                cache.clear()

    def _find(self, tag: Tag) -> OnDisk:
        entry = self._host.find(tag.name)
        if entry is None:
            raise KLoraError(no_such_lora(tag.name, self._host.lora_names()))
        return entry

    def _evict_others(self, pairs: int, wanted: set) -> None:
        """Lets go of all files but those of the latest ``pairs``, ``wanted`` among them."""
        self._in_use = [*(files for files in self._in_use if files != wanted), wanted][-pairs:]
        kept = set().union(*self._in_use)
        of_pairs = ((cache, 2) for cache in (self._pairs, self._projected, self._fusions))
        for cache, versions in ((self._loras, 1), *of_pairs):
            for key in [key for key in cache if not kept.issuperset(key[:versions])]:
                del cache[key]

    def _pair(
        self, loras: Mapping[str, HostLora], files: Mapping[str, LoraFile], settings: Settings
    ) -> tuple[Pair, list[str]]:
        """The layers of two files that the host can apply, and what to tell."""
        layers = self._host.layers()
        network = _Network(layers, family_of(layers))
        method = METHODS[settings.method]
        wanted, present = method.model, network.base_model
        if wanted and (network.family is not wanted.family or present.excludes(wanted)):
            raise KLoraError(
                f"{settings.method} is for {wanted}, and the checkpoint is {present}: choose "
                f"another checkpoint or method."
            )
        fitting, notes = {}, []
        for role in ROLES:
            fitting[role], told = _fit(files[role], loras[role], network, settings.layers)
            notes += told
        pair = pair_files(
            fitting[CONTENT],
            fitting[STYLE],
            layers=settings.layers,
            top_k=settings.top_k,
            unpaired=settings.unpaired,
            network=network.family,
            blocks=method.blocks,
        )
        for note in pair.notes:
            log.info(note)
        return pair, [*notes, *pair.warnings]

    def _scores(
        self, on_disk: Mapping[str, OnDisk], pair: Pair, progress: Callable[[int, int], None]
    ) -> Scores:
        return compute_scores(
            pair,
            self._host.device(),
            progress=progress,
            cache=self.score_cache,
            sha256=tuple(self._sha256(on_disk[role]) for role in ROLES),
        )

    def _project(
        self,
        on_disk: Mapping[str, OnDisk],
        read: Mapping[str, TensorFile],
        pair: Pair,
        progress: Callable[[int, int], None],
    ) -> tuple[HostLora, float | None, list[str]]:
        """The content's file as the host has it once it is taken off the style's row space, the
        overlap of the two, and what to tell."""
        projection = project(pair, progress)
        content, tensors = on_disk[CONTENT], read[CONTENT]
        tensors.release()
        tensors.changed = projection.changed
        notes = projection.notes(content.name, on_disk[STYLE].name)
        return self._host.load(content, tensors), projection.overlap, notes

    def _sha256(self, on_disk: OnDisk) -> str:
        """Of the whole file: the hosts' own hash leaves out its header, which names the layers."""
        if on_disk.version not in self._hashes:
            self._hashes[on_disk.version] = read_or_raise(on_disk.path, file_sha256, on_disk.path)
        return self._hashes[on_disk.version]


def _fit(
    file: LoraFile, lora: HostLora, network: _Network, layers: str
) -> tuple[LoraFile, list[str]]:
    """The file with the layers that the host can apply to the present model, by the host's names,
    and what to tell. ``layers`` is the setting of that name.

    Raises KLoraError if that is less than half of all, or of those in scope.
    """
    fitting: dict[str, Layer] = {}
    missing: list[Layer] = []
    for layer in file.layers.values():
        if layer.prefix in lora.text_encoder:
            continue
        name = lora.names.get(layer.prefix, "")
        if _has_shape(layer, lora.shapes.get(name)):
            fitting[name] = replace(layer, name=name)
        else:
            missing.append(layer)
    in_scope = [x for x in missing if layers == "all" or is_attention(x.name, file.family)]
    of_scope = sum(layers == "all" or is_attention(name, network.family) for name in fitting)
    if len(missing) > len(fitting) or len(in_scope) > of_scope:
        raise KLoraError(_sentence_of_misfit(file, missing, len(fitting), network))
    notes = list(file.notes)
    if file.base_model.excludes(network.base_model):
        notes.append(
            f"“{file.name}” was made for {file.base_model}, and the checkpoint is "
            f"{network.base_model}: {len(fitting)} of its {len(fitting) + len(missing)} layers fit."
        )
    if in_scope:
        prefixes = [layer.prefix for layer in in_scope]
        notes.append(_left_out(file, prefixes, "does not fit", "do not fit", "this model"))
    if file.unread:
        what = "of a type that K-LoRA cannot compare"
        notes.append(_left_out(file, file.unread, "is", "are", what))
    return replace(file, layers=fitting), notes


def _has_shape(layer: Layer, shape: tuple[int, ...] | None) -> bool:
    """Whether a layer's ΔW belongs to a weight of this shape; that of a conv may be flattened."""
    return (
        shape is not None
        and shape[0] == layer.shape[0]
        and torch.Size(shape).numel() == layer.entries
    )


_READ_BY_ALL = re.compile("lora_unet_(?!_|unet_)")
"""The beginning of names that every WebUI reads."""


def _sentence_of_misfit(
    file: LoraFile, missing: Sequence[Layer], fitting: int, network: _Network
) -> str:
    """What to tell of a file of which only so many layers are ``fitting``, and why that is."""
    of_all = f"{fitting} of its {fitting + len(missing)} layers"
    unread = [layer for layer in missing if _has_shape(layer, network.layers.get(layer.name))]
    if len(unread) > len(missing) / 2:
        if file.others and all(_READ_BY_ALL.match(layer.prefix) for layer in unread):
            return (
                f"“{file.name}” is for this model, but this WebUI drops the whole file for the "
                f"{len(file.others)} tensors in it that are no part of a layer (such as "
                f"{file.others[0]}). Write it anew without them: “python -m lib_klora convert "
                f"--only-layers FILE OUT” in the extension's folder, or choose another file."
            )
        return (
            f"“{file.name}” is for this model, but its layer names are in a spelling that this "
            f"WebUI does not read (such as {unread[0].prefix}, {of_all} are read). Write it anew: "
            f"“python -m lib_klora convert FILE OUT” in the extension's folder, or choose another "
            f"file."
        )
    one, other = file.base_model, network.base_model
    if one.excludes(other):
        return (
            f"“{file.name}” does not fit this model: it was made for {one}, the checkpoint is "
            f"{other}, and {of_all} fit. Choose a LoRA for {other}, or a checkpoint for this one."
        )
    return (
        f"“{file.name}” does not fit this model: {of_all} fit, and the others (such as "
        f"{missing[0].prefix}) have no counterpart that this WebUI can apply them to. Choose "
        f"another file or checkpoint."
    )


def _left_out(file: LoraFile, prefixes: Sequence[str], one: str, more: str, why: str) -> str:
    """What to tell of these layers; ``one`` and ``more`` are the verb before ``why``."""
    such = f"of “{file.name}” (such as {prefixes[0]})"
    if len(prefixes) == 1:
        return f"1 layer {such} {one} {why} and is left out."
    return f"{len(prefixes)} layers {such} {more} {why} and are left out."
