"""PEFT: LoRA on an 8-bit model that stands still, whose scales move all the same; merged, unmerged, saved, loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from setups.models import batch, build
from setups.runs import FULL, QAT, RECOMPUTED, converted, same, sgd, state, train
from torch import Tensor, nn

from fp8kernels import convert, get_recipe
from fp8kernels.convert import decide
from fp8kernels.convert.adapters import REASON, origin
from fp8kernels.nn import Linear
from fp8kernels.nn.state import ScaledLayer
from fp8kernels.nn.step import layers
from fp8kernels.scaling.delayed import INPUT, WEIGHT

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "v_proj", "down_proj"]
SEEDS = range(4)


def lora(net: nn.Module, **changes: Any) -> Any:
    """A model with adapters that are not zero: the same for the same seed, wherever they are put in."""
    config = peft.LoraConfig(**({"target_modules": TARGETS, "r": 4, "init_lora_weights": False} | changes))
    torch.manual_seed(0)
    return peft.get_peft_model(net, config)


def adapters(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}


def by_name(net: nn.Module) -> dict[str, Tensor]:
    """The scaling state under the names that do not depend on which came first, convert or PEFT."""
    return {key.replace(".base_layer", ""): value for key, value in state(net).items()}


@pytest.mark.parametrize("first", ["convert", "peft"])
@pytest.mark.parametrize("modules_to_save", [None, ["gate_proj"]])
def test_the_same_blocks_stay_on_either_side(modules_to_save: list[str] | None, first: str) -> None:
    """high_precision_blocks and the names of MLPs mean layers of the plain model, wherever PEFT's wrappers are."""
    recipe = get_recipe("hif8-qat-mlp").replace(high_precision_blocks=(1, 0), warmup_steps=0)
    net = build("llama")
    if first == "convert":
        convert(net, recipe, verbose=False)
    net = lora(net, modules_to_save=modules_to_save)
    if first == "peft":
        reasons = {d.name: d.reason for d in decide(net, recipe)}
        assert reasons["base_model.model.model.layers.0.mlp.down_proj.base_layer"] == "the first block"
        convert(net, recipe, verbose=False)
    plain = {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}
    found = {name for name, module in net.named_modules() if isinstance(module, ScaledLayer)}
    assert {origin(net, name).name for name in found} == plain
    assert len(found) == 3 + (modules_to_save is not None)


def test_only_adapters_train_and_scales_move() -> None:
    net = lora(converted("llama"))
    frozen = {name: p.detach().clone() for name, p in net.named_parameters() if not p.requires_grad}
    before = adapters(net)
    assert all("lora_" in name for name in before)
    losses = train(net, "llama", [0] * 6)
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in net.named_parameters() if name in frozen)
    assert all(not torch.equal(value, before[name]) for name, value in adapters(net).items())
    for layer in layers(net):
        assert int(layer.fp8_step) == 6
        assert (layer.fp8_scale[[INPUT, WEIGHT]] > 0).all()
        assert layer.fp8_history[WEIGHT, 0] == layer.weight.detach().abs().max()


@pytest.mark.parametrize("recipe", [QAT, FULL], ids=["qat", "full"])
@pytest.mark.parametrize("how", [{}, {"use_dora": True}, {"target_modules": ["gate_proj", "lm_head"]}], ids=str)
def test_the_order_of_convert_and_peft_makes_no_difference(recipe: Any, how: dict[str, Any]) -> None:
    first = lora(converted("llama", recipe), **how)
    second = convert(lora(build("llama"), **how), recipe, verbose=False)
    assert train(first, "llama", SEEDS) == train(second, "llama", SEEDS)
    same(adapters(first), adapters(second))
    same(by_name(first), by_name(second))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_changes_no_bit(*, reentrant: bool) -> None:
    plain, net = lora(converted("llama")), lora(converted("llama"))
    for model in (plain, net):
        model.enable_input_require_grads()  # which the reentrant kind needs where the first layers stand still
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert train(plain, "llama", SEEDS) == train(net, "llama", SEEDS)
    same(adapters(plain), adapters(net))
    same(state(plain), state(net), but=RECOMPUTED)


def test_adapters_that_transformers_puts_in() -> None:
    net = build("llama")
    net.add_adapter(peft.LoraConfig(target_modules=TARGETS, r=4))
    convert(net, FULL.with_override("model.layers.0.*", None), verbose=False)
    assert {layer.fp8_name.split(".")[2] for layer in layers(net)} == {"1"}
    assert not any("lora_" in layer.fp8_name for layer in layers(net))
    train(net, "llama", SEEDS)
    assert {int(layer.fp8_step) for layer in layers(net)} == {len(SEEDS)}


def test_the_encoder_of_a_prompt_stays() -> None:
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=16
    )
    decisions = decide(peft.get_peft_model(build("llama"), config), FULL)
    small = [d for d in decisions if d.name.startswith("prompt_encoder")]
    assert small and all(d.recipe is None and d.reason == REASON for d in small)
    assert sum(d.recipe is not None for d in decisions) == 14


def test_a_copy_goes_its_own_way() -> None:
    net = lora(converted("llama"))
    train(net, "llama", range(2))
    copied = copy.deepcopy(net)
    before = state(net)
    losses = train(copied, "llama", range(2, 4))
    same(before, state(net))
    assert train(net, "llama", range(2, 4)) == losses
    same(state(net), state(copied))


def test_adapters_stay_and_the_table_says_why() -> None:
    net = lora(build("llama"))
    decisions = decide(net, FULL)
    small = [d for d in decisions if "lora_" in d.name]
    assert len(small) == 2 * 2 * len(TARGETS)
    assert all(d.recipe is None and d.reason == REASON for d in small)
    kept = [d.name for d in decisions if d.recipe is None and d not in small]
    assert kept == ["base_model.model.lm_head"]
    assert sum(d.name.endswith("base_layer") for d in decisions if d.recipe is not None) == 2 * len(TARGETS)


def test_patterns_see_the_names_of_the_model_without_wrappers() -> None:
    recipe = FULL.with_override("model.layers.0.self_attn.q_proj", None).with_override("*.mlp.*", QAT)
    reasons = {d.name: d for d in decide(lora(build("llama"), modules_to_save=["lm_head"]), recipe)}
    prefix = "base_model.model.model.layers"
    assert reasons[f"{prefix}.0.self_attn.q_proj.base_layer"].recipe is None
    assert reasons[f"{prefix}.1.self_attn.q_proj.base_layer"].recipe == FULL.replace(overrides=())
    assert reasons[f"{prefix}.1.mlp.down_proj.base_layer"].recipe == QAT.replace(overrides=())
    assert reasons[f"{prefix}.1.mlp.down_proj.lora_A.default"].reason == REASON  # the pattern means the layer
    for head in ("original_module", "modules_to_save.default"):
        assert "lm_head" in str(reasons[f"base_model.model.lm_head.{head}"].reason)


def test_an_override_can_name_adapters() -> None:
    net = convert(lora(build("llama")), FULL.with_override("*lora_A*", QAT), verbose=False)
    names = {layer.fp8_name for layer in layers(net)}
    assert sum("lora_A" in name for name in names) == 2 * len(TARGETS)
    assert not any("lora_B" in name for name in names)
    train(net, "llama", SEEDS)
    assert {int(layer.fp8_step) for layer in layers(net)} == {len(SEEDS)}


def test_a_saved_adapter_holds_nothing_of_8_bits(tmp_path: Path) -> None:
    net = lora(converted("llama"))
    train(net, "llama", SEEDS)
    net.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved and all("lora_" in key and "fp8_" not in key for key in saved)
    base = converted("llama")
    inside = net.get_base_model().state_dict()
    base.load_state_dict({key.replace(".base_layer", ""): inside[key] for key in inside if "lora_" not in key})
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    same(by_name(net), by_name(again))
    assert torch.equal(*(model.eval()(**batch("llama", 9)).logits for model in (net, again)))


def test_disabled_adapters_leave_the_converted_model() -> None:
    plain, net = converted("llama"), lora(converted("llama"))
    with net.disable_adapter():
        assert torch.equal(*(model.eval()(**batch("llama", 0)).logits for model in (plain, net)))
    assert not torch.equal(*(model.eval()(**batch("llama", 0)).logits for model in (plain, net)))


class Single(nn.Module):
    """One linear layer whose weights and adapters are small multiples of powers of two: sums of them are exact."""

    def __init__(self, recipe: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 16, bias=False)
        self.layer.weight.data = torch.randint(-32, 33, (16, 32)) / 256
        convert(self, recipe, verbose=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def single(recipe: Any = FULL) -> Any:
    """Such a layer with LoRA, committed once, so that its scales are not 0."""
    net = lora(Single(recipe), target_modules=["layer"], r=2, lora_alpha=2)
    inner = net.base_model.model.layer
    inner.lora_A["default"].weight.data = torch.randint(-2, 3, (2, 32)) / 32
    inner.lora_B["default"].weight.data = torch.randint(-2, 3, (16, 2)) / 32
    net(torch.randn(64, 32)).square().sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.0).step()
    net.zero_grad()
    assert int(layers(net)[0].fp8_step) == 1
    return net


def rounded(layer: ScaledLayer, x: Tensor, role: int) -> Tensor:
    """x as the layer rounds it, in float64."""
    coded = layer.fp8_quantize(x, role)
    return torch.ops.fp8kernels.dequantize(coded.codes, coded.scale, coded.fmt, torch.float32).double()


@pytest.mark.parametrize("recipe", [FULL, get_recipe("e4m3-row")], ids=["hif8", "e4m3-row"])
def test_a_merged_layer_is_off_by_the_rounding_of_its_weight(recipe: Any) -> None:
    """Unmerged Q(x) Q(W) + x D, merged Q(x) Q(W + D), with the same scale for x: of these, two products of rounding
    errors are left, (Q(W + D) - Q(W) - D) with Q(x) and (Q(x) - x) with D; products in fp32 round on top."""
    net = single(recipe).eval()
    layer, inner = layers(net)[0], net.base_model.model.layer
    x = torch.randn(8, 32)
    before, weight, delta = net(x), layer.weight.detach().clone(), inner.get_delta_weight("default").detach()
    first = rounded(layer, weight, WEIGHT)
    qx = rounded(layer, x, INPUT)
    merged = net.merge_and_unload()
    assert type(merged.layer) is Linear and layers(merged) == [layer]
    assert torch.equal(layer.weight, weight + delta)
    second = rounded(layer, layer.weight.detach(), WEIGHT)
    change = qx @ (second - first - delta.double()).T + (qx - x.double()) @ delta.double().T
    terms = qx.abs() @ (first.abs() + second.abs() + 2 * delta.abs().double()).T
    # three chains of at most 32 fp32 products each, and their sum: Higham 2002, 3.1
    assert ((merged(x) - before).double() - change).abs().le((32 + 4) * 2.0**-24 * terms).all()
    assert change.abs().max() > 0


def test_unmerging_restores_the_layer() -> None:
    net = single().eval()
    layer, x = layers(net)[0], torch.randn(8, 32)
    weight, before = layer.weight.detach().clone(), net(x)
    net.merge_adapter()
    assert not torch.equal(layer.weight, weight)
    assert not torch.equal(net(x), before)
    net.unmerge_adapter()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(net(x), before)


def test_merging_within_a_step() -> None:
    """PEFT writes into weight.data, which no version counter sees; codes of before must not be multiplied."""
    net = single().train()
    layer, x = layers(net)[0], torch.randn(8, 32)
    net(x)
    net.merge_adapter()
    merged = net(x)
    fresh = rounded(layer.eval(), layer.weight.detach(), WEIGHT)
    want = rounded(layer, x, INPUT) @ fresh.T
    terms = rounded(layer, x, INPUT).abs() @ fresh.abs().T
    assert (merged.double() - want).abs().le((32 + 2) * 2.0**-24 * terms).all()


def test_a_merged_model_trains_on() -> None:
    net = lora(converted("llama"))
    train(net, "llama", SEEDS)
    steps = {layer.fp8_name: int(layer.fp8_step) for layer in layers(net)}
    merged = net.merge_and_unload()
    assert type(merged) is type(build("llama"))
    assert {layer.fp8_name for layer in layers(merged)} == set(steps)
    for p in merged.parameters():
        p.requires_grad_(True)
    train(merged, "llama", SEEDS)
    for layer in layers(merged):
        assert int(layer.fp8_step) == steps[layer.fp8_name] + len(SEEDS)
        assert layer.fp8_history[WEIGHT, 0] != layer.fp8_history[WEIGHT, 1]


def test_modules_to_save_are_8_bit_copies_with_scales_of_their_own(tmp_path: Path) -> None:
    net = lora(converted("llama"), target_modules=["q_proj"], modules_to_save=["o_proj"])
    wrapped = net.base_model.model.model.layers[0].self_attn.o_proj
    trained, original = wrapped.modules_to_save["default"], wrapped.original_module
    assert type(trained) is type(original) is Linear
    train(net, "llama", SEEDS)
    assert int(trained.fp8_step) == len(SEEDS)
    assert int(original.fp8_step) == 0, "nothing went through the layer that the copy stands in for"
    assert not torch.equal(trained.weight, original.weight)
    net.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(converted("llama"), tmp_path)
    loaded = again.base_model.model.model.layers[0].self_attn.o_proj.modules_to_save["default"]
    same(trained.state_dict(), loaded.state_dict())


def test_sgd_of_adapters_commits_the_base() -> None:
    """The optimizer holds no parameter of an 8-bit layer, only of their model."""
    net = lora(converted("llama"))
    optimizer = sgd(net)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not any(id(p) in held for layer in layers(net) for p in layer.parameters())
    net(**batch("llama", 0)).loss.backward()
    optimizer.step()
    assert {int(layer.fp8_step) for layer in layers(net)} == {1}
