"""A run's model computes as it did when the run ended, also where layers had fallen back to high precision."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from llm import common

from fp8kernels import FallbackWarning, convert
from fp8kernels.integrations.trained import load_trained
from fp8kernels.nn.fallback import allow_fallback, ask_for_fallback
from fp8kernels.nn.step import layers
from fp8kernels.runs.precision import EIGHT_BIT, RECIPE, save_eight_bit


def test_a_layer_that_fell_back_by_a_watch_is_still_in_high_precision(tmp_path: Path) -> None:
    folder = common.model_folder(tmp_path / "model")
    model = convert(common.model(), "hif8-qat", verbose=False)  # the policy of its alarm is "warn"
    allow_fallback(layers(model))
    ask_for_fallback(layers(model)[1], "a watch says so")
    ids = torch.tensor([[5, 9, 31, 7]])
    model.train()(ids, labels=ids).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        torch.optim.SGD(model.parameters(), lr=0.0).step()
    save_eight_bit(model.state_dict(), folder / EIGHT_BIT)
    (folder / RECIPE).write_text(json.dumps({"recipe": "hif8-qat", "recipe_changes": {}}), encoding="utf-8")

    loaded, _ = load_trained(folder)
    high = [layer.fp8_high for layer in layers(model)]
    assert high == [place == 1 for place in range(len(high))]
    assert [layer.fp8_high for layer in layers(loaded)] == high
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
