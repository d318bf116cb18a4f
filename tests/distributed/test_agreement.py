"""Who shares scales with whom, and what ranks are told that do not agree: one error on every rank, and nobody waits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from setups.models import batch, build
from setups.runs import FULL, QAT, converted, loss_of, same, sgd, state
from torch import nn

from distributed.plain import seed
from distributed.ranks import outcomes, run
from fp8kernels import commit, convert
from fp8kernels.nn.prepared import SHARES
from fp8kernels.nn.step import layers

PROMPT = 20.0  # seconds until every rank has its error: half of what a collective would wait


def disagree(rank: int, how: str) -> None:
    """The ranks convert one model in two ways."""
    other: dict[str, Any] = {}
    recipe = FULL
    if rank == 1:
        recipe = {
            "window": FULL.replace(window=5),
            "format": FULL.with_format(input="e4m3"),
            "override": FULL.with_override("*down_proj", None),
            "layer's recipe": FULL.with_override("*layers.1.mlp.up_proj", FULL.replace(margin=1)),
        }.get(how, FULL)
        if how == "filter":
            other = {"filter": lambda _, name: "layers.0" not in name}
    net = build("llama")
    convert(net, recipe, verbose=False, **other)
    loss_of(net, "llama", rank).backward()
    sgd(net).step()


WORDS = {
    "window": ["window=3 on rank 0", "window=5 on rank 1"],
    "format": ["fmt='hif8'", "on rank 0", "fmt='e4m3'", "on rank 1"],
    "override": ["down_proj", "is 8-bit on rank 0 and in high precision on rank 1"],
    "layer's recipe": ["layers.1.mlp.up_proj", "margin=0 on rank 0", "margin=1 on rank 1"],
    "filter": ["layers.0.", "is 8-bit on rank 0 and in high precision on rank 1"],
}


@pytest.mark.parametrize("how", WORDS)
def test_ranks_that_disagree(how: str) -> None:
    began = time.monotonic()
    errors = [each.error for each in outcomes(disagree, 2, how)]
    assert time.monotonic() - began < PROMPT
    assert errors[0] is not None and errors[0] == errors[1]
    assert errors[0].startswith("ValueError: commit: the ranks disagree")
    for words in WORDS[how]:
        assert words in errors[0], errors[0]


def one_of_four(rank: int) -> None:
    recipe = FULL.replace(window=4) if rank == 2 else FULL
    net = convert(build("llama"), recipe, verbose=False)
    loss_of(net, "llama", rank).backward()
    sgd(net).step()


def test_one_rank_of_four_disagrees() -> None:
    errors = {each.error for each in outcomes(one_of_four, 4)}
    (error,) = errors
    assert error is not None and "window=3 on rank 0" in error and "window=4 on rank 2" in error


def half_a_model(rank: int) -> list[tuple[str, torch.Tensor]]:
    """Rank 1 has a part of the model: what both have they share, and the rest is rank 0's."""
    net = build("llama")
    if rank == 1:
        del net.model.layers[1]
        net.config.num_hidden_layers = 1
    convert(net, FULL, fuse=False, verbose=False)
    loss_of(net, "llama", seed(0, rank, 0)).backward()
    before = [(layer.fp8_name, layer.fp8_pending.clone()) for layer in layers(net)]
    commit(net)
    after = [(layer.fp8_name, layer.fp8_history[:, 0].clone()) for layer in layers(net)]
    return [before, after]


def test_layers_that_one_rank_has() -> None:
    (seen_0, got_0), (seen_1, got_1) = [list(map(dict, each)) for each in run(half_a_model, 2)]
    assert len(got_0) == 2 * len(got_1) == 14
    for name, amax in got_0.items():
        want = torch.maximum(seen_0[name], seen_1[name]) if name in seen_1 else seen_0[name]
        assert torch.equal(amax, want), name
        if name in got_1:
            assert torch.equal(amax, got_1[name])


def on_its_own(rank: int) -> dict[str, torch.Tensor]:
    """A group of one rank: experts, or models that have nothing to do with each other."""
    alone = [dist.new_group([r]) for r in range(2)][rank]
    net = convert(build("llama"), FULL if rank == 0 else QAT.replace(window=2), group=alone, verbose=False)
    optimizer = sgd(net)
    for n in range(3):
        net(**batch("llama", seed(n, rank, 0))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return state(net)


def test_a_group_of_ones_own() -> None:
    got = run(on_its_own, 2)
    for rank, recipe in enumerate((FULL, QAT.replace(window=2))):
        torch.set_num_threads(1)
        net = converted("llama", recipe)
        optimizer = sgd(net)
        for n in range(3):
            net(**batch("llama", seed(n, rank, 0))).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        same(got[rank], state(net))


def two_groups(rank: int) -> dict[str, torch.Tensor]:
    """Four ranks in two groups: the same model in both, and scales are each group's."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    net = convert(build("llama"), FULL, group=groups[rank % 2], verbose=False)
    loss_of(net, "llama", seed(0, rank, 0)).backward()
    commit(net)
    return state(net)


def test_groups() -> None:
    got = run(two_groups, 4)
    for a, b in ((0, 2), (1, 3)):
        same(got[a], got[b], but=("fp8_counters",))
    assert any(not torch.equal(got[0][key], got[1][key]) for key in got[0] if key.endswith("fp8_scale"))


def several(rank: int) -> list[dict[str, torch.Tensor]]:
    """One optimizer for several models, which were made in another order on each rank and converted in one."""
    count = 6
    made = {index: nn.Linear(8, 8) for index in (range(count) if rank == 0 else reversed(range(count)))}
    nets = [made[index] for index in range(count)]
    for index, net in enumerate(nets):
        nn.init.constant_(net.weight, 0.5 + index)
        convert(net, FULL, verbose=False)
    optimizer = torch.optim.SGD([p for net in nets for p in net.parameters()], lr=0.0)
    for n in range(2):
        for index, net in enumerate(nets):
            x = torch.full((2, 8), 1.0 + 10 * index + (n if rank == 0 else -n))
            net(x).sum().backward()
        optimizer.step()
    return [state(net) for net in nets]


def test_several_models_in_one_optimizer() -> None:
    for index, (a, b) in enumerate(zip(*run(several, 2), strict=True)):
        same(a, b, but=("fp8_counters",))
        assert a["fp8_history"][0].tolist() == [2.0 + 10 * index, 1.0 + 10 * index, 0.0]


def met_again(rank: int, folder: str) -> list[tuple[float, list[list[int]]]]:
    """Ranks 0 and 1 hold one stage, rank 2 another, in two worlds one after the other."""
    seen = []
    for world in range(2):
        if world:
            dist.barrier()
            dist.destroy_process_group()
            dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=3)
        torch.manual_seed(rank // 2)
        net = convert(nn.Linear(8, 8), QAT, verbose=False)
        net(torch.full((2, 8), 1.0 + rank))
        commit(net)
        groups = [dist.get_process_group_ranks(share.group) for share in net.__dict__[SHARES][1]]
        seen.append((float(net.fp8_history[0, 0]), groups))
    return seen


def test_a_process_group_made_anew(tmp_path: Path) -> None:
    """Groups are those of one initialised torch.distributed, and end with it: a destroyed one has no ranks any more."""
    pair, alone = [(2.0, [[0, 1]])] * 2, [(3.0, [])] * 2
    assert run(met_again, 3, str(tmp_path)) == [pair, pair, alone]


def idle(rank: int) -> None:
    """Rank 1 trains nothing, and comes to an end."""
    if rank == 0:
        net = convert(build("llama"), FULL, verbose=False)
        loss_of(net, "llama", 0).backward()
        sgd(net).step()


def test_a_rank_that_does_not_commit() -> None:
    first, _ = outcomes(idle, 2, limit=9)
    assert first.error is not None and "rank 0 waited for ranks [1]" in first.error
    assert "convert(model, group=" in first.error
