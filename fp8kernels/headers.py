"""What lies in the folder of a model, read before anything large is: config, names of files, headers of tensors.

A safetensors file is: 8 bytes, the length of the header as a little-endian integer; the header, JSON that gives each
tensor a dtype, a shape and the range of its bytes; the bytes. Everything that can be wrong with a folder short of the
values of its weights shows in that.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes; the safetensors library refuses longer ones
LARGEST_JSON = 64 * 2**20  # bytes; the index of a model of a hundred thousand tensors has about ten
BITS = {  # of one element, by the names of the safetensors format
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
FLOATS = ("F16", "BF16", "F32", "F64")
OTHER_WEIGHTS = (
    (("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt"), "pickled PyTorch files, which can run code when they are read"),
    (("*.gguf",), "GGUF files"),
    (("*.h5", "*.msgpack", "*.onnx"), "files of other frameworks"),
)
CONVERT = "write them anew: transformers.AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
AGAIN = "copy or download it again"


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as a file announces it: dtype in the format's names ("BF16"), shape, and the file that holds it."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


def check_folder(folder: str | Path) -> Path:
    """The folder as a Path.

    raises   FileNotFoundError if it is none; nothing is ever fetched by name
    """
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise FileNotFoundError(f"{path} is a file; give the folder that holds {CONFIG} and the weights")
    name = str(folder)
    download = f"hf download {name} --local-dir FOLDER" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else "hf download"
    raise FileNotFoundError(
        f"{name} is not a folder. Models are read from disk alone: download it first ({download}) and give that folder"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    raises   ValueError naming the file if it is too long for what it is, no JSON, or no object
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes; a description of a model has at most {LARGEST_JSON:,}"
        )
    return _parse(path.read_bytes(), str(path))


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of a folder's safetensors files, by its name.

    raises   FileNotFoundError if there are no weights, or shards of an index are missing; ValueError if the weights are
             of another kind, an index and its files disagree, or a file is not what its header says
    """
    if (folder / WEIGHTS).is_symlink() or (folder / WEIGHTS).exists():
        return read_header(folder / WEIGHTS)
    if not (folder / INDEX).exists():
        raise _no_weights(folder)
    listed = _read_index(folder / INDEX)
    shards = sorted(set(listed.values()))
    missing = [name for name in shards if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of the {len(shards)} files that {INDEX} lists: {some(missing)}; {AGAIN}"
        )
    headers: dict[str, TensorHeader] = {}
    for shard in shards:
        for name, header in read_header(folder / shard).items():
            if name in headers:
                raise ValueError(f"{folder}: {name!r} is in {headers[name].file.name} and in {shard}; {AGAIN}")
            headers[name] = header
    lost = [name for name, shard in listed.items() if name not in headers or headers[name].file.name != shard]
    if lost:
        raise ValueError(f"{folder}: {len(lost)} tensors are not in the file that {INDEX} gives: {some(lost)}; {AGAIN}")
    return headers


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors that one safetensors file announces, checked against its length.

    raises   ValueError if it is no such file, is cut short, or its header lies about ranges, shapes or lengths
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "a link that leads nowhere" if path.is_symlink() else "not a file"
        raise ValueError(f"{path} is {what}; a safetensors file belongs there")
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(9)
        length = int.from_bytes(first[:8], "little")
        if first.startswith(b"version "):
            raise ValueError(f"{path} is a pointer of Git LFS, not the weights; run `git lfs pull` in that folder")
        if first.startswith((b"PK", b"\x80\x02", b"GGUF")):
            raise ValueError(f"{path} is a pickle, zip or GGUF file under another name; {CONVERT}")
        if first[8:] != b"{" or length < 2 or length > LONGEST_HEADER:
            raise ValueError(f"{path} ({size:,} bytes) is not a safetensors file; {AGAIN}")
        if 8 + length > size:
            raise ValueError(f"{path} is cut short: its header alone has {length:,} bytes, the file {size:,}; {AGAIN}")
        file.seek(8)
        entries = _parse(file.read(length), f"the header of {path}")
    entries.pop("__metadata__", None)
    room = size - 8 - length
    headers, ranges = {}, []
    for name, entry in entries.items():
        header, begin, end = _tensor(path, name, entry)
        headers[name] = header
        ranges.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            raise ValueError(
                f"{path}: the bytes of {name!r} start at {begin:,}, those before it end at {position:,}; {AGAIN}"
            )
        position = end
    if position > room:
        lost = [name for _, end, name in ranges if end > room]
        raise ValueError(
            f"{path} is cut short: its tensors need {position:,} bytes, {room:,} are there; "
            f"{len(lost)} of {len(ranges)} tensors are lost, such as {some(lost, 1)}; {AGAIN}"
        )
    if position < room:
        raise ValueError(f"{path} has {room - position:,} bytes that belong to no tensor; {AGAIN}")
    return headers


def some(names: Iterable[str], count: int = 3) -> str:
    """A few names for a message, written so that odd characters in them show; the number of the rest."""
    names = sorted(names)
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(repr(name[:200]) for name in names[:count]) + rest


def _tensor(path: Path, name: str, entry: Any) -> tuple[TensorHeader, int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("lengths that are no counts")
        stored = (math.prod(shape) * BITS[dtype] + 7) // 8
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the header of {path} says nothing sensible of {name[:200]!r} ({error!r}); {AGAIN}") from None
    if end - begin != stored:
        raise ValueError(
            f"{path}: {name[:200]!r} is {list(shape)} in {dtype}, {stored:,} bytes, and has {end - begin:,}; {AGAIN}"
        )
    return TensorHeader(dtype, shape, path), begin, end


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path)
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{path} lists no tensors (weight_map); {AGAIN}")
    if not isinstance(index.get("metadata"), dict):
        raise ValueError(f'{path} has no "metadata", without which transformers does not read it; add "metadata": {{}}')
    for name, shard in listed.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
            raise ValueError(f"{path} has {name[:200]!r} in {shard!r}; files of a model lie in its own folder")
    return listed


def _no_weights(folder: Path) -> Exception:
    for patterns, what in OTHER_WEIGHTS:
        found = [path.name for pattern in patterns for path in folder.glob(pattern)]
        if found:
            return ValueError(f"{folder} holds its weights as {what} ({some(found)}), not as safetensors; {CONVERT}")
    found = [path.name for path in folder.glob("*.safetensors")]
    if found:
        return FileNotFoundError(f"{folder} holds {some(found)}, but neither {WEIGHTS} nor {INDEX}; {AGAIN}")
    return FileNotFoundError(f"{folder} holds a {CONFIG} and no weights (neither {WEIGHTS} nor {INDEX}); {AGAIN}")


def _parse(text: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{what} is not readable JSON ({error}); {AGAIN}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a JSON object but {type(value).__name__}; {AGAIN}")
    return value


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"{some(twice)} stands in it twice")
    return value
