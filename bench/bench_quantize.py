"""quantize: bf16 to codes, with amax and counts in the same pass, by a scale that is known (delayed or static)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fp8kernels.formats import get_format
from fp8kernels.kernels.quantize import Rounding
from fp8kernels.scaling import get_block, scale_from_amax

from .case import (
    BANDWIDTH,
    SPEED,
    Case,
    Shape,
    Work,
    device_of,
    generator,
    in_turn,
    pick,
    reference,
    sets,
    text,
)
from .check import assert_same

FULL, SMALL = (8192, 8192), (512, 1024)
CHECKED_ROWS = 128  # of the matrix; the reference is slow, and every row goes the same way


def versus_copy(
    fmt: str,
    shape: Shape = FULL,
    backend: str = "cpu",
    block: str = "tensor",
    transpose: bool = False,  # noqa: FBT001, FBT002 - an argument of a goal
    carrier: int | None = None,
) -> Case:
    """Against torch's bf16 copy_, by bytes moved: how near to memory speed."""
    x = data(shape, device_of(backend))
    y = torch.empty_like(x)
    how = Rounding(get_format(fmt), get_block(block), get_format(fmt).target, carrier=carrier)
    works = [partial(y.copy_, x)]
    works += [partial(torch.empty_like(x).copy_, x.clone()) for _ in range(1, sets(x.device.type, 3 * x.numel()))]
    return _case(x, how, backend, "torch copy_ bf16 to bf16", works, existing=True, transpose=transpose)


def versus_eager(fmt: str, shape: Shape = FULL, backend: str = "cpu") -> Case:
    """Against the same job in torch eager: amax, divide, clamp, cast. Only where torch has the format."""
    x = data(shape, device_of(backend))
    f = get_format(fmt)
    if f.carrier is None:
        raise ValueError(f"torch has no dtype for {fmt}")
    scale = scale_of(x, fmt, "tensor").reshape(())

    def eager(x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(x)
        return torch.maximum(-low, high), (x / scale).clamp(-f.max, f.max).to(f.carrier)

    how = Rounding(f, get_block("tensor"), f.target)
    inputs = [x, *(x.clone() for _ in range(1, sets(x.device.type, 3 * x.numel())))]
    works: list[Work] = [partial(eager, each) for each in inputs]
    return _case(x, how, backend, "torch eager: aminmax, divide, clamp, cast", works, existing=False)


def data(shape: Shape, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=generator(1, device), device=device).bfloat16()  # [M, K]


def scale_of(x: Tensor, fmt: str, block: str) -> Tensor:
    """The scale that the amax of x gives, as the step before would have."""
    f, b = get_format(fmt), get_block(block)
    rows, cols = b.grid(*x.shape)
    height, width = b.patch(*x.shape)
    amax = x.reshape(rows, height, cols, width).abs().amax(dim=(1, 3)).float()  # [R, C]
    return scale_from_amax(amax, f.target)


def _case(
    x: Tensor,
    how: Rounding,
    backend: str,
    against: str,
    baselines: Sequence[Work],
    *,
    existing: bool,
    transpose: bool = False,
) -> Case:
    """`existing`: the baseline copies into a tensor that is there."""
    fmt, block, device = how.fmt.name, how.block.name, x.device.type
    scale = scale_of(x, fmt, block)
    chosen = pick("quantize", backend, x, scale, how, transpose=transpose)
    run = partial(chosen.run, transpose=transpose)

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
        if transpose:
            assert_same(out.codes_t, out.codes.t().contiguous(), "quantize transposed codes")

    with_codes_t = ", transposed codes too" if transpose else ""
    through = f" as E4M3 codes of values * 2**{how.carrier}" if how.carrier is not None else ""
    ours = [partial(run, each, scale, how) for each in (x, *(x.clone() for _ in baselines[1:]))]
    return Case(
        "quantize", f"quantize {block} bf16{with_codes_t}{through}", fmt, chosen.name, text(tuple(x.shape)), against,
        in_turn(ours), in_turn(baselines), check, (f"quantize/{chosen.name}",),
        moved=x.numel() * (4 if transpose else 3), baseline_moved=x.numel() * 4,
        unit=BANDWIDTH if existing else SPEED, reuse=existing, device=device, calls=len(ours),
    )  # fmt: skip


def test_quantize(fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(versus_copy(fmt, shape, backend))


def test_quantize_rows(fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(versus_copy(fmt, shape, backend, block="row"))


def test_quantize_transposed(fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(versus_copy(fmt, shape, backend, transpose=True))


def test_quantize_eager(torch_fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(versus_eager(torch_fmt, shape, backend))
