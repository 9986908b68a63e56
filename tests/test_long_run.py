"""Long runs: nothing is compiled again, and no memory, thread or open file is kept, over refreshes and model loads."""

import gc
import json
import mmap
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.long_run import KINDS, Watch, summarise

ROOT = Path(__file__).parent.parent
CALLS = {"refresh": 200, "step": 100} | dict.fromkeys(("safetensors", "gguf", "npz", "bundled", "diagnose"), 20)
CALLS["orbax"] = 60  # the allocator grows by steps, which more calls outweigh
# One process for all kinds: its start takes longer than most of them.
CHILD = """
import json, sys
from benchmarks.long_run import run_kind, summarise
calls = json.loads(sys.argv[1])
print(json.dumps({kind: summarise(run_kind(kind, count, 20)) for kind, count in calls.items()}))
"""


@pytest.fixture(scope="module")
def found():
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(CALLS)], cwd=ROOT, capture_output=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_or_made_anew(kind, found):
    result, calls = found[kind], CALLS[kind] // 2
    threads = result["after_warm_up"].pop("threads")
    assert threads <= 2  # one that has done its work is seen for a moment; those of a pool go when it likes
    assert result["after_warm_up"] == {"compilations": 0, "arrays": 0, "files": 0}
    # Python's objects; the first calls leave a few more than later ones.
    assert result["blocks_per_call"] < (10 if kind in {"refresh", "step"} else 60)
    # A copy of the weights takes 0.7 MB in a refresh or a step, 0.2 MB in a load of a file, 5 MB in one of the model.
    copy = {"refresh": 7e5, "step": 7e5, "bundled": 5e6}.get(kind, 2e5)
    assert result["at"]["end"]["memory"] - result["at"]["half"]["memory"] < calls * copy / 2
    assert result["at"]["start"]["memory"] > 1e8


OVER = threading.Event()  # the threads that are kept may end


@pytest.fixture
def little_to_collect():
    """What other tests have left is not looked through, at every sample."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("little_to_collect")
@pytest.mark.parametrize(
    ("what", "make"),
    [
        ("arrays", lambda folder: jnp.zeros(3)),
        ("files", lambda folder: (folder / "file").open("w")),
        ("threads", lambda folder: threading.Thread(target=OVER.wait, daemon=True)),
        ("compilations", lambda folder: jax.jit(lambda x: x + 1)(0.0)),
    ],
)
def test_what_is_kept_is_seen(what, make, tmp_path):
    kept = []

    def call(number):
        kept.append(make(tmp_path))
        if what == "threads":
            kept[-1].start()

    result = summarise(Watch().follow(call, 40, 20, what))
    if what == "threads":
        OVER.set()
    assert result["after_warm_up"][what] == 36
    assert result["blocks_per_call"] > 1


@pytest.mark.usefixtures("little_to_collect")
def test_memory_that_grows_is_seen():
    kept, content = [], bytes(2**21)

    def call(_):
        kept.append(mmap.mmap(-1, 2**21))  # not from memory that the process has to spare
        kept[-1].write(content)

    result = summarise(Watch().follow(call, 100, 20, "2 MiB a call"))
    assert result["bytes_per_call"] == pytest.approx(2**21, rel=0.1)
    assert not result["flat"]
    assert result["after_warm_up"]["arrays"] == 0
