"""FSDP2 and HSDP: weights are shards between forwards, gradients are reduced and scattered, scales are everyone's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from setups.models import batch, build
from setups.runs import FULL, converted, same, sgd
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from distributed.plain import RANKS_OWN, STEPS, Run, held, locally_first, plain, ranks_first, seed
from distributed.ranks import run
from fp8kernels import convert
from fp8kernels.scaling.delayed import WEIGHT

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(net: Any, mesh: Any = None) -> Any:
    """Each block, then the rest."""
    for block in net.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def whole(net: nn.Module) -> dict[str, Any]:
    """The full state on every rank; FSDP gives it to rank 0 alone."""
    boxes = [get_model_state_dict(net, options=WHOLE)]
    own = {key: value.clone() for key, value in net.state_dict().items() if ".fp8_" in key}
    dist.broadcast_object_list(boxes, src=0)
    return boxes[0] | own


def train(net: Any, rank: int, micro: int = 1, *, no_sync: bool = False) -> Run:
    out, optimizer = Run(), sgd(net)
    for n in range(STEPS):
        for m in range(micro):
            net.set_requires_gradient_sync(not no_sync or m == micro - 1)
            loss = net(**batch("llama", seed(n, rank, m))).loss
            loss.backward()
            out.losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    out.state = whole(net)
    return out


def accumulate(rank: int, micro: int, order: str, dtype: torch.dtype = torch.float32) -> Run:
    return train(shard(converted("llama").to(dtype)), rank, micro, no_sync=order == "no_sync")


def mixed(rank: int) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Weights in fp32 of which layers see bf16: for each step the weights before it, and the state after it."""
    policy, net, out = MixedPrecisionPolicy(torch.bfloat16, torch.float32), converted("llama"), []
    for block in net.model.layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(net, mp_policy=policy)
    optimizer = sgd(net)
    for n in range(STEPS):
        before = whole(net)
        net(**batch("llama", seed(n, rank, 0))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append((before, whole(net)))
    return out


def recompute(rank: int) -> Run:
    net = converted("llama")
    for index, block in enumerate(net.model.layers):
        net.model.layers[index] = checkpoint_wrapper(block)
    return train(shard(net), rank)


def from_meta(rank: int, converts: str) -> Run:
    """The model is made and converted without storage, sharded, and only then gets memory and weights."""
    source = build("llama").state_dict()
    with torch.device("meta"):
        net = build("llama")
        if converts == "before":
            convert(net, FULL, verbose=False)
    shard(net)
    if converts == "sharded":
        convert(net, FULL, verbose=False)
    net.to_empty(device="cpu")
    net.model.rotary_emb.__init__(net.config)  # its frequencies are in no checkpoint
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(net, source if rank == 0 else {}, options=options)
    return train(net, rank)


def after_sharding(rank: int) -> Run:
    """convert on a model that FSDP has sharded."""
    return train(convert(shard(build("llama")), FULL, verbose=False), rank)


def hybrid(rank: int) -> Run:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return train(shard(converted("llama"), mesh), rank)


@pytest.mark.parametrize("order", ["no_sync", "every time"])
def test_accumulation(order: str) -> None:
    got = run(accumulate, 2, 2, order)
    held(got, plain(2, 2, order=locally_first if order == "no_sync" else ranks_first))


def test_convert_a_sharded_model() -> None:
    held(run(after_sharding, 2), plain(2))


def test_activation_checkpointing() -> None:
    got = run(recompute, 2)
    for each in got:
        each.state = {key.replace("_checkpoint_wrapped_module.", ""): value for key, value in each.state.items()}
    held(got, plain(2), counters=False)


def test_bf16() -> None:
    got = run(accumulate, 2, 2, "no_sync", torch.bfloat16)
    held(got, plain(2, 2, make=lambda recipe: converted("llama", recipe).bfloat16()))


def test_mixed_precision() -> None:
    """The history of a weight is of what the layer multiplies, which is rounded to bf16; ranks have the same scales."""
    for (before, first), (_, second) in zip(*run(mixed, 2), strict=True):
        keys = [key for key in first if key.endswith("fp8_history")]
        assert len(keys) == 14
        for key in keys:
            weight = before[key.replace("fp8_history", "weight")]
            assert first[key][WEIGHT, 0] == weight.bfloat16().abs().max()
        same(first, second, but=RANKS_OWN)


@pytest.mark.parametrize("converts", ["before", "sharded"])
def test_meta(converts: str) -> None:
    held(run(from_meta, 2, converts), plain(2))


def test_hybrid() -> None:
    held(run(hybrid, 4), plain(4))
