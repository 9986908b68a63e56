"""How quantised weights are stored, a rule for each way, and the arithmetic that gives the weights back.

Every function finds the weight that one stored array holds: its name, shape and parts, and `decode`, which makes the
float32 weight of the parts, whole or of one index of the first axes. `None` says that the array is none of the rule's;
a text, why the weight cannot be told.
"""

import json
import math

import numpy as np

from farms_jax.weights import packing
from farms_jax.weights.quantised_parts import Stored, Weight

_BYTES, _INT32 = np.dtype(np.uint8), np.dtype(np.int32)
_UNSAID = "quantised, but no config.json beside it says with how many bits and in what groups"


def gptq(stored: Stored) -> Weight | str | None:
    """GPTQ (Frantar et al. 2022) as AutoGPTQ and GPTQModel write it: packed along the inputs, zeros one too low.

    `qweight` is (inputs * bits / 32, outputs), `qzeros` and `scales` have a row for each group, `g_idx` tells each
    input's group. W = scales[g] * (q - zeros[g]), with zeros + 1 but in the format `gptq_v2`.

    Returns:
        The weight, why it cannot be told, or `None`.
    """
    parts = stored.beside(zeros="qzeros", scales="scales", groups="g_idx")
    method, size = stored.config.get("quant_method"), stored.config.get("group_size")
    if not stored.name.endswith("qweight") or method == "awq" or stored.info.dtype != _INT32:
        return None
    layout = stored.config.get("checkpoint_format", "gptq")
    if method != "gptq" or layout not in {"gptq", "gptq_v2"} or not parts.keys() >= {"zeros", "scales"}:
        return None if method else _UNSAID
    rows, outputs = stored.info.shape
    bits = stored.config.get("bits")
    if "groups" in parts:
        inputs = stored.tensors[parts["groups"]].shape[0]
        bits = bits if not inputs else 32 * rows // inputs  # single layers may have bits of their own
    if type(bits) is not int or not 1 <= bits <= 8:
        return _UNSAID
    inputs = 32 * rows // bits
    count, columns = stored.tensors[parts["scales"]].shape
    if columns != outputs:
        return "quantised by GPTQ, in an order that is not known here, such as that of a GPU's kernel"
    if "groups" not in parts and size is None:
        return _UNSAID

    def decode(
        qweight: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray | None = None
    ) -> np.ndarray:
        group = np.arange(inputs) // -(-inputs // count) if groups is None else groups
        zero = packing.unpacked(zeros, bits)[:, :outputs].astype(np.float32) + (layout == "gptq")
        numbers = packing.unpacked(qweight.T, bits).T[: len(group)]
        return ((numbers - zero[group]) * scales.astype(np.float32)[group]).T

    return stored.weight(
        (outputs, inputs), {"qweight": stored.name} | parts, decode, f"GPTQ {bits} bit", stored.renamed("weight")
    )


_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the eight numbers of an integer are, in their order


def awq(stored: Stored) -> Weight | str | None:
    """AWQ (Lin et al. 2023) as AutoAWQ writes it ("gemm"): four bits, packed along the outputs, interleaved."""
    parts = stored.beside(zeros="qzeros", scales="scales")
    if not stored.name.endswith("qweight") or stored.config.get("quant_method") != "awq":
        return None
    version = str(stored.config.get("version", "gemm")).lower()
    if version != "gemm" or stored.config.get("bits", 4) != 4 or len(parts) < 2:
        return f"quantised by AWQ ({version}), whose rule is not known here"
    inputs, columns = stored.info.shape
    if stored.tensors[parts["scales"]].shape[1] != 8 * columns:
        return "quantised by AWQ, in an order that is not known here, such as that of a GPU's kernel"

    def numbers(words: np.ndarray) -> np.ndarray:
        return packing.unpacked(words, 4).reshape(len(words), -1, 8)[..., _AWQ_ORDER].reshape(len(words), -1)

    def decode(qweight: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
        size = len(qweight) // len(scales)
        centred = numbers(qweight) - np.repeat(numbers(zeros).astype(np.float32), size, axis=0)
        return (centred * np.repeat(scales.astype(np.float32), size, axis=0)).T

    name = stored.renamed("weight")
    return stored.weight((8 * columns, inputs), {"qweight": stored.name} | parts, decode, "AWQ 4 bit", name)


def bitsandbytes_int8(stored: Stored) -> Weight | None:
    """LLM.int8() of bitsandbytes (Dettmers et al. 2022): W = weight * SCB / 127, row by row."""
    parts = stored.beside(scales="SCB")
    if stored.info.dtype != np.int8 or not parts:
        return None

    def decode(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
        return weight * (scales.astype(np.float32) / 127)[:, None]

    return stored.weight(stored.info.shape, {"weight": stored.name} | parts, decode, "bitsandbytes int8")


def bitsandbytes_4bit(stored: Stored) -> Weight | str | None:
    """NF4 and FP4 of bitsandbytes (Dettmers et al. 2023): numbers are places in a table, scaled in blocks.

    Bytes hold two numbers, the first in the upper half. Scales of blocks may be quantised themselves.

    Returns:
        The weight, why it cannot be told, or `None`.
    """
    parts = stored.beside(
        scales="+.absmax", table="+.quant_map", nested_scales="+.nested_absmax", nested_table="+.nested_quant_map"
    )
    kinds = stored.beside(**{kind: f"+.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")})
    if not kinds or not parts.keys() >= {"scales", "table"}:
        return None
    kind, holder = next(iter(kinds.items()))
    try:
        state = json.loads(stored.read(holder).tobytes().decode())
        shape, size = tuple(map(int, state["shape"])), int(state["blocksize"])
        nested_size, offset = int(state.get("nested_blocksize") or 1), float(state.get("nested_offset") or 0)
    except (ValueError, KeyError, TypeError):
        return "quantised by bitsandbytes, with a description that is damaged"
    if math.prod(stored.info.shape) * 2 < math.prod(shape) or size < 1 or nested_size < 1:
        return "quantised by bitsandbytes, with a description that does not fit"

    def decode(
        weight: np.ndarray,
        scales: np.ndarray,
        table: np.ndarray,
        nested_scales: np.ndarray | None = None,
        nested_table: np.ndarray | None = None,
    ) -> np.ndarray:
        if nested_scales is not None and nested_table is not None:
            scales = nested_table[scales] * np.repeat(nested_scales, nested_size)[: len(scales)] + offset
        octets = weight.view(np.uint8).reshape(-1)
        numbers = np.stack([octets >> 4, octets & 15], axis=-1).reshape(-1)[: math.prod(shape)]
        values = table.astype(np.float32)[numbers]
        return (values * np.repeat(scales.astype(np.float32), size)[: len(values)]).reshape(shape)

    method = f"bitsandbytes {kind.upper()}"
    return stored.weight(shape, {"weight": stored.name} | parts, decode, method)


_MLX_SCALED = {
    "mxfp4": (4, packing.fp4, packing.powers_of_two),
    "nvfp4": (4, packing.fp4, packing.float8),
    "mxfp8": (8, packing.float8, packing.powers_of_two),
}


def mlx(stored: Stored) -> Weight | str | None:
    """MLX: numbers packed along the inputs; W = numbers * scales + biases in groups, or floats with scales alone."""
    parts = stored.beside(scales="scales", offsets="biases")
    if stored.info.dtype != np.uint32 or "scales" not in parts:
        return None
    told = _mlx_settings(stored)
    if told is None:
        return _UNSAID
    bits, size, mode = told
    *outer, words = stored.info.shape
    inputs, shape = words * 32 // bits, stored.tensors[parts["scales"]].shape
    if shape != (*outer, inputs // size) or inputs % size:
        return f"quantised by MLX, but its scales {list(shape)} are none of {bits} bits in groups of {size}"

    def decode_affine(weight: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        return packing.in_groups(packing.unpacked(weight, bits), scales, offsets)

    def decode_floats(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
        _, numbers, powers = _MLX_SCALED[mode]
        return packing.in_groups(numbers(np.ascontiguousarray(weight).view(np.uint8)), powers(scales))

    is_affine = mode == "affine" and "offsets" in parts
    if not is_affine and (mode not in _MLX_SCALED or bits != _MLX_SCALED[mode][0]):
        return f"quantised by MLX ({mode}), whose rule is not known here"
    decode = decode_affine if is_affine else decode_floats
    return stored.weight((*outer, inputs), {"weight": stored.name} | parts, decode, f"MLX {mode} {bits} bit")


def _mlx_settings(stored: Stored) -> tuple[int, int, str] | None:
    """Return bits, group size and mode of a weight: its own where its module has some."""
    own = stored.config.get(stored.name.rpartition(".")[0])
    settings = {**stored.config, **(own if isinstance(own, dict) else {})}
    bits, size, mode = settings.get("bits"), settings.get("group_size"), settings.get("mode", "affine")
    if type(bits) is not int or type(size) is not int or not (1 <= bits <= 8 and size > 0):
        return None
    return bits, size, str(mode)


def compressed_integers(stored: Stored) -> Weight | str | None:
    """compressed-tensors, "pack-quantized": integers packed along the inputs, stored without a sign."""
    parts = stored.beside(scales="weight_scale", zeros="weight_zero_point", groups="weight_g_idx")
    shapes = stored.beside(shape="weight_shape")
    if not (stored.name.endswith("weight_packed") and stored.info.dtype == _INT32 and shapes and "scales" in parts):
        return None
    shape = tuple(int(size) for size in stored.read(shapes["shape"]))
    inputs, words = (shape or (0,))[-1], stored.info.shape[-1]
    fitting = [bits for bits in range(1, 9) if len(shape) > 1 and words == -(-inputs * bits // 32)]
    if len(fitting) != 1 or stored.info.shape[:-1] != shape[:-1]:
        return "quantised by compressed-tensors, in a shape that is not known here"
    (bits,), middle = fitting, 2.0 ** (fitting[0] - 1)

    def decode(
        packed: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None, groups: np.ndarray | None = None
    ) -> np.ndarray:
        numbers = packing.unpacked(packed, bits)[..., :inputs].astype(np.float32)
        if groups is None:
            groups = np.arange(inputs) // -(-inputs // scales.shape[-1])
        if zeros is None:
            centre = np.float32(middle)
        else:  # packed along the outputs
            turned = packing.unpacked(zeros.swapaxes(-1, -2), bits).swapaxes(-1, -2)
            centre = turned[..., : scales.shape[-2], :].astype(np.float32)[..., groups]
        return (numbers - centre) * scales.astype(np.float32)[..., groups]

    name, method = stored.renamed("weight"), f"compressed-tensors {bits} bit"
    return stored.weight(shape, {"packed": stored.name} | parts, decode, method, name)


def hqq(stored: Stored) -> Weight | str | None:
    """HQQ: W = (numbers - zero) * scale, in groups that are rows or columns; a byte holds numbers of far-off rows."""
    parts = stored.beside(scales="scale", zeros="zero")
    told = stored.beside(bits="nbits", shape="shape")
    if not stored.name.endswith("W_q") or len(parts) < 2 or "shape" not in told:
        return None
    bits, shape = int(stored.read(told["bits"])) if "bits" in told else 0, tuple(map(int, stored.read(told["shape"])))
    if (
        bits not in {1, 2, 4, 8}
        or stored.info.dtype != _BYTES
        or math.prod(stored.info.shape) * 8 != (math.prod(shape) * bits)
    ):
        return f"quantised by HQQ with {bits} bits, whose rule is not known here"

    def decode(packed: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        rows = [packed >> shift & (2**bits - 1) for shift in range(8 - bits, -1, -bits)]
        numbers = np.concatenate(rows).astype(np.float32)
        return ((numbers - zeros.astype(np.float32)) * scales.astype(np.float32)).reshape(shape)

    name = stored.renamed("weight")
    return stored.weight(shape, {"packed": stored.name} | parts, decode, f"HQQ {bits} bit", name)


def aqlm(stored: Stored) -> Weight | None:
    """AQLM (Egiazarian et al. 2024): a block of weights is a sum of vectors, one of each codebook, times a scale.

    `codes` (output groups, input groups, codebooks) are places in `codebooks` (codebooks, vectors, outputs, inputs of a
    group), as signed integers.

    Returns:
        The weight, or `None`.
    """
    parts = stored.beside(codebooks="codebooks", scales="scales")
    if not stored.name.endswith("codes") or len(parts) < 2 or stored.info.dtype.kind != "i":
        return None
    rows, columns, count = stored.info.shape
    books, length, outputs, inputs = stored.tensors[parts["codebooks"]].shape
    if books != count or np.prod(stored.tensors[parts["scales"]].shape) not in {rows, rows * columns}:
        return None

    def decode(codes: np.ndarray, codebooks: np.ndarray, scales: np.ndarray) -> np.ndarray:
        places = codes.astype(np.int64) % length
        blocks = np.zeros((rows, columns, outputs, inputs), np.float32)
        for book in range(count):
            blocks += codebooks[book].astype(np.float32)[places[..., book]]
        blocks *= scales.astype(np.float32).reshape(rows, -1, 1, 1)
        return blocks.swapaxes(1, 2).reshape(rows * outputs, columns * inputs)

    method, name = f"AQLM {count}x{(length - 1).bit_length()} bit", stored.renamed("weight")
    return stored.weight((rows * outputs, columns * inputs), {"codes": stored.name} | parts, decode, method, name)
