"""The methods beside K-LoRA, each against a plain loop over steps and layers."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from lora_samples import SDXL, attention_prefixes, linears, transformer_layers

from lib_klora.errors import KLoraError
from lib_klora.lora_file import parse_lora
from lib_klora.methods import BITS, BOTH, METHODS
from lib_klora.pair import pair_files
from lib_klora.plan import make_plan
from lib_klora.scores import Scores
from lib_klora.settings import Settings

C, S = "content", "style"
NAMES = (
    "K-LoRA", "Direct merge", "LoRA Switch", "LoRA Composite", "Fixed selection",
    "Random selection", "Top-K without scale", "Without γ", "EST-LoRA", "B-LoRA", "NP-LoRA",
)  # fmt: skip
WITHOUT_SCORES = (
    "Direct merge", "LoRA Switch", "LoRA Composite", "Fixed selection", "Random selection",
    "B-LoRA", "NP-LoRA",
)  # fmt: skip
STEPS = st.integers(1, 60)
LAYERS = st.integers(1, 12)
PAIRS = {
    n: pair_files(*(parse_lora(x, linears(attention_prefixes(n), rank=1, size=2)) for x in "ab"))
    for n in range(1, 13)
}
"""Number of layers → any pair with that many: plans take only the names from it."""


def table(plan) -> list[list[str]]:
    """A plan's steps × layers in words, with the row of t = 1."""
    words = {1: C, 2: S, 3: "both"}
    return [[words[x] for x in row] for row in plan.choice.tolist()]


def plan_of(method, steps, layers, *, scores=None, t0=0.0, **settings):
    plan = make_plan(PAIRS[layers], scores, Settings(method=method, **settings), steps, t0)
    assert plan.choice.shape == (steps + 1, layers)
    assert plan.choice.dtype == np.uint8
    assert plan.method == method
    assert len(plan.layers) == layers
    return plan


def test_the_list():
    assert tuple(METHODS) == NAMES
    assert tuple(name for name, x in METHODS.items() if x.compares is None) == WITHOUT_SCORES
    assert BITS == {C: 1, S: 2}
    assert sum(BITS.values()) == BOTH


@pytest.mark.parametrize("method", WITHOUT_SCORES)
def test_without_scores_gamma_is_absent_and_not_invented(method):
    assert plan_of(method, 5, 3).gamma is None


@pytest.mark.parametrize("method", sorted(set(NAMES) - set(WITHOUT_SCORES)))
def test_the_others_cannot_do_without(method):
    with pytest.raises(AttributeError):
        plan_of(method, 5, 3)


@pytest.mark.parametrize("method", NAMES)
def test_of_no_layers_there_is_nothing_to_say(method):
    a, b = (
        parse_lora(x, linears(attention_prefixes(4)[i : i + 2])) for x, i in (("a", 0), ("b", 2))
    )
    scores = Scores(*(np.empty(0) for _ in range(6)))
    plan = make_plan(pair_files(a, b), scores, Settings(method=method), 3)
    assert plan.choice.shape == (4, 0)


@given(steps=STEPS, layers=LAYERS)
def test_direct_merge_is_both_everywhere(steps, layers):
    plan = plan_of("Direct merge", steps, layers)
    assert table(plan) == [["both"] * layers] * (steps + 1)
    assert plan.content.all()
    assert plan.style.all()


@given(steps=STEPS, layers=LAYERS, t0=st.floats(0, 1))
def test_lora_switch_takes_turns_and_begins_with_content(steps, layers, t0):
    wanted = [[C if step % 2 == 0 else S] * layers for step in range(steps + 1)]
    assert table(plan_of("LoRA Switch", steps, layers, t0=t0)) == wanted


@given(
    steps=STEPS, layers=LAYERS, t0=st.floats(0, 1), alpha=st.floats(0.01, 5), beta=st.floats(0, 5),
    scale=st.sampled_from(["S", "S*", "none"]),
)  # fmt: skip
def test_fixed_selection_is_content_below_one_and_style_from_there(
    *, steps, layers, t0, alpha, beta, scale
):
    wanted = []
    for step in range(steps + 1):
        s = alpha * (t0 + (1 - t0) * min(step / steps, 1)) + beta
        s = {"S": s, "S*": math.fmod(s, alpha), "none": 1}[scale]
        wanted.append([C if s < 1 else S] * layers)
    settings = dict(alpha=alpha, beta=beta, scale=scale)
    assert table(plan_of("Fixed selection", steps, layers, t0=t0, **settings)) == wanted


@given(steps=STEPS, t0=st.floats(0, 1), start=st.floats(0, 100), end=st.floats(0, 100))
def test_fixed_selection_with_a_share_is_content_from_one_half_on(steps, t0, start, end):
    plan = plan_of(
        "Fixed selection", steps, 3, t0=t0, scale="share", share_start=start, share_end=end
    )
    share = [start + (end - start) * t for t in plan.t.tolist()]
    assume(min(abs(x - 50) for x in share) > 1e-9)
    assert table(plan) == [[C if x > 50 else S] * 3 for x in share]


def test_fixed_selection_with_the_papers_numbers():
    """1.5·t + 0.5 reaches 1 at t = 1/3: content in the first three of nine steps."""
    rows = [row[0] for row in table(plan_of("Fixed selection", 9, 1))]
    assert rows == [C] * 3 + [S] * 7


def drawn_one_by_one(seed: int, steps: int, layers: int) -> list[list[str]]:
    """One draw after the other, from numpy's generator, in plain loops."""
    dice = np.random.default_rng(seed)
    return [[C if dice.random() < 1 / 3 else S for _ in range(layers)] for _ in range(steps + 1)]


@given(steps=STEPS, layers=LAYERS, seed=st.integers(0, 10**9))
def test_random_selection_is_drawn_step_by_step_and_layer_by_layer(steps, layers, seed):
    plan = plan_of("Random selection", steps, layers, seed=seed)
    assert table(plan) == drawn_one_by_one(seed, steps, layers)


def test_random_selection_of_seed_0_is_the_same_everywhere_and_for_ever():
    """Written down once: another version of numpy must not change people's pictures."""
    written = [[S, C, C, C, S, S], [S, S, S, S, S, C]]
    assert table(plan_of("Random selection", 1, 6)) == written


@given(seed=st.integers(0, 10**9), steps=STEPS, more=st.integers(1, 20))
def test_random_selection_depends_on_the_seed_and_not_on_the_number_of_steps(seed, steps, more):
    short, long = (plan_of("Random selection", n, 12, seed=seed) for n in (steps, steps + more))
    assert np.array_equal(short.choice, long.choice[: steps + 1])


def test_another_seed_is_another_selection():
    choices = {plan_of("Random selection", 9, 12, seed=seed).choice.tobytes() for seed in range(50)}
    assert len(choices) == 50


def test_random_selection_gives_content_a_third():
    """100 × 60 × 12 draws: the standard deviation of the mean is 0.0017."""
    plans = [plan_of("Random selection", 60, 12, seed=seed) for seed in range(100)]
    content = np.array([plan.content for plan in plans])
    assert content.mean() == pytest.approx(1 / 3, abs=0.007)
    # … and so does each layer, and each step: no row or column is special
    assert np.abs(content.mean(axis=(0, 1)) - 1 / 3).max() < 0.03
    assert np.abs(content.mean(axis=(0, 2)) - 1 / 3).max() < 0.07


sums = st.floats(0.01, 100)


@given(
    rows=st.lists(st.tuples(*[sums] * 6), min_size=1, max_size=12), steps=STEPS,
    alpha=st.floats(0, 5), beta=st.floats(0, 5), gamma=st.sampled_from(["paper", "authors"]),
    scale=st.sampled_from(["S", "none"]),
)  # fmt: skip
def test_the_ablations_are_the_papers_formula_without_one_factor(
    *, rows, steps, alpha, beta, gamma, scale
):
    scores = Scores(*map(np.array, zip(*rows, strict=True)))
    settings = dict(scores=scores, alpha=alpha, beta=beta, gamma=gamma, scale=scale)

    def wanted(balance, scaled):
        result = []
        for step in range(steps + 1):
            s = alpha * min(step / steps, 1) + beta if scaled and scale == "S" else 1.0
            result.append([C if c >= balance * s * x else S for c, x, *_ in rows])
        return result

    without_scale = plan_of("Top-K without scale", steps, len(rows), **settings)
    assert without_scale.gamma == scores.gamma(gamma)
    assert table(without_scale) == wanted(scores.gamma(gamma), False)
    without_gamma = plan_of("Without γ", steps, len(rows), **settings)
    assert without_gamma.gamma == 1
    assert table(without_gamma) == wanted(1.0, True)
    k_lora = plan_of("K-LoRA", steps, len(rows), **settings)
    assert table(k_lora) == wanted(scores.gamma(gamma), True)


@given(
    rows=st.lists(st.tuples(sums, st.floats(0, 100), *[sums] * 4), min_size=1, max_size=12),
    steps=STEPS, t0=st.floats(0, 1), start=st.floats(0, 100), end=st.floats(0, 100),
    method=st.sampled_from(["K-LoRA", "Without γ"]),
    ignored=st.fixed_dictionaries({
        "alpha": st.floats(0, 5), "beta": st.floats(0, 5),
        "gamma": st.sampled_from(["paper", "authors"]),
    }),
)  # fmt: skip
def test_a_share_hands_the_layers_over_in_the_order_of_their_ratios(
    *, rows, steps, t0, start, end, method, ignored
):
    """One layer at a time is looked for, as a person would, with the ratios as fractions."""
    assume(any(style > 0 for _, style, *_ in rows))
    plan = plan_of(
        method, steps, len(rows), scores=Scores(*map(np.array, zip(*rows, strict=True))), t0=t0,
        scale="share", share_start=start, share_end=end, **ignored,
    )  # fmt: skip
    left, order = dict(enumerate(rows)), []
    while left:
        ratio = {i: c / s if s > 0 else math.inf for i, (c, s, *_) in left.items()}
        first = max(ratio, key=lambda i: (ratio[i], -i))
        order.append(first)
        del left[first]
    for t, found in zip(plan.t.tolist(), table(plan), strict=True):
        number = (start + (end - start) * t) / 100 * len(rows)
        assume(abs(number % 1 - 0.5) > 1e-9)
        content = order[: round(number)]
        assert found == [C if i in content else S for i in range(len(rows))]


def test_with_a_share_a_layer_turns_once_and_the_last_step_has_what_is_left():
    rows = np.array([[5.0, 1], [1, 5], [1, 1], [2, 1], [0, 0]])
    scores = Scores(*[rows[:, 0], rows[:, 1]] * 3)
    plan = plan_of("K-LoRA", 10, 5, scores=scores, scale="share", share_end=0)
    assert plan.content.sum(axis=1).tolist() == [5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0]
    assert (np.diff(plan.content.astype(int), axis=0) <= 0).all()
    # Longest content: the layer that style says nothing about, then 5, 2, 1 and 1/5.
    assert plan.content.sum(axis=0).tolist() == [8, 2, 4, 6, 10]


def test_a_share_is_nothing_to_a_method_without_a_scale():
    scores = Scores(*(np.array([3.0, 1, 2]) for _ in range(6)))
    given = {"scores": scores, "scale": "share", "share_start": 0, "share_end": 0}
    assert table(plan_of("Top-K without scale", 3, 3, **given)) == [[C] * 3] * 4


def test_b_lora_gives_each_block_its_own_lora_and_the_others_nothing():
    """As diffusers names the blocks, which is how the B-LoRA paper says it."""
    layers = [(a, f"lora_unet_{b}_{x}".replace(".", "_")) for a, b, x in transformer_layers(SDXL)]
    pair = pair_files(*(parse_lora(x, linears([b for _, b in layers], 1, 2)) for x in "ab"))
    plan = make_plan(pair, None, Settings(method="B-LoRA"), 4)
    block_of = {f"{path}_{x}".replace(".", "_"): a for a, path, x in transformer_layers(SDXL)}
    found = {}
    for name, column in zip(plan.layers, plan.choice.T.tolist(), strict=True):
        where = block_of[name].partition(".transformer")[0]
        found.setdefault(where, set()).add(tuple(column))
    assert len(found) == 11
    assert found.pop("up_blocks.0.attentions.0") == {(1,) * 5}
    assert found.pop("up_blocks.0.attentions.1") == {(2,) * 5}
    assert set().union(*found.values()) == {(0,) * 5}


def test_a_file_of_zeros_only_stops_the_methods_that_balance():
    scores = Scores(*(np.array([x, x], float) for x in (1, 0) * 3))
    for method in ("K-LoRA", "Top-K without scale"):
        with pytest.raises(KLoraError, match="style LoRA is zero"):
            plan_of(method, 3, 2, scores=scores)
    assert table(plan_of("Without γ", 3, 2, scores=scores)) == [[C, C]] * 4
