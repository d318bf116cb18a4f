"""torchrun starts the ranks, and a script trains as it would without us."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from setups.runs import same

from distributed.launched import STEPS, WINDOW, data, model
from distributed.plain import RANKS_OWN, mean, one_thread

RANKS = 2


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    script = [str(Path(__file__).with_name("launched.py")), str(tmp_path)]
    ended = subprocess.run([*launch, *script], capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert ended.returncode == 0, ended.stderr
    got = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]

    with one_thread():
        net = model()
        optimizer, params = torch.optim.AdamW(net.parameters(), lr=0.01), list(net.parameters())
        for step in range(STEPS):
            grads = []
            for rank in range(RANKS):
                loss = net(data(step, rank)).square().mean()
                loss.backward()
                assert float(loss.detach()) == got[rank]["losses"][step]
                grads.append([p.grad for p in params])
                optimizer.zero_grad()
            for p, g in zip(params, mean(grads), strict=True):
                p.grad = g
            optimizer.step()
            optimizer.zero_grad()
    largest = [max(float(data(step, rank).abs().max()) for rank in range(RANKS)) for step in reversed(range(STEPS))]
    for each in got:
        same(each["state"], net.state_dict(), but=RANKS_OWN)
        assert each["state"]["0.fp8_history"][0].tolist() == largest + [0.0] * (WINDOW - STEPS)
