"""Pruning of one LLaMA block in plain PyTorch, float32 on CPU: what our pruning is timed against.

The procedure is the reference's, step by step: sequences go through the block one at a time, a forward hook on every
linear gathers its own statistics (also where several linears share an input), then each weight is pruned, then the
outputs are computed again with the pruned weights.

References:
    Sun et al., Wanda, arXiv:2306.11695; Frantar and Alistarh, SparseGPT, arXiv:2301.00774; Boža, ADMM,
    arXiv:2401.02938; Meng et al., ALPS, arXiv:2406.07831 (the conjugate gradients).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Method = Literal["magnitude", "wanda", "sparsegpt", "admm"]
NM = tuple[int, int]  # (2, 4): 2 of every 4 consecutive inputs are pruned

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
COLUMNS = 128  # of SparseGPT's blocks, as in its paper
DAMPING = 0.01  # share of the Hessian's mean diagonal that is added to it, likewise
ADMM_DAMPING, RHO, STEPS, GROWTH, POLISH = 0.1, 1.0, 20, 15, 10  # of ADMM: its code's, and ALPS's steps at the end


class TorchBlock(nn.Module):
    """A decoder block of LLaMA: grouped-query attention with the plain rotary embedding, SwiGLU, no biases."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], block: int) -> None:
        """Makes the block.

        Args:
            config: parsed config.json, with `rope_parameters` or the older `rope_theta`.
            tensors: weights by Hugging Face name; those of other parts are left alone.
            block: its number.
        """
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or hidden // self.heads
        self.theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        self.input_layernorm = nn.RMSNorm(hidden, eps=config["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=config["rms_norm_eps"])
        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(hidden, self.heads * self.head_dim, bias=False),
            "k_proj": nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False),
            "v_proj": nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False),
            "o_proj": nn.Linear(self.heads * self.head_dim, hidden, bias=False),
        })
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(hidden, inner, bias=False),
            "up_proj": nn.Linear(hidden, inner, bias=False),
            "down_proj": nn.Linear(inner, hidden, bias=False),
        })
        prefix = f"model.layers.{block}."
        mine = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
        self.load_state_dict({name: torch.from_numpy(np.float32(array)) for name, array in mine.items()})

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, D) for x (B, T, D)."""
        x = x + self._attention(self.input_layernorm(x))
        normed = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](normed)) * self.mlp["up_proj"](normed))

    def _attention(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query = self.self_attn["q_proj"](x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        key = self.self_attn["k_proj"](x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        value = self.self_attn["v_proj"](x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        cos, sin = self._rope(length)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.self_attn["o_proj"](mixed.transpose(1, 2).reshape(batch, length, -1))

    def _rope(self, length: int) -> tuple[Tensor, Tensor]:
        frequencies = self.theta ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
        return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@torch.inference_mode()
def prune_block(
    block: TorchBlock,
    xs: Sequence[Tensor],
    method: Method,
    sparsity: float | Mapping[str, float],
    nm: NM | None = None,
    *,
    outputs: bool = True,
) -> list[Tensor]:
    """Prunes the linears of a block, in place.

    Args:
        block: dense.
        xs: its inputs, (1, T, D) each.
        method: of pruning.
        sparsity: fraction of weights to remove, one for all linears or by their names as in LINEARS.
        nm: remove n of every m instead; the sparsity is not used then.
        outputs: whether to compute the outputs; the reference does not for magnitude, which needs no activations.

    Returns:
        Outputs of the pruned block, (1, T, D) each; nothing without `outputs`.
    """
    statistics = {} if method == "magnitude" else gather(block, xs, SUMS[method])
    for name in LINEARS:
        weight = block.get_parameter(f"{name}.weight").data
        ratio = sparsity if isinstance(sparsity, int | float) else sparsity[name]
        if method == "magnitude":
            prune_magnitude(weight, ratio, nm)
        elif method == "wanda":
            prune_wanda(weight, statistics[name] / len(xs), ratio, nm)
        elif method == "sparsegpt":
            prune_sparsegpt(weight, 2 / len(xs) * statistics[name], ratio, nm)
        else:
            prune_admm(weight, 2 / len(xs) * statistics[name], ratio, nm)
    return [block(x) for x in xs] if outputs else []


def gather(block: TorchBlock, xs: Sequence[Tensor], statistic: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Runs the sequences through the block and sums a statistic of every linear's inputs.

    Args:
        block: dense.
        xs: its inputs, (1, T, D) each.
        statistic: of a linear's inputs for one sequence, (T, in).

    Returns:
        Sum over the sequences by name of the linear.
    """
    sums: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found = statistic(inputs[0].flatten(0, 1))
            sums[name] = sums[name].add_(found) if name in sums else found

        return hook

    hooks = [block.get_submodule(name).register_forward_hook(hook_of(name)) for name in LINEARS]
    for x in xs:
        block(x)
    for hook in hooks:
        hook.remove()
    return sums


SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "wanda": lambda x: x.square().sum(0),
    "sparsegpt": lambda x: x.T @ x,
    "admm": lambda x: x.T @ x,
}


def prune_magnitude(weight: Tensor, sparsity: float, nm: NM | None = None) -> None:
    """Removes the smallest weights of a layer (out, in) in place, those equal to the threshold among them."""
    size = weight.abs()
    if nm is not None:
        weight[smallest_of_groups(size, *nm)] = 0
        return
    threshold = size.flatten().sort().values[int(size.numel() * sparsity)]
    weight[size <= threshold] = 0


def prune_wanda(weight: Tensor, squares: Tensor, sparsity: float, nm: NM | None = None) -> None:
    """Removes from every row the weights of the smallest |weight| * norm of the input, in place.

    Args:
        weight: shape (out, in).
        squares: sum over a sequence's tokens of the squared inputs, mean over sequences, shape (in,).
        sparsity: fraction of each row, rounded down to whole weights.
        nm: remove n of every m inputs instead.
    """
    score = weight.abs() * squares.sqrt()
    if nm is not None:
        weight[smallest_of_groups(score, *nm)] = 0
        return
    order = score.sort(dim=1, stable=True).indices
    weight.scatter_(1, order[:, : int(weight.shape[1] * sparsity)], 0)


def prune_sparsegpt(weight: Tensor, hessian: Tensor, sparsity: float, nm: NM | None = None) -> None:
    """Removes weights column by column, each time moving the later ones to make up for it, in place.

    Args:
        weight: shape (out, in).
        hessian: 2 x^T x of the inputs, mean over sequences, shape (in, in); changed.
        sparsity: fraction of every block of columns; one weight more is removed.
        nm: remove n of every m inputs instead; m must divide COLUMNS.
    """
    columns = weight.shape[1]
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    weight[:, dead] = 0
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, columns, COLUMNS):
        stop = min(start + COLUMNS, columns)
        part = weight[:, start:stop]
        errors = _prune_columns(part, factor[start:stop, start:stop], sparsity, nm)
        weight[:, stop:] -= errors @ factor[start:stop, stop:]


def _prune_columns(part: Tensor, factor: Tensor, sparsity: float, nm: NM | None) -> Tensor:
    """Prunes a block of columns (out, C) in place; returns the errors that the later columns must make up for."""
    scale = factor.diagonal()
    removed = torch.zeros_like(part, dtype=torch.bool)
    if nm is None:
        score = part.square() / scale.square()
        removed = score <= score.flatten().sort().values[int(score.numel() * sparsity)]
    errors = torch.zeros_like(part)
    for column in range(part.shape[1]):
        if nm is not None and column % nm[1] == 0:
            group = slice(column, column + nm[1])
            removed[:, group] = smallest_of_groups(part[:, group].square() / scale[group].square(), *nm)
        old = part[:, column].clone()
        new = old.masked_fill(removed[:, column], 0)
        error = (old - new) / scale[column]
        part[:, column:] -= torch.outer(error, factor[column, column:])
        part[:, column] = new
        errors[:, column] = error
    return errors


def prune_admm(weight: Tensor, hessian: Tensor, sparsity: float, nm: NM | None = None) -> None:
    """Finds mask and weights by ADMM, the sparsity growing, and ends with conjugate gradients, in place.

    Args:
        weight: shape (out, in).
        hessian: 2 x^T x of the inputs, mean over sequences, shape (in, in), without zeros on the diagonal; changed.
        sparsity: fraction of each row, rounded down to whole weights.
        nm: remove n of every m inputs instead.
    """
    norms = hessian.diagonal().sqrt()
    hessian /= norms * norms[:, None]
    hessian.diagonal().add_(ADMM_DAMPING)
    one = torch.eye(len(hessian))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian + RHO * one))
    dense = weight * norms
    target = dense @ hessian
    removed, group = nm or (int(weight.shape[1] * sparsity), weight.shape[1])
    w, u, kept = dense, torch.zeros_like(dense), torch.ones_like(dense, dtype=torch.bool)
    for step in range(STEPS):
        if step < GROWTH:
            count = round(removed * (1 - (1 - (step + 1) / GROWTH) ** 3))
            groups = (w + u).abs().unflatten(1, (-1, group))
            order = groups.sort(dim=2, stable=True).indices[:, :, :count]
            kept = torch.ones_like(groups, dtype=torch.bool).scatter_(2, order, value=False).flatten(1)
        z = (w + u) * kept
        u = u + w - z
        w = (target + RHO * (z - u)) @ inverse
    weight[:] = _polish(w * kept, target, kept, hessian) / norms


def _polish(w: Tensor, target: Tensor, kept: Tensor, hessian: Tensor) -> Tensor:
    """Return the weights (out, in) under the mask after conjugate gradients on their error, each row on its own."""
    residual = (target - w @ hessian) * kept
    direction, square = residual, residual.square().sum(1, keepdim=True)
    for _ in range(POLISH):
        product = (direction @ hessian) * kept
        length = square / (direction * product).sum(1, keepdim=True)
        w = w + length * direction
        residual = residual - length * product
        before, square = square, residual.square().sum(1, keepdim=True)
        direction = residual + square / before * direction
    return w


def smallest_of_groups(score: Tensor, n: int, m: int) -> Tensor:
    """Marks the n smallest of every m consecutive entries in the rows of (out, in)."""
    groups = score.unflatten(1, (-1, m))
    chosen = groups.topk(n, dim=2, largest=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, chosen, value=True).flatten(1)
