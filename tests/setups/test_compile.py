"""torch.compile of whole models with inductor: no graph breaks, no recompilation, the eager run's state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from setups.models import batch, build
from setups.runs import FULL, same, sgd, state
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fp8kernels import Recipe, convert, revert
from fp8kernels.nn.step import layers
from fp8kernels.scaling.delayed import GRAD, INPUT, WEIGHT

STEPS = 5


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def steps(forward: Any, net: nn.Module, given: list[dict[str, Any]], *, steady_from: int) -> list[float]:
    """Training in which nothing may be compiled from the step `steady_from` on."""
    optimizer, losses = sgd(net), []
    for n, arguments in enumerate(given):
        with torch._dynamo.config.patch(error_on_recompile=n >= steady_from):
            out = forward(**arguments)
            loss: Tensor = out.loss if hasattr(out, "loss") else out.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return losses


class Named(nn.Sequential):
    """A plain stack with a named argument."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out


def stack(recipe: Recipe) -> nn.Module:
    torch.manual_seed(0)
    # ReLU is exact, so compiled and eager runs differ by nothing
    return convert(Named(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)), recipe, verbose=False)


def data(count: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(8, 32, generator=draw) * 2.0 ** (n % 3)} for n in range(count)]


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_stack_is_compiled_once_and_keeps_the_books(warmup: int) -> None:
    """With warm-up there are two graphs, one in high precision: a second compilation when it ends, and none after."""
    recipe = FULL.replace(warmup_steps=warmup)
    eager, net = stack(recipe), stack(recipe)
    compiled = torch.compile(net, fullgraph=True)
    a = steps(eager, eager, data(STEPS), steady_from=0)
    b = steps(compiled, net, data(STEPS), steady_from=warmup + 1)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == (2 if warmup else 1)
    if warmup:  # the same products in high precision
        assert a[0] == pytest.approx(b[0], rel=(32 + 48) * 2.0**-23)  # sums of so many, each rounded to fp32
    for ours, theirs in zip(layers(net), layers(eager), strict=True):
        assert int(ours.fp8_step) == int(theirs.fp8_step) == STEPS
        assert (ours.fp8_history > 0).all()
        for role in (INPUT, WEIGHT, GRAD):
            assert torch.equal(ours.fp8_scale[role], ours.fp8_history[role].max() / recipe.target(role))
    # the first layer's inputs are the data, whatever compiles
    assert torch.equal(layers(net)[0].fp8_history[INPUT], layers(eager)[0].fp8_history[INPUT])
    assert torch.equal(layers(net)[0].fp8_counters[:2, 0], layers(eager)[0].fp8_counters[:2, 0])


def test_eval_of_a_compiled_model_writes_nothing() -> None:
    """Training and evaluation in turns: a graph for each, both compiled by the second round."""
    net = stack(FULL)
    compiled = torch.compile(net, fullgraph=True)
    optimizer = sgd(net)
    for n, given in enumerate(data(STEPS)):
        with torch._dynamo.config.patch(error_on_recompile=n > 0):
            compiled(**given).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            before = state(net)
            net.eval()
            with torch.no_grad():
                got = compiled(x=given["x"] * 50)
                assert torch.isfinite(got).all()
            net.train()
            same(before, state(net))
    assert not counters["graph_break"]


@pytest.mark.slow
def test_llama_is_compiled_once() -> None:
    """transformers' model with its loss, whole: one graph, and the state of the step law."""

    def model() -> nn.Module:
        net = build("llama")
        net.model.layers = net.model.layers[:1]
        net.config.num_hidden_layers = 1
        return convert(net, FULL, verbose=False)

    eager, net = model(), model()
    given = [batch("llama", n) for n in range(STEPS)]
    compiled = torch.compile(net, fullgraph=True)
    a, b = steps(eager, eager, given, steady_from=0), steps(compiled, net, given, steady_from=1)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    for ours, theirs in zip(layers(net), layers(eager), strict=True):
        assert int(ours.fp8_step) == int(theirs.fp8_step) == STEPS
        assert torch.equal(ours.fp8_counters[INPUT, 0], theirs.fp8_counters[INPUT, 0])
        for role in (INPUT, WEIGHT, GRAD):
            assert torch.equal(ours.fp8_scale[role], ours.fp8_history[role].max() / FULL.target(role))
    # inductor sums in another order, which is less than what rounding to 8 bits does
    plain = float(revert(model())(**given[0]).loss.detach())
    assert abs(a[0] - b[0]) < abs(a[0] - plain)
