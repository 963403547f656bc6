"""Every setting, in one table that drives the page, the API, the infotext and the documentation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from . import klora
from .errors import KLoraError, short
from .methods import METHODS


@dataclass(frozen=True)
class Field:
    """One setting.

    Attributes:
        name: in the API, the infotext and ``Settings``.
        label: what a person sees.
        help: one plain sentence.
        default: the paper's value; None where it depends on another field.
        choices: the allowed words, for a word.
        low, high: the allowed range of a number, both inclusive; ``above`` excludes ``low``,
            ``whole`` excludes fractions.
        slider: range and step that the page offers; the API allows low..high. None: a number field.
        per_pair: names one pair of files, so it has no default on the Settings page.
    """

    name: str
    label: str
    help: str
    default: bool | int | float | str | None
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    whole: bool = False
    slider: tuple[float, float, float] | None = None
    per_pair: bool = False

    @property
    def of_hires(self) -> bool:
        """Whether it concerns the hires pass alone, which img2img does not have."""
        return self.name.startswith("hires")


NO_LORA = "None (use tags)"
"""What a person picks instead of a LoRA; to ``Settings`` it is the empty name."""

SCALES = ("S", "S*", "share", "none")
"""The paper's two, ours (methods.largest_share), and the ablation."""

FIELDS = (
    Field(
        "enabled",
        "K-LoRA",
        "Use these settings. Off: two <klora:…> tags in the prompt still work, with the defaults "
        "from the Settings page.",
        True,
        per_pair=True,
    ),
    Field(
        "alpha",
        "α: slope",
        "How fast it moves from subject to style: higher means more style, sooner.",
        klora.ALPHA,
        low=0,
        high=1e10,
        slider=(0, 4, 0.05),
    ),
    Field(
        "beta",
        "β: start",
        "Where it starts: lower means more subject.",
        None,
        low=0,
        high=1e10,
        slider=(0, 4, 0.05),
    ),
    Field(
        "scale",
        "Scale S(t)",
        "S: subject, then style. S*: style, subject, style. share: the layers turn to style one "
        "after another, from one share to the other, in every pair. none: no change.",
        "S",
        choices=SCALES,
    ),
    Field(
        "method",
        "Method",
        "How the two LoRAs are fused. "
        + " ".join(f"{name}: {method.help}." for name, method in METHODS.items()),
        "K-LoRA",
        choices=tuple(METHODS),
    ),
    Field(
        "layers",
        "Layers",
        "attention: the layers of the paper, everything else in the files is left out. all: every "
        "layer that the files have.",
        "attention",
        choices=("attention", "all"),
    ),
    Field(
        "gamma",
        "γ: balance",
        "Evens out files of different strength. paper: ratio of the sums (Eq. 9). authors: mean of "
        "the layers' ratios, as in the authors' program.",
        "paper",
        choices=("paper", "authors"),
    ),
    Field(
        "top_k",
        "K multiplier",
        "Multiplies K = rank × rank, the number of entries that decide a layer.",
        1.0,
        low=0,
        high=1e10,
        above=True,
        slider=(0.05, 8, 0.05),
    ),
    Field(
        "unpaired",
        "Layers of one file",
        "A layer that only one file has: keep its change all the time, or drop it.",
        "keep",
        choices=("keep", "drop"),
    ),
    Field(
        "text_encoder",
        "Text encoder",
        "Apply both files' text encoder parts, as <lora:…> does.",
        True,
    ),
    Field(
        "progress",
        "Hires and img2img",
        "continue: start where the denoising strength starts. restart: start from the subject "
        "again.",
        "continue",
        choices=("continue", "restart"),
    ),
    Field(
        "content",
        "Content LoRA",
        "The subject's LoRA by name, instead of a tag in the prompt.",
        "",
        per_pair=True,
    ),
    Field(
        "style",
        "Style LoRA",
        "The style's LoRA by name, instead of a tag in the prompt.",
        "",
        per_pair=True,
    ),
    Field(
        "content_weight",
        "Content weight",
        "Weight of the content LoRA named here.",
        1.0,
        slider=(-2, 2, 0.05),
        per_pair=True,
    ),
    Field(
        "style_weight",
        "Style weight",
        "Weight of the style LoRA named here.",
        1.0,
        slider=(-2, 2, 0.05),
        per_pair=True,
    ),
    Field(
        "hires",
        "Hires pass",
        "as first pass: the scale, α and β above. own: those below.",
        "as first pass",
        choices=("as first pass", "own"),
    ),
    Field(
        "hires_scale",
        "Hires scale",
        "As Scale S(t), for the hires pass.",
        "S",
        choices=SCALES,
    ),
    Field(
        "hires_alpha",
        "Hires α: slope",
        "As α, for the hires pass.",
        klora.ALPHA,
        low=0,
        high=1e10,
        slider=(0, 4, 0.05),
    ),
    Field(
        "hires_beta",
        "Hires β: start",
        "As β, for the hires pass.",
        None,
        low=0,
        high=1e10,
        slider=(0, 4, 0.05),
    ),
    Field(
        "seed",
        "Selection seed",
        "Seed of Random selection: the same number repeats the selection. The picture has its own "
        "seed.",
        0,
        low=0,
        high=1e9,
        whole=True,
    ),
    Field(
        "share_start",
        "Share at the start",
        "With the scale “share”: percentage of the layers that get the subject in the first step.",
        100.0,
        low=0,
        high=100,
        slider=(0, 100, 1),
    ),
    Field(
        "share_end",
        "Share at the end",
        "With the scale “share”: percentage of the layers that still get the subject in the end.",
        0.0,
        low=0,
        high=100,
        slider=(0, 100, 1),
    ),
    Field(
        "hires_share_start",
        "Hires share at the start",
        "As Share at the start, for the hires pass.",
        100.0,
        low=0,
        high=100,
        slider=(0, 100, 1),
    ),
    Field(
        "hires_share_end",
        "Hires share at the end",
        "As Share at the end, for the hires pass.",
        0.0,
        low=0,
        high=100,
        slider=(0, 100, 1),
    ),
)
BY_NAME = {field.name: field for field in FIELDS}
_OF_HIRES = {
    name: f"hires_{name}" for name in ("scale", "alpha", "beta", "share_start", "share_end")
}
"""A field of the schedule → the one for the hires pass."""


@dataclass(frozen=True)
class Settings:
    """What one generation uses; checked where it is made (KLoraError names the field)."""

    enabled: bool = True
    alpha: float = klora.ALPHA
    beta: float | None = None
    scale: str = "S"
    method: str = "K-LoRA"
    layers: str = "attention"
    gamma: str = "paper"
    top_k: float = 1.0
    unpaired: str = "keep"
    text_encoder: bool = True
    progress: str = "continue"
    content: str = ""
    style: str = ""
    content_weight: float = 1.0
    style_weight: float = 1.0
    hires: str = "as first pass"
    hires_scale: str = "S"
    hires_alpha: float = klora.ALPHA
    hires_beta: float | None = None
    seed: int = 0
    share_start: float = 100.0
    share_end: float = 0.0
    hires_share_start: float = 100.0
    hires_share_end: float = 0.0

    def __post_init__(self) -> None:
        for field in FIELDS:
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))
        if self.beta is None:
            object.__setattr__(self, "beta", default_beta(self.scale))
        if self.scale == "S*" and self.alpha == 0:
            raise KLoraError("alpha is 0, but S* wraps around at alpha: set alpha above 0, or S.")
        if self.hires == "as first pass":  # what is not used makes no difference
            for name in _OF_HIRES.values():
                object.__setattr__(self, name, BY_NAME[name].default)
        elif self.hires_beta is None:
            object.__setattr__(self, "hires_beta", default_beta(self.hires_scale))
        if self.hires_scale == "S*" and self.hires_alpha == 0:
            raise KLoraError(
                "hires_alpha is 0, but S* wraps around at alpha: set it above 0, or S."
            )

    @property
    def with_text_encoder(self) -> bool:
        """Whether the text encoder parts are applied."""
        return self.text_encoder and METHODS[self.method].blocks is None

    def start(self, t0: float) -> float:
        """Progress at which a pass starts that the host starts at ``t0``."""
        return t0 if self.progress == "continue" else 0.0

    def for_hires(self) -> Settings:
        """These settings, as the hires pass uses them."""
        if self.hires == "as first pass":
            return self
        return replace(self, **{name: getattr(self, own) for name, own in _OF_HIRES.items()})

    def changed(self) -> dict[str, Any]:
        """The fields that differ from the defaults, in the table's order."""
        default = Settings(scale=self.scale, hires=self.hires, hires_scale=self.hires_scale)
        values = {k: v for k, v in asdict(self).items() if v != getattr(default, k)}
        for name in ("scale", "hires", "hires_scale"):
            if getattr(self, name) != BY_NAME[name].default:
                values[name] = getattr(self, name)
        return {field.name: values[field.name] for field in FIELDS if field.name in values}


def default_beta(scale: str) -> float:
    """β of the paper: 0.5 for S, 1.3 for S* (Eq. 12); unused for none."""
    return klora.BETA_S_STAR if scale == "S*" else klora.BETA


def from_fields(values: Mapping[str, Any]) -> Settings:
    """Settings from named fields, as the API's object. Missing fields have the paper's defaults.

    Raises KLoraError for an unknown field, a wrong type or a value out of range.
    """
    unknown = [name for name in values if name not in BY_NAME]
    if unknown:
        named = ", ".join(f"“{name}”" for name in unknown[:5]) + " …" * (len(unknown) > 5)
        raise KLoraError(f"K-LoRA has no field {named}: the fields are {', '.join(BY_NAME)}.")
    return Settings(**values)


def from_args(args: Sequence[Any]) -> Settings | None:
    """Settings from what the host passes to the script: the positional values in the order of
    FIELDS, or one object of named fields in the first place. None while the accordion is off.
    """
    if args and isinstance(args[0], Mapping):
        settings = from_fields(args[0])
        return settings if settings.enabled else None
    if not args or args[0] is False:
        return None
    return from_fields(dict(zip(BY_NAME, args, strict=False)))


def checked(field: Field, value: Any) -> Any:
    """``value`` as the field's type. Raises KLoraError that names the field; a number must not be
    a bool, nor a bool a number."""

    written = value

    def wrong(allowed: str) -> KLoraError:
        return KLoraError(f"{field.name} is {short(repr(written))}: it must be {allowed}.")

    if field.choices:
        if value not in field.choices:
            raise wrong("one of " + ", ".join(field.choices))
        return value
    if isinstance(field.default, bool):
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if isinstance(field.default, str):
        if value is None or value == NO_LORA:
            return ""
        if not isinstance(value, str):
            raise wrong("the name of a LoRA")
        return value
    if value is None and field.default is None:
        return None
    above = f"above {field.low:g}" if field.above else f"from {field.low:g}"
    span = "" if math.isinf(field.high) else f" {above} to {field.high:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong(f"a finite number{span}")
    try:
        value = float(value)
    except OverflowError:  # JSON has integers of any length
        value = math.inf
    if not math.isfinite(value):
        raise wrong(f"a finite number{span}")
    outside = not field.low <= value <= field.high or (field.above and value == field.low)
    if outside or (field.whole and not value.is_integer()):
        raise wrong(f"a {'whole ' * field.whole}number{span}")
    return int(value) if field.whole else value
