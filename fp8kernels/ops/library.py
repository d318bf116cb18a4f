"""Registering a verb with torch.library: one schema, one implementation for all devices, one fake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("fp8kernels", "DEF")
DEVICES = ("CPU", "CUDA")


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make `torch.ops.fp8kernels.<name>` of a schema "name(Tensor x, …) -> Tensor".

    run   computes, choosing a kernel by the table
    fake  returns empty tensors of the shapes, dtypes and devices that `run` returns
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in DEVICES:
        LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"fp8kernels::{name}", fake, lib=LIBRARY)
