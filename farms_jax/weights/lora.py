"""LoRA adapters (PEFT): a model's weights with the adapter's low-rank products added, tensor by tensor.

Hu et al. 2021: W + scale * B A, with scale = alpha / r; or alpha / sqrt(r), "rsLoRA" (Kalajdzievski 2023). DoRA (Liu et
al. 2024) gives every row of that the length that it learned. PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024) take
the product of the first factors off W before the training.
"""

import re
from pathlib import Path

import numpy as np
import scipy.linalg

from farms_jax.errors import InputError
from farms_jax.programs.files import expanded
from farms_jax.weights.adapter_config import ADAPTER_CONFIG, read_config
from farms_jax.weights.lora_matching import Factors, match
from farms_jax.weights.reading import TensorInfo
from farms_jax.weights.safetensors_source import SafetensorsSource
from farms_jax.weights.source import WeightSource
from farms_jax.weights.torch_source import open_torch

_ADAPTER = "adapter_model"
_MODEL = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")  # as transformers calls it
_FLOAT32 = np.dtype(np.float32)


def is_lora(path: str | Path) -> bool:
    """Return whether a path is the folder of a PEFT adapter; a model with a config of one beside it is a model."""
    folder = _folder(path)
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    return not any(_MODEL.fullmatch(child.name) for child in folder.iterdir())


def no_model(path: Path) -> str:
    """Return why an adapter in place of a model is refused, and what to do."""
    return (
        f"{path}: an adapter (LoRA or the like), which is no model by itself; farms compare MODEL FOLDER measures the "
        f"model that it was trained on with it, FOLDER that of PEFT with {ADAPTER_CONFIG}; of other tools, merge it "
        "into its model first"
    )


def _folder(path: str | Path) -> Path:
    """Return the folder of an adapter that is given by it, or by its file of factors."""
    path = expanded(path)
    return path.parent if path.stem == _ADAPTER else path


def _open_adapter(folder: Path) -> WeightSource:
    for suffix, reader in ((".safetensors", SafetensorsSource), (".bin", open_torch)):
        if (folder / f"{_ADAPTER}{suffix}").is_file():
            return reader(folder / f"{_ADAPTER}{suffix}")
    raise InputError(f"{folder / _ADAPTER}.safetensors: no such file; give the folder of a PEFT adapter")


class LoraSource(WeightSource):
    """A model with an adapter's changes: tensors that it changes are float32, all others as in the model."""

    def __init__(self, base: WeightSource, adapter: str | Path) -> None:
        """Match the folder of a PEFT adapter to the open model that it was trained on.

        Raises:
            InputError: The adapter is damaged, fits another model, or is one whose weights cannot be computed here.
        """
        path = _folder(adapter)
        self._base, self._config = base, read_config(path / ADAPTER_CONFIG)
        self._adapter = _open_adapter(path)
        self._changes = match(self._adapter, base, self._config)
        tensors = dict(base.tensors)
        tensors |= {name: self._adapter.tensors[own] for name, own in self._changes.replaced.items()}
        tensors |= {name: TensorInfo(_FLOAT32, tensors[name].shape) for name in self._changes.names}
        super().__init__(path, f"{base.name} + {path.resolve().name}", base.format, base.axes, tensors)
        self.skipped, self.stack = base.skipped, base.stack

    def _read(self, name: str) -> np.ndarray:
        changes = self._changes
        # An embedding that was given new tokens is both replaced and added to.
        own = changes.replaced.get(name)
        weight = self._base.read(name) if own is None else self._adapter.read(own)
        weight = weight.astype(self.tensors[name].dtype, copy=False)
        if name in changes.rows:
            own, rows = changes.rows[name]
            weight[rows] = self._adapter.read(own)
        if name in changes.biases:
            own, factors = changes.biases[name]
            weight += self._scale(factors) * self._adapter.read(own).astype(_FLOAT32)
        return self._merged(weight, changes.factors[name]) if name in changes.factors else weight

    def _scale(self, factors: Factors) -> np.float32:
        return np.float32(self._config.scale(factors.module, factors.rank))

    def _merged(self, weight: np.ndarray, factors: Factors) -> np.ndarray:
        """Return a layer's weight with its product."""
        a, b = (self._adapter.read(own).astype(_FLOAT32) for own in (factors.a, factors.b))
        scale = self._scale(factors)
        if factors.experts:
            a, b = a.reshape(factors.experts, factors.rank, -1), b.reshape(len(b), factors.rank, -1)
            return weight + scale * np.einsum("ore,eri->eio" if factors.is_transposed else "ore,eri->eoi", b, a)
        if self._config.start and np.isfinite(weight).all():
            weight = weight - _first_product(weight, factors.rank, scale, self._config.start)
        rows = weight.T if factors.is_transposed else weight.reshape(len(weight), -1)
        rows = rows + scale * (b.reshape(len(b), -1) @ a.reshape(len(a), -1))
        if factors.magnitude is not None:
            magnitudes = self._adapter.read(factors.magnitude).astype(_FLOAT32).reshape(-1, 1)
            lengths = np.linalg.norm(rows, axis=1, keepdims=True)
            rows *= np.divide(magnitudes, lengths, out=np.zeros_like(lengths), where=lengths > 0)
        return np.ascontiguousarray(rows.T) if factors.is_transposed else rows.reshape(weight.shape)


def _first_product(weight: np.ndarray, rank: int, scale: np.float32, start: str) -> np.ndarray:
    """Return scale * B A of the factors that a training starts with, of a weight's shape (R, C)."""
    if start == "olora":
        q, r = np.linalg.qr(weight)
        return scale * (q[:, :rank] @ r[:rank])
    # PiSSA: the largest singular values and their vectors, of which those of the shorter axis are enough.
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    size = tall.shape[1]
    gram = tall.T.astype(np.float64) @ tall.astype(np.float64)
    _, vectors = scipy.linalg.eigh(gram, subset_by_index=(max(size - rank, 0), size - 1))
    leading = (tall @ vectors @ vectors.T).astype(weight.dtype)
    return leading if tall is weight else leading.T
