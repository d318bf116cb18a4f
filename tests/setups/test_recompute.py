"""Activation checkpointing: a forward that runs twice leaves the bits of one that runs once."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from setups.models import FAMILIES
from setups.runs import FULL, QAT, RECOMPUTED, converted, same_models, sgd, step, train
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

STEPS = range(4)
SAVED = {  # what a selective policy keeps
    "products": ("product",),
    "codes": ("quantize", "quantize_observed"),
    "nothing": (),
}


def blocks(net: nn.Module) -> list[nn.Module]:
    found = [m for m in net.modules() if type(m).__name__.endswith(("DecoderLayer", "BertLayer", "ViTLayer"))]
    assert len(found) == 2
    return found


def recompute_blocks(net: nn.Module, **how: Any) -> nn.Module:
    """Each block behind torch.utils.checkpoint, as training loops do it by hand."""
    for block in blocks(net):
        block.forward = _recomputed(block.forward, how)  # type: ignore[method-assign]
    return net


def _recomputed(forward: Any, how: dict[str, Any]) -> Any:
    # the reentrant kind takes no keywords of the function's
    return lambda *args, **kwargs: checkpoint(functools.partial(forward, **kwargs), *args, **how)


def selective(names: tuple[str, ...]) -> Any:
    """Contexts of a policy that saves these ops of ours and recomputes the rest."""

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        namespace, _, name = op.name().partition("::")
        kept = namespace == "fp8kernels" and name in names
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)


def compare(family: str, net: nn.Module, recipe: Any = FULL) -> None:
    plain = converted(family, recipe)
    assert train(plain, family, STEPS) == train(net, family, STEPS)
    same_models(plain, net, but=RECOMPUTED)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(family: str, *, reentrant: bool) -> None:
    compare(family, recompute_blocks(converted(family), use_reentrant=reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recipe_without_8_bit_gradients(*, reentrant: bool) -> None:
    compare("llama", recompute_blocks(converted("llama", QAT), use_reentrant=reentrant), QAT)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_enable(family: str, *, reentrant: bool) -> None:
    net = converted(family)
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    compare(family, net)


@pytest.mark.parametrize("saved", SAVED)
def test_selective(saved: str) -> None:
    how = {"use_reentrant": False, "context_fn": selective(SAVED[saved])}
    compare("llama", recompute_blocks(converted("llama"), **how))


def test_recomputation_is_what_happens() -> None:
    """Inputs are counted twice where blocks run twice, and once where their codes are saved."""
    plain, twice, saved = converted("llama"), converted("llama"), converted("llama")
    recompute_blocks(twice, use_reentrant=False)
    recompute_blocks(saved, use_reentrant=False, context_fn=selective(SAVED["codes"]))
    for net in (plain, twice, saved):
        train(net, "llama", STEPS)
    name = "model.layers.0.self_attn.o_proj"
    once, again, kept = (net.get_submodule(name).fp8_counters[0, 0] for net in (plain, twice, saved))
    assert again == 2 * once
    assert kept == once


def test_under_autocast_and_accumulation() -> None:
    """The recomputation runs under the autocast state of the forward, and micro-batches come between."""
    plain, net = converted("llama"), recompute_blocks(converted("llama"), use_reentrant=False)
    optimizers = sgd(plain), sgd(net)
    for n in STEPS:
        with torch.autocast("cpu", torch.bfloat16):
            losses = [step(m, o, "llama", 2 * n, 2 * n + 1) for m, o in zip((plain, net), optimizers, strict=True)]
        assert losses[0] == losses[1]
    same_models(plain, net, but=RECOMPUTED)
