"""A network as pure functions, one per part: embedding, decoder block, head; one class for all families.

Outside, weights have the names and the orientation (out, in) of Hugging Face checkpoints; inside, a part is the state
of a Flax module. Nothing is allocated until `to_state` is given a part's tensors.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from farms_jax.errors import InputError

from . import conversion
from .conversion import Kind, Part, Rule, Shape

# On CPU, sequences of so many tokens go through a block one by one: the features of one stay in the cache. Measured on
# 2 cores with blocks of 576 and 2048 features: 15 % faster, and neither better nor worse; shorter ones lose up to 25 %.
LONG = 256


@dataclass(frozen=True)
class Family:
    """What a family of networks is made of."""

    # (config, rngs) -> module, of the embedding, a block, the head. A block's module gives its output, (B, T, D), and
    # the input of each group of linears; where one of them is all that jitted code asks for, the other is not computed.
    parts: tuple[Callable[..., nnx.Module], ...]
    input_groups: tuple[tuple[str, ...], ...]  # a block's linears by shared input, in the reference's order
    rules: Callable[[Any], list[Rule]]  # config -> conversion table


@dataclass(frozen=True)
class Network:
    """A decoder network; hashable, so that it can be a static argument of `jax.jit`. Callers jit its methods."""

    family: Family
    config: Any  # frozen dataclass of the family: LlamaConfig or OPTConfig

    @property
    def num_blocks(self) -> int:
        """Number of decoder blocks."""
        return self.config.num_blocks

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts, in the order in which tokens go through them."""
        return ("embed", *range(self.num_blocks), "head")

    @property
    def hidden_size(self) -> int:
        """Features D between blocks."""
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        """Number of tokens V."""
        return self.config.vocab_size

    @property
    def max_length(self) -> int:
        """Positions: the longest sequence that the network was made for."""
        return self.config.max_length

    @property
    def input_groups(self) -> tuple[tuple[str, ...], ...]:
        """The linears of a block, those together that share an input, in the reference's order."""
        return self.family.input_groups

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of a block's linears inside the block, in the reference's order: `self_attn.q_proj`."""
        return tuple(name for group in self.input_groups for name in group)

    def layer_name(self, block: int, linear: str) -> str:
        """Return the full name of a linear, without `.weight`: `model.layers.3.self_attn.q_proj`."""
        return f"{self.config.prefix}layers.{block}.{linear}"

    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shape (out, in) of every linear of all blocks, by full name, in network order."""
        shapes = {}
        for block in range(self.num_blocks):
            tensors = self.tensors(block)
            for layer in (self.layer_name(block, linear) for linear in self.linears):
                rows, columns = tensors[f"{layer}.weight"]
                shapes[layer] = (rows, columns)
        return shapes

    def tensors(self, part: Part) -> dict[str, Shape]:
        """Return the shapes of a part's tensors by their names, both as in the checkpoint.

        Args:
            part: number of a block, `"embed"` or `"head"`. A tied head names the embedding again.
        """
        return {name: leaf.shape for name, leaf in self._leaves(part).items()}

    def check(self, found: Mapping[str, Shape]) -> None:
        """Compare a checkpoint with what the network needs.

        Args:
            found: shapes of all tensors of the checkpoint, by name.

        Raises:
            InputError: one for all tensors that are unknown, missing or of another shape; it lists them.
        """
        expected = {}
        for part in self.parts:
            expected |= self.tensors(part)
        conversion.check(self._rules(), expected, found)

    def to_state(self, part: Part, tensors: Mapping[str, np.ndarray | jax.Array]) -> nnx.State:
        """Make the state of a part.

        Args:
            part: number of a block, `"embed"` or `"head"`.
            tensors: exactly those of `tensors(part)`, by name, of any floating type; traced ones too, for gradients.

        Returns:
            State of float32 arrays, all blocks with the same structure.

        Raises:
            InputError: for tensors that are unknown, missing or of another shape.
        """
        conversion.check(self._rules(), self.tensors(part), {name: array.shape for name, array in tensors.items()})
        values = self.config.block_constants(part) if isinstance(part, int) else {}
        for name, leaf in self._leaves(part).items():
            values[leaf.path] = tensors[name].T if leaf.transposed else tensors[name]
        leaves = _skeleton(self, _kind(part))[1]
        # A copy, so that the caller's array may be freed or changed.
        arrays = {path: jnp.array(values[path], jnp.float32) for path in leaves}
        return nnx.from_flat_state([(tuple(path.split("/")), leaves[path].replace(arrays[path])) for path in leaves])

    def embed(self, state: nnx.State, ids: jax.Array) -> jax.Array:
        """Look up the tokens.

        Args:
            state: of the part `"embed"`.
            ids: tokens, int32 (B, T).

        Returns:
            Input of the first block, float32 (B, T, D).

        Raises:
            InputError: if T is more than `max_length`.
        """
        if ids.shape[1] > self.max_length:
            raise InputError(f"sequences of {ids.shape[1]} tokens: this model takes {self.max_length} at most")
        return self._apply("embed", state, ids)

    def block(self, state: nnx.State, x: jax.Array) -> jax.Array:
        """Apply a decoder block: (B, T, D) -> (B, T, D)."""
        return self._apply_block(state, x, lambda output, inputs: output)

    def inputs(self, state: nnx.State, x: jax.Array) -> dict[str, jax.Array]:
        """Return what each linear of a block is given.

        Args:
            state: of the block.
            x: input of the block, (B, T, D).

        Returns:
            Name of a linear -> its input, (B, T, in); linears of one input group have the same array.
        """
        inputs = self._apply_block(state, x, lambda output, inputs: inputs)
        return {name: array for group, array in zip(self.input_groups, inputs, strict=True) for name in group}

    def head(self, state: nnx.State, x: jax.Array) -> jax.Array:
        """Return logits (B, T, V) for the output of the last block (B, T, D)."""
        return self._apply("head", state, x)

    def _apply(self, kind: Kind, state: nnx.State, x: jax.Array) -> Any:
        module = nnx.merge(_skeleton(self, kind)[0], state)
        # Accelerators round the factors of float32 products unless they are told not to.
        with jax.default_matmul_precision("highest"):
            return module(x)

    def _apply_block(self, state: nnx.State, x: jax.Array, wanted: Callable[[Any, Any], Any]) -> Any:
        def at_once(x: jax.Array) -> Any:
            return wanted(*self._apply("block", state, x))

        def one_by_one(x: jax.Array) -> Any:
            return jax.tree.map(lambda y: y[:, 0], lax.map(lambda sequence: at_once(sequence[None]), x))

        if len(x) == 1 or x.shape[1] < LONG:
            return at_once(x)
        return lax.platform_dependent(x, cpu=one_by_one, default=at_once)

    def _rules(self) -> list[Rule]:
        return self.family.rules(self.config)

    def _leaves(self, part: Part) -> dict[str, "_Leaf"]:
        """Returns where each tensor of a part goes, by name: the conversion table, read for names we expect."""
        rules = self._rules()
        leaves = {}
        for path, variable in _skeleton(self, _kind(part))[1].items():
            if isinstance(variable, nnx.Param):
                name = self._tensor_name(part, path)
                target = conversion.place(rules, name)
                if target is None or part not in target.parts or target.path != path:
                    raise AssertionError(f"the conversion table has {target} for {name}, not {part} {path}")
                leaves[name] = _Leaf(
                    path, variable.shape[::-1] if target.transposed else variable.shape, target.transposed
                )
        return leaves

    def _tensor_name(self, part: Part, path: str) -> str:
        module, _, leaf = path.rpartition("/")
        name = f"{module.replace('/', '.')}.{'bias' if leaf == 'bias' else 'weight'}"
        if module == "lm_head":
            return name
        return self.config.prefix + (f"layers.{part}.{name}" if isinstance(part, int) else name)


class _Leaf(NamedTuple):
    """One parameter of a part."""

    path: str
    shape: Shape  # in the checkpoint
    transposed: bool


def _kind(part: Part) -> Kind:
    return "block" if isinstance(part, int) else part


@functools.cache
def _skeleton(network: Network, kind: Kind) -> tuple[nnx.GraphDef, dict[str, nnx.Variable]]:
    """Returns the structure of a part, and its leaves by path, with shapes for values."""
    build = network.family.parts[("embed", "block", "head").index(kind)]
    graph, state = nnx.split(nnx.eval_shape(lambda: build(network.config, nnx.Rngs(0))))
    return graph, {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
