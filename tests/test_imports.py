"""The core stands alone, and imports run one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOW = ["errors", "program", "files", "plots", "_names", "_matrices", "_windows", "_tail", "mappings", "_report"]
FLOW += ["rundir", "marchenko_pastur", "_lapack", "_host", "_esd", "_analyze", "_lr_scale", "_sparsity", "_tempbalance"]


def test_core_loads_no_framework():
    others = ["flax", "torch", "tyro", "matplotlib", "orbax", "train", "prune", "sciml"]
    program = f"import sys, farms_jax; print([m for m in {others} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_core_file_imports_only_files_above_it():
    files = {path.stem: path for path in (ROOT / "farms_jax").glob("*.py") if path.stem != "__init__"}
    assert set(files) == set(FLOW)
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("farms_jax"):
                parts = node.module.split(".")
                imported = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
                assert all(FLOW.index(other) < FLOW.index(name) for other in imported), (name, imported)


@pytest.mark.parametrize("package", ["train", "prune", "sciml"])
def test_programs_do_not_import_each_other(package):
    others = {"train", "prune", "sciml"} - {package}
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not others & {name.split(".")[0] for name in imported}, path


def test_public_names_are_documented():
    import farms_jax

    public = [name for name in dir(farms_jax) if not name.startswith("_")]
    assert "analyze" in public
    assert all(getattr(farms_jax, name).__doc__ for name in public if callable(getattr(farms_jax, name)))
