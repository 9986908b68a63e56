"""measure_scale(): from parameters to factors in one call, and the settings that the transforms pass on to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict, TypeVar, Unpack

from jax.sharding import Mesh

from farms_jax import mappings
from farms_jax._analyze import analyze
from farms_jax._lr_scale import Fixed, MappingName, lr_scale
from farms_jax._names import Follow
from farms_jax._tail import Tail
from farms_jax._windows import Window
from farms_jax.solvers.dispatch import Solver

F = TypeVar("F", bound=Callable[..., Any])


class Settings(TypedDict, total=False):
    """Settings that a transform passes on to `analyze` and `lr_scale`."""

    window: Window | None
    tail: Tail
    axes: Any
    stack: Any
    exclude: str | Iterable[str]
    kernel_scale: float
    solver: Solver
    max_batch_bytes: int
    mesh: Mesh | None
    low: float
    high: float
    mapping: MappingName | mappings.Mapping
    metric: str
    follow: Follow | None
    range_quantiles: tuple[float, float] | None
    fixed: Fixed | None


_LR_SCALE_SETTINGS = ("low", "high", "mapping", "metric", "follow", "range_quantiles", "fixed")


def measure_scale(params: Any, **settings: Unpack[Settings]) -> Any:
    """Analyse the parameters and map the result to factors: `lr_scale(analyze(params, ...), params, ...)`.

    Args:
        params: the parameters.
        **settings: arguments of `analyze` and of `lr_scale`.

    Returns:
        A tree like `params` of float32 factors, see `lr_scale`.
    """
    analysis: dict[str, Any] = dict(settings)
    scale = {key: analysis.pop(key) for key in _LR_SCALE_SETTINGS if key in analysis}
    return lr_scale(analyze(params, **analysis), params, **scale)


def lists_settings(transform: F) -> F:
    """Return a transform whose signature lists the settings one by one, in place of `**settings`."""
    # `optax.inject_hyperparams` goes by the signature, and makes state of every number that it finds there: hence
    # `None` for the defaults of `analyze` and `lr_scale`.
    signature = inspect.signature(transform)
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    defaults = dict.fromkeys(Settings.__annotations__) | {"window": Window()}
    listed = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=value) for key, value in defaults.items()]

    transform.__signature__ = signature.replace(parameters=[*own, *listed])  # pyright: ignore[reportFunctionMemberAccess]
    return transform


def chosen(caller: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are not the default.

    Raises:
        TypeError: an unknown setting.
    """
    if unknown := sorted(set(settings) - set(Settings.__annotations__)):
        raise TypeError(f"{caller}: unknown setting {unknown[0]!r}; known are {', '.join(Settings.__annotations__)}")
    given = {key: value for key, value in settings.items() if key == "window" or value is not None}
    if given.get("window", False) == Window():
        del given["window"]
    return given
