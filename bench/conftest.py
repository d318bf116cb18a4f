"""pytest bench/ -k gemm --fmt hif8 --shapes 2048x2048x2048 --backend cpu [--record]"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import ledger
from bench.case import Case, Shape
from bench.measure import MIN_ROUNDS, Comparison, Samples, reuse_freed_memory, sample, summary, synchronize
from bench.run import forced
from fp8kernels.formats import FORMATS

THREADS = 2
SECONDS = 1.5  # of one comparison
lines: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fp8kernels")
    group.addoption("--fmt", default="hif8,e4m3", help="formats, with commas between (hif8,e4m3)")
    group.addoption("--shapes", default="", help="shapes, with commas between: MxNxK for gemm, MxK for quantize")
    group.addoption("--backend", default="cpu", help="backends, with commas between (cpu)")
    group.addoption("--record", action="store_true", help="append the rows to bench/results")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    formats, backends, shapes = (words(metafunc.config, name) for name in ("fmt", "backend", "shapes"))
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise pytest.UsageError(f"--fmt {','.join(unknown)}: known are {', '.join(FORMATS)}")
    if "fmt" in metafunc.fixturenames:
        metafunc.parametrize("fmt", formats)
    if "torch_fmt" in metafunc.fixturenames:
        metafunc.parametrize("torch_fmt", [name for name in formats if FORMATS[name].carrier is not None])
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", backends)
    if "shape" in metafunc.fixturenames:
        small: Shape = metafunc.module.SMALL
        given = [parsed(each) for each in shapes]
        fitting = [each for each in given if len(each) == len(small)] or [small]
        metafunc.parametrize("shape", fitting, ids=["x".join(map(str, each)) for each in fitting])


def words(config: pytest.Config, option: str) -> list[str]:
    return [word for word in config.getoption(option).split(",") if word]


def parsed(shape: str) -> Shape:
    try:
        return tuple(int(size) for size in shape.split("x"))
    except ValueError:
        raise pytest.UsageError(f"--shapes {shape}: sizes with x between, such as 2048x2048x2048") from None


def line(case: Case, timing: Comparison, row: ledger.Row) -> str:
    speed = f"{row['gb_per_s']} GB/s, {row['percent_of_copy']}% of copy" if case.moved else ""
    speed = f"{row['gflop_per_s']} GFLOP/s" if case.flop and case.verb == "gemm" else speed
    return (
        f"{case.name} {case.fmt} {case.shape} {case.backend}: {timing.ours.p50:.4f} ms {speed and f'({speed})'}, "
        f"{case.against} {timing.baseline.p50:.4f} ms: {case.figure(timing):.2f} {case.unit}"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines:
        terminalreporter.section("ours against the baseline, in turn (medians)")
        for each in lines:
            terminalreporter.write_line(each)


@pytest.fixture
def race(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Callable[[Case], None]:
    """Check a case, then time both sides in turn: the baseline runs between the rounds of ours."""

    def run(case: Case) -> None:
        def work() -> None:
            case.ours()
            synchronize()

        reuse_freed_memory(on=case.reuse)
        with forced(case.backend):
            case.check()
            baseline: list[float] = []
            case.ours()
            case.baseline()
            if case.device == "cuda" or case.clock is not None:  # a stopwatch around the calls is not the measure there
                benchmark.pedantic(work)
                samples = None if benchmark.disabled else case.samples(SECONDS)
            else:
                round_seconds = sample(case.ours) + sample(case.baseline)
                benchmark.pedantic(
                    work,
                    setup=lambda: baseline.append(sample(case.baseline)),
                    rounds=max(MIN_ROUNDS, min(200, int(SECONDS / round_seconds))),
                )
                samples = None if benchmark.disabled else Samples(list(benchmark.stats.stats.data), baseline)
        if samples is None:  # --benchmark-disable: the check was all
            return
        timing = summary(samples.ours, samples.baseline)
        row = ledger.row(case, timing, how=samples.how)
        benchmark.extra_info.update(
            {key: row[key] for key in ("baseline", "baseline_ms", "figure", "gb_per_s", "gflop_per_s")}
        )
        lines.append(line(case, timing, row))
        if request.config.getoption("--record"):
            ledger.append(row, case.device)

    return run
