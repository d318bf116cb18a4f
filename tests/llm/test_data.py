"""Blocks of tokens: every token once and in order, the same for the same files, and nothing lost without being told."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm import common

from fp8kernels.training.llm.data import is_held_out, load_data
from fp8kernels.training.llm.documents import Document, read_documents
from fp8kernels.training.llm.labels import IGNORED
from fp8kernels.training.llm.packing import TOO_LONG, pack

pytest.importorskip("transformers")

SEQUENCE = 8
END, PAD = 0, 99


class Spelling:
    """A tokenizer of one token a character: its code, from 1."""

    eos_token_id, pad_token_id, chat_template = END, PAD, None

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def ids_documents(*documents: Sequence[int]) -> list[Document]:
    return [Document(f"number {n}", ids=list(ids)) for n, ids in enumerate(documents, 1)]


def closed(documents: list[list[int]]) -> list[list[int]]:
    """The documents as they should be in the stream: with their end token, empty ones left out."""
    return [ids if ids[-1] == END else [*ids, END] for ids in documents if ids]


documents_of_ids = st.lists(
    st.one_of(
        st.lists(st.integers(0, 50), max_size=3 * SEQUENCE),
        st.sampled_from([0, 1, SEQUENCE - 2, SEQUENCE - 1, SEQUENCE, SEQUENCE + 1, 2 * SEQUENCE]).map(
            lambda n: [7] * n
        ),
    ),
    max_size=20,
)


@settings(deadline=None, max_examples=200)
@given(documents_of_ids)
def test_every_token_of_every_document_stands_once_and_in_order(documents: list[list[int]]) -> None:
    stream = [token for ids in closed(documents) for token in ids]
    whole = len(stream) // SEQUENCE * SEQUENCE
    if not whole:
        with pytest.raises(ValueError, match=f"hold {len(stream)} tokens in {len(documents)} documents"):
            pack(ids_documents(*documents), Spelling(), SEQUENCE)
        return
    blocks = pack(ids_documents(*documents), Spelling(), SEQUENCE)
    assert blocks.ids.flatten().tolist() == stream[:whole]
    report = blocks.report
    assert (report.blocks, report.tail, report.tokens) == (whole // SEQUENCE, len(stream) - whole, len(stream))
    assert (report.documents, report.empty) == (len(documents), documents.count([]))
    assert report.longest == max(map(len, closed(documents)))
    assert report.too_long == sum(len(ids) > SEQUENCE for ids in closed(documents))
    assert report.cut_off == report.padding == report.masked == 0


@settings(deadline=None, max_examples=200)
@given(documents_of_ids, st.sampled_from(TOO_LONG))
def test_rows_of_their_own_lose_what_is_reported_and_nothing_else(documents: list[list[int]], too_long: Any) -> None:
    long = [ids for ids in closed(documents) if len(ids) > SEQUENCE]
    short = [ids for ids in closed(documents) if len(ids) <= SEQUENCE]
    kept = {
        "split": closed(documents),
        "drop": short,
        "truncate": [ids[:SEQUENCE] for ids in closed(documents)],
        "error": short,
    }[too_long]
    pieces = [ids[n : n + SEQUENCE] for ids in kept for n in range(0, len(ids), SEQUENCE)]
    rows = [piece for piece in pieces if len(piece) > 1]

    def packed() -> Any:
        return pack(ids_documents(*documents), Spelling(), SEQUENCE, packing=False, too_long=too_long)

    if too_long == "error" and long:
        with pytest.raises(ValueError, match=r"number \d+ has \d+ tokens with its end, a block has 8"):
            packed()
    elif not rows:
        with pytest.raises(ValueError, match="do not fill one block"):
            packed()
    else:
        blocks = packed()
        seen = [block["input_ids"][block["attention_mask"].bool()].tolist() for block in blocks]
        assert seen == rows
        for block, row in zip(blocks, rows, strict=True):
            assert block["labels"].tolist() == row + [IGNORED] * (SEQUENCE - len(row))
            assert block["input_ids"].tolist() == row + [PAD] * (SEQUENCE - len(row))
        report = blocks.report
        assert report.padding == report.masked == SEQUENCE * len(rows) - sum(map(len, rows))
        assert report.unlearnable == len(pieces) - len(rows)
        assert report.cut_off == sum(map(len, closed(documents))) - sum(map(len, pieces))
        assert report.too_long == len(long)


@settings(deadline=None, max_examples=100)
@given(documents_of_ids, st.data())
def test_masks_travel_with_their_tokens(documents: list[list[int]], data: st.DataObject) -> None:
    masks = [data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))) for ids in documents]
    given_labels = [
        [IGNORED if hidden else token for token, hidden in zip(ids, mask, strict=True)]
        for ids, mask in zip(documents, masks, strict=True)
    ]
    stream: list[int] = []
    for ids, labels in zip(documents, given_labels, strict=True):
        stream += labels
        if ids and ids[-1] != END:
            stream.append(IGNORED if labels[-1] == IGNORED else END)
    rows = [stream[n : n + SEQUENCE] for n in range(0, len(stream) // SEQUENCE * SEQUENCE, SEQUENCE)]
    learnable = [row for row in rows if any(label != IGNORED for label in row[1:])]
    with_labels = [
        Document("here", ids=ids, labels=labels) for ids, labels in zip(documents, given_labels, strict=True)
    ]
    if not learnable:
        with pytest.raises(ValueError, match="do not fill one block"):
            pack(with_labels, Spelling(), SEQUENCE)
        return
    blocks = pack(with_labels, Spelling(), SEQUENCE)
    assert [block["labels"].tolist() for block in blocks] == learnable
    assert blocks.report.unlearnable == len(rows) - len(learnable)
    assert blocks.report.masked == sum(row.count(IGNORED) for row in learnable)


def test_a_row_has_the_types_that_models_take_and_its_labels_are_its_own() -> None:
    blocks = pack(["abcdefgh" * 3], Spelling(), SEQUENCE)
    row = blocks[1]
    assert set(row) == {"input_ids", "labels"}
    assert row["input_ids"].dtype == row["labels"].dtype == torch.int64
    row["labels"][0] = IGNORED  # as a collator of someone else's may
    assert blocks[1]["labels"].equal(blocks[1]["input_ids"]) and row["input_ids"][0] != IGNORED
    assert blocks[-1]["input_ids"].equal(blocks[len(blocks) - 1]["input_ids"])
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_a_tokenizer_is_asked_in_pieces_and_the_pieces_fit_together() -> None:
    texts = [f"text {n}" for n in range(600)]  # more than it is given at once
    blocks = pack(texts, Spelling(), SEQUENCE)
    stream = "".join(chr(token) for token in blocks.ids.flatten().tolist())
    whole = "".join(text + chr(END) for text in texts)
    assert stream == whole[: len(whole) // SEQUENCE * SEQUENCE]


def test_what_the_tokenizer_puts_around_a_text_stays(tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = common.tokenizer()
    plain = pack(common.texts(3), tokenizer, 16)
    assert plain.ids.flatten().tolist() == common_stream(tokenizer, 3)[: plain.ids.numel()]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    blocks = pack(["a b", "", "c d"], tokenizer, 2, packing=True)
    assert blocks.report.tokens == sum(len(tokenizer(text)["input_ids"]) for text in ("a b", "c d"))  # no second end
    assert blocks.report.empty == 1


def common_stream(tokenizer: Any, count: int) -> list[int]:
    from fp8kernels.training.tokens import token_stream

    return token_stream(tokenizer, common.texts(count)).tolist()


def test_chats_are_written_by_the_template() -> None:
    tokenizer = common.tokenizer()
    chat = [{"role": "user", "content": "who sells maps"}, {"role": "assistant", "content": "Ada"}]
    with pytest.raises(ValueError, match=r"here is a chat .* no chat template"):
        pack([Document("here", messages=chat)], tokenizer, 4)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    blocks = pack([Document("here", messages=chat)], tokenizer, 4)
    written = tokenizer.decode(blocks.ids.flatten())
    assert "<user>who sells maps\n<assistant>Ada\n<|endoftext|>".startswith(written)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="here: the tokenizer's chat template cannot write this chat: roles must"):
        pack([Document("here", messages=chat)], tokenizer, 4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sequence": 1}, "sequence=1 has no next token"),
        ({"sequence": 65, "context": 64}, "sequence=65 is beyond the model's context of 64"),
        ({"too_long": "cut"}, "too_long='cut' is none of split, truncate, drop, error"),
        ({"vocab": 100}, r"document 2 has the token 120, the model knows 0 to 99; the data or the tokenizer"),
        ({"too_long": "drop"}, "tokens were cut off, as too_long is 'drop'"),
        ({"sequence": 50}, "hold 36 tokens in 2 documents, which do not fill one block of 50"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(["_" * 16, "x" * 18], Spelling(), **({"sequence": SEQUENCE} | options))


def test_a_tokenizer_without_an_end_token_and_tokens_beyond_all_bounds() -> None:
    endless = Spelling()
    endless.eos_token_id = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="no end token"):
        pack(["abc"], endless, SEQUENCE)
    for ids in ([1, -1], [1, 2**31 - 1], [2**40, 1]):
        with pytest.raises(ValueError, match=r"number 1 has (the token|tokens)"):
            pack(ids_documents(ids * 8), Spelling(), SEQUENCE)


def test_the_report_says_what_became_of_the_documents() -> None:
    blocks = pack(["a" * 20, "b", ""], Spelling(), SEQUENCE)
    assert str(blocks.report) == (
        "3 documents, 23 tokens, 2 blocks of 8; the longest document has 21; 1 split for being longer than a block; "
        "1 empty documents; 7 tokens left over"
    )


def files(folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for n in range(4):
        rows = common.texts(40)[n * 10 : n * 10 + 10]
        (folder / f"{n}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return sorted(folder.iterdir())


def test_the_same_files_give_the_same_blocks_and_the_digest_tells_others_apart(tmp_path: Path) -> None:
    tokenizer, paths = common.tokenizer(), files(tmp_path / "a")
    one = load_data(tmp_path / "a", tokenizer, sequence=16).train
    two = load_data([str(path) for path in paths], tokenizer, sequence=16).train
    assert one.ids.equal(two.ids) and one.report == two.report
    other = load_data(paths[::-1], tokenizer, sequence=16).train
    assert other.report.digest != one.report.digest
    again = pickle.loads(pickle.dumps(one))  # as workers of a DataLoader get it
    assert again[3]["input_ids"].equal(one[3]["input_ids"]) and again.report == one.report


def test_what_is_held_out_is_a_share_fixed_for_each_document(tmp_path: Path) -> None:
    tokenizer = common.tokenizer()
    files(tmp_path / "a")
    texts = {document.text for document in read_documents(tmp_path / "a")}
    data = load_data(tmp_path / "a", tokenizer, sequence=16, hold_out=0.25)
    assert data.validation is not None
    held = {text for text in texts if is_held_out(Document("", text), 0.25)}
    assert data.validation.report.documents == sum(document.text in held for document in read_documents(tmp_path / "a"))
    assert data.train.report.documents + data.validation.report.documents == 40
    more = [Document("", f"{n}") for n in range(4000)]
    share = sum(is_held_out(document, 0.25) for document in more) / 4000
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5  # four standard errors
    for document in more:  # a larger share holds the smaller one
        assert not is_held_out(document, 0.1) or is_held_out(document, 0.25)


def test_what_is_validated_on_is_not_trained_on(tmp_path: Path) -> None:
    tokenizer, paths = common.tokenizer(), files(tmp_path / "a")
    data = load_data(paths[:3], tokenizer, sequence=16, validation=paths[3])
    assert data.validation is not None and data.validation.report.documents == 10
    with pytest.raises(ValueError, match=r"3\.jsonl is in the training data and in the validation data"):
        load_data(tmp_path / "a", tokenizer, sequence=16, validation=[tmp_path / "a" / ".." / "a" / "3.jsonl"])
    with pytest.raises(ValueError, match="one or the other"):
        load_data(paths[:3], tokenizer, sequence=16, validation=paths[3:], hold_out=0.1)
    with pytest.raises(ValueError, match=r"hold_out=1\.0 is no share"):
        load_data(paths, tokenizer, sequence=16, hold_out=1.0)
    (tmp_path / "one.txt").write_text("only one document " * 20)
    for share, side in ((1e-9, "validation"), (1 - 1e-9, "training")):
        with pytest.raises(ValueError, match=f"leaves no document for {side}"):
            load_data(tmp_path / "one.txt", tokenizer, sequence=16, hold_out=share)
    assert load_data(tmp_path / "one.txt", tokenizer, sequence=16).validation is None
