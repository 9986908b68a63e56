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
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, default_registry, keystr

from farms_jax.errors import InputError

# Of the array in an NNX variable or a partitioned array of Linen; in a node that gives its only array no name, as
# Haliax's named arrays do.
_IN_BOXES = (GetAttrKey("value"), FlattenedIndexKey(0))

_WEIGHTS_OF_BIAS = {
    r"(.*[^/.])_bias": (r"\1", r"\1_weight", r"\1_proj"),
    r"(.*[/.])?(.*_)?bias(_.*)?": (r"\1\2weight\3",),
}

Follow = Mapping[str, str] | Callable[[str], str | None]


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Return `(name, leaf)` for every leaf, in the tree's own order.

    Raises:
        ValueError: two leaves have the same name.
    """
    pairs = [(name_of(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"params: two leaves are called {repeated[0]!r}; rename one, names must be unique")
    return pairs


def without_boxes(tree: Any) -> Any:
    """Return a tree with arrays in place of boxes: NNX variables, Linen's partitioned arrays."""
    return jax.tree.map(lambda node: jax.tree.leaves(node)[0] if is_box(node) else node, tree, is_leaf=is_box)


def is_box(node: Any) -> bool:
    """Tell whether a node holds one array and what is said of it: an NNX variable, a partitioned or named array."""
    try:
        keys_and_children = default_registry.flatten_one_level_with_keys(node)
    except ValueError:  # a type that JAX knows as no node
        return False
    if keys_and_children is None:
        return False
    children = list(keys_and_children[0])
    keys = [key for key, _ in children]
    return len(keys) == 1 and keys[0] in _IN_BOXES and jax.tree.structure(children[0][1]).num_leaves == 1


def name_of(path: tuple[Any, ...]) -> str:
    """Return the name of the leaf at a path of JAX's key entries.

    The keys of a flattened dictionary of Flax, which are tuples, give the names of the tree that it is of.
    """
    if len(path) > 1 and path[-1] in _IN_BOXES:
        path = path[:-1]
    keys = []
    for key in path:
        parts = getattr(key, "key", None)
        keys.extend(map(DictKey, parts) if isinstance(parts, tuple) else [key])
    return keystr(tuple(keys), simple=True, separator="/")


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Return a sort key that puts `conv_2` before `conv_10`, which is network order in most models."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


def indexed_names(name: str, stack_shape: tuple[int, ...]) -> list[str]:
    """Return the names of the layers of a leaf: its own where it holds one layer, else one for each index of its stack.

    >>> indexed_names("up/kernel", ()), indexed_names("up/kernel", (2,)), indexed_names("wi", (1, 2))
    (['up/kernel'], ['up/kernel[0]', 'up/kernel[1]'], ['wi[0,0]', 'wi[0,1]'])
    """
    if not stack_shape:
        return [name]
    return [f"{name}[{','.join(map(str, index))}]" for index in np.ndindex(*stack_shape)]


def module_of(name: str) -> str:
    """Return the name of the module that holds a leaf: `conv1/kernel` -> `conv1`, `conv1.weight` -> `conv1`."""
    match = re.fullmatch(r"(.*)[/.][^/.]*", name)
    return match[1] if match else ""


def weights_of_bias(name: str) -> list[str]:
    """Return what a bias may belong to by its own name, leaves and modules: there may be several in its module.

    >>> weights_of_bias("attention/q_bias"), weights_of_bias("lstm.bias_ih_l0")
    (['attention/q', 'attention/q_weight', 'attention/q_proj'], ['lstm.weight_ih_l0'])
    """
    for pattern, templates in _WEIGHTS_OF_BIAS.items():
        if match := re.fullmatch(pattern, name):
            return [match.expand(template) for template in templates]
    return []


def block_of(name: str) -> str:
    """Return the name of the repeated block that a layer belongs to: all up to its first number, or the whole name.

    The number may end a part that is called layers or blocks or the like. A layer in a stack has the stack's name, up
    to such a part, and its index; an expert in a numbered block is of that block.

    >>> block_of("model.layers.12.mlp.up_proj"), block_of("encoderblock_0/attention/kernel"), block_of("head/kernel")
    ('model.layers.12', 'encoderblock_0', 'head/kernel')
    >>> block_of("decoder/layers/mlp/wi/kernel[3]"), block_of("encoderblock/moe/wi[2,5]"), block_of("block_3/moe/wi[5]")
    ('decoder/layers[3]', 'encoderblock[2]', 'block_3')
    """
    if match := re.match(r"(?:[^/.]+[/.])*?\d+(?=[/.]|$)", name):
        return match[0]
    index = re.search(r"\[(\d+)[\d,]*\]$", name)
    leaf = name[: index.start()] if index else name
    part = re.match(r"(?:[^/.]+[/.])*?[^/.]*(?i:layer|block|stack|scan)[^/.]*", leaf)
    if part and part[0][-1].isdigit() and (index is None or re.search("(?i)expert|moe|kv_einsum", leaf)):
        return part[0]
    return f"{part[0] if part else re.split('[/.]', leaf)[0]}[{index[1]}]" if index else name


def matching(
    names: Iterable[str], patterns: str | Iterable[str], argument: str = "exclude", *, strict: bool = True
) -> set[str]:
    r"""Return the names that one of the patterns matches as a whole; an error calls the patterns by `argument`.

    Raises:
        InputError: a pattern matches no name, where that is `strict`, or is no regular expression.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        try:
            hits = {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            raise InputError(f"{argument}: {pattern!r} is not a regular expression ({error})") from error
        if strict and not hits:
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
