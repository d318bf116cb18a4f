"""Measure what is owed to this machine's GPU, in order of importance, until time is over; `make gpu` calls it.

First one row of every kernel without a row of its present sources, then the goals and surveys of bench/goals.toml in
their order. What has a row of present sources on this GPU is passed over.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import device, goals, ledger
from .case import text
from .run import Fault, Job, measure_all

FAULT = 3  # exit code: this process can use the GPU no more

# for each verb the cases of which a kernel is measured on those that it takes: "bench file:function" and arguments
DEBT: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "quantize": [
        ("bench_quantize:versus_copy", {"fmt": fmt, "shape": (8192, 8192), "block": block})
        for fmt, block in (("e4m3", "tensor"), ("hif8", "tensor"), ("e4m3", "1x128"), ("e4m3", "128x128"))
    ],
    "dequantize": [("bench_dequantize:versus_torch", {"fmt": fmt, "shape": (8192, 8192)}) for fmt in ("e4m3", "hif8")],
    "gemm": [
        *(
            ("bench_gemm:versus_bf16", {"fmt": fmt, "shape": shape})
            for shape in ((4096, 4096, 4096), (16, 28672, 4096))
            for fmt in ("e4m3", "hif8")
        ),
        ("bench_gemm:blocks_versus_bf16", {"shape": (4096, 4096, 4096)}),
    ],
    "norm_quantize": [("bench_producers:norm", {"fmt": fmt, "shape": (16384, 4096)}) for fmt in ("e4m3", "hif8")],
    "act_quantize": [("bench_producers:activation", {"fmt": fmt, "shape": (16384, 6144)}) for fmt in ("e4m3", "hif8")],
    "norm_backward": [("bench_producers:norm_backward", {"shape": (16384, 4096)})],
    "act_backward": [("bench_producers:activation_backward", {"shape": (16384, 6144)})],
    "commit": [("bench_commit:versus_reference", {})],
    "copy": [("bench_copy:versus_torch", {"shape": (8192, 8192)})],
    "decode_attention": [("bench_attention:versus_sdpa", {"fmt": fmt}) for fmt in ("e4m3", "hif8")],
}


def debt_jobs(among: list[ledger.Row]) -> Iterator[Job]:
    """For every kernel that owes a row, the cases of its verb."""
    for verb, backend, _ in ledger.gpu_debts(among):
        for measure, arguments in DEBT[verb]:
            yield Job(None, "cuda", measure, {**arguments, "backend": backend})


def goal_jobs(names: Sequence[str]) -> Iterator[Job]:
    """Those of the goals and surveys for a GPU; a name may leave its "gpu-" out. The longest, training, come last."""
    chosen = [
        goal
        for goal in (*goals.goals(), *goals.surveys())
        if goal.device == "cuda" and (not names or any(named(goal.name, name) for name in names))
    ]
    chosen.sort(key=lambda goal: goal.measure.startswith("bench_train"))
    yield from goals.jobs_of(chosen)


def named(goal: str, name: str) -> bool:
    return goal.startswith((name, f"gpu-{name}"))


def is_done(job: Job, among: Sequence[ledger.Row]) -> bool:
    """Whether a row of this GPU has the goal and the shape, from kernels that are still the same."""
    shape = text(job.arguments["shape"]) if "shape" in job.arguments else None
    return job.goal is not None and any(
        row["goal"] == job.goal
        and (shape is None or row["shape"] == shape)
        and row["kernels"] == ledger.hashes(row["kernels"])  # type: ignore[arg-type]
        for row in among
    )


def owed(names: Sequence[str], skip: Sequence[str], among: list[ledger.Row]) -> list[Job]:
    """What is left to measure here; `skip` are jobs, as they print."""
    jobs = [*([] if names else debt_jobs(among)), *goal_jobs(names)]
    return [job for job in jobs if str(job) not in skip and not is_done(job, among)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pay", description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="goals and surveys whose names start so")
    parser.add_argument("--skip", action="append", default=[], help="jobs to leave out, as they print")
    parser.add_argument("--until", type=float, default=300.0, help="seconds after which nothing is begun (300)")
    parser.add_argument("--note", type=Path, help="a file that holds the job under way")
    given = parser.parse_args(arguments)
    deadline = time.monotonic() + given.until
    if not torch.cuda.is_available():
        print("bench.pay: torch sees no GPU; nothing is measured")
        return 0
    here = [row for row in ledger.rows() if row["slug"] == device.slug("cuda")]
    jobs = owed(given.only, given.skip, here)
    print(f"{len(jobs)} cases to measure on {device.slug('cuda')}")

    def say(line: str) -> None:
        print(line, flush=True)

    def begin(job: Job) -> None:
        if given.note:
            given.note.write_text(str(job), encoding="utf-8")

    passed = True
    try:
        passed = measure_all(jobs, say, deadline=deadline, begin=begin)
    except Fault as error:
        print(f"WRONG {error}")
        return FAULT
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
