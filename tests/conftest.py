"""What all tests share: two threads, fixed seeds, and a run that fails when a test skips without a listed reason."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import skips
import torch

THREADS = 2  # of torch and of our kernels: what a small machine has, so that timings and orders are the same everywhere
unexpected: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def seeds() -> Iterator[None]:
    """The same random numbers in every run and in any order of the tests."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for code under test that uses the global generator
    torch.manual_seed(0)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def no_state_of_accelerate() -> Iterator[None]:
    """accelerate keeps one state for the process, which holds the precision of the first run; each test is without."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def note_skip(nodeid: str, longrepr: object) -> None:
    reason = str(longrepr[2] if isinstance(longrepr, tuple) else longrepr)
    if not skips.is_expected(reason):
        unexpected.append(f"{nodeid}: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        note_skip(report.nodeid, report.longrepr)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        note_skip(report.nodeid, report.longrepr)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if unexpected and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if unexpected:
        terminalreporter.section("skips that tests/skips.py does not list", red=True, bold=True)
        for line in unexpected:
            terminalreporter.write_line(line)
