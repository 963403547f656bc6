"""NP-LoRA against its formula on whole matrices, in numpy, and the factors bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_samples import linear, linears, randn

from lib_klora.lora_file import parse_lora
from lib_klora.pair import pair_files
from lib_klora.projection import MU, project, row_space

Q, K, V = (f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_{x}" for x in "qkv")


def of(content, style, **more):
    files = parse_lora("c", content), parse_lora("s", style)
    return project(pair_files(*files, layers="all", **more))


def deltas(tensors):
    return {
        name: layer.delta().double().numpy()
        for name, layer in parse_lora("x", tensors).layers.items()
    }


def formula(content, style):
    """ΔW_c·(I − μ/(1+μ)·Q·Qᵀ) and ‖ΔW_c·Q‖² of whole matrices, Q by the SVD of ΔW_s."""
    _, sizes, rows = np.linalg.svd(style)
    basis = rows[: int((sizes > 1e-5 * max(sizes.max(), 1e-30)).sum())].T
    along = content @ basis
    return content - 0.5 / 1.5 * along @ basis.T, (along**2).sum()


def check(content, style, tolerance=2e-6):
    """The projected file is the formula's, layer by layer, and the overlap that of all of them."""
    found = of(content, style)
    assert not found.left
    assert found.changed.keys() <= content.keys()
    for key, tensor in found.changed.items():
        assert (tensor.dtype, tensor.shape) == (content[key].dtype, content[key].shape)
    after, inside, total = deltas({**content, **found.changed}), 0.0, 0.0
    before, of_style = deltas(content), deltas(style)
    assert before.keys() == of_style.keys()
    for name, matrix in before.items():
        wanted, energy = formula(matrix, of_style[name])
        assert np.abs(after[name] - wanted).max() <= tolerance * np.abs(matrix).max()
        inside, total = inside + energy, total + (matrix**2).sum()
    assert found.overlap == pytest.approx(inside / total, rel=1e-4, abs=1e-9)
    return found


@given(
    seed=st.integers(0, 10**6), size=st.integers(5, 40), rank_c=st.integers(1, 12),
    rank_s=st.integers(1, 4),
)  # fmt: skip
def test_the_formula(seed, size, rank_c, rank_s):
    content = linear(Q, rank_c, size, seed) | linear(K, rank_c, size, seed + 1, alpha=0.5)
    style = linear(Q, rank_s, size, seed + 2, alpha=3) | linear(K, rank_s, size, seed + 3)
    check(content, style)


def test_mu_is_the_papers():
    assert MU == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_factors_bit_for_bit(dtype):
    """As somebody would rewrite a file who has only numpy's QR: fp64, then fp32, then as it was."""
    content = {k: v.to(dtype) for k, v in linears([Q, K, V], 8, 320, seed=1).items()}
    style = {k: v.half() for k, v in linears([Q, K, V], 16, 320, seed=2).items()}
    found = of(content, style).changed
    assert len(found) == 3
    for key, tensor in found.items():
        a, other = content[key].double().numpy(), style[key].double().numpy()
        basis, _ = np.linalg.qr(other.T)
        wanted = (a - (a @ basis) @ basis.T / 3).astype(np.float32)
        assert torch.equal(tensor, torch.from_numpy(wanted).to(dtype))
        assert not torch.equal(tensor, content[key])


def test_row_spaces_apart_are_direct_merge():
    content, style = linears([Q, K], 4, 16, seed=1), linears([Q, K], 4, 16, seed=2)
    for key in content:
        if "down" in key:
            content[key][:, 8:], style[key][:, :8] = 0, 0
    found = check(content, style)
    assert found.overlap < 1e-30
    for key, tensor in found.changed.items():  # where there were zeros, they are nearly so
        assert torch.allclose(tensor, content[key], rtol=0, atol=1e-15)


def test_one_row_space_leaves_two_thirds():
    content = linears([Q, K], 4, 16, seed=1)
    found = check(content, content)
    assert found.overlap == pytest.approx(1)
    for key, tensor in found.changed.items():
        assert torch.allclose(tensor, content[key] * 2 / 3, rtol=1e-6, atol=1e-7)


def test_what_a_rank_does_not_use_is_no_direction():
    """Rows that repeat, a rank above the width, and a layer that was never trained."""
    content, style = linears([Q, K, V], 4, 8, seed=1), linears([Q], 3, 8, seed=2)
    style[f"{Q}.lora_down.weight"][2] = 2 * style[f"{Q}.lora_down.weight"][0]
    style |= linear(K, 20, 8, seed=3)
    style |= linear(V, 4, 8, seed=4) | {f"{V}.lora_up.weight": torch.zeros(8, 4)}
    found = check(content, style)
    down = f"{V}.lora_down.weight"
    assert torch.equal(found.changed[down], content[down])


def test_row_space_is_orthonormal_and_as_large_as_the_rank():
    rows = randn(6, 30, dtype=torch.float64)
    rows[4], rows[5] = rows[0] + rows[1], 0
    basis = row_space(rows)
    assert basis.shape == (30, 4)
    assert torch.allclose(basis.T @ basis, torch.eye(4, dtype=torch.float64))
    assert torch.allclose(rows @ basis @ basis.T, rows)
    assert row_space(rows[:0]).shape == (30, 0)


def conv(prefix, rank, seed, *, cp=False, flat=False):
    down = (rank, 6, 1, 1) if cp else (rank, 54) if flat else (rank, 6, 3, 3)
    tensors = {
        f"{prefix}.lora_up.weight": randn(10, rank, 1, 1, seed=seed),
        f"{prefix}.lora_down.weight": randn(*down, seed=seed + 1),
    }
    if cp:
        tensors[f"{prefix}.lora_mid.weight"] = randn(rank, rank, 3, 3, seed=seed + 2)
    return tensors


CONV = "lora_unet_input_blocks_3_0_op"


@pytest.mark.parametrize("style", [{}, {"cp": True}, {"flat": True}])
@pytest.mark.parametrize("content", [{}, {"flat": True}])
def test_kernels(content, style):
    check(conv(CONV, 4, 1, **content), conv(CONV, 3, 5, **style), 1e-5)


def test_a_full_difference_is_projected_itself():
    content = {f"{Q}.diff": randn(12, 16, seed=1), f"{CONV}.diff": randn(10, 6, 3, 3, seed=2)}
    check(
        content, linear(Q, 3, 16, seed=3) | {f"{Q}.lora_up.weight": randn(12, 3)} | conv(CONV, 2, 4)
    )


OTHER_KINDS = {
    "LoHa": {
        ".hada_w1_a": randn(8, 2), ".hada_w1_b": randn(2, 8), ".hada_w2_a": randn(8, 2),
        ".hada_w2_b": randn(2, 8),
    },
    "LoKr": {".lokr_w1": randn(2, 2), ".lokr_w2": randn(4, 4)},
    "DoRA": {
        ".lora_up.weight": randn(8, 2), ".lora_down.weight": randn(2, 8),
        ".dora_scale": randn(1, 8),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_stay_as_they_are(kind):
    other = {f"{Q}{ending}": tensor for ending, tensor in OTHER_KINDS[kind].items()}
    plain = linears([Q, K], seed=1)
    for content, style in ((other | linear(K), plain), (plain, other | linear(K, seed=2))):
        found = of(content, style)
        assert [layer.prefix for layer in found.left] == [Q]
        assert list(found.changed) == [f"{K}.lora_down.weight"]
        assert 0 < found.overlap < 1
    assert of(other, linear(Q)).overlap is None


def test_a_full_style_and_a_cp_content_stay_as_they_are():
    assert of(linear(Q), {f"{Q}.diff": randn(8, 8)}).left
    assert of(conv(CONV, 4, 1, cp=True), conv(CONV, 3, 5)).left


SINGLE = "lora_unet_single_blocks_0_linear1"
PARTS = [f"lora_transformer_single_transformer_blocks_0_{x}" for x in ("attn_to_q", "attn_to_k")]


def numpys_projection(factor, rows):
    basis = np.linalg.svd(rows.double().numpy(), full_matrices=False)[2].T
    a = factor.double().numpy()
    return torch.from_numpy((a - a @ basis @ basis.T / 3).astype(np.float32)), a @ basis


def test_a_fused_projection_in_parts():
    """A part's rows are rows of the whole; the rows of the whole are those of all of its parts."""
    split, fused = linears(PARTS, rank=1, seed=3), linear(SINGLE, rank=4, seed=1)
    downs = [f"{x}.lora_down.weight" for x in PARTS]
    found = of(fused, split)
    ((key, tensor),) = found.changed.items()
    wanted, _ = numpys_projection(fused[key], torch.cat([split[x] for x in downs]))
    assert torch.equal(tensor, wanted)

    found = of(split, fused)
    assert list(found.changed) == sorted(downs)
    inside = 0.0
    for down, tensor in found.changed.items():
        wanted, along = numpys_projection(split[down], fused[key])
        assert torch.equal(tensor, wanted)
        up = split[down.replace("down", "up")].double().numpy()
        inside += ((up @ along) ** 2).sum()
    assert found.overlap == pytest.approx(
        inside / sum((x**2).sum() for x in deltas(split).values()), rel=1e-4
    )
    assert len(of(split, linears(PARTS, rank=1, seed=5)).changed) == 2


def test_nothing_in_common_is_nothing():
    found = of(linear(Q), linear(K))
    assert (found.changed, found.overlap, found.left) == ({}, None, ())


def test_progress_is_told_and_may_stop_it():
    pair = pair_files(*(parse_lora(x, linears([Q, K])) for x in "ab"))
    seen = []
    project(pair, lambda *at: seen.append(at))
    assert seen == [(0, 2), (1, 2), (2, 2)]
    with pytest.raises(ZeroDivisionError):
        project(pair, lambda done, total: 1 / 0)
