"""Which tensors of a file are a network's, by their names, and which are left out."""

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from farms_jax._names import module_of
from farms_jax.errors import InputError, listed, printable
from farms_jax.weights import WeightSource
from farms_jax.weights.skipped import ADAPTER
from farms_jax.weights.wrappers import located

from ..models import Network, make_network

_log = logging.getLogger(__name__)


def names_in(config: Mapping[str, Any], source: WeightSource) -> dict[str, str]:
    """Return the names of a checkpoint's tensors, and what the file calls each.

    They are the file's own where it has all that the network of the config needs. Where it has that under other names,
    with wrappers (`module.`, `_orig_mod.`) or another prefix (`model.language_model.`), they are the network's, of the
    tensors that it needs alone; an embedding that is stored as the head it is tied to is found there. Else, and where
    the config is of no known network, they are the file's, as the check of the network will say.
    """
    own = {name: name for name in source.tensors}
    names = [name for name in own if not is_beside(name, source)]
    try:
        network = make_network(config, names)
    except InputError:
        return own
    if source.format == "torch":  # such files have whatever a training put beside the weights
        own = {name: name for name in source.tensors if name in {*names, *network.names()}}
    if network.names() <= own.keys():
        return own
    # With a head of its own if there is one: that decides whether it is tied.
    found = located(sorted(dataclasses.replace(network, tied=False).names()), names)
    if network.tied and network.embedding not in found and network.head_name in found:
        found[network.embedding] = found.pop(network.head_name)
    return found if network.names() <= found.keys() else own


def stored_in_out(config: Mapping[str, Any], names: Iterable[str]) -> frozenset[str]:
    """Return which tensors a checkpoint stores as (in, out), by the network's names."""
    try:
        network = make_network(config, names)
    except InputError:
        return frozenset()
    layers = network.layer_shapes() if network.stored_in_out else {}
    return frozenset(f"{layer}.weight" for layer in layers)


def is_beside(name: str, source: WeightSource) -> bool:
    """Return whether an array is no weight, such as a table of rotary embeddings or a mask, or another's copy."""
    return source.skipped.get(name, ADAPTER) != ADAPTER


def without_others(network: Network, names: Iterable[str], where: str) -> set[str]:
    """Return names without those of parts that the network does not have, as `transformers` leaves them out.

    A prediction of further tokens, a tower of vision or a head of a reward model is such a part; what is inside the
    network's blocks, or in its modules outside of them, is not. A message names what is left out of the file `where`.
    """
    needed, names = network.names(), set(names)
    modules = {module_of(name) for name in needed}
    inside = {name.removeprefix(network.block_prefix(0)) for name in network.tensors(0)}
    blocks: dict[int, set[str]] = {}
    pattern = re.compile(rf"{re.escape(network.prefix + network.block_list)}\.(\d+)\.(.+)")
    for name in names:
        if match := pattern.fullmatch(name):
            blocks.setdefault(int(match[1]), set()).add(match[2])

    def is_other(name: str) -> bool:
        if match := pattern.fullmatch(name):
            # Beyond the last block, one like the others is a fault of the config.
            return int(match[1]) >= network.num_blocks and not blocks[int(match[1])] <= inside
        return name not in needed and module_of(name) not in modules

    if others := sorted(filter(is_other, names)):
        shown = listed(map(printable, others), 3, ", ")
        _log.warning("%s: parts that the network does not have are left out, as in transformers: %s", where, shown)
    return names - set(others)
