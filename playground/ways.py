"""The ways that are compared: the paper's Table 1 and its ablations in small, our schedule, and
later rules."""

from __future__ import annotations

from fractions import Fraction

from lib_klora.methods import METHODS
from lib_klora.settings import Settings

from .scores import Way

_OFF = Settings(enabled=False)
ALONE_TAGS = {"content": "<lora:{content}:1>", "style": "<lora:{style}:1>"}
ALONE = tuple(Way(f"{role} LoRA alone", tags, _OFF) for role, tags in ALONE_TAGS.items())
K_LORA = Way("K-LoRA, S")
K_LORA_STAR = Way("K-LoRA, S*", settings=Settings(scale="S*"))
K_LORA_SHARE = Way("K-LoRA, share", settings=Settings(scale="share"))
OURS = (K_LORA, K_LORA_STAR, K_LORA_SHARE)
DIRECT = Way("Direct merge 1:1", settings=Settings(method="Direct merge"))
NOT_HERE = ("K-LoRA", "Direct merge", "B-LoRA")
"""Methods that have lines of their own, or that need SDXL."""
OTHERS = (
    DIRECT,
    Way("Direct merge 1:2", "<klora:{content}:0.5> <klora:{style}:1>", DIRECT.settings),
    Way("Direct merge ½:½", "<klora:{content}:0.5> <klora:{style}:0.5>", DIRECT.settings),
    *(Way(name, settings=Settings(method=name)) for name in METHODS if name not in NOT_HERE),
)
METHOD_WAYS = (*ALONE, *OTHERS, *OURS)

ALPHAS, BETAS = (1.0, 1.5, 2.0), (0.0, 0.25, 0.5, 0.75)
GRID = {
    (alpha, beta): Way(f"α {alpha:g}, β {beta:g}", settings=Settings(alpha=alpha, beta=beta))
    for alpha in ALPHAS
    for beta in BETAS
}
STARTS, ENDS = (100.0, 80.0, 60.0), (60.0, 30.0, 0.0)
SHARES = {
    (start, end): Way(
        f"share {start:g} % to {end:g} %",
        settings=Settings(scale="share", share_start=start, share_end=end),
    )
    for start in STARTS
    for end in ENDS
}
MULTIPLIERS = {
    k: Way(f"K × {k}", settings=Settings(top_k=float(k)))
    for k in (Fraction(1, 64), Fraction(1, 8), Fraction(1), Fraction(8), Fraction(64))
}
STEP_COUNTS = {n: Way(f"{n} steps", steps=n) for n in (10, 20, 30, 50)}
GAMMAS = {g: Way(f"γ: {g}", settings=Settings(gamma=g)) for g in ("paper", "authors")}

STRONG = 4
_STRONG_TAGS = {
    "content": f"<klora:{{content}}:{1 / STRONG}> <klora:{{style}}>",
    "style": f"<klora:{{content}}> <klora:{{style}}:{1 / STRONG}>",
}
STRENGTHS = {
    (role, method): Way(f"{role} × {STRONG}, {method}", tags, Settings(method=method), strong=role)
    for role, tags in _STRONG_TAGS.items()
    for method in ("K-LoRA", "Without γ")
}
"""For LoRAs of one role that are ``STRONG`` times as strong, applied with 1 / ``STRONG``."""

KEPT = (0.0, 0.25, 0.5, 0.75, 1.0)
FEWER_LAYERS = {
    (role, kept): Way(
        f"{role} LoRA, {100 * kept:.0f} % of its layers", tags if kept else "", _OFF, kept=kept
    )
    for role, tags in ALONE_TAGS.items()
    for kept in KEPT
}
"""The paper's finding (i), its Fig. 3a: half of a LoRA's layers do nearly all that it does."""
PARTS = {
    "first quarter": (0, 0.25), "first half": (0, 0.5), "first three quarters": (0, 0.75),
    "last three quarters": (0.25, 1), "last half": (0.5, 1), "last quarter": (0.75, 1),
}  # fmt: skip
FEWER_STEPS = {
    (role, part): Way(f"{role} LoRA, {part} of the steps", tags, _OFF, lora_between=between)
    for role, tags in ALONE_TAGS.items()
    for part, between in PARTS.items()
}
"""Its finding (ii), Fig. 2: the subject is made in the early steps, the style in the late ones."""
