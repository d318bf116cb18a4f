"""validate: a folder beside the model that it was made of; other weights or a changed file are refused with numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from serving.folders import read, save

from fp8kernels.export import export
from fp8kernels.serving.validate import validate


@pytest.mark.parametrize(
    "format", ["native", "compressed-tensors", "compressed-tensors-dynamic", "compressed-tensors-block"]
)
def test_a_folder_is_its_model(hif8: Any, prompt_ids: torch.Tensor, tmp_path: Path, format: str) -> None:
    report = export(hif8, tmp_path / "out", format=format, dtype=torch.float32)
    found = validate(tmp_path / "out", hif8, prompt_ids)
    assert found.tokens == prompt_ids.numel()
    assert len(found.layers) == (8 if format.endswith("block") else 14)  # 64 rows of k and v are half a block
    assert found.logits > found.limit
    assert found.kl >= -1e-12
    if format == "native":
        assert found.max_error == 0
        assert found.agreement == 1
    else:
        for name, layer in report.layers.items():
            assert found.layers[name] == pytest.approx(layer.written, abs=1e-3)
    assert f"{found.logits:.1f} dB" in str(list(found.table().columns[1].cells))


def test_the_model_stays_as_it_was(hif8: Any, prompt_ids: torch.Tensor, tmp_path: Path) -> None:
    model = copy.deepcopy(hif8).train()
    export(model, tmp_path / "out")
    before = copy.deepcopy(model.state_dict())
    validate(tmp_path / "out", model, prompt_ids)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_weights_are_refused_with_numbers(hif8: Any, prompt_ids: torch.Tensor, tmp_path: Path) -> None:
    export(hif8, tmp_path / "out", format="compressed-tensors")
    other = copy.deepcopy(hif8)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.2)
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj.weight is 1\d.\d dB .* allows 3\d.\d dB"):
        validate(tmp_path / "out", other, prompt_ids)


def test_a_changed_scale_and_a_changed_head_are_refused(hif8: Any, prompt_ids: torch.Tensor, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(hif8, folder, format="compressed-tensors")
    tensors = read(folder)
    save(folder, tensors | {"model.layers.0.self_attn.o_proj.weight_scale": torch.tensor([0.125])})
    with pytest.raises(ValueError, match=r"o_proj.weight is .* dB from the model's weight"):
        validate(folder, hif8, prompt_ids)
    save(folder, tensors | {"lm_head.weight": -tensors["lm_head.weight"]})
    with pytest.raises(ValueError, match=r"its logits are -\d.\d dB from the model's"):
        validate(folder, hif8, prompt_ids)
    save(folder, tensors | {"model.norm.weight": tensors["model.norm.weight"] * float("nan")})
    with pytest.raises(ValueError, match="hold NaN or Inf"):
        validate(folder, hif8, prompt_ids)
