"""Ways to measure large matrices that were tried: what each costs and how far off its alpha is.

    python -m benchmarks.large_matrices [--rows 1000] [--reduced 2000 4096] [--whole 8192] [--repeats 3]
                                        [--weights PATH] [--json results.json]

- windows: the 64 windows of a matrix whose neighbours lie 149 of 2000 rows apart, as in the paper's LLaMA-7B: singular
  values; a Gram matrix for each; Gram matrices shared between windows that start in one column; those brought from one
  column to the next by adding new columns and taking away old ones. In float32 and float64, BLAS on one thread, one
  core.
- reductions: eigenvalues of a Gram matrix by reduction to tridiagonal form in one stage, and in two by way of a band;
  float64, two matrices at a time in two threads.
- fewer windows: alpha of so many of a layer's 225 windows, drawn at random, against that of all; median rule. Of random
  matrices, or of a checkpoint's.
- stochastic Lanczos: the spectrum of a whole matrix from Krylov spaces of random vectors (matfree), which needs only
  products with the matrix, against all its eigenvalues; median rule.
"""

import argparse
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matfree import decomp
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import farms_jax
from benchmarks._common import interleave, machine, timed, write
from farms_jax._windows import Grid, make_grid
from farms_jax.solvers import cpu, gram_matrices, two_stage
from farms_jax.solvers.lapack import symmetric_eigenvalues

STEP = 149 / 2000  # of a window: (4096 - 2000) // 14 rows
PER_AXIS = 8
DRAWS = 200


def gaussian(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """A matrix of variance 1 / columns, float32."""
    return np.random.default_rng(seed).standard_normal((rows, cols), np.float32) / np.float32(cols**0.5)


def hill(values: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Alpha of an ascending spectrum by the median rule, of equal or weighted eigenvalues."""
    weights = np.full(len(values), 1.0) if weights is None else weights
    tail = np.cumsum(weights) > weights.sum() / 2
    logs = np.log(values[tail].astype(float))
    return float(1 + weights[tail].sum() / (weights[tail] * (logs - logs[0])).sum())


def running(matrix: np.ndarray, grid: Grid) -> np.ndarray:
    """Eigenvalues (W, n): a product of all rows, brought from column to column by what comes and what goes."""
    step = round(grid.rows * STEP)
    gram, end, values = np.zeros((len(matrix), len(matrix)), matrix.dtype), 0, []
    for start in sorted({col for _, col in grid.starts}):
        gone = matrix[:, start - step : start] if start else matrix[:, :0]
        come, end = matrix[:, end : start + grid.cols], start + grid.cols
        gram += come @ come.T
        gram -= gone @ gone.T
        for row in sorted({row for row, _ in grid.starts}):
            block = np.array(gram[row : row + grid.rows, row : row + grid.rows], order="C")
            values.append(gram_matrices._eigenvalues(block[None], one_thread=True)[0])
    return np.stack(values)


def windows(rows: int, repeats: int) -> dict[str, Any]:
    """Seconds of each way for all windows, and its largest error over the upper half, relative to the eigenvalue."""
    step = round(rows * STEP)
    size = rows + (PER_AXIS - 1) * step
    matrix = gaussian(size, size)
    grid = make_grid(farms_jax.Window(rows=rows, stride=step), (1, size, size), is_kernel=False)
    runs = gram_matrices.shared_runs(grid)

    def one_by_one(precision: Any) -> np.ndarray:
        cut = [matrix[row : row + rows, col : col + rows] for row, col in grid.starts]
        return np.concatenate([
            gram_matrices.gram_eigenvalues(window[None], precision, one_thread=True) for window in cut
        ])

    def shared(precision: Any) -> np.ndarray:
        values = np.zeros((len(grid.starts), rows), precision)
        for run in runs:
            values[list(run.windows)] = gram_matrices.run_eigenvalues(matrix, run, grid, precision, one_thread=True)
        return values

    ways: dict[str, Callable[[], np.ndarray]] = {}
    for precision in (np.float32, np.float64):
        name = np.dtype(precision).name
        ways[f"a Gram matrix each, {name}"] = lambda precision=precision: one_by_one(precision)
        ways[f"shared, {name}"] = lambda precision=precision: shared(precision)
        ways[f"brought along, {name}"] = lambda precision=precision: running(matrix.astype(precision), grid)
    first = matrix[:rows, :rows]
    with threadpool_limits(1, user_api="blas"):
        pooled = {name: np.sort(way(), axis=None) for name, way in ways.items()}
        seconds = interleave(ways, repeats)
        one_svd = timed(lambda: np.linalg.svd(first, compute_uv=False))[1]
    exact = pooled["a Gram matrix each, float64"]
    upper = slice(len(exact) // 2, None)
    table: dict[str, dict[str, float | None]] = {
        name: {
            "seconds": statistics.median(times),
            "error": float((np.abs(pooled[name] - exact)[upper] / exact[upper]).max()),
        }
        for name, times in seconds.items()
    }
    table["singular values, float32 (from one window)"] = {"seconds": one_svd * len(grid.starts), "error": None}
    return {"windows": len(grid.starts), "ways": table}


def reductions(rows: int, repeats: int) -> dict[str, float]:
    """Seconds for two matrices in two threads, by reduction in one stage and in two."""
    matrix = gaussian(rows, rows).astype(np.float64)
    gram = matrix @ matrix.T
    ways = {
        "one stage": lambda: symmetric_eigenvalues(gram[None].copy()),
        "two stages": lambda: two_stage.symmetric_eigenvalues(gram[None].copy()),
    }
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(2) as threads:
        values = {name: way() for name, way in ways.items()}
        np.testing.assert_allclose(values["two stages"], values["one stage"], rtol=1e-9, atol=1e-12)
        pairs = {name: lambda way=way: list(threads.map(lambda _: way(), range(2))) for name, way in ways.items()}
        return {name: statistics.median(times) for name, times in interleave(pairs, repeats).items()}


def fewer(layers: dict[str, np.ndarray], rows: int) -> dict[str, dict[int, float]]:
    """Root mean square of alpha's relative error, over draws of so many windows, by layer."""
    rng, found = np.random.default_rng(0), {}
    for name, matrix in tqdm(layers.items(), desc="fewer windows", unit="layer"):
        grid = make_grid(farms_jax.Window(rows=rows, per_axis=15), (1, *matrix.shape), is_kernel=False)
        (values,) = cpu.window_spectra([matrix[None]], [grid], solver="gram64", max_bytes=2**30)
        whole = hill(np.sort(values, axis=None))
        found[name] = {}
        for count in (100, 49, 25, 9, 4):
            draws = [rng.choice(len(values), count, replace=False) for _ in range(DRAWS)]
            errors = [hill(np.sort(values[draw], axis=None)) / whole - 1 for draw in draws]
            found[name][count] = float(np.sqrt(np.mean(np.square(errors))))
    return found


def lanczos(rows: int) -> list[dict[str, float]]:
    """Alpha by stochastic Lanczos, and by all eigenvalues."""
    matrix = gaussian(rows, rows)
    spectrum = farms_jax.analyze({"m": matrix}, window=None)  # compiles
    spectrum, exact_seconds = timed(lambda: jax.device_get(farms_jax.analyze({"m": matrix + 0}, window=None)))
    exact, table = float(spectrum.alpha[0]), []
    product = jnp.asarray(matrix)
    for depth, probes in ((30, 10), (60, 10), (120, 10)):
        reduce = jax.jit(decomp.tridiag_sym(depth, reortho="full"), static_argnums=0)

        def matvec(vector: jax.Array, operand: jax.Array) -> jax.Array:
            return operand @ (vector @ operand)

        def estimate(reduce: Any = reduce, probes: int = probes) -> float:
            nodes, masses = [], []
            for probe in range(probes):
                vector = jax.random.rademacher(jax.random.key(probe), (rows,), jnp.float32)
                small = np.asarray(reduce(matvec, vector, product).J_small, np.float64)
                values, vectors = np.linalg.eigh(small)
                nodes.append(values)
                masses.append(vectors[0] ** 2)
            order = np.argsort(np.concatenate(nodes))
            values = np.maximum(np.concatenate(nodes)[order], 1e-30)
            return hill(values, np.concatenate(masses)[order])

        estimate(probes=1)
        alpha, seconds = timed(estimate)
        row = {"depth": depth, "probes": probes, "seconds": seconds, "alpha": alpha, "error": alpha / exact - 1}
        table.append(row | {"exact_seconds": exact_seconds})
    return table


def main() -> None:
    """Print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000, help="of the windows")
    parser.add_argument(
        "--reduced", type=int, nargs="+", default=[2000, 4096], help="rows of the Gram matrices that are reduced"
    )
    parser.add_argument("--whole", type=int, default=8192, help="rows of the matrix for stochastic Lanczos")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--weights", help="a checkpoint, of which `fewer windows` takes every tenth layer")
    parser.add_argument("--json", default="benchmarks/results/large_matrices.json")
    settings = parser.parse_args()
    facts = machine()
    print(f"{facts['cpu']}, {facts['cores']} cores")
    of_windows = windows(settings.rows, settings.repeats)
    print(f"{of_windows['windows']} windows of {settings.rows} rows, one core")
    for name, row in of_windows["ways"].items():
        print(f"  {name:45} {row['seconds']:7.2f} s" + (f"   error {row['error']:.0e}" if row["error"] else ""))
    of_reductions = {rows: reductions(rows, settings.repeats) for rows in settings.reduced}
    for rows, ways in of_reductions.items():
        for name, seconds in ways.items():
            print(f"  two of {rows} rows in two threads, {name:10} {seconds:7.2f} s")
    layers = {"gaussian": gaussian(1536, 576)}
    if settings.weights:
        source = farms_jax.open_weights(settings.weights)
        named = [name for name, info in source.tensors.items() if len(info.shape) == 2 and min(info.shape) >= 400]
        layers |= {name: source.read(name).astype(np.float32) for name in named[1::10]}
    of_fewer = fewer(layers, 200)
    for count in next(iter(of_fewer.values())):
        errors = [row[count] for row in of_fewer.values()]
        print(f"  {count:3} of 225 windows: alpha off by {statistics.median(errors):.1e}, at worst {max(errors):.1e}")
    of_lanczos = lanczos(settings.whole)
    print(f"whole matrix of {settings.whole} rows: all eigenvalues in {of_lanczos[0]['exact_seconds']:.2f} s")
    for row in of_lanczos:
        print(
            f"  {row['depth']} steps, {row['probes']} vectors: {row['seconds']:.2f} s, alpha off by {row['error']:+.1e}"
        )
    results = {
        "machine": facts,
        "windows": of_windows,
        "reductions": of_reductions,
        "fewer": of_fewer,
        "lanczos": of_lanczos,
    }
    write(settings.json, results)
    print(f"written to {settings.json}")


if __name__ == "__main__":
    main()
