"""What a diagnosis measures, and how finely."""

import dataclasses

from farms_jax._tail import Tail
from farms_jax._windows import Window


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a diagnosis.

    Attributes:
        window: windows of FARMS; `None` takes whole matrices in their place.
        tail: where the power-law tail starts, for `alpha` and `whole_alpha`; WeightWatcher's `ww_alpha` has its own
            rule.
        kernel_scale: factor on the eigenvalues of 4-D kernels; 0.5 as in the reference and in WeightWatcher.
        whole: measure whole matrices too; without it only the columns of the windows are there.
        randomize: shuffle each matrix and measure it again: `rand_distance` and its companions. Needs `whole`.
        resamples: draws from which intervals and rank flips are computed; 0 computes none.
        level: level of the confidence intervals, in (0, 1).
        tolerance: adaptive windows: stop adding them when the interval of alpha is within +- this. `None` takes all.
        seed: seed of shuffles and resamples; a layer's draws depend on it and on the layer's name alone.
        max_batch_bytes: bound on the bytes of windows and Gram matrices alive at once.

    Raises:
        ValueError: a value out of its range.
    """

    window: Window | None = Window()
    tail: Tail = Tail()
    kernel_scale: float = 0.5
    whole: bool = True
    randomize: bool = True
    resamples: int = 200
    level: float = 0.95
    tolerance: float | None = None
    seed: int = 0
    max_batch_bytes: int = 2**28

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.resamples < 0:
            raise ValueError(f"Settings: resamples must be at least 0, got {self.resamples}")
        if not 0 < self.level < 1:
            raise ValueError(f"Settings: level must be in (0, 1), got {self.level}")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"Settings: tolerance must be above 0, got {self.tolerance}")
        if self.tolerance is not None and self.resamples == 0:
            raise ValueError("Settings: tolerance needs resamples; give at least 20, or no tolerance")
