"""calibrate: input scales from batches alone, everything else as it was; bad input is told, and changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from serving import common
from torch import nn

from fp8kernels.convert import convert
from fp8kernels.export import calibrate
from fp8kernels.nn.state import ScaledLayer
from fp8kernels.recipe import get_recipe
from fp8kernels.scaling.delayed import INPUT


def fresh(recipe: str = "hif8-qat") -> Any:
    return convert(common.plain(), recipe, verbose=False)


def batches(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, common.SIZE.vocab, (2, 16), generator=generator) for _ in range(count)]


def scaled(model: nn.Module) -> dict[str, ScaledLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, ScaledLayer)}


def test_scales_decode_the_largest_input_to_the_target() -> None:
    model = fresh()
    amax: dict[str, float] = {}

    def note(name: str) -> Any:
        return lambda module, args: amax.update({name: max(amax.get(name, 0.0), float(args[0].abs().max()))})

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in scaled(model).items()]
    with torch.no_grad():
        for batch in batches():
            model.eval()(batch)
    for handle in handles:
        handle.remove()
    summary = calibrate(model, batches())
    assert summary.batches == 3
    assert summary.tokens == 3 * 2 * 16
    assert summary.missed == ()
    assert summary.amax == amax
    for name, layer in scaled(model).items():
        assert summary.scales[name] == float(layer.fp8_scale[INPUT])
        assert summary.scales[name] == pytest.approx(amax[name] / layer.fp8_recipe.target(INPUT), rel=1e-6)


@pytest.mark.parametrize("recipe", ["e4m3-delayed", "e4m3-row", "hif8-qat"])
def test_nothing_else_changes(recipe: str) -> None:
    model = fresh(recipe).train()
    model.model.layers[0].eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model(batches(1)[0])  # something is pending
    flags = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    summary = calibrate(model, batches())
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"{name}.{key}" for name in summary.scales for key in ("fp8_history", "fp8_scale")}
    for name, layer in scaled(model).items():
        assert torch.equal(layer.fp8_scale[1:], before[f"{name}.fp8_scale"][1:])
        assert torch.equal(layer.fp8_history[1:], before[f"{name}.fp8_history"][1:])
        assert not layer._forward_pre_hooks


def test_a_static_recipe_is_calibrated_too() -> None:
    model = convert(common.plain(), get_recipe("e4m3-delayed").frozen(), verbose=False)
    summary = calibrate(model, batches(1))
    assert all(scale > 0 for scale in summary.scales.values())
    assert len(summary.scales) == 14


def test_texts_are_cut_to_the_context(tokenizer: Any) -> None:
    model = fresh()
    text = common.TEXT[0]
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert ids.numel() > common.SIZE.context
    of_text = calibrate(model, ["", text], tokenizer=tokenizer)
    assert of_text.tokens == ids.numel()
    assert of_text.batches == -(-ids.numel() // common.SIZE.context)
    assert of_text.amax == calibrate(fresh(), list(ids.split(common.SIZE.context, dim=1))).amax
    assert str(of_text.batches) in str(list(of_text.table().columns[1].cells))
    assert calibrate(fresh(), [{"input_ids": ids[:, :16]}]).amax == calibrate(fresh(), [ids[:, :16]]).amax


class Routed(nn.Module):
    """Two experts, of which one is chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[0](x)


def test_layers_that_are_never_reached_are_listed_with_the_way_out() -> None:
    model = convert(Routed(), "hif8-qat", verbose=False)
    summary = calibrate(model, [torch.randn(4, 32)])
    assert summary.missed == ("experts.1",)
    assert list(summary.scales) == ["experts.0"]
    assert "an expert sees tokens only where its router sends some" in str(list(summary.table().columns[1].cells))
    assert float(model.experts[1].fp8_scale[INPUT]) == 0


def test_bad_input_is_told_and_changes_nothing(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no 8-bit layers"):
        calibrate(common.plain(), batches())
    model = fresh()
    before = copy.deepcopy(model.state_dict())
    for empty in ([], [torch.zeros(1, 0, dtype=torch.long)], ["", ""]):
        with pytest.raises(ValueError, match="there are no batches"):
            calibrate(model, empty, tokenizer=tokenizer)
    with pytest.raises(TypeError, match="give tokenizer="):
        calibrate(model, ["text"])
    with pytest.raises(TypeError, match="give a list"):
        calibrate(model, "text", tokenizer=tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    before = copy.deepcopy(model.state_dict())
    good, bad = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 7, 3]])
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.self_attn.q_proj' in batch 1 holds NaN"):
        calibrate(model, [good, bad])
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


def test_a_history_from_training_stays(hif8: Any) -> None:
    model = copy.deepcopy(hif8)
    was = {name: layer.fp8_history[INPUT].clone() for name, layer in scaled(model).items()}
    summary = calibrate(model, [torch.ones(1, 4, dtype=torch.long)])
    for name, layer in scaled(model).items():
        assert torch.equal(layer.fp8_history[INPUT, 1:], was[name][:-1])
        largest = max(float(was[name][:-1].max()), summary.amax[name])
        assert summary.scales[name] == pytest.approx(largest / layer.fp8_recipe.target(INPUT), rel=1e-6)
