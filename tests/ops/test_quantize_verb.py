"""The verb quantize as users meet it: shapes, strides, dtypes, errors. The numbers are the kernels' tests."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fp8kernels
from fp8kernels import FORMATS, dequantize, fake_quantize, quantize, quantize_with_stats

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def max_error(x: Tensor, fmt: fp8kernels.Format, scale: float) -> Tensor:
    """Half the wider of the gaps beside |x| / scale, times scale: what rounding to nearest promises."""
    grid = torch.tensor([value for value, _ in fmt.magnitudes], dtype=torch.float64)
    y = (x.double().abs() / scale).clamp(max=fmt.max)
    above = torch.searchsorted(grid, y).clamp(1, len(grid) - 1)
    return (
        grid[above] - grid[above - 1]
    ) / 2 * scale + x.double().abs() * 2**-22  # roundings of x / scale, code * scale


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=4),
    fmt=st.sampled_from(sorted(FORMATS)),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from(["tensor", "row"]),
    magnitude=st.sampled_from([1e-30, 1e-5, 1.0, 1e4]),
    stride=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_round_trip_is_within_half_a_gap(
    shape: list[int], fmt: str, dtype: torch.dtype, block: str, magnitude: float, stride: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(*shape, stride, generator=generator) * magnitude).to(dtype)[..., 0]  # strided where stride > 1
    q = quantize(x, fmt, block=block)
    assert q.codes.shape == x.shape
    decoded = q.dequantize()
    assert decoded.shape == x.shape
    if not x.numel():
        return
    width = x.shape[-1] if x.ndim else 1
    rows, back = x.reshape(-1, width), decoded.reshape(-1, width)
    for n, scale in enumerate(q.scale.flatten().tolist()):
        part = slice(n, n + 1) if block == "row" else slice(None)
        assert ((rows[part].double() - back[part].double()).abs() <= max_error(rows[part], FORMATS[fmt], scale)).all()


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=40),
    fmt=st.sampled_from(sorted(FORMATS)),
)
def test_any_numbers(values: list[float], fmt: str) -> None:
    """NaN stays NaN, ±Inf becomes ±max, everything finite stays finite, and the counts say so."""
    x = torch.tensor(values)
    q, stats = quantize_with_stats(x, fmt)
    decoded = q.codes.new_tensor(0.0, dtype=torch.float32) + FORMATS[fmt].decode(q.codes)
    assert torch.equal(decoded.isnan(), x.isnan())
    assert (decoded[x.isinf()].abs() == FORMATS[fmt].max).all()
    elements, saturated, flushed, nonfinite = stats.counts.tolist()
    assert elements == len(values)
    assert nonfinite == int((~x.isfinite()).sum())
    assert saturated >= int(x.isinf().sum())
    assert flushed == int(((decoded == 0) & (x != 0) & x.isfinite()).sum())
    assert torch.isfinite(q.scale).all()
    assert math.isfinite(stats.amax.max()) == bool(x.isfinite().all())


def test_counts_and_given_scale() -> None:
    x = torch.tensor([[1e-6, 0.0, 1.0, 500.0, -1e9, math.inf, math.nan]])
    q, stats = quantize_with_stats(x, "e4m3", scale=1.0)
    assert stats.counts.tolist() == [7, 3, 1, 2]
    assert q.scale.tolist() == [[1.0]]
    assert q.dequantize()[0, 3:6].tolist() == [448.0, -448.0, 448.0]
    native = quantize(x, "e4m3", scale=1.0, overflow="native").dequantize()
    assert native[0, 3:].isnan().all()
    assert quantize(x, "e5m2", scale=1.0, overflow="native").dequantize()[0, 5] == math.inf


def test_margin_target_and_power_of_two() -> None:
    x = torch.randn(8, 32)
    amax = x.abs().max()
    assert quantize(x, "hif8").scale == amax / 15
    assert quantize(x, "hif8", target=224.0).scale == amax / 224
    assert quantize(x, "e4m3", margin=2).scale == amax / 448 * 4
    assert torch.frexp(quantize(x, "e4m3", power_of_two=True).scale).mantissa == 0.5


@pytest.mark.parametrize("make", [lambda: torch.randn(0, 8), lambda: torch.randn(4, 0), lambda: torch.randn(2, 0, 3)])
def test_empty_tensors_work(make) -> None:  # type: ignore[no-untyped-def]
    x = make()
    q, stats = quantize_with_stats(x, "hif8")
    assert q.codes.shape == x.shape
    assert q.dequantize(torch.bfloat16).shape == x.shape
    assert stats.counts.tolist() == [0, 0, 0, 0]


def test_transposed_input_gives_the_transposed_codes() -> None:
    x = torch.randn(24, 40)
    assert torch.equal(quantize(x.t(), "hif8").codes, quantize(x, "hif8").codes.t())


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"fmt": "e4m4"}, ValueError, "did you mean 'e4m3'"),
        ({"block": "rows"}, ValueError, "did you mean 'row'"),
        ({"block": "1x128"}, ValueError, r"\[4, 100\].*100 is not a multiple of 128"),
        ({"overflow": "wrap"}, ValueError, "'saturate', 'native'"),
        ({"target": -1.0}, ValueError, "target is -1.0"),
        ({"scale": 0.0}, ValueError, "zero, negative or not finite"),
        ({"scale": torch.ones(3, 1)}, ValueError, r"\(3, 1\).*needs \(1, 1\)"),
        ({"x": torch.randn(4, 100, dtype=torch.float64)}, TypeError, r"float64.*\.float\(\)"),
        ({"x": torch.ones(4, 100, dtype=torch.int32)}, TypeError, "int32"),
        ({"x": [1.0]}, TypeError, "list"),
        ({"scale": torch.ones(1, 1, device="meta")}, ValueError, "different devices"),
    ],
)
def test_bad_input(kwargs: dict, error: type[Exception], says: str) -> None:
    arguments = {"x": torch.randn(4, 100), "fmt": "e4m3"} | kwargs
    with pytest.raises(error, match=says):
        quantize(arguments.pop("x"), arguments.pop("fmt"), **arguments)


def test_dequantize_checks_its_dtype() -> None:
    with pytest.raises(ValueError, match="float64"):
        dequantize(quantize(torch.ones(2, 2), "e4m3"), torch.float64)


def test_fake_quantize_is_straight_through() -> None:
    x = torch.tensor([0.1, 1.0, 1000.0], requires_grad=True)
    y = fake_quantize(x, "e4m3", scale=1.0)
    assert y.tolist() == quantize(x, "e4m3", scale=1.0).dequantize().tolist()
    (y * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 3.0]
    x.grad = None
    fake_quantize(x, "e4m3", scale=1.0, clip_gradient=True).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("block", ["tensor", "row", "1x128", "128x128"])
@pytest.mark.parametrize(("target", "k"), [(None, 4), (224.0, 1)])
def test_a_carrier_is_hif8_in_e4m3_codes(target: float | None, k: int, block: str) -> None:
    x = torch.randn(2, 128, 256)
    x = x + x.sign() * 0.01  # away from zero: nothing is lost below
    plain = quantize(x, "hif8", block=block, target=target)
    q, stats = quantize_with_stats(x, "hif8", block=block, target=target, carrier=True, transpose=True)
    assert q.fmt is FORMATS["e4m3"]
    assert torch.equal(q.scale, plain.scale * 2.0**-k)
    assert torch.equal(q.dequantize(), plain.dequantize())
    assert stats.counts[1:].tolist() == [0, 0, 0]
    assert q.codes_t is not None
    assert torch.equal(q.codes_t, q.codes.reshape(256, 256).t())
    assert q.float8().dtype == torch.float8_e4m3fn


def test_a_carrier_counts_what_it_cannot_hold() -> None:
    """With a scale of 1 and k = 4: 28 is the largest, 2**-12 the smallest above which all of HiF8 is exact."""
    x = torch.tensor([[28.0, -30.0, 1e9, math.inf, math.nan, 2.0**-13, 1.5 * 2.0**-13, 2.0**-20, 1e-9, 0.0]])
    q, stats = quantize_with_stats(x, "hif8", scale=1.0, carrier=True)
    assert stats.counts.tolist() == [10, 3, 3, 2]
    decoded = q.dequantize()[0]
    assert decoded[:4].tolist() == [28.0, -28.0, 28.0, 28.0]
    assert decoded[4].isnan()
    assert decoded[5:].tolist() == [2.0**-13, 2.0**-12, 0.0, 0.0, 0.0]


def test_margin_is_head_room_in_a_carrier_too() -> None:
    x = torch.randn(4, 32)
    assert quantize(x, "hif8", carrier=True, margin=1).scale == quantize(x, "hif8", margin=1).scale * 2.0**-4


@pytest.mark.parametrize(
    ("fmt", "options", "says"),
    [
        ("e4m3", {}, "e4m3 has no carrier"),
        ("hif8", {"target": 1000.0}, "target=1000 lies beyond 448"),
        ("hif8", {"overflow": "native"}, "a carrier saturates"),
    ],
)
def test_no_carrier(fmt: str, options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=f"quantize: carrier=True: {says}"):
        quantize(torch.randn(4), fmt, carrier=True, **options)  # type: ignore[arg-type]


def test_explain_a_carrier() -> None:
    x = torch.randn(4, 32)
    assert fp8kernels.explain("quantize", x, "hif8", carrier=True).kernel == "cpu"
    with pytest.raises(ValueError, match="no carrier"):
        fp8kernels.explain("quantize", x, "e5m2", carrier=True)
