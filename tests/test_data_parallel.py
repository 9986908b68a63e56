"""Training on several devices gives what one device gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("data_parallel_program.py")


@pytest.fixture(scope="module")
def found():
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parent.parent)}
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_parameters_are_on_all_devices(found):
    assert found["devices"] == [1, 4]


def test_the_gradient_is_that_of_one_device(found):
    assert found["gradients apart"] < 1e-10


def test_steps_take_the_same_way(found):
    """In float32, where rounding grows from step to step; a share that is left out moves all by tens of percent."""
    np.testing.assert_allclose(*found["losses"], rtol=1e-3)
    assert found["moves apart"] < 1e-2


def test_devices_that_cannot_be_are_refused(found):
    too_many, uneven, negative = found["refused"]
    assert too_many == "--devices 5: JAX sees 4; give at most 4, or 0 for all"
    assert uneven == "--batch-size 16 must be a multiple of the 3 of --devices 3"
    assert "--devices -1" in negative
