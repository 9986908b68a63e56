"""Configs of the families, in both forms, and what is refused."""

import numpy as np
import pytest

from farms_jax.errors import InputError
from prune.models import make_network
from tests.prune_helpers import FOLDERS, QWEN, config_of, numbers_of, weights_of

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "factor": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OLD = {"rope_parameters": ...}  # the older form has `rope_theta` and `rope_scaling` instead
# Frequencies under LLAMA3, under LINEAR, and without scaling.
SCALED = numbers_of("llama_tiny_rope3")[0]["inv_freq"]
BY_FOUR = 500.0 ** (-np.arange(4) / 4) / 4
PLAIN = 10000.0 ** (-np.arange(4) / 4)


@pytest.mark.parametrize("name", [name for name in FOLDERS if name.startswith("llama")])
def test_the_two_forms_of_a_config_are_one_network(name):
    assert make_network(config_of(name)) == make_network(config_of(name, "config.legacy.json"))


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("llama_tiny_rope3", {}, SCALED),
        # The length before the extension defaults to the positions.
        (
            "llama_tiny_rope3",
            OLD | {"rope_scaling": LLAMA3 | {"rope_theta": 5e5}, "max_position_embeddings": 32},
            SCALED,
        ),
        ("llama_tiny", {"rope_parameters": LINEAR, "rope_theta": 7.0}, BY_FOUR),
        ("llama_tiny", {"rope_parameters": LINEAR, "rope_scaling": {}}, BY_FOUR),
        ("llama_tiny", OLD | {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 500.0}, BY_FOUR),
        ("llama_tiny", OLD | {"rope_scaling": {"rope_type": "linear", "factor": 4}, "rope_theta": 500}, BY_FOUR),
        ("llama_tiny", OLD, PLAIN),
    ],
)
def test_frequencies(name, changes, expected):
    rope = make_network(config_of(name, **changes)).ropes[0]
    np.testing.assert_allclose(rope.frequencies(2 * len(expected)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (QWEN | {"use_sliding_window": False}, (None, None, None, None)),
        (QWEN | {"use_sliding_window": ...}, (None, None, None, None)),
        (QWEN | {"max_window_layers": 0}, (3, 3, 3, 3)),
        (QWEN | {"layer_types": ["sliding_attention", *["full_attention"] * 3]}, (3, None, None, None)),
        (QWEN | {"model_type": "mistral", "sliding_window": 7}, (7, 7, 7, 7)),
        (QWEN | {"model_type": "mistral", "sliding_window": None}, (None, None, None, None)),
        (QWEN | {"model_type": "mistral", "sliding_window": ...}, (4096, 4096, 4096, 4096)),
        (QWEN | {"model_type": "llama"}, (None, None, None, None)),
    ],
)
def test_windows_of_the_families(config, windows):
    network = make_network({key: value for key, value in config.items() if value is not ...})
    assert network.windows == windows


SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 50}
NORMED = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
GEMMA = {"input_layernorm.weight", "pre_feedforward_layernorm.weight", *NORMED}


def in_attention(*names):
    return {f"self_attn.{name}.weight" for name in names}


@pytest.mark.parametrize(
    ("config", "blocks", "linears", "others"),
    [
        (
            {"model_type": "phi3", "intermediate_size": 48, "num_key_value_heads": 2},
            "model.layers",
            {"self_attn.qkv_proj": (64, 32), "self_attn.o_proj": (32, 32), "mlp.gate_up_proj": (96, 32)}
            | {"mlp.down_proj": (32, 48)},
            {"input_layernorm.weight", "post_attention_layernorm.weight"},
        ),
        ({"model_type": "gemma2", "intermediate_size": 48, "head_dim": 8}, "model.layers", None, GEMMA),
        (
            {"model_type": "gemma3_text", "intermediate_size": 48, "head_dim": 8},
            "model.layers",
            None,
            GEMMA | in_attention("q_norm", "k_norm"),
        ),
        (
            {"model_type": "olmo2", "intermediate_size": 48},
            "model.layers",
            None,
            {*NORMED, *in_attention("q_norm", "k_norm")},
        ),
        (
            {"model_type": "gpt_neox", "intermediate_size": 48, "attention_bias": False},
            "gpt_neox.layers",
            {"attention.query_key_value": (96, 32), "attention.dense": (32, 32), "mlp.dense_h_to_4h": (48, 32)}
            | {"mlp.dense_4h_to_h": (32, 48)},
            {
                f"{norm}.{kind}"
                for norm in ("input_layernorm", "post_attention_layernorm")
                for kind in ("weight", "bias")
            }
            | {"mlp.dense_h_to_4h.bias", "mlp.dense_4h_to_h.bias"},
        ),
        (
            {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
            "transformer.h",
            {"self_attention.query_key_value": (64, 32), "self_attention.dense": (32, 32)}
            | {"mlp.dense_h_to_4h": (128, 32), "mlp.dense_4h_to_h": (32, 128)},
            {f"{norm}.{kind}" for norm in ("ln_attn", "ln_mlp") for kind in ("weight", "bias")},
        ),
    ],
)
def test_tensors_of_the_families(config, blocks, linears, others):
    network = make_network(SMALL | config)
    attention = {f"self_attn.{letter}_proj": (32, 32) for letter in "qkvo"}
    mlp = {"mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)}
    linears = attention | mlp if linears is None else linears
    found = {name: shape for name, shape in network.layer_shapes().items() if f"{blocks}.1." in name}
    assert found == {f"{blocks}.1.{name}": shape for name, shape in linears.items()}
    assert network.tensors(1).keys() == {f"{blocks}.1.{name}" for name in {f"{n}.weight" for n in linears} | others}


def shapes_of(name):
    return {key: array.shape for key, array in weights_of(name).items()}


def test_check_lists_all_faults_at_once():
    network = make_network(config_of("llama_tiny"))
    found = shapes_of("llama_tiny")
    del found["model.layers.2.mlp.up_proj.weight"], found["lm_head.weight"]
    found["model.norm.weight"] = (95,)
    found["model.layers.0.self_attn.k_proj.weight"] = (96, 48)
    found["model.layers.0.self_attn.k_proj.bias"] = (48,)
    found["model.layers.4.mlp.up_proj.weight"] = (256, 96)
    found["model.vision.weight"] = (1, 2)
    with pytest.raises(InputError, match=r"7 tensor\(s\)") as error:
        network.check(found)
    lines = set(str(error.value).partition("weight files): ")[2].split("; "))
    assert lines == {
        "missing: model.layers.2.mlp.up_proj.weight [256, 96]",
        "missing: lm_head.weight [256, 96]",
        "of another shape: model.norm.weight is [95], must be [96]",
        "of another shape: model.layers.0.self_attn.k_proj.weight is [96, 48], must be [48, 96]",
        "unexpected: model.layers.0.self_attn.k_proj.bias [48]",
        "unexpected: model.layers.4.mlp.up_proj.weight [256, 96]",
        "unexpected: model.vision.weight [1, 2]",
    }


def test_check_names_the_first_of_many_faults():
    with pytest.raises(InputError, match=r"38 tensor\(s\).*; and 28 more\. Names in the file look like none") as caught:
        make_network(config_of("llama_tiny")).check({"lm_head.weight": (256, 96)})
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("name", "look", "remedy"),
    [
        ("layers.{}.attention.wq.weight", r"layers\.\*\.attention\.wq\.weight", "convert_llama_weights_to_hf"),
        ("model.layers.{}.mlp.up_proj.qweight", r"model\.layers\.\*\.mlp\.up_proj\.qweight", "take the model's float"),
        ("transformer.h.{}.attn.c_attn.weight", r"transformer\.h\.\*\.attn\.c_attn\.weight", ""),
    ],
)
def test_check_shows_what_names_in_the_file_look_like(name, look, remedy):
    found = {name.format(block): (4, 4) for block in range(4)}
    with pytest.raises(InputError, match=rf"unexpected: .*Names in the file look like {look}.*{remedy}"):
        make_network(config_of("llama_tiny")).check(found)


def test_a_head_is_tied_as_the_tensors_say():
    tied, names = config_of("llama_tiny", tie_word_embeddings=True), shapes_of("llama_tiny")
    network = make_network(tied, names)
    assert not network.tied and network == make_network(config_of("llama_tiny"), names)
    for without in ("lm_head.weight", "model.embed_tokens.weight"):
        assert make_network(tied, names.keys() - {without}).tied
    with pytest.raises(
        InputError, match=r"`tie_word_embeddings` is false, and there is no lm_head\.weight: .*set it to"
    ):
        make_network(config_of("llama_tiny")).check({k: v for k, v in names.items() if k != "lm_head.weight"})


@pytest.mark.parametrize("model_type", ["bert", None, 3, ["llama"]])
def test_unknown_family(model_type):
    with pytest.raises(InputError, match="`model_type` (must be one of|is missing)") as error:
        make_network(config_of("llama_tiny", model_type=model_type))
    assert model_type is None or "llama, mistral, qwen2, qwen3, phi3" in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama_tiny", {"hidden_size": None}, "`hidden_size` is missing"),
        ("llama_tiny", {"hidden_size": "96"}, "`hidden_size` must be an integer of 1 or more, got '96'"),
        ("llama_tiny", {"vocab_size": 10**400}, "`vocab_size` must be at most 2147483647, got an integer of 1329 bits"),
        ("llama_tiny", {"num_hidden_layers": 10**9}, "`num_hidden_layers` must be at most 10000"),  # no list of them
        ("llama_tiny", {"num_hidden_layers": True}, "`num_hidden_layers` must be an integer"),
        ("llama_tiny", {"rope_parameters": {"rope_theta": -1}}, "`rope_theta` must be a positive number"),
        ("llama_tiny", {"rms_norm_eps": 10**400}, "`rms_norm_eps` must be a positive number"),
        ("llama_tiny", {"hidden_act": "a\nb" * 1000}, r"`hidden_act` must be one of .*, got 'a\\nb.*'"),
        ("llama_tiny", {"tie_word_embeddings": 1}, "`tie_word_embeddings` must be true or false"),
        ("llama_tiny", {"num_key_value_heads": 3}, "`num_key_value_heads` must be a divisor of .*4.*, got 3"),
        ("llama_tiny", {"head_dim": 5}, "`head_dim` must be even"),
        ("llama_tiny", {"head_dim": ..., "num_attention_heads": 5, "num_key_value_heads": 5}, "a multiple of"),
        ("llama_tiny", {"quantization_config": {"bits": 4}}, "`quantization_config` is .* float weights"),
        ("llama_tiny", {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "`type` must be one of .*, got 'ntk'"),
        ("llama_tiny", {"rope_parameters": {"rope_type": "linear"}}, "`factor` is missing"),
        ("llama_tiny", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "each type of layer"),
        ("llama_tiny", {"rope_parameters": 3}, "`rope_parameters` must be an object"),
        ("llama_tiny", {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "`high_freq_factor` must be above"),
        ("llama_tiny", {"partial_rotary_factor": 0.5}, "`partial_rotary_factor` is 0.5"),
        ("llama_tiny", {"model_type": "qwen2", "use_mrope": True}, "`use_mrope` is True"),
        ("llama_tiny", {"model_type": "qwen2", "layer_types": ["full_attention"]}, "`layer_types` must be a list of 4"),
        ("llama_tiny", {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 4}, "use_sliding_window"),
        ("llama_tiny", {"model_type": "phi3", "partial_rotary_factor": 0.04}, "`head_dim` must be so that"),
        ("llama_tiny", {"rope_parameters": {"rope_type": "dynamic", "factor": 1e308}}, "give finite frequencies"),
        ("llama_tiny", {"rope_parameters": {"rope_type": "yarn", "factor": 2, "rope_theta": 1}}, "finite frequencies"),
        ("llama_tiny", {"rope_parameters": LONGROPE}, "`short_factor` must be a list of 12 numbers"),
        ("llama_tiny", {"rope_parameters": LONGROPE | {"short_factor": 3}}, "`short_factor` must be a list of numbers"),
        ("llama_tiny", {"model_type": "smollm3", "no_rope_layers": [2]}, "`no_rope_layers` must be a list of 4"),
        ("llama_tiny", {"model_type": "falcon", "alibi": True}, "`alibi` is True"),
        ("opt_tiny", {"activation_function": None, "num_attention_heads": 3}, "`hidden_size` must be a multiple"),
    ],
)
def test_config_that_cannot_be_used(name, changes, message):
    with pytest.raises(InputError, match=f"config.json.*{message}") as caught:
        make_network(config_of(name, **changes))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
