"""LoRA files on disk → ΔW, each type against an independent computation in fp64.

Linear types are compared entry by entry with the definition in their paper, written as index
sums; conv types with what the host's modules would do: convolving with the factors one after
another equals convolving with ΔW.
"""

import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lora_samples import linear, randn
from safetensors.torch import save_file

from lib_klora.errors import KLoraError
from lib_klora.lora_file import parse_lora
from lib_klora.tensor_file import SafetensorsFile

Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
NAME = "input_blocks_4_1_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_1_resnets_0_conv1"


@pytest.fixture
def layer_of(tmp_path):
    """Writes tensors to a file and reads back its only layer."""

    def layer_of(tensors, name="test"):
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        file = parse_lora(name, SafetensorsFile(path))
        (layer,) = file.layers.values()
        return layer

    return layer_of


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def close(delta: torch.Tensor, expected) -> bool:
    expected = np.asarray(expected, dtype=np.float64)
    assert delta.dtype == torch.float32
    assert delta.shape[0] == expected.shape[0]
    return np.allclose(f64(delta), expected.reshape(expected.shape[0], -1), rtol=1e-5, atol=1e-5)


class TestLora:
    def test_linear_is_b_times_a(self, layer_of):
        up, down = randn(6, 3, seed=1), randn(3, 5, seed=2)
        layer = layer_of({f"{Q}.lora_up.weight": up, f"{Q}.lora_down.weight": down})
        expected = [
            [sum(float(up[o, r]) * float(down[r, i]) for r in range(3)) for i in range(5)]
            for o in range(6)
        ]
        assert close(layer.delta(), expected)
        assert (layer.name, layer.kind, layer.rank, layer.shape) == (NAME, "LoRA", 3, (6, 5))
        assert layer.entries == 30

    @pytest.mark.parametrize("alpha", [1.0, 3.0, 4.0, 0.0])
    def test_alpha_over_rank_scales(self, layer_of, alpha):
        tensors = linear(Q, rank=4, alpha=alpha)
        expected = f64(tensors[f"{Q}.lora_up.weight"]) @ f64(tensors[f"{Q}.lora_down.weight"])
        assert close(layer_of(tensors).delta(), expected * alpha / 4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_any_storage_is_multiplied_in_fp32(self, layer_of, dtype):
        tensors = linear(Q, rank=4, size=64, dtype=dtype)
        expected = f64(tensors[f"{Q}.lora_up.weight"]) @ f64(tensors[f"{Q}.lora_down.weight"])
        assert close(layer_of(tensors).delta(), expected)

    @pytest.mark.parametrize(
        ("up", "down"),
        [
            (".lora_up.weight", ".lora_down.weight"),
            (".lora_B.weight", ".lora_A.weight"),
            (".lora_B.default.weight", ".lora_A.default.weight"),
            (".lora.up.weight", ".lora.down.weight"),
            ("_lora.up.weight", "_lora.down.weight"),
            (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
        ],
    )
    def test_every_spelling_of_the_factors(self, layer_of, up, down):
        b, a = randn(6, 3, seed=1), randn(3, 5, seed=2)
        layer = layer_of({f"{Q}{up}": b, f"{Q}{down}": a})
        assert close(layer.delta(), f64(b) @ f64(a))
        assert layer.prefix == Q

    def test_conv_1x1(self, layer_of):
        up, down = randn(6, 3, 1, 1, seed=1), randn(3, 5, 1, 1, seed=2)
        layer = layer_of({f"{CONV}.lora_up.weight": up, f"{CONV}.lora_down.weight": down})
        assert layer.shape == (6, 5, 1, 1)
        assert close(layer.delta(), f64(up.flatten(1)) @ f64(down.flatten(1)))

    def test_conv_3x3_equals_the_two_convolutions(self, layer_of):
        up, down = randn(6, 3, 1, 1, seed=1), randn(3, 5, 3, 3, seed=2)
        layer = layer_of({f"{CONV}.lora_up.weight": up, f"{CONV}.lora_down.weight": down})
        assert (layer.shape, layer.rank, layer.entries) == ((6, 5, 3, 3), 3, 270)
        x = randn(1, 5, 7, 7, seed=3).double()
        expected = F.conv2d(F.conv2d(x, down.double()), up.double())
        actual = F.conv2d(x, layer.delta().double().reshape(layer.shape))
        assert torch.allclose(actual, expected, atol=1e-4)

    def test_cp_form_equals_the_three_convolutions(self, layer_of):
        # The core is not square, so that its two ranks cannot be mixed up.
        up, mid, down = randn(6, 2, 1, 1, seed=1), randn(2, 3, 3, 3, seed=2), randn(3, 5, 1, 1)
        layer = layer_of(
            {
                f"{CONV}.lora_up.weight": up,
                f"{CONV}.lora_mid.weight": mid,
                f"{CONV}.lora_down.weight": down,
                f"{CONV}.alpha": torch.tensor(6.0),
            }
        )
        assert (layer.shape, layer.rank) == ((6, 5, 3, 3), 3)
        x = randn(1, 5, 7, 7, seed=3).double()
        expected = F.conv2d(F.conv2d(F.conv2d(x, down.double()), mid.double()), up.double()) * 2
        actual = F.conv2d(x, layer.delta().double().reshape(layer.shape))
        assert torch.allclose(actual, expected, atol=1e-3)

    def test_dora_is_compared_on_its_product(self, layer_of):
        tensors = linear(Q, rank=4)
        plain = layer_of(tensors, "plain").delta()
        dora = layer_of({**tensors, f"{Q}.dora_scale": randn(8, 1)}, "dora")
        assert dora.kind == "DoRA"
        assert torch.equal(dora.delta(), plain)

    def test_bias_difference_goes_with_its_weight(self, layer_of):
        tensors = linear(Q, rank=4)
        with_bias = layer_of({**tensors, f"{Q}.diff_b": randn(8)}, "bias")
        assert torch.equal(with_bias.delta(), layer_of(tensors, "plain").delta())


class TestLoHa:
    def tensors(self, prefix, rank=3, out=6, inputs=5):
        return {
            f"{prefix}.hada_w1_a": randn(out, rank, seed=1),
            f"{prefix}.hada_w1_b": randn(rank, inputs, seed=2),
            f"{prefix}.hada_w2_a": randn(out, rank, seed=3),
            f"{prefix}.hada_w2_b": randn(rank, inputs, seed=4),
        }

    def test_is_the_entrywise_product_of_two_products(self, layer_of):
        tensors = self.tensors(Q)
        tensors[f"{Q}.alpha"] = torch.tensor(1.5)
        layer = layer_of(tensors)
        w1a, w1b, w2a, w2b = (tensors[f"{Q}.hada_w{i}"] for i in ("1_a", "1_b", "2_a", "2_b"))
        expected = [
            [
                0.5
                * sum(float(w1a[o, r]) * float(w1b[r, i]) for r in range(3))
                * sum(float(w2a[o, r]) * float(w2b[r, i]) for r in range(3))
                for i in range(5)
            ]
            for o in range(6)
        ]
        assert close(layer.delta(), expected)
        assert (layer.kind, layer.rank, layer.shape) == ("LoHa", 3, (6, 5))

    def test_conv_without_core_keeps_the_kernel_in_the_columns(self, layer_of):
        layer = layer_of(self.tensors(CONV, out=6, inputs=5 * 9))
        assert layer.shape[0] == 6
        assert layer.entries == 6 * 5 * 9

    def test_tucker_form(self, layer_of):
        # LyCORIS: w[o,i,k,l] = Σ_pq t[p,q,k,l] · a[p,o] · b[q,i]; a is [rank, out] here.
        t = {i: randn(2, 3, 3, 3, seed=i) for i in (1, 2)}
        a = {i: randn(2, 4, seed=10 + i) for i in (1, 2)}
        b = {i: randn(3, 5, seed=20 + i) for i in (1, 2)}
        tensors = {}
        for i in (1, 2):
            tensors |= {
                f"{CONV}.hada_t{i}": t[i],
                f"{CONV}.hada_w{i}_a": a[i],
                f"{CONV}.hada_w{i}_b": b[i],
            }
        layer = layer_of(tensors)
        expected = np.zeros((4, 5, 3, 3))
        for o, i, k, m in itertools.product(range(4), range(5), range(3), range(3)):
            factors = [
                sum(
                    float(t[w][p, q, k, m]) * float(a[w][p, o]) * float(b[w][q, i])
                    for p in range(2)
                    for q in range(3)
                )
                for w in (1, 2)
            ]
            expected[o, i, k, m] = factors[0] * factors[1]
        assert close(layer.delta(), expected)
        assert (layer.shape, layer.rank) == ((4, 5, 3, 3), 3)


def kron(w1: np.ndarray, w2: np.ndarray) -> np.ndarray:
    """(W₁ ⊗ W₂)[a·A₂ + b, c·C₂ + d] = W₁[a, c] · W₂[b, d], for any kernel of W₂."""
    out = np.zeros((w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1], *w2.shape[2:]))
    for a, c in itertools.product(*map(range, w1.shape)):
        for b, d in itertools.product(*map(range, w2.shape[:2])):
            out[a * w2.shape[0] + b, c * w2.shape[1] + d] = w1[a, c] * w2[b, d]
    return out


class TestLoKr:
    W1 = randn(2, 3, seed=1)
    W2 = randn(4, 5, seed=2)
    W1_AB = (randn(2, 7, seed=3), randn(7, 3, seed=4))
    W2_AB = (randn(4, 2, seed=5), randn(2, 5, seed=6))

    @pytest.mark.parametrize(
        ("first", "second", "rank"),
        [("whole", "whole", None), ("ab", "whole", 7), ("whole", "ab", 2), ("ab", "ab", 2)],
    )
    def test_either_factor_whole_or_decomposed(self, layer_of, first, second, rank):
        tensors = {f"{Q}.alpha": torch.tensor(14.0)}
        if first == "whole":
            tensors[f"{Q}.lokr_w1"] = self.W1
            w1 = f64(self.W1)
        else:
            tensors |= dict(zip((f"{Q}.lokr_w1_a", f"{Q}.lokr_w1_b"), self.W1_AB, strict=True))
            w1 = f64(self.W1_AB[0]) @ f64(self.W1_AB[1])
        if second == "whole":
            tensors[f"{Q}.lokr_w2"] = self.W2
            w2 = f64(self.W2)
        else:
            tensors |= dict(zip((f"{Q}.lokr_w2_a", f"{Q}.lokr_w2_b"), self.W2_AB, strict=True))
            w2 = f64(self.W2_AB[0]) @ f64(self.W2_AB[1])
        layer = layer_of(tensors)
        assert (layer.kind, layer.rank, layer.shape) == ("LoKr", rank, (8, 15))
        # An undecomposed one has no rank, and its alpha no meaning: both hosts take scale 1.
        assert close(layer.delta(), kron(w1, w2) * (14 / rank if rank else 1))

    @pytest.mark.parametrize("prefix", [Q, "lora_te_text_model_encoder_layers_0_mlp_fc1"])
    def test_whole_factors_need_no_alpha_that_is_a_number(self, prefix):
        """LyCORIS with dim=100000 and AI Toolkit (9999999999) ask for whole factors by a huge rank,
        and save it as alpha: infinite in fp16. Both hosts leave it out, as there is no rank."""
        factors = {f"{prefix}.lokr_w1": self.W1, f"{prefix}.lokr_w2": self.W2}
        alpha = torch.tensor(100000.0, dtype=torch.float16)
        file = parse_lora("file", {**factors, f"{prefix}.alpha": alpha})
        if prefix == Q:
            (layer,) = file.layers.values()
            assert (layer.rank, layer.scale) == (None, 1.0)
            assert close(layer.delta(), kron(self.W1.numpy(), self.W2.numpy()))
        low = dict(zip((f"{prefix}.lokr_w2_a", f"{prefix}.lokr_w2_b"), self.W2_AB, strict=True))
        with pytest.raises(KLoraError, match="infinite"):
            parse_lora("file", {f"{prefix}.lokr_w1": self.W1, **low, f"{prefix}.alpha": alpha})

    def test_conv_whole(self, layer_of):
        w2 = randn(4, 5, 3, 3, seed=2)
        layer = layer_of({f"{CONV}.lokr_w1": self.W1, f"{CONV}.lokr_w2": w2})
        assert layer.shape == (8, 15, 3, 3)
        assert close(layer.delta(), kron(f64(self.W1), f64(w2)))

    def test_conv_decomposed_with_the_kernel_in_the_columns(self, layer_of):
        # W₂ = a·b has its kernel in its last dimension; ⊗ of the flat form is the flat ⊗.
        a, b = randn(4, 2, seed=5), randn(2, 5 * 9, seed=6)
        layer = layer_of(
            {f"{CONV}.lokr_w1": self.W1, f"{CONV}.lokr_w2_a": a, f"{CONV}.lokr_w2_b": b}
        )
        assert close(layer.delta(), kron(f64(self.W1), (f64(a) @ f64(b)).reshape(4, 5, 3, 3)))
        assert layer.entries == 8 * 15 * 9

    def test_conv_tucker(self, layer_of):
        t2, a, b = randn(2, 3, 3, 3, seed=7), randn(2, 4, seed=8), randn(3, 5, seed=9)
        layer = layer_of(
            {
                f"{CONV}.lokr_w1": self.W1,
                f"{CONV}.lokr_t2": t2,
                f"{CONV}.lokr_w2_a": a,
                f"{CONV}.lokr_w2_b": b,
            }
        )
        w2 = np.zeros((4, 5, 3, 3))
        for o, i, p, q in itertools.product(range(4), range(5), range(2), range(3)):
            w2[o, i] += f64(t2)[p, q] * float(a[p, o]) * float(b[q, i])
        assert (layer.shape, layer.rank) == ((8, 15, 3, 3), 3)
        assert close(layer.delta(), kron(f64(self.W1), w2))


class TestFull:
    @pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3), (6,)])
    def test_difference_is_itself_and_has_no_rank(self, layer_of, shape):
        diff = randn(*shape)
        layer = layer_of({f"{CONV}.diff": diff})
        assert (layer.kind, layer.rank, layer.shape) == ("full", None, shape)
        assert close(layer.delta(), f64(diff).reshape(6, -1))

    def test_norm_difference_with_its_bias(self, layer_of):
        norm = randn(6)
        layer = layer_of({f"{CONV}.w_norm": norm, f"{CONV}.b_norm": randn(6, seed=1)})
        assert layer.rank is None
        assert close(layer.delta(), f64(norm).reshape(6, 1))


class TestWholeFile:
    def test_text_encoder_is_counted_not_compared(self):
        te = "lora_te_text_model_encoder_layers_0_mlp_fc1"
        file = parse_lora("both", {**linear(Q), **linear(te)})
        assert set(file.layers) == {NAME}
        assert file.text_encoder == 1

    def test_text_encoder_alone_is_a_lora(self):
        file = parse_lora("te", linear("lora_te_text_model_encoder_layers_0_mlp_fc1"))
        assert not file.layers
        assert file.text_encoder == 1

    def test_types_that_cannot_be_compared_are_listed(self):
        ia3 = {"lora_unet_mid_block_x.weight": randn(4), "lora_unet_mid_block_x.on_input": randn(1)}
        oft = {
            "lora_unet_mid_block_y.oft_blocks": randn(2, 2, 2),
            "lora_unet_mid_block_y.alpha": torch.tensor(1e-3),
        }
        file = parse_lora("mixed", {**linear(Q), **ia3, **oft})
        assert set(file.layers) == {NAME}
        assert file.unread == ("lora_unet_mid_block_x", "lora_unet_mid_block_y")

    def test_embeddings_in_the_bundle_are_no_unread_layer(self):
        file = parse_lora("bundle", {**linear(Q), "bundle_emb.word.string_to_param.*": randn(1, 4)})
        assert file.unread == ()

    def test_a_read_layer_is_not_listed_as_unread(self):
        more = {f"{Q}.diff_b": randn(8), f"{Q}.of_another_program": randn(1)}
        file = parse_lora("x", {**linear(Q, alpha=4), **more})
        assert file.unread == ()

    @pytest.mark.parametrize("bias", ["lora_B.bias", "lora_B.default.bias"])
    def test_the_bias_of_peft_belongs_to_its_layer(self, bias):
        weight = bias.replace("bias", "weight")
        tensors = {
            f"{Q}.{weight.replace('B', 'A')}": randn(4, 8),
            f"{Q}.{weight}": randn(8, 4),
        }
        plain = parse_lora("x", tensors)
        file = parse_lora("x", {**tensors, f"{Q}.{bias}": randn(8)})
        assert file.unread == ()
        assert torch.equal(file.layers[NAME].delta(), plain.layers[NAME].delta())

    def test_layer_without_tensors_keeps_what_describes_it(self):
        layer = parse_lora("x", linear(Q)).layers[NAME]
        light = layer.without_tensors()
        assert not light.tensors
        assert (light.name, light.rank, light.shape, light.kind) == (NAME, 4, (8, 8), "LoRA")


K = Q.replace("to_q", "to_k")


class TestOddFiles:
    """What people have: the layers that can be applied are, and the rest is told."""

    def parse(self, *tensors):
        return parse_lora("x", {key: y for part in tensors for key, y in part.items()})

    def test_a_layer_of_rank_zero_is_left_out(self):
        file = self.parse(linear(Q), linear(K, rank=0))
        assert [layer.prefix for layer in file.layers.values()] == [Q]
        assert file.notes == (f"1 layer of “x” (such as {K}) has rank zero: left out.",)

    def test_nothing_but_rank_zero_is_an_error(self):
        with pytest.raises(KLoraError, match=r"no layer that can be applied: 2 .* have rank"):
            self.parse(linear(Q, rank=0), linear(K, rank=0))

    @pytest.mark.parametrize("part", ["alpha", "dora_scale", "diff_b"])
    def test_a_number_that_is_not_there_is_damage(self, part):
        with pytest.raises(KLoraError, match=f"damaged: layer {Q} has no number in its"):
            self.parse(linear(Q), linear(K), {f"{Q}.{part}": torch.ones(0)})

    @pytest.mark.parametrize("shape", [(6, 1), (1, 4), (4,)])
    def test_a_dora_scale_by_row_or_by_column(self, shape):
        tensors = {f"{Q}.lora_up.weight": randn(6, 2), f"{Q}.lora_down.weight": randn(2, 4)}
        file = self.parse(tensors, {f"{Q}.dora_scale": torch.ones(shape)})
        assert not file.notes
        assert file.layers[NAME].kind == "DoRA"

    @pytest.mark.parametrize("shape", [(), (6,), (7,), (4, 1), (1, 6), (6, 4), (1, 1, 4)])
    def test_a_dora_scale_that_fits_no_weight_costs_its_layer(self, shape):
        tensors = {f"{Q}.lora_up.weight": randn(6, 2), f"{Q}.lora_down.weight": randn(2, 4)}
        scale = {f"{Q}.dora_scale": torch.ones(shape)}
        file = self.parse(tensors, scale, linear(K))
        assert [layer.prefix for layer in file.layers.values()] == [K]
        (note,) = file.notes
        assert f"“x” (such as {Q})" in note
        assert f"shape ({' × '.join(map(str, shape))})" in note
        assert "6 × 4" in note
        with pytest.raises(KLoraError, match="dora_scale"):
            self.parse(tensors, scale)

    @pytest.mark.parametrize("ones", [(1, 1), ()])
    def test_a_dora_scale_of_a_conv_layer(self, ones):
        tensors = {
            f"{CONV}.lora_up.weight": randn(6, 2, 1, 1),
            f"{CONV}.lora_down.weight": randn(2, 4, 3, 3),
            f"{CONV}.dora_scale": torch.ones(1, 4, *ones),
        }
        assert not self.parse(tensors).notes

    @pytest.mark.parametrize("ending", ["", ".weight", ".default.weight"])
    def test_magnitudes_of_peft(self, ending):
        file = self.parse(linear(Q), {f"{Q}.lora_magnitude_vector{ending}": torch.ones(8)})
        assert file.layers[NAME].kind == "DoRA"
        (note,) = file.notes
        assert "magnitudes (such as" in note
        assert not file.unread

    def test_scaled_fp8(self):
        scales = {f"{Q}.lora_{x}.scale_weight": torch.ones(1) for x in ("up", "down")}
        file = self.parse(linear(Q), scales)
        assert not file.unread
        (note,) = file.notes
        assert note.startswith(f"2 tensors of “x” (such as {Q}.lora_down.scale_weight)")

    def test_an_alpha_that_no_trainer_means(self):
        file = self.parse(linear(Q, rank=4, alpha=9999220736), linear(K, rank=4, alpha=64))
        (note,) = file.notes
        assert f"1 layer of “x” (such as {Q}) has alpha 9.99922e+09 at rank 4" in note
        assert "2.49981e+09 times" in note

    @pytest.mark.parametrize("adapter", ["default", "default_0", "sks"])
    def test_a_named_adapter(self, adapter):
        tensors = {
            f"{Q}.lora_A.{adapter}.weight": randn(2, 8),
            f"{Q}.lora_B.{adapter}.weight": randn(8, 2),
        }
        assert self.parse(tensors).layers[NAME].kind == "LoRA"
        with pytest.raises(KLoraError, match=f"several adapters .*“{adapter}”.* a file of its own"):
            self.parse(tensors, {f"{K}.lora_A.other.weight": randn(2, 8)})

    @pytest.mark.parametrize(
        ("ending", "kind"),
        [
            ("oft_blocks", "OFT"),
            ("oft_diag", "OFT"),
            ("boft_R", "BOFT"),
            ("a1.weight", "GLoRA"),
            ("on_input", "IA³"),
        ],
    )
    def test_a_type_that_cannot_be_compared_is_named(self, ending, kind):
        with pytest.raises(KLoraError, match=f"“x” is of the type {kind}, .*<lora:…>"):
            self.parse({f"{Q}.{ending}": torch.ones(2, 2)})


@pytest.mark.parametrize("dtype", ["float16", "float64", "float8_e4m3fn"])
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' VmHWM")
def test_a_large_tensor_is_not_copied(dtype):
    """16 million entries, which are 64 MiB in fp32 and 128 in fp64: no more than 16 for them."""
    program = """
import re, sys
sys.path[:0] = [sys.argv[1]]
import torch
from lib_klora.lora_file import parse_lora
torch.set_num_threads(1)

def status(name):
    return int(re.search(name + r":\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

def tensors(size):
    return {"lora_unet_mid_block_resnets_0_conv1.diff": torch.ones(size, size).to(dtype)}

dtype = getattr(torch, sys.argv[2])
parse_lora("small", tensors(8))
large = tensors(4096)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
parse_lora("large", large)
print(status("VmHWM") - before)
"""
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", program, root, dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(result.stdout) <= 16


@pytest.mark.parametrize("place", [0, 2**18 - 1, 2**18, -1])
def test_a_bad_number_is_found_wherever_it_is(place):
    diff = torch.zeros(600, 1000)
    diff.view(-1)[place] = float("nan")
    with pytest.raises(KLoraError, match="NaN"):
        parse_lora("x", {f"{CONV}.diff": diff})


def poisoned(part: str, value: float) -> dict:
    tensors = linear(Q, alpha=4)
    tensors[f"{Q}.{part}"].view(-1)[-1] = value
    return tensors


def without(tensors: dict, ending: str) -> dict:
    return {key: value for key, value in tensors.items() if not key.endswith(ending)}


LOHA = TestLoHa().tensors(Q)
HOSTILE_TENSORS = {
    "NaN in up": poisoned("lora_up.weight", float("nan")),
    "inf in down": poisoned("lora_down.weight", float("inf")),
    "-inf in up": poisoned("lora_up.weight", float("-inf")),
    "NaN alpha": poisoned("alpha", float("nan")),
    "NaN in the text encoder": {
        key.replace(Q, "lora_te_text_model_encoder_layers_0_mlp_fc1"): value
        for key, value in poisoned("lora_up.weight", float("nan")).items()
    },
    "all NaN in fp16": {
        f"{Q}.lora_up.weight": torch.full((8, 4), float("nan"), dtype=torch.float16),
        f"{Q}.lora_down.weight": torch.full((4, 8), float("nan"), dtype=torch.float16),
    },
    "a checkpoint": {
        "model.diffusion_model.input_blocks.0.0.weight": randn(4, 4, 3, 3),
        "model.diffusion_model.input_blocks.0.0.bias": randn(4),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(4),
    },
    "an embedding": {"emb_params": randn(4, 8)},
    "nothing": {},
    "alpha only": {f"{Q}.alpha": torch.tensor(4.0)},
    "zero rank": {f"{Q}.lora_up.weight": randn(8, 0), f"{Q}.lora_down.weight": randn(0, 8)},
    "zero rank LoHa": {key: value[:0] for key, value in LOHA.items()},
    "no outputs": {f"{Q}.lora_up.weight": randn(0, 4), f"{Q}.lora_down.weight": randn(4, 8)},
    "missing up": without(linear(Q), "up.weight"),
    "missing down": without(linear(Q), "down.weight"),
    "missing LoHa half": without(LOHA, "w2_b"),
    "missing LoKr half": {f"{Q}.lokr_w1": randn(2, 2)},
    "missing LoKr b": {f"{Q}.lokr_w1": randn(2, 2), f"{Q}.lokr_w2_a": randn(2, 2)},
    "core only": {f"{CONV}.lora_mid.weight": randn(2, 2, 3, 3)},
    "ranks differ": {f"{Q}.lora_up.weight": randn(8, 4), f"{Q}.lora_down.weight": randn(3, 8)},
    "core of another rank": {
        f"{CONV}.lora_up.weight": randn(8, 4, 1, 1),
        f"{CONV}.lora_mid.weight": randn(3, 3, 3, 3),
        f"{CONV}.lora_down.weight": randn(4, 8, 1, 1),
    },
    "LoHa halves differ": {**LOHA, f"{Q}.hada_w2_a": randn(7, 3)},
    "factor with one dimension": {
        f"{Q}.lora_up.weight": randn(8),
        f"{Q}.lora_down.weight": randn(4, 8),
    },
    "alpha of many numbers": {**linear(Q), f"{Q}.alpha": torch.ones(3)},
    "down without dimensions": {
        f"{Q}.lora_up.weight": randn(8, 4),
        f"{Q}.lora_down.weight": torch.tensor(1.0),
    },
    "difference without dimensions": {f"{Q}.diff": torch.tensor(1.0)},
    "LoHa half that would be broadcast": {**LOHA, f"{Q}.hada_w2_a": randn(1, 3)},
    "core that would be broadcast": {
        f"{CONV}.lora_up.weight": randn(8, 4, 1, 1),
        f"{CONV}.lora_mid.weight": randn(1, 4, 3, 3),
        f"{CONV}.lora_down.weight": randn(4, 8, 1, 1),
    },
    "LoKr core that would be broadcast": {
        f"{CONV}.lokr_w1": randn(2, 3),
        f"{CONV}.lokr_t2": randn(2, 1, 3, 3),
        f"{CONV}.lokr_w2_a": randn(2, 4),
        f"{CONV}.lokr_w2_b": randn(3, 5),
    },
    "core without dimensions": {
        f"{CONV}.lora_up.weight": randn(8, 4, 1, 1),
        f"{CONV}.lora_mid.weight": torch.tensor(1.0),
        f"{CONV}.lora_down.weight": randn(4, 8, 1, 1),
    },
    "LoKr without dimensions": {
        f"{Q}.lokr_w1": torch.tensor(1.0),
        f"{Q}.lokr_w2": torch.tensor(1.0),
    },
    "complex numbers": {
        f"{Q}.lora_up.weight": randn(8, 4).to(torch.complex64),
        f"{Q}.lora_down.weight": randn(4, 8).to(torch.complex64),
    },
    "complex numbers in the text encoder": {
        **linear(Q),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(
            8, 4, dtype=torch.complex64
        ),
    },
    "complex alpha": {**linear(Q), f"{Q}.alpha": torch.tensor(1j)},
}


def file_bytes(size: int = 64) -> bytes:
    header = b'{"a.lora_up.weight":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    return (len(header).to_bytes(8, "little") + header + bytes(16))[:size]


def fp4_bytes() -> bytes:
    """A LoRA of a type that some torch can hold and none can compute with."""
    tensor = {"dtype": "F4", "shape": [8, 8]}
    header = json.dumps(
        {
            f"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.{part}": {
                **tensor,
                "data_offsets": [32 * i, 32 * i + 32],
            }
            for i, part in enumerate(("lora_down.weight", "lora_up.weight"))
        }
    ).encode()
    return len(header).to_bytes(8, "little") + header + bytes(64)


HOSTILE_BYTES = {
    "fp4": fp4_bytes(),
    "zero bytes": b"",
    "four bytes": b"abcd",
    "truncated header": file_bytes(30),
    "truncated data": file_bytes(8 + 70 + 4),
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.",
    "a zip (.ckpt)": b"PK\x03\x04" + bytes(60),
    "a web page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "header longer than the file": (2**62).to_bytes(8, "little") + b"{}",
    "header that is no JSON": (4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc",
}


def read_all(path):
    """Everything the session does with a file before it pairs it."""
    return [x.delta() for x in parse_lora(path.stem, SafetensorsFile(path)).layers.values()]


def refusal(path) -> str:
    """The sentence that a hostile file gets: the only way out, with the file left as it is."""
    before = hashlib.sha256(path.read_bytes()).digest()
    with pytest.raises(KLoraError) as error:
        read_all(path)
    assert hashlib.sha256(path.read_bytes()).digest() == before, "the file was changed"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    sentence = str(error.value)
    assert path.stem in sentence
    assert "hoose another file" in sentence or "download it again" in sentence
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("case", HOSTILE_TENSORS)
def test_hostile_tensors_get_a_sentence(tmp_path, case):
    path = tmp_path / "my file_ü.safetensors"
    save_file(HOSTILE_TENSORS[case], path)
    refusal(path)


@pytest.mark.parametrize("case", HOSTILE_BYTES)
def test_hostile_bytes_get_a_sentence(tmp_path, case):
    path = tmp_path / "my file_ü.safetensors"
    path.write_bytes(HOSTILE_BYTES[case])
    refusal(path)


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("NaN in up", Q),
        ("zero rank", Q),
        ("missing up", "down"),
        ("ranks differ", "[3, 8]"),
        ("a checkpoint", "no LoRA"),
    ],
)
def test_sentence_names_what_is_wrong(tmp_path, case, named):
    path = tmp_path / "hostile.safetensors"
    save_file(HOSTILE_TENSORS[case], path)
    assert named in refusal(path)


@pytest.mark.parametrize("name", ["gone.safetensors", "."])
def test_missing_file_and_folder_get_a_sentence(tmp_path, name):
    with pytest.raises(KLoraError, match="cannot be read"):
        SafetensorsFile(tmp_path / name)
