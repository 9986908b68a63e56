"""Heavy-tailed weight spectra without aspect-ratio bias (FARMS), and the decisions they steer.

`analyze` measures every layer of a network; `lr_scale` turns the measure into learning-rate factors, and
`tempbalance` applies them as an optax transform.
"""

from farms_jax import mappings as mappings
from farms_jax._analyze import analyze as analyze
from farms_jax._lr_scale import lr_scale as lr_scale
from farms_jax._matrices import FLAX_AXES as FLAX_AXES, TORCH_AXES as TORCH_AXES, Axes as Axes
from farms_jax._names import (
    follow_order as follow_order,
    named_leaves as named_leaves,
    natural_key as natural_key,
)
from farms_jax._report import LayerReport as LayerReport
from farms_jax._tail import Tail as Tail, TailFit as TailFit, fit_tail as fit_tail
from farms_jax._tempbalance import (
    TempBalanceState as TempBalanceState,
    measure_scale as measure_scale,
    refresh as refresh,
    tempbalance as tempbalance,
)
from farms_jax._windows import Window as Window

__version__ = "0.1.0"
