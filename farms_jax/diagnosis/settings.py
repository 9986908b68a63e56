"""What a diagnosis measures, and how finely."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Self

from farms_jax._tail import Tail
from farms_jax._windows import Window
from farms_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """What is measured beside alpha, and how certain it is: the same settings in Python and on the command line."""

    whole: bool = True
    """Measure whole matrices too: WeightWatcher's measures and the aspect-ratio bias."""
    randomize: bool = True
    """Shuffle each matrix and measure it again, for the distance from noise; needs `whole`."""
    alternatives: bool = False
    """Fit more to the tail of the whole matrix: without fingers, truncated, exponential, lognormal; needs `whole`."""
    bootstrap: int = 0
    """Samples of the goodness-of-fit p-value of WeightWatcher's power law, each a fit: 100 know it to within 0.05, 2500
    to within 0.01; 0 for none; needs `whole`."""
    resamples: int = 200
    """Resamples of the windows for intervals and rank flips; 0 for none."""
    level: float = 0.95
    """Level of the confidence intervals, in (0, 1)."""
    tolerance: float | None = None
    """Adaptive windows: stop adding them when alpha's interval is within +- this; without it, take all."""
    seed: int = 0
    """Seed of shuffles and resamples; a layer's draws depend on it and on the layer's name alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(CommonSettings):
    """Settings of a diagnosis.

    Raises:
        ValueError: a value out of its range.
    """

    window: Window | None = Window()
    """Windows of FARMS; `None` takes whole matrices in their place."""
    tail: Tail = Tail()
    """Where the power-law tail starts, for `alpha` and `whole_alpha`; WeightWatcher's `ww_alpha` has its own rule."""
    kernel_scale: float = 0.5
    """Factor on the eigenvalues of 4-D kernels; 0.5 as in the reference and in WeightWatcher."""
    max_batch_bytes: int = 2**28
    """Bound on the bytes of windows and Gram matrices alive at once."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.resamples < 0:
            raise ValueError(f"Settings: resamples must be at least 0, got {self.resamples}")
        if self.bootstrap < 0:
            raise ValueError(f"Settings: bootstrap must be at least 0, got {self.bootstrap}")
        if (self.alternatives or self.bootstrap) and not self.whole:
            raise ValueError("Settings: alternatives and bootstrap are of whole matrices; leave whole on")
        if not 0 < self.level < 1:
            raise ValueError(f"Settings: level must be in (0, 1), got {self.level}")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"Settings: tolerance must be above 0, got {self.tolerance}")
        if self.tolerance is not None and self.resamples == 0:
            raise ValueError("Settings: tolerance needs resamples; give at least 20, or no tolerance")

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the settings of a written diagnosis, which has other entries too.

        Raises:
            InputError: they are those of another version, or damaged.
        """
        try:
            fields = {field.name: content[field.name] for field in dataclasses.fields(cls)}
            window, tail = fields["window"], Tail(**fields["tail"])
            return cls(**fields | {"window": None if window is None else Window(**window), "tail": tail})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("its settings are damaged, or of another version; measure it again") from error

    def differences(self, other: Self) -> dict[str, str]:
        """Return field -> the values of both, of those that differ and can change a result.

        >>> Settings(seed=1).differences(Settings(tail=Tail("ks")))
        {'seed': 'seed 1 and 0', 'tail': 'tail xmin median and ks'}
        """
        pairs = ((name, value, getattr(other, name)) for name, value in vars(self).items() if name != _BOUND)
        return {name: ", ".join(_unlike(name, *values)) for name, *values in pairs if values[0] != values[1]}


_BOUND = "max_batch_bytes"


def _unlike(name: str, first: Any, second: Any) -> Iterator[str]:
    """Yield the entries of two settings that differ."""
    if dataclasses.is_dataclass(first) and dataclasses.is_dataclass(second):
        for part, value in vars(first).items():
            if value != getattr(second, part):
                yield f"{name} {part} {value} and {getattr(second, part)}"
    else:
        yield f"{name} {first} and {second}"
