"""FSDP2 that gathers weights as codes does what FSDP2 does without it, bit for bit, on a byte an element."""

from __future__ import annotations

import copy
import io
import tempfile
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from setups.runs import converted
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fp8kernels
from distributed import test_fully_sharded
from distributed.plain import Run, held, locally_first, same_models
from distributed.plain import plain as one_process
from distributed.ranks import run
from fp8kernels import Alarm, Recipe, Role
from fp8kernels.nn.gathered import GatheredWeight
from fp8kernels.nn.sharded import CodeShard

DELAYED = Recipe("delayed", Role("e4m3"), Role("e4m3"), Role("e5m2"))
CURRENT = Recipe("current", Role("e4m3", "current"), Role("e4m3", "current"))
HIF8 = Recipe("hif8", Role("hif8"), Role("hif8"))
CUT = Recipe("cut", Role("hif8", clamp=True), Role("hif8", clamp=True), window=1, interval=2)
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # what FSDP calls


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 45), nn.Linear(45, 32)  # 45 rows: the last shards are smaller

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return out


def plain(device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    with torch.device(device):
        return nn.Sequential(Block(), Block())


def sharded(recipe: Recipe = DELAYED, *, codes: bool, device: str = "cpu", **how: Any) -> Any:
    found = fp8kernels.convert(plain(device), recipe, verbose=False)
    if codes:
        fp8kernels.all_gather_codes(found)
    for block in found.children():
        fully_shard(block, **how)
    return fully_shard(found, **how)


def train(found: nn.Module, rank: int, steps: int = 3) -> list[float]:
    """Losses of two micro-batches a step, with clipping and AdamW."""
    optimizer = torch.optim.AdamW(found.parameters(), lr=0.01)
    out = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(10 * step + rank)
        for _ in range(2):
            loss = found(torch.randn(2, 8, 32, generator=generator)).float().square().mean()
            loss.backward()
            out.append(loss.item())
        nn.utils.clip_grad_norm_(found.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return out


def shard(found: Any) -> Tensor:
    return found[0].up.weight._local_tensor


def train_alike(rank: int) -> None:
    half = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    kept = {"reshard_after_forward": False}
    for recipe, how in (
        (DELAYED, {}),
        (DELAYED, half),
        (CURRENT, {}),
        (CURRENT, half),
        (HIF8, half),
        (HIF8, kept),
        (CUT, half),
    ):
        reference, found = sharded(recipe, codes=False, **how), sharded(recipe, codes=True, **how)
        assert train(found, rank) == train(reference, rank), (recipe, how)
        same_models(found, reference)
        assert isinstance(shard(found), CodeShard)
    found.eval()
    reference.eval()
    x = torch.randn(3, 32)
    with torch.inference_mode():
        assert torch.equal(found(x), reference(x))


@pytest.mark.parametrize("count", [2, 4])
def test_training_is_fsdp(count: int) -> None:
    run(train_alike, count)


def llama(rank: int) -> Run:
    """Blocks that are computed again in the backward, and micro-batches whose gradients wait."""
    net = fp8kernels.all_gather_codes(converted("llama"))
    for index, block in enumerate(net.model.layers):
        net.model.layers[index] = checkpoint_wrapper(block)
    return test_fully_sharded.train(test_fully_sharded.shard(net), rank, 2, no_sync=True)


def test_a_llama_is_that_of_one_process() -> None:
    got = run(llama, 2)
    for each in got:
        each.state = {key.replace("_checkpoint_wrapped_module.", ""): value for key, value in each.state.items()}
    held(got, one_process(2, 2, order=locally_first), counters=False)


def train_alike_in_replicas(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    reference, found = sharded(codes=False, mesh=mesh), sharded(codes=True, mesh=mesh)
    assert train(found, rank) == train(reference, rank)
    same_models(found, reference)


def test_training_in_replicas_is_hsdp() -> None:
    run(train_alike_in_replicas, 4)


def what_travels(rank: int, recipe: Recipe) -> tuple[set[tuple[torch.dtype, int]], list[int]]:
    """(dtype, bytes a rank sends) of the all-gathers, and how many MAX reductions of ours each step makes."""
    found = sharded(recipe, codes=True)
    gather, reduce = getattr(dist, GATHER), dist.all_reduce
    sent: set[tuple[torch.dtype, int]] = set()
    calls = [0]

    def see_gather(*args: Any, **kwargs: Any) -> Any:
        x = kwargs["input_tensor"] if "input_tensor" in kwargs else args[1]
        sent.add((x.dtype, x.numel() * x.itemsize))
        return gather(*args, **kwargs)

    def see_reduce(x: Tensor, op: Any = dist.ReduceOp.SUM, **kwargs: Any) -> Any:
        calls[0] += op == dist.ReduceOp.MAX
        return reduce(x, op, **kwargs)

    reductions = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, GATHER, see_gather)
        patch.setattr(dist, "all_reduce", see_reduce)
        optimizer = torch.optim.SGD(found.parameters(), lr=0.1)
        for _ in range(3):
            found(torch.randn(4, 32)).square().mean().backward()
            reductions.append(calls[0])
            optimizer.step()
            calls[0] = 0
    return sent, reductions


def test_a_weight_travels_as_a_byte_an_element() -> None:
    """Of a block's 45 x 32 weights each rank sends 23 rows and 16; the vectors of the block go along as fp32."""
    codes = 23 * 32 + 16 * 45
    vectors = 4 * (23 + 16 + 16 + 16)  # bytes: two biases, weight and bias of the norm
    for sent, _ in run(what_travels, 2, DELAYED):
        assert sent == {(torch.uint8, codes + vectors)}


def test_one_reduction_for_all_layers() -> None:
    """Without a history each forward and backward makes one for all weights; with one, none."""
    for _, reductions in run(what_travels, 2, DELAYED):
        assert reductions == [2, 0, 0]
    for _, reductions in run(what_travels, 2, CURRENT):
        assert reductions == [2, 2, 2]


def loads_alike(rank: int, folder: str) -> None:
    reference = sharded(codes=False)
    fresh = {key: value.clone() for key, value in reference.state_dict().items()}
    want = train(reference, rank)

    found = sharded(codes=True)
    train(found, rank, 1)
    found.load_state_dict(fresh)
    assert train(found, rank) == want

    found.load_state_dict(copy.deepcopy(fresh), assign=True)
    assert isinstance(shard(found), CodeShard) and train(found, rank) == want

    found = sharded(codes=True, device="meta")
    found.to_empty(device="cpu")
    found.load_state_dict(fresh)
    assert isinstance(shard(found), CodeShard) and train(found, rank) == want

    found, options = sharded(codes=True), StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(found, plain().state_dict(), options=options)
    assert train(found, rank) == want
    full = get_model_state_dict(found, options=options)
    assert {type(value) for value in full.values()} == {Tensor}
    assert all(torch.equal(full[key], value.full_tensor()) for key, value in reference.named_parameters())

    dcp.save({"model": found.state_dict()}, checkpoint_id=folder)
    losses = []
    for codes in (True, False):
        again = sharded(codes=codes)
        saved = {"model": again.state_dict()}
        dcp.load(saved, checkpoint_id=folder)
        again.load_state_dict(saved["model"])
        same_models(again, reference)
        losses.append(train(again, rank))
    assert losses[0] == losses[1]


def test_checkpoints_go_both_ways() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(loads_alike, 2, folder)


def moves_alike(rank: int) -> None:
    """Weights that do not train, or not yet, and models in bf16."""
    out = []
    for codes in (True, False):
        found = sharded(codes=codes).to(torch.bfloat16)
        for block in found.children():
            block.down.weight.requires_grad_(False)
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(rank)).bfloat16()
        optimizer = torch.optim.SGD(found.parameters(), lr=0.1)
        for step in range(4):
            if step == 2:
                found[0].down.weight.requires_grad_(True)
            y = found(x)
            y.float().square().mean().backward()
            optimizer.step()
        out.append(found)
        assert isinstance(shard(found), CodeShard) == codes and shard(found).dtype == torch.bfloat16
    same_models(*out)


def test_frozen_and_moved_weights() -> None:
    run(moves_alike, 2)


def compiles(rank: int) -> None:
    reference, found = sharded(codes=False), sharded(codes=True)
    found[0].compile(backend="aot_eager")
    assert train(found, rank, 1) == train(reference, rank, 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert train(found, rank) == train(reference, rank)
    same_models(found, reference)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiled_block() -> None:
    run(compiles, 2)


def test_without_shards_it_is_an_ordinary_parameter() -> None:
    found = fp8kernels.all_gather_codes(fp8kernels.convert(plain(), DELAYED, verbose=False))
    want = train(fp8kernels.convert(plain(), DELAYED, verbose=False), 0)
    copied = copy.deepcopy(found)
    file = io.BytesIO()
    torch.save(found.state_dict(), file)
    torch.save(found, whole := io.BytesIO())
    file.seek(0)
    whole.seek(0)
    assert type(torch.load(file, weights_only=True)["0.up.weight"]) is Tensor
    pickled = torch.load(whole, weights_only=False)
    assert type(pickled[0].up.weight) is nn.Parameter and type(copied[0].up.weight) is CodeShard
    for each in (found, copied, pickled):
        assert train(each, 0) == want


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe("row", Role("e4m3", "current", "row"), Role("e4m3", "current", "row")), "'row' block"),
        (DELAYED.replace(warmup_steps=2), "warmup_steps=2"),
        (DELAYED.replace(straight_through="clipped"), "straight_through='clipped'"),
        (DELAYED.replace(alarm=Alarm(policy="fallback")), "policy='warn'"),
    ],
)
def test_what_cannot_travel_is_refused_in_words(recipe: Recipe, words: str) -> None:
    with pytest.raises(ValueError, match=rf"layer '0.up'.*{words}"):
        fp8kernels.all_gather_codes(fp8kernels.convert(plain(), recipe, verbose=False))


def test_models_without_8_bit_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="has no 8-bit linear layers"):
        fp8kernels.all_gather_codes(plain())


def refuses(rank: int) -> None:
    with pytest.raises(ValueError, match="before fully_shard"):
        fp8kernels.all_gather_codes(sharded(codes=False))


def test_a_sharded_model_is_refused() -> None:
    run(refuses, 2)


def test_tied_weights_travel_as_they_are() -> None:
    found = plain()
    found[1].up.weight = found[0].up.weight
    fp8kernels.all_gather_codes(fp8kernels.convert(found, DELAYED, verbose=False))
    assert type(found[0].up.weight) is nn.Parameter and type(found[0].down.weight) is CodeShard


def test_a_gathered_weight_shows_what_its_codes_stand_for() -> None:
    q = fp8kernels.quantize(torch.randn(6, 8), "e4m3")
    weight = GatheredWeight(q.codes, q.scale, "e4m3", torch.bfloat16)
    assert torch.equal(weight + 0, fp8kernels.dequantize(q, torch.bfloat16)) and type(weight + 0) is Tensor
    assert type(weight.detach()) is GatheredWeight and "e4m3" in repr(weight)
    with pytest.raises(RuntimeError, match="write into the sharded parameter"):
        weight.mul_(2)
