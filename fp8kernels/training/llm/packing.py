"""Documents to rows of tokens, in the order of the documents.

Packing: every document is closed by the end token, all are put after one another and cut into blocks of one length, as
is usual in pre-training. A block may hold the end of one document and the beginning of the next, and attention sees
both: there are no document masks (resetting positions isolates documents in some attention kernels and not in others,
so it is not offered). Without packing each document has rows of its own, padded on the right.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from .blocks import Blocks, DataReport
from .documents import Document
from .labels import IGNORED, check_labels

TooLong = Literal["split", "truncate", "drop", "error"]
TOO_LONG: tuple[TooLong, ...] = ("split", "truncate", "drop", "error")
AT_ONCE = 256  # documents handed to the tokenizer together; it works on them in parallel
SHORTEST = 2  # tokens; one token has no next one to be learnt


def pack(
    documents: Iterable[Document | str],
    tokenizer: Any,
    sequence: int,
    *,
    packing: bool = True,
    too_long: TooLong = "split",
    context: int | None = None,
    vocab: int | None = None,
    what: str = "the",
) -> Blocks:
    """Tokenize documents and lay them out in rows of `sequence` tokens.

    A text is tokenized with what the tokenizer puts around it by itself (a beginning token, for some), a chat by the
    tokenizer's chat template, all its turns learnt; ids are taken as they are. Then comes the end token, unless it
    is there.

    too_long   what becomes of a document of more than `sequence` tokens with its end token: "split" (goes on in the
               next block or row; nothing is lost), "truncate" (its first tokens stay), "drop", "error"
    context    positions that the model has; vocab: rows of its embedding. Checked if given
    what       which data these are, for messages
    raises     ValueError naming the document or the numbers: sequence of less than 2 or beyond the context, no end
               token, a chat without a template, tokens beyond the vocabulary, labels that are shifted already, not
               one whole block
    """
    if sequence < SHORTEST:
        raise ValueError(f"sequence={sequence} has no next token to learn; it is at least {SHORTEST}")
    if context is not None and sequence > context:
        raise ValueError(f"sequence={sequence} is beyond the model's context of {context} positions; give at most that")
    if too_long not in TOO_LONG:
        raise ValueError(f"too_long={too_long!r} is none of {', '.join(TOO_LONG)}")
    report = DataReport(sequence, too_long)
    tokenized = _tokenized(documents, tokenizer, report, vocab)
    fitting = (piece for document in tokenized if (piece := _fitting(document, report)) is not None)
    ids, labels, lengths = _packed(fitting, report) if packing else _padded(fitting, report, _padding(tokenizer))
    return _blocks(ids, labels, lengths, report, what)


@dataclass
class _Tokens:
    where: str
    ids: np.ndarray  # [tokens] int32
    labels: np.ndarray | None = None  # [tokens] int32


def _tokenized(
    documents: Iterable[Document | str], tokenizer: Any, report: DataReport, vocab: int | None
) -> Iterator[_Tokens]:
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end token to close documents with; set its eos_token and save it again")
    waiting: Iterator[Document | str] = iter(documents)
    known = np.iinfo(np.int32).max if vocab is None else vocab
    number = 0
    while some := list(itertools.islice(waiting, AT_ONCE)):
        named = [
            Document(f"document {n}", one) if isinstance(one, str) else one for n, one in enumerate(some, number + 1)
        ]
        number += len(named)
        for document, ids in zip(named, _ids(named, tokenizer), strict=True):
            report.documents += 1
            if not ids:
                report.empty += 1
                continue
            tokens = _closed(document, ids, end)
            beyond = (tokens.ids < 0) | (tokens.ids >= known)
            if beyond.any():
                raise ValueError(
                    f"{document.where} has the token {tokens.ids[beyond][0]}, the model knows 0 to {known - 1}; "
                    "the data or the tokenizer were made for another model"
                )
            report.tokens += len(tokens.ids)
            report.longest = max(report.longest, len(tokens.ids))
            yield tokens


def _ids(documents: list[Document], tokenizer: Any) -> list[list[int]]:
    """The tokens of each document, without the end token; none for an empty one."""
    texts = {n: document.text for n, document in enumerate(documents) if document.text and document.ids is None}
    chats = {n: _chat(document, tokenizer) for n, document in enumerate(documents) if document.messages is not None}
    found = [document.ids or [] for document in documents]
    for some, special in ((texts, True), (chats, False)):  # a template writes the special tokens itself
        if some:
            ids = tokenizer(list(some.values()), add_special_tokens=special, verbose=False)["input_ids"]
            for n, one in zip(some, ids, strict=True):
                found[n] = one
    return found


def _chat(document: Document, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{document.where} is a chat (a field 'messages'), and the tokenizer has no chat template. Set "
            "tokenizer.chat_template and save it, or write the chats out as text in a field of their own"
        )
    try:
        return tokenizer.apply_chat_template(document.messages, tokenize=False)
    except Exception as error:  # whatever a template written in Jinja runs into or raises itself
        raise ValueError(f"{document.where}: the tokenizer's chat template cannot write this chat: {error}") from error


def _closed(document: Document, ids: list[int], end: int) -> _Tokens:
    labels = document.labels
    if labels is not None:
        check_labels(ids, labels, document.where)
    if ids[-1] != end:
        ids = [*ids, end]
        labels = None if labels is None else [*labels, end if labels[-1] != IGNORED else IGNORED]
    try:
        return _Tokens(
            document.where, np.array(ids, np.int32), None if labels is None else np.array(labels, dtype=np.int32)
        )
    except OverflowError:
        raise ValueError(f"{document.where} has tokens beyond 32 bits: {max(ids, key=abs)}") from None


def _fitting(tokens: _Tokens, report: DataReport) -> _Tokens | None:
    size, sequence = len(tokens.ids), report.sequence
    if size <= sequence:
        return tokens
    report.too_long += 1
    if report.treatment == "split":
        return tokens
    if report.treatment == "error":
        raise ValueError(
            f"{tokens.where} has {size:,} tokens with its end, a block has {sequence:,}; choose too_long: split, "
            "truncate or drop, or a longer sequence"
        )
    keep = sequence if report.treatment == "truncate" else 0
    report.cut_off += size - keep
    if not keep:
        return None
    return _Tokens(tokens.where, tokens.ids[:keep], None if tokens.labels is None else tokens.labels[:keep])


def _stream(documents: Iterable[_Tokens]) -> tuple[np.ndarray, np.ndarray | None]:
    """All tokens after one another and their labels, which are None if every document has its tokens for labels."""
    pieces: list[_Tokens] = list(documents)
    if not pieces:
        return np.empty(0, np.int32), None
    ids = np.concatenate([piece.ids for piece in pieces])
    if all(piece.labels is None for piece in pieces):
        return ids, None
    return ids, np.concatenate([_labels(piece) for piece in pieces])


def _labels(tokens: _Tokens) -> np.ndarray:
    return tokens.ids if tokens.labels is None else tokens.labels


Rows = tuple[np.ndarray, "np.ndarray | None", "np.ndarray | None"]


def _packed(documents: Iterable[_Tokens], report: DataReport) -> Rows:
    ids, labels = _stream(documents)
    whole = len(ids) // report.sequence * report.sequence
    report.tail = len(ids) - whole
    rows = (-1, report.sequence)
    return ids[:whole].reshape(rows), None if labels is None else labels[:whole].reshape(rows), None


def _padded(documents: Iterable[_Tokens], report: DataReport, padding: int) -> Rows:
    sequence = report.sequence
    rows = [
        (tokens.ids[start:][:sequence], _labels(tokens)[start:][:sequence])
        for tokens in documents
        for start in range(0, len(tokens.ids), sequence)
    ]
    ids = np.full((len(rows), sequence), padding, np.int32)
    labels = np.full((len(rows), sequence), IGNORED, np.int32)
    for n, (row, its_labels) in enumerate(rows):
        ids[n, : len(row)], labels[n, : len(row)] = row, its_labels
    return ids, labels, np.array([len(row) for row, _ in rows], np.int32)


def _padding(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _blocks(
    ids: np.ndarray, labels: np.ndarray | None, lengths: np.ndarray | None, report: DataReport, what: str
) -> Blocks:
    if labels is not None:
        learnable = (labels[:, 1:] != IGNORED).any(axis=1)
        report.unlearnable = int((~learnable).sum())
        ids, labels = ids[learnable], labels[learnable]
        lengths = None if lengths is None else lengths[learnable]
        report.masked = int((labels == IGNORED).sum())
    if not len(ids):
        left = f"; {report.unlearnable:,} blocks without anything to learn were left out" if report.unlearnable else ""
        cut = f"; {report.cut_off:,} tokens were cut off, as too_long is {report.treatment!r}" if report.cut_off else ""
        raise ValueError(
            f"{what} data hold {report.tokens:,} tokens in {report.documents:,} documents, which do not fill one block "
            f"of {report.sequence:,}{left}{cut}. More data, a shorter sequence, or packing: false"
        )
    report.blocks = len(ids)
    report.padding = 0 if lengths is None else int(ids.size - lengths.sum())
    digest = hashlib.sha256(np.ascontiguousarray(ids).tobytes())
    digest.update(b"" if labels is None else np.ascontiguousarray(labels).tobytes())
    report.digest = digest.hexdigest()
    return Blocks(
        torch.from_numpy(np.ascontiguousarray(ids)),
        None if labels is None else torch.from_numpy(labels),
        None if lengths is None else torch.from_numpy(lengths),
        report,
    )
