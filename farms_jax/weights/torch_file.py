"""Files that `torch.save` wrote, read by Torch's own loader of weights: no code in them is ever run.

Besides tensors such files have whatever a training put beside them: command lines, metrics, whole modules. Torch's
loader (`torch.load(weights_only=True)`) refuses a file with any class that it does not know; here a class without
behaviour stands for each of them, so that the tensors can be read and nothing else happens.
"""

import _compat_pickle
import pickle
import pickletools
import re
import shlex
import sys
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from farms_jax.errors import InputError, MissingPackageError, one_line

_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # what a file from before Torch 1.6 starts with
_LEGACY_PICKLES = 4  # of such a file: that number, a version, the machine, and the content
_BLOCKED = {"os", "posix", "nt", "sys"}  # modules that Torch refuses even where it is told to allow them
# Programs, by what is in their archives only: what they are, and how their weights are had.
_SCRIPT = "a TorchScript archive", "torch.jit.load(FILE).state_dict()"
_EXPORT = "an archive of torch.export", "torch.export.load(FILE).state_dict"
_PROGRAMS = {"constants.pkl": _SCRIPT, "archive_format": _EXPORT, "serialized_exported_program.json": _EXPORT}
_MOST_TRIES = 20  # classes in one file that hold entries

# For any Python with torch and safetensors. No `!`, `$`, backtick or double quote: a shell has it between such.
_CONVERSION = (
    "import collections, sys, torch, zipfile; from safetensors.torch import save_file; "
    "files, s = sys.argv[1:-1], torch.serialization; "
    "inert = type('Inert', (), {'__init__': lambda self, *given: None, '__setstate__': lambda self, state: None}); "
    "named = type('Named', (), {'__new__': lambda *given: collections.OrderedDict()}); "
    "s.add_safe_globals([(inert if name.startswith('numpy') else named, name) for name in "
    "{name for file in files if zipfile.is_zipfile(file) for name in s.get_unsafe_globals_in_checkpoint(file)} | "
    "{'argparse.Namespace', 'numpy.dtype', 'numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar'}]); "
    "dense = lambda x: (x.dequantize() if x.is_quantized else x).detach().to_dense(); "
    "flat = lambda x, at: {at[1:]: dense(x).clone(memory_format=torch.contiguous_format)} "
    "if isinstance(x, torch.Tensor) and x.device.type == 'cpu' else {name: x for key, part in "
    "({**x._parameters, **x._buffers, **x._modules}.items() if hasattr(x, '_modules') else "
    "x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else ()) "
    "for name, x in flat(part, f'{at}.{key}').items()}; "
    "tensors = {name: x for file in files for name, x in "
    "flat(torch.load(file, map_location='cpu', weights_only=True), '').items()}; "
    "save_file(tensors or sys.exit('no tensors in it'), sys.argv[-1])"
)


class Inert:
    """What stands for an object of a class that a file names: its attributes, and no behaviour."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take whatever the class takes."""

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes, if the state is of such."""
        if isinstance(state, dict):
            vars(self).update(state)


def load(path: Path) -> Any:
    """Return the content of a file of `torch.save`: tensors on CPU, in dicts, lists and `Inert` objects.

    Tensors of files since Torch 1.6 are mapped: they take no memory until they are read.

    Raises:
        InputError: Torch is not installed, or the file is damaged, or of a kind that cannot be read safely.
    """
    torch = import_torch([path])
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True, "mmap": _can_be_mapped(path)}
    try:
        # Damaged indices of sparse tensors would end the process later.
        with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants():
            warnings.simplefilter("ignore")
            try:
                return torch.load(path, **options)
            except pickle.UnpicklingError:
                return _load_with_stand_ins(path, options)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: cannot be read without running code in it ({_reason(error)}); load it where you trust it, and "
            "save its weights alone: torch.save(model.state_dict(), 'weights.pt')"
        ) from error
    except InputError:
        raise
    except Exception as error:  # of any kind: it depends on what is damaged
        raise InputError(
            f"{path}: damaged, not finished, or no file of torch.save ({one_line(error)}); save it again"
        ) from error


def _reason(error: pickle.UnpicklingError) -> str:
    """Return what Torch's loader says, without its advice."""
    text = re.split(r"WeightsUnpickler error: |\n\n", str(error).partition("\n\nCheck the doc")[0])[-1]
    text = " ".join(text.split()).removeprefix("Weights only load failed. ").partition(" In PyTorch ")[0]
    return one_line(ValueError(text))


def import_torch(paths: Sequence[Path]) -> Any:
    """Import Torch to read files; the error without it says how to convert them."""
    try:
        import torch
    except ImportError as error:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        fault = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not work ({one_line(error)})"
        raise MissingPackageError(
            f"{paths[0]}{more}: saved by torch, which {fault}",
            ': pip install "farms-jax[torch]", or convert it where torch (2.6 or later) and safetensors are: '
            f"{conversion_command(paths)}",
        ) from error
    return torch


def conversion_command(paths: Sequence[Path]) -> str:
    """Return a command that writes all tensors of files of Torch to one safetensors file beside them."""
    name = re.sub(r"(-\d+-of-\d+)?(\.(pth|pt|bin|ckpt|pkl|tar))*$", "", paths[0].name)
    files = " ".join(shlex.quote(str(path)) for path in [*paths, paths[0].with_name(f"{name}.safetensors")])
    return f'python -c "{_CONVERSION}" {files}'


def is_archive(path: Path) -> bool:
    """Return whether a file is a zip archive, sound or not."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def is_torch_file(path: Path) -> bool:
    """Return whether a file's content is that of `torch.save`, `torch.jit.save` or `torch.export.save`."""
    if is_archive(path):
        try:
            return not {"data.pkl", *_PROGRAMS}.isdisjoint(_members(path))
        except InputError:  # damaged, as opening it will say
            return True
    with path.open("rb") as file:
        return file.read(len(_LEGACY)) == _LEGACY


def _members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the members of an archive by their names, without the folders that they are in."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {member.filename.rpartition("/")[2]: member for member in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise InputError(f"{path}: damaged, or not finished ({one_line(error)}); save it again") from error


def refuse_programs(path: Path) -> None:
    """Raise an `InputError` for an archive of Torch that holds a program."""
    for name, (what, state) in _PROGRAMS.items():
        if is_archive(path) and name in _members(path):
            raise InputError(
                f"{path}: {what}, that is a program, which is never run; where you trust it, save its weights alone: "
                f"torch.save({state}, 'weights.pt')"
            )


def checksums(path: Path) -> set[tuple[int, int]]:
    """Return (bytes, CRC-32) of all that a file's archive holds; nothing where Torch checks it, or there is no CRC."""
    if not _can_be_mapped(path):
        return set()
    members = _members(path)
    # It is 0 where none were computed (`torch.serialization.set_crc32_options`); bytes of another order are swapped.
    if (order := members.get("byteorder")) and zlib.crc32(sys.byteorder.encode()) != order.CRC:
        return set()
    return {(member.file_size, member.CRC) for member in members.values()}


def _can_be_mapped(path: Path) -> bool:
    if not is_archive(path):
        return False
    return all(member.compress_type == zipfile.ZIP_STORED for member in _members(path).values())


def _load_with_stand_ins(path: Path, options: dict[str, Any]) -> Any:
    import torch

    stand_ins = {name: _stand_in(name) for name in _classes(path)}
    for _ in range(_MOST_TRIES):
        try:
            with torch.serialization.safe_globals([(kind, name) for name, kind in stand_ins.items()]):
                return torch.load(path, **options)
        except pickle.UnpicklingError as error:
            # Dictionaries and lists of other classes: their entries are only put into Python's own.
            refused = re.search(r"Can only (SETITEM|append|extend).*but got <class '([^']+)'>", str(error))
            if refused is None or refused[2] not in stand_ins:
                raise
            stand_ins[refused[2]] = _stand_in(refused[2], OrderedDict if refused[1] == "SETITEM" else list)
        except TypeError as error:
            raise InputError(
                f"{path}: it has tensors of another package's class, such as torchao's quantised ones "
                f"({one_line(error)}); where that package is, save what they stand for: torch.save({{name: "
                "w.dequantize() if hasattr(w, 'dequantize') else w for name, w in torch.load(FILE, "
                "weights_only=False).items()}, 'weights.pt')"
            ) from error
    raise pickle.UnpicklingError("too many classes with entries")


def _stand_in(name: str, container: Any = None) -> type:
    module, _, kind = name.rpartition(".")
    own: dict[str, Any] = {"__module__": module}
    if container is not None:
        own["__new__"] = lambda *_, **__: container()
    return type(kind, (Inert,), own)


def _classes(path: Path) -> set[str]:
    """Return full names of the classes and functions in a file, in the way that Torch spells them."""
    names = {str(name) for code, name, _ in _operations(path) if code.name == "GLOBAL"}
    found = set()
    for module, _, attribute in (name.partition(" ") for name in names):
        # Python 2's names, which Torch still writes.
        module, attribute = _compat_pickle.NAME_MAPPING.get(
            (module, attribute), (_compat_pickle.IMPORT_MAPPING.get(module, module), attribute)
        )
        if module not in _BLOCKED and not module.startswith("torch.distributed."):  # shards: Torch says so
            found.add(f"{module}.{attribute}")
    return found


def _operations(path: Path) -> Iterator[Any]:
    if is_archive(path):
        member = _members(path)["data.pkl"]
        with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
            yield from pickletools.genops(stream.read())
    else:
        with path.open("rb") as file:
            for _ in range(_LEGACY_PICKLES):
                yield from pickletools.genops(file)
