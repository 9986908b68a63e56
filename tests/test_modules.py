"""Types of layers and their order in the network, from their names."""

import random
import re

import pytest

from farms_jax import natural_key
from farms_jax._modules import network_order, types

# Names in the order of the network, and the types of some.
NETWORKS = {
    "GGUF": (
        "token_embd blk.0.attn_q blk.0.attn_k blk.0.attn_v blk.0.attn_output blk.0.ffn_gate_inp blk.0.ffn_gate_exps "
        "blk.0.ffn_up_exps blk.0.ffn_down_exps blk.1.attn_qkv blk.1.ffn_gate blk.1.ffn_up blk.1.ffn_down blk.10.ffn_up "
        "output",
        "embedding q k v o router expert_gate expert_up expert_down qkv gate up down up head",
    ),
    "LLaMA of Meta": (
        "tok_embeddings layers.0.attention.wq layers.0.attention.wk layers.0.attention.wv layers.0.attention.wo "
        "layers.0.feed_forward.w1 layers.0.feed_forward.w3 layers.0.feed_forward.w2 output",
        "embedding q k v o gate up down head",
    ),
    "Qwen3-MoE": (
        "model.embed_tokens model.layers.0.self_attn.q_proj model.layers.0.self_attn.o_proj model.layers.0.mlp.gate "
        "model.layers.0.mlp.shared_expert.up_proj model.layers.0.mlp.experts.0.gate_proj "
        "model.layers.0.mlp.experts.0.down_proj model.layers.0.mlp.experts.1.gate_proj lm_head",
        "embedding q o router shared_up expert_gate expert_down expert_gate head",
    ),
    "GPT-2": (
        "wte h.0.attn.c_attn h.0.attn.c_proj h.0.mlp.c_fc h.0.mlp.c_proj h.1.attn.c_attn lm_head",
        "embedding qkv o up down qkv head",
    ),
    "T5": (
        "shared encoder.block.0.layer.0.SelfAttention.q encoder.block.0.layer.0.SelfAttention.o "
        "encoder.block.0.layer.1.DenseReluDense.wi_0 encoder.block.0.layer.1.DenseReluDense.wo "
        "decoder.block.0.layer.0.SelfAttention.q decoder.block.0.layer.1.EncDecAttention.q "
        "decoder.block.0.layer.2.DenseReluDense.wo lm_head",
        "embedding q o gate down q cross_q down head",
    ),
    "BERT": (
        "bert.embeddings.word_embeddings bert.embeddings.position_embeddings bert.encoder.layer.0.attention.self.query "
        "bert.encoder.layer.0.attention.self.value bert.encoder.layer.0.attention.output.dense "
        "bert.encoder.layer.0.intermediate.dense bert.encoder.layer.0.output.dense bert.pooler.dense classifier",
        "embedding embedding q v o up down head head",
    ),
    "Flax without names": ("params.Embed_0 params.blocks.attn.query params.head", "embedding q head"),
    "ViT of timm": (
        "patch_embed.proj blocks.0.attn.qkv blocks.0.attn.proj blocks.0.mlp.fc1 blocks.0.mlp.fc2 blocks.1.attn.qkv "
        "head",
        "stem qkv o up down qkv head",
    ),
    "ViT of Flax": (
        "embedding Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query "
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/key "
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/out Transformer/encoderblock_0/MlpBlock_0/Dense_0 "
        "Transformer/encoderblock_0/MlpBlock_0/Dense_1 head",
        "embedding q k o up down head",
    ),
    "Flax, scanned": (
        "params/Embed_0/embedding params/ScanBlk_0/SelfAttention_0/query/kernel[0] params/ScanBlk_0/Dense_0/kernel[0] "
        "params/ScanBlk_0/SelfAttention_0/query/kernel[1] params/ScanBlk_0/Dense_0/kernel[1] params/Dense_0/kernel",
        "embedding q dense q dense dense",
    ),
    "MaxText, scanned": (
        "token_embedder/embedding decoder/layers/self_attention/query/kernel[0] "
        "decoder/layers/self_attention/out/kernel[0] decoder/layers/mlp/wi_0/kernel[0] decoder/layers/mlp/wo/kernel[0] "
        "decoder/layers/self_attention/query/kernel[1] decoder/logits_dense/kernel",
        "embedding q o gate down q head",
    ),
    "ResNet of torchvision": (
        "conv1 layer1.0.conv1 layer1.0.conv2 layer2.0.conv2 layer2.0.downsample.0 layer2.1.conv1 layer10.0.conv1 fc",
        "conv conv conv conv shortcut conv conv head",
    ),
    "ResNet of Flax": (
        "conv_init ResNetBlock_0/Conv_0 ResNetBlock_1/Conv_0 ResNetBlock_1/conv_proj ResNetBlock_10/Conv_0 Dense_0",
        "stem conv conv shortcut conv dense",
    ),
    "EfficientNet of timm": (
        "conv_stem blocks.0.0.conv_pw blocks.0.0.conv_dw blocks.0.0.se.conv_reduce blocks.0.0.conv_pwl conv_head "
        "classifier",
        "stem pointwise depthwise squeeze pointwise head head",
    ),
    "ConvNeXt": (
        "embeddings.patch_embeddings encoder.stages.0.layers.0.dwconv encoder.stages.0.layers.0.pwconv1 "
        "encoder.stages.1.downsampling_layer.1 encoder.stages.1.layers.0.dwconv classifier",
        "stem depthwise pointwise shortcut depthwise head",
    ),
    "LSTM": ("lstm.weight_ih_l0 lstm.weight_hh_l0", "input recurrent"),
    "unknown": ("layers/0/weight layers/2/weight layers/10/weight", "layers layers layers"),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_names_in_any_order_come_in_that_of_the_network(network):
    names, expected = (text.split() for text in NETWORKS[network])
    kernels = {name: 3 for name in names if re.search(r"(?<!pw)conv|downsampl|patch", name.lower())}
    assert [kind.replace(" ", "_") for kind in types(names, kernels)] == expected
    mixed = random.Random(0).sample(names, len(names))
    assert network_order(sorted(mixed, key=natural_key)) == names


def test_a_kernel_of_one_input_is_depthwise():
    assert types(["a.conv", "b.conv"], {"a.conv": 1, "b.conv": 8}) == ["depthwise", "conv"]


def test_an_order_of_the_file_is_taken_over_unless_it_is_that_of_the_alphabet():
    names = ["back.weight", "front.weight", "middle.weight"]
    written = ["front.weight", "middle.weight", "middle.bias", "back.weight"]
    assert network_order(names, written) == ["front.weight", "middle.weight", "back.weight"]
    assert network_order(names, sorted(written)) == names
    assert network_order(["fc1.weight", "conv.weight"], ["conv.weight", "fc1.weight"]) == ["conv.weight", "fc1.weight"]
