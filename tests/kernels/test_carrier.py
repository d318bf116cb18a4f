"""The HiF8 carrier: what its tables say against the values of the formats, and the kernels against the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fp8kernels import _cpu
from fp8kernels.formats import E4M3, E5M2, HIF8
from fp8kernels.kernels.quantize import Observer, Rounding, carrier, cpu, reference
from fp8kernels.scaling.block import BLOCKS, ROW, TENSOR, Block

ISAS = ("portable", "avx2", "avx512")
RUNS_HERE = ISAS[: ISAS.index(_cpu.detected_isa()) + 1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHIFTS = {15.0: 4, 224.0: 1}  # the two default targets of HiF8
STALE = (1.1, 2.0, 4.0, 16.0, 1024.0, 3000.0)  # true amax / the one that the scale was made for


@pytest.fixture(autouse=True)
def isa() -> Iterator[None]:
    before = _cpu.current_isa()
    yield
    _cpu.set_isa(before)


def assert_same(x: Tensor, scale: Tensor, how: Rounding, *, transpose: bool = False) -> None:
    """Every instruction set of this machine against the reference, to the bit."""
    assert cpu.why_not(x, scale, how, transpose=transpose) is None
    expected_seen = Observer(torch.tensor([0.5]), torch.arange(4))
    expected = reference.quantize(x, scale, how, transpose=transpose, observer=expected_seen)
    for name in RUNS_HERE:
        _cpu.set_isa(name)
        seen = Observer(torch.tensor([0.5]), torch.arange(4))
        got = cpu.quantize(x, scale, how, transpose=transpose, observer=seen)
        wrong = got.codes != expected.codes
        assert not wrong.any(), f"{name}: {wrong.sum()} codes differ, the first at x = {x[wrong][0]}, {how}"
        assert got.counts.tolist() == expected.counts.tolist(), (name, how)
        for a, b in ((got.scale, expected.scale), (got.amax, expected.amax), (seen.pending, expected_seen.pending)):
            assert torch.equal(a.view(torch.int32), b.view(torch.int32)), (name, a, b)
        assert torch.equal(seen.counters, expected_seen.counters)
        if transpose:
            assert got.codes_t is not None
            assert torch.equal(got.codes_t, expected.codes.t())


@pytest.mark.parametrize("k", range(carrier.LARGEST_SHIFT + 1))
def test_table_of_all_codes(k: int) -> None:
    """Each of the 256 codes by arithmetic on its value: nearest E4M3 value, ties to the even code, saturating."""
    table = carrier.recoding(HIF8, k)
    steps = dict(E4M3.magnitudes)
    for code, value in enumerate(HIF8.values):
        got, above, below = int(table.codes[code]), bool(table.above[code]), bool(table.below[code])
        if math.isnan(value):
            assert (got, above, below) == (E4M3.nan_code, False, False)
            continue
        wanted = abs(value) * 2.0**k
        decoded = E4M3.values[got]
        assert above == (wanted > E4M3.max)
        assert below == (not above and abs(decoded) != wanted)
        if above:
            assert decoded == math.copysign(E4M3.max, value)
        else:
            errors = {step: abs(wanted - step) for step in steps}
            nearest = [step for step, error in errors.items() if error == min(errors.values())]
            assert abs(decoded) == next(step for step in nearest if len(nearest) == 1 or steps[step] % 2 == 0)
            assert decoded == 0 or math.copysign(1, decoded) == math.copysign(1, value)


@pytest.mark.parametrize(
    ("target", "k", "lost", "largest"), [(15.0, 4, 12, 1.5 * 2**-13), (224.0, 1, 18, 1.5 * 2**-10)]
)
def test_what_is_lost_below_is_small(target: float, k: int, lost: int, largest: float) -> None:
    """With the default targets: so many magnitudes, none larger than that, and everything up to the target is exact."""
    assert carrier.shift(target) == k
    table = carrier.recoding(HIF8, k)
    below = {abs(HIF8.values[code]) for code in range(256) if table.below[code]}
    above = {abs(HIF8.values[code]) for code in range(256) if table.above[code]}
    assert (len(below), max(below)) == (lost, largest)
    assert max(below) / target < 1.3e-5
    assert min(above) > target


def test_shift_is_the_largest_that_fits() -> None:
    for target in (E4M3.max, 300.0, 224.0, 100.0, 15.0, 14.0, 7.5, 1.0, 0.1):
        k = carrier.shift(target)
        assert target * 2.0**k <= E4M3.max
        assert k == carrier.LARGEST_SHIFT or target * 2.0 ** (k + 1) > E4M3.max
    assert carrier.shift(1e-9) == carrier.LARGEST_SHIFT
    assert not carrier.recoding(HIF8, carrier.LARGEST_SHIFT).below.any()
    with pytest.raises(ValueError, match="beyond"):
        carrier.shift(HIF8.max)
    assert "e5m2 has no carrier" in str(carrier.why_not(E5M2, 1.0))


@pytest.mark.parametrize("k", [0, 1, 4, carrier.LARGEST_SHIFT])
def test_every_code_through_every_kernel(k: int) -> None:
    """x = every value of HiF8, infinities and NaN too, each also as a row with a scale of its own."""
    x = HIF8.table()
    for saturate in (True, False):
        assert_same(x[None], torch.ones(1, 1), Rounding(HIF8, TENSOR, 15.0, saturate=saturate, carrier=k))
        assert_same(
            (x * 3.0)[:, None], torch.full((256, 1), 3.0), Rounding(HIF8, ROW, 15.0, saturate=saturate, carrier=k)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("target", "k"), SHIFTS.items())
def test_random_tensors_and_stale_scales(target: float, k: int, dtype: torch.dtype) -> None:
    for shape in ((256, 384), (3, 40_001), (1, 130_000)):
        x = (torch.randn(shape) * torch.exp2(torch.randn(shape) * 4)).to(dtype)
        x.view(-1)[5:8] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
        amax = x[x.isfinite()].abs().max().float()
        for block in BLOCKS.values():
            if shape[0] % (block.rows or 1) or shape[1] % (block.cols or 1):
                continue
            how, grid = Rounding(HIF8, block, target, carrier=k), block.grid(*shape)
            assert_same(x, torch.zeros(grid), how, transpose=True)
            for factor in STALE:
                assert_same(x, torch.full(grid, float(amax / target / factor)), how)


def test_a_large_block_on_two_threads() -> None:
    x = torch.randn(1, 300_001).bfloat16()
    for scale in (0.0, 1e-3):
        assert_same(x, torch.full((1, 1), scale), Rounding(HIF8, TENSOR, 15.0, carrier=4))


@pytest.mark.parametrize(("target", "k"), SHIFTS.items())
@pytest.mark.parametrize("factor", (1.0, *STALE))
def test_decoded_is_hif8_where_it_can_be(factor: float, target: float, k: int) -> None:
    """A carrier decodes to the very numbers of HiF8, but for those that its counters own up to."""
    x = torch.randn(512, 512)
    scale = (x.abs().amax() / target / factor).reshape(1, 1)
    plain = reference.quantize(x, scale, Rounding(HIF8, TENSOR, target))
    carried = reference.quantize(x, scale, Rounding(HIF8, TENSOR, target, carrier=k))
    a, b = HIF8.decode(plain.codes) * plain.scale, E4M3.decode(carried.codes) * carried.scale
    table = carrier.recoding(HIF8, k)
    above, below = table.above[plain.codes.long()], table.below[plain.codes.long()]
    assert torch.equal(a != b, above | below)
    assert (b.abs() < a.abs())[above].all()
    elements, saturated, flushed, _ = carried.counts.tolist()
    assert elements == x.numel()
    assert saturated == int(above.sum())
    assert flushed == int((below | ((plain.codes == 0) & (x != 0))).sum())
    assert (saturated > 0) == (factor * target > E4M3.max * 2.0**-k)


@pytest.mark.parametrize("block", (TENSOR, ROW), ids=lambda block: block.name)
def test_scales_of_codes_are_never_subnormal(block: Block) -> None:
    """Where scale * 2**-k would be: the scale is raised first, and the codes are those of HiF8 with that scale."""
    smallest = torch.finfo(torch.float32).tiny
    x = torch.randn(8, 64) * 2.0**-120
    for given in (0.0, smallest, smallest * 3, smallest * 16, smallest * 17):
        how = Rounding(HIF8, block, 15.0, carrier=4)
        scale = torch.full(block.grid(8, 64), given)
        assert_same(x, scale, how)
        got = reference.quantize(x, scale, how)
        assert (got.scale >= smallest).all()
    raised = smallest * 16
    got = reference.quantize(x * 2.0**-4, torch.zeros(block.grid(8, 64)), Rounding(HIF8, block, 15.0, carrier=4))
    assert (got.scale == raised / 16).all()
    codes = HIF8.encode(x * 2.0**-4 / raised)
    lost = carrier.recoding(HIF8, 4).below[codes.long()]
    assert torch.equal(E4M3.decode(got.codes) / 16 != HIF8.decode(codes), lost)


def test_empty_and_reasons() -> None:
    how = Rounding(HIF8, TENSOR, 15.0, carrier=4)
    assert cpu.quantize(torch.empty(0, 8), torch.zeros(1, 1), how).scale.tolist() == [[2.0**-4]]
    for fmt, k in ((HIF8, -1), (HIF8, carrier.LARGEST_SHIFT + 1), (E5M2, 4)):
        reason = cpu.why_not(torch.ones(1, 1), torch.ones(1, 1), Rounding(fmt, TENSOR, 15.0, carrier=k))
        assert f"a carrier of {fmt.name} with k = {k}" in str(reason)
