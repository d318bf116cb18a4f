"""Linear, and the convolutions that are one: kernel = stride, as in patch embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..recipe import Recipe, get_recipe
from .function import scaled_linear
from .high import high_linear
from .state import ScaledLayer


class Linear(ScaledLayer, nn.Linear):
    """torch.nn.Linear that computes on 8-bit codes and keeps its high-precision weight.

    x        [..., in_features] fp32, bf16 or fp16
    returns  [..., out_features] in autocast's dtype, else that of x
    recipe   a name or a Recipe; see fp8kernels.recipe
    state    buffers fp8_*; forwards in training mode note amax and counts, `fp8kernels.commit` makes scales of them
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        recipe: Recipe | str = "hif8-qat",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.attach(get_recipe(recipe).alone())

    def forward(self, x: Tensor) -> Tensor:
        return (scaled_linear if self.fp8_on else high_linear)(self, x, self.weight, self.bias)


class _PatchConv(ScaledLayer):
    """Convolution with kernel = stride: every patch is one row of a linear layer."""

    in_channels: int
    kernel_size: tuple[int, ...]
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.flatten(1)  # [out, in * prod(kernel)]
        unbatched = x.ndim == len(self.kernel_size) + 1
        patches = to_patches(x.unsqueeze(0) if unbatched else x, self.kernel_size, self.in_channels)  # [B, *grid, K]
        out = (scaled_linear if self.fp8_on else high_linear)(self, patches, weight, self.bias)  # [B, *grid, out]
        out = out.movedim(-1, 1)  # [B, out, *grid]
        return out.squeeze(0) if unbatched else out


def to_patches(x: Tensor, kernel: tuple[int, ...], channels: int) -> Tensor:
    """[B, C, *space] -> [B, *grid, C * prod(kernel)]; what does not fill a patch is dropped, as convolution does.

    raises   ValueError for a wrong rank, a wrong number of channels, or space smaller than a patch
    """
    space = x.shape[2:]
    if len(space) != len(kernel) or x.shape[1] != channels or any(s < k for s, k in zip(space, kernel, strict=True)):
        raise ValueError(
            f"input {tuple(x.shape)} does not fit a patch embedding: [batch, {channels}, {len(kernel)} spatial "
            f"dimensions of at least {kernel}]"
        )
    grid = [s // k for s, k in zip(space, kernel, strict=True)]
    for axis, (count, size) in enumerate(zip(grid, kernel, strict=True), start=2):
        x = x.narrow(axis, 0, count * size)
    split = [n for pair in zip(grid, kernel, strict=True) for n in pair]
    x = x.reshape(x.shape[0], x.shape[1], *split)  # [B, C, g0, k0, g1, k1, …]
    axes = len(kernel)
    order = [0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2)]
    return x.permute(order).reshape(x.shape[0], *grid, -1)  # [B, *grid, C * prod(kernel)]


class Conv1d(_PatchConv, nn.Conv1d):
    """torch.nn.Conv1d with kernel = stride, no padding, dilation or groups, on 8-bit codes."""


class Conv2d(_PatchConv, nn.Conv2d):
    """torch.nn.Conv2d with kernel = stride, no padding, dilation or groups, on 8-bit codes."""


class Conv3d(_PatchConv, nn.Conv3d):
    """torch.nn.Conv3d with kernel = stride, no padding, dilation or groups, on 8-bit codes."""


def why_not_patches(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str | None:
    """Why a convolution is not a linear layer over patches, in words, or None."""
    ones = (1,) * len(conv.kernel_size)
    if tuple(conv.kernel_size) != tuple(conv.stride):
        return f"kernel {tuple(conv.kernel_size)} differs from stride {tuple(conv.stride)}"
    if isinstance(conv.padding, str) and conv.padding != "valid":
        return f"padding {conv.padding!r}"
    if not isinstance(conv.padding, str) and any(conv.padding):
        return f"padding {tuple(conv.padding)}"
    if tuple(conv.dilation) != ones or conv.groups != 1:
        return f"dilation {tuple(conv.dilation)}, groups {conv.groups}"
    return None
