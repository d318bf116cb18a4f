"""The public verbs: each checks its arguments, chooses a kernel by the table, and is registered with torch.library."""

from .commit import commit_states
from .copy import copy
from .dequantize import dequantize
from .explain import explain
from .fake_quantize import fake_quantize
from .gemm import gemm
from .quantize import Stats, quantize, quantize_with_stats

__all__ = [
    "Stats",
    "commit_states",
    "copy",
    "dequantize",
    "explain",
    "fake_quantize",
    "gemm",
    "quantize",
    "quantize_with_stats",
]
