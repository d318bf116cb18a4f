"""What act_quantize means, in plain torch: the activation in fp32, and the quantize reference on its result.

source  SwiGLU: Shazeer 2020, arXiv 2002.05202. GELU: Hendrycks, Gimpel 2016, arXiv 1606.08415
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..quantize import Observer, Quantized, Rounding
from ..quantize import reference as quantize_reference


def why_not(
    x: Tensor,
    other: Tensor | None,
    activation: str,
    scale: Tensor,
    how: Rounding,
    *,
    transpose: bool = False,
    observer: Observer | None = None,
) -> str | None:
    """The reference takes everything that the verb takes."""
    return None


def act_quantize(
    x: Tensor,
    other: Tensor | None,
    activation: str,
    scale: Tensor,
    how: Rounding,
    *,
    transpose: bool = False,
    observer: Observer | None = None,
) -> Quantized:
    """Codes of y = activation(x) * other in fp32, or of activation(x); y is not rounded to x's dtype.

    x, other  fp32, bf16 or fp16 [M, K], any strides
    scale     fp32 [M / rows, K / cols]; 0 stands for "not known": that block takes the scale of y's own amax
    returns   Quantized; amax, counts and codes are those of y
    observer  is raised and added to in place
    """
    y = activate(x.float(), activation)  # [M, K]
    if other is not None:
        y = y * other.float()
    return quantize_reference.quantize(y, scale, how, transpose=transpose, observer=observer)


def activate(x: Tensor, activation: str) -> Tensor:
    """One of kernels.gemm.ACTIVATIONS but "none", in the dtype of x; "gelu" is exact, "gelu_tanh" its approximation."""
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="none" if activation == "gelu" else "tanh")
    return F.relu(x) if activation == "relu" else F.silu(x)
