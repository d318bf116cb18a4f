"""gemm on the tensor cores of sm_90: the compiled kernels of csrc/gemm_sm90/kernel.cuh.

method  the copy engine brings tiles to shared memory, wgmma multiplies FP8 codes as they are; tiles are chosen by
        csrc/gemm_sm90/plan.cpp; for 64 rows of x and fewer the weights fill the tiles and K is split. See README.md
limits  sm_90; E4M3 and E5M2 codes, not E5M2 by E5M2 (HiF8 comes as its E4M3 carrier); scales per tensor or row, or
        1x128 for x with 128x128 for w. Operands that are not K-major, or whose rows do not start every 16 bytes, are
        copied first
equal   within the bound of docs/NUMERICS.md for tensor cores; the same bits in every run
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import cuda
from ..compiled import EMULATED, load
from ..quantize import Quantized
from ..quantize.carrier import scale_of_codes, usable
from . import ACTIVATIONS, PLAIN, Epilogue, Operand, fast_accumulation

_cuda, _ = load("_cuda")

NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # NumberType of csrc/gemm_sm90/epilogue.h
FORMATS = ("e4m3", "e5m2")
CAPABILITY = (9, 0)
BLOCK = 128  # elements of K, and rows of w, that a block scale stands for
ALIGNMENT = 16  # bytes, of addresses and rows that the copy engine reads
LARGEST = 2**31 - 1  # rows, columns and depth; elements are addressed with 64 bits


def why_not(
    x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype, epilogue: Epilogue = PLAIN
) -> str | None:
    """Why these arguments cannot run here, or None."""
    reason = elsewhere(x, w, bias, epilogue, at_least=CAPABILITY)
    if reason is not None:
        return reason
    if not cuda.is_exactly(x.codes.device, CAPABILITY):
        return "the GPU is newer than sm_90, whose instructions (wgmma) this kernel is written in"
    return unfit(x, w, bias, out_dtype, epilogue)


def elsewhere(
    x: Operand, w: Operand, bias: Tensor | None, epilogue: Epilogue, *, at_least: tuple[int, int] = (8, 0)
) -> str | None:
    """Why the tensors of a product are not where a CUDA kernel can have them, or None."""
    if x.codes.is_cpu and not EMULATED:  # said at once, as every product on a CPU asks
        return cuda.why_not({"x": x.codes})
    tensors = {"x": x.codes, "x's scale": x.scale, "w": w.codes, "w's scale": w.scale, "bias": bias}
    return cuda.why_not(tensors | {"residual": epilogue.residual, "out's scale": epilogue.scale}, at_least=at_least)


def unfit(x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype, epilogue: Epilogue) -> str | None:
    """What of the arguments, wherever they are, the kernel does not take; or None."""
    for name, operand in (("x", x), ("w", w)):
        if operand.fmt.name not in FORMATS:
            return f"{name} is {operand.fmt.name}: tensor cores multiply {' and '.join(FORMATS)} (see the HiF8 carrier)"
        if operand.codes.dtype != torch.uint8 or operand.scale.dtype != torch.float32:
            return f"{name} is {operand.codes.dtype} with {operand.scale.dtype} scales: it takes uint8 with fp32"
        if max(operand.codes.shape) > LARGEST:
            return f"{name} is {list(operand.codes.shape)}: this kernel takes sizes up to {LARGEST}"
    if x.fmt.name == w.fmt.name == "e5m2":
        return "x and w are both e5m2: this kernel has e4m3 by either, and e5m2 by e4m3"
    if scales(x, w) is None:
        return (
            f"the scales are {list(x.scale.shape)} and {list(w.scale.shape)}: this kernel takes one for each tensor or "
            f"row, or 1x{BLOCK} for x with {BLOCK}x{BLOCK} for w"
        )
    for name, dtype in (("out", out_dtype), ("bias", bias), ("residual", epilogue.residual)):
        dtype = dtype.dtype if isinstance(dtype, Tensor) else dtype
        if dtype is not None and dtype not in NUMBERS:
            return f"{name} is {dtype}: this kernel takes fp32, bf16 and fp16"
    if epilogue.rounding is not None and (epilogue.scale is None or epilogue.rounding.block.name != "tensor"):
        return "codes of the result need one scale that is given, as in delayed scaling"
    return None


def scales(x: Operand, w: Operand) -> str | None:
    """ "rows" for scales per tensor or row of both, "blocks" for 1x128 by 128x128, or None."""
    (m, k), n = x.codes.shape, w.codes.shape[0]
    if x.scale.shape[1] == w.scale.shape[1] == 1 and x.scale.shape[0] in (1, m) and w.scale.shape[0] in (1, n):
        return "rows"
    grids = (m, k / BLOCK), (n / BLOCK, k / BLOCK)
    return "blocks" if (tuple(x.scale.shape), tuple(w.scale.shape)) == grids else None


def gemm(
    x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype, epilogue: Epilogue = PLAIN
) -> Tensor | Quantized:
    """activation(x[M, K] @ w[N, K].T + bias) + residual, or codes of it; see reference.py for every argument."""
    blocks = scales(x, w) == "blocks"
    x, w = x._replace(codes=readable(x.codes)), w._replace(codes=readable(w.codes))
    return launched("gemm", x, w, bias, out_dtype, epilogue, blocks=blocks)


def launched(
    entry: str,
    x: Operand,
    w: Operand,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    epilogue: Epilogue,
    *,
    blocks: bool = False,
) -> Tensor | Quantized:
    """What a compiled gemm makes of operands that it can read, K-major ones.

    entry   "gemm" or "gemm_stream": the name in fp8kernels._cuda
    raises  RuntimeError if the kernel did not start
    """
    (m, k), n = x.codes.shape, w.codes.shape[0]
    device = x.codes.device
    x_scale, w_scale = x.scale.detach().contiguous(), w.scale.detach().contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    residual = None if epilogue.residual is None else epilogue.residual.detach().reshape(m, n)
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    rounding, out_scale = epilogue.rounding, epilogue.scale
    if rounding is not None and rounding.carrier is not None and out_scale is not None:
        out_scale = usable(out_scale, rounding.carrier)
    out = torch.empty(m, n, dtype=out_dtype if rounding is None else torch.uint8, device=device)
    amax, counts = _noted(m * n, device) if rounding is not None else (None, None)
    numbers = NUMBERS | {None: 0}
    arguments: dict[str, Any] = {
        "x": (x.codes.data_ptr(), x.codes.stride(0), x.fmt.code_id, x_scale.data_ptr(), x_scale.shape[0] > 1),
        "w": (w.codes.data_ptr(), w.codes.stride(0), w.fmt.code_id, w_scale.data_ptr(), w_scale.shape[0] > 1),
        "shape": (m, n, k),
        "blocks": blocks,
        "precise": not fast_accumulation(),
        "bias": (_address(bias), numbers[None if bias is None else bias.dtype]),
        "residual": (
            _address(residual),
            numbers[None if residual is None else residual.dtype],
            0 if residual is None else residual.stride(0),
        ),
        "activation": ACTIVATIONS.index(epilogue.activation),
        "out": (out.data_ptr(), numbers[None if rounding is not None else out_dtype]),
        "codes": (
            None
            if rounding is None
            else (
                rounding.fmt.code_id,
                rounding.saturate,
                -1 if rounding.carrier is None else rounding.carrier,
                _address(out_scale),
                _address(amax),
                _address(counts),
            )
        ),
    }
    with cuda.on(device):
        processors = cuda.processors(device)
        bytes_needed = getattr(_cuda, f"{entry}_workspace")(arguments, processors)
        workspace = torch.empty(bytes_needed, dtype=torch.uint8, device=device) if bytes_needed else None
        error = getattr(_cuda, entry)(arguments, processors, _address(workspace), cuda.stream(device))
    if error < 0:
        raise RuntimeError("gemm did not start: the driver made no tensor map for the operands")
    cuda.check(error, "gemm")
    return out if rounding is None else _quantized(out, epilogue, amax, counts)


def readable(codes: Tensor) -> Tensor:
    """Codes that the copy engine can read: K-major, address and rows at multiples of 16 bytes; a copy where need be."""
    rows, cols = codes.shape
    pitch = -(-cols // ALIGNMENT) * ALIGNMENT
    aligned = codes.stride(1) == 1 or cols == 1
    if aligned and codes.stride(0) % ALIGNMENT == 0 and codes.stride(0) >= cols and codes.data_ptr() % ALIGNMENT == 0:
        return codes
    padded = torch.empty(rows, pitch, dtype=torch.uint8, device=codes.device)[:, :cols]
    return padded.copy_(codes)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _noted(elements: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where amax and counts are noted, at their start; filled on the device, as a copy from the host would wait."""
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    counts[0].fill_(elements)
    return torch.zeros(1, 1, dtype=torch.float32, device=device), counts


def _quantized(codes: Tensor, epilogue: Epilogue, amax: Tensor | None, counts: Tensor | None) -> Quantized:
    assert epilogue.rounding is not None and epilogue.scale is not None and amax is not None and counts is not None
    if epilogue.observer is not None:
        pending, counters = epilogue.observer
        pending.copy_(torch.where(amax.view(1).isfinite(), pending.maximum(amax.view(1)), pending))
        counters.add_(counts)
    k = epilogue.rounding.carrier
    scale = epilogue.scale if k is None else scale_of_codes(epilogue.scale, k)
    return Quantized(codes, None, scale, amax, counts)
