"""Files and folders of other tools, which are not read: what they are, and how their weights are had.

>>> what_it_is(Path("model.onnx"), b"")[0]
'an ONNX model'
"""

from collections.abc import Iterable
from pathlib import Path

_SAVEZ = "numpy.savez('weights.npz', **arrays)"
_ONNX = (
    "an ONNX model",
    "save its weights alone, in Python: arrays = {w.name: onnx.numpy_helper.to_array(w) for w in "
    f"onnx.load(FILE).graph.initializer}}; {_SAVEZ}",
)
_SAVED_MODEL = (
    "a SavedModel of TensorFlow, that is a program",
    "where you trust it, save its weights alone: arrays = {v.name.replace(':', '_'): v.numpy() for v in "
    f"tf.saved_model.load(FOLDER).variables}}; {_SAVEZ}; or save the model by Keras, as .keras",
)
_TF_CHECKPOINT = (
    "a checkpoint of TensorFlow",
    "save its weights alone: arrays = {name: tf.train.load_variable(FOLDER, name) for name, _ in "
    f"tf.train.list_variables(FOLDER)}}; {_SAVEZ}",
)
_CORE_ML = "a Core ML model", "give the model that it was converted from"
_TFLITE = "a TensorFlow Lite model", "give the model that it was converted from"
_ENGINE = "an engine of TensorRT", "give the model that it was built from"
_GGML = "a file of GGML before GGUF", "convert it with llama.cpp's convert_llama_ggml_to_gguf.py, or download its GGUF"
_OPENVINO = "a model of OpenVINO", "give the model that it was converted from"
_PADDLE = "a model of PaddlePaddle", f"save its weights alone: paddle.load(FILE), then {_SAVEZ}"
_SUFFIXES = {
    **dict.fromkeys((".onnx", ".ort"), _ONNX),
    ".pb": _SAVED_MODEL,
    **dict.fromkeys((".index", ".meta"), _TF_CHECKPOINT),
    **dict.fromkeys((".mlmodel", ".mlpackage", ".mlmodelc"), _CORE_ML),
    ".tflite": _TFLITE,
    **dict.fromkeys((".engine", ".plan", ".trt"), _ENGINE),
    **dict.fromkeys((".pdparams", ".pdiparams", ".pdmodel"), _PADDLE),
}
_STARTS = {b"lmgg": _GGML, b"fmgg": _GGML, b"tjgg": _GGML}
_TFLITE_MARK = slice(4, 8), b"TFL3"


def what_it_is(path: Path, start: bytes) -> tuple[str, str] | None:
    """Return what a file is, by its name or its first eight bytes, and the remedy; `None` where that is not known."""
    place, mark = _TFLITE_MARK
    if start[place] == mark:
        return _TFLITE
    if ".data-" in path.name and path.with_name(path.name.partition(".data-")[0] + ".index").exists():
        return _TF_CHECKPOINT
    if path.suffix in {".xml", ".bin"} and {path.with_suffix(end).is_file() for end in (".xml", ".bin")} == {True}:
        return _OPENVINO
    return _STARTS.get(start[:4]) or _SUFFIXES.get(path.suffix)


def what_is_in(path: Path, filenames: Iterable[str]) -> tuple[str, str] | None:
    """Return what a folder is, and the remedy; `None` where that is not known."""
    names = list(filenames)
    if "saved_model.pb" in names:
        return _SAVED_MODEL
    if any(name.endswith(".index") for name in names) and any(".data-" in name for name in names):
        return _TF_CHECKPOINT
    if path.suffix in {".mlpackage", ".mlmodelc"}:
        return _CORE_ML
    return next((found for name in names if (found := _SUFFIXES.get(Path(name).suffix))), None)
