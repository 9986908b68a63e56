"""A decoder network as pure functions, one per part: embedding, decoder block, head.

Outside, weights have the names and the orientation (out, in) of Hugging Face checkpoints; inside, the state of a part
is a dictionary of float32 arrays. Nothing is allocated until `to_state` is given a part's tensors.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from farms_jax.errors import InputError, listed, printable
from farms_jax.weights.conversion import Shape, mismatches

from .operations import State, linear

# On CPU, sequences from this length on go through a block one by one: the features of one stay in the cache. Measured
# on 2 cores with blocks of 576 and 2048 features: 15 % faster, and neither better nor worse; shorter ones lose up to
# 25 %.
LONG = 256

Part = int | Literal["embed", "head"]  # number of a block, or one of the two ends
PartKind = Literal["embed", "block", "head"]
Inputs = tuple[Array, ...]

# Names in other layouts of the same models, and how to get Hugging Face's.
_LAYOUTS = {
    r".*attention\.w[qkvo]\.weight": "Meta's layout; convert it with convert_llama_weights_to_hf.py of transformers",
    r".*\.(qweight|qzeros|weight_packed|absmax)": "quantised weights; take the model's float weights",
    r".*\.(lora_[AB]\..*|base_layer\..*)": "an adapter; merge it into its model (merge_and_unload of peft)",
    r".*flat_param(_\d+)?": "shards of FSDP; save the whole state dict",
}


@dataclass(frozen=True, kw_only=True)
class Network(ABC):
    """A decoder network; hashable, so that it can be a static argument of `jax.jit`. Callers jit its methods."""

    prefix: str  # of the tensors' names
    vocab_size: int  # V
    hidden_size: int  # features D between blocks
    num_blocks: int
    max_length: int  # of a sequence
    tied: bool  # the head's matrix is the embedding's

    # What tensors are called: blocks, tables of tokens and positions, and the head, which has no prefix.
    block_list: str = "layers"
    token_table: str = "embed_tokens"
    position_table: str = "embed_positions"
    head_module: str = "lm_head"
    stored_in_out: bool = False  # checkpoints have the blocks' linears as (in, out), Conv1D; (out, in) everywhere here

    @property
    @abstractmethod
    def input_groups(self) -> tuple[tuple[str, ...], ...]:
        """Linears of a block by shared input, in the reference's order."""

    @abstractmethod
    def _shapes(self, kind: PartKind) -> dict[str, Shape]:
        """Return the shapes of a part's tensors as in the checkpoint, by their names without prefix and block."""

    @abstractmethod
    def _embed(self, state: State, ids: Array) -> Array:
        """Return (B, T, D) for ids (B, T)."""

    @abstractmethod
    def _block(self, state: State, x: Array) -> tuple[Array, Inputs]:
        """Return a block's output (B, T, D), and the input of each of the `input_groups`.

        Where jitted code asks for one of them alone, the other is not computed.
        """

    @abstractmethod
    def _head(self, state: State, x: Array) -> Array:
        """Return logits (B, T, V) for x (B, T, D)."""

    def _block_constants(self, block: int) -> dict[str, float]:
        """Return the entries of a block's state that are not weights."""
        del block
        return {}

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts, in the order in which tokens go through them."""
        return ("embed", *range(self.num_blocks), "head")

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of a block's linears inside the block, in the reference's order: `self_attn.q_proj`."""
        return tuple(name for group in self.input_groups for name in group)

    def layer_name(self, block: int, linear: str) -> str:
        """Return the full name of a linear, without `.weight`: `model.layers.3.self_attn.q_proj`."""
        return self.block_prefix(block) + linear

    def block_prefix(self, block: int) -> str:
        """Return what the names of a block's tensors begin with: `model.layers.3.`."""
        return f"{self.prefix}{self.block_list}.{block}."

    @property
    def embedding(self) -> str:
        """Name of the embedding of tokens, which a tied head shares."""
        return f"{self.prefix}{self.token_table}.weight"

    @property
    def head_name(self) -> str:
        """Name of the head's matrix where it is not tied."""
        return f"{self.head_module}.weight"

    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shape (out, in) of every linear of all blocks, by full name, in network order."""
        inside: dict[str, Any] = self._shapes("block")
        blocks = range(self.num_blocks)
        return {self.layer_name(block, name): inside[f"{name}.weight"] for block in blocks for name in self.linears}

    def tensors(self, part: Part) -> dict[str, Shape]:
        """Return the shapes of a part's tensors by name, as in the checkpoint; a tied head has the embedding."""
        inside = self._shapes("block" if isinstance(part, int) else part)
        prefix = self.block_prefix(part) if isinstance(part, int) else self.prefix
        # Sorted, because written blocks are hashed in this order: it must not change with the code.
        return {name if name == self.head_name else prefix + name: inside[name] for name in sorted(inside)}

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return {name for part in self.parts for name in self.tensors(part)}

    def check(self, found: Mapping[str, Shape]) -> None:
        """Compare the shapes of all tensors of a checkpoint, by name, with those that the network needs.

        Raises:
            InputError: one for all tensors that are missing, unknown or of another shape; it lists the first ones.
        """
        expected = {}
        for part in self.parts:
            expected |= self.tensors(part)
        if not self.tied and expected.keys() - found.keys() == {self.head_name}:
            raise InputError(
                f"config.json: `tie_word_embeddings` is false, and there is no {self.head_name}: complete the weight "
                "files, or set it to true if the head is the embedding"
            )
        _compare(expected, found)

    def to_state(self, part: Part, tensors: Mapping[str, np.ndarray | Array]) -> State:
        """Return the state of a part, from exactly its `tensors` by name, of any floating type or traced.

        All blocks have the same structure: float32 arrays by name inside the part, linears (in, out).

        Raises:
            InputError: tensors are unknown, missing or of another shape.
        """
        expected, state = self.tensors(part), {}
        tables = {f"{table}.weight" for table in (self.token_table, self.position_table)}
        prefix = self.block_prefix(part) if isinstance(part, int) else self.prefix
        _compare(expected, {name: array.shape for name, array in tensors.items()})
        for full_name in expected:
            array, name = tensors[full_name], full_name.removeprefix(prefix)
            is_linear = array.ndim == 2 and name not in tables
            # A copy, so that the caller's array may be freed or changed.
            state[name] = jnp.array(array.T if is_linear else array, jnp.float32)
        constants = self._block_constants(part) if isinstance(part, int) else {}
        return state | {name: jnp.float32(value) for name, value in constants.items()}

    def embed(self, state: State, ids: Array) -> Array:
        """Return the first block's input, float32 (B, T, D), for tokens (B, T); InputError above `max_length`."""
        if ids.shape[1] > self.max_length:
            raise InputError(f"sequences of {ids.shape[1]} tokens: this model takes {self.max_length} at most")
        return _exactly(self._embed, state, ids)

    def block(self, state: State, x: Array) -> Array:
        """Apply a decoder block: (B, T, D) -> (B, T, D)."""
        return self._map_block(lambda x: _exactly(self._block, state, x)[0], x)

    def inputs(self, state: State, x: Array) -> dict[str, Array]:
        """Return the input (B, T, in) of each linear of a block, by name, for the block's input (B, T, D).

        Linears of one input group have the same array.
        """
        inputs = self._map_block(lambda x: _exactly(self._block, state, x)[1], x)
        return {name: array for group, array in zip(self.input_groups, inputs, strict=True) for name in group}

    def head(self, state: State, x: Array) -> Array:
        """Return logits (B, T, V) for the output of the last block (B, T, D)."""
        return _exactly(self._head, state, x)

    def unembed(self, state: State, x: Array) -> Array:
        """Multiply by the head's matrix, or by the embedding's where they are tied."""
        return jnp.dot(x, state[f"{self.token_table}.weight"].T) if self.tied else linear(state, self.head_module, x)

    def head_shapes(self, features: int) -> dict[str, Shape]:
        """Return the shape of the matrix for `unembed`, with this number of features."""
        return {f"{self.token_table if self.tied else self.head_module}.weight": (self.vocab_size, features)}

    def _map_block(self, function: Callable[[Array], Any], x: Array) -> Any:
        def one_by_one(x: Array) -> Any:
            return jax.tree.map(lambda y: y[:, 0], lax.map(lambda sequence: function(sequence[None]), x))

        if len(x) == 1 or x.shape[1] < LONG:
            return function(x)
        return lax.platform_dependent(x, cpu=one_by_one, default=function)


def _exactly(function: Callable[[State, Array], Any], state: State, x: Array) -> Any:
    # Accelerators round the factors of float32 products unless they are told not to.
    with jax.default_matmul_precision("highest"):
        return function(state, x)


def _compare(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    faults = mismatches(found, expected)
    if not faults:
        return
    missing = [text for name, text in faults.items() if name not in found]
    others = [text for name, text in faults.items() if name in found]
    # Names that the file has tell most where none is as it should be.
    shown = [*missing[: max(10 - len(others), 5)], *others[: max(10 - len(missing), 5)]]
    more = f"; and {len(faults) - len(shown)} more" if len(faults) > len(shown) else ""
    raise InputError(
        f"{len(faults)} tensor(s) do not fit the config.json (use the one that belongs to these weights, "
        f"and the complete set of weight files): {'; '.join(shown)}{more}{_looks_like(found, expected)}"
    )


def _looks_like(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> str:
    """Return what the names in a file look like, where most of those that are needed are not among them."""
    if len(expected.keys() & found.keys()) > len(expected) / 2:
        return ""
    kinds = list(dict.fromkeys(re.sub(r"\d+", "*", printable(name)) for name in found if name not in expected))
    remedy = next((text for pattern, text in _LAYOUTS.items() for name in found if re.fullmatch(pattern, name)), "")
    return f". Names in the file look like {listed(kinds, 6, ', ') or 'none'}{f': {remedy}' if remedy else ''}"
