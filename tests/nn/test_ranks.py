"""With several ranks a commit reduces amax by MAX, so that all use one scale."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from fp8kernels import convert, get_recipe

RANKS = 2


def train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    recipe = get_recipe("hif8-qat").with_format(grad="hif8").replace(window=4)
    net = convert(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), recipe, verbose=False)
    parallel = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    seen = []
    for step in range(3):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(10 * step + rank)) * (1 + 3 * rank)
        seen.append(x.abs().max())
        parallel(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({"seen": torch.stack(seen), **net.state_dict()}, f"{folder}/{rank}.pt")
    del parallel  # it holds the group, whose threads must be gone before the process is
    dist.barrier()
    dist.destroy_process_group()


def test_all_ranks_have_the_scales_of_the_largest_amax(tmp_path: Path) -> None:
    spawn(train, (str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    assert not torch.equal(ranks[0]["seen"], ranks[1]["seen"])
    for key in ranks[0]:
        if key.endswith(("fp8_history", "fp8_scale", "weight")):
            assert torch.equal(ranks[0][key], ranks[1][key]), key
    newest_first = torch.maximum(ranks[0]["seen"], ranks[1]["seen"]).flip(0)
    assert torch.equal(ranks[0]["0.fp8_history"][0, :3], newest_first)
    assert (ranks[0]["0.fp8_history"][2, :3] > 0).all()
