"""The ends of what a kernel may be given: more than 2**31 elements, rows that are not aligned, K = 0, nothing."""

from __future__ import annotations

import time

import pytest
import tolerance
import torch
from gpu.lines import CUDA, Line, lines, to

import fp8kernels
from bench.check import assert_quantized, assert_same, ternary, ternary_product
from fp8kernels.formats import E4M3, HIF8
from fp8kernels.kernels.gemm import Operand
from fp8kernels.kernels.quantize import Rounding
from fp8kernels.scaling.block import ROW, TENSOR

WIDE = 1 << 15
NEEDED = 24 << 30  # bytes of GPU memory
PATIENCE = 60.0  # seconds
DEVICES = (pytest.param("cpu"), pytest.param(CUDA, marks=pytest.mark.gpu))
PARTS = 64  # rows at the end of a large result that are compared


def rows_beyond_32_bits(line: Line) -> int:
    """Rows of WIDE elements that are more than 2**31 of them; on a CPU a few, which runs the same lines of the test."""
    if line.device != CUDA:
        return PARTS
    end = time.monotonic() + PATIENCE
    while torch.cuda.mem_get_info()[0] < NEEDED and time.monotonic() < end:
        time.sleep(1)  # other processes of this run give theirs back
    free = torch.cuda.mem_get_info()[0]
    assert free >= NEEDED, f"the GPU has {free >> 30} GiB free, this test takes {NEEDED >> 30}"
    return (1 << 31) // WIDE + PARTS


# the reference keeps float64 copies of the whole, which no memory holds; it has no addresses of its own
@pytest.mark.parametrize("line", lines("quantize", but=("reference",)))
@pytest.mark.parametrize("block", (TENSOR, ROW), ids=lambda block: block.name)
def test_quantize_addresses_64_bits(line: Line, block: object) -> None:
    rows = rows_beyond_32_bits(line)
    x = torch.randn(rows, WIDE, dtype=torch.bfloat16, device=line.device)
    how = Rounding(HIF8, block, HIF8.target)  # type: ignore[arg-type]
    scale = torch.full(how.block.grid(rows, WIDE), 0.3, device=line.device)
    assert line.takes(x, scale, how)
    out = line.kernel.run(x, scale, how)
    assert int(out.counts[0]) == x.numel()
    end = slice(rows - PARTS, rows)
    part = scale if block is TENSOR else scale[end]
    expected = line.reference(x[end], part, how)
    assert_same(out.codes[end].cpu(), expected.codes, "codes of the last rows")
    if block is ROW:
        assert_same(out.amax[end].cpu(), expected.amax, "amax of the last rows")


@pytest.mark.parametrize("line", lines("dequantize", but=("reference",)))
def test_dequantize_addresses_64_bits(line: Line) -> None:
    rows = rows_beyond_32_bits(line)
    codes = torch.randint(0, 256, (1, WIDE), dtype=torch.uint8, device=line.device).repeat(rows, 1)
    codes[-PARTS:] = torch.randint(0, 256, (PARTS, WIDE), dtype=torch.uint8, device=line.device)
    args = (torch.full((1, 1), 0.3, device=line.device), E4M3, torch.bfloat16)
    assert line.takes(codes, *args)
    out = line.kernel.run(codes, *args)
    tolerance.exact(out[-PARTS:].cpu(), line.reference(codes[-PARTS:], *args))


@pytest.mark.parametrize("line", lines("gemm", but=("reference",)))
def test_gemm_addresses_64_bits(line: Line) -> None:
    """out has more than 2**31 elements, then x has."""
    rows = rows_beyond_32_bits(line)
    for m, n, k in ((rows, WIDE, 16), (rows, 16, WIDE)):
        x, w = few_rows(m, k, line.device), few_rows(n, k, line.device)
        if line.takes(x, w, None, torch.bfloat16):
            out = line.kernel.run(x, w, None, torch.bfloat16)
            end = ternary_product(x._replace(codes=x.codes[-PARTS:]), w).bfloat16()
            assert_same(out[-PARTS:], end, f"the last rows of {m}x{n}x{k}")


def few_rows(rows: int, cols: int, device: str) -> Operand:
    """-1, 0 and 1: PARTS random rows, over and over."""
    one = torch.ones(1, 1, device=device)
    few = ternary(Operand(torch.empty(PARTS, cols, dtype=torch.uint8, device=device), one, E4M3), rows)
    return few._replace(codes=few.codes.repeat(-(-rows // PARTS), 1)[:rows])


@pytest.mark.parametrize("line", lines("quantize"))
@pytest.mark.parametrize("shift", (1, 3, 8))
def test_operands_off_their_alignment(line: Line, shift: int) -> None:
    """Rows that start anywhere and stand any distance apart, in x and in nothing else."""
    base = torch.randn(40, 300 + shift, device=line.device).bfloat16()
    how = Rounding(E4M3, TENSOR, E4M3.target)
    scale = torch.full((1, 1), 0.01, device=line.device)
    for x in (base[:, shift:], base[1:, :-shift], base[::2, shift:], base.t()[shift:]):
        assert line.takes(x, scale, how)
        got = to(line.kernel.run(x, scale, how), "cpu")
        assert_quantized(got, line.reference(x, scale, how), f"strides {x.stride()}")


@pytest.mark.parametrize("device", DEVICES)
def test_verbs_on_empty_and_odd_tensors(device: str) -> None:
    """Through the public verbs: whatever the kernels refuse, another line of the table takes."""
    for fmt in ("hif8", "e4m3", "e5m2"):
        nothing = fp8kernels.quantize(torch.empty(3, 0, device=device), fmt)
        w = fp8kernels.quantize(torch.empty(5, 0, device=device), fmt)
        bias = torch.randn(5, device=device)
        out = fp8kernels.gemm(nothing, w, bias, out_dtype=torch.float32)
        assert torch.equal(out, bias.expand(3, 5)), "K = 0 is a sum of nothing"
        assert fp8kernels.gemm(fp8kernels.quantize(torch.empty(0, 4, device=device), fmt), fp8kernels.quantize(
            torch.randn(5, 4, device=device), fmt)).shape == (0, 5)  # fmt: skip
        x = torch.randn(7, 33, device=device)
        q = fp8kernels.quantize(x[:, ::3], fmt, block="row")
        assert q.codes.shape == (7, 11)
        assert q.dequantize(torch.bfloat16).device.type == device
        thin = fp8kernels.gemm(fp8kernels.quantize(x, fmt), fp8kernels.quantize(x[:1], fmt))
        assert thin.shape == (7, 1)


@pytest.mark.gpu
def test_cuda_tensors_do_not_fall_to_the_reference() -> None:
    """Where a GPU is, ordinary arguments run on a kernel that was written for it."""
    x, w = (torch.randn(size, 256, device=CUDA).bfloat16() for size in (128, 384))
    for fmt in ("hif8", "e4m3", "e5m2"):
        assert fp8kernels.explain("quantize", x, fmt).kernel in ("cuda", "triton")
        q, p = fp8kernels.quantize(x, fmt), fp8kernels.quantize(w, fmt)
        assert fp8kernels.explain("dequantize", q).kernel in ("cuda", "triton")
        assert fp8kernels.explain("gemm", q, p).kernel not in (None, "reference")
