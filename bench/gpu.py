"""All that a machine with a GPU is for, in one command: build, test, watch with compute-sanitizer, measure, keep rows.

PYTHON=python3 make gpu                        everything, within SECONDS (520); what has a row of present sources is
                                               passed over, so that a second call goes on where the first ended
python3 -m bench.gpu --only build --only gemm  some steps (build, test, sanitize), or goals whose names start so

It takes the interpreter's own packages (torch from 2.11, pip, cmake, ninja, pybind11, scikit-build-core, pytest) and no
network, and installs into build/gpu only. With OUT set, rows and logs are copied there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
TARGET, BUILD = ROOT / "build" / "gpu", ROOT / "build" / "gpu-cmake"
STEPS = ("build", "test", "sanitize")
SECONDS = 520.0
LEAST_FOR_BENCHES = 0.5  # of the budget, which tests and compute-sanitizer leave to them
SANITIZER_SECONDS = 70.0  # of each tool
REFUSES = "Device not supported"  # what it says where the GPU's virtualisation hides what it needs
ERROR_FOUND = 9  # exit code of compute-sanitizer
TABLE_SECONDS = 15.0  # for the table of goals, last
MOST_FAULTS = 12
# in the logs of pytest, the benches, compute-sanitizer and the compilers
WRONG = re.compile(r"\bFAILED |^(ERROR|WRONG|not measured|out of time)|^=+ (Error|Invalid|Warning|ERROR SUMM)|\berror:")
SOURCES = (".py", ".h", ".cpp", ".cu", ".cuh", ".txt", ".toml")
LINES, LINE, COMMAND = 60, 160, 300  # of what went wrong, and characters of one; of a command
MARKER = re.compile(r"mark\.gpu\b|gpu\.lines")  # files whose tests need a GPU
ONLY_THERE = {(9, 0): "90a", (10, 0): "100a"}  # capabilities whose newest instructions want the "a"
XDIST = 8  # processes of pytest: Triton's compilation takes most of their time


@dataclass
class Session:
    """What is left of the budget, and how the steps went."""

    end: float
    budget: float
    results: list[tuple[str, str, float]] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, name: str, command: Sequence[str], limit: float) -> int:
        """Run a step for at most `limit` seconds; its exit code, or 124 when it was ended.

        Its output is passed on, and kept in build/gpu/<name>.log
        """
        begun = time.monotonic()
        print(f"\n== {name} (at most {limit:.0f} s of {self.left:.0f}): {' '.join(command)[:COMMAND]}", flush=True)
        process = subprocess.Popen(
            command, cwd=TARGET, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        pump = threading.Thread(target=passed_on, args=(process, log_of(name)), daemon=True)
        pump.start()
        try:
            code = process.wait(max(1.0, limit))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own group: the step and what it started
            process.wait()
            code = 124
        pump.join(5)
        word = {0: "passed", 124: "ended at its limit"}.get(code, f"FAILED with exit code {code}")
        self.results.append((name, word, time.monotonic() - begun))
        return code


def log_of(name: str) -> Path:
    return TARGET / f"{name.replace(' ', '-')}.log"


def passed_on(process: subprocess.Popen[str], log: Path) -> None:
    """Print what a process prints, line by line, and keep it."""
    assert process.stdout is not None
    with log.open("w", encoding="utf-8") as file:
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
            file.flush()


def environment() -> dict[str, str]:
    """Steps run inside build/gpu: the package that was built there comes before the sources in the tree."""
    path = os.pathsep.join((str(TARGET), str(ROOT)))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def architecture() -> str | None:
    """What nvcc is to build for: "90a" on an H100 or H200; None where nvidia-smi shows no GPU."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "-i", "0"]
    try:
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return architecture_of(said)


def architecture_of(capability: str) -> str:
    """The nvcc architecture of a compute capability: "8.9" gives "89"."""
    major, minor = (int(part) for part in capability.split("."))
    return ONLY_THERE.get((major, minor), f"{major}{minor}")


def build_command(arch: str) -> list[str]:
    """pip into build/gpu, with this interpreter's own build tools, for one architecture."""
    return [
        sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-index", "--no-build-isolation",
        "--no-deps", "--upgrade", "--target", str(TARGET), f"-Cbuild-dir={BUILD}",
        f"-Ccmake.define.FP8KERNELS_CUDA_ARCHITECTURES={arch}", str(ROOT),
    ]  # fmt: skip


def test_command() -> list[str]:
    """The tests with the marker `gpu`; other files may import packages that are not here."""
    files = [
        path for path in sorted((ROOT / "tests").rglob("test_*.py")) if MARKER.search(path.read_text(encoding="utf-8"))
    ]
    command = [
        sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT),
        "-o", "pythonpath=tests", "-p", "no:cacheprovider", "-v", "-m", "gpu", *map(str, files),
    ]  # fmt: skip
    return [*command, "-n", str(XDIST)] if _is_there("xdist") else command


def sanitizer_command(tool: str) -> list[str]:
    return [
        "compute-sanitizer", "--tool", tool, "--error-exitcode", str(ERROR_FOUND), "--print-limit", "20",
        sys.executable, str(ROOT / "tests" / "gpu" / "sanitize.py"),
    ]  # fmt: skip


def _is_there(module: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


def tests(session: Session) -> None:
    session.run("test", test_command(), min(200.0, session.left - LEAST_FOR_BENCHES * session.budget))


def sanitize(session: Session) -> None:
    """memcheck and racecheck, where compute-sanitizer is and runs."""
    if shutil.which("compute-sanitizer") is None:
        session.results.append(("sanitize", "passed over: compute-sanitizer is not on the path", 0.0))
        return
    for tool in ("memcheck", "racecheck"):
        limit = min(SANITIZER_SECONDS, session.left - LEAST_FOR_BENCHES * session.budget)
        if limit < 10:
            session.results.append((f"sanitize {tool}", "passed over: no time left for it", 0.0))
            continue
        code = session.run(f"sanitize {tool}", sanitizer_command(tool), limit)
        said = log_of(f"sanitize {tool}").read_text(encoding="utf-8", errors="replace")
        if code and REFUSES in said:
            name, _, seconds = session.results.pop()
            session.results.append((name, "passed over: it refuses this device", seconds))


def benches(session: Session, names: Sequence[str]) -> None:
    """Measure in order of importance until time is over; after a fault on the GPU go on, without what caused it."""
    skip: list[str] = []
    current = TARGET / "current"
    for number in range(MOST_FAULTS):
        current.write_text("", encoding="utf-8")
        limit = session.left - TABLE_SECONDS
        command = [sys.executable, "-m", "bench.pay", "--until", f"{limit - 5:.0f}", "--note", str(current)]
        for word, values in (("--only", names), ("--skip", skip)):
            command += [each for value in values for each in (word, value)]
        code = session.run(f"bench {number + 1}", command, limit)
        culprit = current.read_text(encoding="utf-8")
        if code in (0, 1, 124) or not culprit or session.left < 2 * TABLE_SECONDS:
            return
        skip.append(culprit)


def goals() -> None:
    """The table of goals, last; that some are not reached is no failure of this command."""
    command = [sys.executable, "-m", "bench.goals", "--short", "gpu-"]
    subprocess.run(command, cwd=TARGET, env=environment(), check=False)


def keep(out: str | None) -> None:
    """Copy the rows and the logs to OUT."""
    if out:
        shutil.copytree(ROOT / "bench" / "results", Path(out) / "results", dirs_exist_ok=True)
        for log in TARGET.glob("*.log"):
            shutil.copy(log, out)
        print(f"rows and logs are in {out}")


def failures() -> list[str]:
    """The lines of all logs that tell what is wrong, shortened; more of them are in the logs."""
    found = []
    for log in sorted(TARGET.glob("*.log")):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        found += [f"{log.stem}: {line[:LINE]}" for line in lines if WRONG.search(line)]
    return list(dict.fromkeys(found))[:LINES]


def is_built() -> bool:
    """Whether build/gpu holds a build that is newer than every source."""
    built = [path.stat().st_mtime for path in TARGET.glob("*.dist-info/RECORD")]
    sources = [ROOT / "CMakeLists.txt", ROOT / "pyproject.toml"]
    sources += [path for folder in ("csrc", "python", "fp8kernels") for path in (ROOT / folder).rglob("*.*")]
    newest = max(path.stat().st_mtime for path in sources if path.suffix in SOURCES)
    return bool(built) and max(built) > newest


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", default=[], help=f"{', '.join(STEPS)}, or the start of a goal's name"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything ({SECONDS:g})")
    parser.add_argument("--out", default=os.environ.get("OUT"), help="a folder to copy the rows to")
    parser.add_argument("--rehearse", metavar="ARCH", help="build for ARCH and run all steps without a GPU")
    given = parser.parse_args(arguments)
    arch = given.rehearse or architecture()
    if arch is None:
        print("make gpu: nvidia-smi shows no GPU here. CI tests the rest: make test", file=sys.stderr)
        return 2
    TARGET.mkdir(parents=True, exist_ok=True)
    for log in TARGET.glob("*.log"):
        log.unlink()
    session = Session(time.monotonic() + given.seconds, given.seconds)
    wanted = [step for step in STEPS if step in given.only or not given.only]
    names = [name for name in given.only if name not in STEPS]
    if "build" in wanted or not is_built():
        code = session.run("build", build_command(arch), session.left)
        if code:
            return report(session)
    if "test" in wanted:
        tests(session)
    if "sanitize" in wanted and not given.rehearse:
        sanitize(session)
    if names or not given.only:
        benches(session, names)
    keep(given.out)
    worst = report(session)
    goals()
    return worst


def report(session: Session) -> int:
    """What went wrong, and how the steps went; 1 where one failed."""
    print()
    print("\n".join(failures()))
    for name, word, seconds in session.results:
        print(f"{name:<20} {word} ({seconds:.0f} s)")
    return 0 if all(not word.startswith("FAILED") for _, word, _ in session.results) else 1


if __name__ == "__main__":
    sys.exit(main())
