"""Decoder networks as pure functions, one per block, made from Hugging Face configs."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .families import DECODERS, read_decoder
from .fields import Fields
from .network import Network as Network, Part as Part
from .operations import State as State
from .opt import read_opt

# How a `model_type` is read, and the prefixes of its tensors' names: with and without a language model head.
FAMILIES: dict[str, tuple[Callable[[Fields, str], Network], tuple[str, str]]] = {
    **{name: (read_decoder, family.prefixes) for name, family in DECODERS.items()},
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
    network = read(fields, prefixes[0])
    blocks = network.block_list
    found = [prefix for prefix in prefixes if any(name.startswith(f"{prefix}{blocks}.") for name in names)]
    network = dataclasses.replace(network, prefix=(found or prefixes)[0])
    own_head = {network.embedding, network.head_name} <= set(names)
    return dataclasses.replace(network, tied=network.tied and not own_head)
