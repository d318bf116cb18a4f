"""Copies of models, and models that move: each trains on, with the state that it had and none of the other's."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from setups.models import FAMILIES, batch
from setups.runs import FULL, Ledger, converted, same, same_models, sgd, state, step, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fp8kernels import convert, revert
from fp8kernels.nn.state import RecipeWarning
from fp8kernels.nn.step import layers
from fp8kernels.scaling.delayed import is_state

STEPS = 4
F32 = ("fp8_history", "fp8_pending", "fp8_scale")


def saved(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    out: nn.Module = torch.load(file, weights_only=False)
    return out


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": saved,
    "deepcopy in the middle of a step": copy.deepcopy,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_trains_like_its_original(family: str, how: str) -> None:
    """Both go on from the same state, each for itself, and end with the same bits."""
    net = converted(family)
    train(net, family, range(2))
    if "middle" in how:
        net(**batch(family, 5))  # noted, and not committed
    twin = COPIES[how](net)
    same_models(net, twin)
    before = state(net)
    losses = train(twin, family, range(STEPS))
    same(before, state(net))
    after = state(twin)
    assert losses == train(net, family, range(STEPS))
    same(after, state(twin))
    same_models(net, twin)


def test_a_copy_of_a_part() -> None:
    """A block that was copied out of a model commits with the optimizer that holds it."""
    net = converted("llama")
    train(net, "llama", range(2))
    block = copy.deepcopy(net.model.layers[1].mlp)
    before = state(net)
    optimizer = sgd(block)
    block(torch.randn(2, 3, 32)).square().mean().backward()
    optimizer.step()
    same(before, state(net))
    assert {int(layer.fp8_step) for layer in layers(block)} == {3}


def test_a_copy_where_only_an_adapter_trains() -> None:
    """The optimizer holds none of the layers' parameters: being in one model with them is enough."""
    net = converted("llama")
    net.requires_grad_(False)
    net.model.embed_tokens.requires_grad_(True)
    twin = copy.deepcopy(net)
    assert train(net, "llama", range(STEPS)) == train(twin, "llama", range(STEPS))
    same_models(net, twin)
    assert {int(layer.fp8_step) for layer in layers(twin)} == {STEPS}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_leave_the_state_alone(dtype: torch.dtype) -> None:
    net = converted("llama")
    train(net, "llama", range(2))
    before = state(net)
    net.to(dtype)
    assert next(net.parameters()).dtype == dtype
    same(before, state(net))
    assert all(getattr(layer, name).dtype == torch.float32 for layer in layers(net) for name in F32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["half", "bfloat16", "to"])
def test_training_in_16_bits(family: str, how: str) -> None:
    """Weights in 16 bits, converted before the move or after it: the same run, and exact books."""
    first = converted(family, fuse=False)
    move = {"half": nn.Module.half, "bfloat16": nn.Module.bfloat16, "to": lambda m: m.to("cpu", torch.bfloat16)}[how]
    move(first)
    then = convert(move(revert(converted(family))), FULL, fuse=False, verbose=False)
    dtype = next(first.parameters()).dtype
    ledger, optimizers = Ledger(first), (sgd(first), sgd(then))
    for n in range(STEPS):
        losses = []
        for net, optimizer in zip((first, then), optimizers, strict=True):
            given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch(family, n).items()}
            loss = net(**given).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        ledger.commit()
        assert losses[0] == losses[1]
    same_models(first, then)


def test_a_move_in_the_middle_of_a_run() -> None:
    """To bf16 and back to fp32 between two steps: histories go on."""
    net = converted("llama", fuse=False)
    ledger = Ledger(net)
    optimizer = sgd(net)
    for n in range(STEPS):
        step(net, optimizer, "llama", n)
        ledger.commit()
        net.bfloat16().float().to("cpu")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_buffers", [True, False])
def test_moving_averages_of_a_model(family: str, *, use_buffers: bool) -> None:
    """An EMA copy: its weights are averages of the trained ones, it does not disturb the run, and it evaluates."""
    plain, net = converted(family), converted(family)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    optimizer = sgd(net)
    losses, want = [], [p.detach().clone() for p in net.parameters()]
    for n in range(STEPS):
        losses += step(net, optimizer, family, n)
        average.update_parameters(net)
        if n:
            want = [torch.lerp(w, p.detach(), 0.5) for w, p in zip(want, net.parameters(), strict=True)]
        else:
            want = [p.detach().clone() for p in net.parameters()]
    assert losses == train(plain, family, range(STEPS))
    same_models(plain, net)
    for got, w in zip(average.module.parameters(), want, strict=True):
        torch.testing.assert_close(got, w, rtol=2.0**-22, atol=1e-30)  # a lerp rounds three times
    with torch.no_grad():
        got = average.module.eval()(**batch(family, 9)).logits
    assert torch.isfinite(got).all()
    if not use_buffers:
        same(state(net), state(average.module))
    hand = converted(family)
    with pytest.warns(RecipeWarning) if use_buffers else nullcontext():
        hand.load_state_dict(average.module.state_dict())
    if use_buffers:  # a mean of largest values is not the largest of means: loaded, scales follow their histories again
        assert all(torch.equal(m.fp8_scale[0], m.fp8_history[0].max() / FULL.target(0)) for m in layers(hand))
    else:
        with torch.no_grad():
            assert torch.equal(hand.eval()(**batch(family, 9)).logits, got)


def test_an_average_takes_part_in_no_commit() -> None:
    """No optimizer holds its parameters: what its forwards note in training mode waits, and reaches nothing."""
    net = converted("llama")
    average = AveragedModel(net)
    before = {key: value.clone() for key, value in average.module.state_dict().items()}
    train(net, "llama", range(STEPS))
    same(before, average.module.state_dict())
    assert any(is_state(key) for key in before)
