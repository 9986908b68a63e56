"""Fine-tuning: the weights that stay in a whole pruned model are trained on a text with AdamW; the others stay removed.

`full` trains the weights themselves. `lora` trains two thin matrices for each linear instead; their product, without
the entries of removed weights, is added to the weights, so that the model stays as sparse as it was.

The model is in memory as a whole, in float32, with the moments of what is trained; activations are those of one block
at a time, computed again on the way back.

References:
    Hu et al., LoRA, arXiv:2106.09685; Zimmer et al., PERP, arXiv:2312.15230: adapters under a mask.
"""

import functools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from tqdm import tqdm

from farms_jax.programs.files import atomic

from .forward import Read, Tensors, read_part
from .models import Network, State
from .perplexity import token_losses
from .recovery import batches_of, optimiser_of, shuffled

Kind = Literal["lora", "full"]
RANK = 16  # of the adapters
_EVERY = 50  # steps between checkpoints

Trained = dict[str, tuple[Array, ...]]  # by name: a weight (L, in, out), or matrices (L, in, rank) and (L, rank, out)
Whole = TypeVar("Whole", bound=tuple)


class FineTuning(NamedTuple):
    """How a pruned model is trained."""

    kind: Kind
    steps: int  # of one batch each
    rate: float  # learning rate of AdamW at its peak
    seed: int  # of the adapters


def fine_tune(
    network: Network,
    read: Read,
    masks: Mapping[str, np.ndarray],
    ids: np.ndarray,
    tuning: FineTuning,
    path: Path,
) -> Iterator[tuple[int, Tensors]]:
    """Yield each block's number and its trained weights (out, in) by tensor name, float32, removed entries 0.

    `masks` are (out, in) by layer, True where a weight stays; `ids` are the tokens to train on, (N, T). State is kept
    in a file at `path`, from which the training goes on after a stop, and ends with the same numbers.
    """
    blocks = [network.to_state(block, read_part(network, block, read)) for block in range(network.num_blocks)]
    frozen = {name: jnp.stack([block[name] for block in blocks]) for name in blocks[0]}
    ends = tuple(network.to_state(part, read_part(network, part, read)) for part in ("embed", "head"))
    del blocks
    numbers = range(network.num_blocks)
    kept = {
        f"{linear}.weight": jnp.stack([masks[network.layer_name(block, linear)].T for block in numbers])
        for linear in network.linears
    }
    optimiser = optimiser_of(tuning.steps, tuning.rate)
    trained = _start(tuning, {name: frozen[name] for name in kept})
    first, (trained, moments) = _restore(path, (trained, optimiser.init(trained)))
    order = shuffled(batches_of(*ids.shape), tuning.steps, np.random.default_rng(tuning.seed))
    for step, rows in enumerate(tqdm(order, desc=f"recover, {tuning.kind}", unit="step", total=tuning.steps)):
        if step < first:
            continue
        tokens = jnp.asarray(ids[rows], jnp.int32)
        trained, moments = _step(network, optimiser, ends, frozen, trained, moments, kept, tokens)
        if (step + 1) % _EVERY == 0 or step + 1 == tuning.steps:
            _save(path, step + 1, (trained, moments))
    found = _weights(frozen, trained, kept)
    for block in numbers:
        yield (
            block,
            {
                f"{network.layer_name(block, linear)}.weight": np.asarray(found[f"{linear}.weight"][block]).T
                for linear in network.linears
            },
        )


def _start(tuning: FineTuning, weights: State) -> Trained:
    """Return what is trained, at its start: the weights, or matrices of which the second are 0."""
    if tuning.kind == "full":
        return {name: (jnp.copy(weight),) for name, weight in weights.items()}
    keys = jax.random.split(jax.random.key(tuning.seed), len(weights))
    return {
        name: (
            jax.random.normal(key, (*weight.shape[:2], RANK)) * weight.shape[1] ** -0.5,
            jnp.zeros((len(weight), RANK, weight.shape[2])),
        )
        for key, (name, weight) in zip(keys, weights.items(), strict=True)
    }


def _weights(frozen: State, trained: Trained, kept: State) -> State:
    """Return the weights (L, in, out) under what was trained, removed entries 0."""
    found = {}
    for name, parts in trained.items():
        weight = parts[0] if len(parts) == 1 else frozen[name] + jnp.matmul(*parts, precision="highest")
        found[name] = jnp.where(kept[name], weight, 0)
    return found


@functools.partial(jax.jit, static_argnames=("network", "optimiser"), donate_argnames=("trained", "moments"))
def _step(
    network: Network,
    optimiser: optax.GradientTransformation,
    ends: tuple[State, State],
    frozen: State,
    trained: Trained,
    moments: optax.OptState,
    kept: State,
    ids: Array,
) -> tuple[Trained, optax.OptState]:
    """Return what is trained, and AdamW's moments, after a step on tokens (B, T)."""
    embedding, head = ends

    def loss(trained: Trained) -> Array:
        blocks = {**frozen, **_weights(frozen, trained, kept)}
        x, _ = lax.scan(_block_of(network), network.embed(embedding, ids), blocks)
        return token_losses(network, head, x, ids).mean()

    updates, moments = optimiser.update(jax.grad(loss)(trained), moments, trained)
    return jax.tree.map(jnp.add, trained, updates), moments


def _block_of(network: Network) -> Callable[[Array, State], tuple[Array, None]]:
    """Return the step of a scan over blocks; on the way back, each is computed again from its input."""
    return jax.checkpoint(lambda x, state: (network.block(state, x), None))


def _save(path: Path, step: int, state: tuple[Trained, optax.OptState]) -> None:
    with atomic(path) as part, part.open("wb") as file:
        np.savez(file, np.int64(step), *(np.asarray(leaf) for leaf in jax.tree.leaves(state)))


def _restore(path: Path, start: Whole) -> tuple[int, Whole]:
    """Return the step and the state in a file, those to start from where there is none, or it is damaged."""
    leaves, structure = jax.tree.flatten(start)
    try:
        with np.load(path) as file:
            found = [jnp.asarray(file[f"arr_{number}"]) for number in range(1, len(leaves) + 1)]
            return int(file["arr_0"]), jax.tree.unflatten(structure, found)
    except FileNotFoundError:
        return 0, start
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        tqdm.write(f"{path} is damaged; the training begins anew")
        return 0, start
