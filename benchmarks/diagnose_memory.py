"""Peak memory of `farms analyze` on a model larger than it.

    python -m benchmarks.diagnose_memory [--gigabytes 2] [--json benchmarks/results/diagnose_memory.json]

Writes a LLaMA-shaped model of random float32 weights (2048 wide, 5632 in the MLP, 32,000 tokens) as a sharded Hugging
Face folder, runs `farms analyze --html` on it in a process of its own, and reads that process's peak resident memory.
Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks._common import machine, write
from farms_jax.weights import TensorInfo
from farms_jax.weights.safetensors_file import make_layout

WIDTH, MLP, KEYS, TOKENS = 2048, 5632, 256, 32_000
BLOCK = {
    **{f"self_attn.{part}_proj": (WIDTH, WIDTH) for part in "qo"},
    **{f"self_attn.{part}_proj": (KEYS, WIDTH) for part in "kv"},
    **{f"mlp.{part}_proj": (MLP, WIDTH) for part in ("gate", "up")},
    "mlp.down_proj": (WIDTH, MLP),
}
CHILD = """
import json, time
from farms_jax.__main__ import main
from farms_jax.programs.memory import peak_memory
before, start = peak_memory(), time.perf_counter()
main()
result = {"seconds": time.perf_counter() - start, "mib_after_imports": before / 2**20}
print(json.dumps(result | {"peak_mib": peak_memory() / 2**20}))
"""


def make_model(folder: Path, gigabytes: float) -> int:
    """Write the model, a shard per block.

    Returns:
        Bytes of all shards.
    """
    rng, shards, total = np.random.default_rng(0), [], 0
    ends = {"model.embed_tokens.weight": (TOKENS, WIDTH), "lm_head.weight": (TOKENS, WIDTH)}
    size = 4 * sum(rows * cols for rows, cols in BLOCK.values())
    blocks = round((gigabytes * 1e9 - 4 * 2 * TOKENS * WIDTH) / size)
    shards = [{name: shape} for name, shape in ends.items()]
    shards += [{f"model.layers.{i}.{name}.weight": shape for name, shape in BLOCK.items()} for i in range(blocks)]
    index = {}
    for number, shard in enumerate(tqdm(shards, desc="write model", unit="shard"), start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        layout = make_layout({key: TensorInfo(np.dtype(np.float32), shape) for key, shape in shard.items()})
        with (folder / name).open("wb") as file:
            file.write(layout.header)
            for key in sorted(shard):
                rng.standard_normal(shard[key], np.float32).tofile(file)
                index[key] = name
            total += file.tell()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


def main() -> None:
    """Print the figures, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--json", default="benchmarks/results/diagnose_memory.json")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = make_model(Path(folder), settings.gigabytes)
        command = [sys.executable, "-c", CHILD, "analyze", folder, "--no-cache", "--html", f"{folder}/report.html"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = {"model_mib": size / 2**20, **json.loads(done.stdout.splitlines()[-1])}
    facts = machine()
    print(f"{facts['cpu']}, {facts['cores']} cores")
    print(", ".join(f"{key} {value:.0f}" for key, value in result.items()))
    write(settings.json, {"machine": facts, **result})
    print(f"written to {settings.json}")


if __name__ == "__main__":
    main()
