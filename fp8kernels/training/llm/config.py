"""The configuration of a training run, one YAML file. Defaults are those of the published HiF8 QAT run."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...models.llama import LlamaSize
from .settings import parse, set_value

WARM_UP = 300  # steps over which the learning rate rises, as published
WARM_UP_SHARE = 10  # but no more than one in so many of a run's steps
DTYPES = ("float32", "bfloat16")
TOO_LONG = ("split", "truncate", "error", "drop")
POLICIES = ("warn", "stop", "fallback", "ignore")
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup", "warmup_stable_decay")


@dataclass(frozen=True)
class ModelSettings:
    """Which model is trained.

    path   a folder with a causal LM of transformers: weights, config and tokenizer
    size   instead of it: a new Llama with random weights; the tokenizer is learnt from the training text
    dtype  of the weights that the optimizer steps, "float32" or "bfloat16". At a learning rate of 1e-5 most updates are
           smaller than half a step of a bf16 weight and would be lost, so fp32; products are bf16 by autocast
    """

    path: Path | None = None
    size: LlamaSize | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if (self.path is None) == (self.size is None):
            raise ValueError("give either path (a folder) or size (vocab, hidden, layers, …), and not both")
        _one_of("dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class DataSettings:
    """What text is trained on.

    train       files or folders of text, JSONL, parquet or datasets
    validation  the same, for the validation loss; none is measured without
    hold_out    instead of it: the share of the training documents that is kept for validation
    text_field  the field or column that holds the text
    sequence    tokens of one sequence
    packing     documents one after another, cut every `sequence` tokens; false: one document a sequence, padded
    too_long    a document longer than a sequence: "split", "truncate", "drop" or "error"
    """

    train: list[Path]
    validation: list[Path] = field(default_factory=list)
    hold_out: float = 0.0
    text_field: str = "text"
    sequence: int = 1024
    packing: bool = True
    too_long: str = "split"

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("train names no file")
        _at_least("sequence", self.sequence, 2)
        if not 0 <= self.hold_out < 1 or (self.hold_out and self.validation):
            raise ValueError(f"hold_out={self.hold_out} must be from 0 to below 1, and 0 where validation names files")
        _one_of("too_long", self.too_long, TOO_LONG)


@dataclass(frozen=True)
class LoraSettings:
    """Adapters of PEFT in place of the weights themselves.

    r, alpha, dropout  as in peft.LoraConfig
    target_modules     names of layers, or "all-linear"
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        _at_least("r", self.r, 1)


@dataclass(frozen=True)
class SaturationSettings:
    """The detector of scales that no longer hold their tensors.

    every    steps between two looks; 0 never looks
    policy   "warn", "stop", "fallback" (the layer computes in high precision from then on) or "ignore"
    options  further arguments of telemetry.saturation.SaturationWatch
    """

    every: int = 50
    policy: str = "warn"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least("every", self.every, 0)
        _one_of("policy", self.policy, POLICIES)


@dataclass(frozen=True)
class ProbeSettings:
    """The detector of what the model forgets.

    items    a JSONL file of cloze and multiple-choice items
    every    steps between two exams; the first is before the first step
    policy   "warn", "stop", "fallback" (all layers compute in high precision from then on) or "ignore"
    drop     accuracy that may be lost, as a fraction
    level    of the confidence interval
    batch    items at a time
    """

    items: Path
    every: int = 100
    policy: str = "warn"
    drop: float = 0.02
    level: float = 0.95
    batch: int = 16

    def __post_init__(self) -> None:
        _at_least("every", self.every, 1)
        _at_least("batch", self.batch, 1)
        _one_of("policy", self.policy, POLICIES)


@dataclass(frozen=True)
class Config:
    """One training run.

    recipe          the name of a recipe, or null: the BF16 run that others are measured against
    recipe_changes  fields of the recipe that differ (runs/precision.py); without a recipe they mean nothing
    steps           optimizer steps
    batch           sequences of one micro-batch in each process
    accumulate      micro-batches of one optimizer step
    scheduler       of the learning rate; "cosine" ends at 0
    warmup_steps    steps over which the learning rate rises; null: 300, or a tenth of the steps where that is fewer
    clip            the largest norm of the gradient; 0 does not clip
    fsdp            shard weights, gradients and optimizer over the processes (FSDP2)
    save_every      steps between two checkpoints; 0 saves none
    keep            newest checkpoints that are kept; the one with the lowest validation loss is kept besides
    log_every       steps between two rows of TensorBoard; log.jsonl has a row each step
    validate_every  steps between two validation losses; 0 measures it at the end only
    baseline        the folder of a BF16 run of the same data, seed, batches and schedule: the loss is compared with its
    trainer         any fields of transformers.TrainingArguments, as they are
    """

    model: ModelSettings
    data: DataSettings
    steps: int
    name: str | None = None
    tokenizer: Path | None = None
    recipe: str | None = None
    recipe_changes: dict[str, Any] = field(default_factory=dict)
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-5
    scheduler: str = "cosine"
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0
    lora: LoraSettings | None = None
    fsdp: bool = False
    save_every: int = 500
    keep: int = 2
    log_every: int = 1
    validate_every: int = 100
    saturation: SaturationSettings = field(default_factory=SaturationSettings)
    probe: ProbeSettings | None = None
    baseline: Path | None = None
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            _at_least(name, getattr(self, name), least)
        if self.warmup_steps is not None:
            _at_least("warmup_steps", self.warmup_steps, 0)
        _one_of("scheduler", self.scheduler, SCHEDULERS)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must each be at least 0 and below 1")

    def warm_up(self) -> int:
        """The steps over which the learning rate rises."""
        return min(WARM_UP, self.steps // WARM_UP_SHARE) if self.warmup_steps is None else self.warmup_steps

    def as_dict(self) -> dict[str, Any]:
        """As run.json holds it: plain values, paths as text."""
        return plain(dataclasses.asdict(self))


LEAST = {
    "steps": 1,
    "batch": 1,
    "accumulate": 1,
    "keep": 1,
    "log_every": 1,
    "save_every": 0,
    "validate_every": 0,
    "clip": 0,
    "learning_rate": 0,
    "weight_decay": 0,
}


def read_config(source: Config | dict[str, Any] | Path | str, changes: tuple[str, ...] | list[str] = ()) -> Config:
    """A configuration from a YAML file or a dictionary; relative paths of a file are relative to its folder.

    changes  "key=value" or "section.key=value", read as YAML; paths in them are relative to the working folder
    raises   FileNotFoundError without the file; ValueError naming what is unknown, missing or of another type
    """
    if isinstance(source, Config):
        if not changes:
            return source
        source = source.as_dict()
    folder: Path | None = None
    if isinstance(source, dict):
        values: Any = _copy(source)
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file; give the configuration of a run, a YAML file")
        try:
            values = read_yaml(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path} is no YAML file: {error}") from None
        folder = path.parent
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds {type(values).__name__}, a configuration holds keys and values")
        values = _absolute(values, folder.resolve())
    for change in changes:
        set_value(values, change, read_yaml)
    try:
        return parse(Config, values, "", folder=Path.cwd())
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if folder is not None else str(error)) from None


PATHS = (
    ("model", "path"),
    ("data", "train"),
    ("data", "validation"),
    ("probe", "items"),
    ("tokenizer",),
    ("baseline",),
)


def _absolute(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The paths of a configuration file, from its folder."""
    for *parents, last in PATHS:
        here: Any = values
        for key in parents:
            here = here.get(key) if isinstance(here, dict) else None
        if not isinstance(here, dict) or last not in here:
            continue
        given = here[last]
        if isinstance(given, str):
            here[last] = str(folder / Path(given).expanduser())
        elif isinstance(given, list):
            here[last] = [str(folder / Path(item).expanduser()) if isinstance(item, str) else item for item in given]
    return values


def read_yaml(text: str) -> Any:
    """YAML, but 1e-5 is a number.

    raises   ValueError saying where the text is none; ImportError naming the extra, without PyYAML
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError("a configuration file needs PyYAML: pip install 'fp8kernels[train]'") from error

    class Loader(yaml.SafeLoader):
        """YAML 1.1 asks for a dot in a number with an exponent."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def plain(value: Any) -> Any:
    """Paths as text and tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is none of {', '.join(map(repr, known))}")


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
