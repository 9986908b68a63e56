"""LoRA adapters (PEFT): a model's weights with the adapter's low-rank products added, tensor by tensor.

Hu et al. 2021: W + scale * B A, with scale = alpha / r; or alpha / sqrt(r), "rsLoRA" (Kalajdzievski 2023).
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from farms_jax.errors import InputError
from farms_jax.weights.reading import TensorInfo, read_json
from farms_jax.weights.safetensors_source import open_safetensors
from farms_jax.weights.sanitise import printable, short_repr
from farms_jax.weights.source import WeightSource

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Factors: of linear layers and kernels (r, in, ...) and (out, r, ...); of embeddings (r, tokens) and (width, r).
_FACTORS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}
_MERGE = "merge it with PEFT first: model.merge_and_unload().save_pretrained(FOLDER), and give that folder"
_FLOAT32 = np.dtype(np.float32)
_LARGEST = float(np.finfo(_FLOAT32).max)


def is_lora(path: str | Path) -> bool:
    """Return whether a path is a folder with a LoRA adapter of PEFT."""
    return (Path(path).expanduser() / ADAPTER_CONFIG).is_file()


class LoraSource(WeightSource):
    """A model with an adapter's changes; tensors that it changes are float32, all others as the model has them."""

    def __init__(self, base: WeightSource, path: Path) -> None:
        """Match an adapter to a model.

        Args:
            base: The model that the adapter was trained on, open.
            path: Folder of the adapter.

        Raises:
            InputError: The adapter is of another kind, damaged, or does not fit the model.
        """
        self._base, self._config = base, read_json(path / ADAPTER_CONFIG, "give the folder of a PEFT adapter")
        _check_kind(path, self._config)
        if not (path / _ADAPTER).is_file():
            raise InputError(
                f"{path / _ADAPTER}: no such file; one in .bin is pickled and never loaded: load it with PEFT and "
                "save it again with save_pretrained(..., safe_serialization=True)"
            )
        self._adapter = open_safetensors(path / _ADAPTER)
        self._factors: dict[str, dict[str, str]] = {}
        self._replaced: dict[str, str] = {}
        for name in self._adapter.tensors:
            self._place(name)
        for target, factors in self._factors.items():
            self._check(target, factors)
        changed = dict.fromkeys([*self._factors, *self._replaced])
        tensors = {
            name: TensorInfo(_FLOAT32, info.shape) if name in changed else info for name, info in base.tensors.items()
        }
        super().__init__(path, f"{base.name} + {path.resolve().name}", base.format, base.axes, tensors)
        self.skipped = base.skipped

    def close(self) -> None:
        """Close the model."""
        self._base.close()

    def _read(self, name: str) -> np.ndarray:
        if name in self._replaced:
            weight = self._adapter.read(self._replaced[name]).astype(_FLOAT32)
        else:
            weight = self._base.read(name)
        # An embedding that was given new tokens is both replaced and added to.
        if name not in self._factors:
            return weight
        a, b = (self._adapter.read(self._factors[name][part]).astype(_FLOAT32) for part in "AB")
        delta = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
        # Embeddings are (tokens, width), and some models keep linear layers as (in, out).
        delta = delta.reshape(weight.shape) if self._is_upright(name) else delta.T
        return weight.astype(_FLOAT32) + np.float32(self._scale(name, len(a))) * delta

    def _place(self, name: str) -> None:
        """Find what a tensor of the adapter changes."""
        # PEFT keeps a layer that it wraps as that one's base layer.
        module, factor = name.removeprefix(_PREFIX).replace(".base_layer.", "."), None
        for ending, part in _FACTORS.items():
            if module.endswith(f".{ending}"):
                module, factor = module.removesuffix(f".{ending}"), part
        if factor is None and "lora_" in module:
            raise InputError(f"{self._adapter.path}: {name} is of a variant of LoRA that is not known; {_MERGE}")
        target = self._target(name, f"{module}.weight" if factor else module)
        if factor is None:
            if self._adapter.tensors[name].shape != self._base.tensors[target].shape:
                raise self._misfit(name, target)
            self._replaced[target] = name
        else:
            self._factors.setdefault(target, {})[factor] = name

    def _target(self, name: str, wanted: str) -> str:
        """Find a tensor by name, or the only one whose name ends alike: models differ in what they call their root."""
        if wanted in self._base.tensors:
            return wanted
        alike = [n for n in self._base.tensors if n.endswith(f".{wanted}") or wanted.endswith(f".{n}")]
        if len(alike) != 1:
            raise InputError(
                f"{self._adapter.path}: {name} changes {wanted}, which {self._base.path} does not have; give the model "
                f"that it was trained on, as a Hugging Face folder ({self._trained_on})"
            )
        return alike[0]

    def _check(self, target: str, factors: Mapping[str, str]) -> None:
        if set(factors) != {"A", "B"}:
            raise InputError(f"{self._adapter.path}: {target} has only one of A and B; save the adapter again")
        a, b = (self._adapter.tensors[factors[part]].shape for part in "AB")
        shape = self._base.tensors[target].shape
        wanted = (shape[:1], math.prod(shape[1:])) if self._is_upright(target) else (shape[1:], math.prod(shape[:1]))
        rank = math.prod(a[:1])
        if min(len(shape), len(a), len(b)) < 2 or rank < 1:
            raise self._misfit(factors["A"], target)
        if math.prod(b[1:]) != rank or (b[:1], math.prod(a[1:])) != wanted:
            raise self._misfit(factors["A"], target)

    def _is_upright(self, target: str) -> bool:
        return not (self._config.get("fan_in_fan_out") or "embedding" in self._factors[target].get("A", ""))

    @property
    def _trained_on(self) -> str:
        return printable(str(self._config.get("base_model_name_or_path")))

    def _misfit(self, name: str, target: str) -> InputError:
        found, has = self._adapter.tensors[name].shape, self._base.tensors[target].shape
        return InputError(
            f"{self._adapter.path}: {name} {found} does not fit {target} {has} of {self._base.path}; give the model "
            f"that it was trained on ({self._trained_on})"
        )

    def _scale(self, target: str, rank: int) -> float:
        module = target.removesuffix(".weight")
        alpha = self._config["lora_alpha"]
        for pattern, value in (self._config.get("alpha_pattern") or {}).items():
            if re.fullmatch(_at_the_end(pattern), module):
                alpha = value
                break
        return alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank


def open_lora(base: WeightSource, adapter: str | Path) -> LoraSource:
    """Open a model with a LoRA adapter added.

    Args:
        base: The model that the adapter was trained on, open; closed with the result.
        adapter: PEFT's folder, with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The weights of the model, changed where the adapter changes them.

    Raises:
        InputError: The adapter is of another kind, damaged, or does not fit the model.
    """
    return LoraSource(base, Path(adapter).expanduser())


def _check_kind(path: Path, config: Mapping[str, Any]) -> None:
    where = path / ADAPTER_CONFIG
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{where}: an adapter of the kind {printable(str(config.get('peft_type')))}, only LORA is known; {_MERGE}"
        )
    if config.get("use_dora"):
        raise InputError(f"{where}: DoRA rescales rows besides, which is not known here; {_MERGE}")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{where}: alpha_pattern {short_repr(patterns)} is no table; save the adapter again")
    for pattern, alpha in {"": config.get("lora_alpha"), **patterns}.items():
        if not _is_number(alpha) or not _is_pattern(pattern):
            raise InputError(
                f"{where}: lora_alpha or alpha_pattern has {short_repr(pattern)}: {short_repr(alpha)}; save the "
                "adapter again"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_pattern(text: str) -> bool:
    try:
        re.compile(_at_the_end(text))
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _at_the_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})"
