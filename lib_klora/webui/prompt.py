"""Our tags in a prompt, as a generation finds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from modules import extra_networks, scripts, shared

_COMMENTS = ("processing_scripts", "comments.py")
"""The host's script that takes comments out of prompts."""


def tags_of(prompt: str, styles: Sequence[str]) -> list[list[str]]:
    """The items of each tag, with the styles added and the comments left out, as the host does."""
    prompt = shared.prompt_styles.apply_styles_to_prompt(prompt, styles)
    return _tags_in(_without_comments(prompt))


def tags_of_batch(p: Any) -> list[list[list[str]]]:
    """The same for each picture of the batch that generation ``p`` is about to make."""
    size = getattr(p, "batch_size", 1)
    first = getattr(p, "iteration", 0) * size
    prompts = getattr(p, "all_prompts", None) or ()
    return [_tags_in(prompt) for prompt in prompts[first : first + size]]


def _tags_in(prompt: str) -> list[list[str]]:
    found = extra_networks.parse_prompt(prompt)[1]
    return [list(params.items) for params in found.get("klora", [])]


def _without_comments(prompt: str) -> str:
    if not getattr(shared.opts, "enable_prompt_comments", True):  # no option: always, in reForge
        return prompt
    for data in scripts.scripts_data:  # importing it would register its callbacks a second time
        if PurePath(data.path).parts[-2:] == _COMMENTS:
            return data.module.strip_comments(prompt)
    return prompt
