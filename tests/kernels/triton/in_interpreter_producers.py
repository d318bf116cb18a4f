"""Norms, activations and their backwards in Triton, in their derived bounds; test_interpreter.py runs this file."""

from __future__ import annotations

import itertools

import pytest
import torch
from intervals import act_gradients, active, coded_between, norm_gradients, normal, rounded
from kernels.test_producers import ACTIVATIONS, norms
from tolerance import bounded
from torch import Tensor

from fp8kernels.formats import E4M3, FORMATS, HIF8
from fp8kernels.kernels.act_backward import triton_jit as act_backward
from fp8kernels.kernels.act_quantize import triton_jit as act_quantize
from fp8kernels.kernels.norm_backward import triton_jit as norm_backward
from fp8kernels.kernels.norm_quantize import Norm
from fp8kernels.kernels.norm_quantize import triton_jit as norm_quantize
from fp8kernels.kernels.norm_quantize.reference import normalise
from fp8kernels.kernels.quantize import Observer, Quantized, Rounding
from fp8kernels.kernels.quantize import triton_jit as quantize
from fp8kernels.scaling.block import BLOCK_1X128, BLOCK_128X128, ROW, TENSOR

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = (  # shape, block, transposed codes; with and without transposed codes a norm takes different kernels
    ((1, 1), TENSOR, False),
    ((37, 70), TENSOR, False),
    ((37, 70), TENSOR, True),
    ((37, 70), ROW, False),
    ((5, 384), BLOCK_1X128, False),
    ((66, 128), BLOCK_1X128, True),
    ((128, 128), BLOCK_128X128, False),
    ((3, 4500), ROW, True),
)
TURNS = tuple(itertools.product(FORMATS.values(), DTYPES))


def observer() -> Observer:
    return Observer(torch.zeros(1), torch.zeros(4, dtype=torch.int64))


def check(out: Quantized, seen: Observer, y: Tensor, error: Tensor, given: Tensor, how: Rounding) -> None:
    coded_between(out, y, error, given, how)
    assert out.codes_t is None or torch.equal(out.codes_t, out.codes.t())
    assert torch.equal(seen.counters, out.counts)
    assert seen.pending == out.amax.max()


@pytest.mark.parametrize("kind", norms(1))
def test_norm_quantize(kind: str) -> None:
    first = list(norms(1)).index(kind)
    for turn, (shape, block, transpose) in enumerate(CASES):
        fmt, dtype = TURNS[(first + turn) % len(TURNS)]
        x, norm = (torch.randn(shape) * 3 + 0.5).to(dtype), norms(shape[1])[kind]
        how, want = Rounding(fmt, block, fmt.target), normal(x, norm)
        given = torch.full(block.grid(*shape), 0.11 * ((first + turn) % 2))
        assert norm_quantize.why_not(x, given, norm, how, transpose=transpose) is None
        seen = observer()
        out = norm_quantize.norm_quantize(x, given, norm, how, transpose=transpose, observer=seen)
        check(out.quantized, seen, want.y, want.y_error, given, how)
        bounded(out.rstd, want.rstd[:, 0], want.rstd_error[:, 0])
        assert (out.mean is not None) == norm.center
        if out.mean is not None:
            bounded(out.mean, want.mean[:, 0], want.mean_error[:, 0])


def test_both_ways_of_a_norm_give_the_same_codes() -> None:
    """In registers, and from statistics: rows of one tile are summed in the same order."""
    x, norm = torch.randn(20, 256), norms(256)["layer"]
    for block, scale in itertools.product((TENSOR, ROW, BLOCK_1X128), (0.0, 0.05)):
        given, how = torch.full(block.grid(*x.shape), scale), Rounding(HIF8, block, 15.0, carrier=4)
        ways = [norm_quantize.norm_quantize(x, given, norm, how, transpose=transpose) for transpose in (False, True)]
        assert norm_quantize.stays_in_registers(256, how, transpose=False)
        assert not norm_quantize.stays_in_registers(256, how, transpose=True)
        for a, b in zip(ways[0].quantized, ways[1].quantized, strict=True):
            assert a is None or torch.equal(a, b)
        assert torch.equal(ways[0].rstd, ways[1].rstd) and torch.equal(ways[0].mean, ways[1].mean)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_quantize(activation: str) -> None:
    first = ACTIVATIONS.index(activation)
    for turn, (shape, block, transpose) in enumerate(CASES[:-1]):
        fmt, dtype = TURNS[(first + turn) % len(TURNS)]
        x, other = (torch.randn(shape) * 4).to(dtype), torch.randn(shape).to(dtype) if turn % 3 else None
        how, (y, error) = Rounding(fmt, block, fmt.target), active(x, other, activation)
        given = torch.full(block.grid(*shape), 0.11 * (turn % 2))
        assert act_quantize.why_not(x, other, activation, given, how, transpose=transpose) is None
        seen = observer()
        out = act_quantize.act_quantize(x, other, activation, given, how, transpose=transpose, observer=seen)
        check(out, seen, y, error, given, how)


def test_relu_is_quantize_to_the_bit() -> None:
    x = torch.randn(33, 300).bfloat16()
    given, how = torch.full((1, 1), 0.01), Rounding(HIF8, TENSOR, 15.0, carrier=4)
    for got, want in zip(
        act_quantize.act_quantize(x, None, "relu", given, how, transpose=True),
        quantize.quantize(x.relu(), given, how, transpose=True),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", norms(1))
def test_norm_backward(kind: str) -> None:
    for shape, dtype in zip(((1, 1), (37, 70), (5, 384), (300, 17)), itertools.cycle(DTYPES)):
        x, dy = (torch.randn(shape) * 3 + 0.5).to(dtype), torch.randn(shape).to(dtype)
        norm = norms(shape[1])[kind]
        values, errors = norm_gradients(dy, x, norm)
        _, rstd, mean = normalise(x.float(), norm)
        assert norm_backward.why_not(dy, x, rstd, mean, norm) is None
        out = norm_backward.norm_backward(dy, x, rstd, mean, norm)
        for got, want, error, like in zip(out, values, errors, (x, norm.weight, norm.bias), strict=True):
            assert (got is None) == (like is None)
            if got is not None:
                bounded(got, want, rounded(want, error, like.dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_backward(activation: str) -> None:
    turns = itertools.cycle(itertools.product(DTYPES, (True, False)))
    for shape in ((1, 1), (3, 17), (40, 130), (64, 64)):
        dtype, gated = next(turns)
        x, dy = (torch.randn(shape) * 4).to(dtype), torch.randn(shape).to(dtype)
        other = torch.randn(shape).to(dtype) if gated else None
        values, errors = act_gradients(dy, x, other, activation)
        assert act_backward.why_not(dy, x, other, activation) is None
        out = act_backward.act_backward(dy, x, other, activation)
        assert (out[1] is not None) == gated
        for got, want, error in zip(out[: 1 + gated], values, errors, strict=False):
            assert got.dtype == dtype
            bounded(got, want, rounded(want, error, dtype))


def test_strides_and_nothing() -> None:
    wide = torch.randn(16, 512)
    x, other, norm = wide[:, ::2], wide[:, 3:259], norms(256)["layer"]
    given, how = torch.zeros(1, 1), Rounding(E4M3, TENSOR, E4M3.target)
    plain = act_quantize.act_quantize(x.contiguous(), other.contiguous(), "silu", given, how)
    assert torch.equal(act_quantize.act_quantize(x, other, "silu", given, how).codes, plain.codes)
    _, rstd, mean = normalise(other, norm)
    for a, b in zip(
        norm_backward.norm_backward(x, other, rstd, mean, norm),
        norm_backward.norm_backward(x.contiguous(), other.contiguous(), rstd, mean, norm),
        strict=True,
    ):
        assert torch.equal(a, b)
    for a, b in zip(
        act_backward.act_backward(x, other, x, "gelu"),
        act_backward.act_backward(*(t.contiguous() for t in (x, other, x)), "gelu"),
        strict=True,
    ):
        assert torch.equal(a, b)
    none = torch.empty(0, 256)
    assert norm_quantize.norm_quantize(none, given, norm, how).quantized.scale == 1
    assert act_quantize.act_quantize(none, none, "gelu", given, how).codes.shape == (0, 256)
    assert act_backward.act_backward(none, none, None, "gelu")[0].shape == (0, 256)
    gradients = norm_backward.norm_backward(none, none, torch.empty(0), torch.empty(0), norm)
    assert gradients[0].shape == (0, 256) and not gradients[1].any() and not gradients[2].any()


def test_reasons() -> None:
    x, given, how = torch.randn(4, 8), torch.zeros(1, 1), Rounding(E4M3, TENSOR, E4M3.target)
    norm = Norm(torch.ones(8).double(), None, 1e-6, center=False)
    assert "weight is torch.float64" in norm_quantize.why_not(x, given, norm, how)
    assert "other is torch.float64" in act_quantize.why_not(x, x.double(), "silu", given, how)
    assert "dy is torch.float64" in act_backward.why_not(x.double(), x, None, "silu")
    long = torch.randn(1, 20000)
    plain = Norm(None, None, 1e-6, center=False)
    assert "20000" in norm_backward.why_not(long, long, torch.ones(1), None, plain)
    assert norm_quantize.why_not(long, given, plain, how) is None
