"""From the folder of a run or of any causal language model to a checkpoint with 8-bit weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..convert import convert
from ..export import calibrate, export
from ..headers import CONFIG, check_folder, read_json
from ..nn.roots import layers
from ..runs.precision import recipe_of
from .trained import load_trained

RECIPES = {  # of a model that was not trained in 8 bits, by the format it is wanted in
    "native": "hif8-qat",
    "compressed-tensors": "e4m3-delayed",
    "compressed-tensors-dynamic": "e4m3-row",
    "compressed-tensors-block": "e4m3-block128",
    "fp8": "e4m3-delayed",
}


def export_folder(
    source: str | Path,
    out: str | Path,
    *,
    format: str = "native",
    recipe: str | None = None,
    texts: Sequence[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Any:
    """Export what a run trained, with its own scales; or a plain model, converted and calibrated on texts here.

    source   a run's folder, its model/, or a folder with a causal language model in high precision
    format   as `fp8kernels.export` takes it
    recipe   for a model that was not trained in 8 bits; None takes the one that fits the format
    texts    on which static input scales of such a model are found
    returns  what `fp8kernels.export` returns
    raises   FileNotFoundError, ValueError naming what is missing, and what to give
    """
    if format not in RECIPES:
        raise ValueError(f"format is {format!r}; it is one of {', '.join(RECIPES)}")
    source = check_folder(source)
    config = source / CONFIG
    if config.is_file() and read_json(config).get("quantization_config"):
        raise ValueError(
            f"{source} is quantized already, its config.json says so; give the run, or the model in high precision"
        )
    model, tokenizer = load_trained(source)
    if layers(model):
        if recipe is not None:
            raise ValueError(f"{source} was trained with a recipe of its own; leave out recipe={recipe!r}")
    else:
        chosen = recipe_of(recipe or RECIPES[format])
        assert chosen is not None
        convert(model, chosen, verbose=False)
        if chosen.input.scaling != "current":
            if not texts:
                raise ValueError(
                    f"{source} was not trained in 8 bits, and {chosen.name} needs input scales: give text to calibrate "
                    f"on, or take a recipe or format without static scales (e4m3-row, compressed-tensors-dynamic)"
                )
            calibrate(model, texts, tokenizer=tokenizer)
    return export(model, out, format=format, tokenizer=tokenizer, dtype=dtype)
