"""The trained model as anyone loads it, and beside it the scales that it was trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...export.atomic import staged_folder
from ...nn.dtensor import is_dtensor
from ...runs.precision import EIGHT_BIT, RECIPE, save_eight_bit
from ...scaling.delayed import without_state
from .ranks import rank

ADAPTER = "adapter"


def save_trained(trainer: Any, tokenizer: Any, folder: Path, recipe: dict[str, Any], *, use_cache: bool) -> None:
    """Write model and tokenizer as transformers loads them, and the scaling state and the recipe beside them.

    Weights are those that the optimizer stepped, in their dtype. Adapters are merged into the weights, and lie in
    adapter/ as well.
    """
    state = gathered(trainer.accelerator.unwrap_model(trainer.model))
    if not trainer.is_world_process_zero():
        return
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    with staged_folder(folder, may_replace=lambda _: True) as staged, torch.no_grad():
        if hasattr(model, "merge_and_unload"):
            plain_state = without_state(state)
            model.save_pretrained(staged / ADAPTER, state_dict=plain_state)
            model = model.merge_and_unload()
            state = model.state_dict()
        model.config.use_cache = use_cache
        assert isinstance(model, nn.Module)
        save: Any = model.save_pretrained
        save(staged, state_dict=without_state(state))
        tokenizer.save_pretrained(staged)
        if save_eight_bit(state, staged / EIGHT_BIT):
            (staged / RECIPE).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """The whole state_dict on the first process, shards put together one by one; every process must ask."""
    out = {}
    for name, value in model.state_dict().items():
        whole: Any = value
        if is_dtensor(value):
            whole = whole.full_tensor()
        if rank() == 0:
            out[name] = whole.detach().cpu() if is_dtensor(value) else whole
    return out
