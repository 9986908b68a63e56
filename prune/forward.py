"""The forward pass block by block: the weights of a network are never in memory together.

One pass serves perplexity (blocks only compute), the scores of OWL and DLP (statistics of every layer's input over the
calibration sequences) and pruning (these statistics, and the block is changed before its outputs are computed).
"""

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from farms_jax.errors import InputError
from farms_jax.programs.files import reserve

from .models import Network, Part, State

TOKENS = 2048  # in one call: more is no faster on CPU
_BANDS = 4  # of rows, in a symmetric product: 5/8 of its work; eight would save little more, 9/16

Tensors = dict[str, np.ndarray]
Read = Callable[[str], np.ndarray]  # one tensor, by its name in the checkpoint
Statistic = Literal["squares", "hessian"]
Statistics = dict[str, Array]
Visit = Callable[[int, Tensors, Statistics], Tensors | None]


class NotFiniteError(InputError):
    """A network gives NaN or Inf, or a loss that has no perplexity: there is no result."""

    def __init__(self, what: str) -> None:
        """Say what is not finite; the remedy is always the same."""
        super().__init__(
            f"{what}; the weights are damaged, or too large for float32, in which networks are computed: get the "
            "checkpoint again, and check it with prune.evaluate; where it was pruned, remove less, or choose another "
            "--method"
        )


# Jitted, with the network static: networks of equal configs share what is compiled.
apply_embed = jax.jit(Network.embed, static_argnums=0)
apply_block = jax.jit(Network.block, static_argnums=0)


class Activations:
    """N sequences of hidden states, (N, T, D) float32, read and written in slices along N."""

    def __init__(self, shape: tuple[int, int, int], spill: Path | None = None) -> None:
        """Reserve memory, or a file in the folder `spill` that is gone when the program ends."""
        self.shape = shape
        self._row = 4 * shape[1] * shape[2]
        self._file = None
        if spill is None:
            self._array = np.empty(shape, np.float32)
            return
        try:
            spill.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=spill)  # noqa: SIM115 (lives as long as this object)
            reserve(self._file.fileno(), max(self._row * shape[0], 1))
        except OSError as error:
            gib = self._row * shape[0] / 2**30
            raise InputError(
                f"--spill {spill}: no room for {gib:.1f} GiB of activations ({error.strerror}); "
                "free space, name another folder, or take fewer --samples"
            ) from error

    def __len__(self) -> int:
        """Return N."""
        return self.shape[0]

    def read(self, rows: slice) -> np.ndarray:
        """Return the sequences of a slice, (rows, T, D)."""
        if self._file is None:
            return self._array[rows]
        out = np.empty((rows.stop - rows.start, *self.shape[1:]), np.float32)
        self._file.seek(rows.start * self._row)
        self._file.readinto(out.reshape(-1).view(np.uint8).data)
        return out

    def write(self, rows: slice, values: np.ndarray) -> None:
        """Replace the sequences of a slice by `values`, (rows, T, D)."""
        if self._file is None:
            self._array[rows] = values
            return
        self._file.seek(rows.start * self._row)
        self._file.write(np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8).data)


def embed(network: Network, read: Read, ids: np.ndarray, spill: Path | None = None) -> Activations:
    """Return the inputs of the first block, (N, T, D), for tokens (N, T)."""
    state = network.to_state("embed", read_part(network, "embed", read))
    activations = Activations((*ids.shape, network.hidden_size), spill)
    for rows in batches(len(ids), ids.shape[1], "embed"):
        activations.write(rows, np.asarray(apply_embed(network, state, jnp.asarray(ids[rows], jnp.int32))))
    return activations


def run_blocks(
    network: Network,
    read: Read,
    activations: Activations,
    *,
    title: str,
    visit: Visit | None = None,
    statistic: Statistic | None = None,
    calibration: int = 0,
    first: int = 0,
) -> None:
    """Take activations through all blocks, in place: inputs of the first become outputs of the last.

    `visit` is called from block `first` on with each block's number, tensors and statistics; the block's outputs are
    computed with the tensors that it returns, if any. `statistic` says which, see `_statistics`; they are of the block
    as it was read, over the first `calibration` sequences.

    Raises:
        NotFiniteError: the outputs of a block are.
    """
    with tqdm(range(network.num_blocks), desc=title, unit="block") as bar:
        for block in bar:
            tensors = read_part(network, block, read)
            state = network.to_state(block, tensors)
            if visit is not None and block >= first:
                statistics = {}
                if statistic:
                    statistics = _statistics(network, block, state, activations, calibration, statistic)
                changed = visit(block, tensors, statistics)
                if changed is not None:
                    state = network.to_state(block, changed)
            for rows in batches(len(activations), activations.shape[1], f"block {block}"):
                outputs = np.asarray(apply_block(network, state, activations.read(rows)))
                if not np.isfinite(outputs).all():
                    raise NotFiniteError(f"{title}: the outputs of block {block} are not finite")
                activations.write(rows, outputs)


def batches(count: int, length: int, title: str) -> Iterator[slice]:
    """Yield slices of sequences to compute at once, from 0 to `count`, under a bar that only a terminal shows."""
    size = max(1, TOKENS // length)
    with tqdm(total=count, desc=title, unit="sample", leave=False, disable=None) as bar:
        for at in range(0, count, size):
            rows = slice(at, min(at + size, count))
            yield rows
            bar.update(rows.stop - rows.start)


def read_part(network: Network, part: Part, read: Read) -> Tensors:
    """Return the tensors of a part by name."""
    return {name: read(name) for name in network.tensors(part)}


def weights_of(network: Network, block: int, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the weights (out, in) of a block's linears by layer name, in the reference's order."""
    names = [network.layer_name(block, linear) for linear in network.linears]
    return {name: tensors[f"{name}.weight"] for name in names}


def _statistics(
    network: Network, block: int, state: State, activations: Activations, count: int, statistic: Statistic
) -> Statistics:
    """Return a statistic of the input of every linear of a block, by layer, in float32.

    `activations` are the block's inputs, of which the first `count` sequences are taken. `"squares"` is the mean over
    sequences of the sum over tokens of x^2, (in,); `"hessian"` is 2 / sequences * sum of x x^T, (in, in). Linears that
    share an input share the array.
    """
    shapes = network.layer_shapes()
    sizes = [shapes[network.layer_name(block, group[0])][1] for group in network.input_groups]
    sums = [jnp.zeros((size,) if statistic == "squares" else (size, size), jnp.float32) for size in sizes]
    for rows in batches(count, activations.shape[1], f"block {block}, statistics"):
        sums = _accumulate(network, statistic, state, activations.read(rows), sums)
    if statistic == "hessian":
        sums = [_symmetric(total) for total in sums]
    scale = (1 if statistic == "squares" else 2) / count
    return {
        network.layer_name(block, linear): total * scale
        for group, total in zip(network.input_groups, sums, strict=True)
        for linear in group
    }


# The sums are donated: Hessians are the largest arrays of a run, and two of each would have to fit.
@functools.partial(jax.jit, static_argnames=("network", "statistic"), donate_argnames="sums")
def _accumulate(network: Network, statistic: Statistic, state: State, x: Array, sums: list[Array]) -> list[Array]:
    all_inputs = network.inputs(state, x)
    inputs = [all_inputs[group[0]] for group in network.input_groups]
    if statistic == "squares":
        return [total + jnp.square(x).sum((0, 1)) for total, x in zip(sums, inputs, strict=True)]
    return [total + _upper_products(x) for total, x in zip(sums, inputs, strict=True)]


def _upper_products(x: Array) -> Array:
    """Return x^T x, right in the upper triangle alone: a band of its rows at a time."""
    x = x.reshape(-1, x.shape[-1])
    size = -(-x.shape[1] // _BANDS)
    starts = range(0, x.shape[1], size)
    bands = [jnp.matmul(x[:, at : at + size].T, x[:, at:], precision="highest") for at in starts]
    return jnp.concatenate([jnp.pad(band, ((0, 0), (at, 0))) for at, band in zip(starts, bands, strict=True)])


@jax.jit
def _symmetric(upper: Array) -> Array:
    return jnp.triu(upper) + jnp.triu(upper, 1).T
