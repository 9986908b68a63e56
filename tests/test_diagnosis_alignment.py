"""Turned singular vectors, against full decompositions of NumPy."""

import numpy as np
import pytest

from farms_jax.diagnosis import alignment as module
from farms_jax.diagnosis.alignment import ALIGNMENT, alignment

RNG = np.random.default_rng(0)
PAIRS = {
    "wide": RNG.standard_normal((2, 1, 24, 40)),
    "tall": RNG.standard_normal((2, 1, 40, 12)).astype(np.float32),
    "kernel": RNG.standard_normal((2, 9, 16, 20)),
    "complex": RNG.standard_normal((2, 1, 16, 20)) + 1j * RNG.standard_normal((2, 1, 16, 20)),
    "huge": 1e38 * RNG.standard_normal((2, 1, 16, 20)).astype(np.float32).clip(-3, 3),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_overlaps_and_angles_are_those_of_the_decompositions(kind, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 100)  # a matrix is read in several blocks
    first, second = PAIRS[kind]
    expected = []
    for pair in zip(*PAIRS[kind].astype(np.result_type(first, np.float64)), strict=True):
        (u, _, v), (s, _, t) = (np.linalg.svd(matrix, full_matrices=False) for matrix in pair)
        cosines = [
            np.linalg.svd(product, compute_uv=False)
            for product in (u[:, :6].T.conj() @ s[:, :6], v[:6] @ t[:6].T.conj())
        ]
        expected.append([*((c**2).mean() for c in cosines), *(np.degrees(np.arccos(c.min())) for c in cosines)])
    found = alignment(first, second, directions=6)
    assert list(found) == list(ALIGNMENT)
    np.testing.assert_allclose(list(found.values()), np.mean(expected, 0), rtol=1e-4)


def test_the_same_directions_at_any_scale():
    (first,) = PAIRS["tall"][:1]
    assert list(alignment(first, first.astype(np.float64), directions=3).values()) == [1, 1, 0, 0]
    for factor in (2.0, 1e-30, -1e30):
        left, right, *angles = alignment(first, first * np.float32(factor), directions=100).values()
        np.testing.assert_allclose((left, right), 1, rtol=1e-6)
        assert max(angles) < 0.1


def test_directions_are_no_more_than_the_rank():
    one = np.outer(np.arange(1.0, 9), np.ones(10))[None]
    other = np.outer(np.ones(8), np.ones(10))[None]
    cosine = 36 / (8 * 204) ** 0.5
    found = alignment(one, other, directions=3)
    np.testing.assert_allclose((found["left_overlap"], found["right_overlap"]), (cosine**2, 1), rtol=1e-9)
    assert set(alignment(one, 0 * one, directions=3).values()) == {None}
