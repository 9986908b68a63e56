"""What others take from a diagnosis: sparsities of blocks for llm-compressor, rates of layers for Torch and optax."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from farms_jax import mappings
from farms_jax._default_axes import is_small
from farms_jax._lr_scale import spread_factors
from farms_jax._names import block_of, module_of, named_leaves, natural_key, weights_of_bias
from farms_jax._sparsity import allocate_sparsity, impute_alphas
from farms_jax.diagnosis.columns import Row, number
from farms_jax.diagnosis.status import UNTOLD
from farms_jax.errors import InputError

_RATES = "farms_jax rates 1"
_NOT_PRUNED = {"embedding", "head", "stem", "router", "norm"}


def prunable(rows: Sequence[Row]) -> list[Row]:
    """Return the layers that llm-compressor prunes: linear modules of numbered blocks, under Torch's names.

    Empty where there are fewer than two blocks of several layers. A numbered module that is one layer is no block, but
    a part of an `nn.Sequential`, whose last one is the head, under no name that says so.
    """
    found = {
        row["layer"]: row
        for row in rows
        if row.get("type") not in _NOT_PRUNED and str(row.get("shape", "")).count("x") == 1
    }
    return [found[name] for name in _in_blocks(found)]


def check_blocks(names: Iterable[str]) -> None:
    """Check by names alone, before anything is measured, that a recipe can be written.

    Raises:
        InputError: there are no two numbered blocks of several layers under Torch's names.
    """
    if not _in_blocks(names):
        raise InputError(
            "--recipe: needs two numbered blocks of several linear layers under Torch's names, as layers.0.fc1, "
            "layers.0.fc2, layers.1.fc1, layers.1.fc2"
        )


def _in_blocks(names: Iterable[str]) -> list[str]:
    """Return the layers of numbered blocks of several layers; none where there are fewer than two such blocks."""
    numbered = [name for name in names if re.search(r"(^|[.])\d+[.]", name) and not name.endswith("]")]
    sizes = Counter(map(block_of, numbered))
    found = [name for name in numbered if sizes[block_of(name)] > 1]
    return found if len(set(map(block_of, found))) > 1 else []


def recipe(
    rows: Sequence[Row], *, sparsity: float, each: Literal["block", "layer"] = "block", epsilon: float = 0.3
) -> str:
    """Return a recipe of llm-compressor that prunes more where alpha is large.

    Args:
        rows: rows of a diagnosis, in network order.
        sparsity: fraction of the blocks' weights to remove, in (0, 1).
        each: what has a sparsity of its own, by its alpha: a `block`, by the mean of its layers, or a `layer`.
        epsilon: half the range of sparsities, relative; 0.3 as in `farms prune`.

    Returns:
        The recipe, in YAML: a modifier of llm-compressor takes a list of sparsities, one for each target.

    Raises:
        InputError: there are no blocks with names of Torch, or the sparsity is out of its range.
    """
    layers = prunable(rows)
    check_blocks(row["layer"] for row in layers)
    if not 0 < sparsity < 1:
        raise InputError(f"--sparsity: must be above 0 and below 1, got {sparsity}")
    alphas = impute_alphas(np.array([number(row, "alpha") or 0.0 for row in layers]))
    scores = {row["layer"]: float(alpha) for row, alpha in zip(layers, alphas, strict=True)}
    sizes = {row["layer"]: int(row["num_params"]) for row in layers}
    name_of = block_of if each == "block" else module_of
    found = allocate_sparsity(scores, sparsity=sparsity, epsilon=epsilon, block_of=name_of, num_params=sizes)
    modules = {name_of(layer): value for layer, value in found.items()}
    # llm-compressor goes through modules as Torch does, whatever the order of its targets: blocks by number, the layers
    # of a block as they were made, which no file tells. So layers of one kind share a modifier.
    kinds: dict[str, list[str]] = {}
    for module in sorted(modules, key=natural_key):
        kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "#", module), []).append(module)
    ignored = '["re:.*[.](gate|router)$"]' if any(row.get("type") == "router" for row in rows) else "[]"
    said = f"{sparsity:.0%} of the weights of {len(modules)} {each}s, more where alpha is large"
    once = ', pipeline="sequential"' if len(kinds) > 1 else ""  # or it calibrates for every modifier anew
    lines = [f'# {said}; for llmcompressor.oneshot(recipe="this file"{once}).', "pruning_stage:"]
    for i, members in enumerate(kinds.values(), start=1):
        lines += [
            f"  pruning{i}_modifiers:",
            "    WandaPruningModifier:",
            '      mask_structure: "0:0"',
            f"      ignore: {ignored}",
            "      targets:",
            *(f'        - "re:{_pattern(module)}"' for module in members),
            "      sparsity:",
            *(f"        - {modules[module]:.4f}" for module in members),
        ]
    return "\n".join(lines) + "\n"


def _pattern(module: str) -> str:
    """Return a regular expression of a module, in whatever it is wrapped; of a mere number only by itself.

    >>> _pattern("layers.0"), _pattern("0")
    ('(.*[.])?layers[.]0$', '0$')
    """
    return f"{'' if module.isdecimal() else '(.*[.])?'}{module.replace('.', '[.]')}$"


def rates(
    rows: Sequence[Row], left_out: Sequence[tuple[str, str]] = (), *, low: float = 0.5, high: float = 1.5
) -> dict[str, Any]:
    """Return factors of the learning rate by layer, as TempBalance's: from `low`, of the smallest alpha, to `high`.

    A layer without alpha has 1, and so has one whose alpha says nothing: a degenerate one, or one of too few
    eigenvalues. A bias that was left out has the factor of its layer.
    """
    alphas = np.array([0.0 if row.get("status") in UNTOLD else number(row, "alpha") or 0.0 for row in rows])
    fitted = alphas > 0
    factors = np.ones(len(rows))
    if fitted.any() and np.ptp(alphas[fitted]) > 0:
        factors[fitted] = np.asarray(mappings.linear(jnp.asarray(alphas[fitted]), low, high))
    found = {row["layer"]: round(float(factor), 4) for row, factor in zip(rows, factors, strict=True)}
    return {"format": _RATES, "low": low, "high": high, "factors": found | _of_biases(found, [n for n, _ in left_out])}


def read_rates(path: str | Path, params: Any) -> Any:
    """Return the factors of `farms analyze --rates FILE` as a tree like `params`, for updates to be multiplied by.

    Args:
        path: the file.
        params: parameters of JAX, under the names that were measured.

    Returns:
        A tree of float32 factors, each in a shape that broadcasts to its leaf; 1 for what the file does not name.

    Raises:
        InputError: the file is something else, or names none of these parameters.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] != _RATES:
            raise InputError(f"format {content['format']!r}")
        factors = {str(name): float(factor) for name, factor in content["factors"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: no rates; make some with `farms analyze MODEL --rates FILE`") from error
    leaves = named_leaves(params)
    stacks = _stacks(factors)
    if not any(name in factors or name in stacks for name, _ in leaves):
        raise InputError(f"{path}: names none of these parameters, but {next(iter(factors), 'nothing')}; measure them")
    factors |= _of_biases(factors, [name for name, leaf in leaves if is_small(name, jnp.ndim(leaf))])
    scales = [
        _of_stack(name, stacks[name], leaf) if name in stacks else jnp.asarray(factors.get(name, 1.0), jnp.float32)
        for name, leaf in leaves
    ]
    return jax.tree.unflatten(jax.tree.structure(params), scales)


def _of_biases(factors: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Return the factors of small leaves, which have those of the weight in their module where there is one."""
    modules: dict[str, list[str]] = {}
    for name in factors:
        modules.setdefault(module_of(name), []).append(name)
    found = {}
    for name in names:
        if name in factors:
            continue
        own = [weight for weight in weights_of_bias(name) if weight in factors]
        own = own or (modules.get(module_of(name), []) if module_of(name) else [])
        if len(own) == 1:
            found[name] = factors[own[0]]
    return found


def _stacks(factors: Mapping[str, float]) -> dict[str, dict[tuple[int, ...], float]]:
    """Return the factors of leaves that hold stacks, by index."""
    stacks: dict[str, dict[tuple[int, ...], float]] = {}
    for name, factor in factors.items():
        if match := re.fullmatch(r"(.*)\[([\d,]+)\]", name):
            stacks.setdefault(match[1], {})[tuple(map(int, match[2].split(",")))] = factor
    return stacks


def _of_stack(name: str, factors: Mapping[tuple[int, ...], float], leaf: Any) -> jax.Array:
    """Return the factors of a stack, along the axes of the leaf that are as long: the first such axes."""
    shape = tuple(max(index[i] for index in factors) + 1 for i in range(len(next(iter(factors)))))
    axes: list[int] = []
    for size in shape:
        fitting = [axis for axis, length in enumerate(jnp.shape(leaf)) if length == size and axis not in axes]
        if not fitting:
            raise InputError(f"rates: {name} has no axis of {size} layers, its shape is {jnp.shape(leaf)}")
        axes.append(fitting[0])
    values = np.ones(shape)
    for index, factor in factors.items():
        values[index] = factor
    return spread_factors(jnp.asarray(values, jnp.float32), tuple(axes), leaf)
