"""The core stands alone, and imports run one way."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOW = ["errors", "_extras", "_present", "_figures", "_names", "_axes", "_windows", "_tail", "mappings", "_report"]
FLOW += [
    "programs",
    "marchenko_pastur",
    "solvers",
    "_layers",
    "_analyze",
    "multihost",
    "_lr_scale",
    "_sparsity",
    "_tempbalance",
]
FLOW += ["weights", "diagnosis", "__main__"]


def test_core_loads_no_framework():
    others = ["flax", "torch", "tyro", "matplotlib", "orbax", "tensorstore", "gguf", "pandas", "rich"]
    others += ["scipy.stats", "train", "prune", "sciml", "experiments"]
    program = f"import sys, farms_jax; print([m for m in {others} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def modules():
    """The files of the core by module name, `diagnosis.page` for those of a package; without the packages' own."""
    files = {path.relative_to(ROOT / "farms_jax"): path for path in (ROOT / "farms_jax").rglob("*.py")}
    return {".".join(name.with_suffix("").parts): path for name, path in files.items() if path.stem != "__init__"}


def imports_of(path):
    """Modules of the core that a file imports, anywhere in it: in functions and for type checking too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "farms_jax":
            parts = node.module.split(".")[1:]
            if parts and ".".join(parts) in modules():
                yield ".".join(parts)
            else:
                yield from (".".join([*parts, alias.name]) for alias in node.names)


def test_a_core_file_imports_only_files_above_it():
    assert {name.split(".")[0] for name in modules()} == set(FLOW)
    for name, path in modules().items():
        for other in imports_of(path):
            above, below = (FLOW.index(module.split(".")[0]) for module in (other, name))
            assert above < below or (above == below and "." in name), (name, other)


def test_the_core_has_no_cycles():
    graph = {name: set(imports_of(path)) & set(modules()) for name, path in modules().items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)  # or CycleError


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
