"""The public verbs: each checks its arguments, chooses a kernel by the table, and is registered with torch.library."""

from .activation import activation_quantize, swiglu_quantize
from .commit import commit_states
from .copy import copy
from .decode_attention import decode_attention
from .dequantize import dequantize
from .explain import explain
from .fake_quantize import fake_quantize
from .gemm import gemm
from .norm import layer_norm_quantize, rms_norm_quantize
from .quantize import Stats, quantize, quantize_with_stats

__all__ = [
    "Stats",
    "activation_quantize",
    "commit_states",
    "copy",
    "decode_attention",
    "dequantize",
    "explain",
    "fake_quantize",
    "gemm",
    "layer_norm_quantize",
    "quantize",
    "quantize_with_stats",
    "rms_norm_quantize",
    "swiglu_quantize",
]
