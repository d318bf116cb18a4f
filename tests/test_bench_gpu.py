"""What the benches do on a GPU, without one: a device with a clock of its own stands in for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bench import bench_gemm, bench_host, bench_serving, cuda_time, device, goals, gpu, ledger, pay, run, shapes, vendor
from bench.case import text
from bench.check import assert_between, assert_product, assert_same, ternary, ternary_product
from fp8kernels.formats import E4M3, HIF8
from fp8kernels.kernels.gemm import Operand
from fp8kernels.kernels.quantize import Rounding, reference
from fp8kernels.scaling.block import TENSOR


class Device:
    """Operations take seconds of a clock that only they move; inside a capture they are noted instead."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.done: list[str] = []
        self.tape: list[tuple[str, float]] | None = None

    def work(self, name: str, seconds: float, *, waits: bool = False) -> Callable[[], None]:
        def call() -> None:
            if self.tape is None:
                self.done.append(name)
                self.clock += seconds
            elif waits:
                raise RuntimeError("operation not permitted when stream is capturing")
            else:
                self.tape.append((name, seconds))

        return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Device:
    """torch.cuda, as far as bench/cuda_time.py uses it, on a Device."""
    made = Device()

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:  # noqa: FBT001, FBT002
            self.at = 0.0

        def record(self) -> None:
            self.at = made.clock

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.at - self.at)

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            pass

    class Graph:
        tape: list[tuple[str, float]]

        def replay(self) -> None:
            for name, seconds in self.tape:
                made.done.append(name)
                made.clock += seconds

    @contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        made.tape = []
        try:
            yield
            graph.tape = made.tape
        finally:
            made.tape = None

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        yield

    stand_ins = {
        "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": capture, "stream": on,
        "current_stream": Stream, "synchronize": lambda: None,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made


def test_graphs_take_turns_and_their_times_are_those_of_one_call(fake: Device) -> None:
    ours, baseline, how = cuda_time.take_turns(fake.work("ours", 2e-5), fake.work("baseline", 5e-3), seconds=0.1)
    assert how == cuda_time.GRAPH
    assert ours == pytest.approx([2e-5] * len(ours)) and baseline == pytest.approx([5e-3] * len(ours))
    assert len(ours) >= cuda_time.MIN_ROUNDS
    short = fake.done[-1 - 50 : -1]
    assert short == ["ours"] * 50, "short work is repeated inside one sample, long work is not"
    assert fake.done[-1] == "baseline" and fake.done[-52] == "baseline", "they take turns"


def test_work_that_waits_is_timed_without_a_graph(fake: Device) -> None:
    samples = cuda_time.take_turns(fake.work("ours", 1e-3), fake.work("it", 2e-3, waits=True), seconds=0.05)
    assert samples.how == f"ours: {cuda_time.GRAPH}, baseline: {cuda_time.EVENTS}"
    assert samples.baseline == pytest.approx([2e-3] * len(samples.baseline))
    stepped = cuda_time.events_only(fake.work("ours", 0.3), fake.work("it", 0.4, waits=True), seconds=1.0)
    assert stepped.ours == pytest.approx([0.3] * cuda_time.MIN_STEPS)
    assert stepped.baseline == pytest.approx([0.4] * cuda_time.MIN_STEPS)


def test_the_fastest_baseline_is_taken_and_refusals_are_told(fake: Device) -> None:
    def refuses() -> None:
        raise RuntimeError("needs sm_89\nand more")

    works = {"slow": [fake.work("slow", 2e-3)], "fast": [fake.work("fast", 1e-3)], "none": [refuses]}
    assert vendor.faster(works, "cuda")[0] == "fast"
    with pytest.raises(ValueError, match=r"none: needs sm_89$"):
        vendor.faster({"none": [refuses]}, "cuda")


def test_buffers_are_several_times_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    card = type("card", (), {"L2_cache_size": 50 << 20})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert cuda_time.sets_beyond_cache(1 << 30) == 1
    assert cuda_time.sets_beyond_cache(25 << 20) == 8
    assert cuda_time.sets_beyond_cache(1) == cuda_time.MAX_SETS


def test_sensor_readings() -> None:
    assert cuda_time.parsed("1980, 3201, 512.5, 41\n") == (1980.0, 3201.0, 512.5, 41.0)
    assert cuda_time.parsed("1980, [N/A], 512.5, 41") is None
    sensors = cuda_time.Sensors.__new__(cuda_time.Sensors)
    sensors.readings = []
    assert sensors.since(0) == {}
    sensors.readings = [(345.0, 1.0, 1.0, 1.0), (1900.0, 2.0, 2.0, 2.0), (1980.0, 4.0, 4.0, 4.0)]
    assert sensors.since(1)["clocks.sm"] == 1940.0
    assert sensors.since(3)["clocks.sm"] == 1980.0, "the newest one where none came meanwhile"


def test_gaps_are_those_between_the_kernels_of_a_replay() -> None:
    spans = [(0.0, 10.0), (11.0, 20.0), (22.0, 30.0), (100.0, 110.0), (109.0, 120.0), (124.0, 130.0)]
    assert bench_host.mean_gaps(spans, replays=2) == pytest.approx([1.5e-6, 2e-6])


def test_host_clock_does_not_wait_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    monkeypatch.setattr(bench_host, "synchronize", lambda: waits.append(1))
    calls: list[int] = []
    samples = bench_host.host_clock(lambda: calls.append(1), lambda: None, seconds=0.0)
    assert len(calls) == bench_host.CALLS * (1 + len(samples.ours))
    assert len(waits) == 1 + 2 * len(samples.ours)


def job(**arguments: object) -> run.Job:
    return run.Job("a-goal", "cpu", "bench_copy:versus_torch", arguments)


def test_a_wrong_kernel_is_told_and_what_cannot_run_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def measure(job: run.Job, seconds: object, sensors: object) -> ledger.Row:
        raise job.arguments["error"]  # type: ignore[misc]

    monkeypatch.setattr(run, "measure", measure)
    errors = [
        ValueError("torchao is not installed"),
        RuntimeError("no kernel can run gemm"),
        AssertionError("2 differ"),
    ]
    assert not run.measure_all([job(error=error) for error in errors], said.append)
    assert [line.split()[0] for line in said] == ["not", "not", "WRONG"]
    assert run.measure_all([job(error=error) for error in errors[:2]], said.append)
    with pytest.raises(run.Fault, match="illegal memory access"):
        run.measure_all([job(error=RuntimeError("CUDA error: an illegal memory access"))], said.append)


def test_measuring_stops_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(run, "measure", lambda *rest: pytest.fail("begun after the deadline"))
    assert run.measure_all([job(), job()], said.append, deadline=time.monotonic() - 1)
    assert "2 of 2 not measured" in said[0]


def test_every_kernel_that_can_owe_has_a_case() -> None:
    assert {verb for verb, _ in ledger.kernels()} <= set(pay.DEBT)
    jobs = list(pay.debt_jobs([]))
    assert {(job.arguments["backend"]) for job in jobs} == {backend for _, backend, _ in ledger.gpu_debts([])}


def test_what_has_a_row_of_present_sources_is_passed_over() -> None:
    everything = list(pay.goal_jobs(["gemm-vit-fast"]))
    assert len(everything) == len(shapes.named("products/vit"))
    first = everything[0]
    kernels = ledger.hashes(["gemm/reference"])
    row: ledger.Row = {"goal": first.goal, "shape": text(first.arguments["shape"]), "kernels": kernels}
    assert pay.owed(["gemm-vit-fast"], [], [row]) == everything[1:]
    assert pay.owed(["gemm-vit-fast"], [str(everything[1])], [row]) == everything[2:]
    assert pay.owed(["gemm-vit-fast"], [], [row | {"kernels": dict.fromkeys(kernels, "older")}]) == everything


def test_training_comes_last() -> None:
    names = [job.goal for job in pay.goal_jobs([])]
    assert set(names[-3:]) == {"gpu-train-e4m3", "gpu-train-hif8", "gpu-train-torchao"}
    assert "gpu-gemm-llm-worst" not in names
    assert {goal.name for goal in goals.goals() if goal.device == "cuda" and not goal.rows} <= set(names)


@pytest.mark.parametrize(
    ("capability", "arch"), [("9.0", "90a"), ("8.9", "89"), ("8.0", "80"), ("10.0", "100a"), ("12.0", "120")]
)
def test_architecture(capability: str, arch: str) -> None:
    assert gpu.architecture_of(capability) == arch
    assert f"-Ccmake.define.FP8KERNELS_CUDA_ARCHITECTURES={arch}" in gpu.build_command(arch)


def test_gpu_tests_are_found_by_their_marker() -> None:
    files = {Path(word).name for word in gpu.test_command() if word.endswith(".py")}
    assert {"test_kernels.py", "test_random.py", "test_limits.py", "test_graph.py", "test_copy_cpu.py"} <= files
    assert "test_formats.py" not in files, "it imports packages that need not be there"


def test_a_step_is_ended_at_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "TARGET", tmp_path)
    session = gpu.Session(time.monotonic() + 60, 60)
    assert session.run("sleep", [sys.executable, "-c", "import time; time.sleep(50)"], 1) == 124
    assert session.run("a step", [sys.executable, "-c", "print('WRONG one'); raise SystemExit(5)"], 30) == 5
    assert (tmp_path / "a-step.log").read_text().strip() == "WRONG one"
    assert [word for _, word, _ in session.results] == ["ended at its limit", "FAILED with exit code 5"]
    assert gpu.report(session) == 1
    assert "a-step: WRONG one" in capsys.readouterr().out, "what is wrong is told again, at the end"


def test_a_build_older_than_a_source_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "TARGET", tmp_path)
    assert not gpu.is_built()
    record = tmp_path / "fp8kernels-0.dist-info" / "RECORD"
    record.parent.mkdir()
    record.touch()
    os.utime(record, (time.time() + 1000,) * 2)
    assert gpu.is_built()
    os.utime(record, (0, 0))
    assert not gpu.is_built()


def test_without_a_gpu_make_gpu_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "architecture", lambda: None)
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_a_fault_is_skipped_in_the_next_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "TARGET", tmp_path)
    session = gpu.Session(time.monotonic() + 1000, 1000)
    commands: list[list[str]] = []

    def step(name: str, command: list[str], limit: float) -> int:
        commands.append(command)
        if len(commands) < 3:
            (tmp_path / "current").write_text(f"job {len(commands)}", encoding="utf-8")
            return -11
        return 0

    monkeypatch.setattr(session, "run", step)
    gpu.benches(session, ["gemm"])
    assert commands[2][-6:] == ["--only", "gemm", "--skip", "job 1", "--skip", "job 2"]


def test_padding_is_the_vendors() -> None:
    x, w = bench_gemm.operands("e4m3", (9, 21, 35))[0]
    exact = ternary(x, 1), ternary(w, 2)
    for make in (vendor.tensorwise, vendor.rowwise):
        out = make(*exact)()
        assert_same(out.contiguous(), ternary_product(*exact).bfloat16(), make.__name__)


def test_carriers_multiply_as_hif8_values() -> None:
    """The codes of the carrier case are E4M3, and stand for values of HiF8."""
    x, _ = bench_gemm.operands(bench_gemm.CARRIER, (16, 16, 64))[0]
    assert x.fmt is E4M3
    values = set((E4M3.decode(x.codes) * x.scale / 0.021).unique().tolist())
    assert values <= set(HIF8.table().tolist())


def test_checks_find_what_is_wrong() -> None:
    x, w = bench_gemm.operands("e4m3", (8, 16, 64))[0]
    out = (x.fmt.decode(x.codes).double() * x.scale) @ (w.fmt.decode(w.codes).double() * w.scale).T
    assert_product(out.float(), x, w, "gemm")
    out[3, 4] *= 1.01
    with pytest.raises(AssertionError, match="gemm: 1 of 128 beyond the bound"):
        assert_product(out.float(), x, w, "gemm")
    y = torch.randn(4, 100, dtype=torch.float64)
    how = Rounding(E4M3, TENSOR, E4M3.target)
    quantized = reference.quantize(y.float(), torch.full((1, 1), 0.01), how)
    slack = 1e-6 * y.abs()
    assert_between(quantized, y, slack, how, "codes")
    codes = quantized.codes.clone()
    codes[0, 0] ^= 0x01
    with pytest.raises(AssertionError, match="1 of 400 codes"):
        assert_between(quantized._replace(codes=codes), y, slack, how, "codes")


def test_ternary_operands_are_exact_in_short_sums() -> None:
    one = torch.ones(1, 1)
    x, w = (ternary(Operand(torch.empty(8, 500, dtype=torch.uint8), one, fmt), 3) for fmt in (E4M3, HIF8))
    assert set(x.fmt.decode(x.codes).unique().tolist()) == {-1.0, 0.0, 1.0}
    assert torch.equal(ternary_product(x, w), ternary_product(x, w).round())


def test_the_driver_is_asked_only_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def answer(command: list[str], **rest: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="580.1, 1980 MHz\n")

    monkeypatch.setattr(device.subprocess, "run", answer)
    assert device.queried(("driver_version", "clocks.max.sm")) == ["580.1", "1980 MHz"]
    assert all(word.startswith(("nvidia-smi", "--query-gpu=", "--format=", "-i", "0")) for word in commands[0])


SMALL = {"products": (48, 256, 384), "tensors": (64, 256)}  # in place of the shapes of a set
ONLY_THERE = ("launch_gaps", "compiled", "blockwise")  # a graph; minutes of compilation; torch has it for GPUs alone


@pytest.mark.parametrize(
    "goal",
    [goal for goal in (*goals.goals(), *goals.surveys()) if goal.device == "cuda" and not getattr(goal, "rows", "")],
    ids=lambda goal: goal.name,
)
def test_what_a_gpu_measures_is_right_at_a_small_shape_here(goal: goals.Survey) -> None:
    """Each case is built by the kernels that the table chooses on this machine, checked, and both sides run."""
    if goal.measure.endswith(ONLY_THERE):
        return
    first = goal.jobs()[0]
    arguments = dict(first.arguments)
    if goal.shapes:
        arguments["shape"] = SMALL[goal.shapes.split("/")[0]]
    if goal.measure == "bench_linear:versus_bf16":
        arguments["total"] = 1 << 20
    if goal.measure.startswith("bench_serving:"):
        arguments |= {"size": bench_serving.TINY, "device": "cpu"}
    made = run.Job(first.goal, "cpu", first.measure, arguments).case()
    made.check()
    made.ours()
    made.baseline()
    assert made.unit == goal.unit
    assert all(kernel.split("/")[1] != "table" for kernel in made.kernels) and made.kernels
    if made.unit == "of its GB/s":
        assert made.moved and made.baseline_moved


def test_launch_gaps_need_a_gpu() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no GPU"):
            bench_host.launch_gaps()
