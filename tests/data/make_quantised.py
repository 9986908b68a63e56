"""Write quantised.safetensors: one small weight as every library stores it, and what the library makes of it again.

Needs torch, bitsandbytes, mlx, compressed-tensors, auto-round, autoawq, hqq and optimum-quanto. Names are
CASE|ARRAY, and CASE|want for the library's own result; the metadata has the model's config of each case.
"""

import json

import bitsandbytes.functional
import mlx.core
import numpy as np
import torch
from auto_round_extension.torch.qlinear_torch import QuantLinear as GPTQv2
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear as GPTQ
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from optimum.quanto import freeze, qint8, quantize
from safetensors.torch import save_file

OUT, IN = 32, 128
generator = torch.Generator().manual_seed(0)
weight = 0.05 * torch.randn(OUT, IN, generator=generator)
tensors, configs = {}, {}


def add(case, stored, want, config=None):
    """Keep a case."""
    named = {**{f"up.{name}": array for name, array in stored.items()}, "want": want.half()}
    tensors.update({f"{case}|{name}": array.detach().clone().contiguous() for name, array in named.items()})
    configs[case] = config or {}


def in_groups(size):
    """Return the weight in groups."""
    return weight.reshape(OUT, -1, size)


for kind in ("nf4", "fp4"):
    for nested in (False, True):
        numbers, state = bitsandbytes.functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=nested, quant_type=kind
        )
        stored = {"weight": numbers} | {f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}
        add(f"bitsandbytes_{kind}{'_nested' * nested}", stored, bitsandbytes.functional.dequantize_4bit(numbers, state))
row = weight.abs().amax(1)
int8 = torch.round(weight / row[:, None] * 127).to(torch.int8)
want = bitsandbytes.functional.int8_vectorwise_dequant(int8, row)
add("bitsandbytes_int8", {"weight": int8, "SCB": row, "weight_format": torch.tensor(0, dtype=torch.uint8)}, want)

for mode, bits, size in [("affine", b, 32) for b in (2, 3, 4, 5, 6, 8)] + [
    ("mxfp4", 4, 32),
    ("nvfp4", 4, 16),
    ("mxfp8", 8, 32),
]:
    found = mlx.core.quantize(mlx.core.array(weight.numpy()), group_size=size, bits=bits, mode=mode)
    back = mlx.core.dequantize(*found, group_size=size, bits=bits, mode=mode, dtype=mlx.core.float32)
    stored = dict(zip(("weight", "scales", "biases"), (torch.tensor(np.array(part)) for part in found), strict=False))
    settings = {"bits": bits, "group_size": size, "mode": mode}
    add(f"mlx_{mode}_{bits}", stored, torch.tensor(np.array(back)), {"quantization": settings})

for kind, bits in [(GPTQ, 2), (GPTQ, 3), (GPTQ, 4), (GPTQ, 8), (GPTQv2, 3)]:
    groups = in_groups(64)
    scales = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    zeros = torch.round(-groups.amin(-1) / scales).clamp(1, 2**bits - 1)
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = weight.clone()
    layer = kind(bits=bits, group_size=64, infeatures=IN, outfeatures=OUT, bias=False)
    layer.pack(linear, scales, zeros, None, device="cpu")
    layer.post_init()
    version = "gptq" if kind is GPTQ else "gptq_v2"
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 64, "checkpoint_format": version}
    add(f"{version}_{bits}", layer.state_dict(), layer(torch.eye(IN)).T, {"quantization_config": settings})

groups = in_groups(64)
scales = (groups.amax(-1) - groups.amin(-1)) / 14
zeros = torch.round(-groups.amin(-1) / scales).clamp(0, 14)
linear.weight.data = weight.half()
layer = WQLinear_GEMM.from_linear(linear, 4, 64, scales=scales.T.contiguous().half(), zeros=zeros.T.contiguous())
settings = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
want = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, 64).T
add("awq", layer.state_dict(), want, {"quantization_config": settings})


def compressed(case, form, scale, extra=(), **arguments):
    """Keep a case of compressed-tensors."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    library = BaseCompressor.get_value_from_registry(form)
    stored = library.compress({"weight": weight.clone(), "weight_scale": scale, **dict(extra)}, scheme)
    settings = {"quant_method": "compressed-tensors", "format": form}
    add(case, stored, library.decompress(stored, scheme)["weight"], {"quantization_config": settings})


for bits in (3, 4):
    scale = in_groups(64).abs().amax(-1) / (2 ** (bits - 1) - 1)
    zero = torch.randint(-2, 3, scale.shape, generator=generator, dtype=torch.int8)
    grouped = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 64}
    compressed(f"compressed_{bits}", "pack-quantized", scale, symmetric=True, **grouped)
    compressed(
        f"compressed_{bits}_zeros", "pack-quantized", scale, [("weight_zero_point", zero)], symmetric=False, **grouped
    )
row = weight.abs().amax(1, keepdim=True)
compressed("compressed_int8", "int-quantized", row / 127, num_bits=8, type="int", strategy="channel")
compressed("compressed_fp8", "float-quantized", row / 448, num_bits=8, type="float", strategy="channel")
powers = 2 ** torch.floor(torch.log2(in_groups(32).abs().amax(-1)))
blocks = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
compressed("compressed_mxfp4", "mxfp4-pack-quantized", powers, num_bits=4, **blocks)
compressed("compressed_mxfp8", "mxfp8-quantized", powers, num_bits=8, **blocks)

for bits, axis in ((4, 1), (2, 0), (8, 1)):
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = weight.clone()
    settings = BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    layer = HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu")
    stored = {name: part for name, part in layer.state_dict().items() if isinstance(part, torch.Tensor)}
    add(f"hqq_{bits}", stored, layer.dequantize())

model = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False))
model[0].weight.data = weight.clone()
quantize(model, weights=qint8)
freeze(model)
stored = {name.removeprefix("0."): part for name, part in model.state_dict().items()}
add("quanto_int8", stored, model[0].weight.dequantize())

save_file(tensors, "quantised.safetensors", {case: json.dumps(config) for case, config in configs.items()})
