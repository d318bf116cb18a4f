"""Everything that a run needs before its first step, checked in the order of what is cheap to find out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ...probe.items import Item, read_items
from ...recipe import Recipe
from ...runs.precision import recipe_of
from ...telemetry.saturation import SaturationWatch
from .arguments import shards, training_arguments
from .blocks import Blocks
from .config import Config
from .data import Data, load_data
from .documents import read_documents
from .labels import check_shift
from .order import Ordered
from .progress import tell
from .ranks import world
from .start import add_adapters, build_plain, make_eight_bit
from .watch import saturation_watch

SHIFT_ROWS = 1  # sequences that the label shift is checked on


@dataclass
class Prepared:
    """A run that may begin.

    layers  the names of the 8-bit layers
    items   of the probe
    watch   the detector of saturation, on the model already
    use_cache  what the model's config says of keys and values in generation; off while training
    """

    config: Config
    recipe: Recipe | None
    arguments: Any
    train: Ordered
    model: Any
    tokenizer: Any
    data: Data
    layers: list[str]
    items: list[Item]
    watch: SaturationWatch | None
    use_cache: bool

    def reports(self) -> dict[str, Any]:
        """What the data are, for run.json."""
        parts: dict[str, Blocks | None] = {"train": self.data.train, "validation": self.data.validation}
        return {name: dataclasses.asdict(part.report) for name, part in parts.items() if part is not None}

    def parameters(self) -> dict[str, int]:
        """How many numbers the model has, and how many of them are trained."""
        parameters = list(self.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        return {"all": sum(p.numel() for p in parameters), "trained": trained, "eight_bit_layers": len(self.layers)}


def prepare(config: Config, staging: Path) -> Prepared:
    """Load the model and the data, convert, and lay out the run's order.

    staging  where the trainer will write
    raises   FileNotFoundError, ValueError or ImportError with the way out; nothing has been written then
    """
    recipe = recipe_of(config.recipe, config.recipe_changes)
    check_warm_up(recipe, config.steps)
    if config.fsdp and config.lora:
        raise ValueError(
            "lora with fsdp: adapters are merged after training, over shards that is not done; set one of them"
        )
    items = read_items(config.probe.items) if config.probe else []
    if config.probe and config.probe.policy == "fallback" and recipe is None:
        raise ValueError("probe.policy='fallback' needs 8-bit layers to fall back from, and recipe is null")
    arguments = training_arguments(config, staging, validates=bool(config.data.validation or config.data.hold_out))
    if config.fsdp and not shards(arguments):
        raise ValueError(
            f"fsdp: accelerate does not shard over {world()} process(es) on {arguments.device.type}. Start several on "
            "GPUs, with torchrun --nproc-per-node=… or accelerate launch, or set fsdp: false"
        )
    model, tokenizer = build_plain(config, lambda: _texts(config))
    use_cache, model.config.use_cache = getattr(model.config, "use_cache", True), False
    data = load_data(
        config.data.train,
        tokenizer,
        sequence=config.data.sequence,
        validation=config.data.validation,
        hold_out=config.data.hold_out,
        text_field=config.data.text_field,
        packing=config.data.packing,
        too_long=config.data.too_long,  # type: ignore[arg-type]
        context=getattr(model.config, "max_position_embeddings", None),
        vocab=model.get_input_embeddings().weight.shape[0],
    )
    tell(f"training on {data.train.report}")
    order = Ordered(data.train, config.steps * config.accumulate * config.batch * world(), seed=config.seed)
    rows = [data.train[index]["input_ids"] for index in range(SHIFT_ROWS)]
    check_shift(model, nn.utils.rnn.pad_sequence(rows, batch_first=True))
    layers = make_eight_bit(model, recipe)
    model = add_adapters(model, config.lora)
    watch = saturation_watch(model, config.saturation)
    return Prepared(config, recipe, arguments, order, model, tokenizer, data, layers, items, watch, use_cache)


def check_warm_up(recipe: Recipe | None, steps: int) -> None:
    """Whether a run of so many steps computes anything in 8 bits.

    raises   ValueError if the recipe's warm-up lasts as long as the run
    """
    if recipe is not None and recipe.warmup_steps >= steps:
        raise ValueError(
            f"steps={steps} end within the {recipe.warmup_steps} warm-up steps of recipe {recipe.name!r}, in which "
            "layers compute in high precision: nothing would be trained in 8 bits. Set more steps, or "
            "recipe_changes.warmup_steps"
        )


def _texts(config: Config) -> list[str]:
    """The training texts, for a tokenizer that is learnt from them."""
    documents = read_documents(list(config.data.train), config.data.text_field)
    return [document.text for document in documents if document.text]
