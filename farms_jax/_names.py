"""Names of the leaves of a parameter tree, and rules about names.

A leaf is called by its path: Linen `conv1/kernel`, NNX `blocks/0/kernel` and Equinox
`layers/0/weight` read alike, and a flat dict of checkpoint names keeps them as they are.

>>> import jax.numpy as jnp
>>> [name for name, _ in named_leaves({"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})]
['dense/bias', 'dense/kernel']
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.tree_util import GetAttrKey, keystr

from farms_jax.errors import InputError

Follow = Mapping[str, str] | Callable[[str], str | None]


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Return `(name, leaf)` for every leaf, in the tree's own order.

    Raises:
        ValueError: two leaves have the same name.
    """
    pairs = [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"params: two leaves are called {repeated[0]!r}; rename one, names must be unique")
    return pairs


def _name(path: tuple[Any, ...]) -> str:
    if len(path) > 1 and path[-1] == GetAttrKey("value"):  # an NNX variable's own array
        path = path[:-1]
    return keystr(path, simple=True, separator="/")


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Return a sort key that puts `conv_2` before `conv_10`, which is network order in most models."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


def module_of(name: str) -> str:
    """Return the name of the module that holds a leaf: `conv1/kernel` -> `conv1`, `conv1.weight` -> `conv1`."""
    match = re.fullmatch(r"(.*)[/.][^/.]*", name)
    return match[1] if match else ""


def block_of(name: str) -> str:
    """Return the name of the repeated block that a leaf belongs to: all up to its first number, or the whole name.

    >>> block_of("model.layers.12.mlp.up_proj"), block_of("blocks/0/attention/kernel"), block_of("head/kernel")
    ('model.layers.12', 'blocks/0', 'head/kernel')
    """
    match = re.match(r"(?:[^/.]+[/.])*?\d+(?=[/.]|$)", name)
    return match[0] if match else name


def matching(names: Iterable[str], patterns: str | Iterable[str], argument: str = "exclude") -> set[str]:
    r"""Return the names that one of the patterns matches as a whole; an error calls the patterns by `argument`.

    Raises:
        InputError: a pattern matches no name, or is no regular expression.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        try:
            hits = {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            raise InputError(f"{argument}: {pattern!r} is not a regular expression ({error})") from error
        if not hits:
            some = ", ".join(sorted(names, key=natural_key)[:8]) or "none"
            raise InputError(f"{argument}: {pattern!r} matches no name as a whole; names are: {some}, ...")
        found |= hits
    return found


def follow_order(modules: Iterable[str], norms: str) -> Follow:
    r"""Return a rule by which each norm follows the layer directly before it in network order.

    Args:
        modules: names of layers and norms in network order, such as
            `["conv1", "bn1", "layer1/0/conv1", "layer1/0/bn1"]`. A norm after another norm, or before
            any layer, follows nothing.
        norms: regular expression of the modules that are norms, such as `r".*bn\d+"`; all others are layers.

    Returns:
        A rule for `follow=` of `lr_scale` and `tempbalance`: it gives the module a norm's leaves follow.
    """
    leaders: dict[str, str] = {}
    before: str | None = None
    for module in modules:
        if not re.fullmatch(norms, module):
            before = module
        elif before is not None:
            leaders[module], before = before, None
    return lambda name: leaders.get(module_of(name))


def leader(name: str, follow: Follow | None) -> str | None:
    """Return the layer or module that the leaf `name` follows under a rule, or `None`."""
    if follow is None:
        return None
    if not isinstance(follow, Mapping):
        return follow(name)
    for pattern, template in follow.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(template)
    return None
