"""Tensor parallel by torch's own parallelize_module: the codes, scales and steps of one process, on 2 and 4 ranks."""

from __future__ import annotations

from typing import Any

import pytest
import setups.models
import torch
import torch._dynamo
import torch.distributed as dist
from setups import runs
from setups.models import build
from setups.runs import FULL
from tolerance import UNIT, bounded, exact, gemm_bound
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import fp8kernels
from distributed.plain import full, same_models
from distributed.ranks import run
from fp8kernels import Recipe, Role
from fp8kernels.nn import function, state
from fp8kernels.nn.step import layers
from fp8kernels.telemetry.summary import sqnr_db

now = {"scaling": "current"}
E4M3 = Recipe("delayed", Role("e4m3"), Role("e4m3"), Role("e5m2"), power_of_two=True)
CURRENT = Recipe("current", Role("e4m3", **now), Role("e4m3", **now), Role("e5m2", **now), power_of_two=True)
HIF8 = Recipe("hif8", Role("hif8"), Role("hif8"), Role("hif8"))
STRAIGHT = Recipe("straight", Role("hif8"), Role("hif8"), power_of_two=True)
CUT = Recipe("cut", *[Role("hif8", clamp=True)] * 3, power_of_two=True, window=1, interval=2)


class Grid(torch.autograd.Function):
    """Multiples of 1/8 up to 4, forward and backward: few bits, so that fp32 adds products exactly in any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return grid(x, 4)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grid(grad, 4)


def grid(x: Tensor, largest: float) -> Tensor:
    return ((x * 8).round() / 8).clamp(-largest, largest)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(grid(3 * p, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Grid.apply(x + self.down(self.up(x).relu()))
        return out


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def alone(recipe: Recipe, group: Any = None) -> nn.Module:
    """The converted model, with scales of this rank's own."""
    group = group or dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return fp8kernels.convert(model(), recipe, group=group, verbose=False)


def parallel(recipe: Recipe, mesh: Any, *, sequence: bool = False) -> nn.Module:
    found = fp8kernels.convert(model(), recipe, verbose=False)
    there = {"input_layouts": Shard(1)} if sequence else {}
    back = {"output_layouts": Shard(1)} if sequence else {}
    plan = {f"{i}.{name}": style for i in "01" for name, style in _styles(there, back).items()}
    return parallelize_module(found, mesh, plan)


def _styles(there: Any, back: Any) -> dict[str, Any]:
    return {"up": ColwiseParallel(**there), "down": RowwiseParallel(**back)}


def batch(step: int, seed: int) -> tuple[Tensor, Tensor]:
    """x and the gradient of the result, [2, 4, 8]."""
    generator = torch.Generator().manual_seed(100 * seed + step)
    x = torch.randint(-12, 13, (2, 4, 8), generator=generator) / 8
    return x, torch.randint(-8, 9, (2, 4, 8), generator=generator) / 8


def train(found: nn.Module, part: Any = lambda x: x, seed: int = 0, steps: int = 4) -> list[Tensor]:
    """Results of the steps; weights stay on a grid, by a hand in the optimizer."""
    optimizer = torch.optim.SGD(found.parameters(), lr=2.0**-4)
    out = []
    for step in range(steps):
        x, grad = map(part, batch(step, seed))
        y = found(x)
        y.backward(grad)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for p in found.parameters():
                p.copy_(grid(p, 1))
        out.append(y.detach())
    return out


def train_alike(rank: int) -> None:
    count = dist.get_world_size()
    mesh = init_device_mesh("cpu", (count,))
    for recipe in (E4M3, CURRENT, HIF8.replace(power_of_two=True), STRAIGHT, CUT):
        want = train(reference := alone(recipe))
        for sequence in (False, True):
            part = (lambda x: x.chunk(count, 1)[rank]) if sequence else (lambda x: x)
            got = train(found := parallel(recipe, mesh, sequence=sequence), part)
            for y, z in zip(got, want, strict=True):
                assert torch.equal(y, part(z)), recipe
            same_models(found, reference)
            assert not torch.equal(full(found[0].up.weight), model()[0].up.weight)


@pytest.mark.parametrize("count", [2, 4])
def test_training_is_that_of_one_process(count: int) -> None:
    """Sums are exact by the choice of numbers, so that every bit is the same, or something was rounded otherwise."""
    run(train_alike, count)


def train_alike_in_two_dimensions(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dp = mesh["dp"]
    seed = dp.get_local_rank()
    for recipe in (E4M3, CURRENT):
        want = train(reference := over(dp, alone(recipe, dp.get_group())), seed=seed)
        for codes in (False, True):
            found = parallel(recipe, mesh["tp"])
            got = train(over(dp, fp8kernels.all_gather_codes(found) if codes else found), seed=seed)
            for y, z in zip(got, want, strict=True):
                assert torch.equal(y, z), (recipe, codes)
            same_models(found, reference)


def over(mesh: Any, found: nn.Module) -> nn.Module:
    for block in found.children():
        fully_shard(block, mesh=mesh)
    return fully_shard(found, mesh=mesh)


def test_fsdp_over_tensor_parallel_is_fsdp() -> None:
    """With weights gathered as they are, and as codes."""
    run(train_alike_in_two_dimensions, 4)


def warms_up_alike(rank: int) -> None:
    recipe = E4M3.replace(warmup_steps=2)
    reference, found = alone(recipe), parallel(recipe, init_device_mesh("cpu", (2,)))
    for y, z in zip(train(found), train(reference), strict=True):
        assert torch.equal(y, z)
    same_models(found, reference)


def test_warm_up_notes_shards() -> None:
    run(warms_up_alike, 2)


def converts_later(rank: int) -> None:
    plan = {f"{i}.{name}": style for i in "01" for name, style in _styles({}, {}).items()}
    found = parallelize_module(model(), init_device_mesh("cpu", (2,)), plan)
    fp8kernels.convert(found, E4M3, verbose=False)
    for y, z in zip(train(found), train(reference := alone(E4M3)), strict=True):
        assert torch.equal(y, z)
    same_models(found, reference)
    before = [layer.fp8_pending.clone() for layer in layers(found)]
    x, _ = batch(9, 0)
    with torch.inference_mode():
        assert torch.equal(found(x), reference(x))
    assert all(torch.equal(layer.fp8_pending, seen) for layer, seen in zip(layers(found), before, strict=True))


def test_convert_a_parallel_model() -> None:
    run(converts_later, 2)


class Seen:
    """What was rounded, by role: input, weight, gradient in this order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.coded: list[Any] = []
        real = state.quantize_role

        def note(*args: Any, **kwargs: Any) -> Any:
            self.coded.append(real(*args, **kwargs))
            return self.coded[-1]

        patch.setattr(state, "quantize_role", note)
        patch.setattr(function, "quantize_role", note)

    def take(self) -> tuple[Any, Any, Any]:
        first, second, third = self.coded
        self.coded.clear()
        return first, second, third


PLACED = {  # of x, weight, bias; of the three codes, and the dimension of the result that is spread
    "colwise": (Replicate(), Shard(0), Shard(0), (None, 0, 1)),
    "rowwise": (Shard(2), Shard(1), Replicate(), (1, 1, None)),
    "sequence": (Shard(1), Replicate(), Replicate(), (0, None, 0)),
}
K, N, B, S = 51, 38, 1, 22  # not multiples of 4: the last shards are smaller
FEW = 3  # rows or columns: the last of four ranks has none


def codes_are_slices(rank: int) -> None:
    for how in PLACED:
        for recipe in (E4M3.replace(power_of_two=False), CURRENT, HIF8):
            for dtype in (torch.float32, torch.bfloat16):
                layer_codes_are_slices(rank, how, recipe, dtype, K, N)
    layer_codes_are_slices(rank, "colwise", E4M3, torch.float32, K, FEW)
    layer_codes_are_slices(rank, "rowwise", E4M3, torch.float32, FEW, N)


def layer_codes_are_slices(rank: int, how: str, recipe: Recipe, dtype: torch.dtype, k: int, n: int) -> None:
    """Weights, inputs and gradients are given for each step, so that histories are the same to the bit."""
    count = dist.get_world_size()
    mesh = init_device_mesh("cpu", (count,))
    x_at, w_at, b_at, slices = PLACED[how]
    group = dist.new_group([rank], use_local_synchronization=True)
    whole, spread = (fp8kernels.nn.Linear(k, n, recipe=recipe) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        seen = Seen(patch)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            x, w, g = (torch.randn(*shape, generator=generator) for shape in ((B, S, k), (n, k), (B, S, n)))
            bias = torch.randn(n, generator=generator)
            x[0, -1, 0] = 9.0 + step  # in the first or the last shard of any of the three
            w[-1, 0] = 7.0 - step
            g[0, 0, -1] = 8.0
            x, g = x.to(dtype), g.to(dtype)
            whole.weight, whole.bias = nn.Parameter(w), nn.Parameter(bias)
            spread.weight = nn.Parameter(distribute_tensor(w, mesh, [w_at]))
            spread.bias = nn.Parameter(distribute_tensor(bias, mesh, [b_at]))
            x_whole = x.clone().requires_grad_()
            out = whole(x_whole)
            out.backward(g)
            coded = seen.take()
            x_spread = distribute_tensor(x, mesh, [x_at]).requires_grad_()
            result = spread(x_spread)
            result.backward(distribute_tensor(g, mesh, [Replicate() if how == "rowwise" else result.placements[0]]))
            for mine, all_of_it, dim in zip(seen.take(), coded, slices, strict=True):
                codes = all_of_it.codes.reshape(-1, all_of_it.codes.shape[-1])
                codes = codes if dim is None else [*codes.chunk(count, dim), codes.narrow(dim, 0, 0)][rank]
                assert torch.equal(mine.codes.reshape(codes.shape), codes), (how, recipe, step)
                assert torch.equal(mine.scale, all_of_it.scale)
            check(result, x_spread, spread, *coded, bias, dtype, count)
            fp8kernels.commit(whole, group=group)
            fp8kernels.commit(spread)
            assert torch.equal(whole.fp8_history, spread.fp8_history)
            assert torch.equal(whole.fp8_scale, spread.fp8_scale)


def check(
    out: Any, x: Any, layer: Any, x_coded: Any, w_coded: Any, g_coded: Any, bias: Tensor, dtype: torch.dtype, count: int
) -> None:
    """Result and gradients are the products of the codes.

    Partial sums are rounded to the dtype and added in it: one rounding each and count - 1 additions, of numbers that
    are together at most |x| |w|
    """
    xs, w, g = (decode(coded) for coded in (x_coded, w_coded, g_coded))

    def near(got: Tensor, a: Tensor, b: Tensor, c: Tensor | None = None) -> None:
        want = a @ b.T if c is None else a @ b.T + c
        most = a.abs() @ b.abs().T if c is None else a.abs() @ b.abs().T + c.abs()
        parts = torch.expm1(torch.tensor(count * UNIT[got.dtype]).double()) * most
        bounded(full(got).reshape(want.shape).detach(), want, gemm_bound(a, b, c, got.dtype) + parts)

    near(out, xs, w, bias.double())
    near(x.grad, g, w.T)
    near(layer.weight.grad, g.T, xs.T)


def decode(coded: Any) -> Tensor:
    """float64 [M, K]"""
    out: Tensor = torch.ops.fp8kernels.dequantize(coded.codes, coded.scale, coded.fmt, torch.float32)
    return out.reshape(-1, out.shape[-1]).double()


@pytest.mark.parametrize("count", [2, 4])
def test_codes_of_a_shard_are_a_slice(count: int) -> None:
    run(codes_are_slices, count)


def refuses(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    layer = parallel(E4M3, mesh)[0].up
    x = torch.ones(4, 8)
    out = []
    for given in (x, DTensor.from_local(x, mesh, [Shard(0)]), DTensor.from_local(x, mesh, [Partial()])):
        with pytest.raises((TypeError, ValueError)) as error:
            function.scaled_linear(layer, given, layer.weight, layer.bias)
        out.append(str(error.value))
    return out


def test_other_placements_are_refused_in_words() -> None:
    plain, sequence, partial = run(refuses, 2)[0]
    assert "'0.up': input is no DTensor" in plain and "parallelize_module" in plain
    assert "input (Shard(dim=0),), weight (Shard(dim=0),)" in sequence and "must be Replicate" in sequence
    assert "redistribute" in partial and "Partial" in partial


def keeps_state(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    found = parallel(E4M3, mesh)
    assert not any(isinstance(buffer, DTensor) for buffer in found.buffers())
    train(found, steps=2)
    saved = get_model_state_dict(found, options=StateDictOptions(full_state_dict=True))
    other = alone(E4M3)
    other.load_state_dict(saved)
    same_models(found, other)
    again = parallel(E4M3, mesh)
    again.load_state_dict(found.state_dict())
    same_models(found, again)
    for y, z in zip(train(again, steps=2), train(found, steps=2), strict=True):
        assert torch.equal(y, z)


def test_checkpoints_go_both_ways() -> None:
    run(keeps_state, 2)


HALVES = {  # of the layers of a Llama block
    "self_attn.q_proj": ColwiseParallel(),
    "self_attn.k_proj": ColwiseParallel(),
    "self_attn.v_proj": ColwiseParallel(),
    "self_attn.o_proj": RowwiseParallel(),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}


def llama(rank: int) -> tuple[float, list[float], list[float]]:
    """How close the logits are to one process's after some steps, dB; the losses of both."""
    nets, losses = [], []
    for count in (1, dist.get_world_size()):
        net = build("llama")
        group = dist.new_group([rank], use_local_synchronization=True) if count == 1 else None
        fp8kernels.convert(net, FULL, group=group, verbose=False)
        if count > 1:
            mesh = init_device_mesh("cpu", (count,))
            for block in net.model.layers:
                parallelize_module(block, mesh, HALVES)
        losses.append(runs.train(net, "llama", range(4)))
        nets.append(net.eval())
    with torch.no_grad():
        one, many = (net(**setups.models.batch("llama", 9)).logits for net in nets)
    return sqnr_db(one, many), *losses


def test_a_llama_stays_close_to_one_process() -> None:
    """Sums in another order, and the codes that they tip over, cost much less than 8 bits do, which is some 30 dB."""
    for close, one, many in run(llama, 2):
        assert close > 40, f"{close:.1f} dB"
        assert one[0] != one[-1] and many == pytest.approx(one, rel=2.0**-8), (one, many)


class Normed(nn.Module):
    """A norm whose result two 8-bit layers read, as in a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        out: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return out


def fused_steps_aside(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    out, was_fused = [], False
    for fuse in (True, False):
        torch.manual_seed(0)
        found = fp8kernels.convert(nn.Sequential(Normed()), E4M3, fuse=fuse, verbose=False)
        was_fused |= type(found[0].norm).__name__.startswith("Fused")
        plan = {"0.norm": SequenceParallel(), "0.down": RowwiseParallel(output_layouts=Shard(1))}
        plan |= {f"0.{name}": ColwiseParallel(input_layouts=Shard(1)) for name in ("gate", "up")}
        parallelize_module(found, mesh, plan)
        optimizer = torch.optim.SGD(found.parameters(), lr=0.1)
        for step in range(3):
            y = found(torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(2 * step + rank)))
            y.square().sum().backward()
            optimizer.step()
        out.append([y.detach(), *(layer.fp8_scale for layer in layers(found))])
    assert was_fused
    for y, z in zip(*out, strict=True):
        assert torch.equal(y, z)


def test_modules_that_make_codes_step_aside() -> None:
    run(fused_steps_aside, 2)


def compiles(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    reference, found = parallel(E4M3, mesh), parallel(E4M3, mesh)
    found[0].compile(backend="aot_eager", fullgraph=True)
    for y, z in zip(train(found, steps=2), train(reference, steps=2), strict=True):
        assert torch.equal(y, z)  # the second trace is without the reductions of the first step
    with torch._dynamo.config.patch(error_on_recompile=True):
        for y, z in zip(train(found), train(reference), strict=True):
            assert torch.equal(y, z)
    same_models(found, reference)


def test_a_compiled_block() -> None:
    run(compiles, 2)


def counts_collectives(rank: int) -> list[int]:
    """all_reduce calls of ours in each step: one a layer and direction while there is no scale, then none."""
    mesh = init_device_mesh("cpu", (2,))
    found = parallel(E4M3, mesh)
    calls = [0]
    real = dist.all_reduce

    def count(x: Tensor, op: Any = dist.ReduceOp.SUM, **kwargs: Any) -> Any:
        calls[0] += x.numel() <= 2 and op == dist.ReduceOp.MAX
        return real(x, op, **kwargs)

    out = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", count)
        optimizer = torch.optim.SGD(found.parameters(), lr=2.0**-4)
        for step in range(3):
            x, grad = batch(step, 0)
            found(x).backward(grad)
            out.append(calls[0])
            optimizer.step()
            calls[0] = 0
    return out


def test_no_reduction_once_there_are_scales() -> None:
    assert run(counts_collectives, 2) == [[6, 0, 0]] * 2  # four forwards, the gradients of the two colwise layers


def test_exact_is_no_empty_word() -> None:
    """The numbers of the exact runs: adding them in another order changes nothing."""
    x, _ = batch(0, 0)
    w = model()[0].up.weight.detach()
    exact((x @ w.T).double(), x.double() @ w.T.double())
