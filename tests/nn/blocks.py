"""Transformer blocks with the names of timm's vision transformer and of Llama, for tests without either."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Norm(nn.LayerNorm):
    """A LayerNorm that calls the function itself, with a switch for another one, as timm has it."""

    _fast_norm = False

    def forward(self, x: Tensor) -> Tensor:
        if self._fast_norm:
            return fast_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def fast_layer_norm(x: Tensor, *rest: object) -> Tensor:
    raise AssertionError("nothing here sets the switch")


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.fused_attn = heads, True
        self.qkv, self.q_proj = nn.Linear(dim, 3 * dim), None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.q_proj(x) if self.qkv is None else self.qkv(x)
        q, k, v = qkv.reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        else:
            x = (q @ k.mT).softmax(-1) @ v
        x = x.transpose(1, 2).reshape(batch, tokens, width)
        return self.proj_drop(self.proj(x))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, act: type[nn.Module] = nn.GELU, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        x = self.norm(x)
        x = self.fc2(x)
        return self.drop2(x)


class Block(nn.Module):
    def __init__(self, dim: int = 64, heads: int = 4, **mlp: object) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.ls1, self.drop_path1 = nn.Identity(), nn.Identity()
        self.norm2 = Norm(dim)
        self.mlp = Mlp(dim, 2 * dim, **mlp)  # type: ignore[arg-type]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=False)))
        return x + self.mlp(self.norm2(x))


class Heads(nn.Module):
    """A norm that three layers read, as q, k and v do, and a gated MLP."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.mlp = Gated(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + torch.tanh(self.q(h)) * self.k(h) + self.v(h)
        return x + self.mlp(x)


class Gated(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
