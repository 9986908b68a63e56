"""Keras models as weights: `.keras` archives, `.weights.h5`, and whole models in `.h5` of all versions.

Since Keras 2.12 arrays have numbers for names, `layers/dense/vars/0`: what each of them is, its layer's class tells,
by the configuration, or by the name that Keras gives layers. Arrays of older files have names, `dense/kernel:0`.

>>> kind_of("conv2d_transpose_3", {}), kind_of("stem", {"stem": "Conv2D"}), kind_of("up", {})
('conv2d_transpose', 'conv2d', '')
"""

import contextlib
import io
import json
import re
import zipfile
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from farms_jax._axes import FLAX_AXES
from farms_jax._axis_rules import AxisRules
from farms_jax._extras import from_extra
from farms_jax._names import natural_key
from farms_jax.errors import InputError, one_line
from farms_jax.weights.reading import DOWNLOAD_AGAIN, TensorInfo, is_valid_shape
from farms_jax.weights.source import WeightSource

_MEMBER = "model.weights.h5"  # of a .keras archive
_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
_RECURRENT = ("kernel", "recurrent_kernel", "bias")
# The arrays of a layer in Keras's order, by its class.
_ROLES = {
    r"dense|einsum_dense|conv\dd(_transpose)?": ("kernel", "bias"),
    r"depthwise_conv\dd": ("depthwise_kernel", "bias"),
    r"separable_conv\dd": ("depthwise_kernel", "pointwise_kernel", "bias"),
    r"embedding": ("embeddings",),
    r"(batch|layer|group|rms)_normalization": _NORM,
    r"(lstm|gru|simple_rnn)(_cell)?": _RECURRENT,
}
_HEADS = re.compile(r"(.*[/_])?(query|key|value)(_dense)?|(.*[/_])?(attention_)?output(_dense)?")
_UNKNOWN = np.dtype("V1")
_MAX_DENSITY = 1032  # bytes that one byte of a compressed array can stand for
_SLACK = 1 << 16


class _Variable(NamedTuple):
    """An array: its place in the file, what it is called here, and what its axes count, where its class tells."""

    place: str
    name: str
    info: TensorInfo
    fault: str
    axes: dict[str, str | None]


class KerasSource(WeightSource):
    """Weights in a file of Keras, called by the names of its layers."""

    in_order = True  # of the configuration

    def __init__(self, path: Path) -> None:
        """List the arrays; values are not read."""
        self._start, config = _archive(path) if zipfile.is_zipfile(path) else (0, None)
        with _opened(path, self._start) as file:
            variables = _variables(file, config)
        if not variables:
            raise InputError(
                f"{path}: an HDF5 file, but none of Keras; save its weights alone with numpy.savez, or as safetensors"
            )
        self._places = {variable.name: variable.place for variable in variables}
        axes = {pattern: spelling for variable in variables for pattern, spelling in variable.axes.items()}
        super().__init__(
            path,
            path.name.removesuffix(".keras").removesuffix(".h5").removesuffix(".weights"),
            "keras",
            AxisRules(axes, default=FLAX_AXES),
            {variable.name: variable.info for variable in variables},
            unread={variable.name: variable.fault for variable in variables if variable.fault},
        )

    def _read(self, name: str) -> np.ndarray:
        with _opened(self.path, self._start) as file:
            array = np.asarray(file[self._places[name]][()])
        if array.shape != self.stored[name].shape:
            raise InputError(f"{self.path}: {name} has changed since it was opened; open it again")
        return array.view(self.stored[name].dtype)


class _Part(io.RawIOBase):
    """A file from one byte on, as a file of its own."""

    def __init__(self, file: io.FileIO, start: int) -> None:
        self._file, self._start = file, start
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer) or 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset + self._start * (whence == io.SEEK_SET), whence) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start


@contextlib.contextmanager
def _opened(path: Path, start: int) -> Generator[Any]:
    with from_extra("diagnose", f"{path}: a file of Keras"):
        import h5py
    try:
        with path.open("rb", buffering=0) as raw, h5py.File(_Part(raw, start), "r") as file:
            yield file
    except InputError:
        raise
    except Exception as error:  # of any kind: it depends on what is damaged
        raise InputError(
            f"{path}: damaged, not finished, or no file of Keras ({one_line(error)}); {DOWNLOAD_AGAIN}"
        ) from error


def _archive(path: Path) -> tuple[int, Any]:
    """Return where the arrays begin in a `.keras` archive, and its configuration."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(_MEMBER)
            config = json.loads(archive.read("config.json")) if "config.json" in archive.namelist() else None
            with path.open("rb") as raw:
                raw.seek(member.header_offset + 26)  # lengths of the name and of what follows it
                lengths = np.frombuffer(raw.read(4), "<u2")
    except (KeyError, ValueError, zipfile.BadZipFile, NotImplementedError, RecursionError) as error:
        raise InputError(f"{path}: no archive of Keras, or damaged ({one_line(error)}); {DOWNLOAD_AGAIN}") from error
    if member.compress_type != zipfile.ZIP_STORED:
        raise InputError(f"{path}: its arrays are compressed, as Keras does not write them; unpack it: unzip {path}")
    return member.header_offset + 30 + int(lengths.sum()), config


def _variables(file: Any, config: Any) -> list[_Variable]:
    """Return the arrays, in the order of the configuration where there is one."""
    import h5py

    if config is None and isinstance(text := file.attrs.get("model_config"), str | bytes):
        config = json.loads(text)
    classes = dict(_classes(config))
    own, found, is_old = {}, {}, "layer_names" in file.attrs or "model_weights" in file

    def note(place: str, node: Any) -> None:
        # Only what lies in this file: links to other files are not followed here.
        if isinstance(node, h5py.Dataset) and node.shape is not None:
            found[place] = node
        elif place.endswith("vars") and "name" in node.attrs and not place.startswith("optimizer"):
            own[place.removesuffix("vars").rstrip("/")] = str(node.attrs["name"])

    file.visititems(note)
    ranks = {name: rank for rank, name in enumerate(classes)}
    variables = []
    for place, dataset in sorted(found.items(), key=lambda item: natural_key(item[0])):
        if not is_old and "vars" not in place.split("/"):
            continue
        name, kind = _old_name(place, classes) if is_old else _name(place, own, classes)
        layer = name.rpartition("/")[0]
        info, fault = _info(dataset)
        axes = {re.escape(name): spelling for spelling in _spelling(name, kind, len(info.shape))}
        rank = min((ranks.get(part, len(ranks)) for part in layer.split("/")), default=0)
        variables.append((rank, _Variable(place, name, info, fault, axes)))
    names = [variable.name for _, variable in variables]
    ordered = [variable for _, variable in sorted(variables, key=lambda item: item[0])]
    # Layers of two models in one may be called alike.
    return [v._replace(name=v.place, axes={}) if names.count(v.name) > 1 else v for v in ordered]


def _classes(config: Any, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield name and class of all layers of a configuration, in its order."""
    if isinstance(config, Mapping) and depth < 100:
        own = config.get("config")
        if isinstance(own, Mapping) and isinstance(own.get("name"), str) and "class_name" in config:
            yield own["name"], str(config["class_name"])
        for value in config.values():
            yield from _classes(value, depth + 1)
    elif isinstance(config, list):
        for value in config:
            yield from _classes(value, depth + 1)


def kind_of(layer: str, classes: Mapping[str, str]) -> str:
    """Return the class of a layer in Keras's spelling of names, such as `conv2d`; empty where nothing tells it."""
    if layer in classes:
        words = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", classes[layer])
        return re.sub(r"([a-z])([A-Z])", r"\1_\2", words).lower()
    kind = re.sub(r"_\d+$", "", layer)
    return kind if any(re.fullmatch(pattern, kind) for pattern in _ROLES) else ""


def _old_name(place: str, classes: Mapping[str, str]) -> tuple[str, str]:
    """Return name and layer's class of an array in a file of Keras before 2.12, whose layers are there twice.

    >>> _old_name("model_weights/dense/dense/kernel:0", {})
    ('dense/kernel', 'dense')
    """
    parts = place.removesuffix(":0").removeprefix("model_weights/").split("/")
    parts = parts[1:] if parts[:1] == parts[1:2] else parts
    return "/".join(parts), kind_of(parts[-2], classes) if len(parts) > 1 else ""


def _name(place: str, own: Mapping[str, str], classes: Mapping[str, str]) -> tuple[str, str]:
    """Return name and layer's class of an array, by the names of its layers.

    >>> _name("layers/conv2d/vars/0", {"layers/conv2d": "stem"}, {})
    ('stem/kernel', 'conv2d')
    """
    *outer, _, number = place.split("/")
    shown = []
    for end, part in enumerate(outer, start=1):
        if (name := own.get("/".join(outer[:end]))) is not None:
            shown.append(name)
        elif part not in {"layers", "_layer_checkpoint_dependencies"} or end == len(outer):
            shown.append(part)
    names = [shown[-1], outer[-1]] if outer else []
    kind = next(filter(None, (kind_of(name, classes) for name in names)), "")
    if any(map(_HEADS.fullmatch, names)):
        kind = kind or "einsum_dense"
    roles = next((roles for pattern, roles in _ROLES.items() if re.fullmatch(pattern, kind)), ())
    role = roles[int(number)] if number.isdecimal() and int(number) < len(roles) else number
    return "/".join([*shown, role]), kind


def _spelling(name: str, kind: str, ndim: int) -> Iterator[str | None]:
    """Yield what the axes of an array count, where its layer's class says more than the layout of Keras."""
    layer, _, role = name.rpartition("/")
    if role == "depthwise_kernel" or (kind.startswith("depthwise") and role == "kernel"):
        yield None  # mixes no channels
    elif re.fullmatch(r"conv\dd_transpose", kind) and role == "kernel":
        yield "K" * (ndim - 2) + "OI"
    elif kind.startswith(("conv", "separable_conv")) and role.endswith("kernel") and ndim > 2:
        yield "K" * (ndim - 2) + "IO"
    elif ndim == 3 and role == "kernel" and (match := _HEADS.fullmatch(layer)):
        yield "IOO" if match[2] else "IIO"


def _info(dataset: Any) -> tuple[TensorInfo, str]:
    """Return the dtype and shape of an array, and why it cannot be read."""
    dtype, shape = dataset.dtype, tuple(dataset.shape)
    if dtype.kind == "V":  # NumPy lacks a name for it; Keras writes it beside the array
        told = dataset.attrs.get("dtype", "bfloat16" if dtype == np.dtype("V2") else "")
        dtype = np.dtype(getattr(ml_dtypes, str(told), _UNKNOWN))
    if dtype.hasobject or dtype.kind in "SU" or dtype == _UNKNOWN or dtype.itemsize != dataset.dtype.itemsize:
        return TensorInfo(_UNKNOWN, shape), "no array of numbers"
    size = dataset.id.get_storage_size()
    if dataset.external is not None or dataset.is_virtual or not is_valid_shape(shape, dtype.itemsize):
        return TensorInfo(dtype, shape), "its values are in another file"
    info = TensorInfo(dtype, shape)
    limit = _MAX_DENSITY * size + _SLACK if dataset.chunks else size
    return info, "" if info.nbytes <= limit else "its values are not all in the file"
