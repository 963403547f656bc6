"""Model call → finished steps, with samplers that are built as the hosts' are.

What the samplers of the real hosts do is tried by the live tests; here are their shapes: one loop
over the steps with one, two or three model calls, helpers with loops of their own, a solver object,
and Restart, which loops over ``i`` before it samples.
"""

import sys

import pytest

from lib_klora.steps import StepCounter, loop_index


def launch_sampling(sampler, steps, calls_expected=None):
    """Finished steps before each model call, as the hosts start a sampler."""
    counter, found = StepCounter(), []

    def model(*_):
        i = loop_index(sys._getframe())
        found.append(counter.finished(len(found), steps, calls_expected or steps, i))

    sampler(model, range(steps))
    return found


def euler(model, sigmas):
    for i in range(len(sigmas)):
        model(i)


def heun(model, sigmas):
    for i in range(len(sigmas)):
        model(i)
        if i < len(sigmas) - 1:
            model(i)


def heun_pp2(model, sigmas):
    for i in range(len(sigmas)):
        for _ in range(min(3, len(sigmas) - i)):
            model(i)


def lonyu_yog(model, sigmas):
    for i in range(len(sigmas)):
        for _ in range(3 if i <= len(sigmas) / 2 else 1):
            model(i)


def plms(model, timesteps):
    for i in range(len(timesteps)):
        model(i)
        if i == 0:
            model(i)


def helper(model, sigmas):
    for i in (7, 8):
        model(i)


def with_a_helper(model, sigmas):
    for i in range(len(sigmas)):
        model(i)
        helper(model, sigmas)


def with_a_closure(model, sigmas):
    for i in range(len(sigmas)):
        model(lambda: i)  # noqa: B023 - makes it a cell variable


def variant(model, sigmas):
    """As k-diffusion's …_gpu ones."""
    return heun(model, sigmas)


class Solver:
    """As DPM fast's and DPM adaptive's: a loop over groups of calls."""

    def sample(self, model, calls):
        for i in range(0, calls, 3):
            for _ in range(min(3, calls - i)):
                model(i)


def solver(model, sigmas):
    Solver().sample(model, len(sigmas))


def restart(model, sigmas):
    """Two calls for each item of a list, one for the last."""
    step_list = []
    for i in range(len(sigmas)):
        step_list.append(i)
    for last, sigma in enumerate(step_list, 1):
        model(sigma)
        if last < len(sigmas):
            model(sigma)


@pytest.mark.parametrize(
    ("sampler", "finished"),
    [
        (euler, [0, 1, 2, 3]),
        (heun, [0, 0, 1, 1, 2, 2, 3]),
        (heun_pp2, [0, 0, 0, 1, 1, 1, 2, 2, 3]),
        (lonyu_yog, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]),
        (plms, [0, 0, 1, 2, 3]),
        (with_a_helper, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]),
        (with_a_closure, [0, 1, 2, 3]),
        (variant, [0, 0, 1, 1, 2, 2, 3]),
    ],
)
@pytest.mark.parametrize("flagged", [False, True], ids=["", "flagged as second order"])
def test_the_loop_of_the_sampler_says_which_step_it_is(sampler, finished, flagged):
    assert launch_sampling(sampler, 4, 8 if flagged else 4) == finished


def test_without_a_loop_each_call_is_a_step():
    assert launch_sampling(solver, 4) == [0, 1, 2, 3]


def test_without_a_loop_the_hosts_flag_says_that_two_calls_are_a_step():
    assert launch_sampling(restart, 4, calls_expected=8) == [0, 0, 1, 1, 2, 2, 3]


def test_more_steps_than_the_host_says():
    """DPM adaptive; the plan clamps this to t = 1."""
    assert launch_sampling(lambda model, _: Solver().sample(model, 84), 4) == list(range(84))


def test_a_pass_that_is_joined_later():
    """By a refiner that the LoRAs fit, after a checkpoint that they did not."""

    def late(model, sigmas):
        for i in range(len(sigmas)):
            if i > 1:
                model(i)

    counter = StepCounter()
    assert [counter.finished(call, 4, 4, call // 2) for call in (4, 5, 6)] == [2, 2, 3]
    assert launch_sampling(late, 4)[0] == 0  # ahead of the calls: not believed


def test_nothing_outside_of_the_sampler_is_read():
    found, sigmas = [], range(2)
    for i in range(3, 5):
        launch_sampling(lambda *_: found.append((i, loop_index(sys._getframe()))), len(sigmas))  # noqa: B023
    assert found == [(3, None), (4, None)]


def test_a_call_that_no_sampler_makes():
    sigmas = range(3)
    for i in sigmas:
        assert loop_index(sys._getframe()) is None, i
