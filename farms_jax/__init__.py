"""Heavy-tailed weight spectra without aspect-ratio bias (FARMS), and the decisions they steer.

`analyze` measures every layer of a network; `diagnose` says how each is, and how sure that is. `lr_scale` turns the
measure into learning-rate factors, which `tempbalance` applies as an optax transform; `allocate_sparsity` turns it into
the sparsity of each layer.
"""

from farms_jax import axis_rules as axis_rules, mappings as mappings, multihost as multihost
from farms_jax._alphadecay import AlphaDecayState as AlphaDecayState, alphadecay as alphadecay
from farms_jax._analyze import analyze as analyze
from farms_jax._axes import FLAX_AXES as FLAX_AXES, TORCH_AXES as TORCH_AXES, Axes as Axes
from farms_jax._axis_rules import AxisRules as AxisRules
from farms_jax._factors import TempBalanceState as TempBalanceState, refresh as refresh
from farms_jax._htmuon import HTMuonState as HTMuonState, scale_by_htmuon as scale_by_htmuon
from farms_jax._lr_scale import lr_scale as lr_scale
from farms_jax._measure import measure_scale as measure_scale
from farms_jax._names import (
    block_of as block_of,
    follow_order as follow_order,
    named_leaves as named_leaves,
    natural_key as natural_key,
)
from farms_jax._report import LayerReport as LayerReport
from farms_jax._sparsity import allocate_sparsity as allocate_sparsity, round_to_groups as round_to_groups
from farms_jax._tail import Tail as Tail, TailFit as TailFit, fit_tail as fit_tail
from farms_jax._tempbalance import llr as llr, tempbalance as tempbalance
from farms_jax._windows import Window as Window
from farms_jax.diagnosis import (
    Comparison as Comparison,
    Diagnosis as Diagnosis,
    compare as compare,
    diagnose as diagnose,
)
from farms_jax.programs import files as files
from farms_jax.weights import WeightSource as WeightSource, open_weights as open_weights

__version__ = "0.1.0"
