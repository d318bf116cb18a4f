"""The compiled gemm against the float64 product, within the derived bound, for every instruction set here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from tolerance import bounded, exact, gemm_bound
from torch import Tensor

from fp8kernels import _cpu
from fp8kernels.formats import E4M3, E5M2, FORMATS, HIF8, Format
from fp8kernels.kernels.gemm import Operand, cpu, reference
from fp8kernels.kernels.quantize.reference import spread

ISAS = ("portable", "avx2", "avx512")
RUNS_HERE = ISAS[: ISAS.index(_cpu.detected_isa()) + 1]
FMTS = tuple(FORMATS.values())
OUT = (torch.float32, torch.bfloat16)
BLOCKS = {"tensor": (0, 0), "row": (1, 0), "1x128": (1, 128), "128x128": (128, 128)}  # rows, columns; 0 is all of them
# M, N, K: one element, each row of a tile and one more, K around a vector of codes and a scale block, N around a panel,
# tall, wide, K of several blocks
SHAPES = [
    (1, 1, 1),
    *((m, 50, 70) for m in range(1, 18)),
    *((5, 20, k) for k in (2, 17, 63, 64, 65, 127, 128, 129, 384)),
    *((9, n, 33) for n in (1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 96, 97, 145)),
    *((1, n, 130) for n in (1, 3, 4, 5, 37)),
    (600, 3, 40),
    (3, 600, 40),
    (257, 130, 384),
    (100, 60, 2049),
    (11, 50, 5001),
]


@pytest.fixture(autouse=True)
def isa() -> Iterator[None]:
    before = _cpu.current_isa()
    yield
    _cpu.set_isa(before)


def grid(block: str, rows: int, cols: int) -> tuple[int, int]:
    patch_rows, patch_cols = BLOCKS[block]
    return rows // (patch_rows or rows), cols // (patch_cols or cols)


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
    return Operand(codes, torch.rand(grid(block, rows, cols)) + 0.5, fmt)


def decoded(q: Operand) -> Tensor:
    return reference.table64(q.fmt, q.codes) * spread(q.scale.double(), *q.codes.shape)


def check(x: Operand, w: Operand, bias: Tensor | None = None, out_dtypes: tuple[torch.dtype, ...] = OUT) -> None:
    x64, w64 = decoded(x), decoded(w)
    want = x64 @ w64.T if bias is None else x64 @ w64.T + bias.double()
    for out_dtype in out_dtypes:
        bound = gemm_bound(x64, w64, bias, out_dtype)
        assert cpu.why_not(x, w, bias, out_dtype) is None
        for isa in RUNS_HERE:
            assert _cpu.set_isa(isa) is None and _cpu.current_isa() == isa
            got = cpu.gemm(x, w, bias, out_dtype)
            assert got.dtype == out_dtype and got.is_contiguous()
            try:
                bounded(got, want, bound)
            except AssertionError as error:
                raise AssertionError(f"{isa}, {out_dtype}: {error}") from None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    for x_transposed, w_transposed in itertools.product((False, True), repeat=2):
        check(operand(m, k, HIF8, transposed=x_transposed), operand(n, k, E4M3, "row", transposed=w_transposed))


@pytest.mark.parametrize(
    "pair", list(itertools.product(FMTS, repeat=2)), ids=lambda pair: f"{pair[0].name}-{pair[1].name}"
)
@pytest.mark.parametrize("m", [4, 20])  # the streaming and the blocked path
def test_formats(pair: tuple[Format, Format], m: int) -> None:
    """Every finite code of a format against every one of the other."""
    codes = torch.arange(256, dtype=torch.uint8)
    finite = [codes[fmt.table().isfinite()] for fmt in pair]
    x, w = operand(m, 300, pair[0]), operand(40, 300, pair[1])
    x.codes.copy_(finite[0][torch.randint(0, len(finite[0]), (m, 300))])
    w.codes.copy_(finite[1][torch.randint(0, len(finite[1]), (40, 300))])
    check(x, w)


@pytest.mark.parametrize("fmt", FMTS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_code_is_itself(fmt: Format, m: int, *, transposed: bool) -> None:
    """One times each of the 256 codes is exactly that code's number, NaN and Inf included."""
    one = operand(m, 1, HIF8, x=torch.ones(m, 1))
    one.scale.fill_(1.0)
    each = Operand(torch.arange(256, dtype=torch.uint8).reshape(256, 1), torch.ones(1, 1), fmt)
    if transposed:
        each = each._replace(codes=each.codes.t().contiguous().t())
    for isa in RUNS_HERE:
        _cpu.set_isa(isa)
        exact(cpu.gemm(one, each, None, torch.float32), fmt.table().expand(m, 256))
        exact(cpu.gemm(each, one, None, torch.bfloat16), fmt.table(torch.bfloat16)[:, None].expand(256, m))


@pytest.mark.parametrize("w_block", BLOCKS)
@pytest.mark.parametrize("x_block", BLOCKS)
@pytest.mark.parametrize("k", [128, 384, 2304])
@pytest.mark.parametrize("m", [3, 128])
def test_blocks(x_block: str, w_block: str, k: int, m: int) -> None:
    if x_block == "128x128" and m == 3:
        x_block = "1x128"  # 128 rows do not divide 3
    check(operand(m, k, E4M3, x_block), operand(256, k, HIF8, w_block), torch.randn(256))


@pytest.mark.parametrize("blocks", [("row", "row"), ("1x128", "128x128")], ids=str)
@pytest.mark.parametrize("m", [5, 128])
def test_transposed_blocks(blocks: tuple[str, str], m: int) -> None:
    for x_transposed, w_transposed in ((True, False), (False, True), (True, True)):
        x = operand(m, 256, E5M2, blocks[0], transposed=x_transposed)
        check(x, operand(128, 256, E4M3, blocks[1], transposed=w_transposed))


def test_other_grids() -> None:
    """Any grid whose scales change every even number of elements; an odd step is refused in words."""
    x, w = operand(12, 90), operand(20, 90)
    x = x._replace(scale=torch.rand(4, 3) + 0.5)
    w = w._replace(scale=torch.rand(5, 9) + 0.5)
    check(x, w)
    reason = cpu.why_not(x._replace(scale=torch.rand(12, 6)), w, None, torch.float32)
    assert reason is not None and "every 5 elements" in reason


@pytest.mark.parametrize("m", [2, 33])
@pytest.mark.parametrize("bias_dtype", OUT, ids=str)
def test_bias(bias_dtype: torch.dtype, m: int) -> None:
    check(operand(m, 80), operand(51, 80), torch.randn(51).mul(100).to(bias_dtype))
    check(operand(m, 80), operand(51, 80), torch.randn(102).to(bias_dtype)[::2])


def test_strides() -> None:
    """Rows or columns apart, neither contiguous, a single row or column, a view into a larger tensor."""
    x, w = operand(20, 96), operand(30, 96)
    check(x._replace(codes=x.codes[::2]), w._replace(codes=w.codes[3:25]))
    check(x._replace(codes=x.codes[:, ::3]), w._replace(codes=w.codes[:, ::3]))
    check(x._replace(codes=x.codes[:, :50]), w._replace(codes=w.codes[:, 40:90]))
    check(x._replace(codes=x.codes[:1]), w._replace(codes=w.codes[:, :96]))
    check(operand(20, 1), operand(30, 1, transposed=True))
    check(x._replace(codes=x.codes[:1].expand(7, 96)), w)


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("fmt", FMTS, ids=lambda fmt: fmt.name)
def test_special_codes(fmt: Format, m: int) -> None:
    """NaN and Inf reach exactly the outputs that use them; zeros give zeros."""
    x, w = operand(m, 200, fmt), operand(60, 200, fmt)
    x.codes[1, 7] = fmt.nan_code
    w.codes[50, 199] = fmt.nan_code
    if fmt.inf_code is not None:
        x.codes[2, 100] = fmt.inf_code
        w.codes[3, 5] = fmt.inf_code | 0x80
        w.codes[4, 100] = 0  # Inf * 0 is NaN
    check(x, w)
    _cpu.set_isa(RUNS_HERE[-1])
    out = cpu.gemm(x, w, None, torch.float32)
    assert out[1].isnan().all() and out[:, 50].isnan().all() and out[0, :3].isfinite().all()
    zero = x._replace(codes=torch.zeros_like(x.codes))
    for isa in RUNS_HERE:
        _cpu.set_isa(isa)
        exact(cpu.gemm(zero, operand(60, 200, fmt), None, torch.bfloat16), torch.zeros(m, 60, dtype=torch.bfloat16))


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("block", ["row", "1x128"])
def test_extreme_scales(block: str, m: int) -> None:
    """The product of two scales may leave the range of fp32 where the result does not, and results may be subnormal."""
    x, w = operand(m, 256, HIF8, block), operand(60, 256, E4M3, block)
    for x_scale, w_scale in ((2.0**-126, 1e30), (1e-30, 2e38), (1e30, 1e-38), (2.0**-126, 2.0**-8), (1e30, 1e5)):
        check(x._replace(scale=x.scale * x_scale), w._replace(scale=w.scale * w_scale))
    mixed = torch.tensor([2.0**-126, 1.0])[torch.randint(0, 2, x.scale.shape)]
    huge = torch.tensor([1e30, 1.0])[torch.randint(0, 2, w.scale.shape)]
    check(x._replace(scale=mixed), w._replace(scale=huge), torch.randn(60))


@pytest.mark.parametrize("shape", [(0, 5, 7), (5, 0, 7), (5, 6, 0)], ids=str)
def test_empty(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    x = Operand(torch.zeros(m, k, dtype=torch.uint8), torch.ones(1, 1), E4M3)
    w = Operand(torch.zeros(n, k, dtype=torch.uint8), torch.ones(1, 1), E4M3)
    bias = torch.randn(n)
    for isa, out_dtype in itertools.product(RUNS_HERE, OUT):
        _cpu.set_isa(isa)
        exact(cpu.gemm(x, w, bias, out_dtype), bias.to(out_dtype).expand(m, n))
        exact(cpu.gemm(x, w, None, out_dtype), torch.zeros(m, n, dtype=out_dtype))


@pytest.mark.parametrize("shape", [(3, 700, 512), (200, 333, 384), (700, 100, 2200)], ids=str)
def test_threads_do_not_change_a_bit(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    x, w = operand(m, k, HIF8, "row"), operand(n, k, E4M3, "row")
    for isa in RUNS_HERE:
        _cpu.set_isa(isa)
        torch.set_num_threads(1)
        alone = cpu.gemm(x, w, None, torch.float32)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            exact(cpu.gemm(x, w, None, torch.float32), alone)


def test_why_not() -> None:
    x, w = operand(4, 8), operand(4, 8)
    for args, word in (
        ((x, w, None, torch.float16), "float16"),
        ((x, w, torch.zeros(4, dtype=torch.float64), torch.float32), "float64"),
        ((x._replace(codes=x.codes.to("meta")), w, None, torch.float32), "meta"),
        ((x, w._replace(scale=w.scale.double()), None, torch.float32), "float64"),
        ((x._replace(codes=x.codes.int()), w, None, torch.float32), "int32"),
    ):
        reason = cpu.why_not(*args)
        assert reason is not None and word in reason
