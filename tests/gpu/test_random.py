"""Random shapes, formats, layouts and contents through every line of the table; a failure says what was drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import tolerance
import torch
from gpu.lines import CUDA, DTYPES, Draw, Line, lines, to

from bench.check import activation_exact, assert_between, assert_product, assert_quantized, norm_exact
from fp8kernels.formats import FORMATS
from fp8kernels.kernels.gemm import ACTIVATIONS
from fp8kernels.kernels.norm_quantize import Norm
from fp8kernels.scaling.block import TENSOR

CASES = {CUDA: 1000, "cpu": 12}  # of each line of the table
SECONDS = 12.0  # after which a line stops drawing: a Triton kernel is compiled for each kind of argument
FEWEST = 6  # cases that a line must have got through by then


def run_cases(line: Line, case: Callable[[Line, Draw], bool]) -> None:
    """Draw until there are enough; a case that the kernel refuses, with a reason, does not count."""
    taken = 0
    end = time.monotonic() + SECONDS
    for draw in draws(line):
        try:
            taken += case(line, draw)
        except AssertionError as error:
            raise AssertionError(f"{draw.text}: {error}") from error
        if taken >= CASES[line.device] or (time.monotonic() > end and taken >= FEWEST):
            return
    raise AssertionError(f"{line.verb}/{line.kernel.name} took {taken} of the cases that were drawn")


def draws(line: Line) -> Iterator[Draw]:
    """Ten times as many as are wanted, so that a kernel for one kind of argument finds its own among them."""
    return (Draw(seed) for seed in range(10 * CASES[line.device]))


@pytest.mark.parametrize("line", lines("quantize"))
def test_quantize(line: Line) -> None:
    run_cases(line, quantize_case)


def quantize_case(line: Line, draw: Draw) -> bool:
    rows, cols = draw.size("rows", 300), draw.size("cols", 2000)
    if draw.one("whole blocks", (False, True)):
        rows, cols = -(-rows // 128) * 128, -(-cols // 128) * 128
    x = draw.matrix(rows, cols, draw.one("dtype", DTYPES))
    block, grid = draw.grid(rows, cols)
    how, scale = draw.rounding(block), draw.scale(grid)
    transpose = draw.one("transpose", (False, True))
    args = to((x, scale, how), line.device)
    if not line.takes(*args, transpose=transpose):
        return False
    got = line.kernel.run(*args, transpose=transpose)
    assert_quantized(to(got, "cpu"), line.reference(*args, transpose=transpose), "quantize")
    return True


@pytest.mark.parametrize("line", lines("dequantize"))
def test_dequantize(line: Line) -> None:
    run_cases(line, dequantize_case)


def dequantize_case(line: Line, draw: Draw) -> bool:
    rows, cols = draw.size("rows", 300), draw.size("cols", 2000)
    if draw.one("whole blocks", (False, True)):
        rows, cols = -(-rows // 128) * 128, -(-cols // 128) * 128
    codes = torch.randint(0, 256, (rows, cols), dtype=torch.uint8, generator=draw.bits)
    if draw.one("layout", ("contiguous", "transposed")) == "transposed":
        codes = codes.t().contiguous().t()
    _, grid = draw.grid(rows, cols)
    scale = torch.rand(grid, generator=draw.bits) + 0.01
    args = to((codes, scale, draw.one("fmt", FORMATS.values()), draw.one("dtype", DTYPES)), line.device)
    if not line.takes(*args):
        return False
    tolerance.exact(line.kernel.run(*args).cpu(), line.reference(*args))
    return True


@pytest.mark.parametrize("line", lines("gemm"))
def test_gemm(line: Line) -> None:
    run_cases(line, gemm_case)


def gemm_case(line: Line, draw: Draw) -> bool:
    m, n, k = draw.size("M", 300), draw.size("N", 400), draw.size("K", 1500)
    block = draw.one("block", ("tensor", "tensor", "row", "128x128"))
    if block == "128x128":
        n, k = -(-n // 128) * 128, -(-k // 128) * 128
    x = draw.operand("x", m, k, draw.one("x fmt", FORMATS.values()), "1x128" if block == "128x128" else block)
    w = draw.operand("w", n, k, draw.one("w fmt", FORMATS.values()), block)
    bias = torch.randn(n, generator=draw.bits) if draw.one("bias", (False, True)) else None
    args = to((x, w, bias, draw.one("out", (torch.bfloat16, torch.float32))), line.device)
    if not line.takes(*args):
        return False
    assert_product(line.kernel.run(*args), args[0], args[1], "gemm", args[2])
    return True


@pytest.mark.parametrize("line", lines("norm_quantize"))
def test_norm_quantize(line: Line) -> None:
    run_cases(line, norm_case)


def norm_case(line: Line, draw: Draw) -> bool:
    rows, cols = draw.size("rows", 200), draw.size("cols", 3000)
    dtype, center = draw.one("dtype", DTYPES), draw.one("center", (False, True))
    x = (torch.randn(rows, cols, generator=draw.bits) * 3 + 0.5).to(dtype)
    weight = (1 + 0.1 * torch.randn(cols, generator=draw.bits)).to(dtype) if draw.one("weight", (True, False)) else None
    bias = 0.1 * weight if center and weight is not None else None
    norm = Norm(weight, bias, 1e-5, center, draw.one("offset", (0.0, 1.0)) if weight is not None else 0.0)
    args = to((x, torch.full((1, 1), 0.3), norm, draw.rounding(TENSOR)), line.device)
    transpose = draw.one("transpose", (False, True))
    if not line.takes(*args, transpose=transpose):
        return False
    out = line.kernel.run(*args, transpose=transpose).quantized
    through = dtype if line.kernel.name == "cpu" else torch.float32
    assert_between(out, *norm_exact(args[0], args[2], through), args[3], "norm_quantize")
    assert not transpose or torch.equal(out.codes_t, out.codes.t())
    return True


@pytest.mark.parametrize("line", lines("act_quantize"))
def test_act_quantize(line: Line) -> None:
    run_cases(line, act_case)


def act_case(line: Line, draw: Draw) -> bool:
    rows, cols, dtype = draw.size("rows", 200), draw.size("cols", 3000), draw.one("dtype", DTYPES)
    activation = draw.one("activation", ACTIVATIONS[1:])
    x = (torch.randn(rows, cols, generator=draw.bits) * 4).to(dtype)
    gated = draw.one("gated", (True, False))
    other = torch.randn(rows, cols, generator=draw.bits).to(dtype) if gated else None
    args = to((x, other, activation, torch.full((1, 1), 0.3), draw.rounding(TENSOR)), line.device)
    transpose = draw.one("transpose", (False, True))
    if not line.takes(*args, transpose=transpose):
        return False
    out = line.kernel.run(*args, transpose=transpose)
    through = dtype if line.kernel.name == "cpu" else torch.float32
    assert_between(out, *activation_exact(args[0], args[1], activation, through), args[4], "act_quantize")
    assert not transpose or torch.equal(out.codes_t, out.codes.t())
    return True
