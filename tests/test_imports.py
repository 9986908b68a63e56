"""The core stands alone, and imports run one way."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOW = ["errors", "_extras", "_present", "_figures", "_names", "_modules", "_axes", "_default_axes", "_axis_rules"]
FLOW += ["_torch_axes", "axis_rules"]
FLOW += [
    "_windows",
    "marchenko_pastur",
    "_scaling",
    "_tail",
    "mappings",
    "_report",
    "programs",
    "solvers",
    "_layers",
    "_analyze",
]
FLOW += ["multihost", "_lr_scale", "_measure", "_factors", "_tempbalance", "_alphadecay", "_htmuon", "_sparsity"]
FLOW += ["weights", "diagnosis", "__main__"]


def test_core_loads_no_framework():
    others = ["flax", "torch", "tyro", "matplotlib", "orbax", "tensorstore", "gguf", "pandas", "rich"]
    others += ["msgpack", "safetensors", "scipy.stats", "train", "prune", "sciml", "experiments"]
    program = "import sys, numpy, farms_jax.diagnosis.pipeline as p; p.opened({'w': numpy.ones((2, 3))}); "
    program += f"print([m for m in {others} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def modules():
    """Every file of the core and of the programs by module name; without the packages' own."""
    paths = [path for package in ("farms_jax", "train", "prune", "sciml") for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths if path.stem != "__init__"}


def imports_of(name, known):
    """Modules among the known ones that a module imports, anywhere in it: in functions and for type checking too."""
    for node in ast.walk(ast.parse(known[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            package = name.split(".")[: -node.level] if node.level else []
            module = ".".join(filter(None, [*package, node.module]))
            named = [module] if module in known else [f"{module}.{alias.name}" for alias in node.names]
            yield from (one for one in named if one in known)


def test_a_core_file_imports_only_files_above_it():
    core = {name: path for name, path in modules().items() if name.startswith("farms_jax.")}
    assert {name.split(".")[1] for name in core} == set(FLOW)
    for name in core:
        for other in imports_of(name, core):
            above, below = (FLOW.index(module.split(".")[1]) for module in (other, name))
            assert above < below or (above == below and name.count(".") > 1), (name, other)


def test_there_are_no_circles():
    known = modules()
    graph = {name: set(imports_of(name, known)) for name in known}
    assert sum(map(len, graph.values())) > len(graph)
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
