"""Kills programs at random moments, goes on with their runs, and compares what they come to.

    python -m benchmarks.kill [--kills 50] [--program train fine-tune prune generate] [--seed 0]

A run that nothing stops is watched first: how long it takes, and when it has how much on the disk. Moments are drawn
evenly over that time, from the first sign of the run's folder on. A run is then killed (SIGKILL) at several of them in
turn, as it is gone on with after each, and at last goes on to its end. All files that have their final name must be
whole after every kill, and the end must be that of the run that nothing stopped: metrics, tables, checkpoints, models,
data sets, to the bit, all but times.

The settings are tiny: a run takes seconds. Compilations are shared through JAX's cache on disk.
"""

import argparse
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks._common import machine, write
from benchmarks.kill_programs import PROGRAMS, Program

ROOT = Path(__file__).parent.parent
_POLL = 0.01  # seconds
_PATIENCE = 600.0  # seconds that a process may take
_AT_ONCE = 10  # kills of one run, at most


class Timeline(NamedTuple):
    """A run that nothing stopped.

    Attributes:
        marks: (seconds since the first sign of its folder, how far it was), when it first was there; from 0 on.
        seconds: from the first sign to the end of the process.
    """

    marks: list[tuple[float, int]]
    seconds: float

    def time_of(self, mark: int) -> float:
        """Return when so much was there, or as much as there was below it."""
        return max(seconds for seconds, at in self.marks if at <= mark)

    def before(self, moment: float) -> tuple[float, int]:
        """Return the last mark before a moment."""
        return max(mark for mark in self.marks if mark[0] <= moment)


class Kill(NamedTuple):
    """A kill that hit a run at work.

    Attributes:
        moment: when, on the timeline of the run that nothing stopped.
        mark: how far the run was, as its files said.
        writing: something was half written.
        faults: see `Program.faults`.
    """

    moment: float
    mark: int
    writing: bool
    faults: list[str]


class Killed(NamedTuple):
    """What all kills of one program came to.

    Attributes:
        timeline: of the run that nothing stopped.
        kills: all.
        runs: that were killed, and went on to their end.
        early: processes that ended before their kill came; it was drawn again.
        differences: what differed at the end of a run from the one that nothing stopped.
    """

    timeline: Timeline
    kills: list[Kill]
    runs: int
    early: int
    differences: list[str]


class Killer:
    """Kills the runs of one program."""

    def __init__(self, program: Program, folder: Path, environment: dict[str, str]) -> None:
        """Plan it.

        Args:
            program: with its inputs.
            folder: for its runs.
            environment: of its processes.
        """
        self._program, self._folder, self._environment = program, folder, environment
        self._log = folder / "log.txt"
        folder.mkdir(parents=True)

    def run(self, kills: int, rng: random.Random, bar: tqdm) -> Killed:
        """Kill so often, after two runs that nothing stops: the first compiles, the second is watched.

        Args:
            kills: how often.
            rng: draws the moments.
            bar: progress, moved by one a kill.

        Returns:
            What came of it.

        Raises:
            RuntimeError: a process fails, or always ends before it can be killed.
        """
        self._watch(self._folder / "first")
        expected, timeline = self._program.result(self._folder / "first"), self._watch(self._folder / "second")
        found = Killed(timeline, [], 0, 0, self._differences("second", expected))
        while len(found.kills) < kills:
            name = f"killed{found.runs}"
            count = min(_AT_ONCE, kills - len(found.kills))
            hits, early = self._kill_a_run(self._folder / name, timeline, count, rng, bar)
            differences = self._differences(name, expected)
            if not differences:
                shutil.rmtree(self._folder / name)
            differences = found.differences + differences
            found = Killed(timeline, found.kills + hits, found.runs + 1, found.early + early, differences)
            if found.early > 5 + kills // 5:
                raise RuntimeError(f"{self._program.name}: {found.early} of {kills} processes ended before their kill")
        return found

    def _watch(self, out: Path) -> Timeline:
        """Let a run go to its end."""
        with self._process(out) as process:
            self._wait_for_sign(out, process)
            start, marks = time.perf_counter(), [(0.0, 0)]

            def look() -> bool:
                if (mark := self._program.mark(out)) > marks[-1][1]:
                    marks.append((time.perf_counter() - start, mark))
                return False

            self._wait_until(look, process)
            seconds = time.perf_counter() - start
        self._check_status(process)
        return Timeline(marks, seconds)

    def _kill_a_run(
        self, out: Path, timeline: Timeline, count: int, rng: random.Random, bar: tqdm
    ) -> tuple[list[Kill], int]:
        """Kill a run until it ends, and at most so often; returns the kills, and how many of them were too late."""
        hits: list[Kill] = []
        for drawn in sorted(rng.uniform(0, timeline.seconds) for _ in range(count)):
            passed = timeline.time_of(self._program.mark(out))  # it got further than it was to, this time
            moment = drawn if drawn >= passed else rng.uniform(passed, timeline.seconds)
            if not self._kill_at(out, timeline, moment):
                return hits, 1
            found = self._program.faults(out)
            hits.append(Kill(moment, self._program.mark(out), self._program.is_writing(out), found))
            bar.update()
        with self._process(out) as process:
            self._wait_until(lambda: False, process)
        self._check_status(process)
        return hits, 0

    def _kill_at(self, out: Path, timeline: Timeline, moment: float) -> bool:
        """Begin or go on, and kill at a moment of the timeline; returns whether it came before the end.

        However fast the process is this time: it is let go to the mark before that moment, and from there so long as
        the moment is after the mark.
        """
        since, mark = timeline.before(moment)
        with self._process(out) as process:
            self._wait_for_sign(out, process)
            self._wait_until(lambda: self._program.mark(out) >= mark, process)
            try:
                process.wait(moment - since)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.returncode < 0:
            return True
        self._check_status(process)
        return False

    def _wait_for_sign(self, out: Path, process: subprocess.Popen[bytes]) -> None:
        """Wait until a process does something in its folder."""
        before = _state_of(out)
        self._wait_until(lambda: _state_of(out) != before, process)

    def _wait_until(self, reached: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
        """Wait until something is reached, or the process has ended."""
        until = time.monotonic() + _PATIENCE
        while process.poll() is None and not reached():
            if time.monotonic() > until:
                raise RuntimeError(f"{process.args} does not get on:\n{self._last_lines()}")
            time.sleep(_POLL)

    @contextmanager
    def _process(self, out: Path) -> Generator[subprocess.Popen[bytes]]:
        out.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                self._program.command(out), cwd=ROOT, env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def _check_status(self, process: subprocess.Popen[bytes]) -> None:
        if process.returncode != 0:
            raise RuntimeError(f"{process.args} ended with status {process.returncode}:\n{self._last_lines()}")

    def _last_lines(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]

    def _differences(self, name: str, expected: dict[str, Any]) -> list[str]:
        found = self._program.result(self._folder / name)
        return [f"{name}: {key}" for key in sorted(expected.keys() | found.keys()) if _differ(key, expected, found)]


def _differ(key: str, expected: dict[str, Any], found: dict[str, Any]) -> bool:
    return key not in expected or key not in found or expected[key] != found[key]


def _state_of(out: Path) -> list[tuple[str, int, int]]:
    """What is in a folder: names, sizes and times of all files; a file that goes away meanwhile is left out."""
    found = []
    for folder, _, names in os.walk(out):
        for name in names:
            try:
                stat = os.stat(path := os.path.join(folder, name))
            except OSError:
                continue
            found.append((path, stat.st_size, stat.st_mtime_ns))
    return sorted(found)


def kill_program(name: str, kills: int, seed: int, folder: Path) -> Killed:
    """Kill one program, with inputs, compilations and runs of its own.

    Args:
        name: a key of `PROGRAMS`.
        kills: how often.
        seed: of the moments.
        folder: for all of it.

    Returns:
        What came of it.
    """
    folder = folder.absolute()  # the programs run elsewhere
    compiled = {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level={PROGRAMS[name].effort}",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    killer = Killer(PROGRAMS[name](folder / "inputs"), folder / "runs", {**os.environ, **compiled})
    with tqdm(total=kills, desc=name, unit="kill", dynamic_ncols=True) as bar:
        return killer.run(kills, random.Random(seed), bar)


def main() -> None:
    """Print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each program")
    parser.add_argument("--program", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="new folder, in which runs that differ are kept")
    parser.add_argument("--json", default="benchmarks/results/kill.json", help="file for the results, JSON")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for name in args.program:
        with tempfile.TemporaryDirectory() as temporary:
            found = kill_program(name, args.kills, args.seed, (args.folder or Path(temporary)) / name)
        results[name] = {**_summary(found), "moments": found._asdict()}
        _print_row(name, results[name], header=len(results) == 1)
    write(args.json, {"machine": machine(), "settings": vars(args), "results": results})
    print(f"written to {args.json}")


def _summary(found: Killed) -> dict[str, Any]:
    kills, end = found.kills, found.timeline.marks[-1][1]
    phases = Counter("writing" if kill.writing else _phase(kill.mark, end) for kill in kills)
    return {
        "kills": len(kills),
        "runs": found.runs,
        "early": found.early,
        "phases": dict(phases),
        "faults": [fault for kill in kills for fault in kill.faults],
        "differences": found.differences,
    }


def _phase(mark: int, end: int) -> str:
    return "beginning" if not mark else "middle" if mark < end else "end"


def _print_row(name: str, row: dict[str, Any], *, header: bool) -> None:
    phases = ("beginning", "middle", "writing", "end")
    if header:
        print(f"{'':10}{'kills':>6}{'runs':>6}" + "".join(f"{phase:>11}" for phase in phases) + "  faults  differences")
    counts = "".join(f"{row['phases'].get(phase, 0):11}" for phase in phases)
    faults, differences = (row[key] for key in ("faults", "differences"))
    print(f"{name:10}{row['kills']:6}{row['runs']:6}{counts}{len(faults):8}{len(differences):13}", flush=True)
    for line in faults + differences:
        print(f"    {line}")


if __name__ == "__main__":
    main()
