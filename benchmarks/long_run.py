"""What a long run holds: memory, compilations, threads and open files over thousands of refreshes and model loads.

    python -m benchmarks.long_run [--refreshes 10000] [--loads 1000] [--kinds refresh step ...]

Kinds of work, each in a process of its own:

- refresh: a refresh as `train.cifar` makes it, of a ResNet-18 whose weights are others each time
- step: a jitted training step with `tempbalance(refresh_every=1)`, on the same network
- safetensors, gguf, npz, orbax: open a file of weights, and read all its arrays
- bundled: open the bundled language model, its network and its tokenizer, and read all its weights
- diagnose: a diagnosis of a small model; a tenth of the loads

Memory is flat where over the second half of the calls it grows by less than 1 %, or by less than 500 bytes a call.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
from tqdm import tqdm

import farms_jax
from benchmarks._common import machine, write
from prune.checkpoints import choose_tokenizer, open_checkpoint
from prune.config import BUNDLED
from tests.weights_helpers import write as write_weights
from train.config import Config, resolve
from train.steps import TrainState, make_network, make_optimizer
from train.training import make_refresh

MIB = 2**20
WIDTH = 0.125  # of the ResNet-18: 0.7 MB of weights
COMPILATION = "/jax/core/compile/backend_compile_duration"  # the event of one, also where a cache on disk has it
FORMATS = ("safetensors", "gguf", "npz", "orbax")
STEADY = ("compilations", "arrays", "threads", "files")

Call = Callable[[int], object]


class Sample(NamedTuple):
    """What the process holds after so many calls.

    Attributes:
        calls: so far.
        memory: resident, in bytes.
        blocks: of memory that Python's objects take: what is too small to be seen in `memory` is seen here.
        arrays: of JAX, alive.
        threads: of the process.
        files: open file descriptors.
        compilations: so far.
    """

    calls: int
    memory: int
    blocks: int
    arrays: int
    threads: int
    files: int
    compilations: int


class Watch:
    """Watches this process from now on."""

    def __init__(self) -> None:
        """Count compilations from now on."""
        self._process, self._compilations = psutil.Process(), 0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        self._compilations += event == COMPILATION

    def sample(self, calls: int, *, collect: bool) -> Sample:
        """Take a sample.

        Args:
            calls: made so far.
            collect: free what only cycles of objects hold, after memory was looked at and before all else.

        Returns:
            The sample.
        """
        process = self._process
        memory = process.memory_info().rss
        if collect:
            gc.collect()
        return Sample(
            calls=calls,
            memory=memory,
            blocks=sys.getallocatedblocks(),
            arrays=len(jax.live_arrays()),
            threads=process.num_threads(),
            files=process.num_fds(),
            compilations=self._compilations,
        )

    def follow(self, call: Call, calls: int, samples: int, title: str) -> list[Sample]:
        """Make calls one after the other.

        Args:
            call: of its number.
            calls: a multiple of `samples`.
            samples: how many to take on the way; a multiple of 20, so that there is one at a tenth and at a quarter.
            title: of the progress bar.

        Returns:
            The sample before the first call and those after every `calls / samples` calls.
        """
        marks = _marks(samples).values()  # elsewhere cycles are left to Python, as they are in a program
        found = [self.sample(0, collect=True)]
        for number in tqdm(range(1, calls + 1), desc=title, unit="call", dynamic_ncols=True):
            call(number)
            if number % (calls // samples) == 0:
                found.append(self.sample(number, collect=len(found) in marks))
        return found


def _marks(last: int) -> dict[str, int]:
    """Which samples of those from 0 to `last` the table shows."""
    return {"start": 0, "warm": last // 10, "quarter": last // 4, "half": last // 2, "end": last}


def summarise(samples: list[Sample]) -> dict[str, Any]:
    """What the samples of one kind of work come to.

    Args:
        samples: of `Watch.follow`.

    Returns:
        The samples at the start, after the warm-up (a tenth of the calls), at a quarter, half and the end; the slope of
        memory over the second half, by least squares, in bytes a call; its growth there, as a fraction; Python's blocks
        more in the second half, a call; how much compilations, arrays, threads and files grew after the warm-up; and
        whether memory is flat.
    """
    last = len(samples) - 1
    at = {name: samples[index] for name, index in _marks(last).items()}
    second = samples[last // 2 :]
    calls = [sample.calls for sample in second]
    slope = float(np.polyfit(calls, [sample.memory for sample in second], 1)[0])
    growth = at["end"].memory / at["half"].memory - 1
    return {
        "at": {name: sample._asdict() for name, sample in at.items()},
        "bytes_per_call": slope,
        "growth": growth,
        "blocks_per_call": (at["end"].blocks - at["half"].blocks) / (calls[-1] - calls[0]),
        "after_warm_up": {name: getattr(at["end"], name) - getattr(at["warm"], name) for name in STEADY},
        "flat": growth < 0.01 or slope < 500,
    }


def refresh_calls(folder: Path) -> Call:
    """Makes refreshes of all layers, as `train.cifar` does at the start of an epoch."""
    del folder
    config, state = _network()
    refresh, start = make_refresh(config), state.params

    def call(number: int) -> None:
        nonlocal state
        state = refresh(state._replace(params=_moved(start, number))).state

    return call


def step_calls(folder: Path) -> Call:
    """Makes training steps that each measure all layers."""
    del folder
    _, state = _network()
    tx = optax.chain(optax.sgd(1e-3, momentum=0.9), farms_jax.tempbalance(refresh_every=1))

    @jax.jit
    def step(params: Any, opt_state: Any, number: Any) -> tuple[Any, Any]:
        gradients = jax.tree.map(lambda weight: jnp.sin(number + 1e3 * weight), params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = state.params, tx.init(state.params)

    def call(number: int) -> None:
        nonlocal params, opt_state
        params, opt_state = jax.block_until_ready(step(params, opt_state, float(number)))

    return call


def _network() -> tuple[Config, TrainState]:
    """A ResNet-18 and its state; the weights are drawn by numpy, as compiling JAX's draws takes most of the time."""
    config = resolve(Config(dataset="digits", model="resnet18", width=WIDTH), small=True)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(make_network(config, 10).init, jax.random.key(0))
    params, stats = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)
    return config, TrainState(params, stats, make_optimizer(config, 4).init(params))


@jax.jit
def _moved(params: Any, number: Any) -> Any:
    """The weights with a small change that is another for each number."""
    return jax.tree.map(lambda weight: weight + 1e-3 * jnp.sin(number + 1e3 * weight), params)


def load_calls(form: str, folder: Path) -> Call:
    """Makes loads of a file of weights.

    Args:
        form: one of `FORMATS`.
        folder: for the file.

    Returns:
        The load.
    """
    path = write_weights(form, folder, _weights())

    def call(number: int) -> None:
        del number
        with farms_jax.open_weights(path) as source:
            for name in source.tensors:
                source.read(name)

    return call


def _weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"layers/{layer}/kernel": rng.standard_normal((96, 64), np.float32) for layer in range(4)}


def bundled_calls(folder: Path) -> Call:
    """Makes loads of the bundled language model."""
    del folder

    def call(number: int) -> None:
        checkpoint = open_checkpoint(str(BUNDLED))
        checkpoint.network()
        choose_tokenizer(checkpoint, None, needed=True).encode(f"Call number {number}.")
        for name in checkpoint.tensors:
            checkpoint.read(name)

    return call


def diagnose_calls(folder: Path) -> Call:
    """Makes diagnoses of a small model on disk."""
    path = write_weights("safetensors", folder, _weights())
    return lambda number: farms_jax.diagnose(path, seed=number)


KINDS: dict[str, Callable[[Path], Call]] = {
    "refresh": refresh_calls,
    "step": step_calls,
    **{form: lambda folder, form=form: load_calls(form, folder) for form in FORMATS},
    "bundled": bundled_calls,
    "diagnose": diagnose_calls,
}


def run_kind(kind: str, calls: int, samples: int) -> list[Sample]:
    """Does one kind of work in this process.

    Args:
        kind: a key of `KINDS`.
        calls: how many; a multiple of `samples`.
        samples: see `Watch.follow`.

    Returns:
        The samples.
    """
    with tempfile.TemporaryDirectory() as folder:
        call = KINDS[kind](Path(folder))
        return Watch().follow(call, calls, samples, kind)


def main() -> None:
    """Print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refreshes", type=int, default=10_000)
    parser.add_argument("--loads", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--json", default="benchmarks/results/long_run.json")
    settings = parser.parse_args()
    results: dict[str, Any] = {}
    for kind in settings.kinds:
        calls = settings.refreshes if kind in {"refresh", "step"} else settings.loads
        results[kind] = _in_a_process(kind, calls // 10 if kind == "diagnose" else calls)
        _print_row(kind, results[kind], header=len(results) == 1)
    write(settings.json, {"machine": machine(), "settings": vars(settings), "results": results})
    print(f"written to {settings.json}")


def _in_a_process(kind: str, calls: int) -> dict[str, Any]:
    samples = 40 if calls >= 400 else 20
    calls = max(1, calls // samples) * samples
    child = "import json, sys; from benchmarks.long_run import run_kind, summarise; "
    child += f"found = run_kind({kind!r}, {calls}, {samples}); "
    child += "print(json.dumps({**summarise(found), 'memory': [sample.memory for sample in found]}))"
    done = subprocess.run([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True, check=True)
    return {"calls": calls, **json.loads(done.stdout.splitlines()[-1])}


def _print_row(kind: str, result: dict[str, Any], *, header: bool) -> None:
    marks = list(result["at"])
    if header:
        titles = "".join(f"{f'{mark} MiB':>13}" for mark in marks)
        print(f"{'':12}{'calls':>7}{titles}{'bytes/call':>12}{'growth %':>10}{'blocks/call':>13}  after the warm-up")
    memory = "".join(f"{result['at'][mark]['memory'] / MIB:13.1f}" for mark in marks)
    print(
        f"{kind:12}{result['calls']:7}{memory}{result['bytes_per_call']:12.0f}{100 * result['growth']:10.2f}"
        f"{result['blocks_per_call']:13.2f}  "
        + ", ".join(f"{name} {change:+d}" for name, change in result["after_warm_up"].items())
        + f"; {'flat' if result['flat'] else 'NOT FLAT'}",
        flush=True,
    )


if __name__ == "__main__":
    main()
