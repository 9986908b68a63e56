"""DPOT's checkpoints: read without running code, checked tensor by tensor, under Torch's names and layouts on disk."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from farms_jax import named_leaves
from farms_jax.errors import InputError, listed, one_line, printable
from farms_jax.programs.files import atomic
from farms_jax.weights.conversion import Shape, mismatches
from farms_jax.weights.reading import check_name
from farms_jax.weights.safetensors_file import read_layout
from farms_jax.weights.safetensors_source import SafetensorsSource
from farms_jax.weights.torch_file import load as load_torch

from .conversion import COMPONENTS, TABLE, component_of
from .model import NAMED, ModelConfig, Params, make_network


def read(path: Path) -> dict[str, np.ndarray]:
    """Return a state dict: Torch's name -> array, float32, in Torch's layout.

    A `.pth` or `.pt` file needs Torch, and holds a state dict, or one under "model" as the published checkpoints do.
    A "module." before every name is dropped.

    Raises:
        InputError: the file is missing, of another kind, damaged, or with values that are not finite.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a .safetensors or .pth checkpoint")
    if path.suffix == ".safetensors":
        source = SafetensorsSource(path)
        raw = {name: source.read(name) for name in source.tensors}
    elif path.suffix in {".pth", ".pt"}:
        raw = _read_torch(path)
    else:
        raise InputError(f"{path}: not a kind of checkpoint that can be read; give a .safetensors or .pth file")
    state: dict[str, np.ndarray] = {}
    for name, value in raw.items():
        array = np.asarray(value, np.float32)
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {name} has values that are NaN or infinite; use a checkpoint from before that")
        state[name.removeprefix("module.")] = array
    return state


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    content = load_torch(path)
    import torch

    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f'{path}: holds no state dict, by itself or under "model"; give a checkpoint of DPOT')
    for name in state:
        check_name(str(name), str(path))
    return {str(name): value.float().numpy() for name, value in state.items()}


def _expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return the shape of every parameter of a model, by path."""
    skeleton = jax.eval_shape(make_network(config).init, jax.random.key(0))
    return {path: leaf.shape for path, leaf in named_leaves(skeleton)}


def _faults(
    found: Mapping[str, np.ndarray], expected: Mapping[str, Shape], unknown: Mapping[str, np.ndarray] | None = None
) -> dict[str, str]:
    """Return by Torch's name how parameters, by path, differ from those a model needs; under "" the number of blocks.

    `unknown` are tensors, by Torch's name, that have no path.
    """
    shapes = {_torch_name(path): array.shape for path, array in found.items()}
    shapes |= {name: array.shape for name, array in (unknown or {}).items()}
    faults = mismatches(shapes, {_torch_name(path): shape for path, shape in expected.items()})
    depth, expected_depth = _depth(found), _depth(expected)
    if depth in {0, expected_depth}:
        return faults
    return {"": f"{depth} blocks, the model has {expected_depth}"} | faults  # first, as it explains those after it


def _torch_name(path: str) -> str:
    row = TABLE.by_path(path)
    return row.name if row else path


def _depth(paths: Iterable[str]) -> int:
    return len({path.split("/")[1] for path in paths if path.startswith("blocks/")})


def _place_all(state: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return arrays by our path, in our layout, and those that no row of the table knows, by name."""
    rows = {name: TABLE.by_name(name) for name in state}
    arrays = {
        str(row.path): np.ascontiguousarray(row.to_ours(state[name]), np.float32) for name, row in rows.items() if row
    }
    return arrays, {name: state[name] for name, row in rows.items() if row is None}


def from_torch(state: Mapping[str, np.ndarray], config: ModelConfig) -> Params:
    """Return a state dict as parameters, float32; one InputError names all tensors that are not the model's."""
    arrays, unknown = _place_all(state)
    if faults := _faults(arrays, _expected_shapes(config), unknown):
        raise InputError(f"state dict: {listed(faults.values())}. Use the configuration that it was saved from")
    return unflatten_dict(arrays, sep="/")


def to_torch(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """Return parameters as a state dict that DPOT's own code loads: Torch's name -> array, float32, contiguous."""
    arrays = {path: np.asarray(leaf, np.float32) for path, leaf in named_leaves(params)}
    if faults := _faults(arrays, _expected_shapes(config)):
        raise InputError(f"parameters: {listed(faults.values())}. Use the configuration that they belong to")
    rows = {path: TABLE.by_path(path) for path in arrays}
    return {row.name: np.ascontiguousarray(row.layout.to_theirs(arrays[path])) for path, row in rows.items() if row}


def save(path: Path, params: Params, config: ModelConfig) -> None:
    """Write a safetensors file atomically, with Torch's names and layouts and the configuration in its metadata."""
    # One entry only: safetensors writes several in random order, and equal weights should be equal files.
    metadata = {"config": json.dumps(dataclasses.asdict(config))}
    state = to_torch(params, config)
    with atomic(path) as part:
        try:
            save_file(state, part, metadata)
        except SafetensorError as error:  # a full disk among others
            raise InputError(f"{path}: cannot be written ({error}); make room, then --resume goes on") from error


def load(
    path: Path, config: ModelConfig, params: Params, components: tuple[str, ...] = ("all",)
) -> tuple[Params, list[str]]:
    """Return parameters with some components replaced by a checkpoint's, and notes on what was adapted.

    `params` are arrays or their shapes; those replaced are float32 arrays. A position embedding of another resolution
    is interpolated bilinearly.

    Raises:
        InputError: a component is unknown or not in the checkpoint or the model; tensors do not fit.
    """
    chosen = _chosen(components)
    state = read(path)
    arrays, unknown = _place_all(state)
    expected = _expected_shapes(config)
    notes = _resize_positions(arrays, expected["pos_embed"]) if "pos" in chosen else []
    given = {p: array for p, array in arrays.items() if component_of(p) in chosen}
    wanted = {p: shape for p, shape in expected.items() if component_of(p) in chosen}
    if "all" not in components:
        unknown = {}
        for component in components:
            for where, paths in ((f"{path}", given), ("the model", wanted)):
                if component not in map(component_of, paths):
                    raise InputError(f"{path}: component {component}: {where} has none; leave it out of the components")
    if faults := _faults(given, wanted, unknown):
        raise InputError(f"{path}: {listed(faults.values())}. {_remedy(faults, chosen, state)}")
    replaced = {p: jnp.asarray(given[p]) if p in given else leaf for p, leaf in named_leaves(params)}
    return unflatten_dict(replaced, sep="/"), notes + _differences(path, config)


def _chosen(components: tuple[str, ...]) -> set[str]:
    known = f"choose from all, {', '.join(COMPONENTS)}"
    if not components:
        raise InputError(f"components: none given; {known}")
    for component in components:
        if component not in {"all", *COMPONENTS}:
            raise InputError(f"component {component!r}: unknown; {known}")
    return set(COMPONENTS if "all" in components else components)


def _remedy(faults: Iterable[str], chosen: set[str], state: Mapping[str, np.ndarray]) -> str:
    faulty = {component_of(str(row.path)) for row in map(TABLE.by_name, faults) if row}
    rest = [component for component in COMPONENTS if component in chosen - faulty]
    named = fitting_name(state)
    remedy = f"It is a checkpoint of the model {named}: use that, or " if named else "Use the model that it is of, or "
    if not rest or not faulty:
        return f"{remedy}another checkpoint"
    return f"{remedy}leave out {', '.join(sorted(faulty))}: components {' '.join(rest)}"


def _resize_positions(arrays: dict[str, np.ndarray], shape: tuple[int, ...]) -> list[str]:
    old = arrays.get("pos_embed")
    if old is None or old.ndim != 3 or old.shape == shape or old.shape[2] != shape[2]:
        return []
    # As torch.nn.functional.interpolate, which does not smooth before it makes an array smaller.
    arrays["pos_embed"] = np.asarray(jax.image.resize(old, shape, "bilinear", antialias=False))
    return [f"position embedding interpolated from {old.shape[0]} x {old.shape[1]} to {shape[0]} x {shape[1]} patches"]


def _differences(path: Path, config: ModelConfig) -> list[str]:
    """Return notes on settings that no shape shows, but our files record, and that differ from the model's."""
    if path.suffix != ".safetensors":
        return []
    try:
        saved = dict(json.loads(read_layout(path).metadata.get("config", "{}")))
    except (ValueError, TypeError, RecursionError):  # written by somebody else
        return []
    return [
        f"{name}: the checkpoint was trained with {printable(str(saved[name]))}, the model has {getattr(config, name)}"
        for name in ("modes", "activation")
        if saved.get(name, getattr(config, name)) != getattr(config, name)
    ]


def infer_config(state: Mapping[str, np.ndarray]) -> ModelConfig:
    """Return a model's configuration by the shapes of a state dict; `modes` and `activation` have their defaults."""
    arrays, _ = _place_all(state)
    try:
        side, _, inputs, hidden = arrays["patch_embed/patches/kernel"].shape
        latent, _, width = arrays["pos_embed"].shape
        outputs = (hidden - 3) // side  # see ModelConfig.patch_width
        mlp_width = len(arrays["blocks/0/mlp/fc1/bias"])
        ratio = mlp_width / width
        if int(width * ratio) < mlp_width:  # rounded down
            ratio = math.nextafter(ratio, math.inf)
        config = ModelConfig(
            image_size=latent * side,
            patch_size=side,
            in_channels=inputs - 3,  # less the coordinates x, y, t
            out_channels=outputs,
            in_steps=len(arrays["time_agg/w"]),
            out_steps=len(arrays["out_layer/conv2/bias"]) // outputs,
            width=width,
            depth=_depth(arrays),
            num_blocks=arrays["blocks/0/filter/w1"].shape[1],
            mlp_ratio=ratio,
            out_width=len(arrays["out_layer/conv1/bias"]),
            num_classes=len(arrays["cls_head/fc3/bias"]),
            normalize="scale_mu/kernel" in arrays,
            time_aggregation="exp_mlp" if "time_agg/gamma" in arrays else "mlp",
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        fault = f"it lacks {error.args[0]}" if isinstance(error, KeyError) else one_line(error)
        raise InputError(f"not of a DPOT model: {fault}; give a whole checkpoint of DPOT") from error
    config.check()
    return config


def fitting_name(state: Mapping[str, np.ndarray]) -> str | None:
    """Return the name of the published model that has a state dict's shapes; `None` if none has."""
    try:
        config = infer_config(state)
    except InputError:
        return None
    return next((name for name, named in NAMED.items() if named == config), None)
