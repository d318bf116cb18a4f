"""quantize in Triton against the reference, to the bit; test_interpreter.py runs this file in Triton's interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernels.test_quantize_cpu import CONTENTS, DTYPES, FMTS, ODD, fill, new_observer
from torch import Tensor

from fp8kernels.formats import E4M3, HIF8, Format
from fp8kernels.kernels.quantize import Observer, Quantized, Rounding, reference, triton_jit
from fp8kernels.kernels.quantize.carrier import scale_of_codes
from fp8kernels.kernels.quantize.triton_jit import Tile, patch_tile, tensor_tile
from fp8kernels.scaling.block import BLOCK_1X128, BLOCK_128X128, BLOCKS, ROW, TENSOR, Block

STRIPS = Block("64x*", 64, None)  # patches beyond a tile, of many rows


def assert_same(
    x: Tensor, scale: Tensor, how: Rounding, *, transpose: bool = False, passes: int = 1
) -> tuple[Quantized, Observer]:
    """Codes, scale, counts and observer to the bit; amax too, but for the payload of a NaN."""
    assert triton_jit.why_not(x, scale, how, transpose=transpose, observer=new_observer()) is None
    seen, expected_seen = new_observer(), new_observer()
    for _ in range(passes):
        got = triton_jit.quantize(x, scale, how, transpose=transpose, observer=seen)
        expected = reference.quantize(x, scale, how, transpose=transpose, observer=expected_seen)
    wrong = got.codes != expected.codes
    assert not wrong.any(), f"{wrong.sum()} codes differ, the first at x = {x[wrong][0]}, {how}"
    assert (got.codes_t is None) == (not transpose)
    if transpose:
        assert torch.equal(got.codes_t, expected.codes_t)
    assert torch.equal(got.scale, expected.scale)
    assert torch.equal(got.counts, expected.counts), (got.counts, expected.counts, how)
    assert ((got.amax == expected.amax) | (got.amax.isnan() & expected.amax.isnan())).all()
    assert torch.equal(seen.pending, expected_seen.pending)
    assert torch.equal(seen.counters, expected_seen.counters)
    return got, seen


@pytest.mark.parametrize("fmt", FMTS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("saturate", (True, False))
def test_every_input_and_midpoint(fmt: Format, *, saturate: bool) -> None:
    """All bf16 and fp16 numbers; every value and midpoint of the format with two fp32 neighbours on either side."""
    how = Rounding(fmt, TENSOR, fmt.target, saturate=saturate)
    x = torch.arange(-32768, 32768, dtype=torch.int16).view(256, 256)
    for dtype, scale in ((torch.bfloat16, 1.0), (torch.bfloat16, 2.0**-126), (torch.float16, 0.0237)):
        assert_same(x.view(dtype), torch.full((1, 1), scale), how)
    values = torch.tensor([value for value, _ in fmt.magnitudes] + [fmt.beyond], dtype=torch.float64)
    at = torch.cat([values, (values[1:] + values[:-1]) / 2]).float()
    up, down = torch.tensor(float("inf")), torch.tensor(float("-inf"))
    near = [at, *(torch.nextafter(at, to) for to in (up, down))]
    near += [torch.nextafter(near[1], up), torch.nextafter(near[2], down)]
    midpoints = torch.cat([*near, *(-n for n in near)])[None]
    for scale in (1.0, 2.0**-40, 2.0**30):
        assert_same(midpoints * scale, torch.full((1, 1), scale), how)


@pytest.mark.parametrize("block", (*BLOCKS.values(), ODD, STRIPS), ids=lambda block: block.name)
def test_blocks(block: Block) -> None:
    """What x holds, by block; format, dtype, overflow and transposed codes take turns."""
    shape = (8, 64) if block is ODD else (128, 256) if block.rows else (40, 300)
    turns = itertools.cycle(itertools.product(FMTS, DTYPES, (True, False), (False, True)))
    for content in CONTENTS:
        mixed = torch.rand(block.grid(*shape)) + 0.01
        mixed.view(-1)[::2] = 0
        for scale in (torch.zeros_like(mixed), mixed, torch.full_like(mixed, 0.003)):
            fmt, dtype, saturate, transpose = next(turns)
            how = Rounding(fmt, block, fmt.target, saturate=saturate)
            assert_same(fill(content, shape, dtype), scale, how, transpose=transpose)
            next(turns)  # 36 turns and 18 cases: another beginning in each round
        next(turns)


@pytest.mark.parametrize("shape", ((1, 1), (1, 1000), (1000, 1), (3, 17), (9, 129), (129, 290), (2, 9000)), ids=str)
def test_shapes(shape: tuple[int, int]) -> None:
    """More tiles than programs, rows beyond a tile, and tiles that reach beyond x."""
    turns = itertools.cycle(DTYPES)
    for block, scale, transpose in ((TENSOR, 0.0, False), (TENSOR, 0.37, True), (ROW, 0.0, True), (ROW, 0.37, False)):
        x = fill("randn", shape, next(turns))
        assert_same(x, torch.full(block.grid(*shape), scale), Rounding(HIF8, block, 15.0), transpose=transpose)


def test_strides() -> None:
    wide = torch.randn(128, 300).bfloat16()
    for x in (wide[:, 3:259], wide[::2, :256], wide.t()[:256, :64], wide[5:6].expand(128, 300)[:, :128]):
        for block in (TENSOR, BLOCK_1X128 if x.shape[1] % 128 == 0 else ROW):
            grid = block.grid(*x.shape)
            assert_same(x, torch.full(grid[::-1], 0.1).t(), Rounding(E4M3, block, E4M3.target), transpose=True)


@pytest.mark.parametrize("k", (1, 4, 13))
def test_carrier(k: int) -> None:
    """Every value of HiF8, numbers around them, and scales that went stale, so that E4M3 loses above or below."""
    values = torch.tensor(HIF8.values)[None]
    x = torch.cat([values, fill("special", (3, 256), torch.float32) * 10])
    for stale, saturate in ((1.0, True), (1.1, True), (2.0, False), (2.0**-10, True), (3000.0, True)):
        for block in (TENSOR, ROW):
            how = Rounding(HIF8, block, 15.0, saturate=saturate, carrier=k)
            assert_same(x, torch.full(block.grid(*x.shape), 1 / stale), how)
    how = Rounding(HIF8, BLOCK_1X128, 15.0, carrier=k)
    got, _ = assert_same(x * 1e-38, torch.zeros(4, 2), how, transpose=True)  # scales of codes stay normal
    assert (got.scale >= 2.0**-126).all()
    given = torch.full((4, 2), 2.0**-120)
    got, _ = assert_same(x, given, how)
    assert torch.equal(got.scale, scale_of_codes(given, k))


@pytest.mark.parametrize(("margin", "power_of_two"), ((0, True), (1, False), (-3, True)))
def test_scale_rule(margin: int, *, power_of_two: bool) -> None:
    for size, fmt in itertools.product((1.0, 1e-44, 3e37), FMTS):
        how = Rounding(fmt, ROW, fmt.grad_target, margin, power_of_two)
        assert_same(torch.randn(8, 128) * size, torch.zeros(8, 1), how)
        assert_same(torch.randn(8, 128) * size, torch.zeros(1, 1), Rounding(fmt, TENSOR, 15.0, margin, power_of_two))


def test_an_observer_adds_up() -> None:
    x = torch.randn(64, 128)
    _, seen = assert_same(x, torch.zeros(64, 1), Rounding(E4M3, ROW, E4M3.target), passes=2)
    assert seen.pending == x.abs().max() and seen.counters[0] == 2 * x.numel()


@pytest.mark.parametrize("shape", ((0, 128), (128, 0), (0, 0)), ids=str)
def test_empty(shape: tuple[int, int]) -> None:
    for block in BLOCKS.values():
        got = triton_jit.quantize(torch.empty(shape), torch.zeros(block.grid(*shape)), Rounding(HIF8, block, 15.0))
        assert got.codes.shape == shape and got.counts.tolist() == [0, 0, 0, 0]
        assert torch.equal(got.scale, torch.ones(block.grid(*shape)))


def test_reasons_and_errors() -> None:
    x, scale, how = torch.randn(4, 4), torch.zeros(1, 1), Rounding(HIF8, TENSOR, 15.0)
    assert "meta" in triton_jit.why_not(x.to("meta"), scale, how)
    assert "float64" in triton_jit.why_not(x.double(), scale, how)
    assert "fp32" in triton_jit.why_not(x, scale.double(), how)
    assert "observer" in triton_jit.why_not(x, scale, how, observer=Observer(torch.zeros(1).double(), torch.zeros(4)))
    with pytest.raises(ValueError, match=r"scale is \[1, 2\]"):
        triton_jit.quantize(x, torch.zeros(1, 2), how)
    with pytest.raises(ValueError, match="does not divide"):
        triton_jit.quantize(x, scale, Rounding(HIF8, BLOCK_128X128, 15.0))


def test_tiles() -> None:
    """What is read once, and what is written transposed in runs of 64 bytes."""
    assert patch_tile(1, 4096, 100, transpose=False) == Tile(1, 4096, apart=True, whole=True)
    assert patch_tile(1, 128, 4096, transpose=False) == Tile(32, 128, apart=True, whole=True)
    assert patch_tile(1, 128, 4096, transpose=True) == Tile(64, 128, apart=True, whole=True)
    assert patch_tile(1, 4096, 4096, transpose=True) == Tile(64, 64, apart=True, whole=False)
    assert patch_tile(1, 16384, 8, transpose=False) == Tile(1, 4096, apart=True, whole=False)
    assert patch_tile(128, 128, 4096, transpose=False) == Tile(64, 64, apart=False, whole=False)
    assert patch_tile(4, 32, 4096, transpose=False) == Tile(4, 32, apart=False, whole=True)
    assert tensor_tile(1, 10**9, transpose=False) == Tile(1, 4096, apart=False, whole=False)
    assert tensor_tile(4096, 4096, transpose=True) == Tile(64, 64, apart=False, whole=False)
