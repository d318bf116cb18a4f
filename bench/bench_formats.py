"""Encode and decode alone (scale 1, fp32) against numpy with en_dtypes (HiF8) and ml_dtypes, into existing memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fp8kernels.formats import get_format
from fp8kernels.kernels.quantize import Quantized, Rounding
from fp8kernels.scaling import get_block

from .case import Case, Shape, kernel, text
from .check import assert_same

FULL, SMALL = (8192, 8192), (512, 1024)


def encode(fmt: str = "hif8", shape: Shape = FULL, backend: str = "cpu") -> Case:
    """fp32 to codes."""
    x = data(shape)
    array, dtype = x.numpy(), numpy_dtype(fmt)
    out = np.empty(array.shape, dtype)
    how, one = Rounding(get_format(fmt), get_block("tensor"), get_format(fmt).target), torch.ones(1, 1)
    run: Callable[..., Quantized] = kernel("quantize", backend, x, one, how)

    def check() -> None:
        expected = torch.from_numpy(array.astype(dtype).view(np.uint8))
        assert_same(run(x, one, how).codes, expected, "encode")

    return Case(
        "formats", "encode fp32", fmt, backend, text(shape), f"{dtype.__module__.split('.')[0]} {fmt}",
        lambda: run(x, one, how), lambda: np.copyto(out, array, casting="unsafe"), check, (f"quantize/{backend}",),
        moved=x.numel() * 5, baseline_moved=x.numel() * 5, reuse=True,
    )  # fmt: skip


def decode(fmt: str = "hif8", shape: Shape = FULL, backend: str = "cpu") -> Case:
    """Codes to fp32."""
    array = data(shape).numpy().astype(numpy_dtype(fmt))
    out = np.empty(array.shape, np.float32)
    codes = torch.from_numpy(array.view(np.uint8))
    args = (codes, torch.ones(1, 1), get_format(fmt), torch.float32)
    run: Callable[..., Tensor] = kernel("dequantize", backend, *args)

    def check() -> None:
        assert_same(run(*args), torch.from_numpy(array.astype(np.float32)), "decode")

    return Case(
        "formats", "decode to fp32", fmt, backend, text(shape), f"{array.dtype.type.__module__.split('.')[0]} {fmt}",
        lambda: run(*args), lambda: np.copyto(out, array, casting="unsafe"), check, (f"dequantize/{backend}",),
        moved=codes.numel() * 5, baseline_moved=codes.numel() * 5, reuse=True,
    )  # fmt: skip


def data(shape: Shape) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(3)
    )  # far from overflow, where the libraries differ


def numpy_dtype(fmt: str) -> type:
    """The numpy dtype of a format."""
    import en_dtypes
    import ml_dtypes

    dtypes = {"hif8": en_dtypes.hifloat8, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
    found: type = dtypes[fmt]
    return found


def test_encode(fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(encode(fmt, shape, backend))


def test_decode(fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(decode(fmt, shape, backend))
