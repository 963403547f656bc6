"""Scores of real files against sums over their entries, and plans against a scalar triple loop."""

import math
import random

import numpy as np
import pytest
import torch
from lora_samples import attention_prefixes, linear, linears, randn

from lib_klora.errors import KLoraError
from lib_klora.lora_file import parse_lora
from lib_klora.pair import Pair, pair_files
from lib_klora.plan import make_plan, progress
from lib_klora.scores import Scores, compute_scores
from lib_klora.settings import Settings

PREFIXES = attention_prefixes(6)


@pytest.fixture(scope="module")
def pair() -> Pair:
    content = linears(PREFIXES, rank=3, size=16, seed=1)
    # Every layer of its own strength, so that the layers flip at different steps.
    for i, prefix in enumerate(PREFIXES):
        content[f"{prefix}.alpha"] = torch.tensor(3 * 0.6 * 1.35**i)
    return pair_files(
        parse_lora("cat", content), parse_lora("ink", linears(PREFIXES, rank=5, size=16, seed=2))
    )


@pytest.fixture(scope="module")
def scores(pair) -> Scores:
    return compute_scores(pair)


def test_scores_equal_sums_over_sorted_entries(pair, scores):
    assert len(scores.s_content) == len(pair.paired) == 6
    for i, layer in enumerate(pair.paired):
        for side, top, total in (
            (layer.content, scores.s_content[i], scores.abs_content[i]),
            (layer.style, scores.s_style[i], scores.abs_style[i]),
        ):
            entries = sorted((abs(x) for row in side.delta().tolist() for x in row), reverse=True)
            assert top == pytest.approx(math.fsum(entries[:15]), rel=1e-6)
            assert total == pytest.approx(math.fsum(entries), rel=1e-6)
            assert layer.k == 15


def test_scores_of_every_kind_of_layer_equal_sums_over_sorted_entries():
    """One of each: the fast way may not be the same for all of them."""
    conv, q, loha, lokr, full = (
        "lora_unet_mid_block_resnets_0_conv1", *attention_prefixes(4)
    )  # fmt: skip

    def tensors(seed):
        return {
            **linear(q, rank=3, size=12, seed=seed, alpha=2),
            f"{conv}.lora_up.weight": randn(8, 2, 1, 1, seed=seed),
            f"{conv}.lora_down.weight": randn(2, 6, 3, 3, seed=seed + 1),
            f"{loha}.hada_w1_a": randn(9, 2, seed=seed),
            f"{loha}.hada_w1_b": randn(2, 7, seed=seed + 1),
            f"{loha}.hada_w2_a": randn(9, 2, seed=seed + 2),
            f"{loha}.hada_w2_b": randn(2, 7, seed=seed + 3),
            f"{lokr}.lokr_w1": randn(2, 3, seed=seed),
            f"{lokr}.lokr_w2_a": randn(5, 2, seed=seed + 1),
            f"{lokr}.lokr_w2_b": randn(2, 4, seed=seed + 2),
            f"{full}.diff": randn(20, 20, seed=seed),
        }

    pair = pair_files(
        parse_lora("a", tensors(1)), parse_lora("b", tensors(100)), layers="all", top_k=1.7
    )
    scores = compute_scores(pair)
    assert {layer.content.kind for layer in pair.paired} == {"LoRA", "LoHa", "LoKr", "full"}
    for i, layer in enumerate(pair.paired):
        entries = sorted(layer.content.delta().abs().flatten().tolist(), reverse=True)
        assert scores.s_content[i] == pytest.approx(math.fsum(entries[: layer.k]), rel=1e-6)
        assert scores.abs_content[i] == pytest.approx(math.fsum(entries), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_scored_as_their_fp32_copies(dtype):
    half = {k: v.to(dtype) for k, v in linears(PREFIXES, rank=4, size=32, seed=5).items()}
    other = parse_lora("b", linears(PREFIXES, rank=4, size=32, seed=6))
    low, full = (
        compute_scores(pair_files(parse_lora("a", tensors), other))
        for tensors in (half, {k: v.float() for k, v in half.items()})
    )
    assert np.array_equal(low.s_content, full.s_content)
    assert np.array_equal(low.abs_content, full.abs_content)


def test_scores_need_no_gradient_and_leave_the_factors_alone(pair):
    before = [{k: v.clone() for k, v in x.content.tensors.items()} for x in pair.paired]
    compute_scores(pair)
    for layer, tensors in zip(pair.paired, before, strict=True):
        assert all(torch.equal(layer.content.tensors[k], v) for k, v in tensors.items())


@pytest.mark.parametrize("role", ["content", "style"])
def test_finite_factors_of_an_infinite_product_are_told(role):
    good = parse_lora("good", linears(PREFIXES))
    huge = parse_lora("huge", {k: torch.full_like(v, 1e30) for k, v in linears(PREFIXES).items()})
    pair = pair_files(huge, good) if role == "content" else pair_files(good, huge)
    with pytest.raises(KLoraError, match=role):
        compute_scores(pair).gamma("paper")


class TestGamma:
    SCORES = Scores(*(np.array(x, float) for x in ([1, 1], [1, 1], [6, 3], [2, 3], [1, 1], [1, 1])))

    def test_paper(self):
        assert self.SCORES.gamma("paper") == 9 / 5

    def test_authors(self):
        assert self.SCORES.gamma("authors") == 2.0

    @pytest.mark.parametrize("kind", ["paper", "authors"])
    def test_nothing_paired_is_one(self, kind):
        assert Scores(*(np.empty(0) for _ in range(6))).gamma(kind) == 1

    @pytest.mark.parametrize("kind", ["paper", "authors"])
    @pytest.mark.parametrize(("sums", "role"), [((0, 1), "content"), ((1, 0), "style")])
    def test_file_of_zeros_is_an_error_that_names_its_role(self, kind, sums, role):
        scores = Scores(*(np.full(3, float(x)) for x in (*sums, *sums, *sums)))
        with pytest.raises(KLoraError, match=role):
            scores.gamma(kind)


def triple_loop(scores: Scores, settings: Settings, steps: int, t0: float) -> list[list[bool]]:
    """The choice for steps × layers in scalars: t, S(t), γ and the comparison written out."""
    layers = range(len(scores.s_content))
    content = [float(scores.abs_content[i]) for i in layers]
    style = [float(scores.abs_style[i]) for i in layers]
    est = settings.method == "EST-LoRA"
    if settings.gamma == "paper" and not est:
        gamma = sum(content) / sum(style)
    else:
        ratios = [content[i] / style[i] for i in layers]
        mean = sum(ratios) / len(ratios)
        ratios = [ratio for ratio in ratios if ratio < 3 * mean]
        gamma = sum(ratios) / len(ratios)
    rows = []
    for step in range(steps + 1):
        t = t0 + (1 - t0) * min(step / steps, 1)
        scale = 1.0 if settings.scale == "none" else settings.alpha * t + settings.beta
        if settings.scale == "S*":
            scale = math.fmod(scale, settings.alpha)
        c, s = scores.s_content, scores.s_style
        if est:
            c, s = scores.energy_content, scores.energy_style
        rows.append([float(c[i]) >= gamma * scale * float(s[i]) for i in layers])
    return rows


@pytest.mark.parametrize("gamma", ["paper", "authors"])
@pytest.mark.parametrize("scale", ["S", "S*", "none"])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("method", ["K-LoRA", "EST-LoRA"])
def test_plan_equals_the_triple_loop(pair, method, seed, scale, gamma):
    dice = random.Random(seed)
    layers = len(pair.paired)
    top = [[dice.uniform(0.2, 3) for _ in range(layers)] for _ in range(2)]
    total = [[dice.uniform(5, 60) for _ in range(layers)] for _ in range(2)]
    energy = [[dice.uniform(0.2, 3) for _ in range(layers)] for _ in range(2)]
    scores = Scores(*map(np.array, (*top, *total, *energy)))
    settings = Settings(
        method=method,
        scale=scale,
        gamma=gamma,
        alpha=dice.choice([1.5, 0.7, 3.0]),
        beta=dice.choice([None, 0.0, 0.9, 2.5]),
    )
    steps, t0 = dice.choice([1, 4, 20, 28]), dice.choice([0.0, 0.25, 0.6, 1.0])
    plan = make_plan(pair, scores, settings, steps, t0)
    assert plan.content.tolist() == triple_loop(scores, settings, steps, t0)
    assert np.array_equal(plan.style, ~plan.content)
    assert plan.content.shape == (steps + 1, layers)
    assert plan.layers == tuple(layer.name for layer in pair.paired)
    assert plan.steps == steps


def test_real_pair_moves_from_content_to_style(pair, scores):
    plan = make_plan(pair, scores, Settings(), steps=20)
    share = plan.content.mean(axis=1)
    assert share[0] == 1
    assert 0 < share[10] < 1
    assert list(share) == sorted(share, reverse=True)


@pytest.mark.parametrize("gamma", ["paper", "authors"])
@pytest.mark.parametrize(("beta", "content"), [(0.0, True), (1e10, False)])
def test_without_slope_an_extreme_beta_gives_one_lora_everywhere(
    pair, scores, gamma, beta, content
):
    plan = make_plan(pair, scores, Settings(alpha=0, beta=beta, gamma=gamma), steps=7)
    assert (plan.content == content).all()


def test_no_scale_is_one_choice_for_all_steps(pair, scores):
    plan = make_plan(pair, scores, Settings(scale="none"), steps=9)
    assert (plan.content == plan.content[0]).all()
    assert 0 < plan.content[0].sum() < 6


def test_last_row_is_the_end_and_later_calls_stay_on_it(pair, scores):
    plan = make_plan(pair, scores, Settings(), steps=5)
    assert plan.t[-1] == 1
    for finished in (5, 6, 84):
        assert plan.row(finished).tolist() == plan.choice[5].tolist()
    assert plan.row(2).tolist() == plan.choice[2].tolist()


def test_pair_without_common_layers_has_an_empty_plan():
    a, b = (
        parse_lora("a", linears(PREFIXES[:2])),
        parse_lora("b", linears(PREFIXES[2:4])),
    )
    pair = pair_files(a, b)
    plan = make_plan(pair, compute_scores(pair), Settings(), steps=4)
    assert plan.content.shape == (5, 0)
    assert plan.row(3).shape == (0,)


def test_zero_style_is_told_when_the_plan_is_made():
    zero = {key: torch.zeros_like(value) for key, value in linears(PREFIXES).items()}
    pair = pair_files(parse_lora("a", linears(PREFIXES)), parse_lora("b", zero))
    with pytest.raises(KLoraError, match="style LoRA is zero"):
        make_plan(pair, compute_scores(pair), Settings(), steps=4)


class TestProgress:
    @pytest.mark.parametrize(
        ("steps", "t0", "expected"),
        [
            (4, 0.0, [0, 0.25, 0.5, 0.75, 1]),
            (2, 0.5, [0.5, 0.75, 1]),
            (1, 0.0, [0, 1]),
            (4, 1.0, [1, 1, 1, 1, 1]),
        ],
    )
    def test_by_hand(self, steps, t0, expected):
        assert progress(steps, t0).tolist() == expected

    def test_no_steps_is_no_division_by_zero(self):
        assert progress(0).tolist() == [0]
