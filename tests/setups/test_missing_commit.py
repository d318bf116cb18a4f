"""Weights that change while nothing commits: the user is told once, and only then."""

from __future__ import annotations

import warnings

import pytest
import torch
from setups.runs import converted, loss_of, sgd, step
from torch import nn

from fp8kernels import commit
from fp8kernels.nn import kept
from fp8kernels.nn.kept import MissingCommitWarning
from fp8kernels.nn.step import layers


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not been warned yet."""
    monkeypatch.setattr(kept, "_warned", False)


class Descent:
    """No torch.optim.Optimizer, so nothing tells us of its steps."""

    def __init__(self, net: nn.Module) -> None:
        self.parameters = list(net.parameters())

    @torch.no_grad()
    def step(self) -> None:
        for p in self.parameters:
            if p.grad is not None:
                p -= 0.01 * p.grad
                p.grad = None


def run(net: nn.Module, steps: int, *, by_hand: bool) -> list[int]:
    """Trains, and returns the forwards, counted from 0, that warned."""
    optimizer, warned = Descent(net), []
    for n in range(steps):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            loss_of(net, "llama", n).backward()
        if any(issubclass(w.category, MissingCommitWarning) for w in told):
            warned.append(n)
        optimizer.step()
        if by_hand:
            commit(net)
    return warned


def test_told_once_after_two_steps_that_nobody_committed() -> None:
    net = converted("llama")
    assert run(net, 6, by_hand=False) == [2]
    assert all((layer.fp8_history == 0).all() for layer in layers(net))


def test_not_told_where_commits_are_made_by_hand() -> None:
    net = converted("llama")
    assert run(net, 6, by_hand=True) == []
    assert {int(layer.fp8_step) for layer in layers(net)} == {6}


def test_the_warning_names_a_layer_and_the_way_out() -> None:
    net = converted("llama")
    with pytest.warns(MissingCommitWarning, match=r"model\.layers\.0\.self_attn.*fp8kernels\.commit\(model\)"):
        run_silently(net)


def run_silently(net: nn.Module) -> None:
    optimizer = Descent(net)
    for n in range(3):
        loss_of(net, "llama", n).backward()
        optimizer.step()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_not_told_where_torch_optimizers_step(steps: int) -> None:
    net = converted("llama")
    optimizer = sgd(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MissingCommitWarning)
        for n in range(steps):
            step(net, optimizer, "llama", n, n + 1, n + 2)


def test_not_told_of_one_change_between_two_commits() -> None:
    """A perturbation that is taken back within the step, as sharpness-aware minimisation does it."""
    net = converted("llama")
    optimizer = sgd(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MissingCommitWarning)
        for n in range(4):
            loss_of(net, "llama", n).backward()
            moved = [(p, 0.01 * p.grad) for p in net.parameters() if p.grad is not None]
            with torch.no_grad():
                for p, by in moved:
                    p += by
            optimizer.zero_grad()
            loss_of(net, "llama", n).backward()
            with torch.no_grad():
                for p, by in moved:
                    p -= by
            optimizer.step()
            optimizer.zero_grad()
    assert {int(layer.fp8_step) for layer in layers(net)} == {4}
