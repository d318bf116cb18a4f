"""fp8kernels: PyTorch models that train and serve on 8-bit floats (HiF8, E4M3, E5M2), on a GPU or a plain CPU.

import fp8kernels

fp8kernels.convert(model, "hif8-qat")     # in place; the training loop stays as it is
loss.backward(); optimizer.step()
fp8kernels.summary(model)
fp8kernels.export(model, "out/")

q = fp8kernels.quantize(x, "hif8", block="row")
y = fp8kernels.gemm(q, w, out_dtype=torch.bfloat16)
"""

import importlib.metadata

import torch  # noqa: F401  first: the compiled module shares its OpenMP runtime

from . import nn, serving
from .convert import convert, revert
from .export import export
from .formats import E4M3, E5M2, FORMATS, HIF8, Format, get_format
from .nn.fallback import FallbackWarning
from .nn.sharded import all_gather_codes
from .nn.step import commit
from .ops import (
    activation_quantize,
    copy,
    decode_attention,
    dequantize,
    explain,
    fake_quantize,
    gemm,
    layer_norm_quantize,
    quantize,
    quantize_with_stats,
    rms_norm_quantize,
    swiglu_quantize,
)
from .recipe import RECIPES, Alarm, Recipe, Role, get_recipe
from .scaling import BLOCKS, Block, QTensor, get_block, without_state
from .sensitivity import Plan, Sensitivity, plan
from .telemetry import (
    CarrierWarning,
    SaturationError,
    SaturationWarning,
    SaturationWatch,
    log_to,
    report,
    summary,
)

try:
    __version__ = importlib.metadata.version("fp8kernels")
except importlib.metadata.PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "BLOCKS",
    "E4M3",
    "E5M2",
    "FORMATS",
    "HIF8",
    "RECIPES",
    "Alarm",
    "Block",
    "CarrierWarning",
    "FallbackWarning",
    "Format",
    "Plan",
    "QTensor",
    "Recipe",
    "Role",
    "SaturationError",
    "SaturationWarning",
    "SaturationWatch",
    "Sensitivity",
    "activation_quantize",
    "all_gather_codes",
    "commit",
    "convert",
    "copy",
    "decode_attention",
    "dequantize",
    "explain",
    "export",
    "fake_quantize",
    "gemm",
    "get_block",
    "get_format",
    "get_recipe",
    "layer_norm_quantize",
    "log_to",
    "nn",
    "plan",
    "quantize",
    "quantize_with_stats",
    "report",
    "revert",
    "rms_norm_quantize",
    "serving",
    "summary",
    "swiglu_quantize",
    "without_state",
]
