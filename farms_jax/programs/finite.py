"""Where a training step stops being finite: the first layer of a network; needs flax, an extra of the programs.

>>> import jax
>>> from flax import nnx
>>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
>>> graph, params = nnx.split(model)
>>> def loss_of(params, x, *, call=call):
...     return call(nnx.merge(graph, params), x).sum()
>>> first_not_finite(loss_of, params, jax.numpy.full((4, 2), jax.numpy.inf))
'output of layers/0'
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from farms_jax._names import named_leaves

Call = Callable[..., Any]


def call(model: Call, *inputs: Any) -> Any:
    """Call a network: what a loss does but for `first_not_finite`, which looks inside."""
    return model(*inputs)


def recorded_call(outputs: list[tuple[str, Any]], model: nnx.Module, *inputs: Any) -> Any:
    """Return the output of a network, and append that of each module with its name, such as `layer1/0/conv1`.

    `outputs` has them in the order in which the calls end: a layer before the block that it is in. `nnx.capture` keeps
    outputs too, but not their order. As there, what is changed is the modules' classes, because Python looks for
    `__call__` nowhere else.
    """
    names = {id(module): "/".join(map(str, path)) for path, module in nnx.iter_modules(model)}
    kinds = {kind for _, module in nnx.iter_modules(model) for kind in type(module).__mro__}
    calls = {kind: vars(kind)["__call__"] for kind in kinds if "__call__" in vars(kind)}

    def recording(plain: Call) -> Call:
        @functools.wraps(plain)
        def recorded(module: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            output = plain(module, *args, **kwargs)
            if id(module) in names:
                outputs.append((names[id(module)], output))
            return output

        return recorded

    try:
        for kind, plain in calls.items():
            kind.__call__ = recording(plain)
        return model(*inputs)
    finally:
        for kind, plain in calls.items():
            kind.__call__ = plain


def norm(gradients: Any) -> jax.Array:
    """Return the norm of all entries of a tree: not finite where one of them is not, or is above 1e19."""
    return jnp.sqrt(jnp.stack([jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradients)]).sum())


def first_not_finite(
    loss_of: Callable[..., jax.Array], params: Any, *inputs: Any, compiler_options: dict[str, str] | None = None
) -> str:
    """Return the name of what is the first not to be finite in a step, which is taken once more.

    That is a weight; else the output of a layer, in network order; else the loss itself; else a gradient, from the last
    layer to the first. `loss_of(params, *inputs, call=...)` calls its network by `call(model, ...)`.
    """
    jit = functools.partial(jax.jit, compiler_options=compiler_options)
    modules: list[str] = []

    def forward(params: Any, *inputs: Any) -> tuple[jax.Array, list[jax.Array]]:
        outputs: list[tuple[str, Any]] = []
        loss = loss_of(params, *inputs, call=functools.partial(recorded_call, outputs))
        modules.extend(name for name, _ in outputs)
        return loss, [_is_finite(output) for _, output in outputs]

    loss, are_finite = jax.device_get(jit(forward)(params, *inputs))
    for name, weight in _in_order(params, modules):
        if not _is_finite(weight):
            return f"weight {name}"
    for name, is_finite in zip(modules, are_finite, strict=True):
        if not is_finite:
            return f"output of {name or 'the network'}"
    if not np.isfinite(loss):
        return "the loss itself, of finite outputs"
    norms = jit(lambda *arguments: jax.tree.map(norm, jax.grad(loss_of)(*arguments)))(params, *inputs)
    for name, value in reversed(_in_order(norms, modules)):
        if not np.isfinite(value):
            return f"gradient of {name}"
    return "nothing when the step was taken once more"


def _is_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _in_order(tree: Any, modules: list[str]) -> list[tuple[str, Any]]:
    """Sort the leaves by when their modules, or those around them, return; the network's own come first."""

    def place(leaf: tuple[str, Any]) -> int:
        parts = leaf[0].split("/")
        around = ("/".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        return next((modules.index(name) for name in around if name in modules), -1)

    return sorted(named_leaves(tree), key=place)
