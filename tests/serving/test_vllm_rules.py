"""What `fp8kernels check` says of vLLM, against what vLLM's own loader did with the same folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import vllm_cases


@pytest.mark.parametrize("case", vllm_cases.CASES, ids=lambda case: case.name)
def test_what_is_said_of_vllm_is_what_it_did(case: vllm_cases.Case, tmp_path: Path) -> None:
    vllm_cases.write(case, tmp_path)
    assert vllm_cases.misjudged(tmp_path, vllm_cases.outcomes()[case.name]) == []


def test_the_outcomes_hold_every_kind() -> None:
    found = vllm_cases.outcomes()
    refused = [name for name, outcome in found.items() if isinstance(outcome, str)]
    changed = [name for name, outcome in found.items() if isinstance(outcome, dict) and any(outcome.values())]
    assert set(found) == {case.name for case in vllm_cases.CASES}
    assert refused and changed and len(found) > len(refused) + len(changed)
