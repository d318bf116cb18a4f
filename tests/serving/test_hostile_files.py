"""Files that are cut, changed or made to do harm: refused with the reason, and with no other error, hang or memory."""

from __future__ import annotations

import json
import random
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from serving.folders import edit_config, settings, write_folder

from fp8kernels.convert import convert
from fp8kernels.export import check, check_report, explain_servers, export
from fp8kernels.export.patterns import Patience
from fp8kernels.models.llama import LlamaSize, llama

TINY = LlamaSize(vocab=64, hidden=128, intermediate=128, layers=1, heads=2, context=32)
LAYOUTS = ("static", "block", "fp8", "native")
SECONDS, BYTES = 10.0, 64 * 2**20  # one check of a tiny folder takes about 0.05 s and 5 MiB
REFUSALS = (ValueError, FileNotFoundError)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {layout: tmp_path_factory.mktemp("hostile") / layout for layout in LAYOUTS}
    for layout in LAYOUTS[:-1]:
        write_folder(folders[layout], layout, size=TINY)
    torch.manual_seed(0)
    export(convert(llama(TINY), "hif8-qat", verbose=False), folders["native"])
    return folders


@pytest.fixture
def folder(whole: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda layout: Path(shutil.copytree(whole[layout], tmp_path / layout))


@contextmanager
def bounded(*, memory: bool) -> Iterator[None]:
    """Not long, and where memory is counted (which takes three times as long) not large."""
    if memory:
        tracemalloc.start()
    start = time.process_time()
    try:
        yield
        assert time.process_time() - start < SECONDS
        assert not memory or tracemalloc.get_traced_memory()[1] < BYTES
    finally:
        if memory:
            tracemalloc.stop()


def refused(at: Path, *, memory: bool = False) -> list[str]:
    """The problems of check_report; check refuses if there are any, and no other error comes of either."""
    with bounded(memory=memory):
        problems = check_report(at).problems
        try:
            check(at)
        except REFUSALS:
            pass
        else:
            assert problems == []
    return problems


def split(at: Path) -> tuple[bytes, bytes]:
    """Header and data of the weights."""
    raw = (at / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length], raw[8 + length :]


def join(at: Path, header: bytes | dict[str, Any], data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (at / "model.safetensors").write_bytes(
        (len(text) if length is None else length).to_bytes(8, "little") + text + data
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cut_anywhere(folder: Any, layout: str) -> None:
    at = folder(layout)
    raw = (at / "model.safetensors").read_bytes()
    dice = random.Random(0)
    header = 8 + len(split(at)[0])
    for offset in [0, 1, 7, 8, 9, header - 1, header, len(raw) - 1, *(dice.randrange(len(raw)) for _ in range(6))]:
        (at / "model.safetensors").write_bytes(raw[:offset])
        assert refused(at), f"cut at {offset}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_byte_of_the_header_changed(folder: Any, layout: str) -> None:
    at = folder(layout)
    header, data = split(at)
    dice = random.Random(1)
    refusals = 0
    for _ in range(25):
        place, value = dice.randrange(len(header)), dice.randrange(256)
        join(at, header[:place] + bytes([value]) + header[place + 1 :], data)
        refusals += bool(refused(at))
    assert refusals > 12, "a changed name, number or bracket is seen; some bytes are white space"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_renamed(folder: Any, layout: str) -> None:
    at = folder(layout)
    header, data = split(at)
    entries = json.loads(header)
    names = [name for name in entries if name.rpartition(".")[2] not in ("__metadata__",) and "proj" in name]
    dice = random.Random(2)
    for name in dice.sample(names, 8):
        other = dict(entries)
        other[dice.choice(["\0", "../../etc/passwd", name + "\n", "x" * 5000, "proj.weight", "моё"])] = other.pop(name)
        join(at, other, data)
        assert refused(at), name


def test_headers_that_lie(folder: Any) -> None:
    at = folder("static")
    header, data = split(at)
    entries = json.loads(header)
    name = next(name for name in entries if name.endswith("q_proj.weight"))

    def lie(**fields: Any) -> list[str]:
        join(at, {**entries, name: {**entries[name], **fields}}, data)
        with pytest.raises(REFUSALS):
            explain_servers(at)
        return refused(at, memory=True)

    begin, end = entries[name]["data_offsets"]
    assert lie(shape=[2**40, 2**40])
    assert lie(shape=[2**62] * 64)
    assert lie(shape=[-128, -128])
    assert lie(shape=[128.0, 128])
    assert lie(shape="128")
    assert lie(dtype="PICKLE")
    assert lie(dtype=["F8_E4M3"])
    assert lie(data_offsets=[begin - 8, end - 8])
    assert lie(data_offsets=[0, 10**30])
    assert lie(data_offsets=None)
    join(at, header, data + b"\0" * 9)
    assert "belong to no tensor" in refused(at)[0]
    for length in (2**63, 10**8, len(header) + len(data) + 1, 0):
        join(at, header, data, length)
        assert refused(at, memory=True), length
    twice = header.replace(b"k_proj.weight", b"q_proj.weight")
    join(at, twice, data)
    assert "twice" in refused(at)[0]
    join(at, b"[" * 200_000, data)
    assert refused(at)
    join(at, b'{"a":' * 100_000, data)
    assert refused(at)


def test_an_index_that_leads_elsewhere(folder: Any, tmp_path: Path) -> None:
    at = folder("static")
    names = [name for name in json.loads(split(at)[0]) if name != "__metadata__"]
    (at / "model.safetensors").rename(at / "one.safetensors")
    secret = tmp_path / "secret.safetensors"
    shutil.copy(at / "one.safetensors", secret)

    def index(shard: Any, **fields: Any) -> list[str]:
        listed = {"metadata": {}, "weight_map": {**dict.fromkeys(names, "one.safetensors"), names[0]: shard}, **fields}
        (at / "model.safetensors.index.json").write_text(json.dumps(listed))
        return refused(at)

    assert index("one.safetensors") == []
    for shard in ("../secret.safetensors", str(secret), "", ".", "..", "a\\b", 7, None, "missing.safetensors", "\0"):
        assert index(shard), shard
    assert index("one.safetensors", weight_map=[])
    assert index("one.safetensors", weight_map={"other.weight": "one.safetensors"})


WEIRD = (
    None,
    True,
    -1,
    0,
    1e308,
    10**30,
    "",
    "re:(",
    "re:(a+)+$",
    [],
    {},
    [[]],
    {"a": 1},
    "x" * 10_000,
    ["x"] * 1000,
    [None],
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_configs_of_anything(folder: Any, layout: str) -> None:
    """A place in config.json, chosen at random, holds a value chosen at random."""
    at = folder(layout)
    config = json.loads((at / "config.json").read_text())
    dice = random.Random(3)
    for _ in range(8):
        changed = json.loads(json.dumps(config))
        node: Any = changed if dice.random() < 0.4 else changed["quantization_config"]
        while True:
            key = dice.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], dict | list) or not node[key] or dice.random() < 0.4:
                break
            node = node[key]
        node[key] = dice.choice(WEIRD)
        (at / "config.json").write_text(json.dumps(changed))
        refused(at)
    for text in (b"", b"{", b"\xff\xfe", b"[]", b"null", b"7", b"{}" * 2, b"[" * 100_000):
        (at / "config.json").write_bytes(text)
        assert refused(at), text[:8]


def test_patterns_that_take_long_are_given_up(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patience, "__init__", lambda self: self.__dict__.update(seconds=0.2, start=time.thread_time()))
    at = folder("static")
    patterns = [f"re:.*.*.*x{number}" for number in range(20_000)]
    edit_config(at, settings("static") | {"ignore": patterns})
    assert "take more than 0.2 s" in refused(at)[0]
    targets = settings("static")
    targets["config_groups"]["group_0"]["targets"] = patterns
    edit_config(at, targets)
    assert "take more than 0.2 s" in refused(at)[0]


def test_a_pickle_under_another_name_is_not_opened(folder: Any, tmp_path: Path) -> None:
    at = folder("static")
    ran = tmp_path / "ran"

    class Harm:
        def __reduce__(self) -> Any:
            return Path.touch, (ran,)

    torch.save(Harm(), at / "model.safetensors")
    assert "pickle, zip or GGUF file under another name" in refused(at)[0]
    assert not ran.exists()
