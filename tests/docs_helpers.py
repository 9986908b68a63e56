"""Reads the pages of the documentation, and runs what they show."""

import argparse
import functools
import inspect
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import NamedTuple

import tyro

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
PROGRAMS = (
    "python",
    "python3",
    "pip",
    "pytest",
    "farms",
    "mkdocs",
    ".venv/bin/python",
    ".venv/bin/pip",
    ".venv/bin/pytest",
)


class Block(NamedTuple):
    """A fenced block: its language, its text, and whether it comes straight after the one before it."""

    language: str
    text: str
    follows: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found, end = [], 0
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        found.append(Block(match[1], match[2], bool(found) and not text[end : match.start()].strip()))
        end = match.end()
    return found


def notebook_cells(path: Path) -> list[tuple[str, str]]:
    """The cells of code of a notebook, each with what it shows as printed."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return [
        ("".join(cell["source"]), "".join(line for output in cell["outputs"] for line in output.get("text", ())))
        for cell in cells
    ]


def inline_commands(page: Path) -> list[str]:
    """Commands within sentences and tables."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    spans = [re.sub(r"\s+", " ", span).replace("\\|", "|") for span in re.findall(r"`([^`]+)`", prose)]
    return [span for span in spans if re.match(r"(python -m|pip install|farms \w+) ", span)]


def commands(script: str, folder: Path) -> list[list[str]]:
    """Run a shell script in a folder where every program only writes down how it was called, and does nothing.

    Returns:
        Programs with their arguments, in the order of the calls; a program that is not in PROGRAMS is an error.
    """
    folder = folder.absolute()
    log = folder / "calls"
    for name in PROGRAMS:
        path = folder / (name if "/" in name else f"bin/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/bash\n(printf "%s\\0" {name} "$@"; echo) >> {shlex.quote(str(log))}\n')
        path.chmod(0o755)
    log.write_text("")
    shell = ["/bin/bash", "-eu", "-c", script]
    subprocess.run(shell, cwd=folder, env={"PATH": str(folder / "bin")}, check=True, capture_output=True, text=True)
    return [line.split("\0")[:-1] for line in log.read_text().splitlines()]


class Parsed(BaseException):  # not an Exception, so that no program catches it
    """A program has understood its command line."""


def check(command: list[str], monkeypatch) -> None:
    """Fail where a command would not be understood: an extra, module, option or file that is not there."""
    match [command[0].removeprefix(".venv/bin/"), *command[1:]]:
        case ["pip", "install", *arguments]:
            named = [match[1] for text in arguments if (match := re.search(r"(?:^\.|farms-jax)\[([\w,-]+)\]", text))]
            assert {extra for names in named for extra in names.split(",")} <= EXTRAS, command
        case ["pytest", *arguments]:
            assert all((ROOT / text).exists() for text in arguments if text.startswith("tests/")), command
        case ["python" | "python3", "-m", "venv", ".venv"] | ["mkdocs", "build" | "serve", *_]:
            pass
        case ["python", "-m", module, *arguments]:
            understood(module, arguments, monkeypatch)
        case ["farms", *arguments]:
            understood("farms_jax", arguments, monkeypatch)
        case _:
            raise AssertionError(f"not a command that the documentation knows: {command}")


def understood(module: str, arguments: list[str], monkeypatch) -> None:
    """Run a program of this repository up to the point where its command line is understood."""

    def then_stop(parse):
        def parsed(what, *args, **kwargs):
            if inspect.isfunction(what):  # tyro calls it with what it has parsed
                what = functools.wraps(what)(lambda *args, **kwargs: None)
            raise Parsed(parse(what, *args, **kwargs))

        return parsed

    def parse_known(*args, plain=argparse.ArgumentParser.parse_known_args):
        options, rest = plain(*args)
        if getattr(options, "resume", None) is not None and not rest:
            raise Parsed  # before it looks for the run
        return options, rest

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the module may have been imported before
        patch.setattr(sys, "argv", [module, *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_args", then_stop(argparse.ArgumentParser.parse_args))
        patch.setattr(tyro, "cli", then_stop(tyro.cli))
        patch.setattr(tyro.extras, "subcommand_cli_from_dict", then_stop(tyro.extras.subcommand_cli_from_dict))
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known)
        patch.setattr(os, "_exit", sys.exit)  # of the programs, which would end the tests
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except Parsed:
            return
        except SystemExit as end:
            assert not end.code, (module, arguments)


def assert_shown(shown: str, found: str) -> None:
    """Compare what is shown with what was printed.

    Words are equal, numbers to 1 % or the last digit shown; `...` stands for anything.
    """
    position, words = 0, found.split()
    for part in re.split(r"^\.\.\.$", shown, flags=re.MULTILINE):
        expected = part.split()
        places = range(position, len(words) - len(expected) + 1)
        start = next((i for i in places if all(map(_alike, expected, words[i : i + len(expected)]))), None)
        assert start is not None, f"shown:\n{part}\nfound:\n{found}"
        assert "..." in shown or (start, len(expected)) == (0, len(words)), f"shown:\n{shown}\nfound:\n{found}"
        position = start + len(expected)


def _alike(expected: str, word: str) -> bool:
    try:
        a, b = float(expected.strip("(),%±")), float(word.strip("(),%±"))
    except ValueError:
        return expected == word
    last_decimal = 10.0 ** -len(expected.strip("(),%±").partition(".")[2]) if "." in expected else 0.0
    return abs(a - b) <= max(0.01 * abs(a), 0.01 * abs(b), last_decimal) + 1e-9
