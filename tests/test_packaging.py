"""What an install brings: all files of the packages under one name, and nothing else of the repository."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("farms_jax", "train", "prune", "sciml")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def installed(path):
    """Path in an install of a file or folder of the repository: `train/cifar.py` lies in `farms_jax/train`."""
    return path if path.parts[0] == "farms_jax" else PurePosixPath("farms_jax", path)


def files(root):
    for package in PACKAGES:
        paths = (path for path in (root / package).rglob("*") if path.is_file() and path.suffix != ".pyc")
        yield from (PurePosixPath(path.relative_to(root).as_posix()) for path in paths)


def test_every_package_is_listed():
    packages = {".".join(installed(path.parent).parts) for path in files(ROOT) if path.name == "__init__.py"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages


def test_users_are_free_in_their_choice_of_torch():
    extras = PROJECT["project"]["optional-dependencies"]
    requirements = [*PROJECT["project"]["dependencies"], *(line for lines in extras.values() for line in lines)]
    assert not [line for line in requirements if "==" in line]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkout")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    return root


def build(checkout, kind):
    """Build a `wheel`, `sdist` or `editable`, and return its path."""
    program = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=checkout, capture_output=True, text=True, check=True)
    return checkout / "dist" / done.stdout.splitlines()[-1]


def test_a_wheel_holds_every_file_of_the_packages_under_one_name(checkout):
    expected = {str(installed(path)) for path in files(checkout)}
    with zipfile.ZipFile(build(checkout, "wheel")) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected
    assert {"farms_jax/py.typed", "farms_jax/prune/bundled/model.safetensors", "farms_jax/train/cifar.py"} < found


def test_a_wheel_can_be_built_from_an_sdist(checkout):
    with tarfile.open(build(checkout, "sdist")) as sdist:
        inner = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in sdist.getnames()}
    assert set(map(str, files(checkout))) <= inner


def test_an_editable_install_makes_no_generic_name_importable(checkout):
    with zipfile.ZipFile(build(checkout, "editable")) as wheel:
        contents = {name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" not in name}
    (finder,) = (text for name, text in contents.items() if name.endswith("_finder.py"))
    mapped = re.findall(r"'([\w.]+)': ", re.search(r"^MAPPING.*", finder, re.MULTILINE)[0])
    assert set(mapped) == {"farms_jax", "farms_jax.train", "farms_jax.prune", "farms_jax.sciml"}
    (path_file,) = (text for name, text in contents.items() if name.endswith(".pth"))
    assert path_file.startswith("import ")  # a line of code; any other would be a folder of the search path
