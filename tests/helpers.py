"""Shared by the tests: fixtures, tolerances by error model, known answers."""

import io
import itertools
import json
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from farms_jax import LayerReport, Tail, Window
from farms_jax._report import METRICS

DATA = Path(__file__).parent / "data"

ALPHA_RTOL = {False: 1e-3, True: 1e-5}  # by jax_enable_x64: the reference's own float32 carries about 1e-6


def load_cases(name):
    """Settings and arrays of a fixture."""
    settings = json.loads((DATA / f"{name}.json").read_text())
    return settings, dict(np.load(DATA / f"{name}.npz"))


def pairwise(cases, *keys):
    """Those of the cases that bring a pair of values, of any two keys, which none before them has."""
    seen, kept = set(), []
    for case in cases:
        pairs = set(itertools.combinations([(key, str(case[key])) for key in keys], 2))
        if pairs - seen:
            kept.append(case)
        seen |= pairs
    return kept


def few(cases, step):
    """Cases, or tuples of arguments, as parameters of a test; all but each `step`-th are slow."""
    arguments = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[pytest.mark.slow] * (n % step > 0)) for n, case in enumerate(arguments)]


def tail_of(case):
    """Our tail rule for a reference case."""
    rule = {"median": "median", "xmin_peak": "peak", "goodness-of-fit": "ks"}[case["fit"]]
    return Tail(
        xmin=rule,
        xmin_pos=case["xmin_pos"],
        bins=case.get("bins", 100),
        min_eigenvalue=1e-5 if case["filter_zeros"] else None,
        min_count=2,
        flat=None,
    )


def window_of(case):
    """Our window for a reference case."""
    if not case["use_sliding_window"]:
        return None
    per_axis = case.get("sampling_ops_per_dim")
    return Window(
        rows=case.get("num_row_samples"),
        aspect_ratio=case["Q_ratio"],
        stride=None if per_axis or "step_size" not in case else case["step_size"],
        per_axis=per_axis,
        min_division=1,
    )


def same(one, other):
    """Whether two trees of arrays are equal to the bit."""
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def lines_of(folder):
    """What a training wrote of its epochs and layers, without times."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = [{key: value for key, value in line.items() if "seconds" not in key} for line in metrics]
    return timeless, (folder / "layers.csv").read_text().splitlines()


def report_of(*, names, num_params=None, **columns):
    """A report of layers with these measures; those not given are ones."""
    ones = np.ones(len(names))
    arrays = {metric: jnp.asarray(columns.get(metric, ones), float) for metric in METRICS}
    return LayerReport(names=tuple(names), num_params=num_params or (1,) * len(names), left_out=(), **arrays)


def power_law(alpha, count, seed=0, xmin=1.0):
    """Eigenvalues, ascending, drawn from a density proportional to e**-alpha above xmin."""
    uniform = np.random.default_rng(seed).uniform(size=count)
    return np.sort(xmin * (1 - uniform) ** (-1 / (alpha - 1)))


def write_tar(path, content, mode="w:gz"):
    """Make a tar archive of `{member name: bytes}`."""
    with tarfile.open(path, mode) as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
