"""Several forwards to one optimizer step, modules and weights in several places, layers that sit a step out."""

from __future__ import annotations

import pytest
import torch
from setups.models import FAMILIES, build
from setups.runs import FULL, QAT, Ledger, converted, fused_pair, loss_of, same, same_models, sgd, state, step, train
from torch import nn

from fp8kernels import convert
from fp8kernels.nn.step import layers
from fp8kernels.scaling.delayed import GRAD, WEIGHT

STEPS = 5  # more than the window of 3, so that amax leaves it too


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_enter_as_their_maximum(family: str) -> None:
    net = converted(family, fuse=False)
    ledger, optimizer = Ledger(net), sgd(net)
    for n in range(STEPS):
        step(net, optimizer, family, 3 * n + 1, 3 * n, 3 * n + 2)  # the first of them has the largest inputs
        ledger.commit()


def test_two_equal_halves_are_one_whole() -> None:
    """g/2 + g/2 is g without rounding, so two micro-batches of the same data give the bits of one batch."""
    whole, halves = converted("llama", QAT), converted("llama", QAT)
    optimizers = sgd(whole), sgd(halves)
    for n in range(STEPS):
        (a,) = step(whole, optimizers[0], "llama", n)
        b, c = step(halves, optimizers[1], "llama", n, n, weight=0.5)
        assert a == b == c
    same_models(whole, halves, but=("fp8_counters",))


def test_scales_stand_still_between_micro_batches() -> None:
    """A forward gives the same loss before and after other micro-batches of its step."""
    net = converted("llama")
    train(net, "llama", range(2))
    before = state(net)
    loss = loss_of(net, "llama", 0)
    loss.backward()
    loss_of(net, "llama", 1).backward()
    assert torch.equal(loss_of(net, "llama", 0), loss)
    after = state(net)
    for name in ("fp8_scale", "fp8_history", "fp8_step"):
        keys = [key for key in before if key.endswith(name)]
        same({key: before[key] for key in keys}, {key: after[key] for key in keys})


def test_a_block_called_twice() -> None:
    """Both calls of a layer enter its one history, and its two gradients too."""
    net = build("llama")
    net.model.layers[1] = net.model.layers[0]
    convert(net, FULL, fuse=False, verbose=False)
    assert len(layers(net)) == 7
    ledger, optimizer = Ledger(net), sgd(net)
    for n in range(STEPS):
        step(net, optimizer, "llama", n)
        ledger.commit()
        assert all(len(row) == min(n + 1, FULL.window) for row in ledger.rows.values())


def test_a_fused_block_called_twice() -> None:
    """The same where norms and MLPs hand codes on."""
    nets = []
    for fuse in (False, True):
        net = build("llama")
        net.model.layers[1] = net.model.layers[0]
        nets.append(convert(net, FULL, fuse=fuse, verbose=False))
    assert train(nets[0], "llama", range(STEPS)) == train(nets[1], "llama", range(STEPS))
    same_models(*nets)


@pytest.mark.parametrize("fuse", [True, False])
def test_shared_weights(*, fuse: bool) -> None:
    """Layers with one weight have one weight history, and each its own histories of inputs and gradients."""
    net = build("llama")
    first, second = (block.mlp.gate_proj for block in net.model.layers)
    second.weight = first.weight
    convert(net, FULL, fuse=fuse, verbose=False)
    ledger = None if fuse else Ledger(net)
    optimizer = sgd(net)
    for n in range(STEPS):
        step(net, optimizer, "llama", n)
        if ledger is not None:
            ledger.commit()
        assert torch.equal(first.fp8_history[WEIGHT], second.fp8_history[WEIGHT])
        assert not torch.equal(first.fp8_history[GRAD], second.fp8_history[GRAD])


@pytest.mark.parametrize("fuse", [True, False])
def test_a_branch_not_taken(*, fuse: bool) -> None:
    """Every second step leaves after the first block: the second keeps its state, and its steps are those it saw."""
    net = converted("llama", fuse=fuse)
    ledger = None if fuse else Ledger(net)
    optimizer, second = sgd(net), net.model.layers[1]
    for n in range(2 * STEPS):
        before = state(second)
        net.model.config.num_hidden_layers = 1 + n % 2
        step(net, optimizer, "llama", n)
        if ledger is not None:
            ledger.commit()
        if n % 2 == 0:
            same(before, state(second))
    assert {int(layer.fp8_step) for layer in layers(second)} == {STEPS}
    assert {int(layer.fp8_step) for layer in layers(net.model.layers[0])} == {2 * STEPS}


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_layers(family: str) -> None:
    """A frozen weight is seen, and stays; where nothing before it trains, it has no gradient to see."""
    net = converted(family, fuse=False)
    found = layers(net)
    frozen = found[: len(found) // 2]  # with everything that comes before
    for module in net.modules():
        if isinstance(module, (nn.Embedding, nn.LayerNorm)) or "Norm" in type(module).__name__ or module in frozen:
            module.requires_grad_(False)
    for name, parameter in net.named_parameters():
        if "embeddings" in name:
            parameter.requires_grad_(False)
    ledger, optimizer = Ledger(net), sgd(net)
    before = frozen[0].weight.clone()
    for n in range(STEPS):
        step(net, optimizer, family, n)
        ledger.commit()
    assert torch.equal(frozen[0].weight, before)
    assert (frozen[0].fp8_history[WEIGHT] == before.abs().max()).all()
    assert (frozen[0].fp8_history[GRAD] == 0).all()
    assert (found[-1].fp8_history[GRAD] > 0).all()


def test_a_layer_frozen_in_the_middle_of_a_run() -> None:
    net = converted("llama", fuse=False)
    ledger, optimizer = Ledger(net), sgd(net)
    for n in range(2 * STEPS):
        net.model.layers[1].requires_grad_(n < STEPS)
        step(net, optimizer, "llama", n)
        ledger.commit()


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_modules_keep_the_same_books(family: str) -> None:
    """What the ledger holds against unfused models holds for fused ones: they have the same state."""
    nets = fused_pair(family)
    optimizers = [sgd(net) for net in nets]
    for n in range(STEPS):
        a, b = (step(net, o, family, 2 * n, 2 * n + 1) for net, o in zip(nets, optimizers, strict=True))
        assert a == b
    same_models(*nets)
