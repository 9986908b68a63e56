"""The small LLaMA as a model to train: its config, its parameters with the blocks stacked, its loss.

The forward pass is that of `prune.models`, so what is trained here is by construction what is pruned later.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from prune.models import Network

Params = dict[str, dict[str, Array]]  # `ends` by tensor name; `blocks` by the names of block 0, shapes (blocks, ...)


def llama_config(
    *, vocab_size: int, hidden_size: int, intermediate_size: int, blocks: int, heads: int, kv_heads: int, length: int
) -> dict[str, Any]:
    """Return the Hugging Face `config.json` of a LLaMA with tied embeddings, for old and new `transformers`.

    Args:
        vocab_size: number of tokens; number 0 marks begin and end.
        hidden_size: features between blocks.
        intermediate_size: features inside the feed-forward network.
        blocks: number of decoder blocks.
        heads: number of query heads.
        kv_heads: number of key and value heads.
        length: longest sequence.

    Returns:
        The file's content.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float16",
    }


def initial_params(network: Network, seed: int) -> Params:
    """Draw parameters: norms 1, linears of variance 1 / inputs, less with depth where they end in the residual stream.

    Args:
        network: the model.
        seed: seed of all draws.

    Returns:
        Float32 arrays.
    """
    shapes = {}
    for part in network.parts:
        shapes |= network.tensors(part)
    rng = np.random.default_rng((seed, 0))
    tensors = {}
    for name, shape in shapes.items():
        if "norm" in name:
            tensors[name] = np.ones(shape, np.float32)
            continue
        scale = 0.02 if "embed" in name else shape[-1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale /= (2 * network.num_blocks) ** 0.5
        tensors[name] = np.float32(scale) * rng.standard_normal(shape, np.float32)
    return from_tensors(network, tensors)


def from_tensors(network: Network, tensors: dict[str, Any]) -> Params:
    """Stack the tensors of the blocks, so that one compiled block serves all.

    Args:
        network: the model.
        tensors: by Hugging Face name.

    Returns:
        Parameters, of the tensors' dtypes.
    """
    ends = network.tensors("embed") | network.tensors("head")
    by_block = [list(network.tensors(block)) for block in range(network.num_blocks)]
    stacked = {
        names[0]: jnp.stack([jnp.asarray(tensors[name]) for name in names]) for names in zip(*by_block, strict=True)
    }
    return {"ends": {name: jnp.asarray(tensors[name]) for name in ends}, "blocks": stacked}


def to_tensors(network: Network, params: Params) -> dict[str, Array]:
    """Undo `from_tensors`."""
    tensors = dict(params["ends"])
    for block in range(network.num_blocks):
        stacked = zip(network.tensors(block), network.tensors(0), strict=True)
        tensors |= {name: params["blocks"][first][block] for name, first in stacked}
    return tensors


def losses(network: Network, params: Params, ids: Array) -> Array:
    """Return the cross-entropy, in nats, of every token but the first of each sequence.

    Args:
        network: the model.
        params: from `from_tensors`.
        ids: (B, T), int32.

    Returns:
        (B, T - 1).
    """

    def block(x: Array, tensors: dict[str, Array]) -> tuple[Array, None]:
        return network.block(network.to_state(0, tensors), x), None

    embedding, head = (
        network.to_state(part, {name: params["ends"][name] for name in network.tensors(part)})
        for part in ("embed", "head")
    )
    x = network.embed(embedding, ids[:, :-1])
    x, _ = lax.scan(block, x, params["blocks"])
    logits = network.head(head, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])


@functools.partial(jax.jit, static_argnums=0)
def evaluation_loss(network: Network, params: Params, ids: Array) -> Array:
    """Return the mean of `losses` over sequences (N, T)."""
    return lax.map(lambda sequence: losses(network, params, sequence[None])[0], ids, batch_size=8).mean()


def consecutive(ids: np.ndarray, length: int) -> np.ndarray:
    """Cut tokens (N,) into consecutive sequences (N // length, length)."""
    return ids[: ids.size // length * length].reshape(-1, length)
