"""Whether a GPU's kernels give the reference's numbers on that very GPU: asked once for each, before its first use.

The tests show it for the machines they ran on; a user's chip, driver and compiler may be others. A kernel that fails is
passed over, with a warning, and `explain` gives the reason. FP8KERNELS_PROOF=0 asks nothing. While a CUDA graph is
captured nothing can be asked, as the answer is waited for: run a step before you capture one, as torch advises anyway.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..formats import E4M3, E5M2, FORMATS, HIF8, Format
from ..kernels.commit import ScaleRule, State
from ..kernels.decode_attention import HeadCodes
from ..kernels.gemm import Operand
from ..kernels.norm_quantize import Norm
from ..kernels.quantize import Quantized, Rounding
from ..scaling.block import BLOCKS, TENSOR

VARIABLE = "FP8KERNELS_PROOF"
ROUNDED = 2**-7  # of the largest number beside it: results in bf16, and sums in another order
FEW = 16  # one code in so many may be a neighbour of the reference's, where a sum decides before it is rounded

Arguments = tuple[Any, ...]
_faults: dict[tuple[str, str, int], str | None] = {}


class Line(Protocol):
    """A line of the table."""

    @property
    def name(self) -> str: ...
    @property
    def why_not(self) -> Callable[..., str | None]: ...
    @property
    def run(self) -> Callable[..., Any]: ...


def fault(verb: str, kernel: Line, reference: Line, args: Any) -> str | None:
    """Why a kernel is not used on the GPU of these arguments, although it takes them; None where it is right."""
    device = device_of(args)
    if device is None or device.type != "cuda" or os.environ.get(VARIABLE) == "0":
        return None
    key = verb, kernel.name, device.index or 0
    if key not in _faults:
        if torch.cuda.is_current_stream_capturing():
            return None
        _faults[key] = None  # while it is asked
        _faults[key] = wrong = compare(verb, kernel, reference, device)
        if wrong is not None:
            said = f"{verb}: the kernel {kernel.name!r} is not used on {device}: {wrong}"
            warnings.warn(said, RuntimeWarning, stacklevel=3)
    return _faults[key]


def compare(verb: str, kernel: Line, reference: Line, device: torch.device) -> str | None:
    """What differs between a kernel and the reference over small cases, in words, or None; waits for the device."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), fp32():
        torch.manual_seed(11)
        for args in CASES[verb]():
            here = to(args, device)
            if kernel.why_not(*here) is not None:
                continue
            try:
                got = kernel.run(*here)
                wrong = AGREES[verb](to(here[0] if got is None else got, "cpu"), expected(reference.run, args))
            except Exception as error:  # whatever it is: another kernel can do the work
                wrong = f"it raises {type(error).__name__}: {error}"
            if wrong is not None:
                return f"{wrong} (of the numbers that the reference gives for {text(args)})"
    return None


@contextmanager
def fp32() -> Iterator[None]:
    """The cases are fp32 where they name no other dtype, whatever the user's default is."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def expected(run: Callable[..., Any], args: Arguments) -> Any:
    """The reference's result; of a verb that works in place its first argument."""
    args = to(args, "cpu")
    out = run(*args)
    return args[0] if out is None else out


# ---- small cases: few, as each may be a compilation of some seconds ----


def numbers(rows: int, cols: int) -> Tensor:
    """bf16 [rows, cols], normal numbers with zeros, tiny and large ones among them."""
    x = torch.randn(rows, cols) * torch.exp2(torch.randint(-12, 6, (rows, cols)).float())
    x.view(-1)[:: cols + 3] = 0.0
    return x.bfloat16()


def roundings() -> Iterator[tuple[Rounding, Tensor]]:
    """How [128, 256] is rounded, and scales: every format with a given one, every block with unknown ones (0)."""
    for fmt, block in zip(itertools.cycle(FORMATS.values()), BLOCKS.values(), strict=False):
        yield Rounding(fmt, TENSOR, fmt.target), torch.full((1, 1), 0.25)
        yield Rounding(fmt, block, fmt.target), torch.zeros(block.grid(128, 256))


def quantize_cases() -> Iterator[Arguments]:
    for how, scale in roundings():
        yield numbers(128, 256), scale, how
    yield numbers(128, 256), torch.full((1, 1), 0.25), Rounding(HIF8, TENSOR, HIF8.target, carrier=4)


def dequantize_cases() -> Iterator[Arguments]:
    codes = torch.arange(256, dtype=torch.uint8).repeat(128, 1)
    for fmt, block in zip(itertools.cycle(FORMATS.values()), BLOCKS.values(), strict=False):
        yield codes, torch.rand(block.grid(128, 256)) + 0.5, fmt, torch.bfloat16


def gemm_cases() -> Iterator[Arguments]:
    """-1, 0 and 1 with scales that are powers of two: such sums are exact in any accumulator, in any order."""

    def operand(rows: int, depth: int, fmt: Format, grid: tuple[int, int]) -> Operand:
        codes = fmt.encode(torch.randint(-1, 2, (rows, depth)).float())
        return Operand(codes, torch.exp2(torch.randint(-2, 3, grid).float()), fmt)

    for (x, w), (m, n, k) in itertools.product(((E4M3, E4M3), (HIF8, HIF8)), ((5, 130, 1040), (130, 257, 384))):
        yield operand(m, k, x, (1, 1)), operand(n, k, w, (1, 1)), None, torch.float32
    for x, w in ((E5M2, E4M3), (E4M3, E5M2)):
        yield operand(70, 200, x, (70, 1)), operand(90, 200, w, (90, 1)), torch.ones(90), torch.float32
    yield operand(130, 384, E4M3, (130, 3)), operand(256, 384, E4M3, (2, 3)), None, torch.float32


def norm_cases() -> Iterator[Arguments]:
    weight = torch.rand(256) + 0.5
    for (how, scale), center in zip(roundings(), itertools.cycle((False, True, True, False)), strict=False):
        yield numbers(128, 256), scale, Norm(weight, weight if center else None, 1e-5, center), how


def norm_backward_cases() -> Iterator[Arguments]:
    weight, rstd = torch.rand(256) + 0.5, torch.rand(128) + 0.5
    for center in (False, True):
        norm = Norm(weight, weight if center else None, 1e-5, center)
        yield torch.randn(128, 256), torch.randn(128, 256), rstd, torch.randn(128) if center else None, norm


def act_cases() -> Iterator[Arguments]:
    kinds = itertools.product(("silu", "gelu", "relu", "gelu_tanh"), (True, False))
    for (how, scale), (activation, gated) in zip(roundings(), kinds, strict=False):
        x = torch.randn(128, 256).bfloat16()
        yield x, torch.randn(128, 256).bfloat16() if gated else None, activation, scale, how


def act_backward_cases() -> Iterator[Arguments]:
    for activation in ("silu", "gelu", "relu", "gelu_tanh"):
        yield torch.randn(64, 96), torch.randn(64, 96), torch.randn(64, 96), activation


def commit_cases() -> Iterator[Arguments]:
    for algorithm in ("max", "moving_average", "most_recent", "exponential_moving_average"):
        states = [
            State(torch.rand(3, window), torch.tensor([1.5, 0.0, torch.inf]), torch.rand(3), torch.full((3,), 15.0))
            for window in (1, 40)
        ]
        yield states, ScaleRule(algorithm)


def decode_attention_cases() -> Iterator[Arguments]:
    for fmt, (heads, queries) in zip(FORMATS.values(), ((8, 1), (2, 3), (6, 2)), strict=False):
        keys, values = (
            HeadCodes(fmt.encode(torch.randn(2, 2, 70, 80) * 4), torch.rand(2, 2) * 0.1 + 0.1) for _ in range(2)
        )
        yield torch.randn(2, heads, queries, 80), keys, values, fmt, 80**-0.5, None
        yield torch.randn(2, heads, queries, 80), keys, values, fmt, 80**-0.5, torch.rand(2, 1, queries, 70) < 0.8


CASES: dict[str, Callable[[], Iterator[Arguments]]] = {
    "quantize": quantize_cases,
    "dequantize": dequantize_cases,
    "gemm": gemm_cases,
    "norm_quantize": norm_cases,
    "norm_backward": norm_backward_cases,
    "act_quantize": act_cases,
    "act_backward": act_backward_cases,
    "commit": commit_cases,
    "copy": lambda: iter([(numbers(33, 70).t(),)]),
    "decode_attention": decode_attention_cases,
}


# ---- what is the same ----


def same(got: Any, want: Any) -> str | None:
    """Equal to the bit; the sign of zero is free, and one NaN is as good as another."""
    for a, b in zip(tensors(got), tensors(want), strict=True):
        unlike = (a != b) & ~(a.isnan() & b.isnan()) if a.is_floating_point() else a != b
        if bool(unlike.any()):
            return f"{int(unlike.sum())} of {unlike.numel()} differ"
    return None


def same_sums(got: Tensor, want: Tensor) -> str | None:
    """Equal; the scales are applied to exact sums, so one more rounding of theirs is all that may differ."""
    return near([got], [want], 2**-22)


def near_codes(got: Any, want: Any) -> str | None:
    """Nearly all codes, and scales nearly: y may round another way before it is rounded to a code."""
    ours, theirs = (q if isinstance(q, Quantized) else q.quantized for q in (got, want))
    unlike = int((ours.codes != theirs.codes).sum())
    if unlike * FEW > ours.codes.numel():
        return f"{unlike} of {ours.codes.numel()} codes differ"
    return near([ours.scale, ours.amax], [theirs.scale, theirs.amax], ROUNDED)


def near_gradients(got: Any, want: Any) -> str | None:
    return near(tensors(got), tensors(want), ROUNDED)


def near(got: list[Tensor], want: list[Tensor], part: float) -> str | None:
    """Within a part of the largest number beside them."""
    for a, b in zip(got, want, strict=True):
        error, size = (a.double() - b.double()).abs().max(), b.double().abs().max()
        if not bool(error <= part * size):
            return f"the largest error is {float(error):.3g}, the largest number {float(size):.3g}"
    return None


AGREES: dict[str, Callable[[Any, Any], str | None]] = {
    "quantize": same,
    "dequantize": same,
    "gemm": same_sums,
    "norm_quantize": near_codes,
    "norm_backward": near_gradients,
    "act_quantize": near_codes,
    "act_backward": near_gradients,
    "commit": same,
    "copy": same,
    "decode_attention": lambda got, want: near([got], [want], ROUNDED),
}


# ---- tensors inside arguments and results ----


def device_of(value: Any) -> torch.device | None:
    """Where the first tensor inside is."""
    return next((x.device for x in tensors(value)), None)


def tensors(value: Any) -> list[Tensor]:
    """The tensors inside tuples and lists, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [x for each in value for x in tensors(each)] if isinstance(value, (tuple, list)) else []


def to(value: Any, device: torch.device | str) -> Any:
    """A copy with every tensor on a device."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to(each, device) for each in value))
    return type(value)(to(each, device) for each in value) if isinstance(value, (tuple, list)) else value


def text(args: Arguments) -> str:
    """The arguments in a few words."""
    words = []
    for each in args:
        found = tensors(each)
        words.append(str(list(found[0].shape)) if found else getattr(each, "name", str(each))[:80])
    return ", ".join(words)
