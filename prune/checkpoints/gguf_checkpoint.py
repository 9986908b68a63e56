"""GGUF files as checkpoints: dequantised to float32, under Hugging Face names, with config and tokenizer made anew."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from farms_jax.errors import InputError, short_repr
from farms_jax.programs.files import write_json
from farms_jax.weights.folders import WEIGHTS
from farms_jax.weights.gguf_file import read_gguf
from farms_jax.weights.gguf_source import ROPE_FACTORS, GGUFSource, architecture_of, same_in_all_blocks
from farms_jax.weights.safetensors_file import FileLayout, make_layout

from .base import GENERATION, Checkpoint, generation_config, save_tokenizer
from .gguf_tokenizer import make_tokenizer

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Multipliers (and experts) that some models of these architectures have, and the networks here do not.
_FOREIGN = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale", "expert_count")
# Those of LLaMA 3.1, the only ones published: a file has the factors made from them, not the numbers themselves.
_LOW_FACTOR, _HIGH_FACTOR = 1.0, 4.0
_FLOAT32 = np.finfo(np.float32)


class GGUFCheckpoint(Checkpoint):
    """A model in one GGUF file."""

    def __init__(self, path: Path) -> None:
        """Open a file; an InputError where it is damaged, or has an architecture or tensors that are not known."""
        source = GGUFSource(path, strict=True)
        factors = source.read(ROPE_FACTORS) if ROPE_FACTORS in source.tensors else None
        shapes = {name: info.shape for name, info in source.tensors.items()}
        super().__init__(source, _make_config(source.metadata, shapes, factors, str(path)), (path,))
        self.kinds, self._end_of_turn = source.kinds, source.metadata.get("tokenizer.ggml.eot_token_id")
        # They are part of the config, not of the network.
        self.tensors.pop(ROPE_FACTORS, None)

    def shards(self) -> dict[str, FileLayout]:
        """Return the layout of an export: one file, float32."""
        return {WEIGHTS: make_layout(self.tensors, {"format": "pt"})}

    def copy_sidecars(self, folder: Path, tokenizer: Any = None) -> None:
        """Write config, generation config and tokenizer, all made from the metadata."""
        tokenizer = self.tokenizer() if tokenizer is None else tokenizer
        write_json(folder / "config.json", self.config)
        write_json(folder / GENERATION, self._generation_config())
        save_tokenizer(tokenizer, folder)

    def _generation_config(self) -> dict[str, Any]:
        """Return the generation config; models that chat end a turn by a token of its own, and should stop there."""
        content = generation_config(self.config)
        ends = [content.get("eos_token_id"), self._end_of_turn]
        ends = list(dict.fromkeys(end for end in ends if end is not None))
        return content | ({"eos_token_id": ends} if len(ends) > 1 else {})

    def tokenizer(self) -> Any:
        """Make the tokenizer, a `PreTrainedTokenizerFast`, from the file's metadata."""
        return make_tokenizer(read_gguf(self.path, long_arrays=True).metadata, str(self.path))


def _make_config(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_factors: np.ndarray | None, where: str
) -> dict[str, Any]:
    """Return the content of `config.json`, in the form that every version of `transformers` reads.

    `shapes` has Hugging Face names. `rope_factors`, float32 (head_dim / 2,), are divisors of the rotary frequencies.

    Raises:
        InputError: A number is missing, or the model has something that the networks here do not support.
    """
    architecture = architecture_of(metadata, where)
    facts = _Facts(metadata, architecture, where)
    if "model.embed_tokens.weight" not in shapes:
        raise InputError(f"{where}: there is no tensor token_embd.weight; download it again")
    heads = facts.number("attention.head_count")
    head_dim = facts.number("attention.key_length", facts.number("embedding_length") // heads)
    _check_supported(facts, head_dim)
    theta = facts.real("rope.freq_base", 10000.0)
    window = facts.get("attention.sliding_window", None) if architecture == "llama" else None
    model_type = architecture if window is None else "mistral"
    config = {
        "architectures": [_CLASSES[model_type]],
        "model_type": model_type,
        "vocab_size": shapes["model.embed_tokens.weight"][0],
        "hidden_size": facts.number("embedding_length"),
        "intermediate_size": facts.number("feed_forward_length"),
        "num_hidden_layers": facts.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": facts.number("context_length"),
        "rms_norm_eps": _short(facts.real("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(theta),
        "rope_scaling": _rope_scaling(facts, theta, head_dim, rope_factors),
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    if model_type == "llama":
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in shapes
        config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in shapes
    if model_type == "mistral":
        config["sliding_window"] = window
    for role, name in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        if (key := f"tokenizer.ggml.{name}_token_id") in metadata:
            config[f"{role}_token_id"] = metadata[key]
    return config


class _Facts:
    """The metadata under an architecture's own keys; a key that is asked for without a default must exist."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, where: str) -> None:
        self.metadata, self.architecture, self.where = metadata, architecture, where

    def get(self, key: str, *default: Any) -> Any:
        full = f"{self.architecture}.{key}"
        if full not in self.metadata and not default:
            raise InputError(f"{self.where}: its metadata has no {full}; convert the model anew")
        return self.metadata.get(full, *default)

    def number(self, key: str, *default: int) -> int:
        value = same_in_all_blocks(self.get(key, *default))
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise InputError(
                f"{self.where}: {self.architecture}.{key} is {short_repr(value)}, no number > 0 for all blocks; "
                "not supported"
            )
        return value

    def real(self, key: str, *default: float) -> float:
        value = self.get(key, *default)
        if not isinstance(value, int | float) or not _FLOAT32.tiny <= value <= _FLOAT32.max:
            raise InputError(
                f"{self.where}: {self.architecture}.{key} is {short_repr(value)}, no number > 0; convert the model anew"
            )
        return value


def _check_supported(facts: _Facts, head_dim: int) -> None:
    for key in _FOREIGN:
        if facts.get(key, 0) not in (0, 1):
            raise InputError(f"{facts.where}: {facts.architecture}.{key} is not supported; give a model without it")
    for key in ("attention.value_length", "rope.dimension_count"):
        if facts.number(key, head_dim) != head_dim:
            what = f"{facts.architecture}.{key} is not the head size {head_dim}"
            raise InputError(f"{facts.where}: {what}: not supported")


def _short(value: float) -> float:
    """Return the shortest decimal that is the same float32: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(facts: _Facts, theta: float, head_dim: int, factors: np.ndarray | None) -> dict[str, Any] | None:
    linear = facts.real("rope.scale_linear", 1.0)  # the older key
    kind = facts.get("rope.scaling.type", "none" if linear == 1 else "linear")
    if kind != "none" and (kind != "linear" or factors is not None):
        raise InputError(
            f"{facts.where}: rotary scaling {short_repr(kind)} is not supported; none, linear and llama3 are"
        )
    if factors is not None:
        return _llama3_scaling(factors, theta, head_dim, facts.where)
    if kind == "none":
        return None
    return {"rope_type": "linear", "factor": _short(facts.real("rope.scaling.factor", linear))}


def _llama3_scaling(factors: np.ndarray, theta: float, head_dim: int, where: str) -> dict[str, Any] | None:
    # A frequency is kept where its wave is short (factor 1), divided by the full factor where it is long, and blended
    # between: 1 / factor_i = (1 - s) / factor + s with s = (original / wave - low) / (high - low). One blended factor
    # thus gives the original length; all of them must then agree.
    if factors.shape != (head_dim // 2,):
        raise InputError(
            f"{where}: {ROPE_FACTORS} has shape {short_repr(factors.shape)}, not ({head_dim // 2},); download it again"
        )
    if np.all(factors == 1):
        return None
    wave = 2 * math.pi * theta ** (2 * np.arange(len(factors)) / head_dim)
    factor = float(factors.max())
    inside = np.flatnonzero((factors > 1.001) & (factors < factor * 0.999))
    if inside.size and math.isfinite(factor):
        share = (1 / factors[inside[0]] - 1 / factor) / (1 - 1 / factor)
        original = round(float(wave[inside[0]] * (share * (_HIGH_FACTOR - _LOW_FACTOR) + _LOW_FACTOR)))
        share = np.clip((original / wave - _LOW_FACTOR) / (_HIGH_FACTOR - _LOW_FACTOR), 0, 1)
        if np.allclose(1 / ((1 - share) / factor + share), factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": _short(factor),
                "low_freq_factor": _LOW_FACTOR,
                "high_freq_factor": _HIGH_FACTOR,
                "original_max_position_embeddings": original,
            }
    raise InputError(
        f"{where}: {ROPE_FACTORS} is of no known rotary scaling (llama3 is known); give a Hugging Face folder"
    )
