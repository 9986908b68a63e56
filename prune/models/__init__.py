"""Decoder networks as pure functions, one per block, made from Hugging Face configs."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .fields import Fields
from .llama import DEFAULTS, read_llama
from .network import EMBEDDING as EMBEDDING, HEAD as HEAD, Network as Network, Part as Part
from .operations import State as State
from .opt import read_opt

# How a `model_type` is read, and the prefixes of its tensors' names: with and without a language model head.
FAMILIES: dict[str, tuple[Callable[[Fields, str], Network], tuple[str, str]]] = {
    **dict.fromkeys(DEFAULTS, (read_llama, ("model.", ""))),
    "opt": (read_opt, ("model.decoder.", "decoder.")),
}


def make_network(config: Mapping[str, Any], names: Iterable[str] = ()) -> Network:
    """Return the network of a Hugging Face config, without weights.

    The `names` of tensors tell the prefix of them all; and where embedding and head are both among them the head is not
    tied, whatever the config says, as in `transformers` 5.

    Raises:
        InputError: the family is unknown, or fields are missing, wrong or not supported.
    """
    fields = Fields(config)
    read, prefixes = FAMILIES[fields.choice("model_type", FAMILIES)]
    for name in ("quantization_config", "compression_config"):
        fields.raise_if_set(name, "quantised weights cannot be pruned; take the model's float weights")
    names = list(names)
    found = [prefix for prefix in prefixes if any(name.startswith(f"{prefix}layers.") for name in names)]
    network = read(fields, (found or prefixes)[0])
    return dataclasses.replace(network, tied=network.tied and not {network.embedding, HEAD} <= set(names))
