"""A configuration of a run that ends in a second or two, and what tests compare of two runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fp8kernels.runs import Run

from .common import model_folder, text_file

TIMED = ("seconds", "tokens_per_second")


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    """Six steps of two micro-batches, with a checkpoint each second step; `folder` gets the model and the text."""
    if not (folder / "source").exists():
        model_folder(folder / "source")
        text_file(folder, 16)
    data = {"train": str(folder / "text.jsonl"), "sequence": 16, "hold_out": 0.2}
    base: dict[str, Any] = {
        "model": {"path": str(folder / "source")},
        "data": data,
        "steps": 6,
        "batch": 2,
        "accumulate": 2,
        "learning_rate": 1e-3,
        "save_every": 2,
        "keep": 10,
        "validate_every": 3,
        "recipe": "hif8-qat",
        "recipe_changes": {"window": 4, "warmup_steps": 1},
        "saturation": {"every": 2, "policy": "warn"},
    }
    return base | changes


def probe_file(folder: Path) -> Path:
    """A few items, of both kinds."""
    path = folder / "items.jsonl"
    items = [
        {"prompt": f"{name} sells", "choices": [" maps", " clocks", " bells"], "answer": n % 3, "kind": "choice"}
        for n, name in enumerate(("Ada", "Bruno", "Clara", "Dmitri", "Esme"))
    ]
    items.append({"prompt": "Ada sells maps on", "choices": [" day"], "answer": 0, "kind": "cloze"})
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def untimed(run: Run, kind: str = "log") -> list[dict[str, Any]]:
    """A run's rows without what the clock says."""
    return [{key: value for key, value in row.items() if key not in TIMED} for row in run.rows(kind)]


def weights(run: Run) -> dict[str, torch.Tensor]:
    """The trained weights and the scaling state, by name."""
    state = load_file(run.path / "model" / "model.safetensors")
    eight_bit = run.path / "model" / "fp8_state.safetensors"
    return state | (load_file(eight_bit) if eight_bit.is_file() else {})


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """To the bit."""
    assert first.keys() == second.keys()
    differ = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert not differ, differ
