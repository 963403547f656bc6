"""The ways that are compared: the paper's Table 1 and its ablations, in small."""

from __future__ import annotations

from fractions import Fraction

from lib_klora.methods import METHODS
from lib_klora.settings import Settings

from .scores import Way

_OFF = Settings(enabled=False)
ALONE = (
    Way("content LoRA alone", "<lora:{content}:1>", _OFF),
    Way("style LoRA alone", "<lora:{style}:1>", _OFF),
)
K_LORA = Way("K-LoRA, S")
K_LORA_STAR = Way("K-LoRA, S*", settings=Settings(scale="S*"))
DIRECT = Way("Direct merge 1:1", settings=Settings(method="Direct merge"))
OTHERS = (
    DIRECT,
    Way("Direct merge 1:2", "<klora:{content}:0.5> <klora:{style}:1>", DIRECT.settings),
    Way("Direct merge ½:½", "<klora:{content}:0.5> <klora:{style}:0.5>", DIRECT.settings),
    *(
        Way(name, settings=Settings(method=name))
        for name in METHODS
        if name not in ("K-LoRA", "Direct merge", "LoRA Composite", "EST-LoRA", "B-LoRA", "NP-LoRA")
    ),
)
METHOD_WAYS = (*ALONE, *OTHERS, K_LORA, K_LORA_STAR)

ALPHAS, BETAS = (1.0, 1.5, 2.0), (0.0, 0.25, 0.5, 0.75)
GRID = {
    (alpha, beta): Way(f"α {alpha:g}, β {beta:g}", settings=Settings(alpha=alpha, beta=beta))
    for alpha in ALPHAS
    for beta in BETAS
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
