"""One layer, many spellings: tables of (spelling, common name), one per family of models, and the
complete attention layouts of SD1.5 and SDXL."""

import re

import pytest
from lora_samples import PROJECTIONS, SD15, SDXL, SPELLINGS, transformer_layers

from lib_klora.families import (
    ANIMA,
    ERNIE,
    FLUX,
    KREA_2,
    NEXT_DIT,
    QWEN_IMAGE,
    UNET,
    WAN,
    block,
    family_of,
    is_attention,
    network_order,
)
from lib_klora.layer_names import common_name, common_names, is_text_encoder

UNET_LAYERS = [
    # an attention projection in every spelling
    (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ),
    (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ),
    (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q",
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ),
    (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q",
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ),
    (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ),
    (
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ),
    (
        "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ),
    # the module names of the hosts themselves
    (
        "diffusion_model_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ),
    (
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ),
    # to_out with and without its index
    (
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
        "middle_block_1_transformer_blocks_0_attn2_to_out_0",
    ),
    (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out",
        "middle_block_1_transformer_blocks_0_attn2_to_out_0",
    ),
    # the rest of a transformer
    (
        "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_ff_net_0_proj",
        "output_blocks_5_1_transformer_blocks_0_ff_net_0_proj",
    ),
    ("lora_unet_up_blocks_3_attentions_2_proj_in", "output_blocks_11_1_proj_in"),
    ("lora_unet_down_blocks_0_attentions_1_norm", "input_blocks_2_1_norm"),
    # residual blocks
    ("lora_unet_down_blocks_0_resnets_0_conv1", "input_blocks_1_0_in_layers_2"),
    ("lora_unet_down_blocks_3_resnets_1_conv2", "input_blocks_11_0_out_layers_3"),
    ("lora_unet_down_blocks_2_resnets_0_time_emb_proj", "input_blocks_7_0_emb_layers_1"),
    ("lora_unet_down_blocks_1_resnets_0_conv_shortcut", "input_blocks_4_0_skip_connection"),
    ("lora_unet_down_blocks_1_resnets_0_norm1", "input_blocks_4_0_in_layers_0"),
    ("lora_unet_down_blocks_1_resnets_0_norm2", "input_blocks_4_0_out_layers_0"),
    ("lora_unet_mid_block_resnets_0_conv1", "middle_block_0_in_layers_2"),
    ("lora_unet_mid_block_resnets_1_conv1", "middle_block_2_in_layers_2"),
    ("lora_unet_up_blocks_0_resnets_2_conv1", "output_blocks_2_0_in_layers_2"),
    ("unet.up_blocks.2.resnets.1.conv_shortcut", "output_blocks_7_0_skip_connection"),
    ("lora_unet_output_blocks_7_0_skip_connection", "output_blocks_7_0_skip_connection"),
    # resamplers
    ("lora_unet_down_blocks_0_downsamplers_0_conv", "input_blocks_3_0_op"),
    ("lora_unet_down_blocks_2_downsamplers_0_conv", "input_blocks_9_0_op"),
    ("lora_unet_input_blocks_9_0_op", "input_blocks_9_0_op"),
    # whole-network layers
    ("lora_unet_conv_in", "input_blocks_0_0"),
    ("lora_unet_conv_out", "out_2"),
    ("lora_unet_conv_norm_out", "out_0"),
    ("unet.time_embedding.linear_1", "time_embed_0"),
    ("unet.time_embedding.linear_2", "time_embed_2"),
    ("unet.add_embedding.linear_1", "label_emb_0_0"),
    ("unet.add_embedding.linear_2", "label_emb_0_2"),
]

# diffusers name → name in Black Forest Labs' network, from the host's own table (Forge,
# comfyui_lora_collection/utils.py: flux_to_diffusers), with our letter for a slice.
FLUX_1 = [
    ("transformer_blocks.7.attn.to_q", "double_blocks_7_img_attn_qkv/q"),
    ("transformer_blocks.7.attn.to_k", "double_blocks_7_img_attn_qkv/k"),
    ("transformer_blocks.7.attn.to_v", "double_blocks_7_img_attn_qkv/v"),
    ("transformer_blocks.7.attn.to_out.0", "double_blocks_7_img_attn_proj"),
    ("transformer_blocks.7.attn.add_q_proj", "double_blocks_7_txt_attn_qkv/q"),
    ("transformer_blocks.7.attn.add_k_proj", "double_blocks_7_txt_attn_qkv/k"),
    ("transformer_blocks.7.attn.add_v_proj", "double_blocks_7_txt_attn_qkv/v"),
    ("transformer_blocks.7.attn.to_add_out", "double_blocks_7_txt_attn_proj"),
    ("transformer_blocks.7.norm1.linear", "double_blocks_7_img_mod_lin"),
    ("transformer_blocks.7.norm1_context.linear", "double_blocks_7_txt_mod_lin"),
    ("transformer_blocks.7.ff.net.0.proj", "double_blocks_7_img_mlp_0"),
    ("transformer_blocks.7.ff.net.2", "double_blocks_7_img_mlp_2"),
    ("transformer_blocks.7.ff_context.net.0.proj", "double_blocks_7_txt_mlp_0"),
    ("transformer_blocks.7.ff_context.net.2", "double_blocks_7_txt_mlp_2"),
    ("single_transformer_blocks.30.attn.to_q", "single_blocks_30_linear1/q"),
    ("single_transformer_blocks.30.attn.to_k", "single_blocks_30_linear1/k"),
    ("single_transformer_blocks.30.attn.to_v", "single_blocks_30_linear1/v"),
    ("single_transformer_blocks.30.proj_mlp", "single_blocks_30_linear1/mlp"),
    ("single_transformer_blocks.30.proj_out", "single_blocks_30_linear2"),
    ("single_transformer_blocks.30.norm.linear", "single_blocks_30_modulation_lin"),
    ("x_embedder", "img_in"),
    ("context_embedder", "txt_in"),
    ("time_text_embed.timestep_embedder.linear_1", "time_in_in_layer"),
    ("time_text_embed.timestep_embedder.linear_2", "time_in_out_layer"),
    ("time_text_embed.text_embedder.linear_1", "vector_in_in_layer"),
    ("time_text_embed.text_embedder.linear_2", "vector_in_out_layer"),
    ("time_text_embed.guidance_embedder.linear_1", "guidance_in_in_layer"),
    ("time_text_embed.guidance_embedder.linear_2", "guidance_in_out_layer"),
    ("norm_out.linear", "final_layer_adaLN_modulation_1"),
    ("proj_out", "final_layer_linear"),
]
# What Flux.2 has otherwise (Forge Neo, modules_forge/packages/comfy/utils.py: flux_to_diffusers).
FLUX_2 = [
    ("transformer_blocks.3.attn.add_k_proj", "double_blocks_3_txt_attn_qkv/k"),
    ("transformer_blocks.3.ff.linear_in", "double_blocks_3_img_mlp_0"),
    ("transformer_blocks.3.ff_context.linear_out", "double_blocks_3_txt_mlp_2"),
    ("single_transformer_blocks.9.attn.to_qkv_mlp_proj", "single_blocks_9_linear1"),
    ("single_transformer_blocks.9.attn.to_out", "single_blocks_9_linear2"),
    ("double_stream_modulation_img.linear", "double_stream_modulation_img_lin"),
]
# The same file: z_image_to_diffusers.
Z_IMAGE = [
    ("layers.12.attention.to_q", "layers_12_attention_qkv/q"),
    ("layers.12.attention.to_k", "layers_12_attention_qkv/k"),
    ("layers.12.attention.to_v", "layers_12_attention_qkv/v"),
    ("layers.12.attention.to_out.0", "layers_12_attention_out"),
    ("noise_refiner.1.attention.to_q", "noise_refiner_1_attention_qkv/q"),
    ("context_refiner.0.attention.to_out.0", "context_refiner_0_attention_out"),
    ("layers.12.feed_forward.w1", "layers_12_feed_forward_w1"),
    ("layers.12.adaLN_modulation.0", "layers_12_adaLN_modulation_0"),
    ("layers.12.attention.norm_q", "layers_12_attention_q_norm"),
    ("all_final_layer.2-1.linear", "final_layer_linear"),
    ("all_x_embedder.2-1", "x_embedder"),
    ("cap_embedder.1", "cap_embedder_1"),
]
# The same file: krea2_to_diffusers.
KREA = [
    ("transformer_blocks.5.attn.to_q", "blocks_5_attn_wq"),
    ("transformer_blocks.5.attn.to_gate", "blocks_5_attn_gate"),
    ("transformer_blocks.5.attn.to_out.0", "blocks_5_attn_wo"),
    ("transformer_blocks.5.ff.down", "blocks_5_mlp_down"),
    ("text_fusion.refiner_blocks.1.attn.to_v", "txtfusion_refiner_blocks_1_attn_wv"),
    ("text_fusion.layerwise_blocks.0.attn.to_k", "txtfusion_layerwise_blocks_0_attn_wk"),
    ("text_fusion.projector", "txtfusion_projector"),
    ("img_in", "first"),
]
# diffusers' WanTransformer3DModel against Wan's own model.py.
WAN_2 = [
    ("blocks.30.attn1.to_q", "blocks_30_self_attn_q"),
    ("blocks.30.attn1.to_out.0", "blocks_30_self_attn_o"),
    ("blocks.30.attn2.to_v", "blocks_30_cross_attn_v"),
    ("blocks.30.attn2.add_k_proj", "blocks_30_cross_attn_k_img"),
    ("blocks.30.ffn.net.0.proj", "blocks_30_ffn_0"),
    ("blocks.30.ffn.net.2", "blocks_30_ffn_2"),
]
# Families whose names are the same everywhere.
QWEN = [
    "transformer_blocks.41.attn.to_q",
    "transformer_blocks.41.attn.add_v_proj",
    "transformer_blocks.41.attn.to_out.0",
    "transformer_blocks.41.attn.to_add_out",
    "transformer_blocks.41.img_mlp.net.0.proj",
    "transformer_blocks.41.img_mod.1",
    "img_in",
]
ANIMA_1 = [
    "blocks.27.self_attn.q_proj",
    "blocks.27.cross_attn.output_proj",
    "blocks.27.mlp.layer1",
    "blocks.27.adaln_modulation_self_attn.1",
]
ERNIE_1 = [
    "layers.3.self_attention.to_q",
    "layers.3.self_attention.to_out.0",
    "layers.3.mlp.gate_proj",
]
FLUX_BFL = [
    "double_blocks.7.img_attn.qkv",
    "double_blocks.7.img_attn.proj",
    "double_blocks.7.txt_attn.qkv",
    "double_blocks.7.txt_attn.proj",
    "double_blocks.7.img_mlp.0",
    "double_blocks.7.txt_mlp.2",
    "double_blocks.7.img_mod.lin",
    "single_blocks.30.linear1",
    "single_blocks.30.linear2",
    "single_blocks.30.modulation.lin",
    "final_layer.linear",
    "img_in",
]


@pytest.mark.parametrize(("spelling", "name"), UNET_LAYERS)
def test_unet(spelling, name):
    _, names = common_names([spelling, "lora_unet_mid_block_resnets_0_conv1"])
    assert names[spelling] == name


PREFIXES = {
    "diffusers": lambda path: f"transformer.{path}",
    "PEFT": lambda path: f"base_model.model.transformer.{path}",
    "the other way round": lambda path: f"transformer.base_model.model.{path}",
    "doubled": lambda path: f"diffusion_model.diffusion_model.{path}",
    "OneTrainer": lambda path: "lora_transformer_" + path.replace(".", "_"),
    "SimpleTuner": lambda path: "lycoris_" + path.replace(".", "_"),
    "kohya": lambda path: "lora_unet_" + path.replace(".", "_"),
    "kohya of another script": lambda path: "lora_unet__" + path.replace(".", "_"),
    "bare": lambda path: path,
}


@pytest.mark.parametrize("spell", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize(
    ("table", "family"),
    [
        (FLUX_1, FLUX),
        (FLUX_2, FLUX),
        (Z_IMAGE, NEXT_DIT),
        (KREA, KREA_2),
        (WAN_2, WAN),
        ([(path, path.replace(".", "_")) for path in QWEN], QWEN_IMAGE),
        ([(path, path.replace(".", "_")) for path in ANIMA_1], ANIMA),
        ([(path, path.replace(".", "_")) for path in ERNIE_1], ERNIE),
    ],
    ids=["Flux.1", "Flux.2", "Z-Image", "Krea 2", "Wan", "Qwen-Image", "Anima", "Ernie-Image"],
)
class TestOtherFamilies:
    def test_diffusers_names_become_the_networks_own(self, table, family, spell):
        found, names = common_names(spell(path) for path, _ in table)
        assert found is family
        assert names == {spell(path): name for path, name in table}

    def test_the_networks_own_names_stay(self, table, family, spell):
        own = {name.partition("/")[0] for _, name in table}
        found, names = common_names(map(spell, own))
        assert found is family
        assert names == {spell(name): name for name in own}


@pytest.mark.parametrize(
    "prefix",
    [
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "lora_unet_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "base_model.model.unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    ],
)
def test_files_that_no_webui_reads(prefix):
    assert common_name(prefix) == "input_blocks_4_1_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize("path", FLUX_BFL)
def test_flux_with_its_original_names(path):
    name = path.replace(".", "_")
    assert common_name("lora_unet_" + name) == name
    assert common_name(f"diffusion_model.{path}") == name


def test_a_file_is_of_the_family_that_most_of_its_names_are_of():
    names = ["transformer_blocks_0_img_mod_1"] * 3 + ["double_blocks_0_img_attn_qkv"]
    assert family_of(names) is QWEN_IMAGE
    assert family_of(names[2:] * 2 + names[3:]) is FLUX
    assert family_of(["some_new_block_3_w", "proj_out"]) is None


def test_names_that_several_networks_have_are_a_sign_only_if_there_is_no_other():
    shared = [f"transformer_blocks_{i}_attn_to_q" for i in range(19)]
    assert family_of(shared) is QWEN_IMAGE
    assert family_of([*shared, "single_transformer_blocks_0_proj_out"]) is FLUX
    assert family_of([*shared, "transformer_blocks_0_attn_to_gate"]) is KREA_2


def test_upsampler_is_one_layer_whichever_module_it_is_in_its_block():
    # SD1.5: the first upsampler follows a residual block, the others an attention block as well;
    # in SDXL already the first follows attention. The diffusers name is the same in both.
    assert (
        common_name("lora_unet_up_blocks_0_upsamplers_0_conv")
        == common_name("diffusion_model_output_blocks_2_1_conv")
        == common_name("diffusion_model_output_blocks_2_2_conv")
    )
    assert common_name("lora_unet_up_blocks_1_upsamplers_0_conv") == common_name(
        "lora_unet_output_blocks_5_2_conv"
    )


def test_equal_names_are_one_string():
    """A server keeps thousands of them, from two files and the model."""
    block = "blocks_1_attentions_0_transformer_blocks_0_attn1"
    one, other = f"lora_unet_down_{block}_to_out_0", f"unet.down_{block}.processor.to_out"
    assert common_name(one) is common_name(other) is common_name("".join(list(one)))


def test_unknown_layer_keeps_its_own_name():
    assert common_name("lora_unet_some_new_block_3_w") == "some_new_block_3_w"


@pytest.mark.parametrize(("layout", "count"), [(SD15, 128), (SDXL, 560)], ids=["SD1.5", "SDXL"])
class TestWholeLayout:
    def expected(self, layout):
        return {
            f"{ldm}.{layer}".replace(".", "_")
            for _, ldm, layer in transformer_layers(layout)
            if layer in PROJECTIONS
        }

    @pytest.mark.parametrize("spelling", SPELLINGS)
    def test_every_spelling_gives_the_same_attention_layers(self, layout, count, spelling):
        names = {
            common_name(SPELLINGS[spelling](*layer)[0]) for layer in transformer_layers(layout)
        }
        attention = {name for name in names if is_attention(name, UNET)}
        assert attention == self.expected(layout)
        assert len(attention) == count

    @pytest.mark.parametrize("spelling", SPELLINGS)
    def test_no_two_layers_share_a_name(self, layout, count, spelling):
        layers = transformer_layers(layout)
        assert len({common_name(SPELLINGS[spelling](*layer)[0]) for layer in layers}) == len(layers)


def attention_of(table, family):
    """The names in a table that are attention, and the others."""
    names = [row[1] if isinstance(row, tuple) else row.replace(".", "_") for row in table]
    return (
        {name for name in names if is_attention(name, family)},
        {name for name in names if not is_attention(name, family)},
    )


@pytest.mark.parametrize(
    ("table", "family", "sign"),
    [
        (UNET_LAYERS, UNET, "_attn"),
        (FLUX_1, FLUX, "_attn_qkv|_attn_proj|_linear[12]"),
        (FLUX_BFL, FLUX, "_attn_qkv|_attn_proj|_linear[12]"),
        (FLUX_2, FLUX, "_attn_qkv|_attn_proj|_linear[12]"),
        (Z_IMAGE, NEXT_DIT, "attention_qkv|attention_out"),
        (KREA, KREA_2, "_attn_"),
        (WAN_2, WAN, "_attn_"),
        (QWEN, QWEN_IMAGE, "_attn_"),
        (ANIMA_1, ANIMA, "_attn_.*_proj"),
        (ERNIE_1, ERNIE, "_attention_"),
    ],
)
def test_attention_is_the_projections_and_nothing_else(table, family, sign):
    attention, others = attention_of(table, family)
    assert attention
    assert others
    assert all(re.search(sign, name) for name in attention)
    assert not any(re.search(sign, name) for name in others)


@pytest.mark.parametrize(
    ("names", "blocks"),
    [  # in the network's order; the layers of a block in any
        (["noise_refiner_1_attention_out", "layers_2_attention_out"], ["noise 1", "layer 2"]),
        (["context_refiner_0_attention_qkv/q", "layers_0_attention_out"], ["context 0", "layer 0"]),
        (["layers_2_self_attention_to_q", "layers_10_mlp_up_proj"], ["layer 2", "layer 10"]),
        (
            [
                "blocks_2_self_attn_q",
                "blocks_2_cross_attn_k",
                "blocks_2_ffn_0",
                "blocks_10_self_attn_o",
            ],
            ["self 2", "cross 2", "block 2", "self 10"],
        ),
        (["txtfusion_layerwise_blocks_1_attn_wq", "blocks_0_attn_gate"], ["fusion 1", "block 0"]),
        (
            ["transformer_blocks_9_attn_to_q", "transformer_blocks_59_img_mod_1"],
            ["block 9", "block 59"],
        ),
        (["double_blocks_18_img_attn_qkv/q", "single_blocks_0_linear1"], ["double", "single"]),
        (
            ["input_blocks_4_1_x", "middle_block_1_x", "output_blocks_3_1_x", "some_x"],
            ["down 4", "mid", "up 3", "other"],
        ),
    ],
)
def test_blocks_are_named_and_ordered_as_in_their_network(names, blocks):
    assert list(map(block, names)) == blocks
    backward = names[::-1]
    assert sorted(backward, key=network_order) == names


def test_attention_of_an_unknown_network_is_what_says_so():
    assert is_attention("blocks_3_attn_mixer_a", None)
    assert is_attention("stage_1_attention_b", None)
    assert not is_attention("blocks_3_mlp_a", None)
    assert not is_attention("blocks_3_pattnx_a", None)


@pytest.mark.parametrize(
    "prefix",
    [
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te2_text_model_encoder_layers_31_mlp_fc2",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "lora_prior_te_text_model_encoder_layers_0_mlp_fc1",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
        "base_model.model.text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    ],
)
def test_text_encoder_prefixes(prefix):
    assert is_text_encoder(prefix)


@pytest.mark.parametrize("prefix", ["lora_unet_conv_in", "unet.conv_in", "lora_transformer_txt_in"])
def test_network_prefixes_are_no_text_encoder(prefix):
    assert not is_text_encoder(prefix)
