"""One training step and the validation loss, the same for a plain and a converted model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

CLIP = 1.0  # largest norm of the gradient; keeps the first steps of a fresh model from jumping


def adamw(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """AdamW over the high-precision weights, in one fused kernel."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> float:
    """One optimizer step under bf16 autocast, on tokens int64 [batch, sequence]; returns the loss before it.

    The model shifts the labels itself, so the tokens are their own labels.
    """
    model.train()
    loss = _loss(model, tokens)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The learning rate of every group, from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


@torch.no_grad()
def validation_loss(model: nn.Module, batches: Sequence[Tensor]) -> float:
    """The mean loss over the batches in eval mode; the model's mode is put back."""
    was_training = model.training
    model.eval()
    try:
        return sum(_loss(model, tokens).item() for tokens in batches) / len(batches)
    finally:
        model.train(was_training)


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.autocast(tokens.device.type, torch.bfloat16):
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss
