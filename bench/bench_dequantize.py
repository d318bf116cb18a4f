"""dequantize: codes to bf16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp8kernels.formats import E4M3, get_format

from .case import Case, Shape, assert_same, kernel, reference, text

FULL, SMALL = (8192, 8192), (512, 1024)
CHECKED_ROWS = 128


def versus_torch(fmt: str, shape: Shape = FULL, backend: str = "cpu") -> Case:
    """Against torch's copy_ from its own e4m3, the nearest that torch has for every format."""
    f = get_format(fmt)
    codes = random_codes(shape, fmt)
    scale = torch.full((1, 1), 0.0123)
    args = (codes, scale, f, torch.bfloat16)
    run: Callable[..., Tensor] = kernel("dequantize", backend, *args)
    source = random_codes(shape, "e4m3").view(E4M3.carrier)
    out = torch.empty(shape, dtype=torch.bfloat16)

    def check() -> None:
        expected = reference("dequantize")(codes[:CHECKED_ROWS], scale, f, torch.bfloat16)
        assert_same(run(*args)[:CHECKED_ROWS], expected, "dequantize")

    return Case(
        "dequantize", "dequantize tensor to bf16", fmt, backend, text(shape), "torch copy_ e4m3 to bf16",
        lambda: run(*args), lambda: out.copy_(source), check, (f"dequantize/{backend}",),
        moved=codes.numel() * 3, baseline_moved=codes.numel() * 3, reuse=True,
    )  # fmt: skip


def random_codes(shape: Shape, fmt: str, seed: int = 2) -> Tensor:
    """The codes of normal numbers at the format's target: uint8."""
    f = get_format(fmt)
    x = torch.randn(4096, generator=torch.Generator().manual_seed(seed))
    codes = f.encode(x / (x.abs().max() / f.target))
    count = 1
    for size in shape:
        count *= size
    picks = torch.randint(0, len(codes), (count,), generator=torch.Generator().manual_seed(seed))
    return codes[picks].reshape(shape)


def test_dequantize(fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(versus_torch(fmt, shape, backend))
