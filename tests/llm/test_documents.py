"""Local files of every kind give their documents in a fixed order, and bad ones are told by file and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fp8kernels.training.llm.documents import Document, files_of, read_documents


def lines(path: Path, *records: object) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def parquet_file(path: Path, columns: dict[str, list[object]]) -> Path:
    pyarrow = pytest.importorskip("datasets") and __import__("pyarrow.parquet").parquet
    table = __import__("pyarrow").table(columns)
    pyarrow.write_table(table, path, row_group_size=2)
    return path


def found(source: object, **options: str) -> list[str | None]:
    return [document.text for document in read_documents(source, **options)]  # type: ignore[arg-type]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_bytes("\ufeffzwölf\r\nlines\n".encode())
    assert found(path) == ["zwölf\r\nlines\n"]
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(b"inside"))
    assert found(packed) == ["inside"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "A.NDJSON", "a.json", "a.json.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    path = lines(tmp_path / name, {"text": "one"}, {"text": "zwei\n\u2028", "other": 3}, {"text": ""})
    assert found(path) == ["one", "zwei\n\u2028", ""]
    assert [document.where for document in read_documents(path)] == [f"{path}, line {n}" for n in (1, 2, 3)]


def test_a_json_list_and_another_field(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"content": "one"}, {"content": "two"}], indent=1))
    assert found(path, text_field="content") == ["one", "two"]


def test_blank_lines_are_no_records_but_count(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "a"}\n  \n{"text": 3}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4.*'text' holds a number"):
        list(read_documents(path))


def test_parquet_in_row_groups(tmp_path: Path) -> None:
    path = parquet_file(tmp_path / "a.parquet", {"text": list("abcde"), "id": [1, 2, 3, 4, 5]})
    documents = list(read_documents(path))
    assert [document.text for document in documents] == list("abcde")
    assert documents[4].where == f"{path}, row 5"


def test_a_folder_of_datasets_is_read_in_place_and_inside_another_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["x", "y"], "id": [1, 2]}).save_to_disk(str(tmp_path / "all" / "saved"))
    (tmp_path / "all" / "z.txt").write_text("z")
    assert found(tmp_path / "all" / "saved") == ["x", "y"]
    assert found(tmp_path / "all") == ["x", "y", "z"]
    assert found(str(tmp_path / "all" / "*")) == ["x", "y", "z"]


def test_a_folder_of_several_datasets_names_them(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    both = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": ["x"]}) for name in ("train", "test")})
    both.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="several datasets: test, train; give one of them"):
        list(read_documents(tmp_path / "saved"))


def test_a_folder_is_read_recursively_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "c/d.txt", ".git/config", "a/__pycache__/x.pyc", "a/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty").mkdir()
    assert found(tmp_path) == ["a/b/c.txt", "a/z.txt", "b.txt", "c/d.txt"]
    assert found([tmp_path / "c", tmp_path / "b.txt"]) == ["c/d.txt", "b.txt"]  # sources stay in the order given
    assert found(str(tmp_path / "**" / "*.txt")) == sorted(found(tmp_path), key=lambda name: tmp_path / str(name))
    assert found(str(tmp_path / "**")) == found(str(tmp_path / "**"))
    assert len(files_of(str(tmp_path / "**"))) == len(set(files_of(str(tmp_path / "**"))))


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\nbroken\n')
    documents = read_documents(path)
    assert next(documents).text == "good"
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        next(documents)


def test_tokens_come_before_text_and_text_before_chats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hello"}]
    path = lines(
        tmp_path / "a.jsonl",
        {"input_ids": [1, 2], "labels": [-100, 2], "text": "no"},
        {"input_ids": None, "text": "yes", "labels": 1},  # a label of a whole text, as classifiers have
        {"text": "yes", "messages": chat},
        {"messages": chat},
    )
    first, second, third, fourth = read_documents(path)
    assert (first.ids, first.labels, first.text) == ([1, 2], [-100, 2], None)
    assert second == Document(f"{path}, line 2", "yes") and third == Document(f"{path}, line 3", "yes")
    assert fourth.messages == chat and fourth.text is None


def test_empty_files_in_a_folder_are_empty_documents(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "b.py").write_text("b = 1")
    assert found(tmp_path) == ["", "b = 1"]


BAD: dict[str, tuple[str, bytes, str]] = {
    "empty text": ("a.txt", b"", r"a\.txt holds no document: it is empty"),
    "empty lines": ("a.jsonl", b"", "a.jsonl holds no document: there are no records"),
    "only blank lines": ("a.jsonl", b"\n \n", "holds no document"),
    "empty list": ("a.json", b"[]", "holds no document"),
    "only empty texts": ("a.jsonl", b'{"text": ""}\n', "holds no document: it is empty"),
    "NUL": ("a.txt", b"abc\0def", r"a\.txt is not text: there is a NUL byte at byte 3"),
    "UTF-16": ("a.txt", "hello".encode("utf-16"), "is not text"),
    "latin-1": ("a.txt", "über".encode("latin-1"), r"a\.txt is not UTF-8 text: .* at byte 0"),
    "NUL in a line": ("a.jsonl", b'{"text": "a"}\n{"text": "\0"}\n', "line 2 is not text"),
    "cut short": ("a.jsonl", b'{"text": "a"}\n{"text": "b', "line 2 is not JSON"),
    "a number": ("a.jsonl", b"3\n", "line 1 holds a number; a record is an object"),
    "a string": ("a.jsonl", b'"text"\n', "line 1 holds str; a record is an object"),
    "other fields": (
        "a.jsonl",
        b'{"Text": "a", "id": 1}\n',
        r"no field 'text'. It has 'Text', 'id'; set",
    ),
    "usual name": ("a.jsonl", b'{"id": 1, "content": "a"}\n', "set text_field to 'content'"),
    "no fields": ("a.jsonl", b"{}\n", "It has none"),
    "null": ("a.jsonl", b'{"text": null}\n', "line 1: the field 'text' holds null, not text"),
    "list for text": ("a.jsonl", b'{"text": ["a"]}\n', "'text' holds a list, not text"),
    "half a surrogate": ("a.jsonl", rb'{"text": "a\ud800b"}', "line 1: the text has no UTF-8 form"),
    "nested ids": ("a.jsonl", b'{"input_ids": [[1]]}', "'input_ids' is not a flat list of whole numbers"),
    "ids of fractions": ("a.jsonl", b'{"input_ids": [1.5]}', "'input_ids' is not a flat list of whole numbers"),
    "labels missing": ("a.jsonl", b'{"input_ids": [1, 2], "labels": [1]}', "has 2 input_ids and 1 labels"),
    "no chat": ("a.jsonl", b'{"messages": "hi"}', "'messages' is not a list of objects"),
    "deep": ("a.jsonl", b"[" * 100_000, "line 1 is not JSON|a.jsonl is not JSON"),
    "no parquet": ("a.parquet", b"PAR1 nonsense PAR1", r"a\.parquet cannot be read as parquet after 0 rows"),
    "empty parquet": ("a.parquet", b"", "cannot be read as parquet"),
    "no gzip": ("a.jsonl.gz", b'{"text": "a"}', "cannot be unpacked"),
    "half a gzip": ("a.txt.gz", gzip.compress(b"text" * 999)[:20], "cannot be unpacked"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_told_by_name_and_place(tmp_path: Path, name: str) -> None:
    file, content, message = BAD[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_documents(tmp_path / file))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda folder: folder / "none.txt", FileNotFoundError, r"nothing matches '.*none\.txt'"),
        (lambda folder: folder / "*.parquet", FileNotFoundError, "nothing matches"),
        (lambda folder: "someone/some-data", FileNotFoundError, "save_to_disk"),
        (lambda folder: folder, ValueError, "a folder without files"),
        (lambda folder: [], FileNotFoundError, "no data were given"),
    ],
)
def test_nothing_there(
    tmp_path: Path, make: Callable[[Path], Path | str | list[Path]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        list(read_documents(make(tmp_path)))


def test_a_parquet_file_without_the_field_and_with_a_null(tmp_path: Path) -> None:
    path = parquet_file(tmp_path / "a.parquet", {"txet": ["a"], "id": [1]})
    with pytest.raises(ValueError, match=r"a\.parquet has no field 'text'. .*; set text_field to 'txet'"):
        list(read_documents(path))
    path = parquet_file(tmp_path / "b.parquet", {"text": ["a", None, "b"]})
    with pytest.raises(ValueError, match=r"b\.parquet, row 2: the field 'text' holds null"):
        list(read_documents(path))


def test_a_parquet_file_that_was_cut_in_the_middle(tmp_path: Path) -> None:
    path = parquet_file(tmp_path / "a.parquet", {"text": [f"{n}" * 50 for n in range(200)]})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as parquet"):
        list(read_documents(path))


def test_a_saved_dataset_that_lost_its_table(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["x", "y"]}).save_to_disk(str(tmp_path / "saved"))
    (table,) = (tmp_path / "saved").glob("*.arrow")
    table.write_bytes(table.read_bytes()[:30])
    with pytest.raises(ValueError, match="cannot be read as a saved dataset"):
        list(read_documents(tmp_path / "saved"))
