"""Fuzzing of everything that reads files, in a child process: whatever is in a file, it is read or refused.

    python -m tests.faults.fuzz gguf --seed 1 --case 1234 --keep FOLDER    # one mutant again, with its traceback

A case is a target (`targets.py`), a seed and a number: its mutant depends on nothing else. The child reads mutants one
after the other and reports each, so that a crash is laid to the file after the last report. A case fails where the
reader raises anything but an `InputError` of one printable line; where it ends the process; where it takes longer than
SECONDS of processor time, or waits for ever; and where it takes more memory than MEMORY besides what was there.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from random import Random
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SECONDS = 5.0  # of processor time for one file; most take milliseconds
MEMORY = 128 << 20  # bytes that reading a file of a few kB may add to what is resident
_WAIT = 600.0  # seconds for one file, where it takes no processor time: a lock that nobody gives back
_ADDRESSES = 1 << 30  # bytes that one file may ask for, whether it uses them or not
_MOST_CRASHES = 20  # then the rest is not worth its time
_LAST_WORDS = 15  # lines of a crashed child's stderr
_ENVIRONMENT = {
    **{"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"},
    **{"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
}


class Failure(NamedTuple):
    """A case that failed, and how."""

    target: str
    seed: int
    case: int
    what: str

    def __str__(self) -> str:
        """Return what happened, and how to see it again."""
        return f"python -m tests.faults.fuzz {self.target} --seed {self.seed} --case {self.case}\n    {self.what}"


@dataclasses.dataclass
class Outcome:
    """How many mutants of a target were read, refused by an `InputError`, or failed."""

    read: int = 0
    refused: int = 0
    seconds: float = 0.0  # of processor time
    slowest: float = 0.0  # processor time of the slowest one
    failures: list[Failure] = dataclasses.field(default_factory=list)


def fuzz(cases: Mapping[str, range], seed: int, keep: Path | None = None) -> dict[str, Outcome]:
    """Read mutants, target -> numbers of its cases, in a child process, and in a new one after each crash.

    Mutants that fail are copied into the folder `keep`.
    """
    outcomes, left = {name: Outcome() for name in cases}, dict(cases)
    for _ in range(_MOST_CRASHES):
        with tempfile.TemporaryDirectory() as folder:
            crash = _run(left, seed, Path(folder), outcomes)
            if keep is not None and (failed := Path(folder) / "failed").is_dir():
                shutil.copytree(failed, keep, dirs_exist_ok=True)
        if crash is None:
            break
        outcomes[crash.target].failures.append(crash)
        done = list(left).index(crash.target)
        left = {name: numbers for at, (name, numbers) in enumerate(left.items()) if at >= done}
        left[crash.target] = range(crash.case + 1, left[crash.target].stop)
    return outcomes


def _run(cases: Mapping[str, range], seed: int, folder: Path, outcomes: dict[str, Outcome]) -> Failure | None:
    """Run one child, and add its report to the outcomes; return the case that crashed it, if one did."""
    numbers = {name: [cases[name].start, cases[name].stop] for name in cases}
    task = json.dumps({"cases": numbers, "seed": seed, "folder": str(folder)})
    with (folder / "stderr").open("wb") as stderr:
        command = [sys.executable, "-m", "tests.faults.fuzz", "--child", task]
        environment = {**os.environ, **_ENVIRONMENT}
        child = subprocess.run(command, cwd=ROOT, env=environment, stdout=-1, stderr=stderr, check=False)
    target, case, outcome = "", 0, Outcome()
    for line in map(json.loads, child.stdout.decode().splitlines()):
        if "target" in line:
            target, case, outcome = line["target"], cases[line["target"]].start, outcomes[line["target"]]
            continue
        outcome.read += line["found"] is None
        outcome.refused += line["found"] == ""
        outcome.seconds += line["seconds"]
        outcome.slowest = max(outcome.slowest, line["seconds"])
        if line["found"]:
            outcome.failures.append(Failure(target, seed, case, line["found"]))
        case += 1
    if child.returncode == 0:
        return None
    words = "\n    ".join((folder / "stderr").read_text(errors="replace").splitlines()[-_LAST_WORDS:])
    if not target or case == cases[target].stop:
        raise RuntimeError(f"the child ended before its first case, with status {child.returncode}:\n{words}")
    return Failure(target, seed, case, f"the process ended with status {child.returncode}: {words}")


# In the child


class Samples:
    """Valid files of a target, one of which at a time is replaced by a mutant."""

    def __init__(self, name: str, folder: Path) -> None:
        """Write the files into a folder."""
        from tests.faults.targets import TARGETS

        self.name, self.target, self.folder = name, TARGETS[name], folder
        (place := folder / name).mkdir()
        self.roots = list(self.target.samples(place))
        self.content = {path: path.read_bytes() for root in self.roots for path in _files(root)}
        self.mutable = [[path for path in _files(root) if self.target.mutator(path)] for root in self.roots]

    @contextlib.contextmanager
    def mutant(self, seed: int, case: int) -> Generator[tuple[Path, Path]]:
        """Yield what to read, and the file in it that is a mutant; afterwards the file is restored."""
        random = Random(f"{self.name} {seed} {case}")
        number = random.randrange(len(self.roots))
        path = random.choice(self.mutable[number])
        mutate = self.target.mutator(path)
        assert mutate is not None
        others = [content for other, content in self.content.items() if self.target.mutator(other) is mutate]
        path.write_bytes(mutate(self.content[path], others, random))
        try:
            yield self.roots[number], path
        finally:
            path.write_bytes(self.content[path])


def _files(root: Path) -> list[Path]:
    return [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())


def _one(samples: Samples, seed: int, case: int) -> str | None:
    """Read one mutant: `None` if it is read, "" if it is refused, else what is wrong."""
    from farms_jax.errors import InputError
    from tests.faults.target import check_message

    with samples.mutant(seed, case) as (root, path):
        before = _status("VmRSS", reset=True)
        try:
            samples.target.read(root)
            found = None
        except InputError as error:
            found = check_message(error)
        except BaseException as error:  # even what no reader should let through
            where = "".join(traceback.format_tb(error.__traceback__)[-4:]).rstrip()
            found = f"{type(error).__name__}: {str(error)[:300]!r}\n{where}"
        grown = _status("VmHWM") - before
        if not found and grown > MEMORY:
            found = f"{grown >> 20} MiB of memory for a file of {path.stat().st_size} bytes"
        if found:
            (failed := samples.folder / "failed").mkdir(exist_ok=True)
            shutil.copyfile(path, failed / f"{samples.name}-{seed}-{case}-{path.name}")
    return found


def _status(field: str, *, reset: bool = False) -> int:
    """Bytes resident now (VmRSS), at most since the last reset (VmHWM), or of addresses (VmSize); 0 outside Linux."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) << 10
    except OSError:
        return 0


def _limit_addresses(more: int | None) -> None:
    if used := _status("VmSize"):
        most = resource.RLIM_INFINITY if more is None else used + more
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def _child(cases: Mapping[str, list[int]], seed: int, folder: str) -> None:
    # Packages may print: their lines must not get between those of the report.
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)  # says where, then ends the process
    for name, numbers in cases.items():
        _limit_addresses(None)
        samples = Samples(name, Path(folder))
        for root in samples.roots:
            samples.target.read(root)  # this also brings in what is imported late
        _limit_addresses(_ADDRESSES)
        report.write(json.dumps({"target": name}) + "\n")
        for case in range(*numbers):
            begun = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            faulthandler.dump_traceback_later(_WAIT, exit=True)
            found = _one(samples, seed, case)
            report.write(json.dumps({"found": found, "seconds": time.process_time() - begun}) + "\n")
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(Path(folder) / name)


def main() -> None:
    """Read one mutant again, or be the child."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for a copy of the file")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.child:
        _child(**settings.child)
        return
    sys.path.insert(0, str(ROOT / "tests"))
    with tempfile.TemporaryDirectory() as folder:
        samples = Samples(settings.target, Path(folder))
        with samples.mutant(settings.seed, settings.case) as (root, path):
            sys.stdout.write(f"{path.name}: {path.stat().st_size} bytes\n")
            if settings.keep:
                settings.keep.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, settings.keep / path.name)
            samples.target.read(root)
            sys.stdout.write("read\n")


if __name__ == "__main__":
    main()
