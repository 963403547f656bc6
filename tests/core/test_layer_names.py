"""One layer, many spellings: tables of (spelling, common name), one per family of models, and the
complete attention layouts of SD1.5 and SDXL."""

import pytest
from lora_samples import PROJECTIONS, SD15, SDXL, SPELLINGS, transformer_layers

from lib_klora.layer_names import common_name, fused_name, is_attention, is_text_encoder

UNET = [
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
FLUX = [
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


@pytest.mark.parametrize(("spelling", "name"), UNET)
def test_unet(spelling, name):
    assert common_name(spelling) == name


@pytest.mark.parametrize(
    "spell",
    [
        lambda path: f"transformer.{path}",
        lambda path: f"base_model.model.transformer.{path}",
        lambda path: "lora_transformer_" + path.replace(".", "_"),
        lambda path: "lycoris_" + path.replace(".", "_"),
        lambda path: "lora_unet_" + path.replace(".", "_"),
        lambda path: path,
    ],
    ids=["diffusers", "PEFT", "OneTrainer", "SimpleTuner", "kohya", "bare"],
)
@pytest.mark.parametrize(("path", "name"), FLUX)
def test_flux_with_diffusers_names(spell, path, name):
    assert common_name(spell(path)) == name


@pytest.mark.parametrize("path", FLUX_BFL)
def test_flux_with_its_original_names(path):
    name = path.replace(".", "_")
    assert common_name("lora_unet_" + name) == name
    assert common_name(f"diffusion_model.{path}") == name


def test_flux_last_layer_pairs_across_spellings():
    assert common_name("transformer.proj_out") == common_name("lora_unet_final_layer_linear")


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
        attention = {name for name in names if is_attention(name)}
        assert attention == self.expected(layout)
        assert len(attention) == count

    @pytest.mark.parametrize("spelling", SPELLINGS)
    def test_no_two_layers_share_a_name(self, layout, count, spelling):
        layers = transformer_layers(layout)
        assert len({common_name(SPELLINGS[spelling](*layer)[0]) for layer in layers}) == len(layers)


@pytest.mark.parametrize(
    "name",
    [name for _, name in UNET if "attn" not in name]
    + ["input_blocks_4_1_transformer_blocks_0_norm1"]
    + [name for _, name in FLUX if "attn" not in name and "linear" not in name]
    + ["double_blocks_7_img_attn_norm_query_norm", "single_blocks_30_norm_query_norm"],
)
def test_other_layers_are_no_attention(name):
    assert not is_attention(name)


@pytest.mark.parametrize(
    "name",
    [name for _, name in FLUX if "_attn_" in name or "linear1" in name or "linear2" in name]
    + [
        "double_blocks_7_img_attn_qkv",
        "double_blocks_7_txt_attn_qkv",
        "single_blocks_30_linear1",
        "single_blocks_30_linear2",
    ],
)
def test_flux_attention_is_qkv_proj_and_the_single_blocks_linears(name):
    assert is_attention(name)


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("double_blocks_0_img_attn_qkv/q", "double_blocks_0_img_attn_qkv"),
        ("single_blocks_3_linear1/mlp", "single_blocks_3_linear1"),
        ("double_blocks_0_img_attn_qkv", "double_blocks_0_img_attn_qkv"),
        ("input_blocks_0_0", "input_blocks_0_0"),
    ],
)
def test_parameter_that_a_layer_lives_in(name, fused):
    assert fused_name(name) == fused


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
    ],
)
def test_text_encoder_prefixes(prefix):
    assert is_text_encoder(prefix)


@pytest.mark.parametrize("prefix", ["lora_unet_conv_in", "unet.conv_in", "lora_transformer_txt_in"])
def test_network_prefixes_are_no_text_encoder(prefix):
    assert not is_text_encoder(prefix)
