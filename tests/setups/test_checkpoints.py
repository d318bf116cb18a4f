"""Checkpoints of plain and converted models, of other windows and recipes, and models that begin on meta."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from setups.models import FAMILIES, build
from setups.runs import FULL, QAT, converted, same, same_models, sgd, state, step, train
from torch import Tensor, nn

from fp8kernels import Recipe, commit, convert, get_recipe, without_state
from fp8kernels.nn.state import RecipeWarning
from fp8kernels.nn.step import layers
from fp8kernels.scaling.delayed import INPUT, ROLES

STEPS = 3


def trained(family: str, recipe: Recipe = FULL, steps: int = STEPS) -> nn.Module:
    net = converted(family, recipe)
    train(net, family, range(steps))
    return net


def follows_its_history(net: nn.Module) -> None:
    """Every scale is the one that the recipe makes of the history."""
    for layer in layers(net):
        for role in range(len(ROLES)):
            want = layer.fp8_history[role].max() / layer.fp8_recipe.target(role)
            assert torch.equal(layer.fp8_scale[role], want), f"{layer.fp8_name}, {ROLES[role]}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_goes_on_from_a_file(family: str, tmp_path: Path) -> None:
    """Saved, read with weights_only into a new model with a new optimizer: the bits of the run that was not cut."""
    whole, first = converted(family), converted(family)
    optimizers = sgd(whole), sgd(first)
    losses = [step(whole, optimizers[0], family, n)[0] for n in range(2 * STEPS)]
    for n in range(STEPS):
        step(first, optimizers[1], family, n)
    torch.save({"model": first.state_dict(), "optimizer": optimizers[1].state_dict()}, tmp_path / "run.pt")
    second = converted(family, seed=9)
    again = sgd(second)
    read = torch.load(tmp_path / "run.pt", weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RecipeWarning)
        second.load_state_dict(read["model"])
    again.load_state_dict(read["optimizer"])
    assert [step(second, again, family, n)[0] for n in range(STEPS, 2 * STEPS)] == losses[STEPS:]
    same_models(whole, second)


@pytest.mark.parametrize("family", FAMILIES)
def test_between_plain_and_converted(family: str) -> None:
    plain, net = build(family, seed=5), trained(family)
    before = state(net)
    net.load_state_dict(plain.state_dict())  # strict, and the state stays as it is
    same(before, state(net))
    same(plain.state_dict(), without_state(net.state_dict()))
    net = trained(family)
    plain.load_state_dict(without_state(net.state_dict()))
    same(plain.state_dict(), without_state(net.state_dict()))
    fresh, direct = converted(family, seed=7), converted(family, seed=5)
    fresh.load_state_dict(build(family, seed=5).state_dict())
    assert train(fresh, family, range(STEPS)) == train(direct, family, range(STEPS))
    same_models(fresh, direct)


def test_a_window_that_grew() -> None:
    """Histories that were not full yet are those of a run that had the longer window from the start."""
    short, long = trained("llama", FULL, steps=FULL.window), trained("llama", FULL.replace(window=8), FULL.window)
    grown = converted("llama", FULL.replace(window=8), seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RecipeWarning)  # the scales are the same
        grown.load_state_dict(short.state_dict())
    same_models(grown, long)
    assert train(grown, "llama", range(10, 14)) == train(long, "llama", range(10, 14))
    same_models(grown, long)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_that_shrank(family: str) -> None:
    """The newest slots stay, and scales are made of those."""
    net, short = trained(family), converted(family, FULL.replace(window=1), seed=9)
    with pytest.warns(RecipeWarning, match="made again from the histories"):
        short.load_state_dict(net.state_dict())
    for ours, theirs in zip(layers(short), layers(net), strict=True):
        assert torch.equal(ours.fp8_history, theirs.fp8_history[:, :1])
    follows_its_history(short)
    train(short, family, range(2))
    follows_its_history(short)


@pytest.mark.parametrize("change", ["format", "margin", "algorithm"])
def test_a_checkpoint_of_another_recipe(change: str) -> None:
    """Histories are in units of the tensors and stay; scales become those of the new recipe."""
    net = trained("llama")
    recipe = {
        "format": get_recipe("e4m3-delayed").replace(window=3),
        "margin": FULL.replace(margin=2),
        "algorithm": FULL.replace(algorithm="most_recent"),
    }[change]
    other, grown = converted("llama", recipe, seed=9), converted("llama", recipe, seed=8)
    with pytest.warns(RecipeWarning):
        other.load_state_dict(net.state_dict())
    for ours, theirs in zip(layers(other), layers(net), strict=True):
        assert torch.equal(ours.fp8_history, theirs.fp8_history)
        amax = ours.fp8_history[INPUT, 0] if change == "algorithm" else ours.fp8_history[INPUT].max()
        assert torch.equal(ours.fp8_scale[INPUT], amax / recipe.target(INPUT))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RecipeWarning)  # what it saves itself is consistent
        grown.load_state_dict(other.state_dict())
    same_models(other, grown)


def test_a_role_that_the_checkpoint_did_not_have() -> None:
    """Gradients get 8 bits in a run that began without: their history is empty, and fills."""
    net, other = trained("llama", QAT), converted("llama", FULL, seed=9)
    other.load_state_dict(net.state_dict())
    same(state(net), state(other))
    train(other, "llama", range(1))
    assert all((layer.fp8_scale > 0).all() for layer in layers(other))


def on_meta(family: str) -> nn.Module:
    with torch.device("meta"):
        net = build(family)
    return convert(net, FULL, verbose=False)


def unsaved(net: nn.Module, like: nn.Module) -> None:
    """Buffers that a checkpoint does not hold, which whoever materialises a model has to make."""
    saved = net.state_dict().keys()
    for name, value in like.named_buffers():
        if name not in saved:
            parent, _, last = name.rpartition(".")
            net.get_submodule(parent)._buffers[last] = value.clone()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["to_empty", "assign"])
@pytest.mark.parametrize("source", ["plain", "converted"])
def test_from_meta(family: str, how: str, source: str) -> None:
    """Converted without storage, given it later: as if it had never been on meta, whatever the memory held."""
    direct = trained(family) if source == "converted" else converted(family)
    checkpoint: dict[str, Tensor] = {key: value.clone() for key, value in direct.state_dict().items()}
    if source == "plain":
        checkpoint = without_state(checkpoint)
    net = on_meta(family)
    if how == "to_empty":
        net.to_empty(device="cpu")
        for key in ("fp8_pending", "fp8_counters", "fp8_step", "fp8_fallback", "fp8_history", "fp8_scale"):
            assert all((getattr(layer, key) == 0).all() for layer in layers(net)), f"{key} is empty"
    net.load_state_dict(checkpoint, assign=how == "assign")
    unsaved(net, build(family))
    net.tie_weights()
    assert not any(value.is_meta for value in [*net.parameters(), *net.buffers()])
    same_models(direct, net)
    assert train(direct, family, range(STEPS)) == train(net, family, range(STEPS))
    same_models(direct, net)


def test_a_commit_on_meta_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="to_empty"):
        commit(on_meta("llama"))
