"""A LoRA file → its layers → ΔW.

Types that are read, with ΔW in the notation of their papers (scale = alpha / rank where the file
has an alpha, else 1):

======  =================================================  ====================================
LoRA    scale · B·A, conv layers flattened; CP: Σ M·B·A     ``lora_up``, ``lora_down``, ``lora_mid``
DoRA    as LoRA: compared on its B·A                        the same and ``dora_scale``
LoHa    scale · (B₁A₁) ⊙ (B₂A₂), CP form with ``hada_t…``   ``hada_w1_a`` …
LoKr    scale · W₁ ⊗ W₂, either factor decomposed or not    ``lokr_w1`` …
full    the difference itself                               ``diff``, ``w_norm``
======  =================================================  ====================================

A bias difference (``diff_b``, ``b_norm``, PEFT's ``lora_B.bias``) goes with its weight and does not
count in the scores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace

import torch

from .errors import KLoraError
from .families import CONTROLNET, BaseModel, Family
from .layer_names import bare_name, common_names, is_text_encoder

# Endings of the keys, each with the tensor's name in this module. The longer one first where one
# ends like another.
_ENDINGS = {
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".hada_w1_a": "hada_w1_a",
    ".hada_w1_b": "hada_w1_b",
    ".hada_w2_a": "hada_w2_a",
    ".hada_w2_b": "hada_w2_b",
    ".hada_t1": "hada_t1",
    ".hada_t2": "hada_t2",
    ".lokr_w1": "lokr_w1",
    ".lokr_w1_a": "lokr_w1_a",
    ".lokr_w1_b": "lokr_w1_b",
    ".lokr_w2": "lokr_w2",
    ".lokr_w2_a": "lokr_w2_a",
    ".lokr_w2_b": "lokr_w2_b",
    ".lokr_t2": "lokr_t2",
    ".diff": "diff",
    ".w_norm": "diff",
    ".diff_b": "bias",
    ".lora_B.bias": "bias",
    ".lora_B.default.bias": "bias",
    ".b_norm": "bias",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
}
_NAMED = re.compile(r"(.+)\.lora_([AB])\.([^.]+)\.weight")
"""As PEFT saves an adapter under its name; “default” is what it is called if nobody names it."""
# Beginnings of a key's last part, of types that WebUIs apply and K-LoRA cannot compare.
_OTHER_TYPES = {
    "oft_": "OFT",
    "boft_": "BOFT",
    "a1.": "GLoRA",
    "a2.": "GLoRA",
    "on_input": "IA³",
}


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of one file: the factors of its ΔW.

    Attributes:
        name: see ``layer_names``.
        prefix: the layer's name as the file spells it.
        kind: ``LoRA``, ``DoRA``, ``LoHa``, ``LoKr`` or ``full``.
        rank: what the file declares; None for ``full`` and an undecomposed LoKr.
        scale: alpha / rank.
        shape: shape of ΔW, [out, in] or [out, in, kh, kw].
        tensors: by their names in this module; read from the file when they are asked for, if that
            is what ``parse_lora`` was given.
    """

    name: str
    prefix: str
    kind: str
    rank: int | None
    scale: float
    shape: tuple[int, ...]
    tensors: Mapping[str, torch.Tensor] = field(repr=False, compare=False)

    @property
    def entries(self) -> int:
        """Number of entries of ΔW."""
        return torch.Size(self.shape).numel()

    def delta(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """ΔW in fp32 on ``device``, shape [out, in·kh·kw]."""
        factors = {
            name: tensor.to(device=device, dtype=torch.float32)
            for name, tensor in self.tensors.items()
            if name not in NOT_IN_DELTA
        }
        return _DELTAS[self.kind](factors).reshape(self.shape[0], -1) * self.scale

    def key_of(self, part: str) -> str:
        """What the file calls one of its tensors."""
        return self.tensors.key_of[part]

    def without_tensors(self) -> Layer:
        """The same layer without its factors; ``delta`` is not possible any more."""
        return replace(self, tensors=_NO_TENSORS)


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """Several parts of one fused parameter, seen as one layer (see ``pair``).

    Its rank is that of its largest part; its ΔW is theirs one under another.
    """

    name: str
    parts: tuple[Layer, ...]

    @property
    def rank(self) -> int | None:
        return max((part.rank for part in self.parts if part.rank is not None), default=None)

    @property
    def entries(self) -> int:
        return sum(part.entries for part in self.parts)

    def delta(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """ΔW in fp32, the parts' rows one under another, shape [sum of out, in]."""
        return torch.cat([part.delta(device) for part in self.parts])

    def without_tensors(self) -> FusedLayer:
        """The same layer without its parts' factors."""
        return replace(self, parts=tuple(part.without_tensors() for part in self.parts))


@dataclass(frozen=True, slots=True)
class LoraFile:
    """What a LoRA file holds.

    Attributes:
        name: as the person named it, for messages.
        layers: the layers of the denoising network by name.
        text_encoder: number of text encoder layers (they are applied, never compared).
        unread: key prefixes whose type this module cannot compare.
        family: of the network that it is for, as far as its names tell.
        notes: sentences on what is odd about it.
        others: the keys of tensors that are no part of a layer as this module reads it.
    """

    name: str
    layers: Mapping[str, Layer]
    text_encoder: int
    unread: tuple[str, ...]
    family: Family | None = None
    notes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def base_model(self) -> BaseModel:
        """What it was made for."""
        return BaseModel.of(self.family, {n: layer.shape for n, layer in self.layers.items()})


def parse_lora(name: str, tensors: Mapping[str, torch.Tensor]) -> LoraFile:
    """The layers of a file from its tensors.

    Raises KLoraError if nothing in it is a LoRA, if factors are missing or do not fit together, if
    no layer can be applied, or if a number is complex or not finite.
    """
    groups, unknown = _grouped(tensors)
    _require_one_adapter(name, tensors)
    odd = _Oddities(name)
    odd.unused = sorted(key for key in unknown if _belongs_to(key, groups))
    unread = list({_prefix_of_unknown(key) for key in set(unknown).difference(odd.unused)})
    layers: list[Layer] = []
    text_encoder = 0
    for prefix, keys in groups.items():
        if keys.keys() <= NOT_IN_DELTA:
            unread.append(prefix)
            continue
        parts = _Parts(tensors, keys)
        read = dict(parts)
        if read.keys().isdisjoint(_RANKED):
            # Unused, by the hosts too. It is infinite where a LoKr was given a rank too large for
            # fp16 to get undecomposed factors (LyCORIS, AI Toolkit).
            read.pop("alpha", None)
        _require_finite(name, prefix, read)
        if is_text_encoder(prefix):
            text_encoder += 1
            continue
        layer = _layer(name, prefix, read)
        if layer is None:
            odd.rank_zero.append(prefix)
        elif not _fits_dora_scale(layer.shape, read.get("dora_scale")):
            odd.dora_scale.append((layer, tuple(read["dora_scale"].shape)))
        else:
            if "magnitude" in keys:
                odd.magnitude.append(keys["magnitude"])
            if abs(layer.scale) > _HUGE:
                odd.alpha.append((layer, read["alpha"].item()))
            layers.append(replace(layer, tensors=parts))
    if not layers and not text_encoder:
        raise KLoraError(_sentence_of_no_lora(name, tensors, odd))
    unread = sorted(
        prefix for prefix in unread if not is_text_encoder(prefix) and prefix != "bundle_emb"
    )
    family, names = common_names(layer.prefix for layer in layers)
    named = (replace(layer, name=names[layer.prefix]) for layer in layers)
    return LoraFile(
        name,
        {x.name: x for x in named},
        text_encoder,
        tuple(unread),
        family,
        odd.notes(),
        tuple(unknown),
    )


NOT_IN_DELTA = {"alpha", "dora_scale", "magnitude", "bias"}
"""Tensors that are no part of ΔW."""
_RANKED = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Tensors with as many rows as the layer's rank. A LoKr may decompose both factors: like both
hosts, take the second one's rank then."""
_HUGE = 1e4
"""A scale that no trainer means. Full LoKr writes an alpha of 1e10 for “none” (LyCORIS)."""
_PIECE = 2**17
"""Entries that are looked at while a file is read, at a time."""
_NO_TENSORS: Mapping[str, torch.Tensor] = {}


@dataclass(frozen=True, slots=True)
class _Parts(Mapping[str, torch.Tensor]):
    """The tensors of one layer, asked of the file each time; ``key_of``: name here → its key."""

    file: Mapping[str, torch.Tensor]
    key_of: Mapping[str, str]

    def __getitem__(self, part: str) -> torch.Tensor:
        return self.file[self.key_of[part]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.key_of)

    def __len__(self) -> int:
        return len(self.key_of)


def _grouped(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Prefix → name of a tensor here → its key, and the keys that are none of these."""
    groups: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    for key in keys:
        prefix, part = split_key(key)
        if part is None:
            unknown.append(key)
        else:
            groups.setdefault(prefix, {})[part] = key
    return groups, unknown


def split_key(key: str) -> tuple[str, str | None]:
    """A key of a file → the layer's prefix and the tensor's name here, None for an unknown one."""
    for ending, part in _ENDINGS.items():
        if key.endswith(ending):
            return key[: -len(ending)], part
    named = _NAMED.fullmatch(key)
    if named:
        return named[1], {"A": "down", "B": "up"}[named[2]]
    return key, None


def _require_one_adapter(name: str, keys: Iterable[str]) -> None:
    adapters = {match[3] for match in map(_NAMED.fullmatch, keys) if match}
    if len(adapters) > 1:
        raise KLoraError(
            f"“{name}” holds several adapters ({', '.join(f'“{x}”' for x in sorted(adapters))}): "
            f"save one of them as a file of its own, or choose another file."
        )


def _belongs_to(key: str, groups: Mapping[str, object]) -> bool:
    """Whether an unknown tensor is a part of a layer that is read without it."""
    while "." in key:
        key = key.rpartition(".")[0]
        if key in groups:
            return True
    return False


def _prefix_of_unknown(key: str) -> str:
    if key.startswith("bundle_emb."):
        return "bundle_emb"
    return key.rsplit(".", 2)[0] if key.endswith(".weight") else key.rsplit(".", 1)[0]


def _fits_dora_scale(shape: tuple[int, ...], dora_scale: torch.Tensor | None) -> bool:
    """Whether a WebUI can multiply a weight of this shape by it, row by row or column by column."""
    if dora_scale is None:
        return True
    rows, columns, *kernel = shape if len(shape) > 1 else (*shape, 1)
    ones = (1,) * len(kernel)
    return tuple(dora_scale.shape) in {
        (columns,), (rows, 1), (1, columns), (rows, 1, *ones), (1, columns, *ones),
    }  # fmt: skip


@dataclass
class _Oddities:
    """What is odd about a file, as it is found."""

    file: str
    rank_zero: list[str] = field(default_factory=list)
    """Prefixes."""
    dora_scale: list[tuple[Layer, tuple[int, ...]]] = field(default_factory=list)
    """Layers that it does not fit, with its shape."""
    alpha: list[tuple[Layer, float]] = field(default_factory=list)
    magnitude: list[str] = field(default_factory=list)
    """Keys."""
    unused: list[str] = field(default_factory=list)
    """Keys."""

    def notes(self) -> tuple[str, ...]:
        """A sentence for each kind that there is."""
        notes = []
        if self.rank_zero:
            layers = _so_many(self.rank_zero, self.file, self.rank_zero[0])
            notes.append(f"{layers} {_have(self.rank_zero)} rank zero: left out.")
        if self.dora_scale:
            layer, shape = self.dora_scale[0]
            layers = _so_many(self.dora_scale, self.file, layer.prefix)
            notes.append(
                f"{layers} {_have(self.dora_scale)} a dora_scale of shape ({_times(shape)}), which "
                f"does not fit a weight of {_times(layer.shape)}: left out."
            )
        if self.alpha:
            layer, alpha = self.alpha[0]
            notes.append(
                f"{_so_many(self.alpha, self.file, layer.prefix)} {_have(self.alpha)} alpha "
                f"{alpha:g} at rank {layer.rank}, which makes ΔW {layer.scale:g} times as large: "
                f"if the picture is spoilt, choose another file."
            )
        if self.magnitude:
            notes.append(
                f"“{self.file}” is a DoRA as PEFT saves it: its magnitudes (such as "
                f"{self.magnitude[0]}) are not applied, by <lora:…> neither."
            )
        if self.unused:
            notes.append(
                f"{len(self.unused)} tensors of “{self.file}” (such as {self.unused[0]}) are not "
                f"used: the layers are applied without them, as by <lora:…>."
            )
        return tuple(notes)


def _so_many(layers: Sized, file: str, such_as: str) -> str:
    return f"{len(layers)} layer{'s' * (len(layers) > 1)} of “{file}” (such as {such_as})"


def _have(layers: Sized) -> str:
    return "have" if len(layers) > 1 else "has"


def _times(shape: Iterable[int]) -> str:
    return " × ".join(map(str, shape))


def _sentence_of_no_lora(name: str, keys: Collection[str], odd: _Oddities) -> str:
    """Why a file has no layer that could be used."""
    notes = odd.notes()
    if odd.rank_zero or odd.dora_scale:
        return f"“{name}” has no layer that can be applied: {notes[0]} Choose another file."
    if any(CONTROLNET.signs.match(bare_name(key)) for key in keys):
        return (
            f"“{name}” is for a ControlNet and changes nothing in the checkpoint: choose another "
            f"file."
        )
    for key in keys:
        for ending, kind in _OTHER_TYPES.items():
            if f".{ending}" in key:
                return (
                    f"“{name}” is of the type {kind}, whose layers K-LoRA cannot compare: use it "
                    f"as <lora:…>, or choose another file."
                )
    return (
        f"“{name}” is no LoRA that K-LoRA can read: none of its {len(keys)} tensors is part of a "
        f"LoRA, LoHa, LoKr or full difference. Choose another file."
    )


def _require_finite(name: str, prefix: str, parts: Mapping[str, torch.Tensor]) -> None:
    try:
        finite = all(map(_is_finite, parts.values()))
    except NotImplementedError as error:  # fp4, which torch can hold but not convert
        raise KLoraError(
            f"“{name}” holds numbers of a type that this PyTorch cannot compute with (first in "
            f"{prefix}): choose another file."
        ) from error
    if not finite:
        raise KLoraError(
            f"“{name}” holds NaN, infinite or complex numbers (first in {prefix}): the "
            f"training went wrong or the file is damaged, choose another file."
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.is_complex():
        return False
    if tensor.numel() > _PIECE:  # torch copies what it converts
        return all(map(_is_finite, tensor.flatten().split(_PIECE)))
    # A sum is finite only if every entry is: one pass.
    return math.isfinite(tensor.float().sum(dtype=torch.float64).item())


def _layer(name: str, prefix: str, parts: Mapping[str, torch.Tensor]) -> Layer | None:
    """None if its rank is zero."""

    def wrong(reason: str) -> KLoraError:
        return KLoraError(f"“{name}” is damaged: layer {prefix} {reason}. Choose another file.")

    empty = {part for part, tensor in parts.items() if tensor.numel() == 0}
    if empty & NOT_IN_DELTA:
        raise wrong(f"has no number in its {min(empty)}")
    if empty:
        return None
    kind = _kind(parts)
    if kind is None:
        raise wrong(f"is incomplete, it has only {', '.join(sorted(parts))}")
    try:
        rank = _rank(parts)
        alpha = parts["alpha"].item() if "alpha" in parts else None
        meta = {part: tensor.to("meta", torch.float32) for part, tensor in parts.items()}
        shape = tuple(_DELTAS[kind](meta).shape)
        if not shape:
            raise ValueError("ΔW has no dimensions")
    except (RuntimeError, IndexError, ValueError) as error:
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
        raise wrong(f"has factors that do not fit together ({shapes})") from error
    scale = alpha / rank if alpha is not None and rank is not None else 1.0
    return Layer(prefix, prefix, kind, rank, scale, shape, parts)


def _kind(parts: Mapping[str, torch.Tensor]) -> str | None:
    def has(factor: str) -> bool:
        return factor in parts or {f"{factor}_a", f"{factor}_b"} <= parts.keys()

    if {"up", "down"} <= parts.keys():
        return "LoRA" if parts.keys().isdisjoint(("dora_scale", "magnitude")) else "DoRA"
    if has("hada_w1") and has("hada_w2"):
        return "LoHa"
    if has("lokr_w1") and has("lokr_w2"):
        return "LoKr"
    return "full" if "diff" in parts else None


def _rank(parts: Mapping[str, torch.Tensor]) -> int | None:
    return next((parts[factor].shape[0] for factor in _RANKED if factor in parts), None)


def _delta_lora(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    up, down = parts["up"].flatten(1), parts["down"]
    if "mid" in parts:  # CP form: the core stands between a 1×1 down and a 1×1 up
        return _tucker(parts["mid"], up.T, down.flatten(1))
    return (up @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _delta_loha(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    def factor(i: int) -> torch.Tensor:
        a, b, core = parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}")
        return a @ b if core is None else _tucker(core, a, b)

    w1, w2 = factor(1), factor(2)
    if w1.shape != w2.shape:
        raise ValueError("the two halves differ in shape")
    return w1 * w2


def _delta_lokr(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    def factor(i: int) -> torch.Tensor:
        if f"lokr_w{i}" in parts:
            return parts[f"lokr_w{i}"]
        a, b, core = parts[f"lokr_w{i}_a"], parts[f"lokr_w{i}_b"], parts.get(f"lokr_t{i}")
        return a @ b if core is None else _tucker(core, a, b)

    w1, w2 = factor(1).contiguous(), factor(2).contiguous()  # kron needs it
    w1 = w1.reshape((*w1.shape, *[1] * (w2.dim() - w1.dim())))
    return torch.kron(w1, w2)


def _tucker(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if core.shape[:2] != (a.shape[0], b.shape[0]):  # einsum would repeat a core of rank 1
        raise ValueError("the core has other ranks")
    return torch.einsum("pqkl,po,qi->oikl", core, a, b)


_DELTAS = {
    "LoRA": _delta_lora,
    "DoRA": _delta_lora,
    "LoHa": _delta_loha,
    "LoKr": _delta_lokr,
    "full": lambda parts: parts["diff"],
}
