"""quantize: bf16 to codes, with amax and counts in the same pass, by a scale that is known (delayed or static)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp8kernels.formats import get_format
from fp8kernels.kernels.quantize import Quantized, Rounding
from fp8kernels.scaling import get_block, scale_from_amax

from .case import BANDWIDTH, SPEED, Case, Shape, Work, assert_same, kernel, reference, text

FULL, SMALL = (8192, 8192), (512, 1024)
CHECKED_ROWS = 128  # of the matrix; the reference is slow, and every row goes the same way


def versus_copy(fmt: str, shape: Shape = FULL, backend: str = "cpu", block: str = "tensor") -> Case:
    """Against torch's bf16 copy_, by bytes moved: how near to memory speed."""
    x = data(shape)
    y = torch.empty_like(x)
    return _case(fmt, x, backend, block, "torch copy_ bf16 to bf16", lambda: y.copy_(x), existing=True)


def versus_eager(fmt: str, shape: Shape = FULL, backend: str = "cpu") -> Case:
    """Against the same job in torch eager: amax, divide, clamp, cast. Only where torch has the format."""
    x = data(shape)
    f = get_format(fmt)
    if f.carrier is None:
        raise ValueError(f"torch has no dtype for {fmt}")
    scale = scale_of(x, fmt, "tensor").reshape(())

    def eager() -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(x)
        return torch.maximum(-low, high), (x / scale).clamp(-f.max, f.max).to(f.carrier)

    return _case(fmt, x, backend, "tensor", "torch eager: aminmax, divide, clamp, cast", eager, existing=False)


def data(shape: Shape) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()  # [M, K]


def scale_of(x: Tensor, fmt: str, block: str) -> Tensor:
    """The scale that the amax of x gives, as the step before would have."""
    f, b = get_format(fmt), get_block(block)
    rows, cols = b.grid(*x.shape)
    height, width = b.patch(*x.shape)
    amax = x.reshape(rows, height, cols, width).abs().amax(dim=(1, 3)).float()  # [R, C]
    return scale_from_amax(amax, f.target)


def _case(fmt: str, x: Tensor, backend: str, block: str, against: str, baseline: Work, *, existing: bool) -> Case:
    """`existing`: the baseline copies into a tensor that is there."""
    how = Rounding(get_format(fmt), get_block(block), get_format(fmt).target)
    scale = scale_of(x, fmt, block)
    run: Callable[..., Quantized] = kernel("quantize", backend, x, scale, how)

    def check() -> None:
        out = run(x, scale, how)
        rows = min(CHECKED_ROWS, x.shape[0]) if block in ("tensor", "row", "1x128") else x.shape[0]
        part = scale if scale.shape[0] == 1 else scale[:rows]
        ours, expected = run(x[:rows], part, how), reference("quantize")(x[:rows], part, how)
        for name in ("codes", "scale", "amax", "counts"):
            assert_same(getattr(ours, name), getattr(expected, name), f"quantize {name}")
        assert_same(out.codes[:rows], expected.codes, "quantize codes of the whole")
        assert float(out.amax.max()) == float(x.abs().max()), "quantize amax of the whole"
        assert int(out.counts[0]) == x.numel(), "quantize counts another number of elements"

    return Case(
        "quantize", f"quantize {block} bf16", fmt, backend, text(tuple(x.shape)), against,
        lambda: run(x, scale, how), baseline, check, (f"quantize/{backend}",),
        moved=x.numel() * 3, baseline_moved=x.numel() * 4,
        unit=BANDWIDTH if existing else SPEED, reuse=existing,
    )  # fmt: skip


def test_quantize(fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(versus_copy(fmt, shape, backend))


def test_quantize_rows(fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(versus_copy(fmt, shape, backend, block="row"))


def test_quantize_eager(torch_fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(versus_eager(torch_fmt, shape, backend))
