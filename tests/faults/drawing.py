"""Strategies of the property tests: shapes, windows, matrices of every kind, spectra; the same draws every time."""

import os

import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, seed, settings, strategies as st

from farms_jax import Window

SEED = int(os.environ.get("FARMS_FUZZ_SEED", "0"))
TIMES = int(os.environ.get("FARMS_FUZZ_TIMES", "1"))
HALF = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def examples(count):
    """Run a property on `count` drawn examples, the same ones every time."""
    profile = settings(
        max_examples=count * TIMES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    return lambda test: seed(SEED)(profile(test))


numbers = st.integers(0, 2**32 - 1)  # seeds of numpy: what fills a matrix is not worth shrinking entry by entry
sizes = st.one_of(st.integers(1, 6), st.integers(1, 60))


@st.composite
def windows(draw):
    """Any window, or none."""
    if draw(st.booleans()) and draw(st.booleans()):
        return None
    by_stride = draw(st.booleans())
    return Window(
        rows=draw(st.one_of(st.none(), st.integers(1, 70))),
        aspect_ratio=draw(st.sampled_from([0.05, 0.3, 0.5, 1.0, 1.0, 1.0, 1.5, 2.0, 3.7, 25.0])),
        stride=draw(st.integers(1, 80)) if by_stride else None,
        per_axis=None if by_stride else draw(st.one_of(st.none(), st.integers(1, 12))),
        divisions=draw(st.sampled_from(["mean", "pooled"])),
    )


def _low_rank(rng, shape):
    rank = int(rng.integers(1, max(2, min(shape[-2:]))))
    return rng.standard_normal((*shape[:-1], rank)) @ rng.standard_normal((*shape[:-2], rank, shape[-1]))


def _single(rng, shape):
    array = np.zeros(shape)
    array[tuple(rng.integers(0, shape))] = rng.standard_normal()
    return array


def _wide(rng, shape):
    """Singular values over several decades, in no order of rows or columns."""
    left, values, right = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    return left * np.logspace(0, -rng.uniform(1, 7), values.shape[-1]) @ right


KINDS = {
    "noise": lambda rng, shape: rng.standard_normal(shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "heavy": lambda rng, shape: rng.standard_t(1.5, shape),
    "graded": lambda rng, shape: rng.standard_normal(shape) * np.logspace(0, -4, shape[-1]),
    "wide": _wide,
    "low rank": _low_rank,
    "half zeros": lambda rng, shape: rng.standard_normal(shape) * (np.arange(shape[-1]) >= shape[-1] // 2),
    "zero rows": lambda rng, shape: rng.standard_normal(shape) * (rng.random((*shape[:-1], 1)) < 0.5),
    "rows twice": lambda rng, shape: rng.standard_normal(shape)[..., rng.integers(0, shape[-2], shape[-2]), :],
    "one entry": _single,
    "zeros": lambda rng, shape: np.zeros(shape),
    "constant": lambda rng, shape: np.full(shape, 0.5),
    "identity": lambda rng, shape: np.broadcast_to(np.eye(*shape[-2:]), shape),
}
SCALES = (1.0, 1.0, 0.02, 1e-3, 30.0, 1e-12, 1e12)
DTYPES = ("float32", "float32", "float64", "complex64", "complex128", "float16", "bfloat16")


@st.composite
def weights(draw, shapes, dtypes=DTYPES, kinds=tuple(KINDS)):
    """A weight in the precision in which it is analysed: half precision as float32, rounded to its values."""
    shape, dtype = draw(shapes), draw(st.sampled_from(dtypes))
    rng, kind = np.random.default_rng(draw(numbers)), KINDS[draw(st.sampled_from(kinds))]
    # Half precision has neither the range nor the digits.
    scale = draw(st.sampled_from(SCALES)) if dtype not in HALF else draw(st.sampled_from((1.0, 0.02)))
    array = scale * kind(rng, shape)
    if dtype in HALF:
        return array.astype(HALF[dtype]).astype(np.float32)
    return (array + 1j * scale * kind(rng, shape)).astype(dtype) if "complex" in dtype else array.astype(dtype)


dense = st.tuples(sizes, sizes)
kernels = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(1, 20))


SPECTRA = {
    "lognormal": lambda rng, n: np.exp(rng.normal(rng.uniform(-3, 1), rng.uniform(0.1, 3), n)),
    "power law": lambda rng, n: rng.uniform(size=n) ** (-1 / rng.uniform(0.3, 6)),
    "bulk": lambda rng, n: np.linalg.svd(rng.standard_normal((n, 2 * n)), compute_uv=False) ** 2,
    "two bulks": lambda rng, n: np.r_[rng.uniform(0.1, 0.2, n // 2), rng.uniform(5, 9, n - n // 2)],
    # Candidates of the peak rule begin at a logarithm of the peak.
    "one peak": lambda rng, n: np.r_[rng.uniform(0.4, 1, n // 2), rng.uniform(5, 5.3, n - n // 2)],
    "ties": lambda rng, n: np.round(rng.exponential(size=n), 1),
    "few values": lambda rng, n: rng.choice(rng.exponential(size=3), n),
    "mostly zeros": lambda rng, n: rng.exponential(size=n) * (rng.random(n) < 0.3),
    "zeros": lambda rng, n: np.zeros(n),
    "equal": lambda rng, n: np.full(n, rng.exponential()),
    "nearly equal": lambda rng, n: 1 + 10.0 ** -rng.uniform(4, 7.5) * rng.random(n),
}


@st.composite
def tails(draw):
    """Ascending eigenvalues, rounded to float32."""
    rng, kind = np.random.default_rng(draw(numbers)), SPECTRA[draw(st.sampled_from(sorted(SPECTRA)))]
    values = kind(rng, draw(st.one_of(st.integers(1, 8), st.integers(9, 120), st.integers(9, 120))))
    scale = draw(st.sampled_from((1.0, 1.0, 1e-4, 300.0, 1e-15, 1e15)))
    return np.sort(values * scale).astype(np.float32).astype(float)
