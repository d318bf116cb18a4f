"""What the pages say is there: the README's example runs, links lead somewhere, paths in backticks exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = (
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("fp8kernels/**/README.md")),
)
FOLDERS = ("fp8kernels", "csrc", "python", "tests", "bench", "docs")


def test_the_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 2
    scope: dict[str, object] = {}
    for block in blocks:
        exec(block, scope)
    assert tuple(scope["y"].shape) == (64, 128)  # type: ignore[attr-defined]
    assert "gemm: " in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    code = re.sub(r"```.*?```", "", text, flags=re.S)
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./]*)`", code)
    missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing, f"{page.name} names what is not there: {missing}"
