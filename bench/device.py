"""What a row says about the machine, the versions and the source."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "numpy", "transformers", "en_dtypes", "triton")


@cache
def device(kind: str = "cpu") -> dict[str, object]:
    """cpu: model, cores, threads of torch and instruction set; for kind "cuda" also the GPU and its driver."""
    return {
        "cpu": cpu_model(),
        "cores": len(_usable_cores()),
        "threads": torch.get_num_threads(),
        "isa": importlib.import_module("fp8kernels._cpu").current_isa(),
        "os": f"{platform.system()} {platform.machine()}",
    } | (gpu() if kind == "cuda" else {})


def gpu() -> dict[str, object]:
    """Name, capability, multiprocessors, L2 and memory as torch sees them; driver and limits as nvidia-smi does."""
    found = torch.cuda.get_device_properties(0)
    limits = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    return {
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "l2_mib": found.L2_cache_size >> 20,
        "memory_gib": found.total_memory >> 30,
        "cuda": torch.version.cuda,
    } | dict(zip(limits, queried(limits), strict=False))


def queried(fields: tuple[str, ...]) -> list[str]:
    """What nvidia-smi says of the first GPU; nothing where there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"]
    try:
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [cell.strip() for cell in said.strip().split(",")]


def slug(kind: str = "cpu") -> str:
    """The folder of the rows of this machine's CPU, amd-epyc-2-cores-avx512, or of its GPU, nvidia-h200."""
    here = device(kind)
    words = here.get("gpu") or f"{here['cpu']} {here['cores']} cores {here['isa']}"
    return re.sub(r"[^a-z0-9]+", "-", str(words).lower()).strip("-")


def cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _usable_cores() -> set[int]:
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


@cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "fp8kernels": _version("fp8kernels") or "source"}
    return found | {name: version for name in PACKAGES if (version := _version(name))}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@cache
def commit() -> str:
    """The short hash of HEAD, with + where the tree differs from it."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results") else "")
    except (OSError, subprocess.CalledProcessError):  # a tree without its history, copied to a machine with a GPU
        return os.environ.get("FP8KERNELS_COMMIT", "unknown")


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
