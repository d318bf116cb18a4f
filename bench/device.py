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
def device() -> dict[str, object]:
    """cpu: model, cores, threads of torch and instruction set; gpu: its name, where there is one."""
    return {
        "cpu": cpu_model(),
        "cores": len(_usable_cores()),
        "threads": torch.get_num_threads(),
        "isa": importlib.import_module("fp8kernels._cpu").current_isa(),
        "os": f"{platform.system()} {platform.machine()}",
    } | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def slug() -> str:
    """The folder of this machine's rows: amd-epyc-2-cores-avx512."""
    here = device()
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
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
