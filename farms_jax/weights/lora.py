"""LoRA adapters (PEFT): a model's weights with the adapter's low-rank products added, tensor by tensor.

Hu et al. 2021: W + scale * B A, with scale = alpha / r; or alpha / sqrt(r), "rsLoRA" (Kalajdzievski 2023).
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from farms_jax.errors import InputError, printable, short_repr
from farms_jax.programs.files import expanded
from farms_jax.weights.conversion import Shape
from farms_jax.weights.reading import TensorInfo, read_json
from farms_jax.weights.safetensors_source import SafetensorsSource
from farms_jax.weights.source import WeightSource

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# A is (r, in, ...) and B (out, r, ...) for linear layers and kernels; (r, tokens) and (width, r) for embeddings.
_FACTORS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}
_MERGE = "merge it with PEFT first: model.merge_and_unload().save_pretrained(FOLDER), and give that folder"
_MODEL = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")  # as transformers calls it
_FLOAT32 = np.dtype(np.float32)
_LARGEST = float(np.finfo(_FLOAT32).max)


def is_lora(path: str | Path) -> bool:
    """Return whether a path is the folder of a PEFT adapter; a model with a config of one beside it is a model."""
    folder = expanded(path)
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    return not any(_MODEL.fullmatch(child.name) for child in folder.iterdir())


class LoraSource(WeightSource):
    """A model with an adapter's changes: tensors that it changes are float32, all others as in the model."""

    def __init__(self, base: WeightSource, adapter: str | Path) -> None:
        """Match the folder of a PEFT adapter to the open model that it was trained on."""
        path = expanded(adapter)
        self._base, self._config = base, read_json(path / ADAPTER_CONFIG, "give the folder of a PEFT adapter")
        self._alphas = _read_alphas(path / ADAPTER_CONFIG, self._config)
        if not (path / _ADAPTER).is_file():
            raise InputError(
                f"{path / _ADAPTER}: no such file; one in .bin is pickled and never loaded: load it with PEFT and "
                "save it again with save_pretrained(..., safe_serialization=True)"
            )
        self._adapter = SafetensorsSource(path / _ADAPTER)
        trained_on = printable(str(self._config.get("base_model_name_or_path")))
        self._remedy = f"give the model that it was trained on, as a Hugging Face folder ({trained_on})"
        self._factors: dict[str, dict[str, str]] = {}  # name in the model -> "A", "B" -> name in the adapter
        self._replaced: dict[str, str] = {}  # name in the model -> name in the adapter
        for name in self._adapter.tensors:
            self._place(name)
        for target, factors in self._factors.items():
            self._check(target, factors)
        changed = {*self._factors, *self._replaced}
        tensors = {
            name: TensorInfo(_FLOAT32, info.shape) if name in changed else info for name, info in base.tensors.items()
        }
        super().__init__(path, f"{base.name} + {path.resolve().name}", base.format, base.axes, tensors)
        self.skipped, self.stack = base.skipped, base.stack

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
        delta = delta.T if self._is_transposed(name) else delta.reshape(weight.shape)
        alpha = next(alpha for rule, alpha in self._alphas if rule.fullmatch(name.removesuffix(".weight")))
        scale = alpha / math.sqrt(len(a)) if self._config.get("use_rslora") else alpha / len(a)
        return weight.astype(_FLOAT32) + np.float32(scale) * delta

    def _place(self, name: str) -> None:
        """Find the tensor of the model that a tensor of the adapter replaces or adds to."""
        # PEFT wraps a layer, and keeps the original as the wrapper's "base_layer".
        module, factor = name.removeprefix(_PREFIX).replace(".base_layer.", "."), None
        for ending, part in _FACTORS.items():
            if module.endswith(f".{ending}"):
                module, factor = module.removesuffix(f".{ending}"), part
        if factor is not None:
            self._factors.setdefault(self._target(name, f"{module}.weight"), {})[factor] = name
            return
        if "lora_" in module:
            raise InputError(f"{self._adapter.path}: {name} is of a variant of LoRA that is not known; {_MERGE}")
        target = self._target(name, module)
        if self._adapter.tensors[name].shape != self._base.tensors[target].shape:
            raise self._misfit(name, target)
        self._replaced[target] = name

    def _target(self, name: str, wanted: str) -> str:
        """Find a tensor by name, or the only one whose name ends alike: models differ in what they call their root."""
        if wanted in self._base.tensors:
            return wanted
        alike = [n for n in self._base.tensors if n.endswith(f".{wanted}") or wanted.endswith(f".{n}")]
        if len(alike) != 1:
            raise InputError(
                f"{self._adapter.path}: {name} changes {wanted}, which {self._base.path} does not have; {self._remedy}"
            )
        return alike[0]

    def _check(self, target: str, factors: Mapping[str, str]) -> None:
        if set(factors) != {"A", "B"}:
            raise InputError(f"{self._adapter.path}: {target} has only one of A and B; save the adapter again")
        a, b = (self._adapter.tensors[factors[part]].shape for part in "AB")
        if not _fit(self._base.tensors[target].shape, a, b, transposed=self._is_transposed(target)):
            raise self._misfit(factors["A"], target)

    def _is_transposed(self, target: str) -> bool:
        """Return whether a weight is (in, out): embeddings are (tokens, width), and some models keep all layers so."""
        return bool(self._config.get("fan_in_fan_out")) or "embedding" in self._factors[target].get("A", "")

    def _misfit(self, name: str, target: str) -> InputError:
        found, has = self._adapter.tensors[name].shape, self._base.tensors[target].shape
        return InputError(
            f"{self._adapter.path}: {name} {found} does not fit {target} {has} of {self._base.path}; {self._remedy}"
        )


def _fit(shape: Shape, a: Shape, b: Shape, *, transposed: bool) -> bool:
    """Return whether factors A (rank, in, ...) and B (out, rank, ...) have the product of a weight's shape."""
    if min(len(shape), len(a), len(b)) < 2 or a[0] < 1 or math.prod(b[1:]) != a[0]:
        return False
    inputs, outputs = math.prod(a[1:]), b[0]
    return shape == (inputs, outputs) if transposed else (shape[0], math.prod(shape[1:])) == (outputs, inputs)


def _read_alphas(path: Path, config: Mapping[str, Any]) -> list[tuple[re.Pattern[str], float]]:
    """Return patterns of module names with their alpha, of which the first that fits counts; the last fits all.

    Raises:
        InputError: The adapter is of another kind than LoRA, or the patterns are damaged.
    """
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{path}: an adapter of the kind {printable(str(config.get('peft_type')))}, only LORA is known; {_MERGE}"
        )
    if config.get("use_dora"):
        raise InputError(f"{path}: DoRA rescales rows besides, which is not known here; {_MERGE}")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{path}: alpha_pattern {short_repr(patterns)} is no table; save the adapter again")
    alphas = []
    for pattern, alpha in [*patterns.items(), (".*", config.get("lora_alpha"))]:
        try:
            # PEFT's rule: a key matches the end of a module's name, after a dot.
            rule = re.compile(rf"(.*\.)?({pattern})")
        except (re.error, OverflowError, RecursionError):
            rule = None
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool) and abs(alpha) <= _LARGEST
        if rule is None or not is_number:
            raise InputError(
                f"{path}: lora_alpha or alpha_pattern has {short_repr(pattern)}: {short_repr(alpha)}; save the "
                "adapter again"
            )
        alphas.append((rule, alpha))
    return alphas
