"""The compiled decode_attention against the reference: a derived bound, and the same bits for any number of threads."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import attention_bound, bounded
from torch import Tensor

from fp8kernels import _cpu
from fp8kernels.formats import E4M3, FORMATS, HIF8, Format
from fp8kernels.kernels.decode_attention import HeadCodes, cpu, reference

ISAS = ("portable", "avx2", "avx512")
RUNS_HERE = ISAS[: ISAS.index(_cpu.detected_isa()) + 1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FMTS = tuple(FORMATS.values())


@pytest.fixture(autouse=True)
def isa() -> Iterator[None]:
    before = _cpu.current_isa()
    yield
    _cpu.set_isa(before)


def heads(shape: tuple[int, ...], fmt: Format, spread: float = 1.0) -> HeadCodes:
    """Normal numbers at the format's target, in a cache with room to spare."""
    batch, kv_heads, tokens, width = shape
    x = torch.randn(batch, kv_heads, tokens + 5, width) * spread
    scale = torch.rand(batch, kv_heads) * 0.02 + 0.01
    return HeadCodes(fmt.encode(x / scale[:, :, None, None])[:, :, :tokens], scale)


def assert_close(q: Tensor, keys: HeadCodes, values: HeadCodes, fmt: Format, mask: Tensor | None = None) -> None:
    scaling = q.shape[3] ** -0.5
    assert cpu.why_not(q, keys, values, fmt, scaling, mask) is None
    want, bound = attention_bound(q, keys, values, fmt, scaling, mask)
    for isa in RUNS_HERE:
        _cpu.set_isa(isa)
        got = cpu.decode_attention(q, keys, values, fmt, scaling, mask)
        assert got.dtype == q.dtype
        bounded(got, want, bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FMTS, ids=lambda fmt: fmt.name)
def test_formats_and_dtypes(fmt: Format, dtype: torch.dtype) -> None:
    for batch, kv_heads, group, queries, tokens, width in (
        (1, 8, 4, 1, 600, 128),
        (2, 2, 1, 3, 65, 80),
        (1, 1, 7, 2, 513, 96),
        (3, 2, 2, 1, 1, 64),
    ):
        q = torch.randn(batch, kv_heads * group, queries, width).to(dtype)
        keys, values = (heads((batch, kv_heads, tokens, width), fmt) for _ in range(2))
        assert_close(q, keys, values, fmt)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.one_of(
        st.integers(0, 9), st.sampled_from([63, 64, 65, 127, 128, 129, 511, 512, 513, 1023, 1024, 1025, 1537])
    ),
    width=st.sampled_from([1, 7, 8, 16, 56, 63, 64, 65, 72, 80, 96, 120, 127, 128, 136, 256]),
    heads_=st.sampled_from([(1, 1), (1, 3), (2, 4), (2, 5), (3, 1)]),
    batch=st.integers(1, 3),
    queries=st.integers(1, 5),
    kind=st.sampled_from(["causal", "random", "padding", "one for all"]),
    seed=st.integers(0, 2**16),
)
def test_edges_of_tiles(tokens, width, heads_, batch, queries, kind, seed) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    kv_heads, group = heads_
    q = torch.randn(batch, queries, kv_heads * group, width).transpose(1, 2)  # as models give it
    keys, values = (heads((batch, kv_heads, tokens, width), E4M3) for _ in range(2))
    mask = None
    if kind == "random":
        mask = torch.rand(batch, 1, queries, tokens) < 0.6
    elif kind == "padding":  # also all of it
        first = torch.randint(0, tokens + 1, (batch, 1, 1, 1))
        mask = torch.arange(tokens) >= first
    elif kind == "one for all":
        mask = torch.rand(1, 1, 1, tokens) < 0.5
    assert_close(q, keys, values, E4M3, mask)


def test_the_number_of_threads_changes_no_bit() -> None:
    q = torch.randn(2, 8, 1, 128).bfloat16()
    keys, values = (heads((2, 2, 1700, 128), HIF8) for _ in range(2))
    for isa in RUNS_HERE:
        _cpu.set_isa(isa)
        found = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(cpu.decode_attention(q, keys, values, HIF8, 128**-0.5, None))
        assert all(torch.equal(each, found[0]) for each in found)


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    q = torch.randn(3, 4, 1, 64)
    keys, values = (heads((3, 2, 700, 64), HIF8) for _ in range(2))
    together = cpu.decode_attention(q, keys, values, HIF8, 0.125, None)
    for i in range(3):
        alone = [HeadCodes(x.codes[i : i + 1], x.scale[i : i + 1]) for x in (keys, values)]
        assert torch.equal(cpu.decode_attention(q[i : i + 1], *alone, HIF8, 0.125, None)[0], together[i])


def test_queries_that_see_nothing_give_zero() -> None:
    q = torch.randn(2, 4, 2, 64)
    keys, values = (heads((2, 2, 130, 64), HIF8) for _ in range(2))
    mask = torch.zeros(2, 1, 2, 130, dtype=torch.bool)
    mask[1, 0, 1] = True
    for isa in RUNS_HERE:
        _cpu.set_isa(isa)
        out = cpu.decode_attention(q, keys, values, HIF8, 0.125, mask)
        assert out[0].eq(0).all() and out[1, :, 0].eq(0).all() and out[1, :, 1].ne(0).all()
        empty = HeadCodes(keys.codes[:, :, :0], keys.scale)
        assert cpu.decode_attention(q, empty, empty, HIF8, 0.125, None).eq(0).all()
        early = HeadCodes(keys.codes[:, :, :1], keys.scale)  # the first of two queries stands before the only token
        out = cpu.decode_attention(q, early, early, HIF8, 0.125, None)
        assert out[:, :, 0].eq(0).all() and out[:, :, 1].ne(0).all()


@pytest.mark.parametrize("fmt", FMTS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("where", ["key", "value", "query"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_show(fmt: Format, where: str, number: float) -> None:
    """As in the reference: a NaN, or +Inf among scores, takes its query; Inf among values its number of the result."""
    q = torch.rand(1, 2, 2, 72) + 0.5
    keys, values = (heads((1, 1, 140, 72), fmt) for _ in range(2))
    if where == "query":
        q[0, 1, 0, 3] = number
    else:
        code = fmt.encode(torch.tensor([number]), saturate=False)
        (keys if where == "key" else values).codes[0, 0, 77, 5] = code[0]
    want = reference.decode_attention(q, keys, values, fmt, 0.1, None)
    for isa in RUNS_HERE:
        _cpu.set_isa(isa)
        got = cpu.decode_attention(q, keys, values, fmt, 0.1, None)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        assert (got[got.isinf()] == want[want.isinf()]).all()


def test_why_not() -> None:
    q, keys = torch.randn(1, 4, 1, 64), heads((1, 2, 10, 64), HIF8)
    args = (HIF8, 0.1, None)
    assert "meta" in cpu.why_not(q.to("meta"), keys, keys, *args)
    assert "float64" in cpu.why_not(q.double(), keys, keys, *args)
    assert "width" in cpu.why_not(q, keys, HeadCodes(keys.codes[..., :32], keys.scale), *args)
    mask = torch.ones(1, 4, 1, 10, dtype=torch.bool)
    assert "head to head" in cpu.why_not(q, keys, keys, HIF8, 0.1, mask)
