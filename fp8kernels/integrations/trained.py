"""What a run trained, as it was trained: the model of its folder with its recipe and its scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..convert import convert
from ..models.causal_lm import load_causal_lm
from ..nn.fallback import allow_fallback
from ..nn.roots import layers
from ..runs.precision import EIGHT_BIT, RECIPE, load_eight_bit, recipe_of

MODEL = "model"  # of a run's folder


def load_trained(folder: Path | str, *, eight_bit: bool = True, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The trained model of a run and its tokenizer, in evaluation mode; 8-bit layers as they were trained.

    What had fallen back to high precision when the run ended computes so here, too.

    folder     a run's folder, its model/, or any folder with a causal LM: that one has no recipe and stays plain
    eight_bit  False: the weights alone, in high precision
    dtype      of the weights; None: as they were saved
    raises     FileNotFoundError or ValueError naming what is missing
    """
    folder = Path(folder)
    if (folder / "run.json").is_file():
        folder = folder / MODEL
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there: the run did not end; go on with it, its run.json says why")
    model, tokenizer = load_causal_lm(folder, dtype=dtype)
    if eight_bit and (folder / RECIPE).is_file():
        entry = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
        recipe = recipe_of(entry["recipe"], entry["recipe_changes"])
        assert recipe is not None
        convert(model, recipe, verbose=False)
        load_eight_bit(model, folder / EIGHT_BIT)
        allow_fallback([layer for layer in layers(model) if int(layer.fp8_fallback[0]) > 0])
    return model.eval(), tokenizer
