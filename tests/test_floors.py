"""The floors of the house, held by reading the source: imports point down, and a few words live in one place only."""

from __future__ import annotations

import ast
import importlib
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import fp8kernels

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fp8kernels"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(
    path
    for folder in ("fp8kernels", "csrc", "python", "tests", "bench")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
)

FLOORS = (
    {"formats", "console", "headers", "statistics"},
    {"scaling"},
    {"kernels"},
    {"ops"},
    {"nn", "recipe", "peers"},
    {"convert", "export", "telemetry"},
    {"runs", "sensitivity"},
    {"models", "probe"},
    {"integrations"},
    {"training", "serving", "evaluation", "reports"},
    {"study"},
    {"cli", "info", "__main__", ""},  # "" is fp8kernels/__init__.py, the face: it may see all below
)
ONE_UNIT = ({"nn", "recipe", "peers"}, {"cli", "info", "__main__", ""})  # neighbours that may see each other
OPTIONAL = {
    "transformers",
    "tokenizers",
    "matplotlib",
    "peft",
    "accelerate",
    "trl",
    "vllm",
    "sglang",
    "triton",
    "lm_eval",
}
OPTIONAL_AT_HOME = {"integrations", "training", "serving"}
LARGEST = (448, 57344, 32768)  # of E4M3, E5M2 and HiF8
LIMIT = 500  # lines of one file


def unit(path: Path) -> str:
    """The top folder or module of the package that a file belongs to; "" for the package itself."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def floor(name: str) -> int:
    for number, names in enumerate(FLOORS):
        if name in names:
            return number
    raise AssertionError(f"fp8kernels/{name} stands on no floor; give it one here and in docs/ARCHITECTURE.md")


def imports(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a module imports, relative imports resolved."""
    package = ["fp8kernels", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def at(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def parse(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_there_is_something_to_read() -> None:
    assert len(MODULES) > 20
    assert any(path.suffix == ".cpp" for path in SOURCES)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = unit(path)
    wrong = []
    for line, name in imports(path, parse(path)):
        parts = name.split(".")
        if parts[0] != "fp8kernels":
            continue
        there = parts[1] if len(parts) > 1 else ""
        if there.startswith("_c") or there == here:
            continue
        if there and not (PACKAGE / there).exists() and not (PACKAGE / f"{there}.py").exists():
            there = ""  # a name of the face, such as `from .. import quantize`
        side_by_side = any({here, there} <= names for names in ONE_UNIT)
        if floor(there) >= floor(here) and not side_by_side:
            wrong.append(f"{at(path, line)} (floor {floor(here)}) imports {name} (floor {floor(there)})")
    assert not wrong, "\n".join(wrong)


def test_no_package_hides_a_name_of_the_face() -> None:
    """Importing a package binds its name: `fp8kernels.report` must stay the function, whatever is imported later."""
    for path in MODULES:
        if path.parent == PACKAGE or path.name == "__init__.py":
            importlib.import_module(f"fp8kernels.{unit(path)}" if unit(path) else "fp8kernels")
    modules = [name for name in fp8kernels.__all__ if isinstance(getattr(fp8kernels, name), types.ModuleType)]
    assert modules == ["nn", "serving"], "packages need names of their own"


def test_models_know_nothing_of_8_bits() -> None:
    wrong = [
        f"{at(path, line)} imports {name}"
        for path in MODULES
        if unit(path) == "models"
        for line, name in imports(path, parse(path))
        if name.startswith("fp8kernels.") and not name.startswith(("fp8kernels.models", "fp8kernels.headers"))
    ]
    assert not wrong, "\n".join(wrong)


def test_only_kernels_touch_the_compiled_modules() -> None:
    def allowed(path: Path) -> bool:
        relative = path.relative_to(PACKAGE)
        is_kernel = relative.parts[0] == "kernels" and relative.name in ("cpu.py", "cuda.py")
        return is_kernel or relative.name == "info.py"  # info reports what was built

    wrong = [
        f"{at(path, line)} imports {name}"
        for path in MODULES
        if not allowed(path)
        for line, name in imports(path, parse(path))
        if re.search(r"\b_(cpu|cuda)\b", name) or name == "fp8kernels.kernels.compiled.load"
    ]
    assert not wrong, "\n".join(wrong)


def test_optional_packages_are_imported_where_they_are_used() -> None:
    wrong = []
    for path in MODULES:
        if unit(path) in OPTIONAL_AT_HOME or path.name == "triton_jit.py":
            continue
        for node in top_level(parse(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            wrong += [f"{at(path, node.lineno)} imports {name}" for name in names if name.split(".")[0] in OPTIONAL]
    assert not wrong, "\n".join(wrong)


def top_level(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when the module is imported: not those inside functions or under TYPE_CHECKING."""
    todo = list(ast.iter_child_nodes(tree))
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.level == 0):
            yield node
        is_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not is_types:
            todo.extend(ast.iter_child_nodes(node))


def test_the_largest_values_are_written_in_formats_only() -> None:
    wrong = []
    for path in SOURCES:
        relative = path.relative_to(ROOT)
        if relative.parts[0] not in ("tests", "bench") and relative.parts[1] != "formats":
            numbers = python_numbers(path) if path.suffix == ".py" else cpp_numbers(path)
            wrong += [f"{at(path, line)}: {value:g}" for line, value in numbers if value in LARGEST]
    assert not wrong, "ask the format for it:\n" + "\n".join(wrong)


def python_numbers(path: Path) -> Iterator[tuple[int, float]]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield node.lineno, node.value


def cpp_numbers(path: Path) -> Iterator[tuple[int, float]]:
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), path.read_text(encoding="utf-8"), flags=re.S)
    for number, line in enumerate(text.splitlines(), 1):
        code = line.split("//")[0]
        yield from ((number, float(found)) for found in re.findall(r"(?<![\w.])(\d+(?:\.\d*)?)[fF]?(?![\w.])", code))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LIMIT, f"{path.relative_to(ROOT)} has {lines} lines, at most {LIMIT}"
