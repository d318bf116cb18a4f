"""Which kernel runs: the first of a verb's list whose `why_not` is None."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..kernels.act_backward import cuda as act_backward_cuda
from ..kernels.act_backward import reference as act_backward_reference
from ..kernels.act_backward import triton_jit as act_backward_triton
from ..kernels.act_quantize import cpu as act_quantize_cpu
from ..kernels.act_quantize import cuda as act_quantize_cuda
from ..kernels.act_quantize import reference as act_quantize_reference
from ..kernels.act_quantize import triton_jit as act_quantize_triton
from ..kernels.commit import cpu as commit_cpu
from ..kernels.commit import cuda as commit_cuda
from ..kernels.commit import reference as commit_reference
from ..kernels.commit import triton_jit as commit_triton
from ..kernels.compiled import EMULATED
from ..kernels.copy import cpu as copy_cpu
from ..kernels.copy import cuda as copy_cuda
from ..kernels.copy import reference as copy_reference
from ..kernels.copy import triton_jit as copy_triton
from ..kernels.decode_attention import cpu as decode_attention_cpu
from ..kernels.decode_attention import reference as decode_attention_reference
from ..kernels.dequantize import cpu as dequantize_cpu
from ..kernels.dequantize import cuda as dequantize_cuda
from ..kernels.dequantize import reference as dequantize_reference
from ..kernels.dequantize import triton_jit as dequantize_triton
from ..kernels.gemm import cpu as gemm_cpu
from ..kernels.gemm import cuda as gemm_cuda
from ..kernels.gemm import decoded as gemm_decoded
from ..kernels.gemm import reference as gemm_reference
from ..kernels.gemm import stream as gemm_stream
from ..kernels.gemm import triton_jit as gemm_triton
from ..kernels.gemm import vendor as gemm_vendor
from ..kernels.norm_backward import cuda as norm_backward_cuda
from ..kernels.norm_backward import reference as norm_backward_reference
from ..kernels.norm_backward import triton_jit as norm_backward_triton
from ..kernels.norm_quantize import cpu as norm_quantize_cpu
from ..kernels.norm_quantize import cuda as norm_quantize_cuda
from ..kernels.norm_quantize import reference as norm_quantize_reference
from ..kernels.norm_quantize import triton_jit as norm_quantize_triton
from ..kernels.quantize import cpu as quantize_cpu
from ..kernels.quantize import cuda as quantize_cuda
from ..kernels.quantize import reference as quantize_reference
from ..kernels.quantize import triton_jit as quantize_triton
from ..kernels.triton_jit import INTERPRETED
from . import proof

NEED_NO_PROOF = ("cpu", "reference")  # they are tested where they run
# Where a line's tensors are: a small product takes less time than asking every other line why it cannot run
_CUDA = ("cuda", "cpu") if EMULATED else ("cuda",)
_TRITON = ("cuda", "cpu") if INTERPRETED else ("cuda",)
DEVICES = {
    "cuda": _CUDA,
    "vendor": ("cuda",),
    "stream": _CUDA,
    "triton": _TRITON,
    "decoded": ("cuda",),
    "cpu": ("cpu",),
}
BACKEND_VARIABLE = "FP8KERNELS_BACKEND"  # forces one backend for every verb: that one or an error


class Kernel(NamedTuple):
    """One way to run a verb; `why_not` takes the same arguments and says, in words, why it cannot, or None."""

    name: str
    why_not: Callable[..., str | None]
    run: Callable[..., Any]


# order is preference; the reference is last
TABLE: dict[str, tuple[Kernel, ...]] = {
    "quantize": (
        Kernel("cuda", quantize_cuda.why_not, quantize_cuda.quantize),
        Kernel("triton", quantize_triton.why_not, quantize_triton.quantize),
        Kernel("cpu", quantize_cpu.why_not, quantize_cpu.quantize),
        Kernel("reference", quantize_reference.why_not, quantize_reference.quantize),
    ),
    "dequantize": (
        Kernel("cuda", dequantize_cuda.why_not, dequantize_cuda.dequantize),
        Kernel("triton", dequantize_triton.why_not, dequantize_triton.dequantize),
        Kernel("cpu", dequantize_cpu.why_not, dequantize_cpu.dequantize),
        Kernel("reference", dequantize_reference.why_not, dequantize_reference.dequantize),
    ),
    "gemm": (
        Kernel("cuda", gemm_cuda.why_not, gemm_cuda.gemm),
        Kernel("vendor", gemm_vendor.why_not, gemm_vendor.gemm),
        Kernel("stream", gemm_stream.why_not, gemm_stream.gemm),
        Kernel("triton", gemm_triton.why_not, gemm_triton.gemm),
        Kernel("decoded", gemm_decoded.why_not, gemm_decoded.gemm),
        Kernel("cpu", gemm_cpu.why_not, gemm_cpu.gemm),
        Kernel("reference", gemm_reference.why_not, gemm_reference.gemm),
    ),
    "norm_quantize": (
        Kernel("cuda", norm_quantize_cuda.why_not, norm_quantize_cuda.norm_quantize),
        Kernel("triton", norm_quantize_triton.why_not, norm_quantize_triton.norm_quantize),
        Kernel("cpu", norm_quantize_cpu.why_not, norm_quantize_cpu.norm_quantize),
        Kernel("reference", norm_quantize_reference.why_not, norm_quantize_reference.norm_quantize),
    ),
    "norm_backward": (
        Kernel("cuda", norm_backward_cuda.why_not, norm_backward_cuda.norm_backward),
        Kernel("triton", norm_backward_triton.why_not, norm_backward_triton.norm_backward),
        Kernel("reference", norm_backward_reference.why_not, norm_backward_reference.norm_backward),
    ),
    "act_quantize": (
        Kernel("cuda", act_quantize_cuda.why_not, act_quantize_cuda.act_quantize),
        Kernel("triton", act_quantize_triton.why_not, act_quantize_triton.act_quantize),
        Kernel("cpu", act_quantize_cpu.why_not, act_quantize_cpu.act_quantize),
        Kernel("reference", act_quantize_reference.why_not, act_quantize_reference.act_quantize),
    ),
    "act_backward": (
        Kernel("cuda", act_backward_cuda.why_not, act_backward_cuda.act_backward),
        Kernel("triton", act_backward_triton.why_not, act_backward_triton.act_backward),
        Kernel("reference", act_backward_reference.why_not, act_backward_reference.act_backward),
    ),
    "commit": (
        Kernel("cuda", commit_cuda.why_not, commit_cuda.commit),
        Kernel("triton", commit_triton.why_not, commit_triton.commit),
        Kernel("cpu", commit_cpu.why_not, commit_cpu.commit),
        Kernel("reference", commit_reference.why_not, commit_reference.commit),
    ),
    "copy": (
        Kernel("cuda", copy_cuda.why_not, copy_cuda.copy),
        Kernel("triton", copy_triton.why_not, copy_triton.copy),
        Kernel("cpu", copy_cpu.why_not, copy_cpu.copy),
        Kernel("reference", copy_reference.why_not, copy_reference.copy),
    ),
    "decode_attention": (
        Kernel("cpu", decode_attention_cpu.why_not, decode_attention_cpu.decode_attention),
        Kernel("reference", decode_attention_reference.why_not, decode_attention_reference.decode_attention),
    ),
}


class Choice(NamedTuple):
    """What `explain` says of one kernel: why it cannot run, or None."""

    name: str
    reason: str | None


def choices(verb: str, *args: Any, **kwargs: Any) -> list[Choice]:
    """Every kernel of the verb in order of preference, each with the reason it cannot run on these arguments."""
    forced = os.environ.get(BACKEND_VARIABLE)
    out = []
    for kernel in kernels(verb):
        reason = kernel.why_not(*args, **kwargs) or _fault(verb, kernel, args)
        if reason is None and forced and kernel.name != forced:
            reason = f"{BACKEND_VARIABLE}={forced} allows that backend only"
        out.append(Choice(kernel.name, reason))
    return out


def choose(verb: str, *args: Any, **kwargs: Any) -> Kernel:
    """The kernel that runs the verb on these arguments.

    raises   RuntimeError with every kernel's reason, one a line, if none can
    """
    forced = os.environ.get(BACKEND_VARIABLE)
    device = _device_type(args[0])
    for kernel in kernels(verb):
        if (forced and kernel.name != forced) or device not in DEVICES.get(kernel.name, (device,)):
            continue
        if kernel.why_not(*args, **kwargs) is None and _fault(verb, kernel, args) is None:
            return kernel
    reasons = "\n".join(f"  {name}: {reason}" for name, reason in choices(verb, *args, **kwargs))
    if forced and forced not in {kernel.name for kernel in kernels(verb)}:
        reasons += f"\n  {forced}: {verb} has no backend of that name"
    raise RuntimeError(f"no kernel can run {verb} on these arguments:\n{reasons}")


def _device_type(first: Any) -> str:
    """Of a verb's first argument: a tensor, a tuple that begins with one, or a list of such."""
    while not isinstance(first, Tensor):
        if not first:
            return "cpu"  # no layers to commit
        first = first[0]
    return first.device.type


def _fault(verb: str, kernel: Kernel, args: Any) -> str | None:
    """Why a kernel that takes the arguments is wrong on this GPU, or None."""
    return None if kernel.name in NEED_NO_PROOF else proof.fault(verb, kernel, kernels(verb)[-1], args)


def kernels(verb: str) -> tuple[Kernel, ...]:
    """The kernels of a verb.

    raises   ValueError naming the known verbs
    """
    if verb not in TABLE:
        raise ValueError(f"unknown verb {verb!r}: known are {', '.join(map(repr, TABLE))}")
    return TABLE[verb]
