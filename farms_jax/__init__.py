"""Heavy-tailed weight spectra without aspect-ratio bias (FARMS), and the decisions they steer.

`analyze` measures every layer of a network; `lr_scale` and `tempbalance` turn the measure into learning rates.
"""

from farms_jax._analyze import analyze as analyze
from farms_jax._matrices import FLAX_AXES as FLAX_AXES, TORCH_AXES as TORCH_AXES, Axes as Axes
from farms_jax._report import LayerReport as LayerReport
from farms_jax._tail import Tail as Tail, TailFit as TailFit, fit_tail as fit_tail
from farms_jax._windows import Window as Window

__version__ = "0.1.0"
