"""Which engine serves a folder on this machine, and vLLM's command for it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import torch

from .settings import KEY, Settings

VLLM_CACHES = {None: "auto", "e4m3": "fp8_e4m3"}  # --kv-cache-dtype


def choose(settings: Settings) -> str:
    """ "vllm" or "transformers".

    raises   ValueError or ImportError saying why the engine that was asked for cannot run here
    """
    if settings.engine == "transformers":
        return "transformers"
    reason = _why_not_vllm(settings)
    if settings.engine == "auto":
        return "transformers" if reason else "vllm"
    if reason is not None:
        raise reason
    return "vllm"


def vllm_command(folder: Path, settings: Settings) -> list[str]:
    """The words of `vllm serve` that mean these settings; the key goes through the environment."""
    program = shutil.which("vllm")
    start = [program] if program else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    return [
        *start,
        "serve",
        str(folder),
        "--host",
        settings.host,
        "--port",
        str(settings.port),
        "--served-model-name",
        *settings.names_for(folder),
        "--kv-cache-dtype",
        VLLM_CACHES[settings.kv_cache],
        *settings.extra,
    ]


def run_vllm(folder: Path, settings: Settings) -> None:
    """Become `vllm serve`: its signals, its exit code, its output; does not return."""
    words = vllm_command(folder, settings)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if os.environ.get(KEY):
        environment["VLLM_API_KEY"] = os.environ[KEY]
    sys.stdout.flush()
    os.execvpe(words[0], words, environment)


def _why_not_vllm(settings: Settings) -> Exception | None:
    if importlib.util.find_spec("vllm") is None:
        return ImportError("vLLM is not installed: pip install vllm, or serve with engine transformers")
    if not torch.cuda.is_available():
        return ValueError("vLLM is installed, but torch finds no GPU; serve with engine transformers")
    if settings.head is not None:
        return ValueError(f"vLLM has no 8-bit head, and head is {settings.head}; leave it out")
    if settings.kv_cache not in VLLM_CACHES:
        return ValueError(f"vLLM has no {settings.kv_cache} cache; kv_cache is e4m3 there, or left out")
    return None
