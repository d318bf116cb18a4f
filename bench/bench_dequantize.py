"""dequantize: codes to bf16."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fp8kernels.formats import E4M3, get_format

from .case import Case, Shape, device_of, generator, in_turn, pick, reference, sets, text
from .check import assert_same

FULL, SMALL = (8192, 8192), (512, 1024)
CHECKED_ROWS = 128


def versus_torch(fmt: str, shape: Shape = FULL, backend: str = "cpu") -> Case:
    """Against torch's copy_ from its own e4m3, the nearest that torch has for every format."""
    f, device = get_format(fmt), device_of(backend)
    codes = random_codes(shape, fmt, device=device)
    scale = torch.full((1, 1), 0.0123, device=device)
    args = (codes, scale, f, torch.bfloat16)
    chosen = pick("dequantize", backend, *args)
    source = random_codes(shape, "e4m3", device=device).view(E4M3.carrier)
    out = torch.empty(shape, dtype=torch.bfloat16, device=device)
    more = range(1, sets(device, 3 * codes.numel()))
    ours = [partial(chosen.run, *args), *(partial(chosen.run, codes.clone(), *args[1:]) for _ in more)]
    theirs = [partial(out.copy_, source), *(partial(torch.empty_like(out).copy_, source.clone()) for _ in more)]

    def check() -> None:
        expected = reference("dequantize")(codes[:CHECKED_ROWS], scale, f, torch.bfloat16)
        assert_same(chosen.run(*args)[:CHECKED_ROWS], expected, "dequantize")

    return Case(
        "dequantize", "dequantize tensor to bf16", fmt, chosen.name, text(shape), "torch copy_ e4m3 to bf16",
        in_turn(ours), in_turn(theirs), check, (f"dequantize/{chosen.name}",),
        moved=codes.numel() * 3, baseline_moved=codes.numel() * 3, reuse=True, device=device, calls=len(ours),
    )  # fmt: skip


def random_codes(shape: Shape, fmt: str, seed: int = 2, device: str = "cpu") -> Tensor:
    """The codes of normal numbers at the format's target: uint8."""
    f = get_format(fmt)
    x = torch.randn(4096, generator=torch.Generator().manual_seed(seed))
    codes = f.encode(x / (x.abs().max() / f.target))
    count = 1
    for size in shape:
        count *= size
    picks = torch.randint(0, len(codes), (count,), generator=generator(seed, device), device=device)
    return codes.to(device)[picks].reshape(shape)


def test_dequantize(fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(versus_torch(fmt, shape, backend))
