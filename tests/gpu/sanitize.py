"""Every kernel for a GPU once or twice on small odd shapes: what compute-sanitizer watches (`make gpu` calls it).

compute-sanitizer --tool memcheck|racecheck python tests/gpu/sanitize.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import torch
from gpu.lines import CUDA, Draw, Line, to
from gpu.test_random import act_case, dequantize_case, gemm_case, norm_case, quantize_case

from fp8kernels.formats import HIF8
from fp8kernels.kernels.commit import ScaleRule, State
from fp8kernels.kernels.decode_attention import HeadCodes
from fp8kernels.kernels.norm_quantize import Norm
from fp8kernels.ops.table import TABLE

CASES = {
    "quantize": quantize_case,
    "dequantize": dequantize_case,
    "gemm": gemm_case,
    "norm_quantize": norm_case,
    "act_quantize": act_case,
}
WANTED, DRAWN = 4, 60  # cases that a kernel is to take, of so many that are drawn
OTHERS = ("cpu", "reference")


def main() -> int:
    for verb, kernels in TABLE.items():
        for kernel in kernels:
            if kernel.name not in OTHERS:
                print(f"{verb}/{kernel.name}: {watch(Line(verb, kernel, CUDA))} cases", flush=True)
    return 0


def watch(line: Line) -> int:
    """How many cases ran; each also asserts that its result is right."""
    if line.verb in CASES:
        taken = 0
        for seed in range(DRAWN):
            taken += CASES[line.verb](line, Draw(seed))
            if taken == WANTED:
                break
        return taken
    args = arguments(line.verb, line.device)
    if args is None or not line.takes(*args):
        return 0
    line.kernel.run(*args)
    if line.device == CUDA:
        torch.cuda.synchronize()
    return 1


def arguments(verb: str, device: str) -> tuple[object, ...] | None:
    """Arguments of the verbs that no random case is drawn for; None for a verb that is new here."""
    x, dy = (torch.randn(67, 301, device=device).bfloat16() for _ in range(2))
    if verb == "copy":
        return (x,)
    if verb == "commit":
        state = State(torch.rand(3, 7), torch.rand(3), torch.rand(3), torch.full((3,), 15.0))
        return to([state] * 5, device), ScaleRule()
    if verb == "act_backward":
        return dy, x, dy.clone(), "silu"
    if verb == "decode_attention":
        keys, values = (
            HeadCodes(HIF8.encode(torch.randn(2, 2, 67, 72)).to(device), torch.ones(2, 2, device=device))
            for _ in range(2)
        )
        return torch.randn(2, 6, 3, 72, device=device), keys, values, HIF8, 0.1, None
    if verb == "norm_backward":
        weight = torch.ones(301, device=device).bfloat16()
        return dy, x, torch.ones(67, device=device), torch.zeros(67, device=device), Norm(weight, weight, 1e-5, True)
    return None


if __name__ == "__main__":
    sys.exit(main())
