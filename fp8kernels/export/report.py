"""What export did, layer by layer, as a value and as a table."""

from __future__ import annotations

import collections
import re
from dataclasses import dataclass, field

from rich.table import Table

from .layout import Manifest
from .plan import LayerPlan


@dataclass(frozen=True)
class ExportedLayer:
    """One 8-bit layer in the files.

    trained, written   SQNR of its weight in dB: in the format that it was trained with, and in that of the file
    scale, input_scale the largest weight scale, and the static input scale; None where the server makes it
    shared             the layers that have these scales in common with it, itself among them
    """

    trained_fmt: str
    trained: float
    written: float
    scale: float
    input_scale: float | None = None
    shared: tuple[str, ...] = ()

    @property
    def lost(self) -> float:
        """SQNR lost on the way into the file, in dB; below 0 where it is gained."""
        return 0.0 if self.trained == self.written else self.trained - self.written


@dataclass(frozen=True)
class ExportReport:
    """What lies in the folder.

    layers    8-bit layers by name; empty for the native layout, whose codes are those of training (`manifest.layers`)
    kept      linear layers in high precision, with reasons
    left      other 8-bit modules that are written in high precision, with reasons
    notes     what else a reader should know
    files     names of the files
    manifest  of the native layout
    """

    format: str
    layers: dict[str, ExportedLayer] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    manifest: Manifest | None = None

    @property
    def shared(self) -> tuple[tuple[str, ...], ...]:
        """Groups of layers that have their scales in common, once each."""
        return tuple(dict.fromkeys(layer.shared for layer in self.layers.values() if layer.shared))

    def table(self) -> Table:
        """For the screen: layers that differ in a number only stand in one row, with the worst of them."""
        count = len(self.manifest.layers) if self.manifest is not None else len(self.layers)
        table = Table(title=f"{self.format}: {count} layers in 8 bits", title_justify="left")
        for column in ("layer", "count", "in the file", "SQNR trained", "written", "most lost"):
            table.add_column(column, justify="left" if column in ("layer", "in the file") else "right", overflow="fold")
        rows: dict[str, list[ExportedLayer]] = collections.defaultdict(list)
        for name, layer in self.layers.items():
            rows[_pattern(name)].append(layer)
        for name, members in rows.items():
            shares = ", shares its scales" if members[0].shared else ""
            low = min(member.trained for member in members), min(member.written for member in members)
            lost = max(member.lost for member in members)
            table.add_row(
                name,
                str(len(members)),
                f"e4m3, trained in {members[0].trained_fmt}{shares}",
                *(f"{number:.1f} dB" for number in (*low, lost)),
            )
        if self.manifest is not None:
            found = collections.Counter((_pattern(name), entry) for name, entry in self.manifest.layers.items())
            for (name, entry), times in found.items():
                what = f"{entry.weight_fmt} {entry.weight_block}, inputs {entry.input_fmt} {entry.input_scaling}"
                table.add_row(name, str(times), what, "", "", "")
        high = collections.Counter((_pattern(name), why) for name, why in (*self.kept.items(), *self.left.items()))
        for (name, why), times in high.items():
            table.add_row(name, str(times), f"high precision: {why}", "", "", "", style="dim")
        for note in self.notes:
            table.add_row("note", "", note, "", "", "")
        return table


def exported(plan: LayerPlan) -> ExportedLayer:
    """What a layer loses on the way into the file."""
    trained, written = plan.sqnr()
    return ExportedLayer(
        trained_fmt=plan.layer.fp8_recipe.weight.fmt,
        trained=trained,
        written=written,
        scale=float(plan.scale.max()),
        input_scale=None if plan.input_scale is None else float(plan.input_scale),
        shared=plan.shared,
    )


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)
