"""Ways to solve many eigenproblems on CPU, on the windows of a full-width ResNet-18.

    python -m benchmarks.cpu_solvers [--repeats 5] [--json results.json]

- `threads`: what `farms_jax` does: LAPACK on single matrices in a thread pool behind one callback;
- `threads float64`: the same, Gram matrices in float64;
- `threads svd`: the same pool, singular values;
- `map`: `lax.map` over single matrices, tridiagonal reduction and Sturm bisection, one map per window shape;
- `maps side by side`: the same, each shape's windows split over as many maps as there are cores;
- `map svd`: `lax.map` over single matrices, singular values.

BLAS is held to one thread in all of them. Batched LAPACK calls are left out: they can wait forever.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from threadpoolctl import threadpool_limits

from benchmarks._common import interleave, machine, timed, write
from benchmarks.spectral import WINDOW, network
from farms_jax import TORCH_AXES
from farms_jax._axes import as_matrices
from farms_jax._windows import make_grid
from farms_jax.solvers import accelerator, cpu


def mapped(windows: list[Array], solve: Callable[[Array], Array], parts: int) -> list[Array]:
    """Eigenvalues (W, r) of windows (W, r, c) of each shape, one matrix at a time in each of so many maps."""
    one = functools.partial(lax.map, lambda window: solve(window[None])[0])
    return [jnp.concatenate([one(part) for part in jnp.array_split(stack, parts)]) for stack in windows]


def main() -> None:
    """Print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", default="benchmarks/results/cpu_solvers.json")
    settings = parser.parse_args()
    facts = machine()
    weights = network("resnet18").values()
    stacks = [as_matrices(weight, TORCH_AXES.of(weight.ndim))[0] for weight in weights]
    grids = [
        make_grid(WINDOW, stack.shape, is_kernel=weight.ndim == 4)
        for weight, stack in zip(weights, stacks, strict=True)
    ]
    by_shape: dict[tuple[int, int], list[np.ndarray]] = {}
    for stack, grid in zip(stacks, grids, strict=True):
        cut = cpu.cut_windows(stack, grid, 0, len(stack) * len(grid.starts))
        by_shape.setdefault(cut.shape[1:], []).append(cut)
    windows = [jnp.asarray(np.concatenate(parts)) for parts in by_shape.values()]

    programs: dict[str, Any] = {
        "threads": lambda: cpu.spectra(stacks, grids, solver="gram", max_bytes=2**30),
        "threads float64": lambda: cpu.spectra(stacks, grids, solver="gram64", max_bytes=2**30),
        "threads svd": lambda: cpu.spectra(stacks, grids, solver="svd", max_bytes=2**30),
    }
    first: dict[str, float] = dict.fromkeys(programs, 0.0)
    for name, solve, parts in (
        ("map", accelerator._gram_eigenvalues, 1),
        ("maps side by side", accelerator._gram_eigenvalues, facts["cores"]),
        ("map svd", accelerator._singular_values_squared, 1),
    ):
        program = jax.jit(functools.partial(mapped, solve=solve, parts=parts))
        compiled, first[name] = timed(lambda program=program: program.lower(windows).compile())
        programs[name] = functools.partial(lambda compiled: jax.block_until_ready(compiled(windows)), compiled)
    with threadpool_limits(1, user_api="blas"):
        seconds = {key: statistics.median(times) for key, times in interleave(programs, settings.repeats).items()}
    count = sum(len(stack) for stack in windows)
    print(f"{facts['cpu']}, {facts['cores']} cores; {count} windows, medians of {settings.repeats}")
    print(f"{'way':20} {'compile':>9} {'run':>9} {'to threads':>11}")
    for name, value in seconds.items():
        print(f"{name:20} {first[name]:7.2f} s {value:7.3f} s {value / seconds['threads']:10.2f}x")
    write(settings.json, {"machine": facts, "compile": first, "seconds": seconds})
    print(f"written to {settings.json}")


if __name__ == "__main__":
    main()
