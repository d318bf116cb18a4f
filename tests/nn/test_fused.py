"""Modules that hand codes to their readers, against the same model whose layers quantize for themselves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fusions import handed
from intervals import act_gradients, norm_gradients, rounded
from nn.blocks import Block, Heads
from recipes import ANYWHERE
from tolerance import bounded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fp8kernels
from fp8kernels import Recipe, convert, get_recipe, revert
from fp8kernels.kernels.compiled import EMULATED
from fp8kernels.kernels.norm_quantize import Norm
from fp8kernels.kernels.triton_jit import INTERPRETED
from fp8kernels.nn import mlp as fused_mlp
from fp8kernels.nn import norm as fused_norm
from fp8kernels.nn.coded import CodedTensor
from fp8kernels.nn.producer import Producer, producers
from fp8kernels.nn.step import layers

QAT = get_recipe("hif8-qat").replace(window=4)
DIM = 128  # the longest block
KINDS = [Block, Heads]


@pytest.fixture
def one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the fused kernels run, here those composed for the CPU."""
    for module in (fused_norm, fused_mlp):
        monkeypatch.setattr(module, "pays", lambda device: True)


def model(kind: type[nn.Module], recipe: Recipe | str = QAT, *, fuse: bool = True, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return convert(kind(DIM), recipe, fuse=fuse, verbose=False)


def batch(seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(2, 6, DIM, generator=torch.Generator().manual_seed(seed)) * scale


def step(net: nn.Module, *batches: Tensor) -> float:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    loss = sum((net(x).square().mean() for x in batches), torch.tensor(0.0))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def same(a: nn.Module, b: nn.Module, *, but: str = "-") -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if not key.endswith(but):
            assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [(recipe, torch.float32) for recipe in [*ANYWHERE, "hif8 gradients", "power of two"]]
    + [(recipe, torch.bfloat16) for recipe in ("hif8-qat", "e4m3-row")],
)
def test_training_is_the_same_to_the_bit(kind: type[nn.Module], recipe: str, dtype: torch.dtype) -> None:
    extra = {"hif8 gradients": QAT.with_format(grad="hif8"), "power of two": QAT.replace(power_of_two=True)}
    rules = extra.get(recipe) or get_recipe(recipe)
    fused, plain = model(kind, rules).to(dtype), model(kind, rules, fuse=False).to(dtype)
    for n in range(3):
        x = batch(n, 2.0**n).to(dtype)
        assert step(fused, x) == step(plain, x)
        same(fused, plain)
    assert handed(fused, batch(9).to(dtype)) == (["q", "k", "v"] if kind is Heads else ["attn.qkv", "mlp.fc1"])
    assert handed(plain, batch(9).to(dtype)) == []


def test_the_kernels_are_those_that_this_process_is_for() -> None:
    """test_fused_kernels.py runs tests of this file again, with the kernels of a GPU."""
    x, ones = torch.randn(4, DIM), torch.ones(DIM)
    wanted = "cuda" if EMULATED else "triton" if INTERPRETED else "cpu"
    assert fp8kernels.explain("rms_norm_quantize", x, ones, 1e-6, "hif8", scale=torch.ones(1, 1)).kernel == wanted
    assert fp8kernels.explain("swiglu_quantize", x, x, "hif8", scale=torch.ones(1, 1)).kernel == wanted
    norm = Norm(ones, None, 1e-6, center=False)
    wanted = "reference" if wanted == "cpu" else wanted
    assert fp8kernels.explain("norm_backward", x, x, torch.ones(4), None, norm).kernel == wanted
    assert fp8kernels.explain("act_backward", x, x, None, "gelu").kernel == wanted


@pytest.mark.usefixtures("one_kernel")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ANYWHERE)
def test_one_kernel_gives_the_same_codes(kind: type[nn.Module], recipe: str) -> None:
    """In fp32 the composed kernels are torch's own norm and activation: the forward and the state are the same."""
    fused, plain = model(kind, recipe), model(kind, recipe, fuse=False)
    x = batch(0)
    fused(x), plain(x)  # scales are those of the input itself
    fp8kernels.commit(fused), fp8kernels.commit(plain)
    for scale in (1.0, 3.0):
        assert torch.equal(fused(scale * x), plain(scale * x))
    fp8kernels.commit(fused), fp8kernels.commit(plain)
    same(fused, plain)
    wanted = ["q", "k", "v", "mlp.down_proj"] if kind is Heads else ["attn.qkv", "mlp.fc1", "mlp.fc2"]
    assert handed(fused, x) == wanted
    assert torch.equal(fused.eval()(x), plain.eval()(x))
    assert handed(fused, x) == wanted
    assert isinstance(fused.norm1 if kind is Block else fused.norm, Producer)


@pytest.mark.usefixtures("one_kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_the_norms_backward(kind: type[nn.Module], dtype: torch.dtype) -> None:
    """The gradients of x, weight and bias, from the gradient that reaches the codes."""
    net = Heads(DIM).to(dtype)
    net.norm = kind(DIM, dtype=dtype)
    nn.init.normal_(net.norm.weight)
    convert(net, QAT, verbose=False)
    x = batch(1).to(dtype).requires_grad_()
    y = net.norm(x)
    assert isinstance(y, CodedTensor)
    dy: list[Tensor] = []
    y.register_hook(dy.append)
    (net.q(y).sum() + net.k(y).square().sum()).backward()
    norm, _ = net.norm.fp8_norm(x)
    values, errors = norm_gradients(dy[0].reshape(-1, DIM), x.detach().reshape(-1, DIM), norm)
    gradients = [
        x.grad.reshape(-1, DIM),
        net.norm.weight.grad,
        *([net.norm.bias.grad] if norm.bias is not None else []),
    ]
    for got, want, error in zip(gradients, values, errors, strict=False):
        assert got.dtype == dtype
        bounded(got, want, rounded(want, error, dtype))


@pytest.mark.usefixtures("one_kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_a_norm_without_eps_takes_torchs(dtype: torch.dtype) -> None:
    """On rows as small as the root of eps the choice of eps decides the result."""
    net = model(Heads, "e4m3-row").to(dtype)
    x = torch.full((1, DIM), 2.0**-11, dtype=dtype)
    y = net.norm(x)
    assert isinstance(y, CodedTensor)
    torch.testing.assert_close(y.decode(), F.rms_norm(x, (DIM,)), rtol=2.0**-8, atol=0)  # of a row alike: amax itself


def test_a_norm_called_by_keyword_gives_what_it_gave() -> None:
    net, x = model(Heads), batch(0)
    assert torch.equal(net.norm(x=x), F.rms_norm(x, (DIM,), net.norm.weight))


@pytest.mark.usefixtures("one_kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("activation", "gated"), [("silu", True), ("gelu", False), ("relu", False)])
def test_the_activations_backward(activation: str, dtype: torch.dtype, *, gated: bool) -> None:
    layer = convert(nn.Sequential(nn.Linear(DIM, 64)), QAT, verbose=False)[0].to(dtype)
    x, other = (batch(n).to(dtype).requires_grad_() for n in range(2))
    y = fused_mlp.activated(x, other if gated else None, activation, (layer,))
    dy: list[Tensor] = []
    y.register_hook(dy.append)
    layer(y).square().sum().backward()
    values, errors = act_gradients(dy[0], x.detach(), other.detach() if gated else None, activation)
    for got, want, error in zip([x.grad, other.grad][: 1 + gated], values, errors, strict=False):
        bounded(got, want, rounded(want, error, dtype))


@pytest.mark.usefixtures("one_kernel")
def test_the_backward_keeps_inputs_and_codes_only() -> None:
    """Kept for the backward of norm and MLP: x, gate and up as they are, one byte an element of what is multiplied."""
    net = model(Heads).mlp
    saved: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        net(batch(0).requires_grad_())
    tokens, hidden = 12, 2 * DIM
    weights = 3 * DIM * hidden
    # the codes of x twice (gate and up quantize alone here), gate and up in fp32, the codes of their product
    expected = 2 * tokens * DIM + 2 * tokens * hidden * 4 + tokens * hidden + weights
    assert expected <= sum(t.nbytes for t in saved.values()) <= expected + 128


def test_codes_pass_for_the_tensor_they_stand_for() -> None:
    net = model(Heads)
    x = batch(0).requires_grad_()
    y = net.norm(x)
    assert isinstance(y, CodedTensor)
    assert (y.shape, y.dtype, y.device, y.requires_grad) == (x.shape, x.dtype, x.device, True)
    decoded = y.decode()
    assert type(decoded) is Tensor
    for out, want in ((y + 1, decoded + 1), (y[0, :, :3], decoded[0, :, :3]), (y.double(), decoded.double())):
        assert type(out) is Tensor and torch.equal(out, want)
    assert isinstance(y.detach(), CodedTensor)
    assert torch.equal(copy.deepcopy(y.detach()).decode(), decoded)
    assert "CodedTensor((2, 6, 128), torch.float32, hif8" in repr(y)
    reader = nn.Linear(DIM, 8)  # not 8-bit: it multiplies what the codes stand for
    loss = reader(y).square().sum() + (y * 3).sum()
    loss.backward()
    assert x.grad is not None and type(x.grad) is Tensor
    torch.testing.assert_close(reader.weight.grad, (2 * reader(decoded)).flatten(0, 1).t() @ decoded.flatten(0, 1))


def test_codes_cannot_be_written() -> None:
    y = model(Heads).norm(batch(0))
    with pytest.raises(RuntimeError, match=r"8-bit codes that were made for 'q'.*clone.*fuse=False"):
        y.add_(1)
    y.clone().add_(1)


def test_a_layer_they_were_not_made_for_quantizes_for_itself() -> None:
    net, other = model(Heads), convert(nn.Sequential(nn.Linear(DIM, 8)), QAT, verbose=False)
    y = net.norm(batch(0))
    before = y.decode()
    assert torch.equal(other(y), other(before))
    assert other[0].fp8_pending[0] == before.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kernels", ["parts", "one"])
def test_activation_checkpointing(
    kind: type[nn.Module], kernels: str, request: pytest.FixtureRequest, *, reentrant: bool
) -> None:
    if kernels == "one":
        request.getfixturevalue("one_kernel")
    net, again = model(kind), model(kind)

    class Checkpointed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(again, x.requires_grad_(), use_reentrant=reentrant)  # type: ignore[return-value]

    wrapped = Checkpointed()
    wrapped.net = again
    for n in range(3):
        assert step(net, batch(n, 2.0**n)) == step(wrapped, batch(n, 2.0**n))
        same(net, again, but="fp8_counters")  # what is seen twice is counted twice


def test_a_checkpoint_may_stand_between_norm_and_readers() -> None:
    net, again = model(Block), model(Block)
    for n, reentrant in enumerate((True, False)):
        x, other = (batch(n).requires_grad_() for _ in range(2))
        net.mlp(net.norm2(x)).sum().backward()
        checkpoint(again.mlp, again.norm2(other), use_reentrant=reentrant).sum().backward()
        assert torch.equal(x.grad, other.grad)


def test_micro_batches_and_a_frozen_reader() -> None:
    fused, plain = model(Heads), model(Heads, fuse=False)
    for net in (fused, plain):
        net.k.weight.requires_grad_(False)
    for n in range(3):
        batches = [batch(n, 3.0), batch(n + 10), batch(n + 20)]
        assert step(fused, *batches) == step(plain, *batches)
        same(fused, plain)


def test_readers_tell_the_same_history() -> None:
    net = model(Heads)
    step(net, batch(0, 5.0))
    for tensor in ("history", "scale", "counters"):
        first, *rest = (getattr(layer, f"fp8_{tensor}")[0] for layer in (net.q, net.k, net.v))
        assert all(torch.equal(first, other) for other in rest)
        assert (first > 0).any()


def test_what_runs_plainly() -> None:
    """Warm-up, a reader in another mode, a watched reader, a replaced one: the layers quantize for themselves."""
    warming = model(Heads, QAT.replace(warmup_steps=1))
    assert handed(warming, batch(0)) == []
    step(warming, batch(0))
    assert handed(warming, batch(0)) == ["q", "k", "v"]

    net, plain = model(Heads), model(Heads, fuse=False)
    for mode in (net, plain):
        mode.k.eval()
    assert handed(net, batch(0)) == handed(plain, batch(0)) == []
    assert step(net, batch(0)) == step(plain, batch(0))
    same(net, plain)
    net.k.train()

    seen: list[Tensor] = []
    handle = net.v.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    assert handed(net, batch(0)) == []
    assert type(seen[0]) is Tensor
    handle.remove()
    handle = net.k.register_full_backward_hook(lambda *_: None)
    assert handed(net, batch(0)) == []
    handle.remove()
    assert handed(net, batch(0)) == ["q", "k", "v"]
    net.v = nn.Linear(DIM, DIM, bias=False)
    assert handed(net, batch(0)) == []


@pytest.mark.usefixtures("one_kernel")
def test_dropout_and_hooks_inside_an_mlp_are_not_skipped() -> None:
    torch.manual_seed(0)
    net = convert(Block(DIM, drop=0.5), QAT, verbose=False)
    assert "mlp.fc2" not in handed(net, batch(0))
    assert "mlp.fc2" in handed(net.eval(), batch(0))
    calls: list[nn.Module] = []
    net.mlp.act.register_forward_hook(lambda module, args, out: calls.append(module))
    assert "mlp.fc2" not in handed(net, batch(0))
    assert calls == [net.mlp.act]


def test_eval_and_inference_write_nothing() -> None:
    net = model(Heads)
    step(net, batch(0))
    before = copy.deepcopy(net)
    with torch.inference_mode():
        net(batch(1, 9.0))
    net.eval()
    net(batch(2, 9.0))
    same(net, before)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_train_on_their_own(kind: type[nn.Module]) -> None:
    net = model(kind)
    step(net, batch(0))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        before, alone = copy.deepcopy(net), copy.deepcopy(net)
        assert step(twin, batch(1, 4.0)) == step(alone, batch(1, 4.0))
        same(twin, alone)
        same(net, before)
        norm, reader = (twin.norm, twin.q) if kind is Heads else (twin.norm1, twin.attn.qkv)
        assert isinstance(norm, Producer)
        assert norm.fp8_readers[0] is reader


@pytest.mark.parametrize("kind", KINDS)
def test_reverting_gives_the_plain_model_back(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    plain = kind(DIM)
    net = model(kind)
    revert(net)
    assert [type(m) for m in net.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(net(batch(0)), plain(batch(0)))
    assert all(key not in m.__dict__ for m in net.modules() for key in ("fp8_readers", "fp8_places", "fp8_parts"))
    assert not any(producer in producers for producer in net.modules())


def test_reverting_a_part_releases_what_makes_codes_for_it() -> None:
    net = model(Block)
    revert(net.attn)
    assert type(net.norm1) is nn.LayerNorm
    assert isinstance(net.norm2, Producer)
    assert handed(net, batch(0)) == ["mlp.fc1"]
    assert len(layers(net)) == 2
    assert torch.equal(net.norm1(batch(0)), F.layer_norm(batch(0), (DIM,)))


@pytest.mark.parametrize("kind", KINDS)
def test_compile_whole(kind: type[nn.Module]) -> None:
    """torch.compile sees the model whose layers quantize for themselves, and fuses by its own means."""
    fused, plain = model(kind), model(kind, fuse=False)
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    x = batch(0)
    assert torch.equal(compiled(x), plain(x))
    same(fused, plain)
    assert torch.equal(fused.eval()(x), plain.eval()(x))


def test_autocast() -> None:
    fused, plain = model(Block), model(Block, fuse=False)
    for n in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            a, b = fused(batch(n)), plain(batch(n))
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
        a.sum().backward()
        b.sum().backward()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_the_summary_measures_inputs_before_they_are_codes() -> None:
    fused, plain = model(Heads), model(Heads, fuse=False)
    x = batch(0)
    for net in (fused, plain):
        step(net, x)
    ours, theirs = (fp8kernels.summary(net, x, verbose=False) for net in (fused, plain))
    assert ours == theirs
    assert all(row.sqnr_db is not None and row.sqnr_db < 60 for row in ours)
