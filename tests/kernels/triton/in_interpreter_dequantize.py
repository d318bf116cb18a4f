"""dequantize and commit in Triton against their references, to the bit; test_interpreter.py runs this file."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernels.test_commit_cpu import state
from tolerance import exact

from fp8kernels.formats import E4M3, FORMATS, Format
from fp8kernels.kernels.commit import ScaleRule, State
from fp8kernels.kernels.commit import reference as commit_reference
from fp8kernels.kernels.commit import triton_jit as commit_triton
from fp8kernels.kernels.dequantize import reference, triton_jit
from fp8kernels.scaling.rules import history_max

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRIDS = (  # shape of the codes, and of the scales
    ((256, 256), (1, 1)),
    ((64, 384), (64, 1)),
    ((64, 384), (64, 3)),
    ((128, 256), (1, 2)),
    ((3, 70), (1, 1)),
    ((3, 70), (3, 7)),
    ((33, 5), (11, 5)),
    ((1, 1), (1, 1)),
    ((1, 5000), (1, 1)),
)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_dequantize(fmt: Format) -> None:
    for (shape, grid), dtype in zip(GRIDS, itertools.cycle(DTYPES)):
        codes = torch.arange(shape[0] * shape[1]).remainder(256).to(torch.uint8).view(shape)
        scale = torch.rand(grid) * torch.exp2(torch.randn(grid) * 20)
        wide = torch.cat([codes, codes], 1)[:, : shape[1]]
        for kind, given in ((dtype, codes), (torch.bfloat16, codes.t().contiguous().t()), (torch.float16, wide)):
            assert triton_jit.why_not(given, scale, fmt, kind) is None
            exact(triton_jit.dequantize(given, scale, fmt, kind), reference.dequantize(given, scale, fmt, kind))


def test_every_code_and_scales_at_the_ends() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    for fmt, dtype in itertools.product(FORMATS.values(), DTYPES):
        for scale in (2.0**-126, 1.1754945e-38, 3e-9, 1.0, 0.1, 3.4e38):
            given = torch.full((1, 1), scale)
            exact(triton_jit.dequantize(codes, given, fmt, dtype), reference.dequantize(codes, given, fmt, dtype))


def test_dequantize_reasons_errors_and_nothing() -> None:
    codes, scale = torch.zeros(4, 6, dtype=torch.uint8), torch.ones(1, 1)
    assert "meta" in triton_jit.why_not(codes.to("meta"), scale, E4M3, torch.float32)
    assert "uint8" in triton_jit.why_not(codes.int(), scale, E4M3, torch.float32)
    assert "float64" in triton_jit.why_not(codes, scale, E4M3, torch.float64)
    with pytest.raises(ValueError, match="equal blocks"):
        triton_jit.dequantize(codes, torch.ones(3, 1), E4M3, torch.float32)
    assert triton_jit.dequantize(codes[:0], torch.ones(0, 1), E4M3, torch.float32).shape == (0, 6)


@pytest.mark.parametrize("algorithm", commit_triton.ALGORITHMS)
def test_commit(algorithm: str) -> None:
    for (window, margin), power_of_two in itertools.product(((1, 0), (2, 1), (33, -2)), (False, True)):
        states = [state(tensors, window, size) for size in (1.0, 1e-44, 1e38) for tensors in (1, 5)]
        copies = [State(*(x.clone() for x in s)) for s in states]
        rule = ScaleRule(algorithm, margin, power_of_two)
        assert commit_triton.why_not(states, rule) is None
        for pending in (None, 0.0, 3.5):  # what is there; nothing, which changes nothing; the same for all
            for s in (*states, *copies) if pending is not None else ():
                s.pending.fill_(pending)
            commit_triton.commit(states, rule)
            commit_reference.commit(copies, rule)
            for mine, theirs in zip(states, copies, strict=True):
                for name, a, b in zip(State._fields, mine, theirs, strict=True):
                    assert torch.equal(a.view(torch.int32), b.view(torch.int32)), (name, window, rule, a, b)


def test_windows_of_different_length_and_the_table_of_addresses() -> None:
    """The table is made once for the same layers, again for others, and the oldest is forgotten."""
    states = [state(3, 4, 1.0), state(3, 17, 1.0)]
    copies = [State(*(x.clone() for x in s)) for s in states]
    commit_triton.tables.clear()
    for _ in range(3):
        commit_triton.commit(states, ScaleRule())
        commit_reference.commit(copies, ScaleRule())
    assert len(commit_triton.tables) == 1
    assert all(
        torch.equal(a, b)
        for mine, theirs in zip(states, copies, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )
    kept = [state(1, 2, 1.0) for _ in range(commit_triton.KEPT_TABLES)]
    for one in kept:
        commit_triton.commit([one], ScaleRule())
    assert len(commit_triton.tables) == commit_triton.KEPT_TABLES
    commit_triton.commit([kept[0]], ScaleRule())
    assert len(commit_triton.tables) == commit_triton.KEPT_TABLES


def test_commit_reasons() -> None:
    one = state(3, 4, 1.0)
    assert "the algorithm is" in commit_triton.why_not([one], ScaleRule(history_max))
    assert "no layers" in commit_triton.why_not([], ScaleRule())
    assert "pending is torch.float64" in commit_triton.why_not(
        [one, one._replace(pending=one.pending.double())], ScaleRule()
    )
    assert "contiguous" in commit_triton.why_not([one._replace(history=one.history[:, ::2])], ScaleRule())
