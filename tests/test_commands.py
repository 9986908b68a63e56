"""`farms` and `python -m PROGRAM`: every program starts, and a missing extra is one line that names it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import farms_jax
from farms_jax.__main__ import main
from farms_jax._extras import from_extra
from farms_jax.programs.command_line import usage
from farms_jax.programs.commands import COMMANDS

ROOT = Path(__file__).parent.parent
MODULES = {"train.cifar": "train", "prune.llama": "prune", "prune.evaluate": "prune"}
MODULES |= {"sciml.dpot": "sciml", "sciml.generate": "sciml", "sciml.convert": "sciml"}
# Runs command lines in a process where no package of an extra can be imported; prints status, output, errors of each.
WITHOUT_EXTRAS = """
import contextlib, io, json, os, runpy, sys
others = "filelock flax gguf h5py matplotlib orbax pandas PIL pooch rich safetensors tokenizers transformers tyro"
sys.modules |= dict.fromkeys(others.split())
os._exit = sys.exit  # of the programs, which would end this process
found = []
for module, *arguments in json.loads(sys.argv[1]):
    sys.argv = [module, *arguments]
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            found.append((end.code, output.getvalue(), errors.getvalue()))
print(json.dumps(found))
"""


def without_extras(*command_lines):
    program = [sys.executable, "-c", WITHOUT_EXTRAS, json.dumps(command_lines)]
    return json.loads(subprocess.run(program, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


def test_help_and_version_need_no_extra():
    (_, help_text, _), (_, version, _) = without_extras(["farms_jax", "--help"], ["farms_jax", "--version"])
    assert all(f"\n  {name} " in help_text for name in COMMANDS)
    assert version == f"farms-jax {farms_jax.__version__}\n"


def test_a_missing_extra_is_one_line_in_every_program():
    extras = {f"farms {name}": command.extra for name, command in COMMANDS.items() if command.extra} | MODULES
    lines = [["farms_jax", name.split()[1]] if name.startswith("farms ") else [name, "--help"] for name in extras]
    for (name, extra), (status, output, errors) in zip(extras.items(), without_extras(*lines), strict=True):
        assert re.fullmatch(rf'{name}: \w+ is not installed; pip install "farms-jax\[{extra}\]"\n', errors)
        assert (status, output) == (2, "")


def test_a_module_of_ours_that_is_missing_is_no_missing_extra():
    with pytest.raises(ModuleNotFoundError), from_extra("train"):
        import farms_jax.no_such_module  # noqa: F401


@pytest.mark.parametrize("arguments", [[], ["fine-tune"], ["--"]])
def test_what_is_no_command_ends_with_a_line_and_status_2(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["farms", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "farms: error: " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate", "finetune", "generate"])
def test_a_program_shows_the_command_that_was_called(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["farms", command, "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    shown = capsys.readouterr().out
    assert not end.value.code
    assert shown.startswith(f"usage: farms {command} ")
    assert f"\nfarms {command} --" in shown.replace("MODEL ", "")
    assert "python -m" not in shown


def test_usage_names_the_module_where_it_was_called_as_one():
    assert (
        usage("python -m train.cifar --tb farms", "farms_jax.train.cifar")
        == "python -m farms_jax.train.cifar --tb farms"
    )


def test_completion_knows_commands_and_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["farms", "completion", "bash"])
    main()
    script = capsys.readouterr().out
    words = "COMP_CWORD={} COMP_WORDS=(farms {}); _farms; echo ${{COMPREPLY[@]}}\n"
    asked = words.format(1, "an") + words.format(2, "analyze --expl") + words.format(2, "train --se")
    done = subprocess.run(["bash", "-c", script + asked], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["analyze", "--explain", "--seed", "--seeds"]
