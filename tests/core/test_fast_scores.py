"""The fast analysis gives what the plain formulas give, whatever the file holds."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import second_device
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_klora import blocks, klora, lora_file, pair, scores
from lib_klora.errors import KLoraError
from lib_klora.lora_file import FusedLayer, Layer, parse_lora

GPU = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no GPU, or a torch without CUDA: it is not checked"
    ),
)
SECOND = pytest.param(second_device.NAME, id="second device")
devices = pytest.mark.parametrize("device", ["cpu", GPU])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"

# Every kind and spelling of ΔW: the factors' shapes from rank, out and in.
SHAPES = {
    "LoRA": lambda r, o, i: {"up": (o, r), "down": (r, i)},
    "LoRA conv": lambda r, o, i: {"up": (o, r, 1, 1), "down": (r, i, 3, 3)},
    "LoRA CP": lambda r, o, i: {"up": (o, r, 1, 1), "down": (r, i, 1, 1), "mid": (r, r, 3, 3)},
    "DoRA": lambda r, o, i: {"up": (o, r), "down": (r, i), "dora_scale": (o, 1)},
    "LoHa": lambda r, o, i: {
        **{"hada_w1_a": (o, r), "hada_w1_b": (r, i)},
        **{"hada_w2_a": (o, r), "hada_w2_b": (r, i)},
    },
    "LoHa CP": lambda r, o, i: {
        **{"hada_w1_a": (r, o), "hada_w1_b": (r, i), "hada_t1": (r, r, 3, 3)},
        **{"hada_w2_a": (r, o), "hada_w2_b": (r, i), "hada_t2": (r, r, 3, 3)},
    },
    "LoKr": lambda r, o, i: {"lokr_w1": (3, 2), "lokr_w2_a": (o, r), "lokr_w2_b": (r, i)},
    "LoKr given": lambda r, o, i: {"lokr_w1": (o, i), "lokr_w2": (2, 5)},
    "LoKr conv": lambda r, o, i: {
        **{"lokr_w1_a": (2, r), "lokr_w1_b": (r, 4)},
        **{"lokr_w2_a": (r, o), "lokr_w2_b": (r, i), "lokr_t2": (r, r, 3, 3)},
    },
    "full": lambda r, o, i: {"diff": (o, i, 3, 3)},
    "full norm": lambda r, o, i: {"diff": (o,)},
}


def formula(layer: Layer) -> np.ndarray:
    """ΔW in fp64, from the papers' formulas and numpy alone."""
    x = {name: tensor.double().numpy() for name, tensor in layer.tensors.items()}
    tucker = "pqkl,po,qi->oikl"
    if layer.kind in ("LoRA", "DoRA"):
        up, down = x["up"].reshape(len(x["up"]), -1), x["down"].reshape(len(x["down"]), -1)
        if "mid" in x:
            return np.einsum("nmkl,on,mi->oikl", x["mid"], up, down) * layer.scale
        return up @ down * layer.scale
    if layer.kind == "full":
        return x["diff"] * layer.scale
    word = "hada" if layer.kind == "LoHa" else "lokr"
    w = []
    for i in "12":
        name, core = f"{word}_w{i}", f"{word}_t{i}"
        if name in x:
            w.append(x[name])
        elif core in x:
            w.append(np.einsum(tucker, x[core], x[f"{name}_a"], x[f"{name}_b"]))
        else:
            w.append(x[f"{name}_a"] @ x[f"{name}_b"])
    if layer.kind == "LoHa":
        return w[0] * w[1] * layer.scale
    return np.kron(w[0].reshape(*w[0].shape, *[1] * (w[1].ndim - 2)), w[1]) * layer.scale


@st.composite
def layers(draw) -> Layer:
    """A layer as a file may hold it: of any kind, shape, rank and dtype, with fast or slowly
    falling spectrum, with many equal entries, with zero rows, not contiguous, all zero."""
    kind = draw(st.sampled_from(sorted(SHAPES)))
    rank = draw(st.integers(1, 12))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = draw(st.sampled_from(("normal", "spectrum", "ties", "one value", "sparse", "zero")))
    tensors = {}
    for name, shape in SHAPES[kind](
        rank, draw(st.integers(1, 40)), draw(st.integers(1, 40))
    ).items():
        x = numbers.normal(size=shape)
        if values == "spectrum":
            x *= np.exp(2 * numbers.normal(size=(shape[0], *[1] * (len(shape) - 1))))
        elif values == "ties":
            x = numbers.integers(-2, 3, size=shape)
        elif values == "one value":
            x = np.full(shape, 0.5)
        elif values == "sparse":
            x = x * (numbers.random(shape) < 0.05)
        elif values == "zero":
            x = x * 0
        tensor = torch.from_numpy(np.asarray(x, np.float64)).to(draw(st.sampled_from(DTYPES)))
        if tensor.dim() > 1 and draw(st.booleans()):
            tensor = tensor.mT.contiguous().mT  # another order in memory
        tensors[name] = tensor
    declared = None if kind in ("LoKr given", "full", "full norm") else rank
    scale = draw(st.sampled_from((1.0, 0.37, -2.0, 0.0)))
    layer = Layer(kind, kind, kind.split()[0], declared, scale, (), tensors)
    return dataclasses.replace(layer, shape=formula(layer).shape)


@st.composite
def maybe_fused(draw) -> Layer | FusedLayer:
    if draw(st.integers(0, 3)):
        return draw(layers())
    parts = draw(st.lists(layers(), min_size=2, max_size=3))
    return FusedLayer("qkv", tuple(parts))


def reference(layer: Layer | FusedLayer) -> np.ndarray:
    """|ΔW| in fp64, descending."""
    parts = layer.parts if isinstance(layer, FusedLayer) else [layer]
    return np.sort(np.concatenate([np.abs(formula(part)).ravel() for part in parts]))[::-1]


def without_cancelling(layer: Layer | FusedLayer) -> Layer | FusedLayer:
    """The layer with all factors' numbers positive: what is added up in its entries."""
    if isinstance(layer, FusedLayer):
        return dataclasses.replace(layer, parts=tuple(map(without_cancelling, layer.parts)))
    tensors = {name: tensor.abs() for name, tensor in layer.tensors.items()}
    return dataclasses.replace(layer, tensors=tensors)


def rounding(layer: Layer | FusedLayer) -> float:
    """How far fp32 may be off in an entry: some of its roundings (2⁻²⁴) of the summands. That is
    more than 1e-6 of the entry where the summands nearly cancel."""
    return 3e-7 * max(reference(without_cancelling(layer))[0], 1e-23)


def assert_exact(table, layer, ks) -> None:
    running = np.cumsum(reference(layer))
    noise = rounding(layer)
    for k in ks:
        assert table.at(int(k)) == pytest.approx(running[k - 1], rel=1e-6, abs=noise)
    assert table.total == pytest.approx(running[-1], rel=1e-6, abs=noise)
    energy = np.square(reference(layer)).sum()
    assert table.energy == pytest.approx(energy, rel=2e-6, abs=noise * (2 * running[-1] + noise))


@pytest.fixture
def small_blocks(monkeypatch):
    """Limits so small that layers of a few hundred entries pass every branch: several blocks,
    factors in pieces, the smallest kept entries going, the counting of a K that is too large to
    keep."""
    monkeypatch.setattr(blocks, "BLOCK_CPU", 64)
    monkeypatch.setattr(blocks, "BLOCK_GPU", 64)
    monkeypatch.setattr(blocks, "FACTOR", 32)
    monkeypatch.setattr(blocks, "SAMPLE", 32)
    monkeypatch.setattr(scores, "_SLACK", 8)
    monkeypatch.setattr(scores, "_CHUNK", 20)
    monkeypatch.setattr(scores, "_MOST_KEPT", 50)


@devices
@given(layer=maybe_fused(), data=st.data())
def test_equals_the_formulas_in_fp64(device, layer, data):
    ks = data.draw(st.lists(st.integers(1, layer.entries), min_size=1, max_size=5, unique=True))
    ks = np.array(sorted(ks))
    with scores._exact_arithmetic(device):
        assert_exact(scores._analyse("content", layer, ks, device), layer, ks)


@devices
@pytest.mark.usefixtures("small_blocks")
@given(layer=maybe_fused(), data=st.data())
def test_equals_the_formulas_however_little_fits_into_memory(device, layer, data):
    ks = data.draw(st.lists(st.integers(1, layer.entries), min_size=1, max_size=5, unique=True))
    ks = np.array(sorted(ks))
    with scores._exact_arithmetic(device):
        assert_exact(scores._analyse("content", layer, ks, device), layer, ks)


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=15)  # each operation of this device goes through Python
@given(layer=maybe_fused(), data=st.data())
def test_equals_the_formulas_on_a_second_device(layer, data):
    ks = np.array([data.draw(st.integers(1, layer.entries))])
    assert_exact(scores._analyse("content", layer, ks, second_device.NAME), layer, ks)


@pytest.mark.parametrize("guesses", [(), (1e30,), (1e30, 1e20, 1e-30), (-1.0,), (float("inf"),)])
@given(layer=maybe_fused(), share=st.floats(0, 1))
def test_a_bad_guess_of_the_threshold_costs_time_only(guesses, layer, share):
    ks = np.array([max(1, int(share * layer.entries))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "_thresholds", lambda *args: iter((*guesses, 0.0)))
        assert_exact(scores._analyse("content", layer, ks, "cpu"), layer, ks)


@given(maybe_fused())
def test_blocks_hold_every_entry_once(layer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_CPU", 128)
        patch.setattr(blocks, "FACTOR", 100)
        pieces = [block.clone().flatten() for block in blocks.blocks(layer, "cpu")]
    entries = torch.cat(pieces).sort(descending=True).values.double().numpy()
    expected = reference(layer)
    noise = max(1e-6 * expected[0], rounding(layer))
    np.testing.assert_allclose(entries, expected, rtol=1e-5, atol=noise)


@pytest.mark.parametrize("shape", [(2, 300_000), (300_000, 2)])
@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "full"])
def test_blocks_are_small_for_layers_of_any_form(kind, shape):
    """A row may be longer than a block."""
    tensors = {name: torch.ones(s) for name, s in SHAPES[kind](1, *shape).items()}
    if kind == "full":
        tensors = {"diff": torch.ones(shape)}
    layer = Layer(kind, kind, kind, 1, 1.0, (), tensors)
    layer = dataclasses.replace(layer, shape=formula(layer).shape)
    sizes = [block.numel() for block in blocks.blocks(layer, "cpu")]
    assert max(sizes) <= blocks.BLOCK_CPU
    assert sum(sizes) == layer.entries


@given(maybe_fused())
def test_sample_holds_entries_of_the_layer(layer):
    entries = reference(layer)
    some = blocks.sample(layer, "cpu").double().numpy()
    assert len(some) >= 1
    nearest = np.abs(entries[:, None] - some[None, :200]).min(0)
    largest = reference(without_cancelling(layer))[0]
    assert (nearest <= 1e-5 * max(largest, 1e-30)).all()


@given(maybe_fused())
def test_files_tensors_are_left_as_they_are(layer):
    parts = layer.parts if isinstance(layer, FusedLayer) else [layer]
    before = [{name: t.clone() for name, t in part.tensors.items()} for part in parts]
    scores._analyse("content", layer, np.array([1]), "cpu")
    for part, tensors in zip(parts, before, strict=True):
        assert all(torch.equal(part.tensors[name], t) for name, t in tensors.items())


@given(layers())
def test_partner_ks_are_the_pairs_ks(layer):
    ranks = range(1, 129)
    own = layer.rank
    expected = {klora.top_k(own or rank, rank, layer.entries) for rank in ranks}
    assert scores.partner_ks(layer).tolist() == sorted(expected)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_fp8_file_is_read(kind, dtype):
    tensors = {name: torch.randn(s).to(dtype) for name, s in SHAPES[kind](4, 32, 48).items()}
    layer = Layer("q", "q", kind.split()[0], 4, 1.0, (), tensors)
    layer = dataclasses.replace(layer, shape=formula(layer).shape)
    assert_exact(scores._analyse("content", layer, np.array([1, 16]), "cpu"), layer, [1, 16])


# -- pairs ----------------------------------------------------------------------------------------


def sdxl_like(rank: int, seed: int, layers_: int = 8) -> lora_file.LoraFile:
    """A few attention layers of a size at which the sample is much smaller than the layer."""
    tensors = {}
    for i in range(layers_):
        name = NAME.replace("blocks_0", f"blocks_{i}")
        for j, (part, shape) in enumerate(SHAPES["LoRA"](rank, 320, 640).items()):
            generator = torch.Generator().manual_seed(1000 * seed + 10 * i + j)
            tensors[f"{name}.lora_{part}.weight"] = torch.randn(shape, generator=generator).half()
    return parse_lora(f"file{seed}", tensors)


@pytest.mark.parametrize("ranks", [(1, 1), (4, 16), (64, 64), (300, 200)])
def test_choices_are_those_of_the_plain_way(ranks):
    files = pair.pair_files(sdxl_like(ranks[0], 1), sdxl_like(ranks[1], 2))
    fast = scores.compute_scores(files)
    plain = np.array(
        [
            [klora.top_k_sum(side.delta(), layer.k) for side in (layer.content, layer.style)]
            + [klora.abs_sum(side.delta()) for side in (layer.content, layer.style)]
            for layer in files.paired
        ]
    )
    found = np.stack([fast.s_content, fast.s_style, fast.abs_content, fast.abs_style], axis=1)
    np.testing.assert_allclose(found, plain, rtol=1e-6)
    gamma = klora.gamma_paper(plain[:, 2], plain[:, 3])
    scale = klora.scale_s(np.linspace(0, 1, 101))
    expected = klora.chooses_content(plain[:, 0], plain[:, 1], gamma, scale)
    chosen = klora.chooses_content(fast.s_content, fast.s_style, fast.gamma("paper"), scale)
    clear = np.abs(plain[:, 0] / (gamma * plain[:, 1]) / scale[:, None] - 1) > 1e-6
    assert (chosen == expected)[clear].all()


@pytest.mark.parametrize("top_k", [0.01, 1.0, 7.3, 1e6])
def test_multiplier(top_k):
    files = pair.pair_files(sdxl_like(8, 1, 2), sdxl_like(8, 2, 2), top_k=top_k)
    found = scores.compute_scores(files)
    for i, layer in enumerate(files.paired):
        expected = reference(layer.content)[: layer.k].sum()
        assert found.s_content[i] == pytest.approx(expected, rel=1e-6)


def test_nothing_paired():
    empty = pair.Pair((), {}, ())
    assert scores.compute_scores(empty).s_content.shape == (0,)


def test_progress_counts_the_layers_of_both_files():
    files = pair.pair_files(sdxl_like(2, 1, 3), sdxl_like(2, 2, 3))
    seen = []
    scores.compute_scores(files, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(7)]


def test_progress_may_stop_it():
    class Interrupted(Exception):
        pass

    def stop(done, total):
        if done == 2:
            raise Interrupted

    files = pair.pair_files(sdxl_like(2, 1, 3), sdxl_like(2, 2, 3))
    with pytest.raises(Interrupted):
        scores.compute_scores(files, progress=stop)


def test_too_large_for_fp32_is_an_error():
    tensors = {
        f"{NAME}.lora_up.weight": torch.full((8, 1), 1e30),
        f"{NAME}.lora_down.weight": torch.full((1, 8), 1e30),
    }
    files = pair.pair_files(parse_lora("big", tensors), parse_lora("big", tensors))
    with pytest.raises(KLoraError, match=r"content LoRA.*attn1_to_q"):
        scores.compute_scores(files)


def test_nan_inside_a_layer_is_an_error():
    """Overflow may give NaN (∞ − ∞), which no comparison finds."""
    tensors = {
        f"{NAME}.lora_up.weight": torch.full((8, 2), 1e30),
        f"{NAME}.lora_down.weight": torch.stack([torch.full((8,), 1e30), torch.full((8,), -1e30)]),
    }
    files = pair.pair_files(parse_lora("nan", tensors), parse_lora("nan", tensors))
    with pytest.raises(KLoraError):
        scores.compute_scores(files)


@pytest.mark.parametrize("device", [SECOND, GPU])
@pytest.mark.parametrize("rank", [8, 128])
def test_a_device_gives_the_same_numbers_and_the_same_choices(device, rank, log):
    files = pair.pair_files(sdxl_like(rank, 1, 2), sdxl_like(rank, 2, 2))
    cpu, gpu = (scores.compute_scores(files, where) for where in ("cpu", device))
    assert not log.records, "the CPU went on"
    for name in ("s_content", "s_style", "abs_content", "abs_style"):
        np.testing.assert_allclose(getattr(gpu, name), getattr(cpu, name), rtol=1e-6)
    scale = klora.scale_s(np.linspace(0, 1, 200))
    ratio = cpu.s_content / (cpu.gamma("paper") * cpu.s_style)
    clear = np.abs(ratio[None, :] / scale[:, None] - 1) > 1e-6
    choices = [
        klora.chooses_content(x.s_content, x.s_style, x.gamma("paper"), scale) for x in (cpu, gpu)
    ]
    assert (choices[0] == choices[1])[clear].all()


def test_the_second_device_rounds_otherwise_and_has_its_own_memory():
    """Else the tests on it would say nothing."""
    a, b = torch.randn(50, 64), torch.randn(64, 70)
    theirs, mine = (a.to(second_device.NAME) @ b.to(second_device.NAME)).cpu(), a @ b
    assert not torch.equal(theirs, mine)
    torch.testing.assert_close(theirs, mine)
    with pytest.raises(RuntimeError, match="same device"):
        a.to(second_device.NAME) @ b


def test_the_cpu_goes_on_where_a_device_fails(log):
    """“meta” is a device that every torch has, and of which no number can be had."""
    files = pair.pair_files(sdxl_like(8, 1, 2), sdxl_like(8, 2, 2))
    expected = scores.compute_scores(files)
    seen = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scores.compute_scores(files, "meta", progress=lambda done, _: seen.append(done))
    for name in ("s_content", "s_style", "abs_content", "abs_style"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert seen == list(range(5))
    (said,) = (record.getMessage() for record in log.records)
    assert "meta" in said
    assert "CPU" in said


def test_the_cpu_goes_on_where_a_device_lacks_a_number_type(log, monkeypatch):
    """Apple's GPUs have no fp64, and torch raises a TypeError there."""
    files = pair.pair_files(sdxl_like(8, 1, 2), sdxl_like(8, 2, 2))
    expected = scores.compute_scores(files)
    matrices = blocks._matrices

    def without_fp64(layer, device):
        if device != "cpu":
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return matrices(layer, device)

    monkeypatch.setattr(blocks, "_matrices", without_fp64)
    found = scores.compute_scores(files, second_device.NAME)
    np.testing.assert_array_equal(found.s_content, expected.s_content)
    assert "CPU" in log.text


def test_a_device_gets_the_factors_alone():
    layer = sdxl_like(8, 1, 1).layers.popitem()[1]
    others = dict.fromkeys(("alpha", "dora_scale", "bias"), "not a tensor")
    layer = dataclasses.replace(layer, tensors={**layer.tensors, **others})
    assert len(blocks.sample(layer, second_device.NAME))


def test_a_host_under_autocast_gets_the_same_numbers():
    """A1111 activates extra networks under autocast, where a matmul is half precision."""
    files = pair.pair_files(sdxl_like(8, 1, 2), sdxl_like(8, 2, 2))
    expected = scores.compute_scores(files)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scores.compute_scores(files)
        assert torch.is_autocast_enabled("cpu") if torch.__version__ >= (2, 4) else True
    np.testing.assert_array_equal(found.s_content, expected.s_content)
    np.testing.assert_array_equal(found.abs_style, expected.abs_style)


def test_torchs_switches_are_as_before():
    files = pair.pair_files(sdxl_like(2, 1, 1), sdxl_like(2, 2, 1))
    tf32, threads = torch.backends.cuda.matmul.allow_tf32, torch.get_num_threads()
    torch.backends.cuda.matmul.allow_tf32 = True  # as A1111 does
    seen = set()
    try:
        scores.compute_scores(files, progress=lambda *_: seen.add(torch.get_num_threads()))
        assert torch.backends.cuda.matmul.allow_tf32 is True
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    assert seen == {threads}
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("version", ["2.1.2", torch.__version__])
@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_the_precision_of_matmuls_is_as_before(precision, version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    files = pair.pair_files(sdxl_like(2, 1, 1), sdxl_like(2, 2, 1))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        scores.compute_scores(files)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="an older torch has one switch for all")
def test_a_precision_that_is_inherited_stays_so():
    backends = torch.backends
    before = backends.fp32_precision
    matmul = backends.cuda.matmul.fp32_precision
    try:
        backends.cuda.matmul.fp32_precision = "none"
        backends.fp32_precision = "tf32"
        scores.compute_scores(pair.pair_files(sdxl_like(2, 1, 1), sdxl_like(2, 2, 1)))
        assert backends.cuda.matmul.fp32_precision == "tf32"
        backends.fp32_precision = "ieee"
        assert backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        backends.fp32_precision, backends.cuda.matmul.fp32_precision = before, matmul


@dataclasses.dataclass(frozen=True)
class Large:
    """A layer as a file may hold it, by its size: see ``SHAPES``."""

    kind: str
    out: int
    inner: int
    rank: int = 16
    dtype: str = "float16"

    def __str__(self) -> str:
        return f"{self.kind} {self.out}x{self.inner} rank {self.rank} {self.dtype}"

    def layer(self) -> Layer:
        dtype, kind = getattr(torch, self.dtype), self.kind.split()[0]
        shapes = SHAPES[self.kind](self.rank, self.out, self.inner)
        tensors = {name: torch.randn(size).to(dtype) for name, size in shapes.items()}
        meta = {name: torch.empty(size, device="meta") for name, size in shapes.items()}
        shape = tuple(lora_file._DELTAS[kind](meta).shape)
        return Layer("q", "q", kind, self.rank, 1.0, shape, tensors)


def few_to_many(layer: Layer) -> dict[str, np.ndarray]:
    """The K that a table has, the largest that is kept, and one that is counted."""
    most = scores._MOST_KEPT
    return {
        "every partner": scores.partner_ks(layer),
        "most": np.array([min(most, layer.entries)]),
        "counted": np.array([min(most + 1, layer.entries - 1)]),
    }


LARGEST = [
    *itertools.product(
        (
            Large("LoRA", 21504, 3072),  # Flux' linear1: 252 MiB at once in fp32
            Large("LoHa", 6144, 3072),
            Large("LoKr", 2048, 1536),
            Large("full", 1024, 1024),
        ),
        ("every partner", "most", "counted"),
    ),
    (Large("LoRA", 2048, 2048, rank=2048), "most"),
    (Large("LoRA CP", 1280, 1280, rank=128), "most"),
    (Large("LoRA CP", 640, 640, rank=512), "most"),
    (Large("LoHa CP", 1280, 1280, rank=128), "most"),
    (Large("LoKr conv", 1280, 1280, rank=128), "most"),
    (Large("full", 1024, 1024, dtype="float8_e4m3fn"), "most"),
]


@pytest.mark.parametrize(("size", "which"), LARGEST, ids=str)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' VmData")
def test_memory_of_a_large_layer(size, which):
    """16 MiB are allowed beyond the file's own factors.

    The system is told to give no more, and what it has given is counted exactly. What is resident
    would not do: the pages of a library that is touched for the first time are part of it.
    """
    program = """
import re, resource, sys
sys.path[:0] = sys.argv[1:3]
import torch
from test_fast_scores import Large, few_to_many, scores
torch.set_num_threads(1)
large, which = eval(sys.argv[3]), sys.argv[4]

small, layer = Large(large.kind, 96, 64, 16, large.dtype).layer(), large.layer()
ks = few_to_many(layer)[which]
scores._analyse("content", small, few_to_many(small)[which], "cpu")
data = re.search(r"VmData:\\s*(\\d+) kB", open("/proc/self/status").read())[1]
resource.setrlimit(resource.RLIMIT_DATA, (int(data) * 1024 + 16 * 2**20,) * 2)
scores._analyse("content", layer, ks, "cpu")
"""
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-c", program, str(here.parents[1]), str(here), repr(size), which]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("guess", ["a good guess", "no guess: a block is kept whole"])
@pytest.mark.parametrize(("size", "which"), [x for x in LARGEST if x[1] != "counted"], ids=str)
def test_memory_on_a_device(size, which, guess, monkeypatch):
    """The same there, beyond a copy of the file's factors."""
    if guess != "a good guess":
        monkeypatch.setattr(scores, "_thresholds", lambda *args: iter([0.0]))
    layer = size.layer()
    factors = sum(tensor.nbytes for tensor in layer.tensors.values())
    with second_device.most_held() as memory, torch.inference_mode():
        scores._analyse("content", layer, few_to_many(layer)[which], second_device.NAME)
    assert memory.most > blocks.BLOCK_GPU * 4
    assert memory.most - factors <= 16 * 2**20
