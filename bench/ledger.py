"""Rows of results, one JSON line each, in bench/results/<device>/<verb>.jsonl.

`python -m bench.ledger` lists the kernels without a passing row of their present sources: the CPU's first, then the GPU
debt, what the next machine with a GPU is to measure.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path

from . import cuda_time, device
from .case import Case
from .measure import Comparison, copy_bandwidth

RESULTS = Path(__file__).parent / "results"
HASH_LENGTH = 12
INCLUDE = re.compile(r'^#include "(\w+)/', re.M)  # folders of csrc
CPU_SUFFIXES = (".h", ".cpp")
PYTHON_FILE = {"triton": "triton_jit.py"}  # other backends stand in a file of their own name
CUDA_INCLUDE = re.compile(r'^#include "([\w/.]+)"', re.M)
ON_CPU = ("cpu",)  # backends whose rows any machine can make

Row = dict[str, object]


def row(
    case: Case, timing: Comparison, goal: str | None = None, how: str = "calls", sensors: dict[str, float] | None = None
) -> Row:
    """Everything that is known about one comparison that passed its check."""
    on_gpu = case.device == "cuda"
    copy = (cuda_time.copy_bandwidth if on_gpu else copy_bandwidth) if case.moved else None
    seconds = timing.ours.p50 / 1e3
    bandwidth = case.moved / seconds / 1e9 if case.moved else None
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "goal": goal,
        "verb": case.verb,
        "case": case.name,
        "fmt": case.fmt,
        "backend": case.backend,
        "shape": case.shape,
        "passed": True,
        "ours_ms": timing.ours.__dict__,
        "baseline": case.against,
        "baseline_ms": timing.baseline.__dict__,
        "rounds": timing.rounds,
        "figure": round(case.figure(timing), 4),
        "unit": case.unit,
        "gb_per_s": bandwidth and round(bandwidth, 2),
        "percent_of_copy": round(100 * bandwidth / copy(), 1) if bandwidth and copy else None,
        "gflop_per_s": round(case.flop / seconds / 1e9, 1) if case.flop else None,
        "memory": "reused" if case.reuse else "as allocated",
        "extra": case.extra,
        "kernels": hashes(case.kernels),
        "device": device.device(case.device),
        "versions": device.versions(),
        "commit": device.commit(),
    } | ({"timed": how, "copy_gb_per_s": round(cuda_time.copy_bandwidth()), "sensors": sensors or {}} if on_gpu else {})


def append(new: Row, kind: str = "cpu") -> Path:
    """Add a row to the file of its device ("cpu" or "cuda") and verb."""
    path = RESULTS / device.slug(kind) / f"{new['verb']}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(new) + "\n")
    return path


def rows(folder: Path | None = None) -> list[Row]:
    """All rows of all devices, oldest first."""
    found = []
    for path in sorted((folder or RESULTS).glob("*/*.jsonl")):
        with path.open(encoding="utf-8") as file:
            found += [json.loads(line) | {"slug": path.parent.name} for line in file if line.strip()]
    return sorted(found, key=lambda each: str(each["when"]))


def newest(goal: str, among: Iterable[Row], slug: str | None = None) -> Row | None:
    """The newest passing row of a goal, of this device where it has one."""
    mine = [each for each in among if each["goal"] == goal and each["passed"]]
    return next((each for each in reversed(mine) if each["slug"] == slug), mine[-1] if mine else None)


def source_hash(verb: str, backend: str) -> str:
    """A hash of the files that decide what a kernel computes and how fast."""
    digest = hashlib.sha256()
    for path in sources(verb, backend):
        digest.update(path.relative_to(device.ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:HASH_LENGTH]


def hashes(kernels: Iterable[str]) -> dict[str, str]:
    """The present hash of each "verb/backend"."""
    return {kernel: source_hash(*kernel.split("/")) for kernel in kernels}


def sources(verb: str, backend: str) -> list[Path]:
    """The files that make a kernel.

    Its Python with all that it imports of fp8kernels.kernels, the words of its verb, the formats; of a compiled one the
    C++ or CUDA with all that it includes, and the binding.
    """
    package = device.ROOT / "fp8kernels" / "kernels"
    file = PYTHON_FILE.get(backend, f"{backend}.py")
    python = _python(package / verb / file, package)
    found = [*python, package / verb / "__init__.py", *(device.ROOT / "fp8kernels" / "formats").glob("*.py")]
    if backend == "cpu":  # composed ones call the compiled code of other verbs
        verbs = {path.parent.name for path in python if path.name == file} | {verb}
        for each in sorted(verbs):
            found += [device.ROOT / "python" / f"bind_{each}.cpp", *_cpp(each)]
    elif backend in ("cuda", "stream"):
        found += _cuda(verb, backend)
    return sorted({path for path in found if path.is_file()})


def _python(path: Path, package: Path) -> set[Path]:
    """A file of fp8kernels.kernels and those that it imports, from import to import; loading code decides nothing."""
    found, todo = set[Path](), [path]
    while todo:
        here = todo.pop()
        if here.is_file() and here not in found and here.name != "compiled.py":
            found.add(here)
            todo += _imports(here, package)
    return found


def _imports(path: Path, package: Path) -> list[Path]:
    """The files of the package that a file's relative imports can mean."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            names = [base / alias.name for alias in node.names]
            found += [each.with_suffix(".py") for each in (base, *names)] + [base / "__init__.py"]
    return [each for each in found if package in each.parents and each != package / "__init__.py"]


def _cpp(verb: str) -> list[Path]:
    """The C++ of a verb's folder, and of every folder that it includes from."""
    found: list[Path] = []
    folders, todo = set[str](), [verb]
    while todo:
        folders.add(part := todo.pop())
        files = [path for path in (device.ROOT / "csrc" / part).rglob("*") if path.suffix in CPU_SUFFIXES]
        included = {name for path in files for name in INCLUDE.findall(path.read_text(encoding="utf-8"))}
        todo += sorted(included - folders - set(todo))
        found += files
    return found


def _cuda(verb: str, backend: str) -> list[Path]:
    """The binding and the CUDA of a verb, from csrc/<verb> and csrc/<verb>_<kind>, with every header that it includes.

    What is named "stream" is the backend of that name; all else is the backend "cuda".
    """
    root = device.ROOT
    files = [*root.glob(f"csrc/{verb}/*.cu")]
    files += [path for path in root.glob(f"csrc/{verb}_*/*") if path.suffix in (".cu", ".cpp")]
    todo = [path for path in files if ("stream" in str(path.relative_to(root))) == (backend == "stream")]
    found = set(root.glob(f"python/bind_{verb}_*cuda.cpp"))  # one for both
    while todo:
        found.add(path := todo.pop())
        included = {root / "csrc" / name for name in CUDA_INCLUDE.findall(path.read_text(encoding="utf-8"))}
        todo += [each for each in included - found if each.is_file()]
    return sorted(found)


def kernels() -> Iterator[tuple[str, str]]:
    """(verb, backend) of every kernel of the package but the references and what has them for its definition."""
    from fp8kernels.ops.table import TABLE

    for verb, table in TABLE.items():
        yield from ((verb, kernel.name) for kernel in table if kernel.name != "reference")


def debts(among: list[Row]) -> list[tuple[str, str, str]]:
    """(verb, backend, why) of every kernel without a passing row of its present sources."""
    found = []
    for verb, backend in kernels():
        key = f"{verb}/{backend}"
        measured = [each for each in among if each["passed"] and key in each["kernels"]]
        if not measured:
            found.append((verb, backend, "never measured"))
        elif not any(each["kernels"][key] == source_hash(verb, backend) for each in measured):
            found.append((verb, backend, f"changed since the row of {measured[-1]['when']}"))
    return found


def gpu_debts(among: list[Row]) -> list[tuple[str, str, str]]:
    """Those of them that need a GPU."""
    return [each for each in debts(among) if each[1] not in ON_CPU]


def newest_row(verb: str, backend: str, among: Iterable[Row]) -> str | None:
    """The date on which a kernel passed last, whatever its sources were; None if never."""
    key = f"{verb}/{backend}"
    dates = [str(each["when"])[:10] for each in among if each["passed"] and key in each["kernels"]]  # type: ignore[operator]
    return max(dates, default=None)


def main() -> int:
    among = rows()
    found, gpu = debts(among), gpu_debts(among)
    for verb, backend, why in found:
        if (verb, backend, why) not in gpu:
            print(f"{verb:<14} {backend:<8} {why}")
    if gpu:
        print(f"GPU debt: {len(gpu)} kernels without a passing row of their present sources; `make gpu` pays it")
        for verb, backend, why in gpu:
            print(f"  {verb:<14} {backend:<8} {why}")
    if not found:
        print("every kernel has a passing row of its present sources")
    return 0


if __name__ == "__main__":
    sys.exit(main())
