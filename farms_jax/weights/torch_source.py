"""Tensors of Torch as weights: of files, and of modules and state dicts in memory."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from farms_jax._axes import LeafAxes, layer_of
from farms_jax._axis_rules import AxisRules
from farms_jax._torch_axes import of_classes, torch as torch_axes
from farms_jax.errors import InputError, one_line
from farms_jax.weights.reading import TensorInfo
from farms_jax.weights.source import WeightSource
from farms_jax.weights.torch_file import checksums, import_torch, load, refuse_programs
from farms_jax.weights.torch_tree import Found, tensors_in

_UNKNOWN = np.dtype("V1")  # of tensors without values in any dtype of NumPy


class TorchSource(WeightSource):
    """Tensors of Torch, on any device and of any layout, converted one by one; quantised ones are dequantised."""

    in_order = True  # of registration

    def __init__(self, path: Path, name: str, format: str, found: Iterable[Found], files: Sequence[Path] = ()) -> None:
        """Take the tensors; `files` are those that they are mapped from, which must not change meanwhile."""
        self._tensors: dict[str, Any] = {}
        found_checksums = [checksums(file) for file in files]
        self._checksums = set().union(*found_checksums) if all(found_checksums) else set()
        self._sound: set[int] = set()  # storages, by their places in memory
        self._versions = {file: _version(file) for file in files}
        skipped: dict[str, str] = {}
        unread: dict[str, str] = {}
        classes: dict[str, tuple[str, ...]] = {}
        firsts: dict[Any, str] = {}
        for item in found:
            full = item.name or "tensor"
            while full in self._tensors:  # a key with a dot in it
                full += "'"
            self._tensors[full], classes[full] = item.tensor, item.classes
            first = firsts.setdefault(_place(item.tensor), full)
            if reason := item.left_out or ("" if first == full else f"the same as {first}"):
                skipped[full] = reason
            elif reason := _fault(item.tensor):
                unread[full] = reason

        def axes(weights: Mapping[str, TensorInfo]) -> AxisRules:
            made = {name: classes[next(iter(weight.parts.values()))] for name, weight in self._weights.items()}
            return of_classes(torch_axes(weights), classes | made, weights)

        infos = {full: _info(tensor) for full, tensor in self._tensors.items()}
        super().__init__(path, name, format, axes, infos, unread=unread, skipped=skipped)

    def _read(self, name: str) -> np.ndarray:
        return self._values(name, self._tensors[name])

    def _read_part(self, name: str, axes: LeafAxes, index: tuple[int, ...]) -> np.ndarray | None:
        return self._values(name, layer_of(self._tensors[name], axes, index))

    def _values(self, name: str, tensor: Any) -> np.ndarray:
        # Pages that are no longer in a mapped file would end the process.
        if changed := [file for file, version in self._versions.items() if _version(file) != version]:
            raise InputError(f"{changed[0]}: has changed since it was opened; open it again")
        self._check(name, tensor)
        try:
            return _as_numpy(tensor, self.stored[name].dtype)
        except (RuntimeError, TypeError, ValueError, MemoryError) as error:
            raise InputError(f"{self.path}: {name} cannot be read ({one_line(error)}); leave it out") from error

    def _check(self, name: str, tensor: Any) -> None:
        """Compare the bytes of a tensor with the checksums of the files, which Torch does not where it maps them."""
        import torch

        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):  # of sparse tensors: they are parts that have their own
            return
        if not self._checksums or storage.device.type != "cpu" or storage.data_ptr() in self._sound:
            return
        content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data
        if len(content) and (len(content), zlib.crc32(content)) not in self._checksums:
            raise InputError(f"{self.path}: {name} is damaged: its checksum is another; download or save it again")
        self._sound.add(storage.data_ptr())


def open_torch(path: Path, *more: Path) -> TorchSource:
    """Open a file of `torch.save`, or all shards of a model.

    Returns:
        The open weights.

    Raises:
        InputError: Torch is not installed, a file cannot be read safely, or there are no tensors.
    """
    paths = [path, *more]
    for each in paths:
        refuse_programs(each)
    import_torch(paths)
    try:
        found = [item for each in paths for item in tensors_in(load(each))]
    except RuntimeError as error:  # nested without end, or a tensor of a kind that has no shape
        raise InputError(
            f"{path}: its tensors cannot be listed ({one_line(error)}); save a state dict alone"
        ) from error
    folder = path.resolve().parent
    name = folder.name if more else path.stem.removesuffix(".pth")  # of .pth.tar
    return TorchSource(folder if more else path, name, "torch", found, paths)


def _version(file: Path) -> tuple[int, ...]:
    try:
        status = file.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _place(tensor: Any) -> Any:
    """Return what tells the values of two tensors apart."""
    try:
        start = tensor.data_ptr()
        return (start, tensor.dtype, tensor.shape, tensor.stride()) if start and tensor.numel() else object()
    except (RuntimeError, ValueError, NotImplementedError):  # sparse ones, and those that are spread over devices
        return object()


def _fault(tensor: Any) -> str:
    """Return why a tensor has no values; empty where it has."""
    if _info(tensor).dtype == _UNKNOWN:
        return f"not initialised, or no array of NumPy ({tensor.dtype})"
    return "no values: on the device meta" if tensor.device.type == "meta" else ""


def _info(tensor: Any) -> TensorInfo:
    name = "float32" if tensor.is_quantized else str(tensor.dtype).removeprefix("torch.")
    name = {"complex32": "complex64"}.get(name, name)
    try:
        dtype = np.dtype(getattr(ml_dtypes, name) if name.startswith(("bfloat16", "float8")) else name)
        return TensorInfo(dtype, tuple(tensor.shape))
    except (AttributeError, TypeError, RuntimeError):  # packed in less than a byte; nested, or not initialised
        return TensorInfo(_UNKNOWN, ())


def _as_numpy(tensor: Any, dtype: np.dtype[Any]) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):  # spread over devices
        tensor = tensor.full_tensor()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.dtype == torch.complex32:
        tensor = tensor.cfloat()
    if dtype.isbuiltin != 1:  # NumPy knows them by ml_dtypes, Torch does not
        bits = tensor.contiguous().view(torch.int16 if dtype.itemsize == 2 else torch.uint8)
        return bits.numpy(force=True).view(dtype).copy()
    return np.array(tensor.numpy(force=True), order="C")
