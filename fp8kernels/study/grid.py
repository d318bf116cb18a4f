"""The study as a file: sizes, the budget, and per experiment the factors that are changed, one at a time."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..models.llama import LlamaSize
from .settings import Settings, settings

FOLDER = Path(__file__).parent
CPU_GRID = FOLDER / "grid.yaml"


@dataclass(frozen=True)
class WorldPart:
    """people: each has one fact of every attribute. seed: of the facts and the exam."""

    people: int = 192
    seed: int = 0


@dataclass(frozen=True)
class TextPart:
    """bytes of the standard library's sources that are read, or of `files` where they are given (.txt, .py, .md …)."""

    bytes: int = 6_000_000
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class BasePart:
    """The training in BF16, on text and world, of the model that the runs start from.

    folder  a causal LM and its tokenizer to start from; "" is a fresh Llama of the grid's size
    world   sequences of each batch that tell of the world; the others are text
    """

    folder: str = ""
    steps: int = 1200
    batch: int = 16
    world: int = 8
    learning_rate: float = 3e-3
    warmup: int = 60
    seed: int = 0


@dataclass(frozen=True)
class TrainPart:
    """What every run of the study does, on text alone: text that the base has not seen.

    rise         steps in which the learning rate rises; then it falls as half a cosine
    validation   blocks of held-out text
    spike_step   at which the runs with a spike have it
    """

    steps: int = 160
    batch: int = 8
    sequence: int = 128
    rise: int = 8
    validation: int = 48
    spike_step: int = 64


PARTS = {"model": LlamaSize, "world": WorldPart, "text": TextPart, "base": BasePart, "train": TrainPart}


class Variant(NamedTuple):
    """A run's settings in an experiment."""

    experiment: str
    settings: Settings


@dataclass(frozen=True)
class Grid:
    """A whole study.

    workers, threads  runs at a time, and threads of each; the numbers depend on threads
    seeds             of the order of the text; every run is done with each
    device            "cpu" or "cuda"
    """

    name: str
    model: LlamaSize
    experiments: dict[str, tuple[Settings, ...]]
    centre: Settings
    seeds: tuple[int, ...] = (1, 2, 3)
    workers: int = 2
    threads: int = 1
    device: str = "cpu"
    world: WorldPart = field(default_factory=WorldPart)
    text: TextPart = field(default_factory=TextPart)
    base: BasePart = field(default_factory=BasePart)
    train: TrainPart = field(default_factory=TrainPart)

    def variants(self, only: tuple[str, ...] = ()) -> list[Variant]:
        """Every variant of the experiments that are asked for (all where none is).

        raises   ValueError naming the experiments that there are
        """
        for name in only:
            if name not in self.experiments:
                near = difflib.get_close_matches(name, self.experiments, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"no experiment {name!r}: the grid has {', '.join(self.experiments)}{hint}")
        return [
            Variant(name, variant)
            for name, variants in self.experiments.items()
            if not only or name in only
            for variant in variants
        ]

    def runs(self, only: tuple[str, ...] = ()) -> list[tuple[Settings, int]]:
        """(settings, seed) of every run, each once: the centre, the variants, and the BF16 run of each.

        Seed by seed, so that a study that is cut short holds whole comparisons.
        """
        return [(settings, seed) for seed in self.seeds for settings in self._distinct(only)]

    def _distinct(self, only: tuple[str, ...]) -> Iterator[Settings]:
        seen: dict[Settings, None] = {}
        for one in (self.centre, *(variant.settings for variant in self.variants(only))):
            seen.setdefault(one.matched().matched())
            seen.setdefault(one.matched())
            seen.setdefault(one)
        yield from seen


def read_grid(path: Path | None = None) -> Grid:
    """The grid of a YAML file; the one for two CPU cores where none is given.

    raises   FileNotFoundError, or ValueError naming the file and what is wrong in it
    """
    import yaml

    path = path or CPU_GRID
    if not path.is_file():
        raise FileNotFoundError(f"no grid at {path}; fp8kernels/study/grid.yaml in the package is an example")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    return parse_grid(given, str(path))


def parse_grid(given: Any, where: str) -> Grid:
    """The grid of plain dicts and lists.

    raises   ValueError that begins with `where`
    """
    values = _fields(Grid, given, where)
    for part, kind in PARTS.items():
        if part in values:
            values[part] = _build(kind, values[part], f"{where}: {part}")
    centre = settings(_mapping(values.get("centre", {}), f"{where}: centre"), f"{where}: centre")
    experiments = {}
    for name, variants in _mapping(values.get("experiments", {}), f"{where}: experiments").items():
        if not isinstance(variants, list) or not variants:
            raise ValueError(f"{where}: experiments: {name}: give a list of changes, such as [{{window: 4}}]")
        experiments[name] = tuple(
            _variant(_mapping(changes, f"{where}: {name}"), f"{where}: {name}", centre) for changes in variants
        )
    values |= {"centre": centre, "experiments": experiments}
    if "seeds" in values:
        values["seeds"] = tuple(values["seeds"])
    grid: Grid = _build(Grid, values, where)
    _check(grid, where)
    return grid


def _variant(changes: dict[str, Any], where: str, centre: Settings) -> Settings:
    """A changed centre; the BF16 one keeps only what such a run can have."""
    if changes.get("precision") == "bf16":
        return settings(changes, where, Settings(precision="bf16", learning_rate=centre.learning_rate))
    return settings(changes, where, centre)


def _check(grid: Grid, where: str) -> None:
    counts = {"workers": grid.workers, "threads": grid.threads, "train.steps": grid.train.steps}
    counts |= {"base.batch": grid.base.batch, "train.batch": grid.train.batch, "train.sequence": grid.train.sequence}
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{where}: {name}={count!r} must be a whole number of at least 1")
    if not grid.experiments:
        raise ValueError(f"{where}: experiments is empty; name at least one, with its changes")
    if not grid.seeds or len(set(grid.seeds)) < len(grid.seeds) or not all(isinstance(s, int) for s in grid.seeds):
        raise ValueError(f"{where}: seeds={list(grid.seeds)} must be different whole numbers")
    if not 0 <= grid.base.world <= grid.base.batch:
        raise ValueError(f"{where}: base.world={grid.base.world} of a batch of {grid.base.batch} sequences")
    for one in grid._distinct(()):
        if grid.train.batch % (one.micro_batches * one.ranks):
            raise ValueError(
                f"{where}: a batch of {grid.train.batch} does not split into {one.micro_batches} parts on "
                f"{one.ranks} ranks ({one.name()})"
            )
        if one.precision == "hif8" and one.warmup_steps >= grid.train.steps:
            raise ValueError(f"{where}: {one.name()} is in BF16 for all of its {grid.train.steps} steps")
        if one.spike and not grid.train.spike_step < grid.train.steps:
            raise ValueError(f"{where}: train.spike_step={grid.train.spike_step} is not among the steps")
    if grid.train.sequence > grid.model.context:
        raise ValueError(f"{where}: train.sequence={grid.train.sequence} is above model.context={grid.model.context}")


def _mapping(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"{where}: keys with values are needed, this is {given!r}")
    return given


def _fields(kind: Any, given: Any, where: str) -> dict[str, Any]:
    """The given values, if all are fields of the dataclass."""
    names = [f.name for f in fields(kind)]
    for name in _mapping(given, where):
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(names)}"
            raise ValueError(f"{where}: unknown key {name!r}{hint}")
    return dict(given)


def _build(kind: Any, given: Any, where: str) -> Any:
    """A dataclass of the values, numbers such as 1e-3 (which YAML reads as text) included."""
    values = _fields(kind, given, where)
    for f in fields(kind):
        value = values.get(f.name)
        if f.type in ("int", "float") and value is not None and not is_dataclass(value):
            values[f.name] = _number(value, f.type, f"{where}: {f.name}")
        elif isinstance(value, list):
            values[f.name] = tuple(value)
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def _number(value: Any, kind: str, where: str) -> int | float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {value!r} is no number") from None
    if kind == "int" and not number.is_integer():
        raise ValueError(f"{where}: {value!r} must be a whole number")
    return int(number) if kind == "int" else number
