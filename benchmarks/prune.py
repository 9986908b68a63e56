"""Times the pruning of one LLaMA block, ours against the same procedure in plain PyTorch, on the CPU.

    python -m benchmarks.prune --hidden 576 --inner 1536 --heads 9 --kv-heads 3 --samples 16 --length 512

The time of a block is everything from its dense weights and the calibration set's activations to its pruned weights
and their outputs: statistics with the block dense, pruning, outputs with the block pruned. Magnitude needs no
activations; there it is the pruning alone, as in the reference. Weights and activations are random, the shape is
SmolLM2-135M's by default. The peer is `benchmarks/torch_prune.py`; both prune the same numbers, and the masks are
compared.
"""

import argparse
from statistics import median
from typing import Any, get_args

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks._common import interleave, machine, write
from benchmarks.torch_prune import LINEARS, Method, TorchBlock, prune_block as torch_prune_block
from prune.allocation import Plan
from prune.forward import Activations, run_blocks
from prune.models import make_network
from prune.pruning import STATISTIC, prune_block


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 576), ("inner", 1536), ("heads", 9), ("kv-heads", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--methods", nargs="+", default=list(get_args(Method)), choices=get_args(Method))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", default="benchmarks/results/prune.json", help="file for the results, JSON")
    args = parser.parse_args()

    torch.set_num_threads(machine()["cores"])
    results: dict[str, Any] = {}
    print(f"{'':12}{'ours s':>9}{'torch s':>9}{'torch/ours':>12}{'masks equal':>13}")
    for method in args.methods:
        results[method] = time_method(method, args)
        row = results[method]
        print(f"{method:12}{row['ours']:9.3f}{row['torch']:9.3f}{row['ratio']:12.2f}{row['masks_equal']:13.6f}")
    write(args.json, {"machine": machine(), "settings": vars(args), "results": results})


def time_method(method: Method, args: argparse.Namespace) -> dict[str, Any]:
    """Times one method.

    Args:
        method: of pruning.
        args: shape of the block, size of the calibration set, repeats.

    Returns:
        Median seconds of both, all seconds, their ratio, and the fraction of mask entries that are equal.
    """
    config = config_of(args)
    network = make_network(config)
    generator = np.random.default_rng(0)
    tensors = {
        name: np.float32(0.03) * generator.standard_normal(shape, np.float32)
        if len(shape) == 2
        else np.ones(shape, np.float32)
        for name, shape in network.tensors(0).items()
    }
    x = generator.standard_normal((args.samples, args.length, args.hidden), np.float32)
    plan = Plan(method, dict.fromkeys(network.layer_shapes(), float(args.sparsity)))
    needed = x if STATISTIC[method] else x[:0]
    kept: dict[str, np.ndarray] = {}

    def ours() -> None:
        with threadpool_limits(1, user_api="blas"):  # as the program does
            go()

    def go() -> None:
        activations = Activations(needed.shape)
        activations.write(slice(0, len(needed)), needed)

        def visit(block: int, tensors: Any, statistics: Any) -> Any:
            pruned = prune_block(network, block, tensors, statistics, plan)
            kept.update(pruned.masks)
            return pruned.tensors

        statistic = STATISTIC[method]
        run_blocks(
            network,
            tensors.__getitem__,
            activations,
            title=method,
            visit=visit,
            statistic=statistic,
            calibration=len(needed),
        )

    blocks: list[TorchBlock] = []

    def peer() -> None:
        blocks[:] = [TorchBlock(config, tensors, 0)]
        xs = [torch.from_numpy(sample[None]) for sample in needed]
        torch_prune_block(blocks[0], xs, method, args.sparsity, outputs=method != "magnitude")

    seconds = interleave({"ours": ours, "torch": peer}, args.repeats)
    equal = [
        np.mean((blocks[0].get_parameter(f"{name}.weight").detach().numpy() != 0) == kept[network.layer_name(0, name)])
        for name in LINEARS
    ]
    medians = {name: median(values) for name, values in seconds.items()}
    return {
        **medians,
        "ratio": medians["torch"] / medians["ours"],
        "masks_equal": float(np.mean(equal)),
        "all_seconds": seconds,
    }


def config_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the config of a network of one block."""
    return {
        "model_type": "llama",
        "hidden_size": args.hidden,
        "intermediate_size": args.inner,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "num_hidden_layers": 1,
        "vocab_size": 64,
        "max_position_embeddings": args.length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }


if __name__ == "__main__":
    main()
