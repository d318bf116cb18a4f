"""Every skip that is allowed, with the machine it is allowed on and the reason.

A test that skips for any other reason fails the run (tests/conftest.py), so a suite cannot turn green by not running.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

TRAIN = ("transformers", "accelerate", "datasets", "peft", "trl", "tensorboard")  # the extra of that name
EVAL = ("lm_eval",)  # the same
SERVE = ("fastapi", "openai", "httpx", "compressed_tensors")  # the same


@dataclass(frozen=True)
class Skip:
    """A skip whose reason matches `pattern` is expected where `on()` holds."""

    pattern: str
    on: Callable[[], bool]
    why: str


def without_gpu() -> bool:
    return not torch.cuda.is_available()


def without_cuda_build() -> bool:
    return importlib.util.find_spec("fp8kernels._cuda") is None


def without_cpp_tests() -> bool:
    return importlib.util.find_spec("fp8kernels._cuda_emulated") is None


def without_triton() -> bool:
    return importlib.util.find_spec("triton") is None


def without_chromium() -> bool:
    return shutil.which("chromium") is None


def without_train() -> bool:
    return any(importlib.util.find_spec(name) is None for name in TRAIN)


def without_serve() -> bool:
    return any(importlib.util.find_spec(name) is None for name in SERVE)


def without_eval() -> bool:
    return any(importlib.util.find_spec(name) is None for name in EVAL)


def below_avx512() -> bool:
    from fp8kernels import _cpu

    return bool(_cpu.detected_isa() != "avx512")


def lowered_isa() -> bool:
    return "FP8KERNELS_ISA" in os.environ


def not_x86() -> bool:
    return platform.machine() not in ("x86_64", "AMD64")


def not_linux() -> bool:
    return sys.platform != "linux"


EXPECTED = (
    Skip(r"no GPU", without_gpu, "the test launches a CUDA or Triton kernel on a device"),
    Skip(r"built without nvcc", without_cuda_build, "fp8kernels._cuda exists only where nvcc was found at build time"),
    Skip(r"built without the C\+\+ tests", without_cpp_tests, "with those the CUDA kernels are built for the host"),
    Skip(r"triton is not installed", without_triton, "Triton has wheels for Linux only"),
    Skip(rf"could not import '({'|'.join(TRAIN)})'", without_train, "they are the extra train"),
    Skip(rf"could not import '({'|'.join(EVAL)})'", without_eval, "they are the extra eval"),
    Skip(rf"could not import '({'|'.join(SERVE)})'", without_serve, "they are the extra serve"),
    Skip(r"no Chromium", without_chromium, "the test opens a page in a browser"),
    Skip(r"CPU has no (avx512|avx2)", below_avx512, "the kernel needs instructions that this CPU lacks"),
    Skip(r"FP8KERNELS_ISA is set", lowered_isa, "the run forces one instruction set for all tests"),
    Skip(r"only on x86", not_x86, "the vector kernels are written for x86; others take the portable one"),
    Skip(r"only on Linux", not_linux, "the test reads /proc"),
)


def is_expected(reason: str) -> bool:
    """Whether some entry of the table covers this reason on this machine."""
    return any(re.search(skip.pattern, reason) and skip.on() for skip in EXPECTED)
