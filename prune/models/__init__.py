"""Decoder networks as pure functions, one per block, made from Hugging Face configs."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from . import llama, opt
from .conversion import Part as Part
from .fields import Fields
from .network import Family, Network as Network


class _Source(NamedTuple):
    """How networks of a `model_type` are read."""

    family: Family
    read_config: Callable[[Fields, str], Any]
    prefixes: tuple[str, ...]  # of the tensors' names: the usual one, then that of files without a language model head


FAMILIES = {
    **dict.fromkeys(llama.DEFAULTS, _Source(llama.LLAMA, llama.read_config, ("model.", ""))),
    "opt": _Source(opt.OPT, opt.read_config, ("model.decoder.", "decoder.")),
}


def make_network(config: Mapping[str, Any], names: Iterable[str] = ()) -> Network:
    """Make the network of a Hugging Face config.

    Args:
        config: parsed config.json.
        names: of the checkpoint's tensors, for their prefix: some published files have another than the usual one.

    Returns:
        The network; no weights are allocated.

    Raises:
        InputError: for an unknown family, and for fields that are missing, wrong or not supported.
    """
    fields = Fields(config)
    source = FAMILIES[fields.choice("model_type", FAMILIES)]
    for name in ("quantization_config", "compression_config"):
        fields.refuse(name, "quantised weights cannot be pruned; take the model's float weights")
    names = list(names)
    found = [prefix for prefix in source.prefixes if any(name.startswith(f"{prefix}layers.") for name in names)]
    prefix = (found or source.prefixes)[0]
    return Network(source.family, source.read_config(fields, prefix))
