"""The core stands alone, and imports run one way."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOW = ["files", "_names", "_matrices", "_windows", "_tail", "mappings", "_report", "_lapack"]
FLOW += ["_host", "_esd", "_analyze", "_lr_scale", "_sparsity", "_tempbalance"]


def test_core_loads_no_framework():
    others = ["flax", "torch", "tyro", "matplotlib", "train"]
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


def test_public_names_are_documented():
    import farms_jax

    public = [name for name in dir(farms_jax) if not name.startswith("_")]
    assert "analyze" in public
    assert all(getattr(farms_jax, name).__doc__ for name in public if callable(getattr(farms_jax, name)))
