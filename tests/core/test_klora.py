"""The paper's formulas: against numbers worked out by hand, and against a scalar loop that was
written from the paper and shares nothing with ``lib_klora.klora``."""

import math
import random

import numpy as np
import pytest
import torch

from lib_klora import klora

DELTA = torch.tensor([[3.0, -5.0], [0.5, -1.0]])


class TestTopK:
    @pytest.mark.parametrize(
        ("ranks", "entries", "multiplier", "k"),
        [
            ((4, 8), 1000, 1.0, 32),
            ((1, 1), 1000, 1.0, 1),
            ((64, 128), 1000, 1.0, 1000),  # clamped to the entries of the layer
            ((4, 8), 32, 1.0, 32),
            ((4, 8), 31, 1.0, 31),
            ((4, 8), 1000, 0.5, 16),
            ((4, 8), 1000, 3.0, 96),
            ((3, 3), 1000, 0.1, 1),  # 0.9 is rounded
            ((3, 3), 1000, 0.3, 3),  # 2.7 is rounded, not cut
            ((3, 3), 1000, 1e-9, 1),  # at least one
            ((3, 3), 1000, 1e10, 1000),
        ],
    )
    def test_k_is_the_product_of_the_ranks_rounded_and_clamped(self, ranks, entries, multiplier, k):
        assert klora.top_k(*ranks, entries, multiplier) == k

    @pytest.mark.parametrize(("k", "expected"), [(1, 5.0), (2, 8.0), (3, 9.0), (4, 9.5)])
    def test_importance_is_the_sum_of_the_k_largest_magnitudes(self, k, expected):
        assert klora.top_k_sum(DELTA, k) == expected

    def test_shape_does_not_matter(self):
        assert klora.top_k_sum(DELTA.reshape(1, 2, 2, 1), 2) == 8.0

    def test_equal_entries_at_the_border_count_k_times(self):
        assert klora.top_k_sum(torch.tensor([2.0, -2.0, 2.0, 1.0]), 2) == 4.0

    def test_sum_is_added_in_fp64(self):
        # In fp32 every one of the small entries is lost beside the large one.
        delta = torch.cat([torch.tensor([2.0**25]), torch.ones(100)])
        assert klora.top_k_sum(delta, 101) == 2.0**25 + 100
        assert klora.abs_sum(delta) == 2.0**25 + 100

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_scored_in_fp32(self, dtype):
        delta = torch.full((4096,), 1 + 2**-7).to(dtype)  # exact in both half types
        assert klora.top_k_sum(delta, 4095) == 4095 * (1 + 2**-7)
        assert klora.abs_sum(delta) == 4096 * (1 + 2**-7)

    def test_sum_of_magnitudes(self):
        assert klora.abs_sum(DELTA) == 9.5


class TestGamma:
    def test_paper_is_one_ratio_of_sums(self):
        assert klora.gamma_paper([1, 2, 3], [4, 4, 4]) == 0.5

    def test_authors_is_the_mean_of_ratios(self):
        assert klora.gamma_authors([1, 2, 3], [2, 2, 2]) == 1.0

    def test_authors_leaves_out_layers_at_three_times_the_mean(self):
        # ratios 1, 1, 1, 10: mean 13/4, nothing is above 39/4 but the 10.
        assert klora.gamma_authors([1, 1, 1, 10], [1, 1, 1, 1]) == 1.0
        # ratios 1, 1, 1, 9: mean 3; 9 is exactly 3 × 3, and "at or above" goes.
        assert klora.gamma_authors([1, 1, 1, 9], [1, 1, 1, 1]) == 1.0
        # ratios 1, 1, 1, 8: mean 11/4, 8 < 33/4 stays.
        assert klora.gamma_authors([1, 1, 1, 8], [1, 1, 1, 1]) == 2.75

    def test_authors_weighs_layers_alike_where_the_paper_weighs_by_size(self):
        content, style = [100, 1], [100, 2]
        assert klora.gamma_paper(content, style) == 101 / 102
        assert klora.gamma_authors(content, style) == 0.75

    def test_authors_skips_layers_without_a_style_part(self):
        assert klora.gamma_authors([3, 5], [0, 5]) == 1.0

    def test_style_that_is_zero_everywhere_has_no_gamma(self):
        with pytest.raises(ZeroDivisionError):
            klora.gamma_paper([1, 2], [0, 0])
        with pytest.raises(ZeroDivisionError):
            klora.gamma_authors([1, 2], [0, 0])


class TestScale:
    def test_s_is_linear_with_the_papers_numbers(self):
        assert klora.scale_s(np.array([0, 0.5, 1])).tolist() == [0.5, 1.25, 2.0]

    def test_s_with_other_numbers(self):
        assert klora.scale_s(np.array([0, 0.25]), alpha=4, beta=1).tolist() == [1, 2]

    def test_s_star_starts_at_1_3_and_wraps_at_1_5(self):
        scale = klora.scale_s_star(np.array([0, 0.1, 0.2, 0.5]))
        assert scale == pytest.approx([1.3, 1.45, 0.1, 0.55])

    def test_s_star_wraps_at_its_own_slope(self):
        # α = 2, β = 1: 1, 1.5, then 2 mod 2 = 0.
        assert klora.scale_s_star(np.array([0, 0.25, 0.5]), 2, 1).tolist() == [1, 1.5, 0]

    def test_none_is_one_at_every_step(self):
        assert klora.scale_none(np.array([0, 0.3, 1])).tolist() == [1, 1, 1]


class TestChoice:
    def test_tie_goes_to_content(self):
        # S_c = γ·S·S_s = 0.5 · 2 · 3, all exact in binary.
        chosen = klora.chooses_content(np.array([3.0]), np.array([3.0]), 0.5, np.array([2.0]))
        assert chosen.tolist() == [[True]]

    def test_a_hair_below_the_tie_is_style(self):
        below = math.nextafter(3.0, 0)
        chosen = klora.chooses_content(np.array([below]), np.array([3.0]), 0.5, np.array([2.0]))
        assert chosen.tolist() == [[False]]

    def test_by_hand(self):
        # γ = 2; thresholds γ·S·S_s: step 0 (S 0.5) 1 and 4; step 1 (S 2) 4 and 16.
        chosen = klora.chooses_content(
            np.array([3.0, 4.0]), np.array([1.0, 4.0]), 2.0, np.array([0.5, 2.0])
        )
        assert chosen.tolist() == [[True, True], [False, False]]

    def test_two_zero_layers_tie(self):
        assert klora.chooses_content(np.zeros(1), np.zeros(1), 1.0, np.ones(1)).all()


def scalar_k_lora(content, style, ranks, *, steps, alpha, beta, star):
    """K-LoRA in plain lists and loops, from the paper's equations. Layers are lists of entries."""
    sum_c = sum(abs(x) for layer in content for x in layer)
    sum_s = sum(abs(x) for layer in style for x in layer)
    gamma = sum_c / sum_s  # Eq. 9
    plan = []
    for step in range(steps):
        scale = alpha * (step / steps) + beta  # Eq. 7
        if star:
            scale = scale - alpha * math.floor(scale / alpha)  # Eq. 12
        row = []
        for layer_c, layer_s, (rank_c, rank_s) in zip(content, style, ranks, strict=True):
            k = min(rank_c * rank_s, len(layer_c))  # Eq. 5
            s_c = sum(sorted((abs(x) for x in layer_c), reverse=True)[:k])  # Eq. 3
            s_s = sum(sorted((abs(x) for x in layer_s), reverse=True)[:k])  # Eq. 4
            row.append(s_c >= gamma * scale * s_s)  # Eq. 6, 8, 10
        plan.append(row)
    return plan


@pytest.mark.parametrize("star", [False, True], ids=["S", "S*"])
@pytest.mark.parametrize("seed", range(10))
def test_whole_method_equals_the_scalar_loop(seed, star):
    dice = random.Random(seed)
    layers, steps = 12, dice.choice([1, 4, 9, 28])
    alpha, beta = (1.5, 1.3) if star else (1.5, 0.5)
    # Quarters: every sum is exact, so that the order of adding cannot decide a close case.
    content, style = (
        [[dice.randint(-40, 40) / 4 for _ in range(24)] for _ in range(layers)] for _ in range(2)
    )
    ranks = [(dice.randint(1, 4), dice.randint(1, 8)) for _ in range(layers)]

    ks = [klora.top_k(*pair, 24) for pair in ranks]
    s_c, s_s = (
        np.array([klora.top_k_sum(torch.tensor(x), k) for x, k in zip(side, ks, strict=True)])
        for side in (content, style)
    )
    gamma = klora.gamma_paper(
        *([klora.abs_sum(torch.tensor(x)) for x in side] for side in (content, style))
    )
    t = np.arange(steps) / steps
    scale = (klora.scale_s_star if star else klora.scale_s)(t, alpha, beta)
    plan = klora.chooses_content(s_c, s_s, gamma, scale)

    expected = scalar_k_lora(content, style, ranks, steps=steps, alpha=alpha, beta=beta, star=star)
    assert plan.tolist() == expected
    assert plan.shape == (steps, layers)
