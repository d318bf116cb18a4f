"""plan: the ranking against brute force, the promise against the converted model, the model left as it was."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fp8kernels import Plan, Recipe, Role, convert, get_recipe, plan

E4M3 = Recipe("e4m3", Role("e4m3"), Role("e4m3"))
OUTLIER = 3e4  # with it in a tensor, weights of a few tenths lie below what E4M3 has above zero


def sequential(*, depth: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [module for _ in range(depth) for module in (nn.Linear(32, 32), nn.GELU())]
    return nn.Sequential(*blocks, nn.Linear(32, 10))


def inputs(count: int = 2) -> list[torch.Tensor]:
    return list(torch.randn(count, 16, 32, generator=torch.Generator().manual_seed(1)))


def spoil(linear: nn.Linear, before: nn.Module) -> None:
    """Weights so large that one scale leaves little of the others, in a column that meets zeros from what is before."""
    with torch.no_grad():
        for parameter in before.parameters():
            parameter[0] = 0
        linear.weight[:, 0] = OUTLIER


def divergence(model: nn.Module, other: nn.Module, batches: list[Any]) -> float:
    """KL in nats, in other words than the library's."""
    with torch.no_grad():
        rows = [
            (p.double().softmax(-1) * (p.double().log_softmax(-1) - q.double().log_softmax(-1))).sum(-1)
            for p, q in ((model(x), other(x)) for x in batches)
        ]
    return float(torch.cat([r.flatten() for r in rows]).mean())


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokens() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(64, (2, 2, 12), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": x, "labels": x} for x in ids]


def test_a_spoiled_layer_of_a_llama_is_first_and_left_out() -> None:
    model, batches = llama(), tokens()
    spoil(model.model.layers[1].mlp.up_proj, model.model.layers[1].post_attention_layernorm)
    found = plan(model, batches, E4M3.with_override("*lm_head", None), budget=0.25, verbose=False)
    assert found.rows[0].layer == "model.layers.1.mlp.up_proj", str(found)
    assert "model.layers.1.mlp.up_proj" in found.left
    assert "lm_head" not in {row.layer for row in found.rows}
    assert found.share <= 0.25
    assert found.proposed.kl < found.all_8bit.kl
    assert found.plain.loss is not None
    convert(model, found.recipe, verbose=False)
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear
    with torch.no_grad():
        losses = [float(model(**batch).loss) for batch in batches]
    assert math.fsum(losses) / len(losses) == found.proposed.loss


def test_the_ranking_is_that_of_brute_force() -> None:
    model, batches = sequential().eval(), inputs()
    found = plan(model, batches, E4M3, verbose=False)
    forced = {}
    for name in ("0", "2", "4", "6"):
        other = convert(copy.deepcopy(model), E4M3, filter=lambda _, n, only=name: n == only, verbose=False)  # type: ignore[misc]
        forced[name] = divergence(model, other, batches)
    assert [row.layer for row in found.rows] == sorted(forced, key=forced.__getitem__, reverse=True)
    for row in found.rows:
        assert row.kl == pytest.approx(forced[row.layer], rel=1e-9)  # fp64 sums in another order
    whole = convert(copy.deepcopy(model), E4M3, verbose=False)
    assert found.all_8bit.kl == pytest.approx(divergence(model, whole, batches), rel=1e-9)


def state_of(model: nn.Module) -> list[tuple[Any, ...]]:
    return [(name, type(m), m.training, len(m._forward_hooks), sorted(m.__dict__)) for name, m in model.named_modules()]


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(sequential(), nn.BatchNorm1d(10), nn.Dropout(0.5)).train()
    model[0].eval()
    model[0][0].register_forward_hook(lambda *_: None)
    before = copy.deepcopy(model.state_dict())
    shape = [
        (name, type(m), m.training, len(m._forward_hooks), sorted(m.__dict__)) for name, m in model.named_modules()
    ]
    random = torch.get_rng_state()
    plan(model, inputs(), verbose=False)
    assert torch.equal(random, torch.get_rng_state())
    after = [
        (name, type(m), m.training, len(m._forward_hooks), sorted(m.__dict__)) for name, m in model.named_modules()
    ]
    assert after == shape
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_failure_leaves_the_model_plain() -> None:
    model, calls = sequential(), iter(range(100))

    def loss(output: torch.Tensor, batch: torch.Tensor) -> float:
        if next(calls) == 2:
            raise RuntimeError("the third")
        return 0.0

    with pytest.raises(RuntimeError, match="the third"):
        plan(model, inputs(1), loss=loss)
    assert all(type(m) is nn.Linear for m in model[::2])
    assert all(m.training for m in model.modules())
    assert "fp8_scale" not in str(list(model.state_dict()))


def test_sqnr_takes_one_forward_for_all_layers() -> None:
    model, batches = sequential(), inputs(1)
    spoil(model[2], model[0])
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    found = plan(model, batches, E4M3, metric="sqnr", budget=0.4, verbose=False)
    handle.remove()
    assert len(calls) == 4  # plain, local, all 8-bit, the plan
    assert found.rows[0].layer == "2"
    assert found.rows[0].kl is None
    x = F.gelu(F.linear(batches[0], model[0].weight, model[0].bias))
    plain = F.linear(x, model[2].weight, model[2].bias)
    alone = convert(copy.deepcopy(model[2]).eval(), E4M3, verbose=False)
    with torch.no_grad():
        noise = (alone(x) - plain).double().norm() / plain.double().norm()
    assert found.rows[0].output_db == pytest.approx(-20 * math.log10(noise), abs=1e-6)


def test_as_few_layers_stay_as_the_loss_allows() -> None:
    model, batches = sequential().eval(), inputs()
    spoil(model[2], model[0])

    def loss(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, batch.argmax(-1) % 10)

    exact = plan(model, batches, E4M3, loss=loss, max_loss_increase=0.0, metric="loss", verbose=False)
    assert exact.proposed.loss is not None
    assert exact.plain.loss is not None
    assert exact.proposed.loss <= exact.plain.loss
    free = plan(model, batches, E4M3, loss=loss, max_loss_increase=1e9, verbose=False)
    assert free.left == ()
    assert free.proposed == free.all_8bit
    assert free.recipe == E4M3


def test_a_vision_transformer_and_an_attention_module() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vit = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=16,
            patch_size=8,
        )
    )
    found = plan(vit, [{"pixel_values": torch.randn(2, 3, 16, 16)}], budget=0.3, verbose=False)
    patches = next(row for row in found.rows if row.layer.endswith("projection"))
    assert patches.share > 0
    assert patches.input_db is not None
    assert math.fsum(row.share for row in found.rows) == pytest.approx(1.0)

    encoder = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    found = plan(encoder, [torch.randn(2, 5, 32)], budget=0.6, metric="sqnr", verbose=False)
    assert {row.layer for row in found.rows} == {"self_attn", "linear1", "linear2"}
    assert all(row.share == pytest.approx(1 / 4 if row.layer != "self_attn" else 1 / 2) for row in found.rows)


def test_warm_up_hides_no_cost_and_stays_in_the_recipe() -> None:
    recipe = E4M3.replace(warmup_steps=5)
    found = plan(sequential(), inputs(1), recipe, budget=0.3, verbose=False)
    assert found.all_8bit.kl > 0
    assert found.recipe.warmup_steps == 5
    assert found.recipe.for_layer(found.left[0])[0] is None


def test_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(sequential(), inputs(1), E4M3, budget=0.3)
    said = capsys.readouterr().out
    assert isinstance(found, Plan)
    for part in ("e4m3: 1 of 4 layers", "all 8-bit: loss", "this plan", "stays"):
        assert part in said
        assert part in str(found)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="revert"):
        plan(convert(sequential(), verbose=False), inputs())
    with pytest.raises(ValueError, match="no batches"):
        plan(sequential(), [])
    with pytest.raises(ValueError, match="converts nothing"):
        plan(nn.Sequential(nn.GELU()), inputs())
    with pytest.raises(ValueError, match="leaves"):
        plan(sequential(), inputs(), get_recipe("hif8-qat").with_override("*", None))
    with pytest.raises(ValueError, match="give loss="):
        plan(sequential(), inputs(), metric="loss")
    with pytest.raises(ValueError, match="budget"):
        plan(sequential(), inputs(), budget=1.0)
    with pytest.raises(ValueError, match="metric"):
        plan(sequential(), inputs(), metric="mse")
    with pytest.raises(ValueError, match="meta"):
        plan(nn.Linear(4, 4, device="meta"), [torch.zeros(1, 4)])
    calls = iter(range(100))
    with pytest.raises(ValueError, match="plain model on batch 1 is nan"):
        plan(sequential(), inputs(2), loss=lambda *_: math.nan if next(calls) == 1 else 0.0)
    calls = iter(range(100))
    with pytest.raises(ValueError, match="the model with 0 in 8 bits on batch 1 is nan"):
        plan(sequential(), inputs(2), loss=lambda *_: math.nan if next(calls) == 3 else 0.0)
