"""Names of arrays without what wraps a model: torch.compile, FSDP, DDP, or a model that has it as a part.

>>> unwrapped("model._orig_mod.layers.0._fsdp_wrapped_module.up.weight")
'model.layers.0.up.weight'
>>> paired(["layers.0.weight", "head.weight"], ["module.layers.0.weight", "module.norm.weight"])
{'layers.0.weight': ('layers.0.weight', 'module.layers.0.weight')}
>>> located(["model.layers.0.up.weight", "lm_head.weight"], ["lm.model.layers.0.up.weight", "lm.lm_head.weight"])
{'model.layers.0.up.weight': 'lm.model.layers.0.up.weight', 'lm_head.weight': 'lm.lm_head.weight'}
"""

import re
from collections import Counter
from collections.abc import Iterable

# torch.compile, FSDP, activation checkpointing, Lightning Fabric: no module of a model is called so.
_WRAPPERS = re.compile(r"(?<![^./])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)[./]")
_IN_BLOCK = re.compile(r"(?P<prefix>(?:.*?[./])??)(?P<rest>[^./]+[./]\d+[./].*)")
_PARALLEL = "module"  # what DDP has around a model; a part of a model may be called so too


def unwrapped(name: str) -> str:
    """Return a name without the wrappers that have names of their own, anywhere in it."""
    return _WRAPPERS.sub("", name)


def paired(first: Iterable[str], second: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return which names of two models are of the same array: name to show -> name in each, in the first's order.

    Those are names that are equal without wrappers; and of the others those that are equal where one of the models is
    without the prefix, such as `model.`, by which most become equal.
    """
    a, b = _without_wrappers(first), _without_wrappers(second)
    same = {name: name for name in a if name in b}
    alone = [[name for name in names if name not in same] for names in (a, b)]
    counts = Counter(
        (side, prefix)
        for side, names in enumerate(alone)
        for name in names
        for prefix, rest in _endings(name)
        if rest in (b, a)[side] and rest not in same
    )
    match counts.most_common(2):
        case [((side, prefix), count), *others] if not others or count > others[0][1]:
            for name in alone[side]:
                rest = name.removeprefix(prefix)
                if name.startswith(prefix) and rest in (b, a)[side] and rest not in same:
                    same |= {name: rest} if side == 0 else {rest: name}
    pairs = {name: (a[name], b[same[name]]) for name in a if name in same}
    return {x if x == y else min(name, same[name], key=len): (x, y) for name, (x, y) in pairs.items()}


def located(wanted: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Return which names of a file are those of a network: wanted name -> name in the file, for all that are found.

    Those are names that are equal without wrappers; and of the others those that are equal where one prefix before the
    blocks stands for another, such as `model.language_model.` for `model.`: the one by which most become equal.
    """
    wanted, plain = list(wanted), _without_wrappers(names)
    found = {name: plain[name] for name in wanted if name in plain}
    starts: dict[str, set[str]] = {}  # name from its block on -> the prefixes before it
    for name in wanted:
        if name not in found and (match := _IN_BLOCK.fullmatch(name)):
            starts.setdefault(match["rest"], set()).add(match["prefix"])
    counts = Counter(
        (ours, theirs)
        for name in plain
        for theirs, rest in [("", name), *_endings(name)]
        for ours in starts.get(rest, ())
    )
    match counts.most_common(2):
        case [((ours, theirs), count), *others] if not others or count > others[0][1]:
            swapped = {name: theirs + name.removeprefix(ours) for name in wanted if name.startswith(ours)}
            found = {name: plain[other] for name, other in swapped.items() if other in plain} | found
    for name in wanted:
        ending = [other for other in plain if other.endswith(f".{name}")]
        if name not in found and len(ending) == 1:  # the head, which is not below the prefix
            found[name] = plain[ending[0]]
    return {name: found[name] for name in wanted if name in found}


def _without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Return name without wrappers -> name, the first where several become equal.

    >>> list(_without_wrappers(["net.module.up.weight", "net.module.down.weight", "head.weight"]))
    ['net.up.weight', 'net.down.weight', 'head.weight']
    """
    paths = {name: tuple(unwrapped(name).split(".")) for name in names}
    inside: dict[tuple[str, ...], set[str]] = {}
    for path in paths.values():
        for end, part in enumerate(path):
            inside.setdefault(path[:end], set()).add(part)
    found: dict[str, str] = {}
    for name, path in paths.items():
        kept = [part for end, part in enumerate(path[:-1]) if part != _PARALLEL or len(inside[path[:end]]) > 1]
        found.setdefault(".".join([*kept, path[-1]]), name)
    return found


def _endings(name: str) -> list[tuple[str, str]]:
    """Return the ways to cut a name into a prefix and a rest.

    >>> _endings("model.up.weight")
    [('model.', 'up.weight'), ('model.up.', 'weight')]
    """
    return [(name[: match.end()], name[match.end() :]) for match in re.finditer(r"[./]", name)]
