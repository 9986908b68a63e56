"""A long run of the fuzzing that tests do for seconds: many damaged files, each read or refused in one line.

    python -m benchmarks.fuzz --files 100000 --seed 1 [--only gguf tokenizer] [--keep failed] [--json results.json]

Files are shared out between the readers as in the tests, where every reader has at least a few hundred. The files that
fail are kept; a failure names the command that reads its file again. The exit status is 1 where there is one.
"""

import argparse
import sys
import time
from pathlib import Path

from benchmarks._common import machine, write
from tests.faults.fuzz import Outcome, fuzz
from tests.faults.targets import TARGETS


def shared_out(files: int, only: list[str]) -> dict[str, range]:
    """Return the numbers of each reader's cases, so many in all."""
    weights = {name: target.files for name, target in TARGETS.items() if target.files and (not only or name in only)}
    total = sum(weights.values())
    return {name: range(max(1, round(files * weight / total))) for name, weight in weights.items()}


def table(outcomes: dict[str, Outcome]) -> str:
    """Return a line for each reader, and one for all."""
    every = outcomes.values()
    whole = Outcome(
        read=sum(outcome.read for outcome in every),
        refused=sum(outcome.refused for outcome in every),
        seconds=sum(outcome.seconds for outcome in every),
        slowest=max(outcome.slowest for outcome in every),
        failures=[failure for outcome in every for failure in outcome.failures],
    )
    lines = ["reader           read  refused   failed   seconds  slowest"]
    for name, o in {**outcomes, "all": whole}.items():
        lines.append(f"{name:12} {o.read:8} {o.refused:8} {len(o.failures):8} {o.seconds:9.1f} {o.slowest:8.2f}")
    return "\n".join(lines)


def main() -> None:
    """Print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], choices=sorted(TARGETS), metavar="READER")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz-failed"), help="folder for the files that fail")
    parser.add_argument("--json", default="benchmarks/results/fuzz.json")
    settings = parser.parse_args()
    start = time.perf_counter()
    outcomes = fuzz(shared_out(settings.files, settings.only), settings.seed, settings.keep)
    failures = [failure for outcome in outcomes.values() for failure in outcome.failures]
    print(table(outcomes))
    for failure in failures:
        print(failure)
    results = {
        name: {
            "read": outcome.read,
            "refused": outcome.refused,
            "failed": len(outcome.failures),
            "seconds": round(outcome.seconds, 1),
            "slowest": round(outcome.slowest, 3),
        }
        for name, outcome in outcomes.items()
    }
    elapsed = round(time.perf_counter() - start, 1)
    facts = {"machine": machine(), "seed": settings.seed, "seconds": elapsed, "readers": results}
    write(settings.json, facts | {"failures": [str(failure) for failure in failures]})
    print(f"{elapsed:.0f} s; written to {settings.json}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
