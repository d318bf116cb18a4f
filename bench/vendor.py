"""The products of the vendor's library through torch: what a user has without us, its padding included."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fp8kernels.kernels.gemm import Operand

from . import cuda_time
from .measure import Work, sample

MULTIPLE = 16  # of N and K that torch._scaled_mm takes
SCALES_MULTIPLE = 4  # of the scales along K that cuBLASLt takes for 128x128 blocks


def tensorwise(x: Operand, w: Operand, *, fast: bool = False) -> Work:
    """x @ w.T with one scale each; `fast` leaves all of a sum in the tensor core's short accumulator."""
    return _padded(x, w, x.scale.reshape(()), w.scale.reshape(()), fast)


def rowwise(x: Operand, w: Operand, *, fast: bool = False) -> Work:
    """x @ w.T with a scale for each row of x and of w; a tensor with one scale has it in every row."""
    scale_x = x.scale.expand(x.codes.shape[0], 1).contiguous()  # [M, 1]
    scale_w = w.scale.expand(_up(w.codes.shape[0]), 1).contiguous().t()  # [1, N]
    return _padded(x, w, scale_x, scale_w, fast)


def blockwise(x: Operand, w: Operand) -> Work:
    """x @ w.T with scales 1x128 and 128x128.

    raises   ValueError where this torch has no such product
    """
    if not hasattr(F, "scaled_mm"):
        raise ValueError(f"torch {torch.__version__} has no torch.nn.functional.scaled_mm")
    along_k = -w.scale.shape[1] % SCALES_MULTIPLE
    scale_x = x.scale.t().contiguous().t()  # [M, K/128], M innermost
    scale_w = F.pad(w.scale, (0, along_k)).t()  # [K/128 padded, N/128], K innermost
    kinds = F.ScalingType
    work = partial(
        F.scaled_mm, _typed(x), _typed(w).t(), scale_x, kinds.BlockWise1x128, scale_w, kinds.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )  # fmt: skip
    refusal = _attempt(work, x.codes.device.type)
    if isinstance(refusal, str):
        raise ValueError(f"torch's blockwise product does not run here: {refusal}")
    return work


def faster(candidates: dict[str, list[Work]], device: str) -> tuple[str, list[Work]]:
    """The name and the works of the candidate whose first work takes the least time.

    raises   ValueError with every reason if none of them runs
    """
    times: dict[str, float] = {}
    failed = []
    for name, works in candidates.items():
        found = _attempt(works[0], device)
        if isinstance(found, float):
            times[name] = found
        else:
            failed.append(f"{name}: {found}")
    if not times:
        raise ValueError("no baseline runs here: " + "; ".join(failed))
    best = min(times, key=lambda name: times[name])
    return best, candidates[best]


def _attempt(work: Work, device: str) -> float | str:
    """Seconds of one call, or why it does not run."""
    try:
        return cuda_time.median(work) if device == "cuda" else statistics.median(sample(work) for _ in range(3))
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error).splitlines()[0]


def _padded(x: Operand, w: Operand, scale_x: Tensor, scale_w: Tensor, fast: bool) -> Work:  # noqa: FBT001
    """w is padded once, as a layer's weights would be; x in every call, and the result cut to size."""
    n, k = w.codes.shape
    weights = _pad(_typed(w), _up(n), _up(k)).t()  # [K, N]
    product: Callable[[Tensor], Tensor] = partial(_scaled_mm, weights, scale_x, scale_w, fast)
    if (n, k) == (_up(n), _up(k)):
        return partial(product, _typed(x))
    codes = _typed(x)
    return lambda: product(_pad(codes, codes.shape[0], _up(k)))[:, :n]


def _scaled_mm(weights: Tensor, scale_x: Tensor, scale_w: Tensor, fast: bool, x: Tensor) -> Tensor:  # noqa: FBT001
    return torch._scaled_mm(x, weights, scale_a=scale_x, scale_b=scale_w, out_dtype=torch.bfloat16, use_fast_accum=fast)


def _typed(operand: Operand) -> Tensor:
    """The codes as torch's dtype."""
    return operand.codes.view(operand.fmt.carrier)


def _pad(codes: Tensor, rows: int, cols: int) -> Tensor:
    """Zeros below and to the right; torch pads no 8-bit floats, so their bytes are."""
    if codes.shape == (rows, cols):
        return codes
    padded = F.pad(codes.view(torch.uint8), (0, cols - codes.shape[1], 0, rows - codes.shape[0]))
    return padded.view(codes.dtype)


def _up(size: int) -> int:
    return -(-size // MULTIPLE) * MULTIPLE
