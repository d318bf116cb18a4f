"""The compiled dequantize against the reference, to the bit (NaN is NaN)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fp8kernels import _cpu
from fp8kernels.formats import E4M3, E5M2, FORMATS, HIF8, Format
from fp8kernels.kernels.dequantize import cpu, reference

ISAS = ("portable", "avx2", "avx512")
RUNS_HERE = ISAS[: ISAS.index(_cpu.detected_isa()) + 1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FMTS = tuple(FORMATS.values())


@pytest.fixture(autouse=True)
def isa() -> Iterator[None]:
    before = _cpu.current_isa()
    yield
    _cpu.set_isa(before)


def assert_same(codes: Tensor, scale: Tensor, fmt: Format, dtype: torch.dtype) -> None:
    assert cpu.why_not(codes, scale, fmt, dtype) is None
    expected = reference.dequantize(codes, scale, fmt, dtype)
    for isa in RUNS_HERE:
        _cpu.set_isa(isa)
        got = cpu.dequantize(codes, scale, fmt, dtype)
        assert got.dtype == dtype
        same = (got == expected) & (got.signbit() == expected.signbit()) | got.isnan() & expected.isnan()
        assert same.all(), f"{isa}: {(~same).sum()} differ, the first of code {codes[~same][0]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FMTS, ids=lambda fmt: fmt.name)
def test_every_code(fmt: Format, dtype: torch.dtype) -> None:
    """All 256 codes under scales from where everything underflows to where everything overflows."""
    codes = torch.arange(256, dtype=torch.uint8).expand(400, 256).contiguous()
    scale = torch.exp2(torch.linspace(-148, 127, 400))[:, None] * (1 + torch.rand(400, 1))
    scale[:7, 0] = torch.tensor([0.0, float("inf"), float("nan"), 1.0, 2.0**-126, 3.4e38, 1e-45])
    assert_same(codes, scale, fmt, dtype)  # short runs
    assert_same(codes.repeat(1, 12), scale, fmt, dtype)  # long ones


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grids(dtype: torch.dtype) -> None:
    cases = {
        (128, 256): ((1, 1), (128, 1), (128, 2), (1, 2), (32, 8), (128, 256)),
        (3, 17): ((1, 1), (3, 1), (1, 17)),
        (2, 100_000): ((1, 1), (2, 1), (2, 4), (1, 25)),
        (300, 131): ((1, 1), (300, 1), (3, 131)),
        (1, 1): ((1, 1),),
        (70_000, 1): ((1, 1), (70_000, 1), (7, 1)),
    }
    for shape, grids in cases.items():
        wide = torch.randint(0, 256, (shape[0], shape[1] + 9), dtype=torch.uint8)
        for codes in (wide[:, 4:-5].contiguous(), wide[:, 4:-5], wide.t().contiguous().t()[:, :-9]):
            for grid in grids:
                assert_same(codes, torch.rand(grid) * 0.1, HIF8, dtype)
                assert_same(codes, torch.rand(grid[::-1]).t(), E4M3, dtype)


def test_empty_why_not_and_errors() -> None:
    for shape in ((0, 4), (4, 0)):
        assert (
            cpu.dequantize(torch.empty(shape, dtype=torch.uint8), torch.ones(1, 1), E5M2, torch.bfloat16).shape == shape
        )
    codes, scale = torch.zeros(4, 6, dtype=torch.uint8), torch.ones(1, 1)
    assert "meta" in cpu.why_not(codes.to("meta"), scale, HIF8, torch.float32)
    assert "float64" in cpu.why_not(codes, scale.double(), HIF8, torch.float32)
    assert "int32" in cpu.why_not(codes.int(), scale, HIF8, torch.float32)
    assert "out_dtype is torch.float64" in cpu.why_not(codes, scale, HIF8, torch.float64)
    with pytest.raises(ValueError, match=r"scale \[3, 1\] does not divide"):
        cpu.dequantize(codes, torch.ones(3, 1), HIF8, torch.float32)
