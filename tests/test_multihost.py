"""Analysis in several processes: the report of one, in each; an error in one is an error in all."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import farms_jax
from farms_jax import multihost
from farms_jax.errors import InputError

ROOT = Path(__file__).parent.parent


def run_two_processes(folder, analyses):
    """Results of two processes on this machine that make the same analyses."""
    with contextlib.ExitStack() as stack:
        # Held to the end, so that no other process is given this port; the coordinator's gRPC may share it.
        held = stack.enter_context(socket.socket())
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        processes = []
        for number in range(2):
            # Errors go to a file as well: a full pipe would stop one process, and the other would wait for it.
            errors = stack.enter_context((folder / f"{number}.err").open("w"))
            arguments = [str(held.getsockname()[1]), str(number), str(folder / str(number)), analyses]
            command = [sys.executable, "tests/multihost_program.py", *arguments]
            env = {**os.environ, "PYTHONPATH": str(ROOT)}
            processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=errors, stderr=errors))
            stack.callback(processes[-1].kill)
        statuses = [process.wait(timeout=600) for process in processes]
    assert statuses == [0, 0], [(folder / f"{number}.err").read_text() for number in range(2)]
    return [json.loads((folder / str(number)).read_text()) for number in range(2)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_two_processes(tmp_path_factory.mktemp("multihost"), "all")


@pytest.mark.slow
def test_a_process_may_be_late(tmp_path):
    """Gloo gives up after 30 seconds where processes meet for the first time."""
    first, second = run_two_processes(tmp_path, "late")
    assert first["late"] > 35
    assert first["alpha"] == second["alpha"] == first["one"]


@pytest.mark.parametrize("way", ["mesh", "layers"])
def test_every_process_has_the_report_of_one(results, way):
    for process in results:
        *names, measures, spectra = process["one"]
        *found_names, found_measures, found_spectra = process[way]
        assert found_names == names
        assert names[0] == ["a", "a again", "kernel", "small", "stacked[0]", "stacked[1]", "stacked[2]"]
        assert names[2] == [["bias", "bias, norm or other vector"]]
        for metric, values in measures.items():
            np.testing.assert_allclose(found_measures[metric], values, rtol=1e-5, err_msg=metric)
        for values, expected in zip(found_spectra, spectra, strict=True):
            np.testing.assert_allclose(values, expected, atol=1e-6 * np.max(expected))
    assert results[0][way] == results[1][way]
    assert [process["replicated"] for process in results] == [True, True]


def test_each_process_reads_its_own_layers_once(results):
    first, second = (process["read"] for process in results)
    assert sorted(first + second) == ["a", "a again", "kernel", "small", *["stacked"] * 3]
    assert {"a", "a again"} - set(first)
    assert {"a", "a again"} - set(second)  # the two costliest are not in one process


def test_an_error_in_one_process_is_raised_in_all(results):
    for process in results:
        faults = process["faults"]
        assert faults["not finite"].startswith("InputError: params: NaN or Inf in a, a again, kernel;")
        assert faults["not finite on the mesh"] == faults["not finite"]
        assert "different models or settings" in faults["unlike settings"]
        assert faults["only in one"].startswith("InputError: exclude: 'no such' matches no name")
        assert faults["spread"].startswith("ValueError: multihost.analyze: a lies on devices of several processes;")
    reader = next(i for i, process in enumerate(results) if "a" in process["read"])
    assert results[reader]["faults"]["unreadable"] == "OSError: the disk is gone"
    told = f"RuntimeError: multihost.analyze: process {reader} failed: OSError: the disk is gone"
    assert results[1 - reader]["faults"]["unreadable"] == told


def test_layers_go_to_the_process_with_the_least_to_do_the_costliest_first(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert multihost._assign([1.0, 5.0, 3.0, 3.0, 2.0]).tolist() == [1, 0, 1, 1, 0]  # 7 each


def test_one_process_makes_the_plain_report():
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((24, 16)).astype(np.float32), "b": np.zeros(3)}
    report, expected = multihost.analyze(params), farms_jax.analyze(params)
    assert (report.names, report.left_out, report.eigenvalues) == (expected.names, expected.left_out, None)
    assert report.to_dict() == expected.to_dict()
    with pytest.raises(InputError, match="NaN or Inf in w"):
        multihost.analyze({"w": np.full((24, 16), np.nan)})
    with pytest.raises(ValueError, match="w is traced"):
        jax.jit(lambda w: multihost.analyze({"w": w}).alpha)(params["w"])
