"""The exact search for the tail's start among many eigenvalues, rules `ks` and `peak`.

    python -m benchmarks.tail_search [--count 450000] [--repeats 5] [--json results.json]

The spectrum is that of Gaussian windows of 450 rows, pooled as often as it takes, each eigenvalue moved by about 1 %.
"""

import argparse
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._common import interleave, machine, timed, write
from farms_jax import Tail, fit_tail


def spectrum(count: int) -> np.ndarray:
    """Eigenvalues (count,), ascending, float32."""
    rng = np.random.default_rng(0)
    windows = rng.standard_normal((min(40, count // 450 + 1), 450, 450), dtype=np.float32) / 21
    values = np.resize(np.linalg.svd(windows, compute_uv=False) ** 2, count)
    return np.sort(np.abs(values * (1 + 0.01 * rng.standard_normal(count)))).astype(np.float32)


def main() -> None:
    """Print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=450_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", default="benchmarks/results/tail_search.json")
    settings = parser.parse_args()
    values, first, programs = jnp.asarray(spectrum(settings.count)), {}, {}
    for rule in ("ks", "peak"):
        fit = jax.jit(functools.partial(fit_tail, tail=Tail(rule)))
        compiled, first[rule] = timed(lambda fit=fit: fit.lower(values).compile())
        programs[rule] = lambda compiled=compiled: jax.block_until_ready(compiled(values))
    seconds = {rule: statistics.median(times) for rule, times in interleave(programs, settings.repeats).items()}
    facts = machine()
    print(f"{facts['cpu']}, {facts['cores']} cores; {settings.count} eigenvalues, medians of {settings.repeats}")
    for rule, value in seconds.items():
        print(f"{rule:5} compile {first[rule]:.2f} s, run {value:.3f} s")
    write(settings.json, {"machine": facts, "count": settings.count, "compile": first, "seconds": seconds})
    print(f"written to {settings.json}")


if __name__ == "__main__":
    main()
