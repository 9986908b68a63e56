"""Weights come back as they were written, from every format, one tensor at a time."""

import json
import tracemalloc

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import nnx, serialization, traverse_util
from weights_helpers import FORMATS, arrays, mixed, write, write_orbax

from farms_jax import FLAX_AXES, TORCH_AXES, Axes
from farms_jax._axes import LeafAxes, layer_of
from farms_jax.errors import InputError
from farms_jax.weights import TensorInfo, open_weights
from farms_jax.weights.skipped import not_weights


def check(path, expected):
    with open_weights(path) as source:
        assert list(source.tensors) == list(expected)
        for name, array in expected.items():
            found = source.read(name)
            assert (found.dtype, found.shape) == tuple(source.tensors[name]) == (array.dtype, array.shape)
            np.testing.assert_array_equal(found, array)
        return source


@pytest.mark.parametrize("form", FORMATS)
def test_arrays_come_back_in_natural_order(tmp_path, form):
    named = arrays() if form == "gguf" else mixed()  # GGUF stores neither bfloat16 nor arrays of no axes
    source = check(write(form, tmp_path, dict(reversed(named.items()))), named)
    kind = form.split("-")[0]
    assert source.format == kind
    assert getattr(source.axes, "default", source.axes) == (
        TORCH_AXES if kind == "gguf" else FLAX_AXES  # of `kernel` in safetensors, as Flax calls it
    )
    assert source.skipped == {}


def test_names_are_those_of_files_and_folders(tmp_path):
    (folder := tmp_path / "net").mkdir()
    file = write("safetensors", folder, arrays())
    assert (open_weights(file).name, open_weights(folder).name) == ("model", "net")
    assert open_weights(write("orbax-manager", folder, arrays())).name == "checkpoint, step 10"


def test_a_folder_with_shards_and_an_index(tmp_path):
    named = arrays(".")
    weight_map = {}
    for number, (name, array) in enumerate(named.items(), start=1):
        weight_map[name] = f"net-{number}-of-3.safetensors"
        safetensors.numpy.save_file({name: array}, tmp_path / weight_map[name])
    (tmp_path / "net.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    check(tmp_path, named)
    (tmp_path / "net.safetensors.index.json").unlink()
    check(tmp_path, named)


def test_the_model_counts_among_other_files(tmp_path):
    safetensors.numpy.save_file({"masks": np.ones(3, np.uint8)}, tmp_path / "masks.safetensors")
    write("safetensors", tmp_path, arrays())
    write("msgpack", tmp_path, {"other": np.ones((2, 2), np.float32)})
    check(tmp_path, arrays())


def test_the_only_weights_of_a_folder_are_found(tmp_path):
    path = write("msgpack", tmp_path, arrays())
    (tmp_path / "README.md").write_text("about")
    check(tmp_path, arrays())
    check(path.rename(tmp_path / "checkpoint_100"), arrays())  # as flax.training names them, without a suffix


def test_what_flax_writes_beside_arrays_is_passed_over(tmp_path):
    tree = {
        "params": {"w": np.ones((2, 3), np.float32)},
        "numbers": [0, 1, 127, 128, 255, 256, 65536, 2**40, -1, -32, -33, -129, -40000, -(2**40), 0.5, None, True],
        "text": ["", "short", "t" * 40, "t" * 300, "t" * 70000],
        "bytes": [b"", b"b" * 300, b"b" * 70000],
        "complex": 1 + 2j,
        "scalar": np.float16(2.5),
        "many": {str(i): {} for i in range(70000)},
        "long": list(range(70000)),
    }
    (path := tmp_path / "state.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    check(path, {"params/w": tree["params"]["w"], "scalar": np.asarray(2.5, np.float16)})


def test_orbax_arrays_of_zeros_take_no_place(tmp_path):
    zeros = {"w": np.zeros((1024, 1024), np.float32)}
    check(write("orbax-folders", tmp_path, zeros), zeros)


@pytest.mark.parametrize("form", ["orbax-zarr3", "orbax-folders"])
def test_orbax_trees_of_every_kind_of_node(tmp_path, form):
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    tree = {"list": [np.ones((2, 3)), {"deep": np.zeros(2)}], "none": None, "empty": {}, "a.b/c": np.ones(4), "i": 3}
    tree["model"] = nnx.state(model)
    with open_weights(write_orbax(form, tmp_path / "tree", tree)) as source:
        assert list(source.tensors) == ["a.b/c", "i", "list/0", "list/1/deep", "model/bias", "model/kernel"]
        np.testing.assert_array_equal(source.read("model/kernel"), np.asarray(model.kernel[...]))
        assert source.read("i") == 3


def test_several_orbax_trees_begin_with_their_names(tmp_path):
    with ocp.CheckpointManager(tmp_path / "steps", options=ocp.CheckpointManagerOptions(step_prefix="at")) as manager:
        trees = {name: ocp.args.StandardSave({"w": np.full((2, 2), i)}) for i, name in enumerate(("model", "teacher"))}
        manager.save(3, args=ocp.args.Composite(**trees, notes=ocp.args.JsonSave({"by": "me"})))
        manager.wait_until_finished()
    for path in (tmp_path / "steps", tmp_path / "steps" / "at_3"):
        with open_weights(path) as source:
            assert list(source.tensors) == ["model/w", "teacher/w"]
            assert source.read("teacher/w").max() == 1


def test_a_checkpoint_of_another_machine_opens(tmp_path):
    """Saved from a device that is not here: only the arrays count."""
    path = write("orbax", tmp_path, {name: jax.numpy.asarray(array) for name, array in arrays().items()})
    text = (path / "_sharding").read_text()
    assert "cpu:0" in text
    (path / "_sharding").write_text(text.replace("cpu:0", "TPU_9"))
    check(path, arrays())


def test_a_training_state_is_told_from_its_weights(tmp_path):
    params = {"dense": {"kernel": np.ones((3, 4), np.float32), "bias": np.ones(4, np.float32)}}
    tree = {"params": params, "batch_stats": {"bn": {"mean": np.ones(4)}}, "ema": params, "step": np.asarray(3)}
    tree["opt_state"] = serialization.to_state_dict(optax.chain(optax.adamw(1e-3), optax.trace(0.9)).init(params))
    (path := tmp_path / "state.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    with open_weights(path) as source:
        kept = [name for name in source.tensors if name not in source.skipped]
        assert kept == ["params/dense/bias", "params/dense/kernel", "step"]
        reasons = {name.split("/")[0]: reason for name, reason in source.skipped.items()}
        expected = {"batch_stats": "running statistics", "ema": "moving average of the weights"}
        assert reasons == expected | {"opt_state": "optimiser state"}


@pytest.mark.parametrize(
    ("optimizer", "skipped"), [(optax.adam(1e-3), 5), (optax.sgd(0.1, momentum=0.9), 2), (optax.lion(1e-3), 3)]
)
def test_optimiser_states_under_any_name(optimizer, skipped):
    params = {"dense": {"kernel": np.ones((3, 4), np.float32), "bias": np.ones(4, np.float32)}}
    tree = serialization.to_state_dict({"0": params, "1": optimizer.init(params)})
    flat = {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
    found = not_weights({name: TensorInfo(leaf.dtype, leaf.shape) for name, leaf in flat.items()})
    assert set(found.values()) == {"optimiser state"}
    assert len(found) == skipped
    assert all(name.startswith("1/") for name in found)


@pytest.mark.parametrize(
    "names",
    [
        ("encoder/mu/kernel", "encoder/nu/kernel", "encoder/count"),  # count is a matrix here
        ("ema/dense/kernel",),  # an average alone is the model
        ("trace/kernel", "other/weight"),
        ("mu/kernel", "nu/kernel"),
    ],
)
def test_modules_with_names_of_optimiser_states_are_weights(names):
    assert not_weights(dict.fromkeys(names, TensorInfo(np.dtype(np.float32), (3, 4)))) == {}


@pytest.mark.parametrize("form", ["safetensors", "npz", "msgpack", "msgpack-chunked"])
def test_reading_takes_the_memory_of_one_tensor(tmp_path, form):
    big = np.ones((1024, 1024), np.float32)  # 4 MiB
    path = write(form, tmp_path, {str(i): big for i in range(8)}, chunk=1 << 20)
    tracemalloc.start()
    with open_weights(path) as source:
        _, opened = tracemalloc.get_traced_memory()
        for name in source.tensors:
            source.read(name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert opened < 1 << 20
    assert peak < 1.5 * big.nbytes


def test_axes_can_be_declared_and_an_unknown_name_is_one_clear_error(tmp_path):
    with open_weights(str(write("npz", tmp_path, arrays())), axes=Axes(rows=1, cols=0)) as source:
        assert source.axes == Axes(rows=1, cols=0)
        with pytest.raises(InputError, match="no tensor head among its 3"):
            source.read("head")


STACK = np.random.default_rng(1).normal(size=(6, 5, 4, 3)).astype(np.float32)


@pytest.mark.parametrize("form", FORMATS)
def test_layers_of_a_stack_are_read_one_by_one(tmp_path, form):
    with open_weights(write(form, tmp_path, {"layers/kernel": STACK, "other": np.ones((3, 4), "f")})) as source:
        for stack in ((0,), (1,), (0, 1), (1, 0), (2, 0)):
            axes = LeafAxes((-1,), (-2,), stack)
            for index in np.ndindex(*axes.stack_shape(STACK.shape)):
                found = source.read_layer("layers/kernel", axes, index)
                np.testing.assert_array_equal(found, layer_of(STACK, axes, index))
                assert found.flags.writeable
                assert found.flags.owndata or found.base is not STACK
        source.read("other")
        assert source._held is None  # no memory is kept for a stack whose turn is over


@pytest.mark.parametrize("form", ["safetensors", "gguf", "msgpack", "msgpack-chunked"])
def test_a_layer_of_a_large_stack_takes_the_memory_of_a_layer(tmp_path, form):
    stack = np.zeros((64, 32, 1024), np.float32)  # 8 MiB
    path = write(form, tmp_path, {"experts": stack}, chunk=3 << 20)
    with open_weights(path) as source:
        axes = LeafAxes((1,), (2,), (0,))
        source.read_layer("experts", axes, (0,))  # what is imported on the way
        tracemalloc.start()
        for i in range(64):
            source.read_layer("experts", axes, (i,))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < stack.nbytes / 8


def test_layers_in_one_chunk_of_orbax_are_read_together(tmp_path):
    tree = {"stack": jax.numpy.asarray(STACK)}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", tree, save_args={"stack": ocp.SaveArgs(chunk_byte_size=STACK[:2].nbytes)})
    axes, reads = LeafAxes((3,), (2,), (0,)), []
    with open_weights(tmp_path / "c") as source:
        chunk = source._arrays["stack"][1].store.chunk_layout.read_chunk.shape
        read_from = source._read_from
        source._read_from = lambda name, store: reads.append(store.shape) or read_from(name, store)
        for i in range(6):
            np.testing.assert_array_equal(source.read_layer("stack", axes, (i,)), STACK[i])
    assert chunk[0] < 6
    assert reads == [(chunk[0], 5, 4, 3)] * (6 // chunk[0])


@pytest.mark.parametrize("name", ["default", "items"])
def test_a_step_without_a_mark_is_the_tree_that_orbax_names(tmp_path, name):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run" / "7" / name, {"w": np.ones((3, 4), np.float32)})
    with open_weights(tmp_path / "run") as source:
        assert (source.name, list(source.tensors)) == ("run, step 7", ["w"])
