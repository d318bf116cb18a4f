"""A linear layer that holds codes only: what training left behind, for serving."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import linear  # noqa: F401  registers torch.ops.fp8kernels.linear
from ..recipe import Role
from ..scaling.block import get_block
from .function import output_dtype
from .state import keep_dtypes


class InferenceLinear(nn.Module):
    """y = decode(quantize(x)) @ decode(weight_codes).T + bias; there is no high-precision weight and no gradient.

    weight_codes  uint8 [out_features, in_features]
    weight_scale  fp32, on the grid of the weight role's block
    input_scale   fp32 [1, 1]; 0 gives every input the scale of its own amax, in the input role's block
    bias          fp32 or bf16 [out_features], or None
    x             [..., in_features] fp32, bf16 or fp16
    returns       [..., out_features] in autocast's dtype, else that of x
    """

    weight_codes: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        input_role: Role,
        weight_role: Role,
        input_target: float,
        power_of_two: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.input_role, self.weight_role = input_role, weight_role
        self.input_target, self.power_of_two = input_target, power_of_two
        self._input = (input_role.fmt, input_role.block, float(input_target), power_of_two)
        grid = get_block(weight_role.block).grid(out_features, in_features)
        codes = torch.zeros(out_features, in_features, dtype=torch.uint8, device=device)
        self.register_buffer("weight_codes", codes)
        self.register_buffer("weight_scale", torch.ones(grid, dtype=torch.float32, device=device))
        self.register_buffer("input_scale", torch.zeros(1, 1, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32, device=device) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"input {tuple(x.shape)} and weight ({self.out_features}, {self.in_features}) do not multiply"
            )
        dtype = output_dtype(x)
        out: Tensor = torch.ops.fp8kernels.linear(
            x.detach() if x.requires_grad else x,
            self.input_scale,
            *self._input,
            self.weight_codes,
            self.weight_scale,
            self.weight_role.fmt,
            self.bias,
            torch.float32 if dtype == torch.float16 else dtype,
        )
        return out if out.dtype == dtype else out.to(dtype)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """`.to(dtype)` moves between devices; codes and scales keep their dtypes, as they are no activations."""
        before = {name: self._buffers[name] for name in ("weight_codes", "weight_scale", "input_scale")}
        super()._apply(fn, recurse)
        keep_dtypes(self, before)
        return self

    def extra_repr(self) -> str:
        """What the layer's line in print(model) says."""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"weight={self.weight_role.fmt}, input={self.input_role.fmt} {self.input_role.scaling}"
        )


def nbytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, shared ones once."""
    tensors = {tensor.data_ptr(): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return sum(tensor.nbytes for tensor in tensors.values())
