"""One analysis over several devices, and over several processes.

    python -m benchmarks.devices [--devices 1 2 4 8] [--processes 1 2] [--hidden 1024] [--blocks 2]
                                  [--json results.json]

The weights are those of LLaMA blocks, random, sharded as for tensor parallelism: `farms_jax.analyze` spreads their
windows over the devices of a mesh. One device is the plain analysis, of weights that are not sharded. Processes are
joined by `jax.distributed` on this machine, each has all weights, and `farms_jax.multihost.analyze` spreads the layers.

Without an accelerator the devices are XLA's forced CPU devices. They share the cores of the machine, and one device
alone already uses all of them: what their table shows is the cost of spreading, not a gain. The processes are held to
equally many cores each, the same however many there are, and stand for machines of that size.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks._common import machine, timed, write

SHAPES = {  # (inputs, outputs) in units of the hidden size, and the axis that is sharded
    **dict.fromkeys(("q", "k", "v"), (1.0, 1.0, 1)),
    "o": (1.0, 1.0, 0),
    **dict.fromkeys(("gate", "up"), (1.0, 2.6875, 1)),
    "down": (2.6875, 1.0, 0),
}


def network(hidden: int, blocks: int) -> dict[str, np.ndarray]:
    """Random weights by name, (inputs, outputs)."""
    rng = np.random.default_rng(0)
    return {
        f"blocks/{block}/{name}": rng.standard_normal((int(rows * hidden), int(cols * hidden)), np.float32)
        for block in range(blocks)
        for name, (rows, cols, _) in SHAPES.items()
    }


def spread(weights: dict[str, np.ndarray], count: int) -> dict[str, Any]:
    """The weights on so many devices."""
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((count,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    specs = (PartitionSpec("model", None), PartitionSpec(None, "model"))
    return {
        name: jax.device_put(weight, NamedSharding(mesh, specs[SHAPES[name.rpartition("/")[2]][2]]))
        for name, weight in weights.items()
    }


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """Times of one analysis in this process, the first one apart, and what it found."""
    import jax

    import farms_jax

    weights: Any = network(settings.hidden, settings.blocks)
    analyze = farms_jax.analyze
    if settings.process is not None:
        jax.distributed.initialize(f"127.0.0.1:{settings.port}", settings.count, settings.process)
        analyze = farms_jax.multihost.analyze
    elif settings.count > 1:
        weights = spread(weights, settings.count)
    else:
        weights = jax.device_put(weights, jax.devices()[0])

    def run() -> Any:
        return jax.block_until_ready(analyze(weights).alpha)

    _, first = timed(run)
    runs = [timed(run) for _ in range(settings.repeats)]
    return {"first": first, "seconds": [seconds for _, seconds in runs], "alpha": np.asarray(runs[0][0]).tolist()}


def on_devices(count: int, settings: argparse.Namespace, *, forced: bool) -> dict[str, Any]:
    """Measure in a fresh process with so many devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    env = {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={count}"} if forced else {}
    (result,) = finished([started(["--count", str(count)], settings, env)])
    return result


def in_processes(count: int, settings: argparse.Namespace, *, accelerated: bool) -> dict[str, Any]:
    """Measure in so many processes, each with its own cores, and its own accelerator where there are any."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // max(settings.processes))
    processes = []
    for number in range(count):
        own = cores[number * each : (number + 1) * each] or cores
        options = ["--count", str(count), "--process", str(number), "--port", str(port)]
        options += ["--cores", *map(str, own)]
        env = {"CUDA_VISIBLE_DEVICES": str(number)} if accelerated else {}
        processes.append(started(options, settings, env))
    results = finished(processes)
    assert all(result["alpha"] == results[0]["alpha"] for result in results)
    return results[0] | {"cores each": each}


def started(options: Sequence[str], settings: argparse.Namespace, env: dict[str, str]) -> "subprocess.Popen[str]":
    """Start this program to measure one case."""
    command = [sys.executable, "-m", "benchmarks.devices", *options]
    command += [f"--{name}={getattr(settings, name)}" for name in ("hidden", "blocks", "repeats")]
    return subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True)


def finished(processes: Sequence["subprocess.Popen[str]"]) -> list[dict[str, Any]]:
    """What they measured; all are ended where one fails."""
    try:
        outputs = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise SystemExit("devices: a measurement failed, see above")
        return [json.loads(output.splitlines()[-1]) for output in outputs]
    finally:
        for process in processes:
            process.kill()


def table(title: str, results: dict[int, dict[str, Any]]) -> None:
    """Print times by count, and how far the alphas are from those of the first."""
    base = next(iter(results.values()))
    print(f"\n{title:>10} {'first':>9} {'run':>9} {'speed-up':>9} {'difference':>11}")
    for count, result in results.items():
        result["median"] = statistics.median(result["seconds"])
        result["difference"] = float(np.abs(np.array(result["alpha"]) / base["alpha"] - 1).max())
        print(
            f"{count:10} {result['first']:7.2f} s {result['median']:7.3f} s "
            f"{base['median'] / result['median']:8.2f}x {result['difference']:11.0e}"
        )


def main() -> None:
    """Print two tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", default="benchmarks/results/devices.json")
    for name, kind in (("count", int), ("process", int), ("port", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, nargs="*", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share an accelerator
    if settings.cores:
        os.sched_setaffinity(0, settings.cores)
    if settings.count is not None:
        print(json.dumps(measure(settings)))
        return
    facts = machine()
    accelerated, found = devices()
    where = f"{found} x {facts['device']}" if accelerated else "forced CPU devices, which share the cores"
    print(f"{facts['cpu']}, {facts['cores']} cores; {where}")
    print(f"{settings.blocks} LLaMA blocks of hidden size {settings.hidden}; medians of {settings.repeats}")
    results: dict[str, dict[int, dict[str, Any]]] = {}
    if counts := [count for count in settings.devices if count <= found or not accelerated]:
        results["devices"] = {count: on_devices(count, settings, forced=not accelerated) for count in counts}
        table("devices", results["devices"])
    if counts := [count for count in settings.processes if count <= found or not accelerated]:
        results["processes"] = {count: in_processes(count, settings, accelerated=accelerated) for count in counts}
        table("processes", results["processes"])
    shape = {"hidden": settings.hidden, "blocks": settings.blocks}
    write(settings.json, {"machine": facts, "accelerated": accelerated, "shape": shape, **results})
    print(f"\nwritten to {settings.json}")


def devices() -> tuple[bool, int]:
    """Whether this machine has accelerators, and how many devices."""
    import jax

    return jax.default_backend() != "cpu", jax.device_count()


if __name__ == "__main__":
    main()
