"""Model calls → finished steps, whatever the sampler.

The hosts' ``state.sampling_step`` is late by one and their ``denoiser.step`` counts model calls, of
which a step may make one, two or three. Only the sampler itself knows where it is: the samplers of
all hosts, but for a few, are one function with one loop over its steps, ``for i in …``
(k_diffusion/sampling.py, sd_samplers_timesteps_impl.py). So ``i`` is read there. All calls of one
step share one choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import FrameType

_LOOP_VARIABLE = "i"
_SCHEDULES = {"sigmas", "timesteps"}
"""A loop in a function without either is over something else (DPM fast: groups of three steps)."""
_STARTS_SAMPLERS = "launch_sampling"
"""The function of the hosts' that calls every sampler (sd_samplers_common.py)."""


@dataclass(frozen=True)
class Pass:
    """One sampling pass as the step callback sees it, before a model call.

    Attributes:
        finished_steps: how many steps are done.
        steps: N.
        t0: progress at which the pass starts.
        hires: whether it is a hires pass.
    """

    finished_steps: int
    steps: int
    t0: float
    hires: bool = False


class StepCounter:
    """Counts the finished steps of one pass."""

    def __init__(self) -> None:
        self._has_loop: bool | None = None
        """None before the first look."""

    def finished(self, call: int, steps: int, calls_expected: int, i: int | None) -> int:
        """How many steps are done before model call ``call`` (from 0) of the pass.

        Args:
            call: the host's ``denoiser.step``, model calls so far in this pass.
            steps: N, ``denoiser.steps``.
            calls_expected: ``denoiser.total_steps``: twice ``steps`` for samplers that the host
                flags as second order.
            i: as from ``loop_index``. Not believed if it is ahead of the calls at the first look:
                Restart has such a variable from an earlier loop.

        What has no such loop: Restart makes two calls a step, one in the last. UniPC makes one,
        sometimes one more than ``steps``. DPM fast and DPM adaptive count model calls as steps
        themselves; adaptive ones make many more than asked for, so the result may exceed ``steps``
        (progress is clamped to 1).
        """
        if self._has_loop is None:
            self._has_loop = i is not None and i <= call
        if self._has_loop and i is not None:
            return i
        return call // 2 if calls_expected == 2 * steps else call


def loop_index(frame: FrameType | None) -> int | None:
    """``i`` of the sampler that has called ``frame``; None if it has none.

    The outermost one: some samplers call others, or functions that have loops of their own.
    """
    found = None
    while frame is not None and frame.f_code.co_name != _STARTS_SAMPLERS:
        names = {*frame.f_code.co_varnames, *frame.f_code.co_cellvars}
        if _LOOP_VARIABLE in names and names & _SCHEDULES:
            value = frame.f_locals.get(_LOOP_VARIABLE)
            if isinstance(value, int):
                found = value
        frame = frame.f_back
    return found if frame is not None else None
