"""One shift between tokens and labels, and no second one.

A causal language model of transformers takes the tokens as their own labels and compares the logits at i with the
label at i + 1 itself. Labels that were moved by one beforehand are moved twice: the model learns the token after the
next one, its loss falls all the same, and what it knew is gone. Published QAT runs were trained that way, so both
ends are checked here: the labels that come in, and the loss that the model makes of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100  # a label that no loss sees: torch's ignore_index, and transformers'
NEARLY_ALL = (
    0.9  # of the labels that follow their token, from where they count as moved by one; a chance match is far below
)
CLOSE = 1e-4  # relative; both losses are of the same logits in fp32, in another order of summation
CLOSE_IN_HALF = 2**-7  # relative; where the model rounds its loss to bf16


def check_labels(input_ids: Any, labels: Any, where: str = "the data") -> None:
    """Labels must be the tokens themselves, or -100 where nothing is learnt.

    input_ids   [..., sequence] int, tensor or list
    labels      the same shape
    raises      ValueError, beginning with `where`: shapes that differ, labels that were moved by one already (with
                the way out), labels that are other tokens
    """
    ids, labels = torch.as_tensor(input_ids), torch.as_tensor(labels)
    if ids.shape != labels.shape:
        raise ValueError(
            f"{where}: input_ids are {list(ids.shape)} and labels {list(labels.shape)}; a token has one label"
        )
    learnt = labels != IGNORED
    differ = learnt & (labels != ids)
    wrong = int(differ.sum())
    if not wrong:
        return
    followed = learnt[..., :-1]  # a label in the last place has no token after it
    pairs = int(followed.sum())
    moved = int((followed & (labels[..., :-1] == ids[..., 1:])).sum())
    if moved >= max(1.0, NEARLY_ALL * pairs):
        raise ValueError(
            f"{where}: the labels are shifted by one already ({moved} of {pairs} are the token that follows). "
            "Causal language models of transformers shift them themselves, so this one would learn the token after the "
            "next. Give labels equal to input_ids (-100 where nothing is learnt), or leave the labels out"
        )
    first = differ.nonzero()[0].tolist()
    raise ValueError(
        f"{where}: {wrong} of {int(learnt.sum())} labels are other tokens than the input's, the first at {first}: "
        f"input {int(ids[tuple(first)])}, label {int(labels[tuple(first)])}. Labels are the input's own tokens, or -100"
        " where nothing is learnt; leave them out to learn every token"
    )


@torch.no_grad()
def check_shift(model: nn.Module, input_ids: Tensor) -> None:
    """The model's loss on tokens as their own labels must be that of predicting the next token, shifted once.

    One forward in evaluation mode, before the model is converted: it would be seen by delayed scaling.

    input_ids   [batch, sequence] int64, at least two tokens a row
    raises      ValueError if the loss is another one, with both numbers
    """
    training = model.training
    model.eval()
    try:
        out = model(input_ids=input_ids, labels=input_ids, use_cache=False)
    finally:
        model.train(training)
    loss, expected = out.loss.float(), next_token_loss(out.logits, input_ids)
    close = CLOSE if out.loss.dtype == torch.float32 else CLOSE_IN_HALF
    if not torch.isclose(loss, expected, rtol=close, atol=0, equal_nan=True):
        raise ValueError(
            f"{type(model).__name__} does not shift labels once: its loss on {list(input_ids.shape)} tokens is "
            f"{loss.item():.5g}, that of predicting the next token {expected.item():.5g}. Train a class of "
            "transformers (AutoModelForCausalLM), or one whose loss compares logits[:, :-1] with labels[:, 1:]"
        )


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of predicting labels[:, 1:] from logits[:, :-1], in fp32; NaN if no label is learnt.

    logits  [batch, sequence, vocab]; labels [batch, sequence] int64, -100 where nothing is learnt
    """
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
