"""Two files, layer by layer: spellings, scope, Flux' fused parameters, K, and what is unpaired."""

import itertools
from dataclasses import replace

import pytest
import torch
from lora_samples import (
    PROJECTIONS,
    SD15,
    SPELLINGS,
    attention_prefixes,
    linear,
    linears,
    randn,
    transformer_layers,
)

from lib_klora.errors import KLoraError
from lib_klora.families import FLUX
from lib_klora.layer_names import common_name
from lib_klora.lora_file import parse_lora
from lib_klora.methods import B_LORA_BLOCKS
from lib_klora.pair import DEFAULT_RANK, pair_files

Q, K, V, OUT = attention_prefixes(4)
FF = Q.replace("attn1_to_q", "ff_net_0_proj")


def file(name, *layers):
    return parse_lora(name, {k: v for layer in layers for k, v in layer.items()})


def spelled(spelling: str, rank: int, seed: int):
    """A file with the 16 transformers of SD1.5 in one spelling, attention and feed-forward."""
    tensors = {}
    for i, layer in enumerate(transformer_layers(SD15)):
        prefix, up, down = SPELLINGS[spelling](*layer)
        tensors[prefix + up] = randn(4, rank, seed=seed + 2 * i)
        tensors[prefix + down] = randn(rank, 4, seed=seed + 2 * i + 1)
    return parse_lora(spelling, tensors)


def named(file, *names):
    """The file as a WebUI has it that calls its layers so."""
    layers = zip(names, file.layers.values(), strict=True)
    return replace(file, layers={name: replace(layer, name=name) for name, layer in layers})


def names(pair):
    return [layer.name for layer in pair.paired]


class TestSpellings:
    @pytest.mark.parametrize("content", SPELLINGS)
    @pytest.mark.parametrize("style", ["kohya, diffusers blocks", "kohya, LDM blocks", "PEFT"])
    def test_files_of_any_two_spellings_pair_completely(self, content, style):
        pair = pair_files(spelled(content, 2, seed=0), spelled(style, 3, seed=500))
        assert len(pair.paired) == 128
        assert not pair.unpaired
        assert not pair.notes
        assert {layer.k for layer in pair.paired} == {6}

    def test_each_layer_meets_its_counterpart(self):
        # The same numbers in two spellings: a layer that met another one would differ.
        pair = pair_files(spelled("PEFT", 2, seed=9), spelled("kohya, LDM blocks", 2, seed=9))
        for layer in pair.paired:
            assert torch.equal(layer.content.delta(), layer.style.delta())
        deltas = {layer.content.delta().numpy().tobytes() for layer in pair.paired}
        assert len(deltas) == len(pair.paired)

    def test_layers_are_in_name_order_whatever_the_files_order(self):
        forward = file("a", linear(Q), linear(K), linear(V))
        backward = file("b", linear(V), linear(K), linear(Q))
        assert names(pair_files(forward, backward)) == names(pair_files(backward, forward))
        assert names(pair_files(forward, backward)) == sorted(map(common_name, (Q, K, V)))


class TestScope:
    A = file("a", linear(Q), linear(FF))
    B = file("b", linear(Q), linear(FF))

    def test_attention_is_the_default_and_leaves_out_the_rest(self):
        pair = pair_files(self.A, self.B)
        assert names(pair) == [common_name(Q)]
        assert not pair.unpaired

    def test_all_takes_every_layer(self):
        assert set(names(pair_files(self.A, self.B, layers="all"))) == {
            common_name(Q),
            common_name(FF),
        }

    def test_unpaired_layer_out_of_scope_gets_nothing(self):
        pair = pair_files(file("a", linear(Q)), self.B)
        assert not pair.unpaired
        assert not pair.notes


class TestUnpaired:
    A = file("cat", linear(Q), linear(K))
    B = file("ink", linear(Q), linear(V), linear(OUT))

    def test_keep_gives_a_layer_to_the_file_that_has_it(self):
        pair = pair_files(self.A, self.B)
        assert names(pair) == [common_name(Q)]
        assert pair.unpaired == {
            common_name(K): "content",
            common_name(V): "style",
            common_name(OUT): "style",
        }

    def test_drop_leaves_them_out(self):
        pair = pair_files(self.A, self.B, unpaired="drop")
        assert names(pair) == [common_name(Q)]
        assert not pair.unpaired

    @pytest.mark.parametrize("rule", ["keep", "drop"])
    def test_notes_count_them_by_file(self, rule):
        notes = pair_files(self.A, self.B, unpaired=rule).notes
        assert notes == (
            f"1 layer is only in “cat” ({rule}).",
            f"2 layers are only in “ink” ({rule}).",
        )

    def test_two_b_loras_of_different_blocks_keep_all_of_both(self):
        content = file("subject", linear(Q), linear(K))
        style = file("style", linear(V), linear(OUT))
        pair = pair_files(content, style)
        assert not pair.paired
        assert "“subject” and “style” have no layer in common" in pair.warnings[0]
        assert set(pair.unpaired.values()) == {"content", "style"}
        assert list(pair.unpaired) == sorted(common_name(prefix) for prefix in (Q, K, V, OUT))

    def test_nothing_in_common_and_drop_is_an_error_that_names_both(self):
        with pytest.raises(KLoraError) as error:
            pair_files(file("cat", linear(Q)), file("ink", linear(V)), unpaired="drop")
        assert all(word in str(error.value) for word in ("“cat”", "“ink”", "keep"))


class TestBlocks:
    """B-LoRA: of the pair only the layers in the two blocks, of a file alone only its own block."""

    FIRST, SECOND, THIRD = (f"lora_unet_output_blocks_{i}_1_proj_in" for i in range(3))
    QS = [f"lora_unet_output_blocks_{i}_1_transformer_blocks_0_attn1_to_q" for i in range(3)] + [
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    ]

    def pair(self, content, style, **settings):
        return pair_files(content, style, blocks=B_LORA_BLOCKS, **settings)

    def test_whole_files(self):
        every = [*self.QS, self.FIRST, self.SECOND, self.THIRD]
        cat, ink = file("cat", linears(every)), file("ink", linears(every, seed=2))
        assert names(self.pair(cat, ink)) == sorted(map(common_name, self.QS[:2]))
        pair = self.pair(cat, ink, layers="all")
        assert names(pair) == sorted(map(common_name, (*self.QS[:2], self.FIRST, self.SECOND)))
        assert not pair.unpaired
        assert not pair.warnings

    def test_the_digits_of_another_block_do_not_count(self):
        """output_blocks_0_0_ and output_blocks_10_1_ begin otherwise."""
        others = ("lora_unet_output_blocks_0_0_emb_layers_1", self.QS[0].replace("_0_1", "_10_1"))
        cat = file("cat", linears([self.QS[0], *others]))
        assert names(self.pair(cat, cat, layers="all")) == [common_name(self.QS[0])]

    def test_what_one_file_has_counts_in_its_own_block_only(self):
        first, second, third, _ = self.QS
        cat = file("cat", linear(first), linear(third))
        ink = file("ink", linear(first.replace("to_q", "to_k")), linear(second), linear(third))
        pair = self.pair(cat, ink)
        assert not pair.paired
        assert pair.unpaired == {common_name(first): "content", common_name(second): "style"}
        assert "1 layer is only in “cat” (keep)." in pair.notes
        assert not pair.warnings, "two B-LoRAs are like that"

    def test_both_in_both_blocks_are_told_apart_from_the_rest(self):
        te = linear("lora_te1_text_model_encoder_layers_0_mlp_fc1")
        cat, ink = file("cat", linears(self.QS)), file("ink", linears(self.QS[:3]), te)
        assert self.pair(cat, ink).notes == (
            "B-LoRA applies up_blocks.0.attentions.0 of “cat” and up_blocks.0.attentions.1 of "
            "“ink”: 3 and 2 other layers are left out, so are the text encoder parts.",
        )
        assert self.pair(cat, cat).notes[0].endswith(": 3 and 3 other layers are left out.")

    @pytest.mark.parametrize(("role", "block"), [("content", 0), ("style", 1)])
    def test_a_file_without_its_block_is_told(self, role, block):
        with_both = file("good", linear(self.QS[0]), linear(self.QS[1]))
        without = file("bad", linear(self.QS[1 - block]))
        files = (without, with_both) if role == "content" else (with_both, without)
        (sentence,) = self.pair(*files).warnings
        assert sentence == (
            f"“bad” has no layer in up_blocks.0.attentions.{block}, and B-LoRA applies nothing "
            f"else of the {role} LoRA: swap the two if they are the wrong way round, or choose "
            f"another file."
        )

    def test_two_files_without_are_refused(self):
        with pytest.raises(KLoraError, match=r"nor “ink” in up_blocks\.0\.attentions\.1"):
            self.pair(file("cat", linear(self.QS[1])), file("ink", linear(self.QS[0])))

    def test_nothing_is_left_if_what_is_unpaired_is_dropped(self):
        cat, ink = file("cat", linear(self.QS[0])), file("ink", linear(self.QS[1]))
        with pytest.raises(KLoraError, match="no layer in common"):
            self.pair(cat, ink, unpaired="drop")


class TestOtherModel:
    """Files whose common layers have other shapes cannot both fit the checkpoint."""

    ATTENTION = attention_prefixes(8)

    def of_width(self, name, width, layers=ATTENTION):
        """SDXL and SD1.5 have blocks that differ only in the width of the text conditions."""
        tensors = linears(layers, rank=2)
        for prefix in layers:
            if prefix.endswith(("attn2_to_k", "attn2_to_v")):
                tensors[f"{prefix}.lora_down.weight"] = randn(2, width)
        return parse_lora(name, tensors)

    def test_a_few_layers_are_left_out_and_told(self):
        pair = pair_files(self.of_width("xl", 20), self.of_width("1.5", 7))
        left_out = [p for p in self.ATTENTION if p.endswith(("attn2_to_k", "attn2_to_v"))]
        assert len(left_out) == 2
        assert set(names(pair)) == set(map(common_name, set(self.ATTENTION) - set(left_out)))
        assert not pair.unpaired, "which of the two the model has is not known"
        (note,) = pair.notes
        assert "“xl” and “1.5”" in note
        assert "2 of 8 common layers" in note
        assert f"{left_out[0]}: 8 × 20 and 8 × 7" in note

    def test_most_layers_are_a_refusal_that_names_both(self):
        layers = [p for p in self.ATTENTION if "attn2" in p][:3]  # to_q, to_k, to_v
        with pytest.raises(KLoraError) as error:
            pair_files(self.of_width("xl", 20, layers), self.of_width("1.5", 7, layers))
        for words in ("“xl” and “1.5”", "2 of 3 common layers", "8 × 20 and 8 × 7", "choose"):
            assert words in str(error.value)

    def test_files_for_different_models_are_a_refusal_that_names_both(self):
        flux = file("f", linear("lora_unet_double_blocks_0_img_attn_proj"))
        with pytest.raises(KLoraError, match="“c” was made for SDXL and “f” for Flux,"):
            pair_files(self.of_width("c", 2048), flux)
        with pytest.raises(KLoraError, match=r"for SDXL and “b” for Stable Diffusion 1\.x,"):
            pair_files(self.of_width("a", 2048), self.of_width("b", 768, self.ATTENTION[5:6]))

    def test_half_of_the_layers_are_left_out(self):
        layers = [p for p in self.ATTENTION if "attn2" in p]
        pair = pair_files(self.of_width("xl", 20, layers), self.of_width("1.5", 7, layers))
        assert len(pair.paired) == 2

    def test_as_many_entries_in_other_rows_are_another_parameter(self):
        wide, tall = ({f"{Q}.diff": randn(*shape)} for shape in ((4, 16), (16, 4)))
        with pytest.raises(KLoraError, match="4 × 16 and 16 × 4"):
            pair_files(file("a", wide), file("b", tall))

    def test_a_conv_layer_may_be_flattened(self):
        conv = {
            f"{FF}.lora_up.weight": randn(8, 2, 1, 1),
            f"{FF}.lora_down.weight": randn(2, 4, 3, 3),
        }
        flat = {f"{FF}.diff": randn(8, 36)}
        pair = pair_files(file("a", conv), file("b", flat), layers="all")
        assert names(pair) == [common_name(FF)]
        assert not pair.notes


FULL = {f"{Q}.diff": randn(8, 8)}
BIG_FULL = {f"{Q}.diff": randn(64, 64)}
LOKR = {f"{Q}.lokr_w1": randn(2, 2), f"{Q}.lokr_w2": randn(4, 4)}


class TestK:
    def k(self, content, style, **settings):
        (layer,) = pair_files(file("a", content), file("b", style), layers="all", **settings).paired
        return layer.k

    @pytest.mark.parametrize(
        ("content", "style", "k"),
        [
            (linear(Q, rank=2), linear(Q, rank=4), 8),
            (linear(Q, rank=16), linear(Q, rank=8), 64),  # at most the entries
            (linear(Q, rank=3), FULL, 9),  # full takes its partner's rank
            (FULL, linear(Q, rank=3), 9),
            (linear(Q, rank=3), LOKR, 9),  # so does a LoKr without one
        ],
    )
    def test_rank_rules(self, content, style, k):
        assert self.k(content, style) == k

    def test_no_rank_on_either_side_takes_the_default_and_says_so(self):
        pair = pair_files(file("a", BIG_FULL), file("b", BIG_FULL))
        assert pair.paired[0].k == DEFAULT_RANK**2
        (note,) = pair.notes
        assert "1 layer has no rank" in note
        assert str(DEFAULT_RANK) in note

    def test_multiplier(self):
        assert self.k(linear(Q, rank=2), linear(Q, rank=4), top_k=0.5) == 4
        assert self.k(linear(Q, rank=2), linear(Q, rank=4), top_k=1e-6) == 1
        assert self.k(linear(Q, rank=2), linear(Q, rank=4), top_k=1e10) == 64


SPLIT = ("to_q", "to_k", "to_v")


def flux_split(name, rank=2, size=4, seed=0):
    """diffusers: q, k, v of one double block, and q, k, v, mlp of one single block."""
    tensors = {}
    paths = [f"transformer.transformer_blocks.0.attn.{x}" for x in SPLIT]
    paths += [f"transformer.single_transformer_blocks.0.attn.{x}" for x in SPLIT]
    paths += ["transformer.single_transformer_blocks.0.proj_mlp"]
    for i, path in enumerate(paths):
        out = 4 * size if path.endswith("mlp") else size
        own = rank + i % 3  # the parts' ranks differ
        tensors[f"{path}.lora_B.weight"] = randn(out, own, seed=seed + 2 * i)
        tensors[f"{path}.lora_A.weight"] = randn(own, size, seed=seed + 2 * i + 1)
    return parse_lora(name, tensors)


def flux_fused(name, rank=5, size=4, seed=70):
    tensors = {}
    for path, out in (("double_blocks_0_img_attn_qkv", 3), ("single_blocks_0_linear1", 7)):
        tensors[f"lora_unet_{path}.lora_up.weight"] = randn(out * size, rank, seed=seed)
        tensors[f"lora_unet_{path}.lora_down.weight"] = randn(rank, size, seed=seed + 1)
    return parse_lora(name, tensors)


class TestFlux:
    def test_both_split_makes_every_slice_a_layer(self):
        pair = pair_files(flux_split("a"), flux_split("b", seed=40))
        assert set(names(pair)) == {f"double_blocks_0_img_attn_qkv/{x}" for x in "qkv"} | {
            f"single_blocks_0_linear1/{x}" for x in ("q", "k", "v", "mlp")
        }
        assert not pair.unpaired

    def test_both_fused_makes_the_parameter_a_layer(self):
        pair = pair_files(flux_fused("a"), flux_fused("b"))
        assert names(pair) == ["double_blocks_0_img_attn_qkv", "single_blocks_0_linear1"]

    @pytest.mark.parametrize("split_is_content", [True, False])
    def test_one_fused_makes_the_whole_parameter_the_layer(self, split_is_content):
        split, fused = flux_split("split"), flux_fused("fused")
        pair = pair_files(split, fused) if split_is_content else pair_files(fused, split)
        assert names(pair) == ["double_blocks_0_img_attn_qkv", "single_blocks_0_linear1"]
        assert not pair.unpaired
        for layer in pair.paired:
            ours = layer.content if split_is_content else layer.style
            parts = [split.layers[name] for name in split.layers if name.startswith(layer.name)]
            assert ours.rank == max(part.rank for part in parts) == 4
            assert ours.entries == sum(part.entries for part in parts)
            expected = torch.cat([part.delta() for part in parts])
            # A set of rows: top-K and sum do not know their order.
            assert sorted(map(tuple, ours.delta().tolist())) == sorted(
                map(tuple, expected.tolist())
            )
            assert layer.k == 4 * 5

    @pytest.mark.parametrize("split_is_content", [True, False])
    def test_some_parts_go_with_the_whole_parameter(self, split_is_content):
        """A file that trained q alone changes the same parameter as one that has it whole."""
        split, fused = flux_split("split"), flux_fused("fused")
        layers = {name: layer for name, layer in split.layers.items() if name.endswith("/q")}
        split = replace(split, layers=layers)
        files = (split, fused) if split_is_content else (fused, split)
        pair = pair_files(*files)
        assert names(pair) == ["double_blocks_0_img_attn_qkv", "single_blocks_0_linear1"]
        assert not pair.notes
        assert [layer.k for layer in pair_files(*files, top_k=100).paired] == [4 * 4] * 2

    def test_parts_are_in_name_order_whatever_the_files_order(self):
        """The cache knows a fused layer by the names of its parts."""
        split = flux_split("split")
        turned = replace(split, layers=dict(reversed(split.layers.items())))
        for file in (split, turned):
            for layer in pair_files(file, flux_fused("fused")).paired:
                parts = [part.name for part in layer.content.parts]
                assert parts == sorted(parts)

    def test_a_file_that_has_both_gets_its_whole_one(self):
        whole = flux_fused("whole")
        both = replace(whole, layers={**whole.layers, **flux_split("both").layers})
        for layer in pair_files(both, flux_fused("other")).paired:
            assert layer.content is whole.layers[layer.name]

    @pytest.mark.parametrize("split_is_content", [True, False])
    def test_q_k_and_v_meet_all_three_in_one(self, split_is_content):
        """In one block of Forge Neo: ``linear1_qkv`` beside the parts' names from diffusers."""
        single = "single_blocks_0_linear1"
        split = named(
            file("split", *map(linear, "qkvm")), *(f"{single}/{x}" for x in ("q", "k", "v", "mlp"))
        )
        fused = named(file("fused", *map(linear, "am")), f"{single}/qkv", f"{single}/mlp")
        pair = pair_files(*((split, fused) if split_is_content else (fused, split)), network=FLUX)
        assert names(pair) == [f"{single}/mlp", f"{single}/qkv"]
        assert not pair.unpaired
        side = "content" if split_is_content else "style"
        assert [part.name for part in getattr(pair.paired[1], side).parts] == [
            f"{single}/{x}" for x in "kqv"
        ]

    def test_light_fused_layer_keeps_what_describes_it(self):
        pair = pair_files(flux_split("split"), flux_fused("fused"))
        light = pair.without_tensors()
        for heavy, layer in zip(pair.paired, light.paired, strict=True):
            assert layer.content.entries == heavy.content.entries
            assert layer.content.rank == heavy.content.rank
            assert layer.k == heavy.k
            assert not any(part.tensors for part in layer.content.parts)

    def test_fused_in_one_block_does_not_fuse_another(self):
        both = flux_split("a")
        other = parse_lora(
            "b",
            {
                "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": randn(12, 2),
                "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": randn(2, 4),
                **{
                    key: value
                    for x in SPLIT
                    for key, value in linear(
                        f"lora_unet_single_transformer_blocks_0_attn_{x}", size=4
                    ).items()
                },
            },
        )
        pair = pair_files(both, other)
        assert set(names(pair)) == {
            "double_blocks_0_img_attn_qkv",
            *(f"single_blocks_0_linear1/{x}" for x in "qkv"),
        }
        assert pair.unpaired == {"single_blocks_0_linear1/mlp": "content"}


class TestErrors:
    def test_no_attention_layer_points_to_all(self):
        with pytest.raises(KLoraError, match=r"“ff only” has no attention layer.*“all”"):
            pair_files(file("ff only", linear(FF)), file("b", linear(Q)))

    def test_style_without_attention_is_named_too(self):
        with pytest.raises(KLoraError, match=r"“ff only”"):
            pair_files(file("b", linear(Q)), file("ff only", linear(FF)))

    @pytest.mark.parametrize("layers", ["attention", "all"])
    def test_text_encoder_file_is_no_k_lora(self, layers):
        te = file("te only", linear("lora_te_text_model_encoder_layers_0_mlp_fc1"))
        with pytest.raises(KLoraError, match=r"“te only”.*<lora:"):
            pair_files(te, file("b", linear(Q)), layers=layers)

    @pytest.mark.parametrize("more", [{}, linear(FF)])
    def test_a_type_that_cannot_be_compared_is_not_said_to_be_missing(self, more):
        te = linear("lora_te_text_model_encoder_layers_0_mlp_fc1")
        oft = file("oft", {**te, **more, f"{Q}.oft_blocks": randn(2, 2, 2)})
        with pytest.raises(KLoraError, match="“oft” has no attention layer of a type") as told:
            pair_files(oft, file("b", linear(Q)))
        assert "text encoder" not in str(told.value)
        assert ("“all”" in str(told.value)) == bool(more)


def test_pair_of_whole_projections_is_complete():
    prefixes = attention_prefixes(8)
    pair = pair_files(
        parse_lora("a", linears(prefixes, seed=1)), parse_lora("b", linears(prefixes, seed=2))
    )
    block = itertools.islice(PROJECTIONS, 8)
    assert set(names(pair)) == {
        f"input_blocks_1_1_transformer_blocks_0_{layer}".replace(".", "_") for layer in block
    }
