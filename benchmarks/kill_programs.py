"""The programs that `benchmarks.kill` kills: tiny inputs, command lines, and what their runs leave on the disk."""

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image

from farms_jax.programs.files import CHECKSUMS, damaged_files

_TIMES = ("seconds", "peak_memory", "date")  # in names of what differs from run to run
_IN_THE_MAKING = {"model.part"}
_PNG_END = b"IEND\xaeB`\x82"


class Program(ABC):
    """A program with tiny settings, whose runs are told apart by the folder that they are in.

    Attributes:
        name: of the module.
        effort: XLA's level of optimisation, the lowest that is right and does not make runs longer: most of a tiny
            run's time goes into compiling. (At 0 the gradient of a VGG is wrong, jaxlib 0.10.)
    """

    name: str
    effort = 1

    def __init__(self, inputs: Path) -> None:
        """Write what it reads.

        Args:
            inputs: folder for it.
        """
        self.inputs = inputs
        inputs.mkdir(parents=True)

    @abstractmethod
    def settings(self) -> list[Any]:
        """Return the command line of a new run, without the folder for it."""

    def command(self, out: Path) -> list[str]:
        """Return what begins a run in a folder, or goes on with the one that is there."""
        return [sys.executable, "-m", self.name, *map(str, self.settings()), "--out", str(out)]

    @abstractmethod
    def mark(self, out: Path) -> int:
        """Return how far a run is, as its files say: a number that grows, and that a kill does not lower."""

    def is_writing(self, out: Path) -> bool:
        """Tell whether there is something half written; a model in the making always is, and does not count."""
        return any(_is_part(Path(path.name)) and path.name not in _IN_THE_MAKING for path in out.rglob("*"))

    def faults(self, out: Path) -> list[str]:
        """Find what is not as it must be at any moment: all files that have their final name are whole.

        Args:
            out: folder of a run that was killed.

        Returns:
            A line for each fault.
        """
        files = [path for path in out.rglob("*") if path.is_file() and not _is_part(path.relative_to(out))]
        found = [f"{path}: {error}" for path in files if (error := _fault(path))]
        return found + [
            f"{file} is damaged" for path in files if path.name == CHECKSUMS for file in damaged_files(path.parent)
        ]

    @abstractmethod
    def result(self, out: Path) -> dict[str, Any]:
        """Read what a finished run came to, all but times: bytes or what JSON knows, by name."""


def _is_part(path: Path) -> bool:
    return any(name.endswith(".part") or ".part." in name or "-tmp" in name for name in path.parts)


def _fault(path: Path) -> str:
    """What is wrong with a file; nothing if it is whole."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png" and not path.read_bytes().endswith(_PNG_END):
            return "cut off"
        elif path.suffix == ".npz":
            with np.load(path) as file:
                [file[name] for name in file]
        elif path.suffix == ".hdf5":
            read_hdf5(path)
    except Exception as error:  # noqa: BLE001 (whatever a damaged file comes to)
        return f"{type(error).__name__}: {error}"
    return ""


def _without_times(content: Any) -> Any:
    if isinstance(content, Mapping):
        kept = {key: value for key, value in content.items() if not any(word in key for word in _TIMES)}
        return {key: _without_times(value) for key, value in kept.items()}
    return [_without_times(value) for value in content] if isinstance(content, list) else content


def _json(path: Path) -> Any:
    return _without_times(json.loads(path.read_text()))


def _files(folder: Path, names: Iterable[str] = ("*",)) -> dict[str, bytes]:
    paths = [path for name in names for path in folder.rglob(name) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


class _Training(Program):
    """A program whose runs are gone on with by `--resume`, and have a directory for each training."""

    def command(self, out: Path) -> list[str]:
        """Return what begins a run in a folder, or goes on with the one that is there."""
        begun = sorted(out.glob("*/config.json"))  # killed before it was written, a run is started anew
        resume = [sys.executable, "-m", self.name, "--resume", str(begun[0].parent)] if begun else []
        return resume or super().command(out)

    def mark(self, out: Path) -> int:
        """Return the sum of the steps of the last checkpoints, and of the files that are written after them."""
        # No "**", which looks into folders that may be gone in between.
        folders = [folder for depth in ("*", "*/*") for folder in out.glob(f"*/{depth}/checkpoints/last")]
        steps = sum(max(map(int, _steps(folder)), default=0) for folder in folders)
        return steps + len([*out.glob("*/*.png"), *out.glob("*/summary.json")])

    def faults(self, out: Path) -> list[str]:
        """Find what is not whole, checkpoints too."""
        kept = [kind / step for kind in out.rglob("checkpoints/*") if kind.is_dir() for step in _steps(kind)]
        return super().faults(out) + [f"{path}: no checksums" for path in kept if not (path / CHECKSUMS).exists()]

    def result(self, out: Path) -> dict[str, Any]:
        """Read metrics, layers, checkpoints and weights of all trainings, the summary, and which plots there are."""
        (run,) = (path.parent for path in out.glob("*/config.json"))
        found: dict[str, Any] = {"summary.json": _json(run / "summary.json")}
        found["plots"] = sorted(path.name for path in run.glob("*.png"))
        found |= _files(run, ("layers.csv", "*.safetensors"))
        for path in run.rglob("metrics.jsonl"):
            if "checkpoints" not in path.parts:
                lines = map(json.loads, path.read_text().splitlines())
                found[str(path.relative_to(run))] = [_without_times(line) for line in lines]
        for kind in run.glob("**/checkpoints/*"):
            newest = max(_steps(kind), key=int)
            found |= {f"{kind.relative_to(run)}/{newest}/{k}": v for k, v in _arrays(kind / newest).items()}
        return found


def _steps(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.isdecimal()]


def _arrays(checkpoint: Path) -> dict[str, bytes]:
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(checkpoint.resolve() / "default")
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in jax.tree.leaves_with_path(tree)}


class Train(_Training):
    """Training of a small VGG on images of noise."""

    name = "train.cifar"

    def __init__(self, inputs: Path) -> None:
        """Write the images."""
        super().__init__(inputs)
        noise = np.random.default_rng(0)
        for split, count in (("train", 128), ("test", 32)):
            for label in "ab":
                folder = inputs / "images" / split / label
                folder.mkdir(parents=True)
                for number in range(count // 2):
                    image = noise.integers(0, 256, (32, 32, 3), np.uint8)
                    Image.fromarray(image).save(folder / f"{number}.png")

    def settings(self) -> list[Any]:
        """Return the command line of a new run, without the folder for it."""
        data = ["--dataset", f"folder:{self.inputs / 'images'}", "--data-dir", self.inputs / "cache"]
        network = ["--model", "vgg16", "--width", 0.0625, "--learning-rate", 0.02]
        return [*data, *network, "--batch-size", 16, "--epochs", 10]


class FineTune(_Training):
    """Pretraining and fine-tuning of DPOT on waves that travel."""

    name = "sciml.dpot"
    effort = 0

    def __init__(self, inputs: Path) -> None:
        """Write the fields."""
        super().__init__(inputs)
        for seed, name in enumerate(("fine", "pre")):
            write_waves(inputs / f"{name}.hdf5", seed)

    def settings(self) -> list[Any]:
        """Return the command line of a new run, without the folder for it."""
        data = ["--data", self.inputs / "fine.hdf5", "--pretrain-data", self.inputs / "pre.hdf5"]
        network = ["--model", "mini", "--resolution", 8, "--patch-size", 4]
        return [*data, *network, "--batch-size", 4, "--pretrain-epochs", 2, "--epochs", 3, "--tb", "farms"]


def write_waves(path: Path, seed: int, *, count: int = 10, steps: int = 12, size: int = 8) -> None:
    """Write fields in PDEBench's layout."""
    x = np.linspace(0, 2 * np.pi, size, endpoint=False)
    time = 0.3 * np.arange(steps)[:, None, None]
    phase = np.random.default_rng(seed).uniform(0, 6, (4, count, 1, 1, 1))
    waves = np.sin(x[:, None] - time + phase) * np.cos(x + phase)  # (4, N, T, X, Y)
    with h5py.File(path, "w") as file:
        for channel, (name, mean) in enumerate({"Vx": 0, "Vy": 0, "density": 2, "pressure": 5}.items()):
            file[name] = (mean + waves[channel]).astype(np.float32)
        file["t-coordinate"] = np.arange(steps + 1, dtype=np.float32)
        for name in ("x-coordinate", "y-coordinate"):
            file[name] = x.astype(np.float32)


def read_hdf5(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read all datasets and attributes of an HDF5 file."""
    with h5py.File(path) as file:
        arrays = {name: np.asarray(dataset) for name, dataset in file.items()}
        return arrays, {name: np.asarray(value).item() for name, value in file.attrs.items()}


class Prune(Program):
    """Pruning of the bundled language model, on tokens drawn at random."""

    name = "prune.llama"

    def __init__(self, inputs: Path) -> None:
        """Write the tokens."""
        super().__init__(inputs)
        for seed, (name, count) in enumerate({"calibration": 32, "text": 8}.items()):
            np.save(inputs / f"{name}.npy", np.random.default_rng(seed).integers(0, 2048, (count, 64)))

    def settings(self) -> list[Any]:
        """Return the command line of a new run, without the folder for it."""
        texts = ["--calibration", self.inputs / "calibration.npy", "--text", self.inputs / "text.npy"]
        return [*texts, "--samples", 32, "--length", 64, "--per-axis", 3]

    def mark(self, out: Path) -> int:
        """Return how many stages and blocks are on record, and how many files are written after them."""
        record = next((json.loads(path.read_text()) for path in out.glob("*/progress.json")), {})
        return len(record) + len(record.get("written", ())) + len([*out.glob("*/*.png"), *out.glob("*/*.csv")])

    def result(self, out: Path) -> dict[str, Any]:
        """Read the model, the table of layers and the card."""
        (run,) = (path.parent for path in out.glob("*/run.json"))
        found = _files(run, ("*",))
        written = ("model/", "masks.safetensors", "layers.csv")
        kept = {name: content for name, content in found.items() if name.startswith(written)}
        return {**kept, "files": sorted(found), "run.json": _json(run / "run.json")}


class Generate(Program):
    """Generation of a data set of flows."""

    name = "sciml.generate"

    def settings(self) -> list[Any]:
        """Return the command line of a new run, without the folder for it."""
        return ["--size", 32, "--steps", 3, "--end", 0.4, "--count", 128, "--seed", 3]

    def mark(self, out: Path) -> int:
        """Return how many shards there are."""
        return len(list(out.glob("*.parts/*.npz")))

    def result(self, out: Path) -> dict[str, Any]:
        """Read numbers and attributes of the file, and which files there are."""
        (path,) = out.glob("*.hdf5")
        arrays, attributes = read_hdf5(path)
        found: dict[str, Any] = {name: array.tobytes() for name, array in arrays.items()}
        found["shapes"] = {name: f"{array.dtype} {array.shape}" for name, array in arrays.items()}
        return {**found, "attributes": attributes, "files": sorted(child.name for child in out.iterdir())}


PROGRAMS: dict[str, type[Program]] = {"train": Train, "fine-tune": FineTune, "prune": Prune, "generate": Generate}
