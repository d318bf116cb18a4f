"""Part 3: the trained model with 8-bit weights, and in BF16, each served by a new process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...export import export
from ...export.atomic import staged_folder
from .size import DemoSize

PROMPT = 'def __init__(self, name):\n    """'
SECONDS = 120  # a process that has not answered by then is ended


@dataclass(frozen=True)
class ServingResult:
    """One checkpoint, served: bytes on disk of the weights, and what the process said."""

    precision: str
    folder: str
    weight_bytes: int
    text: str
    tokens: int
    tokens_per_second: float
    load_seconds: float
    model_bytes: int


def run(
    plain: nn.Module, qat: nn.Module, tokenizer: Any, size: DemoSize, out: Path, advance: Callable[[str], None]
) -> list[ServingResult]:
    """BF16, then HiF8: write the checkpoint, have a new process load it and continue the same prompt."""
    folders = {"BF16": out / "model-bf16", "HiF8 W8A8": out / "model-hif8"}
    save_bf16(plain, tokenizer, folders["BF16"])
    export(qat, folders["HiF8 W8A8"], tokenizer=tokenizer)
    advance("checkpoints written")
    results = []
    for precision, folder in folders.items():
        answer = serve(folder, size)
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        results.append(ServingResult(precision=precision, folder=str(folder), weight_bytes=weights, **answer))
        advance(f"served in {precision}")
    return results


def steps(size: DemoSize) -> int:
    """How often `run` calls `advance`."""
    return 3


def save_bf16(model: Any, tokenizer: Any, out: Path) -> None:
    """The plain checkpoint in bf16, as transformers writes it; whole or not at all."""
    with staged_folder(out, may_replace=lambda folder: (folder / "config.json").is_file()) as staged:
        state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
        model.save_pretrained(staged, state_dict=state)
        tokenizer.save_pretrained(staged)


def serve(folder: Path, size: DemoSize) -> dict[str, Any]:
    """Generate from a folder in a new process.

    raises   RuntimeError with what the process said, if it failed
    """
    command = [sys.executable, "-m", "fp8kernels", "generate", str(folder), "--json", "--prompt", PROMPT]
    command += ["--new-tokens", str(size.new_tokens), "--repeats", str(size.repeats)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"serving {folder} failed with status {done.returncode}:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])
