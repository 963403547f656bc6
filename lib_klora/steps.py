"""Model calls → finished steps, for every sampler of the hosts.

The hosts' ``state.sampling_step`` is late by one and their ``denoiser.step`` counts model calls, so
the number of finished steps is worked out from the call and the sampler's pattern. All calls of one
step share one choice.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pass:
    """One sampling pass as the step callback sees it, before a model call.

    Attributes:
        call, steps, calls_expected, sampler: see ``finished_steps``.
        t0: progress at which the pass starts.
        hires: whether it is a hires pass.
    """

    call: int
    steps: int
    calls_expected: int
    sampler: str
    t0: float
    hires: bool = False

    @property
    def finished_steps(self) -> int:
        """How many steps are done."""
        return finished_steps(self.call, self.steps, self.calls_expected, self.sampler)


def finished_steps(call: int, steps: int, calls_expected: int, sampler: str) -> int:
    """How many steps are done before model call ``call`` (from 0) of a pass.

    Args:
        call: the host's ``denoiser.step``, model calls so far in this pass.
        steps: N, ``denoiser.steps``.
        calls_expected: ``denoiser.total_steps``: twice ``steps`` for samplers that the host flags
            as second order (Heun, DPM2, DPM++ SDE, DPM++ 2S a, Restart: two calls a step, one in
            the last).
        sampler: the sampler's name in the host.

    DPM fast and DPM adaptive count model calls as steps themselves; adaptive makes many more than
    asked for, so the result may exceed ``steps`` (progress is clamped to 1). DDIM and UniPC make
    one call a step, sometimes one fewer or more than ``steps``.
    """
    if sampler == "PLMS":  # the first step evaluates the model twice
        return max(call - 1, 0)
    if sampler == "HeunPP2":  # Forge; not flagged there. Three calls, then two, then one
        return call // 3 if call < 3 * steps - 4 else steps - 1
    if calls_expected == 2 * steps:
        return call // 2
    return call
