"""Model call → finished steps, one row for every sampler of the hosts' FACTS (section c).

The rows say how many steps are done before each model call, read off the hosts' own counters:
``state.sampling_step`` is the index of the last finished step, so it lags by one.
"""

import pytest

from lib_klora.steps import finished_steps

ONE_CALL = (
    "Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE", "LMS",
    "LCM", "DDPM", "IPNDM", "IPNDM_V", "DEIS",
)  # fmt: skip
TWO_CALLS = ("Heun", "DPM2", "DPM2 a", "DPM++ SDE", "DPM++ 2S a", "Restart")


def sequence(sampler: str, calls: int, steps: int, calls_expected: int) -> list[int]:
    return [finished_steps(call, steps, calls_expected, sampler) for call in range(calls)]


@pytest.mark.parametrize("sampler", ONE_CALL)
def test_one_call_a_step(sampler):
    assert sequence(sampler, calls=4, steps=4, calls_expected=4) == [0, 1, 2, 3]


@pytest.mark.parametrize("sampler", TWO_CALLS)
def test_both_calls_of_a_second_order_step_share_it(sampler):
    assert sequence(sampler, calls=7, steps=4, calls_expected=8) == [0, 0, 1, 1, 2, 2, 3]


def test_restart_with_its_jumps_stays_in_range():
    steps = sequence("Restart", calls=39, steps=20, calls_expected=40)
    assert steps == [i // 2 for i in range(39)]
    assert steps[-1] == 19


def test_heun_in_img2img_at_half_strength():
    # 8 steps at 0.5 run 5 steps: 9 of 10 expected calls.
    assert sequence("Heun", calls=9, steps=5, calls_expected=10) == [0, 0, 1, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, [0]),
        (2, [0, 0, 1]),
        (3, [0, 0, 0, 1, 1, 2]),
        (4, [0, 0, 0, 1, 1, 1, 2, 2, 3]),  # the row of the table: 9 calls
        (5, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4]),
    ],
)
def test_heunpp2_makes_three_calls_a_step_then_two_then_one(steps, expected):
    # Forge flags it as first order: calls_expected is the number of steps.
    assert sequence("HeunPP2", len(expected), steps, calls_expected=steps) == expected


@pytest.mark.parametrize("sampler", ["DDIM", "DDIM CFG++"])
def test_ddim_makes_one_call_fewer(sampler):
    assert sequence(sampler, calls=3, steps=4, calls_expected=4) == [0, 1, 2]


def test_ddim_of_nine_steps_makes_nine_calls():
    assert sequence("DDIM", calls=9, steps=9, calls_expected=9) == list(range(9))


def test_plms_spends_two_calls_on_its_first_step():
    assert sequence("PLMS", calls=4, steps=4, calls_expected=4) == [0, 0, 1, 2]


def test_unipc_makes_one_call_a_step_and_one_over_at_some_lengths():
    assert sequence("UniPC", calls=4, steps=4, calls_expected=4) == [0, 1, 2, 3]
    assert sequence("UniPC", calls=10, steps=9, calls_expected=9) == list(range(10))


def test_dpm_fast_counts_its_calls():
    assert sequence("DPM fast", calls=4, steps=4, calls_expected=4) == [0, 1, 2, 3]


@pytest.mark.parametrize(("calls", "expected"), [(81, 4), (84, 4), (81, 20)])
def test_dpm_adaptive_runs_past_its_steps_without_going_back(calls, expected):
    steps = sequence("DPM adaptive", calls, steps=expected, calls_expected=expected)
    assert steps == sorted(steps)
    assert steps[0] == 0
    assert steps[-1] >= expected  # the plan clamps this to t = 1


@pytest.mark.parametrize("sampler", [*ONE_CALL, *TWO_CALLS, "HeunPP2", "PLMS", "DDIM", "UniPC"])
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_every_sampler_starts_at_zero_and_never_steps_back(sampler, steps):
    expected = 2 * steps if sampler in TWO_CALLS else steps
    done = sequence(sampler, 3 * steps, steps, expected)
    assert done[0] == 0
    assert done == sorted(done)
