"""Text to tokens to batches, all in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

END = "<|endoftext|>"


def byte_tokenizer(texts: list[str], vocab: int) -> Any:
    """A byte-level BPE of `vocab` tokens learnt from the texts, as transformers loads and saves it.

    Every text can be written with it: the 256 bytes are among the tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)


def token_stream(tokenizer: Any, texts: list[str]) -> Tensor:
    """All texts after one another, each closed by the end token: int64 [tokens]."""
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for encoding in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids.extend(encoding)
        ids.append(end)
    return torch.tensor(ids)


def random_batches(stream: Tensor, batch: int, sequence: int, *, seed: int) -> Iterator[Tensor]:
    """Windows at random places, for ever; the same seed gives the same batches. Each is int64 [batch, sequence].

    raises   ValueError if the stream is shorter than one window
    """
    places = len(stream) - sequence + 1
    if places < 1:
        raise ValueError(f"the text has {len(stream)} tokens, a window needs {sequence}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(places, (batch,), generator=generator)
        yield stream[starts[:, None] + torch.arange(sequence)]  # [batch, sequence]


def consecutive_batches(stream: Tensor, batch: int, sequence: int, *, most: int) -> list[Tensor]:
    """At most `most` batches of neighbouring windows from the start of the stream, each int64 [batch, sequence].

    raises   ValueError if the stream does not fill one batch
    """
    count = min(most, len(stream) // (batch * sequence))
    if count == 0:
        raise ValueError(f"the text has {len(stream)} tokens, a batch needs {batch * sequence}")
    return list(stream[: count * batch * sequence].view(count, batch, sequence))
