"""Rows of codes that grow: every number within half a step of the format, none saturated, none lost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fp8kernels.formats import E4M3, FORMATS, HIF8, Format
from fp8kernels.serving.code_store import BLOCK, CodeStore

FMTS = tuple(FORMATS.values())


def half_steps(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """Half the gap between the neighbours of each number of x [B, KH, n, D], in units of x."""
    grid = torch.tensor([value for value, _ in fmt.magnitudes], dtype=torch.float64)
    wide = scale.double()[:, :, None, None]
    above = torch.searchsorted(grid, x.double().abs() / wide, right=True).clamp(1, len(grid) - 1)
    return (grid[above] - grid[above - 1]) / 2 * wide * (1 + 2**-20)  # the quotient is rounded to fp32


def decoded(store: CodeStore) -> Tensor:
    assert store.scale is not None
    return store.fmt.decode(store.filled()).double() * store.scale.double()[:, :, None, None]


def assert_within_half_a_step(store: CodeStore, x: Tensor) -> None:
    assert store.scale is not None
    assert ((decoded(store) - x.double()).abs() <= half_steps(x, store.scale, store.fmt)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fmt", FMTS, ids=lambda fmt: fmt.name)
def test_each_sequence_and_head_has_a_scale_of_its_own(fmt: Format, dtype: torch.dtype) -> None:
    size = torch.tensor([[1e-3, 1.0, 50.0], [2.0, 1e-2, 7.0]])  # [B, KH]
    x = (torch.randn(2, 3, 70, 24) * size[:, :, None, None]).to(dtype)
    store = CodeStore(fmt)
    store.append(x)
    assert_within_half_a_step(store, x)
    assert torch.allclose(store.scale * min(fmt.target, fmt.max / 2), x.float().abs().amax((2, 3)))
    first = store.scale
    for _ in range(3):  # later rows take the same scales
        more = (torch.randn(2, 3, 1, 24) * size[:, :, None, None] / 2).to(dtype)
        store.append(more)
        x = torch.cat([x, more], 2)
    assert store.scale is first and store.recoded == 0
    assert_within_half_a_step(store, x)


def test_rows_one_by_one_are_the_rows_at_once() -> None:
    x = torch.randn(2, 2, 3 * BLOCK + 5, 16)
    x[:, :, 0] = 9.0  # the first row decides the scales
    at_once, one_by_one = CodeStore(HIF8), CodeStore(HIF8)
    at_once.append(x)
    for row in x.split(1, dim=2):
        one_by_one.append(row)
    assert one_by_one.length == x.shape[2]
    assert torch.equal(one_by_one.filled(), at_once.filled()) and torch.equal(one_by_one.scale, at_once.scale)


@pytest.mark.parametrize("length", [2048, 5000])
def test_bytes_stay_close_to_half_of_bf16(length: int) -> None:
    store = CodeStore(E4M3)
    store.append(torch.randn(1, 2, length, 128).bfloat16())
    for _ in range(400):
        store.append(torch.randn(1, 2, 1, 128).bfloat16() / 8)
        assert store.nbytes <= 0.52 * (2 * 2 * 128 * store.length)


@pytest.mark.parametrize("fmt", FMTS, ids=lambda fmt: fmt.name)
def test_a_number_that_does_not_fit_makes_its_head_be_coded_anew(fmt: Format) -> None:
    x = torch.randn(2, 2, 40, 16)
    store = CodeStore(fmt)
    store.append(x)
    before, codes = store.scale.clone(), store.filled().clone()
    x2 = torch.randn(2, 2, 2, 16)
    x2[1, 0, 1, 3] = -4.0 * fmt.max * float(before[1, 0])
    store.append(x2)
    assert store.recoded == 1
    kept = torch.tensor([[True, True], [False, True]])
    assert torch.equal(store.scale[kept], before[kept])
    assert torch.equal(store.filled()[:, :, :40][kept], codes[kept])
    ratio = float(store.scale[1, 0] / before[1, 0])
    assert ratio > 1 and math.log2(ratio).is_integer()
    new = half_steps(torch.cat([x, x2], 2), store.scale, fmt)
    old = half_steps(x, before, fmt)  # rounded twice
    error = (decoded(store) - torch.cat([x, x2], 2)).abs()
    assert (error[:, :, 40:] <= new[:, :, 40:]).all()
    assert (error[:, :, :40] <= old + half_steps(x.abs() + old, store.scale, fmt)).all()
    store.append(x2)  # fits now
    assert store.recoded == 1


def test_a_head_of_zeros_waits_for_its_scale() -> None:
    x = torch.randn(1, 2, 5, 8)
    x[:, 1] = 0
    store = CodeStore(HIF8)
    store.append(x)
    assert store.scale[0, 1] == 0 and store.scale[0, 0] > 0
    assert_within_half_a_step(CodeStoreView(store, 0), x[:, :1])
    assert decoded(store)[0, 1].eq(0).all()
    more = torch.randn(1, 2, 3, 8) * 1e-3
    store.append(more)
    assert store.recoded == 0 and torch.allclose(store.scale[0, 1] * HIF8.target, more[0, 1].abs().max())
    assert_within_half_a_step(store, torch.cat([x, more], 2))


def test_zeros_behind_numbers_leave_the_scale() -> None:
    x = torch.randn(1, 2, 5, 8)
    x[:, 1] = 0  # keeps the store looking for a scale
    store = CodeStore(HIF8)
    store.append(x)
    scale = float(store.scale[0, 0])
    store.append(torch.zeros(1, 2, 3, 8))
    assert float(store.scale[0, 0]) == scale and float(store.scale[0, 1]) == 0
    assert_within_half_a_step(CodeStoreView(store, 0), torch.cat([x[:, :1], torch.zeros(1, 1, 3, 8)], 2))


class CodeStoreView(CodeStore):
    """One head of a store."""

    def __init__(self, of: CodeStore, head: int) -> None:
        super().__init__(of.fmt)
        assert of.codes is not None and of.scale is not None
        self.codes, self.scale, self.length = of.codes[:, head : head + 1], of.scale[:, head : head + 1], of.length


@pytest.mark.parametrize("fmt", FMTS, ids=lambda fmt: fmt.name)
def test_nan_and_inf_are_kept_and_change_no_scale(fmt: Format) -> None:
    x = torch.randn(1, 2, 6, 8)
    x[0, 0, 2, 1], x[0, 0, 3, 2], x[0, 1, 0, 0] = math.nan, math.inf, -math.inf
    store = CodeStore(fmt)
    store.append(x)
    store.append(x)
    twice = torch.cat([x, x], 2)
    got = decoded(store)
    lost = twice.isinf() if fmt.inf_code is None else torch.zeros_like(twice).bool()  # no Inf: NaN in its place
    assert torch.equal(got.isnan(), twice.isnan() | lost)
    assert torch.equal(got.isinf(), twice.isinf() & ~lost) and store.recoded == 0
    finite = torch.where(twice.isfinite(), twice, 0.0)
    assert torch.allclose(store.scale * store.aim, finite.abs().amax((2, 3)))


def test_given_scales() -> None:
    scale = torch.tensor([0.5, 0.25])
    store = CodeStore(E4M3, scale)
    x = torch.randn(3, 2, 4, 8)
    store.append(x)
    assert torch.equal(store.scale, scale.expand(3, 2))
    assert_within_half_a_step(store, x)
    store.clear()
    assert store.length == 0 and store.nbytes == 0
    with pytest.raises(ValueError, match="given for 3 heads"):
        store.append(torch.randn(1, 3, 4, 8))


def test_other_sizes_are_refused() -> None:
    store = CodeStore(HIF8)
    store.append(torch.randn(2, 2, 4, 8))
    for shape in ((3, 2, 1, 8), (2, 1, 1, 8), (2, 2, 1, 16)):
        with pytest.raises(ValueError, match="begin a new cache"):
            store.append(torch.randn(shape))


def test_sequences_are_selected_and_repeated() -> None:
    store = CodeStore(HIF8)
    store.append(torch.randn(3, 2, 4, 8))
    codes, scale = store.filled().clone(), store.scale.clone()
    store.select(torch.tensor([2, 0, 0]))
    assert torch.equal(store.filled(), codes[[2, 0, 0]]) and torch.equal(store.scale, scale[[2, 0, 0]])
    store.repeat(2)
    assert torch.equal(store.filled(), codes[[2, 2, 0, 0, 0, 0]])
