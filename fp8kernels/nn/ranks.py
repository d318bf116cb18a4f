"""Which ranks share the scales of which layers, found out once, at the first commit with torch.distributed running.

Ranks that hold the same layers (data parallel, FSDP, HSDP) share all scales, ranks that hold different ones (pipeline
stages, experts) share none, and those whose weights are shards of one DTensor (tensor parallel) belong together. A
layer is the same where its name, its shape and the amax of its weight are: stages whose layers have the same local
names stay apart by the last. What each rank holds goes through the store that the process group has anyway, so that
ranks with different lists cannot wait for each other in a collective of different sizes: they all raise the same error.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store

from ..recipe import Recipe
from ..scaling.delayed import WEIGHT
from .dtensor import is_dtensor
from .state import ScaledLayer


class Held(NamedTuple):
    """One layer as a rank describes it; `amax` is 0 where the weight was not seen in this step."""

    name: str
    shape: tuple[int, ...]
    recipe: dict[str, str]
    amax: float


class Member(NamedTuple):
    """What a rank holds: its 8-bit layers, those that it left as they were, the ranks of its DTensors' meshes."""

    layers: list[Held]
    plain: list[tuple[str, tuple[int, ...]]]
    meshes: list[list[int]]


class Share(NamedTuple):
    """Layers, by their place in the list, that are reduced over one group of ranks."""

    indices: list[int]
    group: Any


class World:
    """What goes with one initialised torch.distributed: how often ranks have met, and the groups that were made."""

    def __init__(self, whole: Any) -> None:
        self.whole = whole  # its group of all ranks
        self.meetings: Counter[tuple[int, ...]] = Counter()
        self.groups: dict[tuple[int, ...], Any] = {}


_world = World(None)


def world() -> World:
    """That of now; a process group that was destroyed and made anew is another world, with a store of its own."""
    global _world
    whole = torch.distributed.group.WORLD
    if _world.whole is not whole:
        _world = World(whole)
    return _world


def shares(found: Sequence[ScaledLayer], owner: nn.Module | None, group: Any) -> list[Share] | None:
    """Over which ranks each layer's amax is reduced; layers that no other rank has are left out.

    None where no rank has seen a weight yet, as when an optimizer steps to make its state: nothing tells layers of one
    name apart then, and there is nothing to reduce.

    group    the ranks that may have to do with each other; None is all
    raises   ValueError, on every rank, where two ranks hold the same layer with different recipes, or one of them left
             it in high precision; RuntimeError where a rank does not commit within the process group's timeout
    """
    distributed = torch.distributed
    ranks = tuple(distributed.get_process_group_ranks(group or distributed.group.WORLD))
    members = meet(describe(found, owner), ranks)
    if not any(held.amax for member in members.values() for held in member.layers):
        return None
    sets = who_shares(members, distributed.get_rank())
    out: dict[tuple[int, ...], list[int]] = {}
    for index, together in enumerate(sets):
        if len(together) > 1:
            out.setdefault(together, []).append(index)
    return [Share(indices, _group(together, ranks, group)) for together, indices in sorted(out.items())]


def describe(found: Sequence[ScaledLayer], owner: nn.Module | None) -> Member:
    """What this rank holds."""
    amax = torch.stack([layer.fp8_pending[WEIGHT].float() for layer in found]).tolist()
    held = [
        Held(layer.fp8_name, _shape(layer), recipe_key(layer.fp8_recipe), seen)
        for layer, seen in zip(found, amax, strict=True)
    ]
    meshes = {ranks for layer in found for p in layer.parameters(recurse=False) if (ranks := mesh_ranks(p))}
    plain = []
    if owner is not None:
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
        plain = [
            (name, _shape(module))
            for name, module in owner.named_modules()
            if isinstance(module, kinds) and not isinstance(module, ScaledLayer)
        ]
    return Member(held, plain, sorted(map(list, meshes)))


def mesh_ranks(x: Any) -> tuple[int, ...] | None:
    """The ranks over which a DTensor lies, or None for any other tensor."""
    return tuple(sorted(x.device_mesh.mesh.flatten().tolist())) if is_dtensor(x) else None


def recipe_key(recipe: Recipe) -> dict[str, str]:
    """What a recipe says, field by field, in words that are the same on every rank; its name says nothing."""
    words = {field.name: repr(getattr(recipe, field.name)) for field in fields(recipe) if field.name != "name"}
    if callable(recipe.algorithm):
        words["algorithm"] = recipe.algorithm.__qualname__
    return words


def meet(own: Member, ranks: tuple[int, ...]) -> dict[int, Member]:
    """What every one of the ranks holds, through the default store; equal descriptions are read once."""
    store, rank, meetings = _get_default_store(), torch.distributed.get_rank(), world().meetings
    meetings[ranks] += 1
    prefix = f"fp8kernels/{hashlib.sha256(str(ranks).encode()).hexdigest()[:16]}/{meetings[ranks]}"
    text = json.dumps(own)
    digest = hashlib.sha256(text.encode()).hexdigest()
    store.set(f"{prefix}/text/{digest}", text)
    store.set(f"{prefix}/{rank}", digest)
    keys = {r: f"{prefix}/{r}" for r in ranks}
    try:
        store.wait(list(keys.values()))
    except Exception as error:
        missing = [r for r, key in keys.items() if not store.check([key])]
        if not missing:
            raise
        raise RuntimeError(
            f"commit: rank {rank} waited for ranks {missing} until the process group's timeout: they committed "
            f"nothing. Every rank with 8-bit layers must step an optimizer; else name those that do: "
            f"convert(model, group=…)"
        ) from error
    digests = {r: store.get(key).decode() for r, key in keys.items()}
    read = {d: _member(json.loads(store.get(f"{prefix}/text/{d}"))) for d in set(digests.values())}
    return {r: read[d] for r, d in digests.items()}


def _member(parsed: list[Any]) -> Member:
    held = [Held(name, tuple(shape), recipe, amax) for name, shape, recipe, amax in parsed[0]]
    return Member(held, [(name, tuple(shape)) for name, shape in parsed[1]], parsed[2])


def who_shares(members: dict[int, Member], rank: int) -> list[tuple[int, ...]]:
    """For each layer of a rank, the ranks that hold the same one.

    raises   ValueError where ranks disagree; the words do not depend on the rank
    """
    team = _teams(members)
    leaders = sorted(set(team.values()))
    same = {(a, b): _common(members[a], members[b]) for a, b in _pairs(leaders)}
    for (a, b), names in same.items():
        if names:
            _agree(a, members[a], b, members[b])
    out = []
    for held in members[rank].layers:
        mine = {team[rank]}
        for (a, b), names in same.items():
            if held.name in names and team[rank] in (a, b):
                mine |= {a, b}
        out.append(tuple(sorted(r for r, leader in team.items() if leader in mine)))
    return out


def _teams(members: dict[int, Member]) -> dict[int, int]:
    """Rank -> the first of the ranks that hold all the same layers as it, or shards of them."""
    leader = {rank: rank for rank in members}

    def find(rank: int) -> int:
        while leader[rank] != rank:
            rank = leader[rank]
        return rank

    def join(a: int, b: int) -> None:
        a, b = sorted((find(a), find(b)))
        leader[b] = a

    first: dict[int, int] = {}  # descriptions that are one object are equal
    for rank, member in members.items():
        join(rank, first.setdefault(id(member), rank))
        for mesh in member.meshes:
            for other in mesh:
                if other in members:
                    join(rank, other)
    distinct = list(first.values())
    for a, b in _pairs(distinct):
        if find(a) != find(b) and _equal(members[a], members[b]):
            join(a, b)
    out = {rank: find(rank) for rank in members}
    for rank, head in out.items():
        if members[rank] is not members[head]:
            _agree(head, members[head], rank, members[rank])
    return out


def _equal(a: Member, b: Member) -> bool:
    """Whether two ranks hold the same layers; a weight that one of them has not seen in this step may be any."""
    return len(a.layers) == len(b.layers) and all(
        x[:3] == y[:3] and _same_weight(x, y) for x, y in zip(a.layers, b.layers, strict=True)
    )


def _same_weight(x: Held, y: Held) -> bool:
    return x.amax == y.amax or 0 in (x.amax, y.amax)


def _common(a: Member, b: Member) -> set[str]:
    """The names of the layers that two ranks have in common.

    Layers of the same name and shape, whose weights have the same amax, are the same layer
    """
    theirs = {held.name: held for held in b.layers}
    pairs = [(held, theirs[held.name]) for held in a.layers if held.name in theirs]
    return {x.name for x, y in pairs if x.shape == y.shape and x.amax == y.amax != 0}


def _pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    return [(a, b) for i, a in enumerate(ranks) for b in ranks[i + 1 :]]


def _agree(a: int, first: Member, b: int, second: Member) -> None:
    """raises ValueError where two ranks that hold the same layers differ in what is 8-bit, or how."""
    disagreement = difference(a, first, b, second)
    if disagreement is not None:
        raise ValueError(
            f"commit: the ranks disagree: {disagreement}. Convert the model on every rank with the same recipe and "
            f"filter; ranks that are to keep scales of their own get a group of their own: convert(model, group=…)"
        )


def difference(a: int, first: Member, b: int, second: Member) -> str | None:
    """What two ranks that hold the same layers disagree on, in words, or None."""
    mine, theirs = ({held.name: held for held in member.layers} for member in (first, second))
    for name in sorted(mine.keys() & theirs.keys()):
        one, two = mine[name].recipe, theirs[name].recipe
        for key in sorted(one.keys() | two.keys()):
            if one.get(key) != two.get(key):
                return f"layer {name!r} has {key}={one.get(key)} on rank {a} and {key}={two.get(key)} on rank {b}"
    for has, lacks, of, member in ((mine, theirs, (a, b), second), (theirs, mine, (b, a), first)):
        plain = dict(member.plain)
        for name in sorted(has.keys() - lacks.keys()):
            if plain.get(name) == has[name].shape:
                return f"layer {name!r} is 8-bit on rank {of[0]} and in high precision on rank {of[1]}"
    return None


def _shape(layer: nn.Module) -> tuple[int, ...]:
    weight = getattr(layer, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


def _group(together: tuple[int, ...], ranks: tuple[int, ...], group: Any) -> Any:
    """A process group of these ranks: the one that was given where it is that, else one made once."""
    if together == tuple(sorted(ranks)):
        return group
    groups = world().groups
    if together not in groups:
        groups[together] = torch.distributed.new_group(list(together), use_local_synchronization=True)
    return groups[together]
