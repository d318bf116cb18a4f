"""convert and revert: what is converted, what is not and why, and that both are in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fp8kernels
from fp8kernels import Recipe, Role, convert, get_recipe, revert
from fp8kernels.convert import decide
from fp8kernels.nn.step import layers


class Own(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 64, 4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3))
        self.attention = nn.MultiheadAttention(64, 4)
        self.odd = Own(64, 64)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.double = nn.Linear(4, 4, dtype=torch.float64)
        self.lm_head = nn.Linear(64, 100)


def reasons(model: nn.Module, recipe: str | Recipe = "hif8-qat", keep=None) -> dict[str, str | None]:  # type: ignore[no-untyped-def]
    return {d.name: d.reason for d in decide(model, get_recipe(recipe), keep)}


def test_every_layer_has_a_decision_with_a_reason() -> None:
    found = reasons(Model(), keep=lambda module, name: name != "blocks.1.0")
    converted = {name for name, reason in found.items() if reason is None}
    assert converted == {"patch", "blocks.0.0", "blocks.2.0", "attention", "attention.out_proj"}
    assert found["odd"] == "Own is a subclass of Linear with a forward of its own"
    assert found["conv"] == "only kernel = stride is a linear layer: kernel (3, 3) differs from stride (1, 1)"
    assert "float64" in found["double"]
    assert "lm_head" in found["lm_head"]
    assert found["blocks.1.0"] == "excluded by the filter"


def test_in_place_and_back() -> None:
    model = Model()
    linear, weight, keys = model.blocks[0][0], model.blocks[0][0].weight, list(model.state_dict())
    assert convert(model, verbose=False) is model
    assert model.blocks[0][0] is linear
    assert linear.weight is weight
    assert isinstance(linear, nn.Linear)
    assert len(layers(model)) == 6
    assert set(fp8kernels.without_state(model.state_dict())) == set(keys)
    assert revert(model) is model
    assert not layers(model)
    assert type(model.blocks[0][0]) is nn.Linear
    assert type(model.attention.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    assert list(model.state_dict()) == keys
    with pytest.raises(ValueError, match="no 8-bit layers"):
        revert(model)


def test_the_table_says_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    convert(Model(), "e4m3-delayed")
    said = capsys.readouterr().out
    for part in ("e4m3-delayed: 6 of 10", "blocks.*.*", "Own is a subclass", "e4m3 delayed tensor", "high precision"):
        assert part in said, said


def test_converting_twice_says_so_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model = convert(Model(), verbose=False)
    before = [(type(m), m.fp8_recipe) for m in layers(model)]
    convert(model, "e4m3-row")
    assert "already converted" in capsys.readouterr().out
    assert [(type(m), m.fp8_recipe) for m in layers(model)] == before


def test_nothing_to_convert_raises_with_the_reasons() -> None:
    with pytest.raises(ValueError, match=r"nothing in Own[\s\S]*subclass of Linear"):
        convert(Own(4, 4))
    with pytest.raises(ValueError, match="it has no Linear"):
        convert(nn.ReLU())
    with pytest.raises(ValueError, match="excluded by the filter"):
        convert(nn.Linear(4, 4), filter=lambda module, name: False)
    with pytest.raises(TypeError, match="this is str"):
        convert("model")  # type: ignore[type-var]


def test_blocks_that_do_not_divide_are_a_reason() -> None:
    model = nn.Sequential(nn.Linear(100, 128), nn.Linear(128, 100), nn.Linear(128, 256))
    assert reasons(model, "e4m3-block128") == {
        "0": "block '1x128' does not divide in_features 100",
        "1": "block '128x128' does not divide weight (100, 128)",
        "2": None,
    }


def test_the_root_itself_and_shared_layers() -> None:
    root = convert(nn.Linear(8, 8), verbose=False)
    assert isinstance(root, fp8kernels.nn.Linear)
    shared = nn.Linear(8, 8)
    assert len(layers(convert(nn.Sequential(shared, shared), verbose=False))) == 1


def test_attention_that_stays_keeps_its_out_projection() -> None:
    found = reasons(nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8)), keep=lambda module, name: name != "0")
    assert found["0.out_proj"] == "its MultiheadAttention is not converted, and goes past it"


def test_overrides_by_pattern() -> None:
    recipe = (
        get_recipe("hif8-qat")
        .with_override("blocks.0.*", None)
        .with_override(r"re:blocks\.2\..*", get_recipe("e4m3-row"))
    )
    model = convert(Model(), recipe, verbose=False)
    assert type(model.blocks[0][0]) is nn.Linear
    assert model.blocks[1][0].fp8_recipe.name == "hif8-qat"
    assert model.blocks[2][0].fp8_recipe.name == "e4m3-row"


def test_recipes_are_frozen_values() -> None:
    recipe = get_recipe("hif8-qat")
    assert recipe.replace(window=8) == recipe.replace(window=8)
    assert recipe.replace(window=8) != recipe
    assert "window=64" in repr(recipe)
    assert (recipe.target(0), recipe.target(2)) == (15.0, 224.0)
    assert recipe.replace(margin=1).target(0) == 7.5
    assert recipe.with_format(grad="e5m2").target(2) == 57344.0
    assert recipe.with_format(grad="e5m2").with_format(grad="bf16").grad is None
    with pytest.raises(AttributeError):
        recipe.window = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: get_recipe("hif8_qat"), "did you mean 'hif8-qat'"),
        (lambda: Role("hif7"), "did you mean 'hif8'"),
        (lambda: Role("hif8", "dynamic"), "unknown scaling 'dynamic'"),
        (lambda: Role("e4m3", "delayed", "row"), "one scale per tensor"),
        (lambda: Role("e4m3", target=500.0), r"outside \(0, 448\]"),
        (lambda: get_recipe("hif8-qat").replace(algorithm="mean"), "unknown amax algorithm 'mean'"),
        (lambda: get_recipe("hif8-qat").replace(window=0), "window=0"),
        (lambda: fp8kernels.Alarm("stop"), "unknown alarm policy 'stop'"),
    ],
)
def test_bad_recipes(make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=says):
        make()


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(TypeError, match="did you mean 'window'"):
        get_recipe("hif8-qat").replace(windows=3)
