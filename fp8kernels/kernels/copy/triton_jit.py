"""copy in Triton: on a GPU, or on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1 before the start)."""

from __future__ import annotations

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton, MISSING = None, f"triton does not load: {error}"

BLOCK = 1024  # bytes a program moves; a power of two, as tl.arange wants
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def why_not(x: Tensor) -> str | None:
    """Why x cannot be copied here, or None."""
    if triton is None:
        return MISSING
    if x.device.type == "cpu" and not INTERPRETED:
        return (
            "x is on the CPU: Triton runs there only in its interpreter, with TRITON_INTERPRET=1 set before the start"
        )
    if x.device.type not in ("cpu", "cuda"):
        return f"x is on {x.device}: this kernel takes CUDA tensors"
    return None


def copy(x: Tensor) -> Tensor:
    """A contiguous copy of x: any shape, strides and dtype."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    flat = x.resolve_conj().resolve_neg().contiguous().view(-1)
    from_bytes, to_bytes = flat.view(torch.uint8), out.view(-1).view(torch.uint8)  # [bytes]
    if flat.numel():
        copy_kernel[(triton.cdiv(from_bytes.numel(), BLOCK),)](from_bytes, to_bytes, from_bytes.numel(), BLOCK=BLOCK)
    return out


if triton is not None:

    @triton.jit
    def copy_kernel(from_ptr, to_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """One program a block of bytes."""
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        tl.store(to_ptr + at, tl.load(from_ptr + at, mask=at < count), mask=at < count)
