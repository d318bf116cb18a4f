"""Rows of results, one JSON line each, in bench/results/<device>/<verb>.jsonl.

`python -m bench.ledger` lists the kernels whose sources changed since their newest passing row.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path

from . import device
from .case import Case
from .measure import Comparison, copy_bandwidth

RESULTS = Path(__file__).parent / "results"
HASH_LENGTH = 12
INCLUDE = re.compile(r'^#include "(\w+)/', re.M)  # folders of csrc
SUFFIXES = {"cpu": (".h", ".cpp"), "cuda": (".h", ".cuh", ".cu"), "triton": (), "reference": ()}
PYTHON_FILE = {"reference": "reference.py", "cpu": "cpu.py", "cuda": "cuda.py", "triton": "triton_jit.py"}

Row = dict[str, object]


def row(case: Case, timing: Comparison, goal: str | None = None) -> Row:
    """Everything that is known about one comparison that passed its check."""
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
        "gb_per_s": bandwidth and round(bandwidth, 2),
        "percent_of_copy": bandwidth and round(100 * bandwidth / copy_bandwidth(), 1),
        "gflop_per_s": round(case.flop / seconds / 1e9, 1) if case.flop else None,
        "memory": "reused" if case.reuse else "as allocated",
        "extra": case.extra,
        "kernels": hashes(case.kernels),
        "device": device.device(),
        "versions": device.versions(),
        "commit": device.commit(),
    }


def append(new: Row) -> Path:
    """Add a row to the file of its device and verb."""
    path = RESULTS / device.slug() / f"{new['verb']}.jsonl"
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
    """The Python of the kernel, the formats, and the C++ or CUDA of its verb with the folders that it includes."""
    root = device.ROOT
    folder = root / "fp8kernels" / "kernels" / verb
    found = [folder / "__init__.py", folder / PYTHON_FILE[backend], *(root / "fp8kernels" / "formats").glob("*.py")]
    if SUFFIXES[backend]:
        found.append(root / "python" / f"bind_{verb}{'_cuda' if backend == 'cuda' else ''}.cpp")
        folders, todo = set[str](), [verb]
        while todo:
            folders.add(part := todo.pop())
            files = [path for path in (root / "csrc" / part).rglob("*") if path.suffix in SUFFIXES[backend]]
            included = {name for path in files for name in INCLUDE.findall(path.read_text(encoding="utf-8"))}
            todo += sorted(included - folders - set(todo))
            found += files
    return sorted(path for path in found if path.is_file())


def kernels() -> Iterator[tuple[str, str]]:
    """(verb, backend) of every kernel of the package but the references."""
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


def main() -> int:
    found = debts(rows())
    for verb, backend, why in found:
        print(f"{verb:<12} {backend:<8} {why}")
    if not found:
        print("every kernel has a passing row of its present sources")
    return 0


if __name__ == "__main__":
    sys.exit(main())
