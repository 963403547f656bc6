"""LoRA Composite: every LoRA predicts by itself, and the predictions are averaged (Multi-LoRA
Composition, arXiv 2402.16843, section 3.3).

The paper averages what classifier-free guidance makes of them. That is linear in what the network
predicts, so here the network's own output is averaged, whichever prompts a call of it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class TwoPredictions:
    """Lets a network predict a second time wherever it is called, and gives out the mean.

    Args:
        network: a module whose output is a tensor.
        change: called between the two. The network has the other LoRA then: True. False: it has
            none any more, and what it predicts now is all that counts. None: once will do.
    """

    def __init__(self, network: nn.Module, change: Callable[[], bool | None]) -> None:
        self._change = change
        self._given: tuple[tuple, dict] | None = None
        self._again = False
        self._hooks = (
            network.register_forward_pre_hook(self._before, with_kwargs=True),
            network.register_forward_hook(self._after),
        )

    def remove(self) -> None:
        """The network predicts once again."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, network: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The Forges' networks empty the lists of ControlNet's tensors that they are given
        (``apply_control``), so each prediction gets its own."""
        if self._again:
            return None
        self._given = args, kwargs
        control = kwargs.get("control")
        if not isinstance(control, dict):
            return None
        own = {name: [*x] if isinstance(x, list) else x for name, x in control.items()}
        return args, kwargs | {"control": own}

    def _after(self, network: nn.Module, args: tuple, output: Any) -> torch.Tensor | None:
        if self._again:
            return None
        (args, kwargs), self._given = self._given, None
        changed = self._change()
        if changed is None:
            return None
        self._again = True
        try:
            other = network(*args, **kwargs)
        finally:
            self._again = False
        return (output + other) / 2 if changed else other
