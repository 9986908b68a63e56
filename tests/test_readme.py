"""What the README promises beyond what `test_docs` checks of every page."""

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


def test_sparsities_meet_the_budget():
    *_, code = blocks("python")
    sparsity = ast.literal_eval(run(code))
    assert len(sparsity) == 8
    np.testing.assert_allclose(np.mean(list(sparsity.values())), 0.7)


def test_commands_of_the_first_screen():
    first_screen = "\n".join(README.splitlines()[:45])
    install, run, test = re.findall(r"```bash\n(.*?)```", first_screen, re.DOTALL)
    assert install.startswith("pip install")
    assert all(command.startswith("python3 -m venv .venv && .venv/bin/pip install") for command in (run, test))
    assert "train.cifar --tb farms" in run
    assert "pytest" in test
