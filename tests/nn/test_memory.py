"""What a converted block holds in memory while it trains, and that holding less changes no bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fp8kernels
from bench.bench_memory import Training, llama_blocks
from bench.memory import memory_of
from fp8kernels.nn.recompute import recomputed

SHAPE = (2, 256, 256, 704)  # batch, sequence, hidden, intermediate


def test_memory_is_counted() -> None:
    """Three tensors of 4 MB, of which two are there at one time, and one stays."""
    x = torch.ones(1_000_000)

    def work() -> Tensor:
        first = x + 1
        second = first + 1
        del first
        return second + 1

    found = memory_of(work)
    assert found.kept == pytest.approx(x.nbytes, abs=1000)
    assert found.peak == pytest.approx(2 * x.nbytes, abs=1000)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_block_holds_less(*, autocast: bool) -> None:
    """0.65 is the goal of bench/goals.toml, there at a size where weights are small beside activations."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    ours, unfused, theirs = (Training(recipe, SHAPE, autocast=autocast) for recipe in ("hif8-qat", "hif8-qat", None))
    fp8kernels.revert(unfused.blocks)
    fp8kernels.convert(unfused.blocks, "hif8-qat", fuse=False, verbose=False)
    unfused.step()
    peaks = [memory_of(each.step).peak for each in (ours, unfused, theirs)]
    assert peaks[0] <= 0.75 * peaks[2], f"{peaks[0]} of {peaks[2]} bytes"
    assert peaks[0] < peaks[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("grad", [None, "hif8"])
def test_a_block_of_transformers_trains_to_the_bit(dtype: torch.dtype, grad: str | None, *, autocast: bool) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    recipe = fp8kernels.get_recipe("hif8-qat").with_format(grad=grad)
    results = []
    for fuse in (True, False):
        torch.manual_seed(0)
        blocks, rotary = llama_blocks(128, 176, 32, 2)
        fp8kernels.convert(blocks.to(dtype), recipe, fuse=fuse, verbose=False)
        x = torch.randn(2, 32, 128, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        positions = rotary(x, torch.arange(32)[None])
        for _ in range(2):
            h = x
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                for each in blocks:
                    h = each(h, position_embeddings=positions, attention_mask=None)
            h.square().mean().backward()
            fp8kernels.commit(blocks)
        results.append([h, x.grad, *(p.grad for p in blocks.parameters()), *blocks.buffers()])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_only_the_inputs_of_a_recomputed_part_are_kept() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(64))
    run = lambda x: (x.exp() * weight).sigmoid()  # noqa: E731
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = recomputed(run, x, parameters=[weight])
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), weight.data_ptr()]
    want = run(x)
    assert torch.equal(y, want)
    dy = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, (x, weight), dy), torch.autograd.grad(want, (x, weight), dy), strict=True):
        assert torch.equal(a, b)
    assert recomputed(run, x.detach(), parameters=[None]).requires_grad, "run's own parameter asks for a gradient"
    with torch.no_grad():
        assert not recomputed(run, x, parameters=[weight]).requires_grad


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(4, requires_grad=True)
    (first,) = torch.autograd.grad(recomputed(torch.exp, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
