"""check: whether a folder is what it says, layer by layer; and what each server will do with it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from ..headers import CONFIG, FLOATS, check_folder, some
from .architecture import module_classes
from .config import QUANT_METHOD, entries
from .foreign import OTHER_EIGHT_BITS, STORED, foreign_entries, is_cache_scale
from .layout import MANIFEST, Manifest
from .patterns import Patience
from .read import check as check_native
from .requantize import LEAST_SCALE
from .servers import ServerRow, rows_of
from .stored import COMPRESSED, FP8, MODELOPT, Stored, StoredLayer, ignored_by, ignores, read_stored, with_entries
from .values import Values, read_values

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
BLOBS = "blobs"  # where a hub cache keeps the files that its snapshots link to


@dataclass
class Report:
    """What a folder holds and what is wrong with it.

    problems  each makes some server refuse the folder, or compute something else than was exported
    warnings  what costs accuracy or speed somewhere, or is not known
    rows      one a linear layer
    manifest  of a native folder that is whole
    """

    folder: Path
    method: str = ""
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    rows: list[ServerRow] = field(default_factory=list)
    manifest: Manifest | None = None

    def table(self, *, layers: bool = False) -> Table:
        """The rows for the screen: those that are equal but for the layer stand as one, unless `layers`."""
        table = Table(title=f"{self.folder} ({self.method or 'high precision'})", show_lines=True)
        for head in ("layers", "weights", "inputs", "transformers", "vLLM", "SGLang"):
            table.add_column(head, overflow="fold")
        merged: dict[tuple[str, ...], list[str]] = {}
        for row in self.rows:
            cells = (row.weights, row.inputs, row.transformers, row.vllm, row.sglang)
            merged.setdefault((row.layer, *cells) if layers else ("", *cells), []).append(row.layer)
        for key, names in merged.items():
            table.add_row(_patterns(names), *key[1:])
        return table


def check(folder: str | Path) -> Manifest | Report:
    """Hold a checkpoint of any layout against what it says of itself; no code of it is run, nothing is unpickled.

    returns  the manifest of a folder that export wrote in its native layout; else the report, which has no problems
    raises   FileNotFoundError if it is no folder, or a file is missing; ValueError with every problem, one a line
    """
    if (Path(folder) / MANIFEST).exists():
        return check_native(folder)
    report = check_report(folder)
    if report.problems:
        raise ValueError(f"{folder}: " + "\n".join(report.problems))
    return report


def check_report(folder: str | Path) -> Report:
    """Everything that can be said of a checkpoint: headers first, then numbers, then what servers do with it.

    raises   FileNotFoundError if it is no folder; all that is wrong inside stands in `problems`
    """
    report = Report(check_folder(folder))
    report.problems.extend(_files(report.folder))
    try:
        stored = read_stored(report.folder)
    except (ValueError, FileNotFoundError) as error:
        report.problems.append(str(error))
        return report
    report.method = stored.method
    if stored.method == QUANT_METHOD:
        _native(stored, report)
    elif stored.method:
        report.problems.extend(_foreign(stored))
    report.problems.extend(_shapes(stored))
    try:
        _names(stored, report)
        values = read_values(stored)
        report.rows = rows_of(stored, values)
    except ValueError as error:
        report.problems.append(str(error))
        return report
    report.problems.extend(values.problems)
    report.warnings.extend([*_wrong(report.rows), *_losses(stored, values)])
    return report


def _files(folder: Path) -> list[str]:
    """What lies beside the weights: pickles, and links that lead out of the folder."""
    said = []
    found = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if found:
        said.append(f"{folder} holds pickles ({some(found)}), which run code when they are read; remove them")
    home = folder.resolve()
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            target = Path(os.path.realpath(path))
            inside = target.is_relative_to(home) or target.parent == home.parent.parent / BLOBS
            if not inside:
                said.append(f"{path} is a link that leads out of the folder, to {target}; copy the file itself there")
    return said


def _native(stored: Stored, report: Report) -> None:
    try:
        report.manifest = check_native(stored.folder)
        with_entries(stored, report.manifest.layers)
        if stored.config:
            said = entries(stored.settings)
            wrong = [
                name for name in {*said, *report.manifest.layers} if said.get(name) != report.manifest.layers.get(name)
            ]
            if wrong:
                report.problems.append(f"{CONFIG} and {MANIFEST} disagree on {len(wrong)} layers: {some(wrong)}")
    except (ValueError, FileNotFoundError) as error:
        report.problems.append(str(error))


def _foreign(stored: Stored) -> list[str]:
    """Why our own 8-bit layers could not read it, where that is so."""
    if stored.method not in (COMPRESSED, FP8):
        return []
    try:
        foreign_entries(stored.settings, stored.tensors)
    except ValueError as error:
        return [str(error)]
    return []


def _shapes(stored: Stored) -> list[str]:
    said = []
    for layer in stored.layers:
        if stored.method == QUANT_METHOD or not layer.eight_bit:
            if layer.scheme is not None and not layer.eight_bit and stored.method != QUANT_METHOD:
                said.append(
                    f"{layer.weight} is {layer.dtype}, {CONFIG} says it is 8-bit; add {layer.name!r} to its ignore list"
                )
            continue
        if layer.ignored:
            said.append(f"{layer.weight} is {layer.dtype}, {CONFIG} ignores it: codes would be taken for weights")
        elif not stored.method:
            said.append(f"{layer.weight} is {layer.dtype}, {CONFIG} has no quantization_config")
        if layer.scale is None:
            said.append(f"{layer.weight} is {layer.dtype} and has no scale in the files")
        elif layer.scheme is not None:
            said.extend(_scales(stored, layer))
    owners = {layer.name for layer in stored.layers if layer.eight_bit}
    for name, header in stored.tensors.items():
        owner, _, key = name.rpartition(".")
        orphan = key in ("weight_scale", "weight_scale_inv", "input_scale", "activation_scale") and owner not in owners
        if orphan and stored.method:
            said.append(f"{name} scales nothing: {owner}.weight is not 8-bit in the files")
        elif (
            header.dtype in (STORED, *OTHER_EIGHT_BITS)
            and key != "weight"
            and not is_cache_scale(name)
            and "scale" not in key
        ):
            said.append(f"{name} is {header.dtype} and no weight of a linear layer")
    return said


def _scales(stored: Stored, layer: StoredLayer) -> list[str]:
    """What is wrong with the dtypes and shapes of a layer's scales."""
    assert layer.scale is not None
    assert layer.scheme is not None
    said = []
    scale = stored.tensors[layer.scale]
    block = layer.scheme.block()
    rows, columns = layer.shape
    shapes = {"tensor": ((), (1,), (1, 1)), "channel": ((rows, 1), (rows,))}.get(layer.scheme.weights)
    if block is not None:
        shapes = ((-(-rows // block[0]), -(-columns // block[1])),)
    if shapes is not None and scale.shape not in shapes:
        said.append(
            f"{layer.scale} has shape {list(scale.shape)}; a scale of each {layer.scheme.weights} of "
            f"{list(layer.shape)} has {' or '.join(str(list(shape)) for shape in shapes)}"
        )
    if layer.scheme.inputs == "static":
        if layer.input_scale is None:
            said.append(f"{layer.name} has static inputs in {CONFIG} and no input_scale in the files")
        elif stored.tensors[layer.input_scale].shape not in ((), (1,), (1, 1)):
            said.append(
                f"{layer.input_scale} has shape {list(stored.tensors[layer.input_scale].shape)}, it has one scale: [1]"
            )
    names = [name for name in (layer.scale, layer.input_scale) if name is not None]
    wrong = [name for name in names if stored.tensors[name].dtype not in (*FLOATS, "F8_E8M0")]
    return [*said, *(f"{name} is {stored.tensors[name].dtype}, scales are floats" for name in wrong)]


def _names(stored: Stored, report: Report) -> None:
    """Ignore lists that mean nothing, and tensors that the model does not know."""
    ignored = ignored_by(stored)
    if not stored.config:
        report.warnings.append(f"no {CONFIG}: servers build no model from the folder")
        return
    if "auto_map" in stored.config:
        report.warnings.append(
            f"{CONFIG} names code of its own (auto_map): it was not run, and is run nowhere without trust_remote_code"
        )
    classes = module_classes(stored.config, len(stored.tensors))
    names = {layer.name for layer in stored.layers}
    if isinstance(classes, str):
        report.warnings.append(f"names were not held against the model: {classes}")
    else:
        names = set(classes)
        unknown = [name for name in stored.tensors if name.rpartition(".")[0] not in names]
        if unknown:
            report.warnings.append(f"{len(unknown)} tensors belong to no module of the model: {some(unknown)}")
    kinds = set(classes.values()) if isinstance(classes, dict) else set()
    patience, met = Patience(), ignored.names & (names | kinds)
    for name in names:
        met.update(entry for entry in ignored.of(name, patience) if ignores(stored.method, entry, name))
    idle = [entry for entry in ignored.entries if entry not in met]
    if idle:
        report.warnings.append(f"{len(idle)} ignored names match no module: {some(idle)}")


def _wrong(rows: list[ServerRow]) -> list[str]:
    """What a server would load without an error and compute wrongly."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for server, said in (("transformers", row.transformers), ("vLLM", row.vllm), ("SGLang", row.sglang)):
            if said.startswith(("wrong", "refused")):
                found.setdefault(f"{server}: {said}", []).append(row.layer)
    return [f"{said} ({some(names)})" for said, names in found.items()]


def _losses(stored: Stored, values: Values) -> list[str]:
    """What servers change, in numbers."""
    said = []
    if values.requantized:
        worst = min(values.requantized, key=lambda name: values.requantized[name])
        said.append(
            f"{len(values.requantized)} groups of layers that vLLM and SGLang compute as one have different "
            f"weight_scale: they round the weights again with the largest, {values.requantized[worst]:.1f} dB at "
            f"worst ({worst} and those beside it); export with shared scales, or scales by channel"
        )
    small = [
        layer.name
        for layer in stored.layers
        if layer.scheme is not None
        and layer.scheme.weights == "tensor"
        and stored.method in (COMPRESSED, FP8, MODELOPT)
        and values.scales.get(layer.name, 1.0) < LEAST_SCALE
    ]
    if small:
        said.append(
            f"{len(small)} layers have a weight_scale below {LEAST_SCALE:.3g} ({some(small)}): vLLM and SGLang decode "
            "such weights in float16 and round them again, which changes a few of the smallest codes; scales by "
            "channel are taken as they are"
        )
    if stored.method == COMPRESSED and values.inexact:
        worst = max(values.inexact, key=lambda name: values.inexact[name])
        said.append(
            f"{len(values.inexact)} scales are no bf16 numbers, to which transformers casts them: "
            f"{values.inexact[worst]:.2%} off at worst ({worst})"
        )
    inputs = [
        group
        for group in stored.groups()
        if stored.method in (COMPRESSED, FP8, MODELOPT)
        and len({values.inputs[layer.name] for layer in group if layer.name in values.inputs}) > 1
    ]
    if inputs:
        said.append(
            f"{len(inputs)} groups of layers that are computed as one have different input_scale, such as "
            f"{some(layer.name for layer in inputs[0])}: vLLM and SGLang take the largest"
        )
    return said


def _patterns(names: list[str]) -> str:
    """Many names as few: numbers become *, and what differs in the last word stands in braces."""
    if len(names) == 1:
        return names[0]
    found: dict[str, dict[str, None]] = {}
    for name in names:
        parent, _, last = re.sub(r"(?<![^.])\d+(?![^.])", "*", name).rpartition(".")
        found.setdefault(parent, {})[last] = None
    lines = [
        ".".join(filter(None, (parent, next(iter(lasts)) if len(lasts) == 1 else "{" + ", ".join(lasts) + "}")))
        for parent, lasts in found.items()
    ]
    rest = [f"and {len(lines) - 6} more patterns"] if len(lines) > 6 else []
    return "\n".join([*lines[:6], *rest, f"({len(names)} layers)"])
