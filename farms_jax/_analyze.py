"""analyze(): weights -> matrices -> windows -> eigenvalues -> alpha, for a whole network in one compiled call."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import Mesh

from farms_jax._axes import FLAX_AXES
from farms_jax._layers import not_finite, raise_if_not_finite, select_layers, warn_of_undeclared
from farms_jax._names import named_leaves, natural_key
from farms_jax._report import METRICS, LayerReport
from farms_jax._scaling import times_power
from farms_jax._tail import Tail, fit_tail, highest_alpha, without_flat
from farms_jax._windows import Window
from farms_jax.solvers import mesh as mesh_solver
from farms_jax.solvers.dispatch import Cut, Options, Solver, Spectra, check_solver, pooled_eigenvalues

_BATCH = 2**24  # numbers in each of the few arrays that are alive while spectra are fitted in parallel


class _Plan(NamedTuple):
    """The static part of an analysis, hashable: jit compiles once per plan and weight shapes."""

    cuts: tuple[Cut, ...]
    factors: tuple[float, ...]  # on the eigenvalues of each leaf
    pooled: bool  # the divisions of a kernel make one spectrum
    tail: Tail
    keep_eigenvalues: bool
    options: Options


def analyze(
    params: Any,
    *,
    window: Window | None = Window(),  # noqa: B008 (frozen)
    tail: Tail = Tail(),  # noqa: B008
    axes: Any = FLAX_AXES,
    stack: Any = None,
    exclude: str | Iterable[str] = (),
    kernel_scale: float = 0.5,
    solver: Solver = "auto",
    max_batch_bytes: int = 2**30,
    eigenvalues: bool = False,
    mesh: Mesh | None = None,
) -> LayerReport:
    r"""Measure the heavy tail of every layer's weight spectrum.

    Layers are the 2-D weights and 4-D kernels of the tree, real or complex, Flax's attention and `DenseGeneral`, and
    what `axes` and `stack` declare; every index of a stack is a layer of its own, `kernel[3]`. Biases, scales of norms
    and embeddings of positions are none. Every other leaf is listed in the report's `left_out` with its reason.
    Eigenvalues are squared singular values, computed in float32 (float64 under `jax_enable_x64`) whatever the weights'
    dtype; a complex weight, computed in complex64 (complex128), has as many as a real one of its shape. Runs eagerly,
    or traced inside `jit`, `lax.cond`, `lax.scan`.

    >>> import farms_jax, jax
    >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}}
    >>> report = farms_jax.analyze(params)
    >>> report.names
    ('dense/kernel',)

    Solvers, with the relative error of an eigenvalue e (emax the largest of its window, eps 1.2e-7 in float32):

    - `"gram"`: eigenvalues only, of the windows' Gram matrices, by tridiagonal reduction in the working precision:
      eps emax / e, n times that at worst for windows of n rows. Exact enough for the upper half of a spectrum and no
      further. On CPU a layer whose median is below 1e-3 of its largest eigenvalue is solved again in float64.
    - `"gram64"`: the same in float64, at 1.5 times the time: eps, down to e = 1e-9 emax. On an accelerator it needs
      `jax_enable_x64`; without it, that is an error, or inside `jit` `"svd"` takes its place there.
    - `"svd"`: squared singular values in the working precision: 2 eps sqrt(emax / e), up to four times that at worst.
    - `"auto"`: `"gram"` for the median rule. Where small eigenvalues count too (`peak`, `ks`, `min_eigenvalue`,
      `xmin_pos` above 2, `eigenvalues=True`): `"gram64"` on CPU, `"svd"` on an accelerator.

    Eigenvalues below a solver's resolution are exactly 0. On CPU single matrices are solved in threads, one per
    core, and BLAS is held to one thread meanwhile; nothing has to be set from outside.

    On several devices the windows of every layer are spread over those of a mesh. One layer after the other is brought
    to all of them, so that no device ever holds more than one layer whole; then each makes all fits of the spectra
    itself. The result is that of one device, on all of them. In several processes all must make the same call, and host
    arrays must be the same in each; `farms_jax.multihost.analyze` spreads layers instead, of arrays that every process
    has or can read.

    Args:
        params: any pytree of arrays: Linen dict, NNX state or module, Equinox model filtered to arrays, plain dict.
        window: windows of fixed aspect ratio (FARMS); `None` takes whole matrices, the baseline: one spectrum
            per layer, over all kernel positions.
        tail: where the power-law tail starts.
        axes: what the axes of the weights count: `FLAX_AXES`, or `TORCH_AXES` for (out, in, ...); a mapping from
            patterns of names, matched whole, to spellings, `{r".*/query/kernel": "IOO", r".*/embedding": None}`, as
            `AxisRules` explain; `AxisRules`, of which `farms_jax.axis_rules` has ready ones; a tree of spellings like
            `params`; or a function of `params` that gives one of these.
        stack: which axis of a leaf counts layers, experts or seeds, by patterns, `{r"decoder/layers/.*": 1}`, a tuple
            of axes for layers of experts; or one for all leaves. Spellings are of the leaf without these axes.
        exclude: regular expressions of layer names to leave out, matched whole, such as `r"head/.*"`.
        kernel_scale: factor on the eigenvalues of 4-D kernels; 0.5 as in the reference (its `conv_norm`).
        solver: see above.
        max_batch_bytes: bound on the bytes of windows and Gram matrices alive at once, on each accelerator, or on a
            process's CPU devices together; a single window is solved whatever its size.
        eigenvalues: keep the pooled eigenvalues in the report.
        mesh: devices to spread the windows over, each with its share. `None`: those on which the weights lie by a
            `NamedSharding`, if any; traced weights bring none, so give it inside `jit`.

    Returns:
        The report. Inside a traced function, a layer with NaN or Inf has alpha 0, as has one without a tail.

    Raises:
        InputError: a weight has NaN or Inf; all such layers are named.
        ValueError: a pattern matches nothing, an argument is out of its range, or weights lie on different devices.

    References:
        Hu et al., Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias, ICML 2025, section 3.3.
    """
    if solver not in {"auto", "gram", "gram64", "svd"}:
        raise ValueError(f"analyze: solver must be 'auto', 'gram', 'gram64' or 'svd', got {solver!r}")
    if max_batch_bytes < 1:
        raise ValueError(f"analyze: max_batch_bytes must be at least 1, got {max_batch_bytes}")
    _raise_inside_shard_map()
    leaves = sorted(named_leaves(params), key=lambda pair: natural_key(pair[0]))
    selection = select_layers(leaves, window, tail, axes, exclude, stack=stack, params=params)
    warn_of_undeclared(selection.undeclared, selection.leaves)
    weights = tuple(leaf.weight for leaf in selection.leaves)
    mesh = mesh_solver.common_mesh(weights, mesh)
    platform = _platform(weights, mesh)
    if platform is not None:
        check_solver(solver, platform)
    plan = _Plan(
        cuts=tuple(Cut(leaf.axes, leaf.grid) for leaf in selection.leaves),
        factors=tuple(kernel_scale if leaf.is_kernel else 1.0 for leaf in selection.leaves),
        pooled=window is not None and window.divisions == "pooled",
        tail=tail,
        keep_eigenvalues=eigenvalues,
        options=Options(platform, solver, eigenvalues or needs_small_eigenvalues(tail), max_batch_bytes),
    )
    raise_if_not_finite(not_finite([(leaf.name, leaf.weight) for leaf in selection.leaves]))
    if mesh is None:
        measures, spectra = _measure(weights, plan)
    else:
        on_mesh = mesh_solver.pooled_eigenvalues(weights, plan.cuts, mesh, plan.options)
        measures, spectra = _fit(tuple(on_mesh), plan)
    report = LayerReport(
        names=selection.layers,
        num_params=tuple(math.prod(leaf.shape[1:]) for leaf in selection.leaves for _ in leaf.layers),
        left_out=tuple(selection.left_out),
        num_positions=selection.num_positions,
        axes=tuple(selection.axes),
        eigenvalues=spectra if eigenvalues else None,
        **measures,
    )
    return report.without(selection.excluded)


def _raise_inside_shard_map() -> None:
    """Raise where weights would be shards, and nothing says of what."""
    if axes := jax.sharding.get_abstract_mesh().manual_axes:
        raise ValueError(
            f"analyze: inside shard_map or pmap, here over {', '.join(map(str, axes))}, a weight may be a shard of "
            "one; measure outside, where `mesh` spreads the work, and write the factors into the state by `refresh`"
        )


def needs_small_eigenvalues(tail: Tail) -> bool:
    """Tell whether eigenvalues below the median decide a fit, which then needs a more accurate solver."""
    return tail.xmin != "median" or tail.min_eigenvalue is not None or tail.xmin_pos > 2


def _platform(weights: Sequence[Any], mesh: Mesh | None) -> str | None:
    """Return the platform of the mesh or of the weights; `None` for traced weights: it is known where they are run."""
    if any(isinstance(weight, Tracer) for weight in weights):
        return None
    if mesh is not None:
        return mesh.devices.flat[0].platform
    for weight in weights:
        if isinstance(weight, jax.Array):
            return next(iter(weight.devices())).platform
    return jax.default_backend()


@functools.partial(jax.jit, static_argnames="plan")
def _measure(weights: tuple[Any, ...], plan: _Plan) -> tuple[dict[str, Array], tuple[Array, ...]]:
    """Return the measures of all layers, and their spectra (D, E) where the plan keeps them."""
    return _fit(tuple(pooled_eigenvalues(weights, plan.cuts, plan.options)), plan)


@functools.partial(jax.jit, static_argnames="plan")
def _fit(spectra: tuple[Spectra, ...], plan: _Plan) -> tuple[dict[str, Array], tuple[Array, ...]]:
    """Return what `_measure` does, given the spectra of the leaves."""
    scaled = [leaf.values * factor for leaf, factor in zip(spectra, plan.factors, strict=True)]
    if plan.pooled:
        scaled = [jnp.sort(e.reshape(len(e), 1, -1), axis=-1) for e in scaled]
    kept = ()
    if plan.keep_eigenvalues:
        whole = [times_power(e, 2 * leaf.exponents[:, None, None]) for e, leaf in zip(scaled, spectra, strict=True)]
        kept = tuple(layer for leaf in whole for layer in leaf)
    return _measure_spectra(scaled, [leaf.exponents for leaf in spectra], plan), kept


def _measure_spectra(spectra: list[Array], exponents: list[Array], plan: _Plan) -> dict[str, Array]:
    """Return the measures by name, each (number of layers,): means over the divisions of the spectra (L, D, E).

    Those of each leaf are to be multiplied by 4 to the power of its exponents (L,).
    """
    if not spectra:
        return {key: jnp.zeros(0, jnp.int32 if key == "num_eigenvalues" else float) for key in METRICS}
    # Padded in front to one length: a fit is compiled once, not for each length.
    longest = max(e.shape[-1] for e in spectra)
    rows = [jnp.pad(e.reshape(-1, e.shape[-1]), ((0, 0), (longest - e.shape[-1], 0))) for e in spectra]
    padded = jnp.concatenate(rows)
    sizes = np.repeat([e.shape[2] for e in spectra], [len(own) for own in rows])
    divisions_of_layers = np.repeat([e.shape[1] for e in spectra], [e.shape[0] for e in spectra])
    layer_of = np.repeat(np.arange(len(divisions_of_layers)), divisions_of_layers)
    powers = 2 * jnp.concatenate(exponents)[layer_of]
    at_once = max(1, _BATCH // longest)
    fits = lax.map(
        lambda row: fit_tail(row[0], plan.tail, size=row[1], power=row[2]), (padded, sizes, powers), batch_size=at_once
    )
    highest = [highest_alpha(cut.grid.rows, cut.grid.cols, plan.tail) for cut in plan.cuts]
    fits = without_flat(fits, np.repeat(highest, [len(own) for own in rows]))
    largest, norm = padded[:, -1], padded.sum(-1)
    positive = jnp.where(largest > 0, largest, 1)
    alpha_hat = fits.alpha * (jnp.log10(positive) + powers.astype(positive.dtype) * math.log10(2))

    def total(values: Array) -> Array:
        return jax.ops.segment_sum(values, layer_of, num_segments=len(divisions_of_layers), indices_are_sorted=True)

    divisions = total(jnp.ones_like(norm))
    fitted = jnp.maximum(total((fits.alpha > 0).astype(norm.dtype)), 1)  # divisions without a tail have alpha 0
    return {
        "alpha": total(fits.alpha) / fitted,
        "ks_distance": total(fits.ks_distance) / divisions,
        "xmin": total(fits.xmin) / fitted,
        "largest_eigenvalue": total(times_power(largest, powers)) / divisions,
        "norm": total(times_power(norm, powers)) / divisions,
        "stable_rank": total(norm / positive) / divisions,
        "alpha_hat": total(alpha_hat) / fitted,
        "num_eigenvalues": total(fits.num_eigenvalues),
    }
