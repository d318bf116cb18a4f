"""What is evaluated: a run or a model's folder, and the precision in which it answers."""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..convert import convert
from ..export.layout import MANIFEST, file_stamp
from ..nn.step import commit, layers
from ..recipe import Recipe, get_recipe
from ..runs import Run
from ..runs.folder import INFO
from ..runs.precision import RECIPE, recipe_of

MODEL = "model"  # the folder of the trained model in a run's folder
FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")  # weights, config, tokenizer: what answers depend on
PIECES = 32  # pieces of a calibration file that set the scales
PIECE = 512  # tokens of one


@dataclass(frozen=True)
class Subject:
    """A model to be asked.

    path       as it was given
    folder     where its config, weights and tokenizer are
    run        the run it comes from
    recipe     None: as it stands, without 8-bit layers
    trained    whether the run was trained with that recipe, so that its scales come with its weights
    calibrate  a text file that sets delayed scales that do not
    """

    path: Path
    folder: Path
    run: Run | None
    recipe: Recipe | None
    trained: bool = False
    calibrate: Path | None = None

    @property
    def precision(self) -> str:
        """In words, for tables."""
        if self.recipe is None:
            return "bf16"
        how = "as trained" if self.trained else f"scales from {self.calibrate.name}" if self.calibrate else ""
        return f"{self.recipe.name}, {how}".removesuffix(", ")

    @property
    def as_trained(self) -> bool:
        """Whether a run answers in the precision that it was trained in."""
        return (_trained_with(self.folder) is not None) == self.trained and (self.trained or self.recipe is None)

    @functools.cached_property
    def key(self) -> str:
        """Hash of everything that its answers depend on."""
        stamps = [(path.name, *file_stamp(path)) for path in _files(self.folder)]
        text = file_stamp(self.calibrate) if self.calibrate else None
        return hashlib.sha256(repr((stamps, self.recipe, text)).encode()).hexdigest()

    def load(self) -> tuple[Any, Any]:
        """The model, in eval mode and with 8-bit layers where the recipe says so, and its tokenizer.

        raises   ValueError, FileNotFoundError naming what the folder lacks; ImportError where transformers is absent
        """
        from ..integrations.trained import load_trained

        model, tokenizer = load_trained(self.folder, eight_bit=self.trained)
        if torch.cuda.is_available():
            model.cuda()
        if self.recipe is not None and not self.trained:
            convert(model, self.recipe, verbose=False)
            if self.calibrate is not None:
                _calibrate(model, tokenizer, self.calibrate)
        if self.trained:
            warn_of_cold_layers(model, self.folder)
        return model.eval().requires_grad_(False), tokenizer


def open_subject(
    path: Path | str,
    *,
    fmt: str | None = None,
    recipe: Recipe | str | None = None,
    calibrate: Path | str | None = None,
) -> Subject:
    """A run answers as it was trained, a plain folder without 8-bit layers, unless something else is asked for.

    fmt        "bf16": without 8-bit layers, also a run that was trained with them
    recipe     8-bit layers for a model that was not trained with them
    calibrate  text that sets that recipe's delayed scales
    raises     FileNotFoundError, ValueError saying what is missing and how to get it
    """
    path = Path(path)
    if fmt not in (None, "bf16"):
        raise ValueError(f"format={fmt!r}: known is 'bf16', which leaves the 8-bit layers out")
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; give a run's, or a model's that save_pretrained wrote")
    home = path.parent if path.name == MODEL and (path.parent / INFO).is_file() else path
    run = Run.open(home) if (home / INFO).is_file() else None
    folder = path if run is None else home / MODEL
    if run is not None and not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is missing: the run {run.info.get('name')!r} is {run.info.get('status')!r} and has not saved "
            f"its model; go on with `fp8kernels train llm … --out {path} --resume`"
        )
    if (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} is a checkpoint for serving ({MANIFEST}): evaluate its run, or the model that it was made of"
        )
    trained = _trained_with(folder)
    if fmt is not None:
        if recipe is not None:
            raise ValueError("format='bf16' leaves 8-bit layers out, and a recipe asks for them; give one of them")
        return Subject(path, folder, run, None)
    if recipe is None:
        return Subject(path, folder, run, trained, trained=trained is not None)
    if trained is not None:
        raise ValueError(f"{path} was trained with {trained.name!r} and is evaluated with it; leave the recipe out")
    wanted = get_recipe(recipe).replace(warmup_steps=0)
    if not _is_delayed(wanted):
        return Subject(path, folder, run, wanted)
    if calibrate is None:
        raise ValueError(
            f"recipe {wanted.name!r} keeps scales from step to step, and {path} has none: give text that sets them "
            f"(calibrate=FILE, --calibrate FILE)"
        )
    if not Path(calibrate).is_file():
        raise FileNotFoundError(f"calibration text {calibrate} is not a file")
    return Subject(path, folder, run, wanted, calibrate=Path(calibrate))


def _trained_with(folder: Path) -> Recipe | None:
    """What a run writes beside its weights: the recipe that its scales belong to."""
    path = folder / RECIPE
    if not path.is_file():
        return None
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        recipe = recipe_of(entry["recipe"], entry["recipe_changes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not say how the model was trained: {error}") from None
    return None if recipe is None else recipe.frozen()


def autocast_dtype(model: Any) -> torch.dtype | None:
    """BF16 where weights are kept in FP32: matrix products then run as they did in training. Else None."""
    return torch.bfloat16 if model.dtype == torch.float32 else None


def _is_delayed(recipe: Recipe) -> bool:
    everywhere = (recipe, *(other for _, other in recipe.overrides if isinstance(other, Recipe)))
    return any(r.scaling != "current" for one in everywhere for r in (one.input, one.weight))


def _files(folder: Path) -> list[Path]:
    return sorted(path for pattern in FILES for path in folder.glob(pattern))


@torch.no_grad()
def _calibrate(model: Any, tokenizer: Any, path: Path) -> None:
    """Let the 8-bit layers (and they alone: no dropout) note what the text holds, then make scales of it."""
    ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]  # [L]
    if not len(ids):
        raise ValueError(f"calibration text {path} is empty")
    for layer in layers(model):
        layer.train()
    dtype = autocast_dtype(model)
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
        for piece in ids.split(PIECE)[:PIECES]:
            model(piece[None].to(model.device))
    commit(model)


def warn_of_cold_layers(model: Any, folder: Path) -> None:
    """A warning if layers that the recipe makes 8-bit compute in high precision all the same."""
    found = layers(model)
    cold = [layer.fp8_name for layer in found if not layer.fp8_on]
    if cold:
        warnings.warn(
            f"{folder}: {len(cold)} of {len(found)} 8-bit layers compute in high precision ({cold[0]} …): the run "
            f"ended within its warm-up, or they had fallen back; what is measured is not 8 bits throughout",
            stacklevel=3,
        )
