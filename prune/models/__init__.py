"""Decoder networks as pure functions, one per block, made from Hugging Face configs."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from .fields import Fields
from .llama import DEFAULTS, read_llama
from .network import Network as Network, Part as Part
from .operations import State as State
from .opt import read_opt


class _Family(NamedTuple):
    """How networks of a `model_type` are read."""

    read: Callable[[Fields, str], Network]
    prefixes: tuple[str, ...]  # of the tensors' names: the usual one, then that of files without a language model head


FAMILIES = {
    **dict.fromkeys(DEFAULTS, _Family(read_llama, ("model.", ""))),
    "opt": _Family(read_opt, ("model.decoder.", "decoder.")),
}


def make_network(config: Mapping[str, Any], names: Iterable[str] = ()) -> Network:
    """Make the network of a Hugging Face config.

    Args:
        config: parsed config.json.
        names: names of the checkpoint's tensors, for their prefix: some published files have another than the usual.

    Returns:
        The network; no weights are allocated.

    Raises:
        InputError: the family is unknown, or fields are missing, wrong or not supported.
    """
    fields = Fields(config)
    family = FAMILIES[fields.choice("model_type", FAMILIES)]
    for name in ("quantization_config", "compression_config"):
        fields.raise_if_set(name, "quantised weights cannot be pruned; take the model's float weights")
    names = list(names)
    found = [prefix for prefix in family.prefixes if any(name.startswith(f"{prefix}layers.") for name in names)]
    return family.read(fields, (found or family.prefixes)[0])
