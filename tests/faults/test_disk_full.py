"""Programs on a disk that is full: a real file system of a few megabytes, on which every write finds no space once.

A program is given the same command again and again with a little more space each time. Every time it must end with one
line and exit status 2; at last it ends well, with the same bytes as on a disk that never was full.

Each program has a process of its own, so that JAX starts and compiles once: this file with NAME DISK ELSEWHERE.
"""

import contextlib
import functools
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

MIB = 2**20
PAGE = 4096  # what a file takes of the disk at least, and grows by
SIZES = {"prune": 6 * MIB, "generate": 2 * MIB, "analyze": 8 * MIB, "train": 32 * MIB, "export": MIB}


@contextlib.contextmanager
def small_disk(folder, size):
    """Mount a file system of `size` bytes in memory; yield the prefix of a command line that sees it."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
    found = subprocess.run([*mount, str(folder)], capture_output=True, text=True, check=False)
    if found.returncode == 0:  # as root
        try:
            yield []
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return
    inside = ["unshare", "-rm", "sh", "-c", f'{" ".join(mount)} "$0" && exec "$@"', str(folder)]
    other = subprocess.run([*inside, "true"], capture_output=True, text=True, check=False)
    if other.returncode != 0:
        pytest.skip(f"no small file system can be mounted here, as root or by unshare: {found.stderr}{other.stderr}")
    yield inside


@pytest.mark.parametrize("name", SIZES)
def test_no_write_finds_the_disk_full_in_silence(name, tmp_path):
    with small_disk(tmp_path / "disk", SIZES[name]) as prefix:
        program = [*prefix, sys.executable, __file__, name, str(tmp_path / "disk"), str(tmp_path)]
        found = subprocess.run(program, capture_output=True, text=True, check=False)
    sys.stdout.write(found.stdout)
    assert found.returncode == 0, found.stderr


# --- In the process of a program -------------------------------------------------------------------------------------


class Disk:
    """The small file system, with a file that takes up what shall not be free."""

    def __init__(self, folder):
        self.folder, self._ballast = folder, os.open(folder / "ballast", os.O_RDWR | os.O_CREAT)

    def leave(self, size):
        """Set the number of free bytes."""
        os.ftruncate(self._ballast, 0)
        found = os.statvfs(self.folder)
        if (more := found.f_bavail * found.f_frsize - size) > 0:
            os.posix_fallocate(self._ballast, 0, more)


def ended(name, main, *arguments):
    """Run a program; return the last line of its error, or `None` where it ends well."""
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                main()
                return None
            except SystemExit as exit:
                status = exit.code
    if not status:
        return None
    assert status == 2, errors.getvalue()
    assert "Traceback" not in errors.getvalue(), errors.getvalue()
    line = errors.getvalue().splitlines()[-1]
    assert line.startswith(f"{name}: "), errors.getvalue()
    return line


def more_and_more(disk, run, *, least=lambda: 0, outputs=()):
    """Run with more space each time until it ends well; return the errors before, and the files after each of them.

    After a new error the space begins again at none, so that no write profits from the space of another. `outputs` are
    files that every run writes: they are removed before each, and the space only grows.
    """
    said, there, pages = [], [], 0
    for _ in range(200):
        for path in outputs:
            path.unlink(missing_ok=True)
        disk.leave(least() + pages * PAGE)
        line = run()
        if line is None:
            sys.stdout.write(f"{len(said)} times full\n")
            return said, there
        assert "o space left on device" in line, line
        pages = pages + 1 if line in said or outputs else 0
        said.append(line)
        there.append({path.name for path in disk.folder.rglob("*")})
    raise AssertionError(f"it never ends well: {said[-1]}")


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "ballast"
    }


def assert_named(said, *names):
    """Each of these names was in an error once."""
    assert [name for name in names if not any(name in line for line in said)] == [], said


def assert_between(there, *names):
    """The program ended between each two of these files, which it writes in this order, at least once."""
    for before, after in zip(names, names[1:], strict=False):
        assert any(before in files and after not in files for files in there), (before, after)


def prune_run(disk, elsewhere):
    from matplotlib.figure import Figure  # noqa: PLC0415
    from prune_helpers import byte_tokenizer, small_run  # noqa: PLC0415

    from prune import llama, sparsity_plots as plots  # noqa: PLC0415
    from prune.job import prepare  # noqa: PLC0415
    from prune.run import run  # noqa: PLC0415

    plots._sparsity = plots._perplexity = plots._alphas = lambda *_: Figure((
        1,
        1,
    ))  # quickly drawn, and as a file like any other
    byte_tokenizer().save_pretrained(elsewhere / "tokenizer")
    config = small_run(elsewhere, tokenizer=str(elsewhere / "tokenizer"))
    run(prepare(config))
    expected = prepare(config).path
    options = {"model": config.model, "calibration": config.calibration, "text": config.text, "samples": 8}
    options |= {"length": 40, "rows": 48, "per-axis": 2, "out": disk.folder / "out", "tokenizer": config.tokenizer}
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    path = disk.folder / "out" / expected.name
    again = functools.partial(ended, "prune.llama", llama.main, *flags)
    for pages in range(5):  # too little for the tokenizer, then for a config beside it
        disk.leave(pages * PAGE)
        assert "model.part: cannot write 2 MiB (No space left on device)" in again()
        assert not list(path.glob("model*"))
    weights = sum(file.stat().st_size // PAGE * PAGE for file in (expected / "model").glob("*.safetensors"))
    said, _ = more_and_more(disk, again, least=lambda: 0 if list(path.glob("model*")) else weights)
    assert_named(said, "model.part: cannot write 2 MiB", "progress.json")
    outputs = ["sparsity.png", "perplexity.png", "alphas.png", "layers.csv", "run.json", "model/README.md"]
    _, there = more_and_more(disk, again, outputs=[path / name for name in outputs])
    assert_between(there, "model", *outputs)
    assert files_of(path / "model") == files_of(expected / "model")
    assert (path / "layers.csv").read_bytes() == (expected / "layers.csv").read_bytes()
    before = files_of(path)
    disk.leave(0)
    assert "o space left" in again()  # which damages nothing
    assert files_of(path) == before
    disk.leave(MIB)
    assert again() is None


def generate_run(disk, elsewhere):
    from sciml import generate as module, shards  # noqa: PLC0415
    from sciml.flow_config import FlowConfig  # noqa: PLC0415

    shards.SHARD, shards._solver = 2, functools.cache(shards._solver)
    config = FlowConfig(size=16, steps=3, end=0.1, count=5, seed=7)
    expected = module.generate(elsewhere / "flows.hdf5", config)
    path = disk.folder / "data" / module.file_name(config)
    flags = ["--size", 16, "--steps", 3, "--end", 0.1, "--count", 5, "--seed", 7, "--out", path.parent]
    again = functools.partial(ended, "sciml.generate", module.main, *flags)
    disk.leave(0)
    assert "0.0 GB are free; lower --count or --size" in again()
    module._check_space = lambda *_: None  # there was space, and others have taken it since
    said, there = more_and_more(disk, again)
    assert_named(said, path.name)
    assert_between(there, "settings.json", "0000000.npz", "0000004.npz", path.name)
    assert path.read_bytes() == expected.read_bytes()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def analyze_run(disk, elsewhere):
    from farms_jax.diagnosis.cli import main  # noqa: PLC0415

    rng = np.random.default_rng(0)
    np.savez(elsewhere / "model.npz", **{f"layer{n}": rng.standard_normal((24, 40), np.float32) for n in range(3)})
    outputs = {f"--{kind}": disk.folder / f"report.{kind}" for kind in ("html", "csv", "json")}
    flags = ["--cache-dir", disk.folder / "cache", "--resamples", 20]
    flags += [part for pair in outputs.items() for part in pair]
    analyze = functools.partial(main, "farms analyze")
    again = functools.partial(ended, "farms analyze", analyze, elsewhere / "model.npz", *flags)
    said, _ = more_and_more(disk, again, outputs=outputs.values())
    assert_named(said, *outputs)
    before = files_of(disk.folder)
    assert len(before) == 6
    disk.leave(0)
    assert "o space left" in again()
    assert files_of(disk.folder) == before


def train_run(disk, elsewhere):
    """Begin a run, and resume it, on a disk that grows by quarters of the run's final size."""
    import jax  # noqa: PLC0415
    from helpers import lines_of  # noqa: PLC0415

    from train import cifar, training, vgg  # noqa: PLC0415

    vgg.CONVOLUTIONS[16] = (1, 1, 1, 1, 1)  # compiling takes most of the time
    make, made = training.make_functions, []

    def make_once(*arguments):  # what is compiled is kept for the later runs
        if not made:
            functions = make(*arguments)
            made.append(functions._replace(steps=lambda *given: functions.steps(*jax.device_put(given, device))))
        return made[0]

    device, training.make_functions = jax.devices()[0], make_once  # on a device by name, as a restored state is
    again, out = functools.partial(ended, "train.cifar", cifar.main), disk.folder / "runs"
    settings = ["--dataset", "digits", "--model", "vgg16", "--width", 0.125, "--epochs", 2]
    settings += ["--batch-size", 16, "--limit-train", 64, "--out", out]
    assert again(*settings) is None
    expected = Path(shutil.move(*out.iterdir(), elsewhere / "expected"))
    size, said = sum(path.stat().st_size for path in expected.rglob("*")), []
    for quarters in range(30):
        taken = sum(-(-path.stat().st_size // PAGE) * PAGE for path in out.rglob("*") if path.is_file())
        disk.leave(max(0, quarters * size // 4 - taken))
        begun = [path.parent for path in out.glob("*/config.json")]
        line = again("--resume", begun[0]) if begun else again(*settings)
        if line is None:
            break
        assert "o space left on device" in line, line
        said.append(line)
    assert line is None, line
    sys.stdout.write(f"{len(said)} times full\n")
    assert_named(said, "runs/", "checkpoints/last", "checkpoints/best")
    (run,) = (path.parent for path in out.glob("*/config.json"))
    assert lines_of(run / "seed43") == lines_of(expected / "seed43")


def export_run(disk, elsewhere):
    """Only the export of `sciml.dpot`: its run directory is like that of `train.cifar`, and compiling takes long."""
    import jax  # noqa: PLC0415
    from dpot_helpers import SMALL  # noqa: PLC0415

    from farms_jax.programs.exits import reported  # noqa: PLC0415
    from sciml import checkpoints  # noqa: PLC0415
    from sciml.model import make_network  # noqa: PLC0415

    params, path = make_network(SMALL).init(jax.random.key(0)), disk.folder / "model.safetensors"

    def main():
        with reported("sciml.dpot"):
            checkpoints.save(path, params, SMALL)

    checkpoints.save(elsewhere / "model.safetensors", params, SMALL)
    said, _ = more_and_more(disk, functools.partial(ended, "sciml.dpot", main))
    assert_named(said, "model.safetensors")
    assert path.read_bytes() == (elsewhere / "model.safetensors").read_bytes()


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]
    os.chdir(sys.argv[3])
    programs = {"prune": prune_run, "generate": generate_run, "analyze": analyze_run}
    programs |= {"train": train_run, "export": export_run}
    programs[sys.argv[1]](Disk(Path(sys.argv[2])), Path(sys.argv[3]))
