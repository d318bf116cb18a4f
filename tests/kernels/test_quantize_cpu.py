"""The compiled quantize against the reference: codes, scale, amax, counts and observer, to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fp8kernels import _cpu
from fp8kernels.formats import E4M3, FORMATS, HIF8, Format
from fp8kernels.kernels.quantize import Observer, Quantized, Rounding, cpu, reference
from fp8kernels.scaling.block import BLOCK_128X128, BLOCKS, ROW, TENSOR, Block

ISAS = ("portable", "avx2", "avx512")
RUNS_HERE = ISAS[: ISAS.index(_cpu.detected_isa()) + 1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FMTS = tuple(FORMATS.values())
ODD = Block("4x32", 4, 32)
CONTENTS = ("randn", "zeros", "huge", "tiny", "special", "all_special")
# the smallest scale, powers of two, numbers that divide nothing, and the ends of what the fast path takes
SCALES = (2.0**-126, 1e-30, 2.0**-60, 1e-18, 2.0**-3, 1.0, 3.0, 0.0237, 2.0**100, 2e30, 1e30, 3.4e38)


@pytest.fixture(autouse=True)
def isa() -> Iterator[None]:
    before = _cpu.current_isa()
    yield
    _cpu.set_isa(before)


def fill(content: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape)
    if content == "zeros":
        x = torch.zeros(shape)
        x[..., ::2] = -0.0
    elif content == "huge":
        x = x.sign() * 3e38 * torch.rand(shape) ** 2
    elif content == "tiny":
        x = x * 1e-39
    elif content == "special":
        for i, value in enumerate((float("nan"), float("inf"), -float("inf"), -float("nan"), -0.0, 1e-45)):
            x.view(-1)[i * 37 % x.numel()] = value
        x[x.shape[0] // 2] = 0
    elif content == "all_special":
        x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])[torch.randint(0, 4, shape)]
    return x.to(dtype)


def new_observer() -> Observer:
    return Observer(torch.tensor([0.5]), torch.arange(4))


def same_bits(a: Tensor, b: Tensor) -> bool:
    a_bytes, b_bytes = (x.contiguous().view(torch.uint8) for x in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a_bytes, b_bytes)


def assert_same(x: Tensor, scale: Tensor, how: Rounding, *, transpose: bool = False) -> Quantized:
    """Every instruction set of this machine against the reference, which is evaluated once."""
    assert cpu.why_not(x, scale, how, transpose=transpose) is None
    expected_seen = new_observer()
    expected = reference.quantize(x, scale, how, transpose=transpose, observer=expected_seen)
    for isa in RUNS_HERE:
        _cpu.set_isa(isa)
        seen = new_observer()
        got = cpu.quantize(x, scale, how, transpose=transpose, observer=seen)
        wrong = got.codes != expected.codes
        assert not wrong.any(), f"{isa}: {wrong.sum()} codes differ, the first at x = {x[wrong][0]}, {how}"
        for name in ("scale", "amax", "counts"):
            pair = getattr(got, name), getattr(expected, name)
            assert same_bits(*pair), (isa, name, *pair)
        assert (got.codes_t is None) == (not transpose)
        if transpose:
            assert torch.equal(got.codes_t, expected.codes_t), isa
        assert same_bits(seen.pending, expected_seen.pending), isa
        assert same_bits(seen.counters, expected_seen.counters), isa
    return got


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets(isa: str) -> None:
    """Says which ones the comparisons below do not reach on this machine."""
    if isa not in RUNS_HERE:
        pytest.skip(f"this CPU has no {isa}")
    _cpu.set_isa(isa)
    assert _cpu.current_isa() == isa


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FMTS, ids=lambda fmt: fmt.name)
def test_blocks(fmt: Format, dtype: torch.dtype, content: str) -> None:
    x = fill(content, (256, 384), dtype)
    for block in (*BLOCKS.values(), ODD):
        grid = block.grid(*x.shape)
        mixed = torch.rand(grid) + 0.01
        mixed.view(-1)[::2] = 0
        for saturate in (True, False):
            how = Rounding(fmt, block, fmt.target, saturate=saturate)
            assert_same(x, torch.zeros(grid), how, transpose=True)
            assert_same(x, mixed, how)


@pytest.mark.parametrize("fmt", FMTS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_input(dtype: torch.dtype, fmt: Format) -> None:
    """All 65,536 inputs over many scales; sorted by size, so that whole chunks overflow and whole chunks do not."""
    x = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype).view(256, 256)
    for saturate in (True, False):
        how = Rounding(fmt, ROW, fmt.target, saturate=saturate)
        for scale in (*SCALES, *(torch.rand(6) * 10).tolist(), *torch.exp2(torch.randn(6) * 20).tolist()):
            assert_same(x, torch.full((256, 1), scale), how)


@pytest.mark.parametrize("fmt", FMTS, ids=lambda fmt: fmt.name)
def test_midpoints(fmt: Format) -> None:
    """Every value and midpoint, and the two fp32 numbers on either side of each, in the fast and the careful path."""
    values = torch.tensor([value for value, _ in fmt.magnitudes] + [fmt.beyond], dtype=torch.float64)
    at = torch.cat([values, (values[1:] + values[:-1]) / 2]).float()
    up, down = torch.tensor(float("inf")), torch.tensor(float("-inf"))
    near = [at, *(torch.nextafter(at, to) for to in (up, down))]
    near += [torch.nextafter(near[1], up), torch.nextafter(near[2], down)]
    x = torch.cat([*near, *(-n for n in near)]).sort().values[:, None]  # each a block of its own
    for scale in (1.0, 2.0**-40, 2.0**30):
        for saturate in (True, False):
            how = Rounding(fmt, TENSOR, fmt.target, saturate=saturate)
            assert_same(x.t() * scale, torch.full((1, 1), scale), how)
            assert_same(x * scale, torch.full((len(x), 1), scale), Rounding(fmt, ROW, fmt.target, saturate=saturate))


@pytest.mark.parametrize("fmt", FMTS, ids=lambda fmt: fmt.name)
def test_quotient(fmt: Format) -> None:
    """x close to code * scale and to midpoint * scale, where a quotient that is off by one bit changes the code."""
    values = torch.tensor([value for value, _ in fmt.magnitudes[1:]], dtype=torch.float64)
    at = torch.cat([values, (values[1:] + values[:-1]) / 2])  # [P]
    scale = (torch.rand(300, 1) + 0.5) * torch.exp2(torch.randint(-30, 30, (300, 1)).float())  # [300, 1]
    exact = (at * scale.double()).float()  # [300, P]
    for x in (exact, torch.nextafter(exact, torch.zeros(())), exact.bfloat16(), exact.half()):
        assert_same(x, scale, Rounding(fmt, ROW, fmt.target))


@pytest.mark.parametrize(
    "shape", ((1, 1), (1, 1000), (1000, 1), (3, 17), (5, 127), (7, 128), (9, 129), (2, 70000), (400, 300)), ids=str
)
def test_shapes(shape: tuple[int, int]) -> None:
    for dtype in DTYPES:
        x = fill("randn", shape, dtype)
        for block in (TENSOR, ROW):
            for scale in (0.0, 0.37):
                assert_same(x, torch.full(block.grid(*shape), scale), Rounding(HIF8, block, 15.0), transpose=True)


def test_strides() -> None:
    wide = torch.randn(256, 700).bfloat16()
    for x in (
        wide[:, 3:259],
        wide[::2, :256],
        wide.t()[:512:4],
        wide[:, ::2][:, :128],
        wide[5:6].expand(256, 700)[:, :128],
    ):
        for block in (TENSOR, ROW, ODD, BLOCK_128X128):
            if x.shape[0] % (block.rows or 1) == 0:
                grid = block.grid(*x.shape)
                assert_same(x, torch.zeros(grid), Rounding(E4M3, block, 448.0), transpose=True)
                assert_same(x, torch.full(grid[::-1], 0.1).t(), Rounding(E4M3, block, 448.0))


def test_large_blocks_on_two_threads() -> None:
    """More than one piece a block, more than one chunk a piece, and an amax in each piece in turn."""
    for shape, block in (((3, 100_003), ROW), ((1, 300_001), TENSOR), ((700, 300), TENSOR)):
        x = torch.randn(shape).bfloat16()
        for i in (0, x.numel() // 3, x.numel() - 1):
            x.view(-1)[i] = 100.0 + i % 7
            grid = block.grid(*shape)
            assert_same(x, torch.zeros(grid), Rounding(HIF8, block, 15.0))
            assert_same(x, torch.full(grid, 1e-3), Rounding(HIF8, block, 15.0))  # saturates in some chunks only


@pytest.mark.parametrize(("margin", "power_of_two"), ((0, True), (1, False), (2, True), (-3, False)))
def test_scale_rule(margin: int, power_of_two: bool) -> None:  # noqa: FBT001
    for x in (
        torch.randn(64, 256) * 100,
        torch.full((8, 128), 448.0),
        torch.full((8, 128), 1e-44),
        torch.full((8, 128), 3e38),
    ):
        for fmt in FMTS:
            how = Rounding(fmt, ROW, fmt.grad_target, margin, power_of_two)
            got = assert_same(x, torch.zeros(x.shape[0], 1), how)
            assert (got.scale >= 2.0**-126).all()


@pytest.mark.parametrize("shape", ((0, 128), (128, 0), (0, 0)), ids=str)
def test_empty(shape: tuple[int, int]) -> None:
    for block in BLOCKS.values():
        grid = block.grid(*shape)
        seen = new_observer()
        got = cpu.quantize(
            torch.empty(shape), torch.zeros(grid), Rounding(HIF8, block, 15.0), transpose=True, observer=seen
        )
        assert got.codes.shape == shape
        assert got.codes_t.shape == shape[::-1]
        assert torch.equal(got.scale, torch.ones(grid))
        assert torch.equal(got.amax, torch.zeros(grid))
        assert got.counts.tolist() == [0, 0, 0, 0]
        assert seen.pending.tolist() == [0.5]


def test_why_not_and_errors() -> None:
    x, scale, how = torch.randn(4, 4), torch.zeros(1, 1), Rounding(HIF8, TENSOR, 15.0)
    assert "meta" in cpu.why_not(x.to("meta"), scale, how)
    assert "float64" in cpu.why_not(x.double(), scale, how)
    assert "int32" in cpu.why_not(x.int(), scale, how)
    assert "fp32" in cpu.why_not(x, scale.double(), how)
    assert "observer" in cpu.why_not(x, scale, how, observer=Observer(torch.zeros(1).double(), torch.zeros(4)))
    with pytest.raises(ValueError, match=r"scale is \[1, 2\]"):
        cpu.quantize(x, torch.zeros(1, 2), how)
    with pytest.raises(ValueError, match="does not divide"):
        cpu.quantize(x, scale, Rounding(HIF8, BLOCK_128X128, 15.0))


def test_set_isa() -> None:
    with pytest.raises(ValueError, match="instruction set 'sse9'"):
        _cpu.set_isa("sse9")
    before = _cpu.current_isa()
    _cpu.set_isa("portable")
    assert _cpu.current_isa() == "portable"
    _cpu.set_isa(before)
    assert _cpu.detected_isa() in ISAS
