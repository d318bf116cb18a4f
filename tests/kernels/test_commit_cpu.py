"""The compiled commit against the reference, to the bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from fp8kernels.kernels.commit import ScaleRule, State, cpu, reference
from fp8kernels.scaling.rules import ALGORITHMS, history_max


def state(tensors: int, window: int, size: float) -> State:
    history = torch.rand(tensors, window) * size
    history[:, window // 2 + 1 :] = 0  # partly filled, and one tensor not at all
    history[-1] = 0
    pending = torch.rand(tensors) * 2 * size
    pending[0] = 0
    if tensors > 2:
        pending[1], pending[2] = float("inf"), float("nan")
    target = torch.tensor([15.0, 448.0, 57344.0, 0.0])[torch.arange(tensors) % 4]  # 0: held
    return State(history, pending, torch.rand(tensors), target)


@pytest.mark.parametrize("algorithm", tuple(ALGORITHMS))
def test_commit(algorithm: str) -> None:
    for window, margin, power_of_two in itertools.product((1, 2, 16, 64), (0, 1, -2), (False, True)):
        sizes = (1.0, 1e-44, 1e-38, 1e38, 448.0)
        states = [state(tensors, window, size) for size in sizes for tensors in (1, 3, 6)]
        copies = [State(*(x.clone() for x in s)) for s in states]
        rule = ScaleRule(algorithm, margin, power_of_two)
        assert cpu.why_not(states, rule) is None
        for pending in (None, 0.0, 3.5):  # what is there; nothing, which changes nothing; the same for all
            for s in (*states, *copies) if pending is not None else ():
                s.pending.fill_(pending)
            before = [x.clone() for s in states for x in (s.history, s.scale)]
            cpu.commit(states, rule)
            reference.commit(copies, rule)
            for mine, theirs in zip(states, copies, strict=True):
                for name, a, b in zip(State._fields, mine, theirs, strict=True):
                    assert torch.equal(a.view(torch.int32), b.view(torch.int32)), (name, window, rule, a, b)
                assert not mine.pending.any()
            if pending == 0.0:
                assert all(map(torch.equal, before, [x for s in states for x in (s.history, s.scale)]))


def test_no_layers() -> None:
    cpu.commit([], ScaleRule())


def test_why_not() -> None:
    one = state(3, 4, 1.0)
    assert "the algorithm is" in cpu.why_not([one], ScaleRule(history_max))
    assert "pending is torch.float64" in cpu.why_not([one, one._replace(pending=one.pending.double())], ScaleRule())
    assert "on meta" in cpu.why_not([one._replace(history=one.history.to("meta"))], ScaleRule())
    assert "contiguous" in cpu.why_not([one._replace(history=one.history[:, ::2])], ScaleRule())
