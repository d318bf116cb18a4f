"""Rows of tokens in memory, and what became of the documents that they were made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class DataReport:
    """What became of the documents.

    documents, empty         found; those of them without a character or token
    tokens, longest          of all documents with their end tokens; of the longest one
    too_long                 documents beyond `sequence` tokens: split, truncated or dropped, by `treatment`
    blocks, sequence         rows, and tokens in each
    cut_off                  tokens lost to truncating and dropping
    tail                     tokens after the last whole block, not used
    unlearnable              rows left out, as none of their labels is learnt: one token, or all masked
    padding, masked          of all places in the rows: padded; with a label that is not learnt, padding among them
    digest                   sha256 of tokens and labels, hex
    """

    sequence: int
    treatment: str
    documents: int = 0
    empty: int = 0
    tokens: int = 0
    longest: int = 0
    too_long: int = 0
    blocks: int = 0
    cut_off: int = 0
    tail: int = 0
    unlearnable: int = 0
    padding: int = 0
    masked: int = 0
    digest: str = ""

    def __str__(self) -> str:
        done = {"split": "split", "truncate": "truncated", "drop": "dropped"}.get(self.treatment, self.treatment)
        parts = [
            f"{self.documents:,} documents, {self.tokens:,} tokens, {self.blocks:,} blocks of {self.sequence:,}",
            f"the longest document has {self.longest:,}",
            f"{self.too_long:,} {done} for being longer than a block" if self.too_long else "",
            f"{self.cut_off:,} tokens cut off" if self.cut_off else "",
            f"{self.empty:,} empty documents" if self.empty else "",
            f"{self.tail:,} tokens left over" if self.tail else "",
            f"{self.unlearnable:,} blocks without anything to learn left out" if self.unlearnable else "",
        ]
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class Blocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of tokens in memory, by index: what the Trainer resumes and shuffles without reading anything again.

    ids      [blocks, sequence] int32
    labels   the same shape, or None: the tokens themselves
    lengths  [blocks] int32, tokens before the padding; None: no padding
    """

    ids: Tensor
    labels: Tensor | None
    lengths: Tensor | None
    report: DataReport

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """input_ids and labels, and attention_mask if rows are padded; each [sequence] int64."""
        ids = self.ids[index].long()
        row = {"input_ids": ids, "labels": ids.clone() if self.labels is None else self.labels[index].long()}
        if self.lengths is not None:
            row["attention_mask"] = (torch.arange(len(ids)) < self.lengths[index]).long()
        return row
