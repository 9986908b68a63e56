"""What the README shows is what happens."""

import ast
import contextlib
import io
import re
from pathlib import Path

import numpy as np

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(code):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "README.md", "exec"), {})
    return output.getvalue()


def test_measuring_prints_the_table_shown():
    code, *_ = blocks("python")
    shown, *_ = blocks("text")
    found, expected = run(code).split(), shown.split()
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        if re.fullmatch(r"[\d.e+]+", theirs):
            np.testing.assert_allclose(float(ours), float(theirs), rtol=0.01)
        else:
            assert ours == theirs


def test_per_layer_rates_run():
    _, code, _ = blocks("python")
    assert "lr_scale" not in run(code)
    assert "dense_2" in run(code)


def test_sparsities_meet_the_budget():
    *_, code = blocks("python")
    sparsity = ast.literal_eval(run(code))
    assert len(sparsity) == 8
    np.testing.assert_allclose(np.mean(list(sparsity.values())), 0.7)


def test_commands_of_the_first_screen():
    first_screen = "\n".join(README.splitlines()[:30])
    commands = re.findall(r"```bash\n(.*?)```", first_screen, re.DOTALL)
    assert len(commands) == 2
    assert all(command.startswith("python3 -m venv .venv && .venv/bin/pip install") for command in commands)
    assert "train.cifar --tb farms" in commands[0]
    assert "pytest" in commands[1]
