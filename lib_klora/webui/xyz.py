"""The settings as axes of the host's X/Y/Z plot: xyz_grid.py, in scripts or in an extension of its
own (extensions-builtin/xyz)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modules import scripts

from ..errors import KLoraError
from ..settings import BY_NAME, Field, checked
from .controls import LORAS
from .overrides import override
from .prompt import tags_of

AXES = (
    "method", "scale", "alpha", "beta", "top_k", "gamma", "layers", "seed", "content_weight",
    "style_weight", "content", "style", "share_start", "share_end",
)  # fmt: skip
_OF_PAIR = ("content", "style", "content_weight", "style_weight")


def add_axes(host: Any) -> None:
    """Adds the axes to the plot's list. Without that script there is nothing to add to."""
    for data in scripts.scripts_data:
        if Path(data.path).name == "xyz_grid.py" and hasattr(data.module, "axis_options"):
            for name in AXES:
                data.module.axis_options.append(_axis(data.module, BY_NAME[name], host))
            return


def _axis(xyz: Any, field: Field, host: Any) -> Any:
    def apply(p: Any, value: Any, _) -> None:
        override(p, **{field.name: value})

    def confirm(p: Any, values: list) -> None:
        """Raises before the first image; the host shows the sentence."""
        try:
            for value in values:
                checked(field, value)
            _check_pair(p, field, values, host)
        except KLoraError as error:
            raise RuntimeError(f"K-LoRA: {error}") from error

    choices = None
    if field.name in LORAS:
        choices = host.lora_names
    elif field.choices:
        choices = lambda: list(field.choices)  # noqa: E731
    kind = int if field.whole else float
    if field.choices or field.name in LORAS:
        kind = str
    return xyz.AxisOption(
        f"[K-LoRA] {field.label}",
        kind,
        apply,
        confirm=confirm,
        cost=0.5 if field.name in LORAS else 0.0,
        choices=choices,
    )


def _check_pair(p: Any, field: Field, values: list, host: Any) -> None:
    if field.name not in _OF_PAIR:
        return
    if tags_of(str(p.prompt), p.styles or []):
        raise KLoraError(
            f"the axis {field.label} has no effect beside <klora:…> tags: take them out of the "
            f"prompt, or plot with Prompt S/R."
        )
    for value in values:
        if field.name in LORAS and host.find(value) is None:
            raise KLoraError(f"there is no LoRA “{value}”: check the spelling.")
