"""Pipeline stages: each has scales of its own, also where the layers of two stages have the same names.

A stage learns the shapes of what it sends by a forward and a backward on memory that holds anything, with gradients of
one, far above those of a loss: these tests fail where a trace of that stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from setups.models import DECODER, SHAPE, TOKENS, WIDTH, WORDS
from setups.runs import FULL, same, sgd
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from distributed.plain import RANKS_OWN, STEPS, one_thread
from distributed.ranks import run
from fp8kernels import convert

MICRO = 4


class Stage(nn.Module):
    """A part of a Llama: some blocks, the embedding before the first one and the head after the last."""

    def __init__(self, index: int, count: int, *, names: str) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

        super().__init__()
        torch.manual_seed(index)
        config = LlamaConfig(**SHAPE, **DECODER, vocab_size=WORDS, attn_implementation="sdpa")
        self.embed = nn.Embedding(WORDS, WIDTH) if index == 0 else None
        self.rotary = LlamaRotaryEmbedding(config)
        block = LlamaDecoderLayer(config, 0)
        self.blocks = nn.ModuleDict({str(index if names == "global" else 0): block})
        last = index == count - 1
        self.lm_head = nn.Sequential(LlamaRMSNorm(WIDTH), nn.Linear(WIDTH, WORDS)) if last else None

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = self.embed(x)
        places = self.rotary(x, torch.arange(TOKENS)[None])
        for block in self.blocks.values():
            x = block(x, position_embeddings=places)
        return x if self.lm_head is None else self.lm_head(x)


def words(n: int, replica: int) -> Tensor:
    """The ids of one step: a row for each micro-batch."""
    return torch.randint(WORDS, (MICRO, TOKENS), generator=torch.Generator().manual_seed(10 * n + replica))


def loss_of(scores: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores.flatten(0, 1), target.flatten())


def plain(count: int, names: str, replicas: int = 1) -> tuple[list[list[float]], list[dict[str, Tensor]]]:
    """One process: the losses of each replica, and the state of each stage."""
    with one_thread():
        net = convert(nn.Sequential(*[Stage(i, count, names=names) for i in range(count)]), FULL, verbose=False)
        optimizer, losses = sgd(net), [[] for _ in range(replicas)]
        params = list(net.parameters())
        for n in range(STEPS):
            grads = []
            for replica in range(replicas):
                for row in words(n, replica).split(1):
                    loss = loss_of(net(row), row)
                    loss.backward()
                    losses[replica].append(float(loss.detach()))
                grads.append([p.grad for p in params])
                optimizer.zero_grad()
            for p, *of_replicas in zip(params, *grads, strict=True):
                p.grad = sum(of_replicas[1:], of_replicas[0]) / replicas / MICRO
            optimizer.step()
            optimizer.zero_grad()
    return losses, [stage.state_dict() for stage in net]


def piped(rank: int, kind: str, names: str, count: int, by: str) -> tuple[list[float], dict[int, Any]]:
    """Stages in turn over two ranks; the stages of a rank are converted "together", or "each" by itself."""
    mine = range(rank, count, 2)
    parts = nn.ModuleList([Stage(i, count, names=names) for i in mine])
    for converted in [parts] if by == "together" else parts:
        convert(converted, FULL, verbose=False)
    stages = [PipelineStage(part, i, count, torch.device("cpu")) for i, part in zip(mine, parts, strict=True)]
    optimizer = sgd(parts)
    get_optimizer_state_dict(parts, optimizer)  # makes an empty state by a step, which commits where nothing was seen
    losses = drive(kind, stages, optimizer, 0)
    return losses, {i: part.state_dict() for i, part in zip(mine, parts, strict=True)}


def drive(kind: str, stages: Sequence[Any], optimizer: Any, replica: int) -> list[float]:
    if kind == "1F1B":
        schedule: Any = Schedule1F1B(stages[0], MICRO, loss_of)
    else:
        schedule = ScheduleInterleaved1F1B(stages, MICRO, loss_of)
    out: list[float] = []
    for n in range(STEPS):
        ids, losses = words(n, replica), []
        args = (ids,) if any(stage.is_first for stage in stages) else ()
        schedule.step(*args, **({"target": ids, "losses": losses} if any(stage.is_last for stage in stages) else {}))
        optimizer.step()
        optimizer.zero_grad()
        out += [float(loss.detach()) for loss in losses]
    return out


def replicated(rank: int) -> tuple[list[float], dict[int, Any]]:
    """Two stages, each on two ranks with data of their own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    index, replica = mesh.get_coordinate()
    part = convert(Stage(index, 2, names="local"), FULL, verbose=False)
    stage = PipelineStage(part, index, 2, torch.device("cpu"), group=mesh["pp"].get_group())
    optimizer, replicas = sgd(part), mesh["dp"].get_group()

    def average(*_: Any) -> None:
        for p in part.parameters():
            dist.all_reduce(p.grad, group=replicas)
            p.grad /= 2

    optimizer.register_step_pre_hook(average)
    losses = drive("1F1B", [stage], optimizer, replica)
    return losses, {index: part.state_dict()}


CASES = [("1F1B", "global", 2, "each"), ("1F1B", "local", 2, "each")]
CASES += [("interleaved", names, 4, by) for names in ("global", "local") for by in ("together", "each")]


@pytest.mark.parametrize("kind, names, count, by", CASES)
def test_stages(kind: str, names: str, count: int, by: str) -> None:
    losses, states = plain(count, names)
    (_, first), (got, second) = run(piped, 2, kind, names, count, by)
    assert got == losses[0]
    for index, state in enumerate(states):
        same((first | second)[index], state, but=RANKS_OWN)


def test_replicas_of_stages() -> None:
    """Four ranks: those with the same stage share its scales, and those with the other one do not."""
    losses, states = plain(2, "local", replicas=2)
    got = run(replicated, 4)
    assert [got[2][0], got[3][0]] == losses
    for rank, (_, parts) in enumerate(got):
        for index, state in parts.items():
            assert index == rank // 2
            same(state, states[index], but=RANKS_OWN)
