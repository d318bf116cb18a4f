"""info: versions, what the processor offers, and which backends each verb has, with the reason where one is absent."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from . import __version__
from .formats import FORMATS
from .kernels.commit import ScaleRule
from .kernels.compiled import load
from .kernels.decode_attention import HeadCodes
from .kernels.norm_quantize import Norm
from .ops import quantize
from .ops.explain import PRODUCERS, explain
from .ops.table import BACKEND_VARIABLE, TABLE

PACKAGES = ("torch", "numpy", "triton", "transformers", "safetensors", "transformer-engine", "torchao", "ml_dtypes")
CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512_bf16", "amx_tile")


@dataclass(frozen=True)
class Info:
    """versions, machine: name -> text. backends: (verb, backend) -> None, or the reason that it is absent."""

    versions: dict[str, str]
    machine: dict[str, str]
    backends: dict[tuple[str, str], str | None]


def info() -> Info:
    """What this installation is and can do on this machine."""
    versions = {"fp8kernels": __version__, "python": platform.python_version()}
    versions.update({name: _version(name) for name in PACKAGES})
    versions["torch"] = torch.__version__  # with its build: "+cpu" or "+cu130"
    return Info(versions, _machine(), _backends())


def table(found: Info) -> Table:
    """The same as a rich table."""
    out = Table(title="fp8kernels", title_justify="left", show_header=False)
    out.add_column("what")
    out.add_column("value", overflow="fold")
    for name, value in (*found.versions.items(), *found.machine.items()):
        out.add_row(name, value)
    out.add_section()
    for (verb, backend), reason in found.backends.items():
        out.add_row(
            f"{verb} / {backend}", "runs" if reason is None else f"absent: {reason}", style="dim" if reason else None
        )
    return out


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> dict[str, str]:
    cpu = _cpu()
    flags = [flag for flag in CPU_FLAGS if flag in cpu.get("flags", "").split()]
    out = {
        "system": platform.platform(),
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cpu features": " ".join(flags) or "unknown",
        "kernels compiled for": _isa(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    if os.environ.get(BACKEND_VARIABLE):
        out[BACKEND_VARIABLE] = os.environ[BACKEND_VARIABLE]
    return out


def _cpu() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    pairs = (line.partition(":") for line in path.read_text().split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _isa() -> str:
    compiled, reason = load("_cpu")
    if compiled is None:
        return f"absent: {reason}"
    return f"{compiled.current_isa()} (this processor runs up to {compiled.detected_isa()})"


def _backends() -> dict[tuple[str, str], str | None]:
    """Each verb asked about a small CPU tensor, and about a CUDA tensor where there is a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.ones(16, 128, device=device)
    q = quantize(x, next(iter(FORMATS)))
    heads = HeadCodes(q.codes[None, None], q.scale)  # one sequence, one head, 16 tokens
    arguments: dict[str, tuple[Any, ...]] = {
        "quantize": (x, "e4m3"),
        "dequantize": (q,),
        "gemm": (q, q),
        "norm_quantize": PRODUCERS["rms_norm_quantize"](x, None, 1e-6, "e4m3")[1],
        "norm_backward": (x, x, x[:, 0], None, Norm(None, None, 1e-6, center=False)),
        "act_quantize": PRODUCERS["swiglu_quantize"](x, x, "e4m3")[1],
        "act_backward": (x, x, x, "silu"),
        "copy": (x,),
        "commit": ([], ScaleRule()),
        "decode_attention": (x[None, :4, None], heads, heads, next(iter(FORMATS.values())), 1.0, None),
    }
    return {(verb, row.name): row.reason for verb in TABLE for row in explain(verb, *arguments[verb])}
