"""The trained model as anyone loads it, and beside it the scales that it was trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ...export.atomic import staged_folder
from ...runs.precision import EIGHT_BIT, RECIPE, save_eight_bit
from ...scaling.delayed import without_state

ADAPTER = "adapter"


def save_trained(trainer: Any, tokenizer: Any, folder: Path, recipe: dict[str, Any]) -> None:
    """Write model and tokenizer as transformers loads them, and the scaling state and the recipe beside them.

    Weights are those that the optimizer stepped, in their dtype. Adapters are merged into the weights, and lie in
    adapter/ as well.
    """
    import torch

    state = trainer.accelerator.get_state_dict(trainer.model)  # of all processes, under FSDP
    if not trainer.is_world_process_zero():
        return
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    with staged_folder(folder, may_replace=lambda _: True) as staged, torch.no_grad():
        if hasattr(model, "merge_and_unload"):
            plain_state = without_state(state)
            model.save_pretrained(staged / ADAPTER, state_dict=plain_state)
            model = model.merge_and_unload()
            state = model.state_dict()
        assert isinstance(model, nn.Module)
        save: Any = model.save_pretrained
        save(staged, state_dict=without_state(state))
        tokenizer.save_pretrained(staged)
        if save_eight_bit(state, staged / EIGHT_BIT):
            (staged / RECIPE).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
