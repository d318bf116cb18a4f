"""Distributed checkpoints: two ranks to four and to one, plain models and back, and a run that was killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from setups.models import batch, build
from setups.runs import FULL, converted, loss_of, same, sgd
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from distributed.plain import RANKS_OWN, mean, one_thread, seed
from distributed.ranks import outcomes, run
from distributed.test_fully_sharded import shard, whole
from fp8kernels import convert, without_state

BEFORE, AFTER = 3, 3  # steps until the checkpoint, and from it on


def make(kind: str, *, other: bool = False) -> Any:
    """A converted model as one rank has it; `other` begins with other weights, which a checkpoint replaces."""
    net = convert(build("llama", seed=int(other)), FULL, verbose=False)
    return shard(net) if kind == "fsdp" else net


def save(net: Any, optimizer: Any, path: str) -> None:
    model, optim = get_state_dict(net, optimizer)
    dcp.save({"model": model, "optim": optim}, checkpoint_id=path)


def load(net: Any, optimizer: Any, path: str) -> None:
    model, optim = get_state_dict(net, optimizer)
    state = {"model": model, "optim": optim}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])


def steps(net: Any, optimizer: Any, rank: int, first: int, count: int) -> list[float]:
    losses = []
    for n in range(first, first + count):
        loss = net(**batch("llama", seed(n, rank, 0))).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def parallel(kind: str, net: Any) -> Any:
    return DistributedDataParallel(net) if kind == "ddp" else net


def first_run(rank: int, kind: str, path: str) -> tuple[dict[str, Any], list[float], dict[str, Any]]:
    """Saves in the middle and goes on: what was saved, and how it went on."""
    net = make(kind)
    forward, optimizer = parallel(kind, net), sgd(net)
    steps(forward, optimizer, rank, 0, BEFORE)
    save(net, optimizer, path)
    saved = {key: value.clone() for key, value in whole(net).items()}
    losses = steps(forward, optimizer, rank, BEFORE, AFTER)
    return saved, losses, whole(net)


def resumed(rank: int, kind: str, path: str) -> tuple[dict[str, Any], list[float], dict[str, Any]]:
    """Another process: what it has loaded, and how it goes on."""
    net = make(kind, other=True)
    forward, optimizer = parallel(kind, net), sgd(net)
    load(net, optimizer, path)
    loaded = {key: value.clone() for key, value in whole(net).items()}
    losses = steps(forward, optimizer, rank, BEFORE, AFTER)
    return loaded, losses, whole(net)


def alone(path: str, ranks: int) -> tuple[dict[str, Any], list[list[float]], dict[str, Any]]:
    """The same in one process without torch.distributed, which does in turn what `ranks` ranks do."""
    with one_thread():
        net = make("plain", other=True)
        optimizer, params = sgd(net), list(net.parameters())
        load(net, optimizer, path)
        loaded = {key: value.clone() for key, value in net.state_dict().items()}
        losses: list[list[float]] = [[] for _ in range(ranks)]
        for n in range(BEFORE, BEFORE + AFTER):
            grads = []
            for rank in range(ranks):
                loss = loss_of(net, "llama", seed(n, rank, 0))
                loss.backward()
                losses[rank].append(float(loss.detach()))
                grads.append([p.grad for p in params])
                optimizer.zero_grad()
            for p, g in zip(params, mean(grads), strict=True):
                p.grad = g
            optimizer.step()
            optimizer.zero_grad()
    return loaded, losses, net.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_two_ranks_to_four_and_one(kind: str, tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    first = run(first_run, 2, kind, path)
    saved = first[0][0]
    assert all(value.any() for key, value in saved.items() if key.endswith(("fp8_scale", "fp8_step")))

    again = run(resumed, 2, kind, path)
    for (_, losses, end), (loaded, got, got_end) in zip(first, again, strict=True):
        same(loaded, saved, but=RANKS_OWN)
        assert got == losses
        same(got_end, end, but=RANKS_OWN)

    loaded, one, end = alone(path, 2)
    same(loaded, saved, but=RANKS_OWN)
    assert one == [losses for _, losses, _ in first]
    same(end, first[0][2], but=RANKS_OWN)

    four = run(resumed, 4, "fsdp", path)
    scales = {key for key in saved if ".fp8_" in key}
    for loaded, _, end in four:
        same(loaded, saved, but=RANKS_OWN)
        same({key: end[key] for key in scales}, {key: four[0][2][key] for key in scales}, but=RANKS_OWN)
    _, losses, _ = alone(path, 4)
    assert [each[0] for each in losses] == [got[0] for _, got, _ in four]  # later ones: four shards add up in any order


def plain_and_back(rank: int, path: str) -> dict[str, Any]:
    """A plain model's checkpoint into a converted one; a converted one's into a plain model."""
    out: dict[str, Any] = {}
    plain = shard(build("llama"))
    dcp.save({"model": get_model_state_dict(plain)}, checkpoint_id=f"{path}/plain")
    net = make("fsdp", other=True)
    state = without_state(get_model_state_dict(net))
    dcp.load({"model": state}, checkpoint_id=f"{path}/plain")
    set_model_state_dict(net, state, options=StateDictOptions(strict=False))
    out["converted"] = whole(net)
    optimizer = sgd(net)
    out["losses"] = steps(net, optimizer, rank, 0, 2)
    dcp.save({"model": get_model_state_dict(net)}, checkpoint_id=f"{path}/converted")
    out["trained"] = whole(net)
    back = shard(build("llama", seed=1))
    state = get_model_state_dict(back)
    dcp.load({"model": state}, checkpoint_id=f"{path}/converted")
    set_model_state_dict(back, state)
    out["back"] = whole(back)
    full = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    third = make("fsdp", other=True)
    boxed = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    set_model_state_dict(third, boxed, options=full)
    out["full"] = whole(third)
    return out


def test_plain_checkpoints(tmp_path: Path) -> None:
    fresh = build("llama").state_dict()
    with one_thread():
        net = converted("llama")
    for rank, got in enumerate(run(plain_and_back, 2, str(tmp_path))):
        same(without_state(got["converted"]), fresh)
        assert not any(value.any() for key, value in got["converted"].items() if ".fp8_" in key)
        assert got["losses"][0] == float(loss_of(net, "llama", seed(0, rank, 0)).detach())
        same(got["back"], without_state(got["trained"]))
        same(got["full"], got["trained"], but=RANKS_OWN)


def killed(rank: int, path: str, when: str) -> None:
    """Saves after every step, until rank 1 is killed."""
    net = make("fsdp")
    optimizer = sgd(net)
    for n in range(BEFORE + 2):
        loss = net(**batch("llama", seed(n, rank, 0))).loss
        if n == BEFORE and when == "between forward and backward" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        loss.backward()
        if n == BEFORE and when == "before the commit" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()
        if n == BEFORE and when == "while the others save" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        save(net, optimizer, f"{path}/{n}")


@pytest.mark.parametrize("when", ["between forward and backward", "before the commit", "while the others save"])
def test_a_killed_run(when: str, tmp_path: Path) -> None:
    """The checkpoint before is whole, and a run from it goes on as if nothing had happened."""
    survivor, dead = outcomes(killed, 2, str(tmp_path), when)
    assert dead.error == "ended by SIGKILL"
    assert survivor.error is not None
    whole_ones = sorted(path.parent.name for path in tmp_path.glob("*/.metadata"))
    assert whole_ones == [str(n) for n in range(BEFORE)]
    first = run(first_run, 2, "fsdp", str(tmp_path / "undisturbed"))
    again = run(resumed, 2, "fsdp", str(tmp_path / str(BEFORE - 1)))
    for (saved, losses, end), (loaded, got, got_end) in zip(first, again, strict=True):
        same(loaded, saved, but=RANKS_OWN)
        assert got == losses
        same(got_end, end, but=RANKS_OWN)
