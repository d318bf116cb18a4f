"""The formats against outside judges: ml_dtypes for E4M3 and E5M2, en_dtypes for HiF8."""

from __future__ import annotations

import math

import en_dtypes
import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from fp8kernels import E4M3, E5M2, FORMATS, HIF8, Format, get_format

JUDGES = {"hif8": en_dtypes.hifloat8, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
ALL = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def judge_encode(fmt: Format, y: Tensor) -> Tensor:
    """The outside library's codes of fp32 numbers, native overflow."""
    with np.errstate(all="ignore"):
        codes = y.float().numpy().astype(JUDGES[fmt.name]).view(np.uint8)
    return torch.from_numpy(codes.copy())


def judge_decode(fmt: Format, codes: Tensor) -> Tensor:
    return torch.from_numpy(codes.numpy().view(JUDGES[fmt.name]).astype(np.float32))


def same_numbers(fmt: Format, ours: Tensor, theirs: Tensor) -> None:
    """Equal as numbers; NaN equals NaN, and the sign of zero is free."""
    a, b = fmt.decode(ours), judge_decode(fmt, theirs)
    wrong = ~((a == b) | (a.isnan() & b.isnan()))
    assert not wrong.any(), f"{int(wrong.sum())} codes differ, first {ours[wrong][:4]} against {theirs[wrong][:4]}"


def all_16_bit(dtype: torch.dtype) -> Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def midpoints_with_neighbours(fmt: Format) -> Tensor:
    """Every midpoint of the table and of the overflow, with its two fp32 neighbours, both signs."""
    grid = torch.tensor([value for value, _ in fmt.magnitudes] + [fmt.beyond], dtype=torch.float64)
    middle = ((grid[1:] + grid[:-1]) / 2).float()
    up, down = (torch.nextafter(middle, torch.tensor(to)) for to in (math.inf, -math.inf))
    points = torch.cat([middle, up, down, grid.float()])
    return torch.cat([points, -points])


@ALL
def test_table_is_the_judges(fmt: Format) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    same_numbers(fmt, codes, codes)


@ALL
def test_every_code_encodes_to_itself(fmt: Format) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = fmt.decode(codes)
    again = fmt.encode(values, saturate=False)
    kept = ~values.isnan()
    assert torch.equal(again[kept], codes[kept])
    assert (again[~kept] == fmt.nan_code).all()


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_all_16_bit_inputs(fmt: Format, dtype: torch.dtype) -> None:
    x = all_16_bit(dtype)
    same_numbers(fmt, fmt.encode(x, saturate=False), judge_encode(fmt, x))


@ALL
def test_all_fp32_midpoints(fmt: Format) -> None:
    y = midpoints_with_neighbours(fmt)
    assert len(y) > 700
    same_numbers(fmt, fmt.encode(y, saturate=False), judge_encode(fmt, y))


@ALL
def test_random_fp32_bits(fmt: Format) -> None:
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    y = bits.view(torch.float32)
    same_numbers(fmt, fmt.encode(y, saturate=False), judge_encode(fmt, y))


@ALL
def test_saturation(fmt: Format) -> None:
    y = torch.tensor([math.inf, -math.inf, 3e38, -3e38, fmt.overflow_at, -fmt.overflow_at, math.nan])
    expected = torch.tensor([1, -1, 1, -1, 1, -1, math.nan]) * fmt.max
    torch.testing.assert_close(fmt.decode(fmt.encode(y)), expected, rtol=0, atol=0, equal_nan=True)
    below = torch.nextafter(torch.tensor(fmt.overflow_at), torch.tensor(0.0))
    assert fmt.decode(fmt.encode(below, saturate=False)) == fmt.max
    above = fmt.decode(fmt.encode(torch.tensor(fmt.overflow_at), saturate=False))
    assert above.isinf() if fmt.inf_code is not None else above.isnan()


@ALL
def test_sixteen_bit_types_hold_every_value(fmt: Format) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        torch.testing.assert_close(fmt.table(dtype).float(), fmt.table(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_codes_are_torchs(fmt: Format) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(codes.view(fmt.carrier).float(), fmt.decode(codes), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("x", "rounded"),
    [
        (1.0625, 1.125),
        (7.75, 8),
        (15.49, 15),
        (15.5, 16),
        (18, 20),
        (240, 256),
        (448, 512),
        (2**-23, 2**-22),
        (1e-38, 0),
    ],
)
def test_hif8_rounds_ties_away(x: float, rounded: float) -> None:
    assert HIF8.decode(HIF8.encode(torch.tensor(x))) == rounded
    assert HIF8.decode(HIF8.encode(torch.tensor(-x))) == -rounded


def test_hif8_facts() -> None:
    assert (HIF8.max, HIF8.smallest, HIF8.inf_code) == (32768.0, 2.0**-22, 0x6F)
    assert sum(math.isfinite(v) for v in HIF8.values) == 253
    assert HIF8.encode(torch.tensor([-0.0, -1e-30, 1e-45, math.nan])).tolist() == [0, 0, 0, 0x80]


def test_names() -> None:
    assert get_format("HIF8") is HIF8
    assert get_format("float8_e4m3fn") is E4M3
    assert get_format(E5M2) is E5M2
    with pytest.raises(ValueError, match="did you mean 'hif8'"):
        get_format("hif9")
    with pytest.raises(ValueError, match="255 values"):
        Format("short", 9, (0.0,) * 255, "even", 1.0, 0x7F, 1.0, 1.0)
