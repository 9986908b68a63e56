"""Quantised weights that are numbers of at most a byte times scales: FP8, int8, ternary, four-bit floats.

As in `quantised_rules`, every function finds the weight that one stored array holds.
"""

import re

import numpy as np

from farms_jax.weights import packing
from farms_jax.weights.quantised_parts import Stored, Weight
from farms_jax.weights.reading import TensorInfo

_BYTES = np.dtype(np.uint8)


def scaled(stored: Stored) -> Weight | str | None:
    """FP8 and int8 with scales, for all, for each row or in blocks: DeepSeek, compressed-tensors, FBGEMM, ModelOpt.

    W = weight * scale, also where the scale is called an inverse; with zero points, (weight - zero) * scale.

    Returns:
        The weight, why it cannot be told, or `None`.
    """
    dtype = stored.info.dtype
    scales = stored.beside(
        a="+_scale_inv", b="+_scale", c="scale_weight", d="weight_scale", e="_scale", f="scale", g="qscale_weight"
    )
    if not (dtype == np.int8 or dtype.name.startswith(("float8_e4m3", "float8_e5m2"))) or not scales:
        return None
    if dtype == np.int8 and not {"b", "e"} & scales.keys():
        return None
    name = next(iter(scales.values()))
    parts = {"weight": stored.name, "scales": name} | stored.beside(zeros="+_zero_point")
    return _times_scales(stored, parts, stored.name.removesuffix("._data"))  # quanto: `weight._data`, `weight._scale`


def torchao(stored: Stored) -> Weight | str | None:
    """Integers and FP8 of torchao, whose tensors transformers writes as `_weight_qdata`, `_weight_scale` and the like.

    Integers of any bits are known where each has a byte. Those of four bits, two to a byte, are told by their zero
    points, which are floats.

    Returns:
        The weight, why it cannot be told, or `None`.
    """
    match = re.fullmatch(r"(?P<module>.*[./])?_(?P<weight>\w+)_qdata", stored.name)
    if match is None:
        return None
    stem, dtype = stored.name.removesuffix("_qdata"), stored.info.dtype
    beside = {role: f"{stem}_{role}" for role in ("scale", "zero_point")}
    infos = {role: stored.tensors[name] for role, name in beside.items() if name in stored.tensors}
    rows = {1, stored.info.shape[0]}
    is_whole = dtype.name.startswith("float8_") or (dtype == np.int8 and infos["zero_point"].dtype == np.int8)
    if not is_whole or infos["scale"].shape[0] not in rows or infos["scale"].dtype.itemsize < 2:
        return f"quantised by torchao, of which FP8 and integers of a byte each are known here; this is {dtype}, packed"
    parts = {"weight": stored.name, "scales": beside["scale"]}
    parts |= {"zeros": beside["zero_point"]} if "zero_point" in infos else {}
    return _times_scales(stored, parts, (match["module"] or "") + match["weight"])


def _times_scales(stored: Stored, parts: dict[str, str], name: str) -> Weight | str:
    """Return (weight - zeros) * scales, the scales for all, for each row or for blocks."""
    dtype, shape, scales_shape = stored.info.dtype, stored.info.shape, stored.tensors[parts["scales"]].shape
    sizes = packing.block_sizes(shape, scales_shape, stored.config.get("weight_block_size"))
    if sizes is None or parts["scales"] == stored.name:
        return f"{dtype} with scales of shape {list(scales_shape)}, which do not fit its shape"

    def decode(weight: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None) -> np.ndarray:
        if scales.dtype == _BYTES:
            scales = packing.powers_of_two(scales)
        if zeros is not None:
            weight = weight - packing.in_blocks(np.ones(weight.shape, np.float32), zeros.reshape(scales.shape), sizes)
        return packing.in_blocks(weight, scales, sizes)

    return stored.weight(shape, parts, decode, "int8" if dtype == np.int8 else "FP8", name)


def bitnet(stored: Stored) -> Weight | None:
    """BitNet b1.58 (Ma et al. 2024) of transformers: -1, 0 and 1, four to a byte along the outputs, one scale for all.

    Number i of a byte is of row i * rows + row. The scale is divided by, but in `AutoBitLinear`.

    Returns:
        The weight, or `None`.
    """
    parts = stored.beside(scale="weight_scale")
    if stored.config.get("quant_method") != "bitnet" or stored.info.dtype != _BYTES or not parts:
        return None
    if not stored.name.endswith("weight") or stored.tensors[parts["scale"]].shape not in {(), (1,)}:
        return None
    divides = stored.config.get("linear_class", "bitlinear") != "autobitlinear"
    rows, inputs = stored.info.shape

    def decode(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
        numbers = np.concatenate([packed >> shift & 3 for shift in (0, 2, 4, 6)]).astype(np.float32) - 1
        factor = scale.astype(np.float32).reshape(())
        return numbers / factor if divides else numbers * factor

    return stored.weight((4 * rows, inputs), {"packed": stored.name} | parts, decode, "BitNet ternary")


def gemma(stored: Stored) -> Weight | None:
    """Gemma's 2 and 4 bits of transformers: unsigned, the lowest bits first, along the inputs; a scale for each row."""
    leaf = stored.name.removeprefix(stored.module)
    parts = stored.beside(scales={"weight": "weight_scale", "embedding_quantized": "embedding_scale"}.get(leaf, leaf))
    if stored.config.get("quant_method") != "gemma" or parts.get("scales", stored.name) == stored.name:
        return None
    bits = stored.config.get("num_bits", 4)
    for pattern, settings in (stored.config.get("module_quant_configs") or {}).items():
        if re.search(pattern, stored.module[:-1]):
            bits = settings.get("num_bits", bits)
            break
    if stored.info.dtype == np.int8:
        bits = 8
    elif stored.info.dtype != _BYTES or bits not in {2, 4}:
        return None
    rows, octets = stored.info.shape

    def decode(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
        numbers = packed if bits == 8 else packing.unpacked(packed, bits).astype(np.float32) - 2 ** (bits - 1)
        return packing.in_groups(numbers, scales)

    shape, name = (rows, octets * 8 // bits), stored.renamed("weight")
    return stored.weight(shape, {"packed": stored.name} | parts, decode, f"Gemma {bits} bit", name)


def four_bit_floats(stored: Stored) -> Weight | None:
    """NVFP4 and MXFP4, two to a byte along the inputs: of compressed-tensors (`weight_packed`) and of ModelOpt.

    Blocks of 16 have scales in E4M3 and one for all, by which compressed-tensors divides; blocks of 32 powers of two.

    Returns:
        The weight, why it cannot be told, or `None`.
    """
    parts = stored.beside(scales="weight_scale", factor="weight_scale_2", divisor="weight_global_scale")
    if not re.search(r"weight(_packed)?$", stored.name) or stored.info.dtype != _BYTES or "scales" not in parts:
        return None
    *outer, count = stored.tensors[parts["scales"]].shape
    *rows, octets = stored.info.shape
    size = 2 * octets // max(1, count)
    if outer != rows or size * count != 2 * octets or size not in {16, 32}:
        return None
    if size == 16 and not parts.keys() & {"factor", "divisor"}:
        return None

    def decode(
        packed: np.ndarray, scales: np.ndarray, factor: np.ndarray | None = None, divisor: np.ndarray | None = None
    ) -> np.ndarray:
        powers = packing.powers_of_two(scales) if size == 32 else packing.float8(scales)
        weight = packing.in_groups(packing.fp4(packed), powers)
        for_all = 1 if factor is None else factor.astype(np.float32)
        for_all = for_all if divisor is None else for_all / divisor.astype(np.float32)
        return weight * np.float32(np.asarray(for_all).reshape(-1)[0])

    name, method = stored.renamed("weight"), "NVFP4" if size == 16 else "MXFP4"
    return stored.weight((*rows, 2 * octets), {"packed": stored.name} | parts, decode, method, name)


def mxfp4_blocks(stored: Stored) -> Weight | None:
    """MXFP4 as gpt-oss stores its experts: `NAME_blocks` (..., blocks, 16) and `NAME_scales`, their exponents."""
    name = stored.name.removesuffix("_blocks")
    scales = stored.tensors.get(f"{name}_scales")
    if name == stored.name or scales is None or stored.info != TensorInfo(_BYTES, (*scales.shape, 16)):
        return None
    if not scales.shape or scales.dtype != _BYTES:
        return None

    def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
        flat = packing.fp4(blocks.reshape(*blocks.shape[:-2], -1))
        return packing.in_groups(flat, packing.powers_of_two(scales))

    *outer, count = scales.shape
    parts = {"blocks": stored.name, "scales": f"{name}_scales"}
    return stored.weight((*outer, 32 * count), parts, decode, "MXFP4", name)
