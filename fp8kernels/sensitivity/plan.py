"""plan: what each layer of a model costs in a recipe, and the recipe that leaves the dearest ones alone."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from ..console import PIPED_WIDTH, console
from ..convert import Decision, decide
from ..convert.adapters import origin
from ..nn.step import layers
from ..recipe import Recipe, get_recipe
from .measure import Bench, Cost, Local, Loss, at_rest

METRICS = ("kl", "loss", "sqnr")
BUDGET = 0.05  # of the multiply-adds; a few layers are dear and the rest are not, so little buys most


@dataclass(frozen=True)
class Sensitivity:
    """One layer, alone in 8 bits; an attention module counts with its output projection.

    cost    what the ranking goes by: KL, loss difference, or noise over signal of the layer's output
    kl, loss_increase  of the model's outputs against the plain model's; None where they were not measured
    output_db, input_db, weight_db  SQNR of the layer's output, input and weight, the lowest over batches
    share   of the multiply-adds of all layers that the recipe converts; 0 if the layer was never called
    stays   whether the plan leaves it in high precision
    """

    layer: str
    cost: float
    kl: float | None
    loss_increase: float | None
    output_db: float | None
    input_db: float | None
    weight_db: float | None
    share: float
    stays: bool


@dataclass(frozen=True)
class Plan:
    """What `plan` found; prints as a table.

    recipe  for `convert`: the recipe that was asked for, with an override for every layer that stays as it is
    rows    the layers, the dearest first
    plain, all_8bit, proposed  loss and KL of the model without, with the recipe asked for, and with `recipe`
    """

    recipe: Recipe
    rows: tuple[Sensitivity, ...]
    metric: str
    plain: Cost
    all_8bit: Cost
    proposed: Cost

    @property
    def left(self) -> tuple[str, ...]:
        """The layers that stay in high precision."""
        return tuple(row.layer for row in self.rows if row.stays)

    @property
    def share(self) -> float:
        """The share of the multiply-adds that stays in high precision."""
        return math.fsum(row.share for row in self.rows if row.stays)

    def __rich__(self) -> Table:
        out = Table(
            title=f"{self.recipe.name}: {len(self.left)} of {len(self.rows)} layers ({self.share:.1%} of the "
            f"multiply-adds) stay in high precision",
            title_justify="left",
            caption="\n".join(
                f"{who}: loss {_number(cost.loss)}, KL {cost.kl:.3g}"
                for who, cost in (("plain", self.plain), ("all 8-bit", self.all_8bit), ("this plan", self.proposed))
            ),
            caption_justify="left",
        )
        for column in ("layer", "KL", "loss +", "output dB", "input dB", "weight dB", "share", "proposed"):
            out.add_column(column, justify="left" if column in ("layer", "proposed") else "right", overflow="fold")
        for row in self.rows:
            numbers = (row.kl, row.loss_increase, row.output_db, row.input_db, row.weight_db)
            said = "stays" if row.stays else "8-bit"
            style = "bold" if row.stays else None
            out.add_row(row.layer, *map(_number, numbers), f"{row.share:.1%}", said, style=style)
        return out

    def __str__(self) -> str:
        printer = Console(width=PIPED_WIDTH, color_system=None)
        with printer.capture() as capture:
            printer.print(self)
        return capture.get()


def plan(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe | str = "hif8-qat",
    *,
    budget: float = BUDGET,
    max_loss_increase: float | None = None,
    loss: Loss | None = None,
    metric: str = "kl",
    verbose: bool = True,
) -> Plan:
    """Rank the layers of a plain model by what each costs in a recipe, and propose which to leave in high precision.

    batches  inputs of the model: tensors, tuples, or mappings of keyword arguments; on the model's device
    recipe   a name or a Recipe; what it leaves in high precision is not looked at
    budget   the share of the multiply-adds that may stay in high precision, in [0, 1)
    max_loss_increase  instead of a budget: as few layers stay as keep the loss within that of the plain model plus this
    loss     (output, batch) -> scalar; None: the output's .loss, if it has one
    metric   what layers are ranked by. "kl" of the model's outputs and "loss": one forward per layer and batch, with
             that layer alone in 8 bits. "sqnr" of the layer's output: one forward per batch for all layers
    verbose  print the table
    returns  a Plan; `convert(model, plan.recipe)` carries it out
    raises   ValueError for a model that is converted already or where nothing can be, without batches, for a budget or
             metric out of range, and for a loss or output that is no number (naming layer and batch)

    Which layers stay is chosen by cost per multiply-add, the dearest first. The model is in eval mode meanwhile and is
    left as it was. Delayed and static scales have no history here and follow each tensor's own amax, so nothing needs
    calibration, and training adds the error of scales that lag behind. Warm-up is left out; fusions too, which change
    no number on a CPU. The plain outputs of all batches are kept in memory.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"plan takes a torch.nn.Module, this is {type(model).__name__}")
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: known are {', '.join(map(repr, METRICS))}")
    if not 0 <= budget < 1:
        raise ValueError(f"budget={budget} is a share of the multiply-adds, in [0, 1)")
    if max_loss_increase is not None and not max_loss_increase >= 0:
        raise ValueError(f"max_loss_increase={max_loss_increase} must be >= 0")
    if layers(model):
        raise ValueError("plan: the model is converted already; plan before convert, or call revert(model) first")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("plan: the model is on the meta device; give it weights first")
    batches = list(batches)
    if not batches:
        raise ValueError("plan: no batches; give it at least one input of the model")
    recipe = get_recipe(recipe)
    measured = _without_warmup(recipe)
    units = _units(decide(model, measured))

    with at_rest(model):
        bench = Bench(model, batches, loss)
        if bench.plain.loss is None and (metric == "loss" or max_loss_increase is not None):
            raise ValueError("plan: the outputs have no .loss; give loss=, a function (output, batch) -> scalar")
        local = bench.local(measured, [members[0] for members in units.values()])
        alone = {
            name: bench.cost(measured, {id(m) for m in members}, f"the model with {name or 'it'} in 8 bits")
            for name, members in units.items()
            if metric != "sqnr"
        }
        all_8bit = bench.cost(measured, None, "the model in 8 bits")
        total = sum(local[id(members[0])].macs for members in units.values())
        rows = [
            _row(name, local[id(members[0])], alone.get(name), bench.plain, metric, total)
            for name, members in units.items()
        ]
        overrides = {name: glob.escape(origin(model, name).name) for name in units}

        def leave(recipe: Recipe, names: list[str]) -> Recipe:
            return recipe.replace(overrides=(*((overrides[name], None) for name in names), *recipe.overrides))

        def cost(names: list[str]) -> Cost:
            if not names:
                return all_8bit
            return bench.plain if len(names) == len(units) else bench.cost(leave(measured, names), None, "the plan")

        order = sorted(rows, key=lambda row: row.cost / row.share if row.share else 0.0, reverse=True)
        if max_loss_increase is None:
            left = _within(order, budget)
        else:
            assert bench.plain.loss is not None
            left = _fewest([row.layer for row in order], bench.plain.loss + max_loss_increase, cost)
        proposed = cost(left)
    rows.sort(key=lambda row: row.cost, reverse=True)
    found = tuple(Sensitivity(**{**vars(row), "stays": row.layer in left}) for row in rows)
    out = Plan(leave(recipe, left), found, metric, bench.plain, all_8bit, proposed)
    if verbose:
        console().print(out)
    return out


def _units(decisions: list[Decision]) -> dict[str, list[nn.Module]]:
    """What is switched together, by name: attention goes past its output projection, so that follows it.

    raises   ValueError with the reasons if nothing can be converted
    """
    out: dict[str, list[nn.Module]] = {}
    inside: dict[int, str] = {}
    for decision in decisions:
        if decision.recipe is None:
            continue
        if isinstance(decision.module, nn.MultiheadAttention):
            inside[id(decision.module.out_proj)] = decision.name
        out.setdefault(inside.get(id(decision.module), decision.name), []).append(decision.module)
    if not out:
        reasons = "\n".join(f"  {d.name or '(the model)'}: {d.reason}" for d in decisions[:20])
        raise ValueError("plan: the recipe converts nothing in this model" + (f":\n{reasons}" if reasons else ""))
    return out


def _without_warmup(recipe: Recipe) -> Recipe:
    overrides = tuple(
        (name, _without_warmup(own) if isinstance(own, Recipe) else own) for name, own in recipe.overrides
    )
    return recipe.replace(warmup_steps=0, overrides=overrides)


def _row(name: str, local: Local, alone: Cost | None, plain: Cost, metric: str, total: int) -> Sensitivity:
    kl = None if alone is None else alone.kl
    increase = None if alone is None or alone.loss is None or plain.loss is None else alone.loss - plain.loss
    noise = 0.0 if local.output is None else 10.0 ** (-local.output / 10)  # power of the noise over the signal's
    cost = {"kl": kl, "loss": increase, "sqnr": noise}[metric]
    assert cost is not None
    return Sensitivity(
        name, cost, kl, increase, local.output, local.input, local.weight, local.macs / max(total, 1), stays=False
    )


def _within(order: list[Sensitivity], budget: float) -> list[str]:
    """Of the layers in this order, each that costs anything and still fits."""
    left, spent = [], 0.0
    for row in order:
        if row.cost > 0 and spent + row.share <= budget:
            left.append(row.layer)
            spent += row.share
    return left


def _fewest(names: list[str], most: float, cost: Any) -> list[str]:
    """As few of the first names as bring the loss down to `most`, by bisection: the loss falls with their number."""
    low, high = 0, len(names)  # with all of them the model is the plain one
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(names[:middle]).loss <= most else (middle + 1, high)
    return names[:low]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
