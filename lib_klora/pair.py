"""Two files, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from . import klora
from .errors import KLoraError
from .families import Block, Family, is_attention
from .lora_file import FusedLayer, Layer, LoraFile
from .tag import CONTENT, ROLES, STYLE

DEFAULT_RANK = 16
"""r_c = r_s where neither file declares a rank for a layer (full against full): the middle of
what people train. K is then 256, small beside any attention layer's entries."""


@dataclass(frozen=True, slots=True)
class LayerPair:
    """One layer that both files have: ``content`` and ``style`` are its two ΔW, ``k`` is K."""

    name: str
    content: Layer | FusedLayer
    style: Layer | FusedLayer
    k: int


@dataclass(frozen=True)
class Pair:
    """The layers in scope of two files.

    Attributes:
        paired: the layers K-LoRA chooses for, by name order.
        unpaired: layer → the one role that has it and keeps it all the time.
        notes: sentences worth telling: what did not match, and why.
        warnings: sentences that a person has to know.
        overlap: with NP-LoRA, the part of the content's energy that lies in the style's row space,
            0..1; None for other methods, and where nothing could be projected.
    """

    paired: tuple[LayerPair, ...]
    unpaired: Mapping[str, str]
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    overlap: float | None = None

    def without_tensors(self) -> Pair:
        """The same pair without the files' tensors, to be kept once the scores are known."""
        return replace(
            self,
            paired=tuple(
                replace(
                    layer,
                    content=layer.content.without_tensors(),
                    style=layer.style.without_tensors(),
                )
                for layer in self.paired
            ),
        )


def pair_files(
    content: LoraFile,
    style: LoraFile,
    *,
    layers: str = "attention",
    top_k: float = 1.0,
    unpaired: str = "keep",
    network: Family | None = None,
    blocks: Mapping[str, Block] | None = None,
) -> Pair:
    """Joins two files by the layers' names; the arguments are the settings of that name.

    Where both split a fused parameter into parts, each part is a layer of its own; where one has it
    whole, the whole parameter is the layer. Layers of one name whose ΔW cannot belong to one
    parameter are left out.

    Args:
        network: the family of the model, if there is one; else each file's own.
        blocks: role → the only block in which that file is applied (B-LoRA): a layer that both have
            counts if it is in either of them, one that only one file has if it is in that file's.

    Raises KLoraError if most common layers are like that, if the files are for different base
    models, or no layer is left.
    """
    in_scope = [
        {
            name: layer
            for name, layer in file.layers.items()
            if layers == "all" or is_attention(name, network or file.family)
        }
        for file in (content, style)
    ]
    for file, scope in zip((content, style), in_scope, strict=True):
        if not scope:
            raise KLoraError(_sentence_of_no_layer(file, "attention " * (layers == "attention")))
    notes, warnings = [], []
    if blocks is not None:
        in_scope, note, warning = _in_blocks(in_scope, (content, style), blocks)
        notes.append(note)
        warnings += warning
    c, s = _whole_where_one_is(*in_scope)
    common = sorted(c.keys() & s.keys())
    different = {name for name in common if not _fit_one_parameter(c[name], s[name])}
    if network is None and 2 * (len(common) - len(different)) < min(len(c), len(s)):
        _require_one_base_model(content, style)
    if layers == "attention" and not (network or content.family or style.family):
        warnings.append(
            f"K-LoRA does not know this network: the {len(c.keys() | s.keys())} layers with "
            f"attention in their names were taken to be its attention."
        )
    if different:
        notes.append(_sentence_of_shapes(content, style, min(different), len(different), common))
    paired = tuple(
        _layer_pair(name, c[name], s[name], top_k) for name in common if name not in different
    )
    without_rank = sum(x.content.rank is None and x.style.rank is None for x in paired)
    if without_rank:
        notes.append(
            f"{_layers(without_rank, 'has', 'have')} no rank in either file; K was computed as "
            f"if both had rank {DEFAULT_RANK}."
        )
    alone = dict.fromkeys(c.keys() - s.keys(), CONTENT)
    alone |= dict.fromkeys(s.keys() - c.keys(), STYLE)
    alone = {
        name: role
        for name, role in alone.items()
        if blocks is None or name.startswith(blocks[role].beginning)
    }
    for role, file in ((CONTENT, content), (STYLE, style)):
        count = sum(only == role for only in alone.values())
        if count:
            notes.append(f"{_layers(count, 'is', 'are')} only in “{file.name}” ({unpaired}).")
    if unpaired == "drop":
        alone = {}
    if not paired:
        sentence = _sentence_of_nothing_in_common(content, style, bool(alone))
        if blocks is None:  # two B-LoRAs are like that
            warnings.append(sentence)
    return Pair(paired, dict(sorted(alone.items())), tuple(notes), tuple(warnings))


def _layer_pair(
    name: str, content: Layer | FusedLayer, style: Layer | FusedLayer, top_k: float
) -> LayerPair:
    r_c = content.rank or style.rank or DEFAULT_RANK
    r_s = style.rank or content.rank or DEFAULT_RANK
    k = klora.top_k(r_c, r_s, min(content.entries, style.entries), top_k)
    return LayerPair(name, content, style, k)


def _whole_where_one_is(
    content: Mapping[str, Layer], style: Mapping[str, Layer]
) -> tuple[dict[str, Layer | FusedLayer], dict[str, Layer | FusedLayer]]:
    """Joins a file's parts of a fused parameter wherever the other file has it whole, or has q, k
    and v in one."""
    names = content.keys() | style.keys()
    joined = []
    for layers in (content, style):
        result: dict[str, Layer | FusedLayer] = {}
        parts: dict[str, list[Layer]] = {}
        for name, layer in layers.items():
            fused = next((larger for larger in _larger(name) if larger in names), None)
            if fused is not None:
                parts.setdefault(fused, []).append(layer)
            else:
                result[name] = layer
        for fused, members in parts.items():
            if fused not in result:  # a file that has both gets its whole one
                members.sort(key=lambda layer: layer.name)
                result[fused] = FusedLayer(fused, tuple(members))
        joined.append(result)
    return joined[0], joined[1]


def _in_blocks(
    in_scope: Sequence[Mapping[str, Layer]],
    files: Sequence[LoraFile],
    blocks: Mapping[str, Block],
) -> tuple[list[dict[str, Layer]], str, list[str]]:
    """The layers of these blocks in both files, a note on what is left out, and what to tell of a
    file that has none of its own block.

    Raises KLoraError if neither file has.
    """
    either = tuple(block.beginning for block in blocks.values())
    inside, empty, left_out = [], [], []
    for role, file, scope in zip(ROLES, files, in_scope, strict=True):
        inside.append({name: x for name, x in scope.items() if name.startswith(either)})
        own = sum(name.startswith(blocks[role].beginning) for name in scope)
        left_out.append(len(file.layers) - own)
        if not own:
            empty.append((role, file))
    (one, other), (first, second) = files, (blocks[role].name for role in ROLES)
    if len(empty) == 2:
        raise KLoraError(
            f"“{one.name}” has no layer in {first}, nor “{other.name}” in {second}, and B-LoRA "
            f"applies nothing else: swap the two if they are the wrong way round, or choose "
            f"another method."
        )
    warnings = [
        f"“{file.name}” has no layer in {blocks[role].name}, and B-LoRA applies nothing else of "
        f"the {role} LoRA: swap the two if they are the wrong way round, or choose another file."
        for role, file in empty
    ]
    note = (
        f"B-LoRA applies {first} of “{one.name}” and {second} of “{other.name}”: {left_out[0]} and "
        f"{left_out[1]} other layers are left out"
        f"{', so are the text encoder parts' * any(file.text_encoder for file in files)}."
    )
    return inside, note, warnings


def _larger(name: str) -> list[str]:
    """The names of what a part may be a part of, the largest first."""
    parameter, _, part = name.partition("/")
    return [
        *([parameter] if part else []),
        *([f"{parameter}/qkv"] if part in ("q", "k", "v") else []),
    ]


def _require_one_base_model(content: LoraFile, style: LoraFile) -> None:
    """Raises KLoraError if the files tell that no model can have both."""
    one, other = content.base_model, style.base_model
    if one.excludes(other):
        raise KLoraError(
            f"“{content.name}” was made for {one} and “{style.name}” for {other}, so no model can "
            f"have both: choose another file."
        )


def _fit_one_parameter(content: Layer | FusedLayer, style: Layer | FusedLayer) -> bool:
    """Whether both ΔW can belong to one parameter; that of a conv layer may be flattened.

    Parts do not tell the size of the whole parameter: a file may have only some of them.
    """
    if isinstance(content, FusedLayer) or isinstance(style, FusedLayer):
        return True
    return content.shape[0] == style.shape[0] and content.entries == style.entries


def _sentence_of_no_layer(file: LoraFile, kind: str) -> str:
    """What to tell of a file without a layer in scope; ``kind`` is which those are."""
    if file.layers:
        advice = "choose another file, or layers “all” to fuse what it has."
    elif file.unread:
        advice = "choose another file."
    else:
        advice = "it changes the text encoder only, use it as <lora:…>."
    readable = " of a type that K-LoRA can compare" if file.unread else ""
    return f"“{file.name}” has no {kind}layer{readable}, so there is nothing to fuse: {advice}"


def _sentence_of_nothing_in_common(content: LoraFile, style: LoraFile, applied: bool) -> str:
    """What to tell of two files without a common layer. Raises KLoraError if no layer of either is
    ``applied``."""
    words = f"“{content.name}” and “{style.name}” have no layer in common"
    if not applied:
        raise KLoraError(
            f"{words}, and unpaired layers are dropped: choose “keep”, or another file."
        )
    return f"{words}, so there is nothing to choose: both are applied all the time."


def _sentence_of_shapes(
    content: LoraFile, style: LoraFile, such_as: str, different: int, common: Sequence[str]
) -> str:
    """What to tell of so many layers that do not fit one parameter, out of the ``common`` ones.

    Raises KLoraError if they are most of them.
    """
    one, other = (file.layers[such_as] for file in (content, style))
    words = (
        f"“{content.name}” and “{style.name}” differ in the shape of {different} of {len(common)} "
        f"common layers (such as {one.prefix}: {_shape(one)} and {_shape(other)})"
    )
    if different > len(common) / 2:
        raise KLoraError(
            f"{words}: they were made for different kinds of model, choose another file."
        )
    return f"{words}, which are left out: check that both were made for the same kind of model."


def _shape(layer: Layer) -> str:
    return " × ".join(map(str, layer.shape))


def _layers(count: int, one: str, more: str) -> str:
    """“1 layer is” or “2 layers are”."""
    return f"1 layer {one}" if count == 1 else f"{count} layers {more}"
