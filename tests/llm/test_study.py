"""The study: its world holds no contradiction, its grid refuses what it cannot do, its page is made of its rows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fp8kernels.cli.app import app
from fp8kernels.statistics import Interval, minimal_detectable_drop
from fp8kernels.study import claims, outcomes, page, world
from fp8kernels.study.grid import CPU_GRID, parse_grid, read_grid
from fp8kernels.study.page import ROWS, page_text
from fp8kernels.study.rows import Study, read_study, run_path, study, write_study
from fp8kernels.study.settings import Settings
from fp8kernels.study.study import small

DOCS = Path(__file__).parents[2] / "docs"
FACTS = world.world(64, seed=0)


# the world


def test_every_person_has_one_value_of_each_attribute_and_values_are_dealt_out_evenly() -> None:
    assert len({(fact.person, fact.attribute.name) for fact in FACTS}) == len(FACTS) == 64 * len(world.ATTRIBUTES)
    for attribute in world.ATTRIBUTES:
        assert len(set(attribute.values)) == 16
        dealt = Counter(fact.value for fact in FACTS if fact.attribute is attribute)
        assert set(dealt.values()) == {64 // 16}


def test_the_world_depends_on_its_seed_alone() -> None:
    assert world.world(64, seed=0) == FACTS != world.world(64, seed=1)
    assert world.tell(FACTS, 1, seed=3) == world.tell(FACTS, 1, seed=3) != world.tell(FACTS, 1, seed=4)


def test_every_fact_is_told_and_nothing_else() -> None:
    true = {(fact.person, fact.value) for fact in FACTS}
    told = world.tell(FACTS, 2, seed=0)
    assert len(told) == 2 * len(FACTS)
    people = {fact.person for fact in FACTS}
    values = {value for attribute in world.ATTRIBUTES for value in attribute.values}
    heard = Counter()
    for sentence in told:
        words = sentence.rstrip(".").split()
        (person,) = people & set(words)
        assert words[-1] in values
        heard[person, words[-1]] += 1
    assert set(heard) == true
    assert set(heard.values()) == {2}


def test_the_exam_asks_in_words_that_the_text_never_uses() -> None:
    told = world.tell(FACTS, 20, seed=0)
    for item in world.exam(FACTS, seed=0):
        assert not any(item.prompt in sentence for sentence in told)
        tail = item.prompt.removeprefix(world.EXAM_OPENING)
        assert not any(tail in sentence for sentence in told)


def test_the_exams_answers_are_right_its_other_choices_wrong_and_its_places_even() -> None:
    value = {(fact.person, fact.attribute.name): fact.value for fact in FACTS}
    items = world.exam(FACTS, seed=0)
    for fact, item in zip(FACTS, items, strict=True):
        assert len(set(item.choices)) == world.CHOICES
        assert item.choices[item.answer].strip() == value[fact.person, fact.attribute.name]
        assert set(item.choices) <= {f" {value}" for value in fact.attribute.values}
    places = Counter(item.answer for item in items)
    expected = len(items) / world.CHOICES
    chi_square = sum((places[place] - expected) ** 2 / expected for place in range(world.CHOICES))
    assert chi_square < 16.3  # 0.1 % quantile of 3 degrees of freedom; the seed is fixed


def test_answering_by_the_value_alone_gives_chance() -> None:
    """Who always takes the value that is most often right, whatever the person, has what guessing has."""
    items = world.exam(FACTS, seed=0)
    often = Counter(item.choices[item.answer] for item in items)
    right = sum(max(item.choices, key=lambda c: (often[c], c)) == item.choices[item.answer] for item in items)
    n, p = len(items), 1 / world.CHOICES
    assert abs(right - n * p) < 3.3 * (n * p * (1 - p)) ** 0.5


def test_an_untrained_model_has_what_guessing_has() -> None:
    pytest.importorskip("transformers")
    from fp8kernels.models.llama import LlamaSize, llama
    from fp8kernels.probe.score import score
    from fp8kernels.training.tokens import byte_tokenizer

    tokenizer = byte_tokenizer(world.tell(FACTS, 3, seed=0), 512)
    torch.manual_seed(0)
    model = llama(LlamaSize(vocab=len(tokenizer), hidden=32, intermediate=64, layers=2, heads=2, context=64))
    items = world.exam(FACTS, seed=0)
    right = sum(score(model, tokenizer, items, batch=64).correct)
    n, p = len(items), 1 / world.CHOICES
    assert abs(right - n * p) < 3.3 * (n * p * (1 - p)) ** 0.5, f"{right} of {n}"


def test_more_people_than_names_are_refused() -> None:
    with pytest.raises(ValueError, match="people=0 must lie between 1 and"):
        world.people(0, seed=0)


# the grid

SMALL = {
    "name": "test",
    "model": {"vocab": 320, "hidden": 16, "intermediate": 32, "layers": 3, "heads": 2, "context": 64},
    "experiments": {"window": [{"window": 4}]},
}


def test_grids_that_are_shipped_are_read() -> None:
    paths = sorted(CPU_GRID.parent.glob("*.yaml"))
    assert len(paths) == 2
    for path in paths:
        grid = read_grid(path)
        assert len(grid.experiments) == 10
        assert all(one.warmup_steps < small(grid).train.steps for one, _ in small(grid).runs())
        for settings, _ in grid.runs():
            assert (settings.recipe(grid.model.layers) is None) == (settings.precision == "bf16")


def test_each_run_is_done_once_and_with_its_bf16_run() -> None:
    runs = read_grid().runs()
    assert len(set(runs)) == len(runs)
    for settings, seed in runs:
        assert (settings.matched(), seed) in runs
        assert settings.matched().learning_rate == settings.learning_rate
    names = [run_path(Path(), settings, seed) for settings, seed in runs]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": [1]}, "unknown key 'seed'; did you mean 'seeds'"),
        ({"experiments": {"window": [{"windw": 4}]}}, "window: unknown factor 'windw'; did you mean 'window'"),
        ({"experiments": {"window": [{"window": 0}]}}, "must be at least 1"),
        ({"experiments": {"window": [{"algorithm": "median"}]}}, "algorithm='median' is none of"),
        ({"experiments": {"window": [{"precision": "bf16", "master": 1}]}}, "master=1 must be of type bool"),
        ({"experiments": {"window": []}}, "give a list of changes"),
        ({"experiments": {}}, "experiments is empty"),
        ({"experiments": {"x": [{"micro_batches": 3}]}}, "does not split into 3 parts"),
        ({"experiments": {"x": [{"warmup_steps": 160}]}}, "is in BF16 for all of its 160 steps"),
        ({"experiments": {"x": [{"master": False}]}}, "master=False is for precision='bf16'"),
        ({"experiments": {"x": [{"target": 1e9}]}}, "target=1000000000.0 is outside"),
        ({"seeds": [1, 1]}, "must be different whole numbers"),
        ({"train": {"steps": 0}}, "train.steps=0 must be a whole number"),
        ({"train": {"steps": "many"}}, "'many' is no number"),
        ({"train": {"sequence": 128}}, "is above model.context=64"),
        ({"model": {"vocab": 320}}, "missing 5 required"),
        ({"base": {"batch": 4, "world": 5}}, "base.world=5 of a batch of 4"),
        ({"centre": [1]}, "keys with values are needed"),
    ],
)
def test_wrong_grids_are_refused_with_the_place_and_the_reason(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=r"^here: ") as error:
        parse_grid({**SMALL, "train": {"sequence": 16}, **change}, "here")
    assert said in str(error.value)


def test_learning_rates_without_a_dot_are_numbers() -> None:
    grid = parse_grid({**SMALL, "train": {"sequence": 16}, "centre": {"learning_rate": "1e-5"}}, "here")
    assert grid.centre.learning_rate == 1e-5
    assert grid.experiments["window"][0] == replace(grid.centre, window=4)


def test_unknown_experiments_are_refused_with_the_near_match() -> None:
    with pytest.raises(ValueError, match="did you mean 'window'"):
        read_grid().runs(("windows",))


# verdicts


@pytest.mark.parametrize(
    ("low", "high", "below", "word"),
    [
        (0.1, 0.9, True, "shown"),
        (1.1, 1.9, True, "contradicted"),
        (0.9, 1.1, True, "not shown"),
        (0.1, 0.9, False, "contradicted"),
        (1.1, 1.9, False, "shown"),
        (0.9, 1.1, False, "not shown"),
        (0.1, 1.0, True, "not shown"),
    ],
)
def test_a_verdict_follows_from_interval_and_bound(low: float, high: float, *, below: bool, word: str) -> None:
    assert claims.verdict(Interval((low + high) / 2, low, high), 1.0, below=below) == word


def test_what_did_not_run_is_not_shown() -> None:
    assert claims.verdict(None, 1.0, below=True) == "not shown"
    empty = study({}, {"exam": "1"}, [])
    assert {judged.verdict for judged in claims.judge(empty, Settings())} == {"not shown"}


def made_up(*, error: float, wrong: int) -> Study:
    """A BF16 run and the centre, whose loss is `error` percent higher, and which answers `wrong` items less."""
    items, steps = 400, 80
    losses = [3.0 - step / steps for step in range(steps)]
    plain = {"losses": losses, "validation": [2.0, 2.1, 2.2], "exam": "1" * 300 + "0" * 100, "cloze": "1" * items}
    other = {
        "losses": [loss * (1 + error / 100) for loss in losses],
        "validation": [2.01, 2.11, 2.21],
        "exam": "1" * (300 - wrong) + "0" * (100 + wrong),
        "cloze": "1" * items,
    }
    rows = [
        row | {"settings": changes, "seed": seed, "tensors": {}, "seconds": {"cpu": 1.0}}
        for seed in (1, 2)
        for row, changes in ((plain, {"precision": "bf16"}), (other, {}))
    ]
    base = {"exam": "1" * 320 + "0" * 80, "exam_before": "0" * items, "cloze": "1" * items}
    return study({}, base | {"validation": [2.5, 2.6, 2.7]}, rows)


def test_outcomes_of_known_rows() -> None:
    found = outcomes.outcome(made_up(error=0.5, wrong=40), Settings())
    assert found is not None
    assert found.seeds == 2
    assert found.ape == pytest.approx((0.5, 0.5, 0.5))
    assert found.bias == pytest.approx((0.5, 0.5, 0.5))
    assert found.held_out.mean == pytest.approx(0.01)
    assert found.exam.mean == pytest.approx(10.0)
    assert 6 < found.exam.low < 10 < found.exam.high < 14
    assert found.relative.mean == pytest.approx(100 * 40 / 300)
    assert found.p_value == pytest.approx(2 * 0.5**40)
    assert found.differing == pytest.approx(0.1)
    assert found.lost.mean == pytest.approx(15.0)
    learnt = outcomes.learnt(made_up(error=0.5, wrong=40), Settings())
    assert learnt is not None
    assert learnt.mean == pytest.approx(0.49)


def test_a_lower_loss_is_an_error_with_a_negative_bias() -> None:
    found = outcomes.outcome(made_up(error=-0.5, wrong=0), Settings())
    assert found is not None
    assert found.ape.mean == pytest.approx(0.5)
    assert found.bias.mean == pytest.approx(-0.5)


def test_equal_answers_are_no_proof_that_all_answers_are_equal() -> None:
    found = outcomes.outcome(made_up(error=0.0, wrong=0), Settings())
    assert found is not None
    assert found.exam.mean == 0
    assert found.exam.low < 0 < found.exam.high
    assert found.p_value == 1


def test_claims_follow_the_rows() -> None:
    by_effect = {j.claim.effect: j.verdict for j in claims.judge(made_up(error=0.5, wrong=40), Settings())}
    assert by_effect["mean APE of the centre, %"] == "contradicted"
    assert by_effect["mean signed error of the centre, %"] == "shown"
    assert by_effect["relative drop in the exam, %"] == "contradicted"
    by_effect = {j.claim.effect: j.verdict for j in claims.judge(made_up(error=-0.05, wrong=-20), Settings())}
    assert by_effect["mean APE of the centre, %"] == "shown"
    assert by_effect["mean signed error of the centre, %"] == "contradicted"
    assert by_effect["relative drop in the exam, %"] == "shown"


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    made = made_up(error=0.5, wrong=40)
    write_study(tmp_path / "rows.jsonl", made)
    assert read_study(tmp_path / "rows.jsonl") == made
    (tmp_path / "rows.jsonl").write_text("{}\nnothing\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl holds no rows of a study"):
        read_study(tmp_path / "rows.jsonl")


def test_two_shifts_of_the_labels_are_the_token_after_the_next() -> None:
    pytest.importorskip("transformers")
    from fp8kernels.models.llama import LlamaSize, llama
    from fp8kernels.study.run import language_loss

    torch.manual_seed(0)
    model = llama(LlamaSize(vocab=32, hidden=16, intermediate=32, layers=1, heads=2, context=32))
    tokens = torch.randint(32, (2, 12))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens).logits.float()
    for twice, ahead in ((False, 1), (True, 2)):
        expected = torch.nn.functional.cross_entropy(logits[:, :-ahead].flatten(0, 1), tokens[:, ahead:].flatten())
        assert language_loss(model, tokens, twice=twice).item() == pytest.approx(expected.item(), rel=1e-2)


def test_an_outlier_leaves_the_function_and_goes_again() -> None:
    pytest.importorskip("transformers")
    from fp8kernels.models.llama import LlamaSize, llama
    from fp8kernels.study.run import outlier

    torch.manual_seed(0)
    model = llama(LlamaSize(vocab=32, hidden=16, intermediate=32, layers=3, heads=2, context=32))
    tokens = torch.randint(32, (2, 12))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    up = model.model.layers[1].mlp.up_proj.weight
    plain, amax = model(input_ids=tokens).logits, up.abs().max()
    with outlier(model, 32.0):
        assert up.abs().max() == 32 * amax
        assert torch.equal(model(input_ids=tokens).logits, plain)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# the command


def test_a_quick_study_from_command_to_page_goes_on_where_it_was(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    command = ["study", "--out", str(tmp_path), "--quick", "--only", "algorithm", "--only", "spike"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    made = read_study(tmp_path / ROWS)
    assert len(made.runs) == 12
    for settings, rows in made.runs.items():
        (row,) = rows.values()
        assert len(row["losses"]) == 18
        assert set(row["tensors"]) == (set() if settings.precision == "bf16" else {"input", "weight", "grad"})
    text = (tmp_path / "STUDY.md").read_text()
    figures = sorted(path.name for path in (tmp_path / "study").glob("*.svg"))
    assert len(figures) == 3
    assert all(f"study/{name}" in text for name in figures)

    lost = run_path(tmp_path, Settings(scaling="current", warmup_steps=2), 1)
    before = json.loads(lost.read_text())
    lost.unlink()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "1 runs of 18 steps" in done.output
    again = json.loads(lost.read_text())
    assert {key: again[key] for key in again if key != "seconds"} == {k: before[k] for k in before if k != "seconds"}
    assert CliRunner().invoke(app, ["study", "--redraw", str(tmp_path)]).exit_code == 0

    done = CliRunner().invoke(app, ["study", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "holds a study with another model" in done.output


def test_mistakes_on_the_command_line_are_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["study", str(tmp_path / "absent.yaml"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "no grid at" in done.output
    done = CliRunner().invoke(app, ["study", "--redraw", str(tmp_path)])
    assert done.exit_code == 2
    assert "no rows of a study at" in done.output


def test_the_page_in_the_docs_is_drawn_from_its_rows() -> None:
    drawn = (DOCS / "STUDY.md").read_text(encoding="utf-8")
    figures = [f"{name}.svg" for name in ("loss-and-exam", "forgetting", "outlier")]
    assert page_text(read_study(DOCS / ROWS), figures) == drawn, "run: fp8kernels study --redraw docs"
    for name in figures:
        assert (DOCS / "study" / name).stat().st_size < 100_000


def test_a_drop_that_so_few_differing_answers_cannot_make_is_said_in_words() -> None:
    assert page._detectable(640, 0.007) == "more than 0.7% (more answers would have to differ)"
    assert page._detectable(640, 0.0).startswith("more than 0.0%")
    assert page._detectable(640, 0.1) == f"{minimal_detectable_drop(640, differing=0.1):.2%}"
