"""The seeded weights of the reference fixtures `alpha_linear` and `alpha_conv`, in Torch's orientation."""

import numpy as np


def _rng(seed):
    return np.random.default_rng(seed)


def _product(seed, rows, inner, cols, scale, noise=0.0):
    rng = _rng(seed)
    product = rng.standard_normal((rows, inner)) @ rng.standard_normal((inner, cols)) / scale
    return product + noise * rng.standard_normal((rows, cols)) if noise else product


def _spiked():
    rng = _rng(14)
    bulk = rng.standard_normal((160, 224)) / 15
    return bulk + np.outer(rng.standard_normal(160), rng.standard_normal(224)) / 30


def _zeroed(weight, where):
    weight[where] = 0
    return weight


def _he(seed, *shape):
    return _rng(seed).standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))


LINEAR = {
    "gauss_64x64": lambda: _rng(1).standard_normal((64, 64)) / 8,
    "gauss_100x512": lambda: _rng(2).standard_normal((100, 512)) / np.sqrt(512),
    "gauss_512x10": lambda: _rng(3).standard_normal((512, 10)) / np.sqrt(10),
    "gauss_256x1024": lambda: _rng(4).standard_normal((256, 1024)) / 32,
    "gauss_1024x256": lambda: 0.02 * _rng(5).standard_normal((1024, 256)),
    "lowrank_300x300": lambda: _product(6, 300, 20, 300, 20, noise=0.05),
    "student3_200x120": lambda: 0.1 * _rng(7).standard_t(3, (200, 120)),
    "student15_128x384": lambda: 0.02 * _rng(8).standard_t(1.5, (128, 384)),
    "zeroblock_40x200": lambda: _zeroed(_rng(9).standard_normal((40, 200)) / np.sqrt(200), np.s_[10:30, 50:150]),
    "zerorows_60x80": lambda: _zeroed(_rng(10).standard_normal((60, 80)), np.s_[40:]),
    "rankdef_120x90": lambda: _product(11, 120, 30, 90, 30),
    "uniform_96x128": lambda: _rng(12).uniform(-1 / np.sqrt(128), 1 / np.sqrt(128), (96, 128)),
    "big_128x128": lambda: 5 * _rng(13).standard_normal((128, 128)),
    "spiked_160x224": _spiked,
    "const_8x8": lambda: np.full((8, 8), 0.5),
    "small_4x30": lambda: _rng(15).standard_normal((4, 30)),
}

CONV = {
    "conv_64x3x3x3": lambda: _he(21, 64, 3, 3, 3),
    "conv_128x64x3x3": lambda: _he(22, 128, 64, 3, 3),
    "conv_64x128x1x1": lambda: _he(23, 64, 128, 1, 1),
    "conv_512x512x3x3": lambda: _he(24, 512, 512, 3, 3),
    "conv_32x32x3x3_t3": lambda: 0.05 * _rng(25).standard_t(3, (32, 32, 3, 3)),
    "conv_16x48x5x5": lambda: _he(26, 16, 48, 5, 5),
    "conv_48x20x3x3": lambda: _he(27, 48, 20, 3, 3),
    "conv_32x1x3x3": lambda: _he(28, 32, 1, 3, 3),
    "conv_4x4x7x7": lambda: _he(29, 4, 4, 7, 7),
    "conv_2x3x5x4": lambda: _he(30, 2, 3, 5, 4),
    "conv_48x24x3x3_zero": lambda: _zeroed(_rng(31).standard_normal((48, 24, 3, 3)) / 15, np.s_[40:]),
    "conv_24x24x3x3_big": lambda: 4 * _rng(32).standard_normal((24, 24, 3, 3)),
}


def weight(name: str) -> np.ndarray:
    """One weight of the fixtures, float32, (out, in) or (out, in, kh, kw)."""
    return {**LINEAR, **CONV}[name]().astype(np.float32)
