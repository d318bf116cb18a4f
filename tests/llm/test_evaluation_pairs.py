"""Pairs of answers, what they differ by and how sure that is, text in blocks, and two runs' losses."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fp8kernels.evaluation import answers as keeping
from fp8kernels.evaluation import compare, loss_curve
from fp8kernels.evaluation.answers import Answers, Document, match
from fp8kernels.evaluation.compare import choose_metric, detectable_drop, score, with_holm
from fp8kernels.evaluation.local import blocks
from fp8kernels.runs import Run
from fp8kernels.runs.curve import unmatched


def test_blocks_hold_the_whole_text_and_end_with_lines() -> None:
    text = "".join(f"line {n}\n" for n in range(100)) + "x" * 300
    pieces = blocks(text, 128)
    assert "".join(pieces) == text
    assert all(len(piece) <= 128 for piece in pieces)
    assert all(piece.endswith("\n") for piece in pieces if "line" in piece)
    assert blocks("\n \n") == []


def made(rights: list[Any], metric: str = "acc", part: str = "t", task: str = "t") -> Answers:
    documents = tuple(Document(part, n, f"s{n}", {metric: value}) for n, value in enumerate(rights))
    return Answers(task, "k", None, "1", documents)


def test_pairs_are_found_by_document_and_not_by_order() -> None:
    first, second = made([1, 0, 1, 1]), made([1, 1, 0, 1])
    shuffled = dataclasses.replace(second, documents=second.documents[::-1])
    assert compare(first, shuffled) == compare(first, second)
    assert [(a.number, b.number) for a, b in match(first, shuffled)] == [(n, n) for n in range(4)]


def test_other_documents_are_refused() -> None:
    first = made([1, 0, 1])
    with pytest.raises(ValueError, match=r"3 and 2 documents .* 1 of them by one model only .t 2."):
        compare(first, made([1, 0]))
    changed = dataclasses.replace(first.documents[1], stamp="other")
    with pytest.raises(ValueError, match=r"1 of 3 documents are not the same for both models .t 1."):
        compare(first, dataclasses.replace(first, documents=(first.documents[0], changed, first.documents[2])))
    with pytest.raises(ValueError, match="answered twice"):
        compare(first, dataclasses.replace(first, documents=first.documents + first.documents[:1]))


def test_a_comparison_is_what_a_sum_by_hand_gives() -> None:
    a, b = [1] * 40 + [0] * 20 + [1] * 5 + [0], [1] * 40 + [0] * 20 + [0] * 5 + [1]
    found = compare(made(a), made(b))
    assert (found.first, found.second) == (45 / 66, 41 / 66)
    assert found.drop == pytest.approx(4 / 66) and found.relative_drop == pytest.approx(4 / 45)
    assert found.p_value == pytest.approx(2 * (1 + 6) / 2**6), "5 against 1: McNemar's exact test"
    assert (found.only_first, found.only_second, found.items) == (5, 1, 66)
    assert found.low < found.drop < found.high
    variance = 45 * 21 / 66**2 + 41 * 25 / 66**2
    assert found.unpaired_standard_error == pytest.approx(math.sqrt(variance / 66))
    assert found.high - found.low < 2 * 1.96 * found.unpaired_standard_error, "pairs say more than strangers do"
    assert found.detectable_drop is not None and found.drop < found.detectable_drop < 1
    assert found.verdict == "not shown" and found.statement is not None and "66 items" in found.statement
    assert compare(made([1] * 4000), made([1] * 4000)).verdict == "no worse"
    assert compare(made(a), made([0] * 66)).verdict == "worse"
    assert choose_metric(made(a)) == "acc"


def test_p_values_are_corrected_for_the_number_of_tasks() -> None:
    first = compare(made([1] * 30, task="a"), made([1] * 20 + [0] * 10, task="a"))
    second = compare(made([1] * 30, task="b"), made([1] * 29 + [0], task="b"))
    other = compare(made([[-3.0, 2]] * 4, "bits_per_byte"), made([[-3.0, 2]] * 4, "bits_per_byte"))
    corrected = with_holm([first, other, second])
    assert [c.p_holm for c in corrected] == [2 * first.p_value, None, 1.0]


def test_what_few_items_could_show() -> None:
    assert detectable_drop(5, 0) == math.inf, "six must differ before the exact test finds anything"
    drops = [detectable_drop(n, n // 10) for n in (100, 1000, 10_000)]
    assert drops == sorted(drops, reverse=True) and drops[-1] == pytest.approx(0.00886, rel=0.01)
    assert detectable_drop(1000, 0) < detectable_drop(1000, 200)


def test_losses_are_compared_in_bits_per_byte() -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(100, 200, 50)
    nats = sizes * generator.uniform(0.5, 2.0, 50)
    worse = nats * 1.01
    rows = [[[-float(n), int(s)] for n, s in zip(side, sizes, strict=True)] for side in (nats, worse)]
    found = compare(made(rows[0], "bits_per_byte"), made(rows[1], "bits_per_byte"))
    assert found.unit == "bits per byte" and found.p_value is None
    assert found.first == pytest.approx(nats.sum() / sizes.sum() / math.log(2))
    assert found.drop == pytest.approx(found.second - found.first) and found.relative_drop == pytest.approx(0.01)
    assert 0 < found.low < found.drop < found.high
    assert found.high - found.low < found.unpaired_standard_error, "the blocks differ far more than the models"
    alone = score(made(rows[0], "bits_per_byte"))
    assert alone.value == pytest.approx(found.first) and alone.items == 50


def test_a_metric_without_right_and_wrong_has_an_interval_and_no_p_value() -> None:
    found = compare(made([0.5, 0.25, 1.0] * 10, "f1"), made([0.4, 0.25, 1.0] * 10, "f1"))
    assert found.unit == "f1" and found.p_value is None and found.drop == pytest.approx(0.1 / 3)
    assert 0 <= found.low < found.drop < found.high


def test_kept_answers_of_another_model_or_damaged_ones_are_not_taken(tmp_path: Path) -> None:
    path, answers = tmp_path / "a.json", made([1, 0])
    keeping.save(answers, path)
    assert keeping.load(path, "k") == answers
    assert keeping.load(path, "other") is None and keeping.load(tmp_path / "none.json", "k") is None
    path.write_text(path.read_text()[:-20])
    assert keeping.load(path, "k") is None


def test_the_curve_of_two_runs_is_what_a_sum_by_hand_gives(tmp_path: Path) -> None:
    base, other = (
        Run.create(tmp_path / name, config={"seed": seed, "name": name}) for name, seed in (("b", 1), ("o", 2))
    )
    base.append("log", *({"step": n, "loss": 2.0} for n in range(1, 41)))
    base.append("log", {"step": 41, "loss": None})
    other.append("log", *({"step": n, "loss": 2.0 + 0.02 * (n % 5 - 1)} for n in range(3, 44)))
    curve = loss_curve(other, base)
    assert curve is not None and curve.steps == 38, "steps 3 to 40; a loss that is not finite is no loss"
    errors = [n % 5 - 1 for n in range(3, 41)]  # percent of 2.0
    assert curve.mean == pytest.approx(np.abs(errors).mean()) and curve.mean_low < curve.mean < curve.mean_high
    assert curve.maximum == pytest.approx(3) and curve.maximum_step in range(4, 41, 5)
    assert curve.bias == pytest.approx(np.mean(errors)) and curve.bias_low < curve.bias < curve.bias_high
    assert unmatched(other, base) == ["seed: 1 and 2"]
    assert loss_curve(Run.create(tmp_path / "e"), base) is None
