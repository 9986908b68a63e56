"""Weights on disk, of any usual format, read one array at a time.

    with open_weights("SmolLM2-135M") as source:
        source.format, source.axes             # "safetensors", the rules of Torch
        source.tensors                         # {"model.embed_tokens.weight": TensorInfo(dtype, shape), ...}
        source.read("model.embed_tokens.weight")

Opening reads headers only. No code in a file is ever run, and every fault is one `farms_jax.errors.InputError`.
"""

from farms_jax.weights.lora import LoraSource as LoraSource, is_lora as is_lora, no_model as no_model
from farms_jax.weights.opening import open_weights as open_weights
from farms_jax.weights.reading import TensorInfo as TensorInfo
from farms_jax.weights.runs import checkpoints as checkpoints
from farms_jax.weights.source import WeightSource as WeightSource
