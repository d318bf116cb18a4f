"""The two lines of gemm's table that torch computes: the vendor's FP8 product, and the product of decoded codes.

Both run on a GPU; here torch's CPU product of the same name stands in for the library, so that what is ours is tested:
padding, scales, bias, and what is refused in which words.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from tolerance import bounded, exact, gemm_bound
from torch import Tensor

from fp8kernels.formats import E4M3, E5M2, FORMATS, HIF8, Format
from fp8kernels.kernels.gemm import Epilogue, Operand, decoded, fast_accumulation, reference, vendor

SHAPES = [(1, 1, 1), (17, 33, 70), (16, 32, 64), (5, 48, 130)]
ROWS, TENSOR = "row", "tensor"


def operand(rows: int, cols: int, fmt: Format, block: str = TENSOR, *, transposed: bool = False) -> Operand:
    codes = fmt.encode(torch.randn(rows, cols) * 3)
    if transposed:
        codes = codes.t().contiguous().t()
    return Operand(codes, torch.rand(rows if block == ROWS else 1, 1) + 0.5, fmt)


def want(x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The float64 product and how far a result may be from it."""
    x64, w64 = reference.decoded(x), reference.decoded(w)
    out = x64 @ w64.T if bias is None else x64 @ w64.T + bias.double()
    return out, gemm_bound(x64, w64, bias, out_dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pair", [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3)], ids=lambda pair: pair[0].name)
def test_vendor(shape: tuple[int, int, int], pair: tuple[Format, Format]) -> None:
    """Every pair of scales; fp32, which torch's CPU product rounds once."""
    m, n, k = shape
    for x_block, w_block, transposed in itertools.product((TENSOR, ROWS), (TENSOR, ROWS), (False, True)):
        x = operand(m, k, pair[0], x_block, transposed=transposed)
        w = operand(n, k, pair[1], w_block, transposed=transposed)
        for bias in (None, torch.randn(n), torch.randn(n).bfloat16()):
            assert vendor.unfit(x, w, bias, torch.float32) is None
            out = vendor.gemm(x, w, bias, torch.float32)
            assert out.is_contiguous() and out.shape == (m, n)
            bounded(out, *want(x, w, bias, torch.float32))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vendor_in_16_bits(shape: tuple[int, int, int], out_dtype: torch.dtype) -> None:
    """Whole numbers up to 256 are exact in both dtypes, so that it does not matter where torch's CPU product rounds."""
    m, n, k = shape
    x = Operand(E4M3.encode(torch.randint(-1, 2, (m, k)).float()), torch.ones(1, 1), E4M3)
    w = Operand(E4M3.encode(torch.randint(-1, 2, (n, k)).float()), torch.ones(n, 1), E4M3)
    bias = torch.randint(-50, 50, (n,)).to(out_dtype)
    assert vendor.unfit(x, w, bias, out_dtype) is None
    exact(vendor.gemm(x, w, bias, out_dtype), reference.gemm(x, w, bias, out_dtype))


def test_vendor_adds_up_in_fp32_unless_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = torch._scaled_mm

    def spy(*args: object, use_fast_accum: bool, **kwargs: object) -> Tensor:
        seen.append(use_fast_accum)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "_scaled_mm", spy)
    before = fast_accumulation()
    try:
        for on in (False, True):
            fast_accumulation(on=on)
            vendor.gemm(operand(4, 16, E4M3), operand(16, 16, E4M3), None, torch.float32)
    finally:
        fast_accumulation(on=before)
    assert seen == [False, True]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_every_code_decodes_to_itself(fmt: Format) -> None:
    every = Operand(torch.arange(256, dtype=torch.uint8).reshape(16, 16), torch.ones(1, 1), fmt)
    exact(decoded.decoded(every), fmt.table(torch.bfloat16).reshape(16, 16))
    assert decoded.decoded(every._replace(codes=every.codes.t())).shape == (16, 16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoded(shape: tuple[int, int, int]) -> None:
    """The sums of torch's CPU product in fp32, which are exact products of the same decoded values."""
    m, n, k = shape
    for x_block, w_block, out_dtype in itertools.product((TENSOR, ROWS), (TENSOR, ROWS), decoded.OUT):
        x, w, bias = operand(m, k, HIF8, x_block), operand(n, k, E4M3, w_block), torch.randn(n)
        assert decoded.unfit(x, w, out_dtype) is None
        sums = decoded.decoded(x).float() @ decoded.decoded(w).float().t()
        bounded(decoded.scaled(sums, x, w, bias, out_dtype), *want(x, w, bias, out_dtype))


def test_scales_beyond_fp32_together() -> None:
    x, w = operand(6, 32, HIF8, ROWS), operand(5, 32, HIF8, ROWS)
    x, w = x._replace(scale=x.scale * 2.0**-126), w._replace(scale=w.scale * 1e38)
    sums = decoded.decoded(x).float() @ decoded.decoded(w).float().t()
    bounded(decoded.scaled(sums, x, w, None, torch.float32), *want(x, w, None, torch.float32))


def test_reasons() -> None:
    x, w = operand(4, 128, E4M3), operand(8, 128, E4M3)
    for line in (vendor, decoded):
        assert "on the CPU" in line.why_not(x, w, None, torch.float32)
        other = x._replace(codes=x.codes.to("meta"))
        assert "meta" in line.why_not(other, w, None, torch.float32)
        assert "epilogue" in line.why_not(fake_cuda(x), fake_cuda(w), None, torch.float32, Epilogue("relu"))
    blocks = w._replace(scale=torch.ones(8, 2))
    assert "e4m3 and e5m2" in vendor.unfit(operand(4, 128, HIF8), w, None, torch.float32)
    assert "e5m2" in vendor.unfit(operand(4, 128, E5M2), operand(8, 128, E5M2), None, torch.float32)
    assert "[8, 2]" in vendor.unfit(x, blocks, None, torch.float32)
    assert "[2, 1]" in vendor.unfit(x._replace(scale=torch.ones(2, 1)), w, None, torch.float32)
    assert "float64" in vendor.unfit(x, w, None, torch.float64)
    assert "torch.float32 and out torch.bfloat16" in vendor.unfit(x, w, torch.ones(8), torch.bfloat16)
    assert "int32" in vendor.unfit(x._replace(codes=x.codes.int()), w, None, torch.float32)
    assert "[8, 2]" in decoded.unfit(x, blocks, torch.float32)
    assert "int32" in decoded.unfit(x._replace(codes=x.codes.int()), w, torch.float32)
    assert "float64" in decoded.unfit(x, w, torch.float64)


class FakeCuda:
    """Stands for a tensor on a GPU where only its device is asked for."""

    is_cpu, is_cuda, device = False, True, torch.device("cuda", 0)


def fake_cuda(operand: Operand) -> Operand:
    return Operand(FakeCuda(), FakeCuda(), operand.fmt)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capability", "cuda", "out_dtype", "rowwise", "says"),
    [
        ((8, 6), "13.0", torch.bfloat16, False, "sm_86"),
        ((8, 9), "12.6", torch.float32, False, None),
        ((8, 9), "13.0", torch.float16, True, "bf16 there"),
        ((9, 0), "12.6", torch.float32, True, "bf16 there"),
        ((9, 0), "13.0", torch.float32, True, None),
        ((9, 0), "13.0", torch.float16, True, None),
        ((10, 0), "13.0", torch.bfloat16, True, None),
        ((10, 0), "13.0", torch.float32, True, "bf16 there"),
    ],
)
def test_what_the_library_writes_where(
    capability: tuple[int, int], cuda: str, out_dtype: torch.dtype, *, rowwise: bool, says: str | None
) -> None:
    reason = vendor.why_not_capability(capability, cuda, out_dtype, rowwise=rowwise)
    assert (reason is None) if says is None else says in reason
