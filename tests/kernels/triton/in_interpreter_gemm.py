"""Triton's gemm against the float64 product, in Triton's interpreter; test_interpreter.py runs this file.

The interpreter stands for a small sm_90 whose products are fp32, so what is tested is all but the tensor cores.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tolerance import bounded, epilogue_bound, exact, gemm_bound
from torch import Tensor

import fp8kernels
from fp8kernels.formats import E4M3, E5M2, FORMATS, HIF8, Format
from fp8kernels.kernels.gemm import ACTIVATIONS, PLAIN, Epilogue, Operand, reference, triton_jit
from fp8kernels.kernels.gemm.ending.triton_jit import HALVED
from fp8kernels.kernels.gemm.triton_tile import FEW_ROWS
from fp8kernels.kernels.quantize import Observer, Rounding
from fp8kernels.kernels.quantize import reference as quantize_reference
from fp8kernels.scaling.block import TENSOR

FMTS = tuple(FORMATS.values())
OUT = (torch.float32, torch.bfloat16, torch.float16)
GRIDS = {"tensor": (0, 0), "row": (1, 0), "1x128": (1, 128), "128x128": (128, 128)}  # rows, columns; 0 is all of them


def operand(
    rows: int,
    cols: int,
    fmt: Format = E4M3,
    block: str = "tensor",
    *,
    transposed: bool = False,
    x: Tensor | None = None,
) -> Operand:
    codes = fmt.encode(torch.randn(rows, cols) * 3 if x is None else x)
    if transposed:
        codes = codes.t().contiguous().t()
    patch_rows, patch_cols = GRIDS[block]
    grid = rows // (patch_rows or rows), cols // (patch_cols or cols)
    return Operand(codes, torch.rand(grid) + 0.5, fmt)


def whole(rows: int, cols: int, fmt: Format = HIF8) -> Operand:
    """Small whole numbers: their sums are exact in fp32."""
    return Operand(fmt.encode(torch.randint(-4, 5, (rows, cols)).float()), torch.ones(1, 1), fmt)


def check(
    x: Operand,
    w: Operand,
    bias: Tensor | None = None,
    out_dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    epilogue: Epilogue = PLAIN,
) -> None:
    x64, w64 = reference.decoded(x), reference.decoded(w)
    want = reference.gemm(x, w, bias, torch.float64, epilogue)
    for out_dtype in out_dtypes:
        assert triton_jit.why_not(x, w, bias, out_dtype, epilogue) is None
        got = triton_jit.gemm(x, w, bias, out_dtype, epilogue)
        assert got.dtype == out_dtype and got.is_contiguous()
        if epilogue is PLAIN:
            bounded(got, want, gemm_bound(x64, w64, bias, out_dtype))
        else:
            bounded(got, want, epilogue_bound(x64, w64, bias, out_dtype, epilogue))


@pytest.mark.parametrize("pair", list(itertools.product(FMTS, repeat=2)), ids=lambda pair: pair[0].name)
def test_formats(pair: tuple[Format, Format]) -> None:
    """Every finite code of a format against those of the other."""
    codes = torch.arange(256, dtype=torch.uint8)
    x, w = operand(20, 160, pair[0]), operand(40, 160, pair[1])
    for side in (x, w):
        finite = codes[side.fmt.table().isfinite()]
        side.codes.copy_(finite[torch.randint(0, len(finite), side.codes.shape)])
    check(x, w)


@pytest.mark.parametrize("fmt", FMTS, ids=lambda fmt: fmt.name)
def test_every_code_is_itself(fmt: Format) -> None:
    """One times each of the 256 codes is exactly that code's number, NaN and Inf included."""
    one = Operand(HIF8.encode(torch.ones(3, 1)), torch.ones(1, 1), HIF8)
    each = Operand(torch.arange(256, dtype=torch.uint8).reshape(256, 1), torch.ones(1, 1), fmt)
    exact(triton_jit.gemm(one, each, None, torch.bfloat16), fmt.table(torch.bfloat16).expand(3, 256))
    exact(triton_jit.gemm(each, one, None, torch.float32), fmt.table()[:, None].expand(256, 3))


@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 33, 70), (64, 65, 127), (65, 64, 129), (130, 70, 140)], ids=str)
def test_shapes_and_strides(shape: tuple[int, int, int]) -> None:
    """Around the edges of tiles; rows, columns or neither contiguous; few rows of x are read with their strides."""
    m, n, k = shape
    for x_transposed, w_transposed in ((False, False), (True, True)):
        check(operand(m, k, HIF8, transposed=x_transposed), operand(n, k, E4M3, "row", transposed=w_transposed))
    x, w = operand(m, 2 * k), operand(n, 2 * k, E5M2)
    out_dtypes = OUT if m < 65 else OUT[1:2]
    check(x._replace(codes=x.codes[:, ::2]), w._replace(codes=w.codes[:, 1::2]), torch.randn(2 * n)[::2], out_dtypes)


@pytest.mark.parametrize("x_block", ["tensor", "row", "1x128"])
@pytest.mark.parametrize("w_block", GRIDS)
def test_scales(x_block: str, w_block: str) -> None:
    for m in (3, 128):
        check(operand(m, 256, E4M3, x_block), operand(128, 256, HIF8, w_block))


def test_other_grids() -> None:
    """Any grid whose scales change along K every multiple of 128; another step is refused in words."""
    x, w = operand(12, 768), operand(20, 768)
    x = x._replace(scale=torch.rand(4, 3) + 0.5)
    w = w._replace(scale=torch.rand(5, 2) + 0.5)
    check(x, w)
    reason = triton_jit.why_not(x._replace(scale=torch.rand(12, 12)), w, None, torch.float32)
    assert reason is not None and "every 64 elements" in reason


@pytest.mark.parametrize(("m", "block"), [(70, "row"), (5, "1x128")])
def test_extreme_scales(block: str, m: int) -> None:
    """The product of two scales may leave the range of fp32 where the result does not, and results may be subnormal."""
    x, w = operand(m, 128, HIF8, block), operand(33, 128, E4M3, block)
    for x_scale, w_scale in ((2.0**-126, 1e30), (1e-30, 2e38), (1e30, 1e-38), (2.0**-126, 2.0**-8), (1e30, 1e5)):
        check(x._replace(scale=x.scale * x_scale), w._replace(scale=w.scale * w_scale))
    mixed = torch.tensor([2.0**-126, 1.0])[torch.randint(0, 2, x.scale.shape)]
    huge = torch.tensor([1e30, 1.0])[torch.randint(0, 2, w.scale.shape)]
    check(x._replace(scale=mixed), w._replace(scale=huge))


@pytest.mark.parametrize("fmt", FMTS, ids=lambda fmt: fmt.name)
def test_special_codes(fmt: Format) -> None:
    """NaN and Inf reach exactly the outputs that use them; zeros give zeros."""
    x, w = operand(5, 200, fmt), operand(60, 200, fmt)
    x.codes[1, 7] = fmt.nan_code
    w.codes[50, 199] = fmt.nan_code
    if fmt.inf_code is not None:
        x.codes[2, 100] = fmt.inf_code
        w.codes[3, 5] = fmt.inf_code | 0x80
        w.codes[4, 100] = 0  # Inf * 0 is NaN
    check(x, w)
    check(x, w, epilogue=Epilogue("relu"))
    zero = x._replace(codes=torch.zeros_like(x.codes))
    exact(triton_jit.gemm(zero, operand(60, 200, fmt), None, torch.bfloat16), torch.zeros(5, 60, dtype=torch.bfloat16))


@pytest.mark.parametrize("epilogue", ["numbers", "codes"])
def test_split_k(epilogue: str) -> None:
    """Few tiles: two parts of K, added by the second kernel, the same bits in every run."""
    x, w = whole(20, 1100), whole(60, 1100, E4M3)
    bias, residual = torch.randint(-9, 9, (60,)).float(), torch.randint(-9, 9, (20, 60)).float()
    assert triton_jit.plan(x, w).tile.splits == 2
    ending = Epilogue("relu", residual)
    if epilogue == "numbers":
        exact(triton_jit.gemm(x, w, bias, torch.float32, ending), reference.gemm(x, w, bias, torch.float32, ending))
        check(operand(20, 1280, HIF8, "1x128"), operand(40, 1280, E4M3, "row"), torch.randn(40))
    else:
        same_codes(x, w, bias, "relu", residual, Rounding(HIF8, TENSOR, 15.0), 0.7)


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """One multiprocessor is busy with one tile, which therefore has 128 columns, ended in halves."""
    monkeypatch.setattr(triton_jit, "machine", lambda device: triton_jit.Machine((9, 0), 1, takes_codes=False))


@pytest.mark.usefixtures("wide_tiles")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation: str) -> None:
    x, w, bias = operand(70, 90, HIF8, "row"), operand(100, 90), torch.randn(100).bfloat16() * 3
    assert triton_jit.plan(x, w).tile.cols >= HALVED.value
    residual = torch.randn(200, 70).bfloat16().t()[:, ::2]
    check(x, w, None, (torch.bfloat16,), Epilogue(activation))
    big = w._replace(scale=w.scale * 1e4)  # where exp overflows and erf is one
    check(x, big, bias, (torch.float32,), Epilogue(activation, residual))


def same_codes(
    x: Operand, w: Operand, bias: Tensor | None, activation: str, residual: Tensor | None, how: Rounding, scale: float
) -> None:
    """Codes and all that is noted of them are those of the reference, for sums that are exact."""
    found = []
    for run in (triton_jit, reference):
        observer = Observer(torch.ones(1), torch.full((4,), 5))
        epilogue = Epilogue(activation, residual, how, torch.full((1, 1), scale), observer)
        assert run.why_not(x, w, bias, torch.float32, epilogue) is None
        out: Any = run.gemm(x, w, bias, torch.float32, epilogue)
        found.append((out.codes, out.scale, out.amax, out.counts, *observer))
    for name, got, want in zip(("codes", "scale", "amax", "counts", "pending", "counters"), *found, strict=True):
        if got.dtype == torch.float32:
            got, want = got.view(torch.int32), want.view(torch.int32)  # NaN too
        assert torch.equal(got, want), f"{name}: {got} against {want}"


@pytest.mark.usefixtures("wide_tiles")
@pytest.mark.parametrize(
    "how",
    [
        *(Rounding(fmt, TENSOR, fmt.target, saturate=saturate) for fmt in FMTS for saturate in (True, False)),
        Rounding(HIF8, TENSOR, 15.0, carrier=4),
    ],
    ids=lambda how: f"{how.fmt.name}-{how.saturate}-{how.carrier}",
)
def test_codes(how: Rounding) -> None:
    """Scales for which much is flushed, none, and much saturates."""
    x, w, bias = whole(66, 50), whole(100, 50, E4M3), torch.randint(-9, 9, (100,)).float()
    for scale, activation in ((1e6, "none"), (0.83, "relu"), (1e-4, "none")):
        same_codes(x, w, bias, activation, torch.randint(-9, 9, (66, 100)).half(), how, scale)


def test_an_amax_that_is_not_finite_is_reported_and_not_noted() -> None:
    x, w = whole(70, 20), whole(40, 20)
    x.codes[69, 0] = HIF8.nan_code
    same_codes(x, w, None, "none", None, Rounding(HIF8, TENSOR, 15.0), 0.5)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_codes_of_sums_that_are_not_exact(activation: str) -> None:
    """A code lies between those of the float64 result and its bound on either side."""
    x, w = operand(70, 130, HIF8), operand(40, 130, E4M3, "row")
    scale, how = torch.full((1, 1), 0.9), Rounding(E4M3, TENSOR, 448.0)
    got: Any = triton_jit.gemm(x, w, None, torch.float32, Epilogue(activation, None, how, scale))
    plain = Epilogue(activation)
    want = reference.gemm(x, w, None, torch.float64, plain)
    off = epilogue_bound(reference.decoded(x), reference.decoded(w), None, torch.float32, plain)
    low, high = (quantize_reference.quantize((want + side * off).float(), scale, how) for side in (-1, 1))
    value = E4M3.decode(got.codes)
    assert ((E4M3.decode(low.codes) <= value) & (value <= E4M3.decode(high.codes))).all()
    assert torch.equal(got.scale, scale)
    assert (got.amax - want.abs().max()).abs() <= off.max()


def test_what_the_kernel_reads() -> None:
    """Few rows in place; codes for the tensor cores aligned and padded with zeros, and so are values in bf16."""
    codes = torch.randint(0, 256, (80, 70), dtype=torch.uint8)
    few = Operand(codes[:FEW_ROWS], torch.ones(1, 1), E4M3)
    assert triton_jit.plan(few, few).read == triton_jit.DECODED
    assert triton_jit.readable(few, triton_jit.DECODED).codes is few.codes
    for many in (codes, codes.t(), codes[:, 1:], torch.zeros(80, 96, dtype=torch.uint8)[:, 1:65]):
        for fmt in FMTS:
            operand = Operand(many, torch.ones(1, 1), fmt)
            read = triton_jit.readable(operand, triton_jit.CODES).codes
            assert triton_jit.is_aligned(read) and read.shape[1] % 16 == 0
            assert torch.equal(read[:, : many.shape[1]], many) and not read[:, many.shape[1] :].any()
            decoded = triton_jit.readable(operand, triton_jit.BF16).codes
            assert decoded.shape == read.shape and decoded.is_contiguous() and not decoded[:, many.shape[1] :].any()
            exact(decoded[:, : many.shape[1]], fmt.decode(many).bfloat16())


def test_the_verb_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter Triton stands before the CPU's kernel, also with an epilogue."""
    x, w = (fp8kernels.QTensor(q.codes, q.scale, q.fmt, TENSOR) for q in (whole(20, 64), whole(30, 64)))
    residual = torch.randint(-9, 9, (20, 30)).float()
    want = (x.dequantize() @ w.dequantize().T).relu() + residual
    monkeypatch.setenv("FP8KERNELS_BACKEND", "triton")
    for rest in ({}, {"activation": "relu", "residual": residual}, {"out_fmt": "hif8", "out_scale": 0.5}):
        assert fp8kernels.explain("gemm", x, w, **rest).kernel == "triton"
    out = fp8kernels.gemm(x, w, out_dtype=torch.float32, activation="relu", residual=residual)
    exact(out, want)


def test_reasons() -> None:
    x, w = operand(4, 8), operand(4, 8)
    for args, word in (
        ((x, w, None, torch.float64), "float64"),
        ((x, w, torch.zeros(4, dtype=torch.float64), torch.float32), "bias is torch.float64"),
        ((x._replace(codes=x.codes.to("meta")), w, None, torch.float32), "meta"),
        ((x, w._replace(scale=w.scale.double()), None, torch.float32), "float64"),
        ((x._replace(codes=x.codes.int()), w, None, torch.float32), "int32"),
        (
            (x._replace(codes=torch.empty(1, 1, dtype=torch.uint8).expand(2**31, 8)), w, None, torch.float32),
            "2147483648",
        ),
    ):
        reason = triton_jit.why_not(*args)
        assert reason is not None and word in reason
    observer = Observer(torch.ones(1), torch.ones(8, dtype=torch.int64)[::2])
    epilogue = Epilogue("none", None, Rounding(HIF8, TENSOR, 15.0), torch.ones(1, 1), observer)
    assert "not contiguous" in str(triton_jit.why_not(x, w, None, torch.float32, epilogue))
