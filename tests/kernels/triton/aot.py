"""Triton kernels compiled ahead of time, without a driver or a GPU: the machine code for each architecture."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"  # the wheel brings it


@dataclass(frozen=True)
class Built:
    """One kernel compiled for one architecture.

    asm   "ttir", "ttgir", "llir" and "ptx" or "amdgcn" as text; "cubin" or "hsaco" as bytes
    """

    name: str
    target: str
    asm: dict[str, Any]
    path: Path  # of the cubin or hsaco
    shared: int  # bytes of shared memory

    @cached_property
    def text(self) -> str:
        """PTX, or the assembly of an AMD GPU."""
        return str(self.asm["ptx" if "ptx" in self.asm else "amdgcn"])

    @cached_property
    def sass(self) -> str:
        """The machine instructions of an NVIDIA GPU."""
        return _run(CUOBJDUMP, "-sass", self.path)

    @cached_property
    def resources(self) -> dict[str, int]:
        """Registers of a thread, and the bytes of local memory (`stack`, `local`) that spilling or arrays take."""
        if "cubin" not in self.asm:  # an AMD GPU spills into its private segment
            names = {"registers": "vgpr_count", "stack": "private_segment_fixed_size", "local": "vgpr_spill_count"}
            return {key: int(re.findall(rf"\.{name}:\s+(\d+)", self.text)[0]) for key, name in names.items()}
        usage = _run(CUOBJDUMP, "-res-usage", self.path)
        number = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        return {"registers": number["REG"], "stack": number["STACK"], "local": number["LOCAL"]}

    @property
    def spills(self) -> int:
        """Bytes of local memory: 0 means that everything stays in registers and shared memory."""
        return self.resources["stack"] + self.resources["local"]


def compile_for(
    target: str,
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    *,
    aligned: Iterable[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
) -> Built:
    """Compile a @triton.jit function for a target of TARGETS; the result comes from Triton's cache where it is there.

    signature   the Triton type of each argument that is no constexpr ("*bf16", "fp32", "i64"), by name
    constexprs  the value of each constexpr
    aligned     arguments whose address or value is a multiple of 16, as the launcher finds out at run time
    raises      ValueError naming arguments that are missing or unknown
    """
    names = list(kernel.arg_names)
    if set(names) != set(signature) | set(constexprs):
        wrong = set(names) ^ (set(signature) | set(constexprs))
        raise ValueError(f"{kernel.__name__}: missing or unknown arguments {sorted(wrong)}; it has {names}")
    types = {name: "constexpr" if name in constexprs else signature[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return _built(kernel.__name__, target, triton.compile(source, target=TARGETS[target], options=options))


@contextmanager
def launches(target: str) -> Iterator[list[Built]]:
    """Collects what each kernel launched inside is compiled to for a target; nothing runs.

    So a launcher, called with CPU tensors, compiles exactly what it would launch on that GPU: the same types,
    alignments, constants and options.
    """
    built: list[Built] = []
    compile_only = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        built.append(_built(self.__name__, target, kernel))

    on_target = mock.Mock()
    on_target.get_current_device.return_value = target
    on_target.get_current_target.return_value = TARGETS[target]
    before = driver._active
    driver.set_active(on_target)
    try:
        with mock.patch.object(JITFunction, "run", run):
            yield built
    finally:
        driver._active = before


def _built(name: str, target: str, kernel: Any) -> Built:
    kind = "cubin" if "cubin" in kernel.asm else "hsaco"
    path = next(Path(p) for file, p in kernel.metadata_group.items() if file.endswith(f".{kind}"))
    return Built(name, target, kernel.asm, path, kernel.metadata.shared)


def _run(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout
