"""Forwards of every shape: where the source shows that only 8-bit layers read a norm's result, and where not."""

from __future__ import annotations

import contextlib

import pytest
import torch
from fusions import QAT, read_by, reasons
from nn.blocks import Gated, Mlp, Norm
from torch import Tensor, nn
from torch.nn import functional as F

from fp8kernels import convert


class Base(nn.Module):
    """A norm, two layers, and a forward that each test writes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(16), Inner()
        self.a, self.b, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.plain = True


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Linear(16, 16)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        size = x.shape[0] if x.dim() else 0
        return self.deep(x) * scale * size


class Nested(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.norm(x))


class Keyword(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = self.inner(x=h, scale=2.0) + self.a(h)
        h = y * 2
        return self.out(h.relu())


class Branches(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.plain:
            x = self.a(x)
        else:
            x = self.b(x)
        return x.relu()


class EarlyReturn(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.plain:
            return self.a(x)
        with contextlib.nullcontext():
            x = self.b(x)
        return x.relu()


FOLLOWED = {Nested: ["a"], Keyword: ["deep", "a"], Branches: ["a", "b"], EarlyReturn: ["a", "b"]}


class Residual(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return h + self.a(h)


class Alias(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        other = h
        return self.a(h) + other


class OneBranchKeeps(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.plain:
            x = self.a(x)
        return x.relu()


class Loop(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        for layer in (self.a, self.b):
            h = layer(h)
        return h


class Comprehension(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return sum(layer(h) for layer in (self.a, self.b))


class Closure(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return (lambda: self.a(h))()


class InPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h += 1
        return self.a(h)


class Method(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.go(self.norm(x))

    def go(self, x: Tensor) -> Tensor:
        return self.a(x)


class Twice(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.norm(x)) + self.b(self.norm(2 * x))


class Aliased(Base):
    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return self.a(self.norm(x)) + norm(x)


class OtherMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.norm(x))

    def features(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Packed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(*[self.norm(x)])


class Sliced(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.norm(x)[:1])


class Unused(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.a(x) if h.shape[0] else x


REFUSED = {
    Residual: "read in another way too: return h + self.a(h)",
    Alias: "read in another way too: other = h",
    OneBranchKeeps: "read in another way too: return x.relu()",
    Loop: "read in another way too: for layer in",
    Comprehension: "read in another way too: return sum(",
    Closure: "read in another way too: return (lambda",
    InPlace: "read in another way too: h += 1",
    Method: "go, which is no module",
    Twice: "calls it 2 times",
    Aliased: "does more with it than call it",
    OtherMethod: "features of OtherMethod uses it too",
    Packed: "read in another way too: return self.a(*[self.norm(x)])",
    Sliced: "read in another way too: return self.a(self.norm(x)[:1])",
    Unused: "nothing reads its result",
}


@pytest.mark.parametrize("kind", FOLLOWED)
def test_the_source_shows_where_a_result_goes(kind: type[Base]) -> None:
    model = convert(kind(), QAT, verbose=False)
    assert read_by(model) == {"norm": FOLLOWED[kind]}
    plain = convert(kind(), QAT, fuse=False, verbose=False)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 16)
    for net in (model, plain):
        for net.plain in (True, False):
            net(x).sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("kind", REFUSED)
def test_the_source_says_otherwise(kind: type[Base]) -> None:
    assert REFUSED[kind] in (reasons(kind())["norm"] or "fused")
    model = convert(kind(), QAT, verbose=False)
    assert read_by(model) == {}


def test_what_has_no_source_or_another_forward_stays() -> None:
    model = Nested()
    model.forward = lambda x: model.a(model.norm(x))  # type: ignore[method-assign]
    assert reasons(model)["norm"] == "forward of this Nested was replaced"
    namespace: dict[str, object] = {"Base": Base}
    exec("class Hidden(Base):\n    def forward(self, x):\n        return self.a(self.norm(x))", namespace)
    hidden = namespace["Hidden"]
    assert "has no source" in str(reasons(hidden())["norm"])  # type: ignore[operator]

    for reason in reasons(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16))).values():
        assert reason == "forward of Sequential does not call it by name"


def test_mlps_of_other_kinds() -> None:
    class Sum(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    class Residual(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            y = self.fc2(self.act(self.fc1(x)))
            return x + y

    class Reads(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            y = self.fc1(x)
            z = self.act(y)
            self.seen = z
            return self.fc2(z)

    class Scaled(Mlp):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.fc2(self.act(self.fc1(x)))

    for kind in (Sum, Residual, Reads, Scaled):
        assert reasons(nn.Sequential(kind(16, 32))) == {}, kind

    class Named(Gated):
        def forward(self, hidden: Tensor) -> Tensor:
            """With a docstring, another argument, and a variable on the way."""
            out = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
            return out  # noqa: RET504

    class Stepwise(Mlp):
        def forward(self, hidden: Tensor) -> Tensor:
            first = self.fc1(hidden)
            second = self.act(first)
            return self.fc2(second)

    for kind in (Named, Stepwise):
        assert reasons(nn.Sequential(kind(16, 32))) == {"0": None}, kind
    normed = Mlp(16, 32)
    normed.norm = nn.LayerNorm(32)
    found = reasons(nn.Sequential(normed))
    assert found["0"] == "norm stands between act and fc2"
    assert found["0.norm"] is None  # that one hands codes to fc2


def test_norms_of_other_kinds() -> None:
    class Scaled(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    class Nothing(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return x

    for kind in (Scaled, Nothing):
        model = Nested()
        model.norm = kind(16)
        assert reasons(model) == {}
    model = Nested()
    model.norm.forward = lambda x: x  # type: ignore[method-assign]
    assert reasons(model) == {}
    model = Nested()
    model.norm = Norm(16)
    assert reasons(model) == {"norm": None}
    model = Nested()
    model.norm = Norm(16)
    model.norm._fast_norm = True
    assert reasons(model) == {}


def test_a_name_must_mean_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Norm.forward.__globals__, "F", object())
    model = Nested()
    model.norm = Norm(16)
    assert reasons(model) == {}


def test_an_activation_with_another_forward() -> None:
    mlp = Mlp(16, 32)
    mlp.act.forward = lambda x: x  # type: ignore[method-assign]
    assert reasons(nn.Sequential(mlp))["0"] == "no kernel computes GELU"


class Attends(Base):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.attention(h, h, h)[0]


def test_attention_quantizes_for_itself() -> None:
    assert reasons(Attends())["norm"] == "attention is a MultiheadAttention, which quantizes for itself"


def test_modules_that_stand_in_two_places() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Nested(), Nested()
            self.second.norm = self.first.norm
            self.third, self.fourth = Nested(), Nested()
            self.fourth.a = self.third.a

        def forward(self, x: Tensor) -> Tensor:
            return self.fourth(self.third(self.second(self.first(x))))

    found = reasons(Shared())
    assert found["first.norm"] == "it is called from several places"
    assert found["third.norm"] == "a is called from several places"


def test_norms_over_more_than_the_last_dimension() -> None:
    model = Nested()
    model.norm = nn.LayerNorm((4, 16))
    assert reasons(model)["norm"] == "it normalises over 2 dimensions"
