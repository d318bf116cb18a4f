"""Asking a causal language model: which choice is the likeliest, and whether it would write the answer itself."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .items import Item


class Answer(NamedTuple):
    """A continuation's log-probability, its margin over the best other token, and whether greedy decoding writes it."""

    log_probability: float
    margin: float
    greedy: bool


@dataclass(frozen=True)
class Scores:
    """What a model answered, a value for each item in their order.

    correct            whether it was right
    margins            by how much: of a choice item, log-probability of the right choice less that of the best wrong
                       one, each divided by its characters; of a cloze item, that of the answer's tokens less that of
                       the best other token, at the token where it is smallest. Nats; negative where wrong, NaN where
                       the model is not finite
    log_probabilities  of the whole right answer after the prompt, in nats
    """

    correct: list[bool]
    margins: list[float]
    log_probabilities: list[float]

    @property
    def accuracy(self) -> float:
        """The fraction of items that were answered right."""
        return sum(self.correct) / len(self.correct)


class Continuation(NamedTuple):
    """A choice after its prompt in tokens: ids, of which those from `start` on are scored; at least one is before."""

    ids: list[int]
    start: int


def score(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    batch: int = 16,
    autocast: torch.dtype | None = None,
) -> Scores:
    """Ask a model all items. It is left as it was: modes, gradients, random numbers and 8-bit scales.

    Prompt and choice are tokenized together and the choice's tokens are what exceeds those of the prompt, whitespace at
    the end of the prompt counting to the choice. A choice item is right if the right choice has the highest
    log-probability per character, the first of equals; a cloze item if each token of the answer is the likeliest after
    those before it, so that greedy decoding writes it.

    model      a causal language model of transformers, or any that maps int64 [B, T] to logits [B, T, V]
    batch      sequences at once; padding stands behind them, where causal attention never looks. Answers do not depend
               on it beyond the rounding of matrix products, except in layers that scale a whole batch by its own amax
    autocast   compute under torch.autocast of this dtype, as a model in fp32 that trains in mixed precision does
    raises     ValueError if there are no items, batch < 1, an item is longer than the model's context, its prompt is
               empty and the tokenizer has no token to begin with, or a token is not in the model's vocabulary
    source     the rules of EleutherAI's lm-evaluation-harness, metric acc_norm and is_greedy of its log-likelihoods
    """
    if not items or batch < 1:
        raise ValueError(f"{len(items)} items in batches of {batch}; both must be at least 1")
    lead = _lead(tokenizer)
    asked = [[_encode(tokenizer, lead, item, choice, at) for choice in item.choices] for at, item in enumerate(items)]
    _check(model, items, asked)
    flat = [continuation for choices in asked for continuation in choices]
    order = sorted(range(len(flat)), key=lambda index: -len(flat[index].ids))  # little padding, the longest first
    results = [Answer(0.0, 0.0, False)] * len(flat)
    with _asking(model, autocast):
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            for index, result in zip(chosen, _ask(model, [flat[index] for index in chosen]), strict=True):
                results[index] = result
    correct, margins, log_probabilities, first = [], [], [], 0
    for item in items:
        total = [result.log_probability for result in results[first : first + len(item.choices)]]
        if item.kind == "cloze":
            margin, right = results[first].margin, results[first].greedy
        else:
            margin, right = _choice(item, total)
        correct.append(right)
        margins.append(margin)
        log_probabilities.append(total[item.answer])
        first += len(item.choices)
    return Scores(correct, margins, log_probabilities)


def _choice(item: Item, total: list[float]) -> tuple[float, bool]:
    """(margin, right) of a choice item from the log-probabilities of its choices; with a NaN nothing is right."""
    per_character = [value / len(choice) for value, choice in zip(total, item.choices, strict=True)]
    if any(math.isnan(value) for value in per_character):
        return float("nan"), False
    right = per_character[item.answer]
    margin = right - max(value for place, value in enumerate(per_character) if place != item.answer)
    return margin, per_character.index(max(per_character)) == item.answer


def _lead(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text; those that it puts behind are no part of a prompt."""
    plain, special = (list(tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (False, True))
    for place in range(len(special) - len(plain) + 1):
        if special[place : place + len(plain)] == plain:
            return special[:place]
    return []


def _encode(tokenizer: Any, lead: list[int], item: Item, choice: str, at: int) -> Continuation:
    prompt = item.prompt.rstrip()
    whole = item.prompt + choice
    before = [*lead, *tokenizer(prompt, add_special_tokens=False)["input_ids"]] if prompt else [*lead]
    ids = [*lead, *tokenizer(whole, add_special_tokens=False)["input_ids"]]
    if not before:
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if begin is None:
            raise ValueError(f"item {at} has an empty prompt, and the tokenizer has no token to begin a text with")
        before, ids = [begin], [begin, *ids]
    if len(ids) < 2:
        raise ValueError(f"item {at} ({_shown(item)}): the tokenizer makes {len(ids)} tokens of prompt and choice")
    return Continuation(ids, min(len(before), len(ids) - 1))  # one at least, also where prompt and choice are one token


def _check(model: nn.Module, items: Sequence[Item], asked: list[list[Continuation]]) -> None:
    """Whether the model takes these tokens; in words, before an index is out of range somewhere inside."""
    config = getattr(_inner(model), "config", None)
    context, vocab = getattr(config, "max_position_embeddings", None), getattr(config, "vocab_size", None)
    for at, (item, choices) in enumerate(zip(items, asked, strict=True)):
        longest = max(len(choice.ids) for choice in choices) - 1  # the last token is predicted, not read
        if context is not None and longest > context:
            raise ValueError(
                f"item {at} ({_shown(item)}) has {longest} tokens, and the model reads at most {context}; shorten it "
                f"or leave it out"
            )
        highest = max(max(choice.ids) for choice in choices)
        if vocab is not None and highest >= vocab:
            raise ValueError(
                f"item {at} ({_shown(item)}) holds token {highest}, and the model knows {vocab}: the tokenizer is not "
                f"that of the model"
            )


def _shown(item: Item) -> str:
    return repr(item.prompt if len(item.prompt) <= 40 else item.prompt[:37] + "...")


def _inner(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, torch.compile and PEFT."""
    found: Any = model
    while True:
        outer = found
        if isinstance(found, nn.parallel.DistributedDataParallel):
            found = found.module
        elif isinstance(getattr(found, "_orig_mod", None), nn.Module):
            found = found._orig_mod
        elif hasattr(found, "peft_config") and hasattr(found, "get_base_model"):
            found = found.get_base_model()
        if found is outer:
            return found


@contextmanager
def _asking(model: nn.Module, autocast: torch.dtype | None) -> Iterator[None]:
    """Evaluation mode, no gradients, autocast; every module has its own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device
    try:
        model.eval()
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast) if autocast else nullcontext():
            yield
    finally:
        for module in training:
            module.training = True


def _ask(model: nn.Module, continuations: list[Continuation]) -> list[Answer]:
    """What the model says of each continuation, in one forward."""
    device = next(model.parameters()).device
    read = [continuation.ids[:-1] for continuation in continuations]
    longest = max(len(ids) for ids in read)
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in read], device=device)  # [B, T]
    first = min(continuation.start for continuation in continuations) - 1  # the logits of a token stand one before it
    accepted = inspect.signature(type(_inner(model)).forward).parameters
    given: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    if "logits_to_keep" in accepted:
        given["logits_to_keep"] = longest - first
    else:
        first = 0
    out = model(padded, **given)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits  # [B, T - first, V]
    results = []
    for row, (ids, start) in zip(logits, continuations, strict=True):
        chosen = row[start - 1 - first : len(ids) - 1 - first].float()  # [tokens, V]
        wanted = torch.tensor(ids[start:], device=device)[:, None]  # [tokens, 1]
        log_probability = chosen.log_softmax(-1).gather(1, wanted)
        others = chosen.scatter(1, wanted, -torch.inf).amax(1, keepdim=True)
        margin = (chosen.gather(1, wanted) - others).amin()
        greedy = (chosen.argmax(-1, keepdim=True) == wanted).all() & ~margin.isnan()
        results.append(torch.stack([log_probability.sum(), margin, greedy]))
    return [Answer(value, margin, bool(greedy)) for value, margin, greedy in torch.stack(results).tolist()]
