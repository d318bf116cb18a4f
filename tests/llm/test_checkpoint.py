"""Folders that are broken or meant to harm: files cut short, headers that lie, names and links that lead elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fp8kernels.headers import LONGEST_HEADER, read_header, read_headers
from fp8kernels.models.causal_lm import load_causal_lm


def safetensors(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with this header (JSON or bytes) and these bytes after it; `length` where the first 8 bytes lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_headers_are_what_the_library_reads(path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, 4),
        "b.c": torch.ones(5, dtype=torch.bfloat16),
        "scalar": torch.tensor(1, dtype=torch.int64),
        "none": torch.zeros(0, 7),
        "flags": torch.zeros(3, dtype=torch.bool),
        "codes": torch.zeros(2, 2, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_header(path)
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, this is no dict
        assert {name: header.shape for name, header in found.items()} == {
            name: tuple(part.get_shape()) for name, part in slices.items()
        }
        assert {name: header.dtype for name, header in found.items()} == {
            name: part.get_dtype() for name, part in slices.items()
        }


GOOD = {"w": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [4], 24, 32)}


@pytest.mark.parametrize(
    "header, size, text",
    [
        (GOOD, 31, "cut short: its tensors need 32 bytes, 31 are there; 1 of 2 tensors are lost, such as 'b'"),
        (GOOD, 0, "2 of 2 tensors are lost"),
        (GOOD, 33, "1 bytes that belong to no tensor"),
        ({"w": entry("F32", [2, 3], 0, 23)}, 23, r"is \[2, 3\] in F32, 24 bytes, and has 23"),
        ({"w": entry("F32", [2**40, 2**40], 0, 24)}, 24, "and has 24"),
        ({"w": entry("F32", [2, 3], 8, 32)}, 32, "start at 8, those before it end at 0"),
        (
            {"w": entry("F32", [2, 3], 0, 24), "v": entry("F32", [2, 3], 0, 24)},
            24,
            "start at 0, those before it end at 24",
        ),
        ({"w": entry("F32", [2, 3], 24, 0)}, 24, "and has -24"),
        ({"w": entry("F32", [2, -3], 0, 24)}, 24, "says nothing sensible of 'w'"),
        ({"w": entry("F32", [2.0, 3], 0, 24)}, 24, "says nothing sensible"),
        ({"w": entry("F32", [True], 0, 4)}, 4, "says nothing sensible"),
        ({"w": entry("F32", "23", 0, 24)}, 24, "says nothing sensible"),
        ({"w": entry("F32", [2, 3], 0, "24")}, 24, "says nothing sensible"),
        ({"w": entry("F99", [2, 3], 0, 24)}, 24, "says nothing sensible"),
        ({"w": entry(["F32"], [2, 3], 0, 24)}, 24, "says nothing sensible"),  # type: ignore[arg-type]
        ({"w": None}, 0, "says nothing sensible"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 4, "says nothing sensible"),
        ([1, 2], 0, "is not a safetensors file"),
        (b'{"w": 1', 0, "is not readable JSON"),
        (b"\xff\xff\xff", 0, "is not a safetensors file"),
        (b'{"\xff": 1}', 0, "is not readable JSON"),
        (b'{"w":' + b"[" * 100_000, 0, "is not readable JSON"),
        (b'{"w": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}, "w": 1}', 0, "'w' stands in it twice"),
    ],
    ids=range(23),
)
def test_a_header_that_lies(header: Any, size: int, text: str, path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        read_header(safetensors(path, header, bytes(size)))


@pytest.mark.parametrize("length", [0, 1, LONGEST_HEADER + 1, 2**63, 2**64 - 1])
def test_a_length_that_is_none(length: int, path: Path) -> None:
    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_header(safetensors(path, GOOD, bytes(32), length=length))


def test_a_length_beyond_the_file(path: Path) -> None:
    with pytest.raises(ValueError, match="cut short: its header alone has 90,000,000 bytes"):
        read_header(safetensors(path, GOOD, bytes(32), length=90_000_000))


@pytest.mark.parametrize("data", [b"", b"\x00", bytes(7), bytes(8), b"\x10" + bytes(100), bytes(1000)])
def test_a_file_that_is_none(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_header(path)


@pytest.mark.parametrize("save", [dict, list])
def test_a_pickle_under_another_name(save: type, path: Path) -> None:
    torch.save(save(), path)
    with pytest.raises(ValueError, match="is a pickle, zip or GGUF file under another name; write them anew"):
        read_header(path)
    torch.save(save(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="is a pickle, zip"):
        read_header(path)


def test_a_pointer_of_git_lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"pointer of Git LFS.*git lfs pull"):
        read_header(path)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_is_read_as_something_else(tmp_path: Path, data: st.DataObject) -> None:
    """A byte of the length or the header changed, or the file cut: a clear error, or a header as long as its file."""
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(2, 3), "b": torch.ones(4)}, path)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = read_header(path)
    except ValueError:
        return
    with safe_open(path, "pt") as file:  # what passes here, the library takes too
        assert set(file.keys()) == set(found)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_folder_where_a_file_belongs(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_causal_lm(folder)
    assert str(folder) in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_in_a_circle_and_links_to_nothing(name: str, folder: Path) -> None:
    (folder / name).unlink()
    for target in (name, "nowhere"):
        (folder / name).symlink_to(target)
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load_causal_lm(folder)
        assert str(folder) in str(caught.value)
        (folder / name).unlink()


def test_a_folder_that_is_a_circle(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_causal_lm(tmp_path / "loop")


def test_links_as_a_hub_cache_has_them(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    load_causal_lm(snapshot)


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(ValueError, match="is not a file"):
        load_causal_lm(folder)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "model..weight", "", "a\x1b[31mb", "x" * 10_000, "__class__", "model.layers.0.forward"]
)
def test_names_of_tensors_do_no_harm(name: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"hold 1 tensors that .* does not have") as caught:
        load_causal_lm(folder)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_weight_cut_short_after_the_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"cut short.*1 of 21 tensors are lost.*copy or download it again"):
        load_causal_lm(folder)


def test_a_config_that_is_too_long_for_one(folder: Path) -> None:
    with (folder / "config.json").open("rb+") as file:
        file.truncate(2**30)  # a hole: the disk holds nothing of it
    with pytest.raises(ValueError, match="has 1,073,741,824 bytes; a description of a model has at most"):
        load_causal_lm(folder)


def test_shards_that_share_a_file(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(read_header(folder / "one.safetensors"), "one.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert len(read_headers(folder)) == 21
    load_causal_lm(folder)
