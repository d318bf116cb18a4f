"""A kernel that is wrong on a GPU is passed over, with its reason; a right one is asked once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fp8kernels import explain, quantize
from fp8kernels.ops import proof, table
from fp8kernels.ops.table import TABLE, Kernel

VERBS = tuple(TABLE)
CPU = torch.device("cpu")


def broken(verb: str, spoil: Callable[[Any], object]) -> Kernel:
    """The verb's reference, whose result is spoiled in place."""
    reference = TABLE[verb][-1]

    def run(*args: Any, **kwargs: Any) -> Any:
        out = reference.run(*args, **kwargs)
        spoil(args[0] if out is None else out)
        return out

    return Kernel("broken", reference.why_not, run)


def other_numbers(out: Any) -> None:
    """Every tensor inside becomes something else."""
    for x in proof.tensors(out):
        x.copy_(~x if x.dtype == torch.uint8 else x * 1.5 + 1)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_cases_that_its_reference_passes(verb: str) -> None:
    reference = TABLE[verb][-1]
    assert reference.name == "reference"
    assert list(proof.CASES[verb]())
    assert proof.compare(verb, reference, reference, CPU) is None


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_kernel_is_told(verb: str) -> None:
    said = proof.compare(verb, broken(verb, other_numbers), TABLE[verb][-1], CPU)
    assert said is not None and "the reference gives for" in said


def test_a_kernel_that_raises_is_told() -> None:
    def run(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no image for this device")

    said = proof.compare("quantize", Kernel("bad", lambda *_, **__: None, run), TABLE["quantize"][-1], CPU)
    assert said is not None and "RuntimeError: no image for this device" in said


@pytest.fixture
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors count as those of a GPU."""
    monkeypatch.setattr(proof, "device_of", lambda value: torch.device("cuda", 0))
    monkeypatch.setattr(proof, "to", lambda value, device, to=proof.to: to(value, "cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(proof, "_faults", {})


@pytest.mark.usefixtures("_on_a_gpu")
def test_a_wrong_kernel_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (broken("quantize", lambda out: out.codes.bitwise_xor_(1)), *TABLE["quantize"])
    monkeypatch.setitem(table.TABLE, "quantize", lines)
    x = torch.randn(4, 8)
    with pytest.warns(RuntimeWarning, match="quantize: the kernel 'broken' is not used on cuda:0: .* differ"):
        q = quantize(x, "e4m3")
    assert torch.equal(q.codes, quantize(x, "e4m3").codes)  # told once
    told = explain("quantize", x, "e4m3")
    assert told.kernel != "broken" and "differ" in str(told[0].reason)
    monkeypatch.setenv(proof.VARIABLE, "0")
    assert explain("quantize", x, "e4m3").kernel == "broken"


@pytest.mark.usefixtures("_on_a_gpu")
def test_a_right_kernel_is_asked_once_and_not_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(proof, "compare", lambda *args: asked.append(args))
    kernel, reference = Kernel("right", *TABLE["copy"][-1][1:]), TABLE["copy"][-1]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert proof.fault("copy", kernel, reference, (torch.ones(3),)) is None
    assert not asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(2):
        assert proof.fault("copy", kernel, reference, (torch.ones(3),)) is None
    assert len(asked) == 1
