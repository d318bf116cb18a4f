"""Blocks, the rules that make scales, and QTensor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fp8kernels import get_block, quantize
from fp8kernels.scaling.block import BLOCKS
from fp8kernels.scaling.rules import LARGEST_SCALE, SMALLEST_SCALE, get_algorithm, scale_from_amax


@pytest.mark.parametrize(
    ("name", "grid"), [("tensor", (1, 1)), ("row", (256, 1)), ("1x128", (256, 3)), ("128x128", (2, 3))]
)
def test_grid(name: str, grid: tuple[int, int]) -> None:
    assert get_block(name).grid(256, 384) == grid


@pytest.mark.parametrize(("name", "shape"), [("1x128", (4, 130)), ("128x128", (130, 128)), ("128x128", (128, 64))])
def test_a_block_must_divide(name: str, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*\[{shape[0]}, {shape[1]}\]"):
        get_block(name).grid(*shape)


def test_unknown_block_names_the_near_ones() -> None:
    with pytest.raises(ValueError, match="did you mean '128x128'"):
        get_block("128x12")


def test_transposed_block_swaps_its_sides() -> None:
    for block in BLOCKS.values():
        twice = block.transposed().transposed()
        assert (twice.rows, twice.cols) == (block.rows, block.cols)


def test_scale_from_amax_against_numpy() -> None:
    amax = np.float32(10.0) ** np.random.default_rng(0).uniform(-30, 30, 10_000).astype(np.float32)
    for target in (15.0, 448.0, 57344.0):
        ours = scale_from_amax(torch.from_numpy(amax), target)
        np.testing.assert_array_equal(ours.numpy(), np.maximum(amax / np.float32(target), np.float32(SMALLEST_SCALE)))
        doubled = scale_from_amax(torch.from_numpy(amax), target, margin=1)
        np.testing.assert_array_equal(
            doubled.numpy(), np.maximum(amax / np.float32(target) * 2, np.float32(SMALLEST_SCALE))
        )


def test_power_of_two_scales_are_the_next_above() -> None:
    amax = 10.0 ** torch.linspace(-20, 20, 1001)
    exact, rounded = scale_from_amax(amax, 448.0), scale_from_amax(amax, 448.0, power_of_two=True)
    assert (torch.frexp(rounded).mantissa == 0.5).all()
    assert ((rounded >= exact) & (rounded < 2 * exact)).all()
    assert scale_from_amax(torch.tensor(448.0 * 4), 448.0, power_of_two=True) == 4


def test_extreme_amax() -> None:
    amax = torch.tensor([0.0, 1e-45, 3.4e38])
    assert scale_from_amax(amax, 15.0).tolist()[:2] == [1.0, SMALLEST_SCALE]
    assert scale_from_amax(amax, 15.0, margin=60).max() == LARGEST_SCALE


@pytest.mark.parametrize("name", ["max", "moving_average", "most_recent"])
def test_algorithms_against_numpy(name: str) -> None:
    history = torch.rand(5, 8) + 0.1
    history[1, 3:] = 0  # not full yet
    history[2] = 0  # empty
    definition = {
        "max": lambda h: h.max(),
        "most_recent": lambda h: h[0],
        "moving_average": lambda h: h[h > 0].mean() if (h > 0).any() else 0.0,
    }[name]
    expected = np.array([definition(row) for row in history.double().numpy()])
    np.testing.assert_allclose(get_algorithm(name)(history).numpy(), expected, rtol=8 * 2**-24)  # 8 fp32 additions


def test_unknown_algorithm() -> None:
    with pytest.raises(ValueError, match="known are 'max'"):
        get_algorithm("maximum")


def test_qtensor_views() -> None:
    x = torch.randn(6, 256)
    q = quantize(x, "e4m3", block="1x128", transpose=True)
    assert q.shape == (6, 256)
    assert q.t().codes.is_contiguous()
    torch.testing.assert_close(q.t().dequantize(), q.dequantize().t(), rtol=0, atol=0)
    torch.testing.assert_close(q.t().t().dequantize(), q.dequantize(), rtol=0, atol=0)
    assert q.float8().dtype == torch.float8_e4m3fn
    assert q.nbytes == 6 * 256 + 6 * 2 * 4
    assert "1x128" in repr(q)
    with pytest.raises(TypeError, match="no dtype for 'hif8'"):
        quantize(x, "hif8").float8()
    with pytest.raises(ValueError, match="matrix"):
        quantize(torch.randn(2, 3, 4), "e4m3").t()


def test_sqnr_of_a_gaussian_is_what_the_formats_promise() -> None:
    """Relative RMS error with the default targets: HiF8 0.0264, E4M3 0.0265, E5M2 0.0527 (one scale per tensor)."""
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).view(1024, 1024)
    for fmt, expected in (("hif8", 0.0264), ("e4m3", 0.0265), ("e5m2", 0.0527)):
        error = (quantize(x, fmt).dequantize() - x).norm() / x.norm()
        assert math.isclose(error, expected, rel_tol=0.01), f"{fmt}: {error:.4f}"
