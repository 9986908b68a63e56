"""Which tensors of a model the tensors of a LoRA adapter change, by their names and shapes."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from farms_jax.errors import InputError
from farms_jax.weights.adapter_config import MERGE, AdapterConfig
from farms_jax.weights.conversion import Shape
from farms_jax.weights.source import WeightSource
from farms_jax.weights.wrappers import unwrapped

_PREFIX = re.compile(r"(module\.)?base_model\.model\.")
# PEFT wraps a layer, and keeps the original as the wrapper's "base_layer"; a layer saved whole as "modules_to_save".
_INSIDE = re.compile(r"\.(base_layer|modules_to_save)(?=\.|$)")
# A is (r, in, ...) and B (out, r, ...) for linear layers and kernels; (r, tokens) and (width, r) for embeddings.
_PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "rows",
}


class Factors(NamedTuple):
    """Names of a layer's factors in the adapter, and how their product lies in the layer's weight."""

    a: str
    b: str
    magnitude: str | None
    module: str  # by which alpha is looked up
    rank: int
    is_transposed: bool | None  # whether a matrix is (in, out); None: its shape does not tell
    experts: int = 0  # matrices along the first axis; 0: the weight is one layer


@dataclasses.dataclass
class Changes:
    """Changes of a model, each by the name of the tensor in the model."""

    replaced: dict[str, str] = dataclasses.field(default_factory=dict)  # by this tensor of the adapter
    rows: dict[str, tuple[str, list[int]]] = dataclasses.field(default_factory=dict)  # these rows are replaced by it
    biases: dict[str, tuple[str, Factors]] = dataclasses.field(default_factory=dict)  # it is added, scaled as factors
    factors: dict[str, Factors] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """The names of all tensors that are changed, or new."""
        return {*self.replaced, *self.rows, *self.biases, *self.factors}


def match(adapter: WeightSource, base: WeightSource, config: AdapterConfig) -> Changes:
    """Return what the tensors of an adapter change in the model that it was trained on.

    Raises:
        InputError: A tensor has no place in the model or does not fit, or is of a variant that is not known.
    """
    return _Matcher(adapter, base, config).changes


class _Matcher:
    def __init__(self, adapter: WeightSource, base: WeightSource, config: AdapterConfig) -> None:
        self._adapter, self._base, self._config = adapter, base, config
        self._names = {unwrapped(name): name for name in base.tensors}
        self.changes = Changes()
        modules: dict[str, dict[str, str]] = {}
        for name in adapter.tensors:
            module = _PREFIX.sub("", unwrapped(name), count=1)
            ending = next((ending for ending in _PARTS if module.endswith(f".{ending}")), None)
            if ending is not None:
                modules.setdefault(module.removesuffix(f".{ending}"), {})[_PARTS[ending]] = name
            elif "lora_" in module or "trainable_tokens" in module:
                raise InputError(f"{adapter.path}: {name} is of a variant of LoRA that is not known; {MERGE}")
            else:
                self._replace(_INSIDE.sub("", module), name)
        for module, parts in modules.items():
            self._change(_INSIDE.sub("", module), parts)
        self._settle()

    def _replace(self, wanted: str, name: str) -> None:
        """Place a tensor that takes the place of one in the model, or is new there: the head for another task."""
        target = self._find(wanted)
        if target is None and any(part in self._config.saved for part in wanted.split(".")):
            target = wanted
        elif target is None:
            raise self._missing(name, wanted)
        else:
            found, has = self._adapter.tensors[name].shape, self._base.tensors[target].shape
            # A vocabulary may have grown.
            if found != has and (len(has) != 2 or found[1:] != has[1:]):
                raise self._misfit(name, target)
        self.changes.replaced[target] = name

    def _change(self, module: str, parts: Mapping[str, str]) -> None:
        if "rows" in parts:
            self._place_rows(module, parts["rows"])
            return
        if not {"A", "B"} <= parts.keys():
            raise InputError(f"{self._adapter.path}: {module} has only one of A and B; save the adapter again")
        if self._config.is_dora and "magnitude" not in parts:
            raise InputError(f"{self._adapter.path}: it has no lengths (DoRA) of {module}; save the adapter again")
        target, factors = self._factors(module, parts)
        if target in self.changes.factors:
            raise InputError(f"{self._adapter.path}: two of its layers may change {target}; {MERGE}")
        self.changes.factors[target] = factors
        if "bias" in parts:
            name = parts["bias"]
            bias = self._found(name, f"{module}.bias")
            if self._adapter.tensors[name].shape != self._shape(bias):
                raise self._misfit(name, bias)
            self.changes.biases[bias] = name, factors

    def _place_rows(self, module: str, name: str) -> None:
        target, rows = self._found(name, f"{module}.weight"), self._config.rows(module)
        found, has = self._adapter.tensors[name].shape, self._shape(target)
        if rows is None or len(has) != 2 or found != (len(rows), has[1]) or max(rows, default=0) >= has[0]:
            raise self._misfit(name, target)
        self.changes.rows[target] = name, rows

    def _factors(self, module: str, parts: Mapping[str, str]) -> tuple[str, Factors]:
        """Find the tensor whose shape is that of a layer's product."""
        if parameters := self._parameters(module):
            fitting = [place for name in parameters if (place := self._fit(name, name, parts)) is not None]
            if len(fitting) == 1:
                return fitting[0]
            raise InputError(
                f"{self._adapter.path}: {parts['A']} fits {len(fitting)} of {', '.join(parameters)}, which it may "
                f"change; {self._remedy}"
            )
        target = self._find(f"{module}.in_proj_weight") or self._found(parts["A"], f"{module}.weight")
        place = self._fit(target, module, parts)
        if place is None:
            raise self._misfit(parts["A"], target)
        return place

    def _parameters(self, module: str) -> list[str]:
        """Return the tensors of a module that the config names by themselves."""
        wanted = {
            f"{module}.{end}"
            for parameter in self._config.parameters
            for owner, _, end in [parameter.rpartition(".")]
            if f".{module}".endswith(f".{owner}" if owner else "")
        }
        return [name for name in map(self._find, sorted(wanted)) if name is not None]

    def _fit(self, target: str, module: str, parts: Mapping[str, str]) -> tuple[str, Factors] | None:
        """Return how the factors lie in a tensor; `None` where their product is of another shape."""
        a, b = (self._adapter.tensors[parts[part]].shape for part in "AB")
        shape, magnitude = self._shape(target), parts.get("magnitude")
        is_stack = len(shape) == 3 and len(a) == 2
        experts = shape[0] if is_stack else 1
        if min(len(shape), len(a), len(b)) < 2 or a[0] < 1 or math.prod(b[1:]) != a[0] or a[0] % experts:
            return None
        inputs, outputs = math.prod(a[1:]), b[0]
        if magnitude and math.prod(self._adapter.tensors[magnitude].shape) != outputs:
            return None
        rows, cols = shape[1:] if is_stack else (shape[0], math.prod(shape[1:]))
        is_embedding = "embedding" in parts["A"]
        sides = [False] * ((rows, cols) == (outputs, inputs) and not is_embedding)
        sides += [True] * ((rows, cols) == (inputs, outputs) and len(shape) == 2 + is_stack)
        if not sides:
            return None
        if self._config.start and (is_stack or is_embedding or len(shape) > 2):
            raise InputError(
                f"{self._adapter.path}: {self._config.start} of {target}, which is no linear layer; {MERGE}"
            )
        side = sides[0] if len(sides) == 1 else None
        rank, count = a[0] // experts, experts if is_stack else 0
        return target, Factors(parts["A"], parts["B"], magnitude, module, rank, side, count)

    def _settle(self) -> None:
        """Give square matrices the side that others have: PEFT's `fan_in_fan_out` is that of the last layer alone."""
        factors = self.changes.factors
        for target, one in factors.items():
            if one.is_transposed is None:
                like = {other.is_transposed for other in factors.values() if self._are_alike(one, other)} - {None}
                if one.experts and len(like) != 1:
                    raise InputError(
                        f"{self._adapter.path}: it does not tell which axis of {target} has the inputs; {MERGE}"
                    )
                side = True in like if like else self._config.is_transposed
                factors[target] = one._replace(is_transposed=side)

    @staticmethod
    def _are_alike(one: Factors, other: Factors) -> bool:
        return "embedding" not in other.a and bool(one.experts) == bool(other.experts)

    def _shape(self, target: str) -> Shape:
        replaced = self.changes.replaced.get(target)
        return self._base.tensors[target].shape if replaced is None else self._adapter.tensors[replaced].shape

    def _find(self, wanted: str) -> str | None:
        """Find a tensor by name, or the only one whose name ends alike: models differ in what they call their root."""
        if wanted in self._names:
            return self._names[wanted]
        alike = [n for n in self._names if n.endswith(f".{wanted}") or wanted.endswith(f".{n}")]
        return self._names[alike[0]] if len(alike) == 1 else None

    def _found(self, name: str, wanted: str) -> str:
        target = self._find(wanted)
        if target is None and wanted in self.changes.replaced:
            return wanted
        if target is None:
            raise self._missing(name, wanted)
        return target

    @property
    def _remedy(self) -> str:
        return (
            f"give the model that it was trained on, as a Hugging Face folder ({self._config.trained_on}), or {MERGE}"
        )

    def _missing(self, name: str, wanted: str) -> InputError:
        if self._config.parameters and ".lora_" in name:
            wanted = f"arrays of {wanted.removesuffix('.weight')}"
        return InputError(
            f"{self._adapter.path}: {name} changes {wanted}, which {self._base.path} does not have; {self._remedy}"
        )

    def _misfit(self, name: str, target: str) -> InputError:
        found, has = self._adapter.tensors[name].shape, self._shape(target)
        return InputError(
            f"{self._adapter.path}: {name} {found} does not fit {target} {has} of {self._base.path}; {self._remedy}"
        )
