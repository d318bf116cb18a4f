"""Tokenizers: read without code of the folder, and refused or warned of where they are not the model's."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from llm import common
from llm.folders import edit

from fp8kernels.models.causal_lm import load_causal_lm
from fp8kernels.models.tokenizer import check_tokenizer, load_tokenizer
from fp8kernels.training.tokens import byte_tokenizer


def silent(folder: Path, **named: Any) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_causal_lm(folder, **named)


def test_a_fitting_tokenizer_is_taken_without_a_word(plain: Path) -> None:
    model, tokenizer = silent(plain)
    assert len(tokenizer) == model.config.vocab_size == common.VOCAB


def test_a_model_without_a_tokenizer(folder: Path, plain: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer .*give the folder of another as tokenizer="):
        load_causal_lm(folder)
    text = "Ada sells maps."
    wanted = common.tokenizer().encode(text)
    for other in (plain, str(plain), common.tokenizer()):
        assert silent(folder, tokenizer=other)[1].encode(text) == wanted
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load_causal_lm(folder, tokenizer=folder / "nowhere")


def test_a_config_without_a_vocabulary_is_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert (folder / "tokenizer_config.json").is_file()
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        load_causal_lm(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"{}", b'{"model": 3}', b"\x00\x01"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_files(name: str, text: bytes, folder: Path) -> None:
    (folder / name).write_bytes(text)
    if name == "tokenizer_config.json" and text in (b"{}", b'{"model": 3}'):  # says nothing, and that is enough
        assert len(load_tokenizer(folder)) == common.VOCAB
        return
    with pytest.raises(ValueError, match=rf"{folder}.*copy or download it again"):
        load_causal_lm(folder)


def test_code_of_the_folder_is_not_run(folder: Path) -> None:
    (folder / "mine.py").write_text("raise SystemExit('code of the folder ran')", encoding="utf-8")
    edit(
        folder / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", "mine.Mine"]}
    )
    assert silent(folder)[1].encode("Ada") == common.tokenizer().encode("Ada")  # tokenizer.json is complete by itself
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("Ada\n", encoding="utf-8")
    with pytest.raises(ValueError, match="its class comes as code of the folder, which is not run"):
        load_tokenizer(folder)


def test_ids_beyond_the_embedding(folder: Path) -> None:
    larger = byte_tokenizer(common.texts(), common.VOCAB + 8)
    with pytest.raises(ValueError, match=r"ids up to 307 \(308 tokens\), the model embeds 300: .*resize_token"):
        load_causal_lm(folder, tokenizer=larger)
    added = common.tokenizer()
    added.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"ids up to 300 \(301 tokens\)"):
        load_causal_lm(folder, tokenizer=added)
    model, _ = load_causal_lm(folder)
    model.resize_token_embeddings(len(added))  # the way out that the message names
    check_tokenizer(added, model)


def test_an_id_beyond_the_number_of_tokens(folder: Path) -> None:
    """What counts is the highest id, not how many there are."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    last = max(values["model"]["vocab"], key=values["model"]["vocab"].get)
    values["model"]["vocab"][last] = 1000
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=r"ids up to 1000 \(300 tokens\), the model embeds 300"):
        load_causal_lm(folder)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("name, value", [("eos_token_id", 300), ("bos_token_id", 10**6), ("eos_token_id", [0, 300])])
def test_special_ids_of_the_model_beyond_its_embedding(file: str, name: str, value: Any, folder: Path) -> None:
    edit(folder / file, **{name: value})
    with pytest.raises(ValueError, match=rf"has {name} = (300|1000000), and its embedding the rows 0 to 299"):
        load_causal_lm(folder)


@pytest.mark.parametrize("value", [-1, 300])
def test_padding_beyond_the_embedding(value: int, folder: Path) -> None:
    edit(folder / "generation_config.json", pad_token_id=value)
    with pytest.raises(ValueError, match=rf"has pad_token_id = {value}, .*null where there is no such token"):
        load_causal_lm(folder)
    edit(folder / "generation_config.json", pad_token_id=0)
    edit(folder / "config.json", pad_token_id=value)
    with pytest.raises(ValueError, match="pad"):
        load_causal_lm(folder)


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id"])
def test_special_ids_that_differ_are_warned_of(name: str, folder: Path) -> None:
    for file in ("config.json", "generation_config.json"):
        edit(folder / file, **{name: 7})
    with pytest.warns(UserWarning, match=rf"has {name} 0 \('<\|endoftext\|>'\), the model's config \[7\]"):
        load_causal_lm(folder)
    edit(folder / "generation_config.json", **{name: [7, 0] if name == "eos_token_id" else 0})
    silent(folder)  # a chat model ends in two ways; one of them is the tokenizer's
    for file in ("config.json", "generation_config.json"):
        edit(folder / file, **{name: None})
    if name == "eos_token_id":  # LlamaConfig has ids of its own where config.json has none
        with pytest.warns(UserWarning, match="eos_token_id"):
            load_causal_lm(folder)


def test_a_tokenizer_of_half_the_vocabulary_is_warned_of() -> None:
    model = common.model()
    model.resize_token_embeddings(512)
    with pytest.warns(UserWarning, match="has 300 tokens, the model embeds 512: it may belong to another model"):
        check_tokenizer(common.tokenizer(), model)
