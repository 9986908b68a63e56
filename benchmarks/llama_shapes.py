"""Spectral analysis at the scale of LLaMA: 225 windows of 2000 x 2000 for each matrix.

    python -m benchmarks.llama_shapes [--model 7b] [--per-shape 1] [--rules median peak] [--rows 2000] [--per-axis 15]
                                      [--weights PATH] [--peer 4] [--json results.json]

Matrices come one at a time: random ones in the shapes of LLaMA-7B or 13B, or those of a checkpoint that `farms analyze`
reads. Of each shape so many are analysed; `--per-shape 0` takes all, and the time of the whole model is then measured
instead of computed from the time per matrix of each shape. The first analysis of a shape compiles for a second or two:
where it takes less than 20 seconds in all, it is done again, and the second counts. The floor of the arithmetic is 4/3
n^3 to reduce a window of n rows to tridiagonal form and n^3 for its Gram matrix, half of which suffices. `--peer` is
the plain PyTorch loop, one `torch.linalg.svdvals` per window, over so many windows of each shape; its fits, one per
candidate for `peak`, are timed at a few candidates and counted apart.
"""

import argparse
import collections
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import farms_jax
from benchmarks._common import machine, timed, write
from farms_jax._windows import Grid, make_grid
from farms_jax.programs.memory import peak_memory, return_freed_memory

BLOCKS = {"7b": (32, 4096, 11008), "13b": (40, 5120, 13824)}  # number, width, width of the MLP
PAPER = {  # seconds on eight L40 GPUs, paper, appendix on computational cost: model, rows, positions per axis
    ("7b", 2000, 15): 134.5,
    ("7b", 4096, 5): 6.08,
    ("13b", 2000, 15): 163.26,
    ("13b", 5120, 5): 16.65,
}
_COMPILING_MATTERS = 20.0  # seconds of an analysis
Shape = tuple[int, int]


class Layer(NamedTuple):
    """A matrix of the model, read or drawn when it is needed."""

    name: str
    shape: Shape
    read: Callable[[], Any]


def drawn(model: str) -> Iterator[Layer]:
    """Layers of a LLaMA, Gaussian with variance 1 / inputs, float32."""
    blocks, width, mlp = BLOCKS[model]
    shapes: dict[str, Shape] = {name: (width, width) for name in "qkvo"} | {
        name: (mlp, width) for name in ("gate", "up")
    }
    shapes["down"] = (width, mlp)
    named = [(f"{block}.{name}", shape) for block in range(blocks) for name, shape in shapes.items()]
    for number, (name, shape) in enumerate(named):

        def draw(number: int = number, shape: Shape = shape) -> jax.Array:
            return jax.random.normal(jax.random.key(number), shape) / np.sqrt(shape[1])

        yield Layer(name, shape, draw)


def read_rows_first(source: farms_jax.WeightSource, name: str, *, flip: bool) -> np.ndarray:
    """A matrix (outputs, inputs)."""
    return source.read(name).T if flip else source.read(name)


def stored(path: str) -> Iterator[Layer]:
    """Layers of a checkpoint; its matrices with rows as outputs."""
    source = farms_jax.open_weights(path)
    for name, info in source.tensors.items():
        if len(info.shape) == 2:
            flip = source.axes != farms_jax.TORCH_AXES
            rows, cols = reversed(info.shape) if flip else info.shape
            yield Layer(name, (rows, cols), functools.partial(read_rows_first, source, name, flip=flip))


def windows_of(grid: Grid) -> int:
    """Windows of a layer."""
    return len(grid.starts)


def floor_of(grid: Grid) -> float:
    """Fewest operations for the eigenvalues of all windows of a layer."""
    short, long = sorted((grid.rows, grid.cols))
    return len(grid.starts) * (4 / 3 * short**3 + short**2 * long)


def product_rate() -> float:
    """Operations per second of a float32 matrix product of 4096 rows, full precision."""
    matrix = jax.random.normal(jax.random.key(0), (4096, 4096))
    product = jax.jit(lambda m: jnp.dot(m, m, precision=jax.lax.Precision.HIGHEST))
    return 2 * 4096**3 / min(timed(lambda: jax.block_until_ready(product(matrix)))[1] for _ in range(4))


def choose(layers: list[Layer], per_shape: int) -> list[Layer]:
    """So many layers of each shape, or all."""
    by_shape: dict[Shape, list[Layer]] = collections.defaultdict(list)
    for layer in layers:
        by_shape[layer.shape].append(layer)
    return [layer for same in by_shape.values() for layer in same[: per_shape or None]]


def analyse(layers: list[Layer], window: farms_jax.Window, rule: Any) -> list[float]:
    """Seconds of the analysis of each layer, and nothing else: not of drawing or reading it."""
    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices), "devices") if len(devices) > 1 else None
    settings = {"window": window, "tail": farms_jax.Tail(rule), "axes": farms_jax.TORCH_AXES, "mesh": mesh}
    seconds, compiled = [], set()
    for layer in tqdm(layers, desc=rule, unit="matrix"):
        weights = {layer.name: jax.block_until_ready(layer.read())}
        taken = seconds_of_analysis(weights, settings)
        if layer.shape not in compiled and taken < _COMPILING_MATTERS:
            taken = seconds_of_analysis(weights, settings)
        compiled.add(layer.shape)
        seconds.append(taken)
    return seconds


def seconds_of_analysis(weights: dict[str, Any], settings: dict[str, Any]) -> float:
    """Analyse once, until alpha is on the host."""
    alpha, seconds = timed(lambda: jax.device_get(farms_jax.analyze(weights, **settings).alpha))
    assert np.isfinite(alpha).all()
    return seconds


class Peer(NamedTuple):
    """PyTorch's loop over a layer, in seconds: of a window's eigenvalues, of the layer's fit by each rule."""

    window: float
    fits: dict[str, float]


def loop(layer: Layer, grid: Grid, count: int, rules: list[str]) -> Peer:
    """Time PyTorch's loop on windows spread over a layer, and its fits on a spectrum as long as the layer's."""
    import torch

    matrix = torch.from_numpy(np.array(layer.read(), np.float32))
    starts = [grid.starts[i] for i in np.linspace(0, len(grid.starts) - 1, count).astype(int)]
    windows = [matrix[row : row + grid.rows, col : col + grid.cols].contiguous() for row, col in starts]
    torch.linalg.svdvals(windows[0])
    runs = [timed(lambda: torch.linalg.svdvals(window).square()) for window in windows]  # noqa: B023
    few = torch.cat([values for values, _ in runs])
    pooled = few.repeat(-(-windows_of(grid) // count)).sort().values[: windows_of(grid) * len(few) // count]
    return Peer(statistics.median(seconds for _, seconds in runs), {rule: loop_fit(pooled, rule) for rule in rules})


def loop_fit(values: Any, rule: str, sample: int = 20) -> float:
    """Seconds of the loop's fit to an ascending spectrum: for `peak` and `ks` from those of so many candidates."""
    import torch

    from benchmarks.spectral import at_candidate, bounds, fit

    if rule == "median":
        return timed(lambda: fit(values, rule))[1]
    least, most = bounds(values) if rule == "peak" else (values[0], values[-1])
    candidates = ((values >= least) & (values <= most)).nonzero()[:, 0]
    logs = values.log()
    chosen = [int(candidates[int(place)]) for place in torch.linspace(0, len(candidates) - 2, sample)]
    at_candidate(values, logs, chosen[0])
    seconds = timed(lambda: [at_candidate(values, logs, index) for index in chosen])[1]
    return seconds / sample * len(candidates)


class Plan(NamedTuple):
    """What is measured, and of how much it is a part: by shape of a matrix."""

    chosen: list[Layer]
    counts: dict[Shape, int]
    grids: dict[Shape, Grid]

    def total(self, of_window: Callable[[Grid], float], counts: dict[Shape, int] | None = None) -> float:
        """Sum over all windows of the model, or of so many matrices of each shape."""
        return sum(count * of_window(self.grids[shape]) for shape, count in (counts or self.counts).items())


def measure(plan: Plan, window: farms_jax.Window, rule: str) -> dict[str, Any]:
    """Analyse the chosen matrices; the whole model's time follows from the mean of each shape."""
    by_shape: dict[Shape, list[float]] = collections.defaultdict(list)
    for layer, taken in zip(plan.chosen, analyse(plan.chosen, window, rule), strict=True):
        by_shape[layer.shape].append(taken)
    done, measured = {shape: len(times) for shape, times in by_shape.items()}, sum(map(sum, by_shape.values()))
    windows = plan.total(windows_of, done)
    return {
        "measured_seconds": measured,
        "measured_share": windows / plan.total(windows_of),
        "seconds_by_shape": {f"{rows}x{cols}": times for (rows, cols), times in by_shape.items()},
        "windows_per_second": windows / measured,
        "flops": plan.total(floor_of, done) / measured,
        "whole_seconds": sum(plan.counts[shape] * statistics.mean(times) for shape, times in by_shape.items()),
    }


def line(rule: str, row: dict[str, Any], rate: float) -> str:
    """One rule's result for people."""
    share = row["measured_share"]
    parts = [
        f"{rule}: {row['windows_per_second']:.2f} windows/s",
        f"{row['flops'] / 1e9:.0f} GFLOP/s of the floor ({100 * row['flops'] / rate:.0f} % of products)",
        f"whole model {row['whole_seconds']:.0f} s, "
        + ("measured" if share == 1 else f"from {100 * share:.1f} % of its windows"),
    ]
    if loop_seconds := row["loop_seconds"]:
        both = loop_seconds + row["loop_fit_seconds"]
        parts.append(
            f"PyTorch's loop {loop_seconds:.0f} s, {loop_seconds / row['whole_seconds']:.1f}x, "
            f"with its fits {both:.0f} s, {both / row['whole_seconds']:.1f}x"
        )
    if row["paper_seconds"]:
        parts.append(f"paper {row['paper_seconds']} s on eight L40")
    return "; ".join(parts)


def main() -> None:
    """Print a line for each rule, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=BLOCKS, default="7b")
    parser.add_argument("--weights", help="a checkpoint instead of random matrices")
    parser.add_argument("--per-shape", type=int, default=1, help="matrices of each shape; 0: all")
    parser.add_argument("--rules", nargs="+", choices=("median", "peak", "ks"), default=["median", "peak"])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--per-axis", type=int, default=15)
    parser.add_argument("--peer", type=int, default=4, help="windows of each shape for PyTorch's loop; 0: none")
    parser.add_argument("--json", default="benchmarks/results/llama_shapes.json")
    settings = parser.parse_args()
    return_freed_memory()
    layers = list(stored(settings.weights) if settings.weights else drawn(settings.model))
    window = farms_jax.Window(rows=settings.rows, per_axis=settings.per_axis)
    grids = {layer.shape: make_grid(window, (1, *layer.shape), is_kernel=False) for layer in layers}
    plan = Plan(choose(layers, settings.per_shape), dict(collections.Counter(layer.shape for layer in layers)), grids)
    facts, rate = machine() | {"devices": jax.device_count()}, product_rate()
    print(f"{facts['cpu']}, {facts['cores']} cores, {facts['devices']} x {facts['device']}")
    print(
        f"float32 products: {rate / 1e9:.0f} GFLOP/s; windows of {settings.rows} rows, {plan.total(windows_of)} in all"
    )
    results: dict[str, Any] = {"machine": facts, "settings": vars(settings), "product_flops": rate, "rules": {}}
    first = {layer.shape: layer for layer in reversed(plan.chosen)}
    timed_layers = first.items() if settings.peer else ()
    peer = {shape: loop(layer, grids[shape], settings.peer, settings.rules) for shape, layer in timed_layers}
    known = None if settings.weights else PAPER.get((settings.model, settings.rows, settings.per_axis))
    for rule in settings.rules:
        of_peer = {
            "loop_seconds": sum(plan.counts[s] * windows_of(grids[s]) * peer[s].window for s in peer) or None,
            "loop_fit_seconds": sum(plan.counts[s] * peer[s].fits[rule] for s in peer) or None,
            "paper_seconds": known,
        }
        results["rules"][rule] = measure(plan, window, rule) | of_peer
        print(line(rule, results["rules"][rule], rate))
    results["peak_memory_bytes"] = peak_memory()
    results["device_peak_bytes"] = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    print(f"peak memory {results['peak_memory_bytes'] / 2**20:.0f} MiB")
    write(settings.json, results)
    print(f"written to {settings.json}")


if __name__ == "__main__":
    main()
