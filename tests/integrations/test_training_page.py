"""docs/TRAINING.md: its blocks run in order, and leave models whose scales have moved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from setups.runs import RECOMPUTED, same_models
from torch import nn

from fp8kernels.nn.step import layers

for name in ("transformers", "accelerate", "datasets", "trl", "peft"):
    pytest.importorskip(name)
PAGE = Path(__file__).parents[2] / "docs" / "TRAINING.md"


def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    sections = re.findall(r"^(#+ [^\n]*)\n((?:(?!^#).)*?)```python\n(.*?)```", text, flags=re.S | re.M)
    assert [title for title, _, _ in sections] == [
        "# Training", "## A bare loop", "## Which blocks, and how often", "## accelerate", "## transformers.Trainer",
        "## TRL", "## PEFT",
    ]  # fmt: skip
    scope: dict[str, Any] = {"__name__": "training_page"}
    for title, _, block in sections:
        AcceleratorState._reset_state(reset_partial_state=True)  # one process, many trainers
        GradientState._reset_state()
        exec(compile(block, f"{PAGE.name}, {title}", "exec"), scope)
        if title == "# Training":
            continue
        model: nn.Module = scope["model"]
        steps = {"## TRL": 2, "## PEFT": 8}.get(title, 4)
        assert {int(layer.fp8_step) for layer in layers(model)} == {steps}, title
        assert all((layer.fp8_scale[:2] > 0).all() for layer in layers(model)), title
        if title == "## Which blocks, and how often":
            assert all(".1." in layer.fp8_name and layer.fp8_recipe.interval == 10 for layer in layers(model))
        if title == "## transformers.Trainer":
            same_models(model, scope["resumed"], but=RECOMPUTED)
        if title == "## PEFT":
            merged = scope["merged"]
            assert layers(merged) == layers(model) and not any("lora_" in name for name in merged.state_dict())
            loaded = [layer.fp8_history for layer in layers(scope["again"])]
            assert all(torch.equal(a, b.fp8_history) for a, b in zip(loaded, layers(merged), strict=True))
