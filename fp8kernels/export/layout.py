"""The native checkpoint: what files a folder holds, and what its manifest says.

    model.safetensors   per converted layer `<layer>.weight_codes` uint8 [N, K], `<layer>.weight_scale` fp32 on the
                        block's grid, `<layer>.input_scale` fp32 [1, 1] (0: every input takes the scale of its own
                        amax); all other tensors under their own names
    fp8kernels.json     the manifest: formats and blocks of the layers, dtype and shape of every tensor, and the size
                        and sha256 of every other file
    config.json, tokenizer files    as the model and the tokenizer write them; config.json also has the entry
                        `quantization_config` that servers go by (config.py)

The manifest makes damage visible; it is no signature: who can change a file can change the manifest too.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..formats import get_format
from ..recipe import Role

VERSION = 1  # of the layout; raised when an older reader would misread a newer file
MANIFEST = "fp8kernels.json"
WEIGHTS = "model.safetensors"
CODES, SCALE, INPUT_SCALE = "weight_codes", "weight_scale", "input_scale"
READ_AT_ONCE = 1 << 20  # bytes; a checkpoint is larger than memory should spare for its checksum


@dataclass(frozen=True)
class LayerEntry:
    """How one converted layer reads its codes.

    input_scaling  "static", or "current": every input takes the scale of its own amax, block by block
    input_target   where that amax lands
    """

    weight_fmt: str
    weight_block: str
    input_fmt: str
    input_block: str
    input_scaling: str
    input_target: float
    power_of_two: bool

    def input_role(self) -> Role:
        """The input's role of a layer that is read so."""
        return Role(self.input_fmt, self.input_scaling, self.input_block, None)

    def weight_role(self) -> Role:
        """The weight's role; "current" only says that a block may be smaller than the tensor: scales are stored."""
        return Role(self.weight_fmt, "current" if self.weight_block != "tensor" else "static", self.weight_block)


def check_entry(entry: LayerEntry) -> None:
    """raises ValueError or TypeError, naming the field, unless a layer can be read as the entry says."""
    for fmt in (entry.weight_fmt, entry.input_fmt):
        get_format(fmt)
    entry.input_role()
    entry.weight_role()
    target = entry.input_target
    if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target < math.inf:
        raise ValueError(f"input_target is {target!r}, it is a positive number")
    if not isinstance(entry.power_of_two, bool):
        raise ValueError(f"power_of_two is {entry.power_of_two!r}, it is true or false")


@dataclass(frozen=True)
class Manifest:
    """Everything fp8kernels.json says; `tensors` maps a name to its dtype (torch's word) and shape."""

    recipe: str
    model_class: str
    dtype: str
    layers: dict[str, LayerEntry]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    tied: dict[str, str] = field(default_factory=dict)
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> str:
        """The manifest as text, readable by people too."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    raises   FileNotFoundError if there is none, ValueError if it is damaged or from another layout
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}: it is no fp8kernels checkpoint; write one with export")
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); export the model again") from None
    if not isinstance(found, dict) or not isinstance(found.get("version"), int):
        raise ValueError(f"{path} is not a manifest of fp8kernels; export the model again")
    if found["version"] != VERSION:
        raise ValueError(
            f"{path} has layout {found['version']}, this fp8kernels reads {VERSION}; use a matching version"
        )
    try:
        return _manifest(found)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); export the model again") from None


def file_stamp(path: Path) -> tuple[int, str]:
    """Size in bytes and sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_AT_ONCE):
            digest.update(chunk)
    return path.stat().st_size, digest.hexdigest()


def _manifest(found: dict[str, Any]) -> Manifest:
    layers = {_text(name): LayerEntry(**entry) for name, entry in found.pop("layers").items()}
    tensors = {
        _text(name): (_text(dtype), tuple(int(size) for size in shape))
        for name, (dtype, shape) in found.pop("tensors").items()
    }
    files = {_plain(name): (int(size), _text(digest)) for name, (size, digest) in found.pop("files").items()}
    tied = {_text(name): _text(source) for name, source in found.pop("tied").items()}
    return Manifest(**found, layers=layers, tensors=tensors, files=files, tied=tied)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _plain(name: Any) -> str:
    """A file name inside the folder: nothing that leads out of it."""
    if Path(_text(name)).name != name:
        raise ValueError(f"{name!r} is not a plain file name")
    return str(name)
