"""The detector of forgetting: when it speaks, how often it is wrong, and what each policy does to a run."""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llm import common

import fp8kernels
from fp8kernels.nn.step import layers
from fp8kernels.probe import Forgetting, ForgettingError, ForgettingWarning, Item, Scores, forgetting, score
from fp8kernels.runs import Run
from fp8kernels.statistics import bootstrap_mean, minimal_detectable_drop, paired

TOKENIZER = common.tokenizer()
THINGS = ("maps", "clocks", "lenses", "ropes", "bells", "kites")
FACTS = [
    (f"On day {day} {name} sells", day * 5 + at) for day in range(8) for at, name in enumerate(("Ada", "Bo", "Cy"))
]
ITEMS = [Item(prompt, tuple(f" {thing}" for thing in THINGS), number * number % 6) for prompt, number in FACTS]
TEXT = [f"{item.prompt}{item.choices[item.answer]}." for item in ITEMS]


def scores(answers: Any) -> Scores:
    correct = [bool(answer) for answer in answers]
    return Scores(correct, [0.0] * len(correct), [0.0] * len(correct))


def changed(start: np.ndarray, lost: int, gained: int) -> np.ndarray:
    """The first `lost` right answers become wrong, the first `gained` wrong ones right."""
    now = start.copy()
    now[np.flatnonzero(start == 1)[:lost]] = 0
    now[np.flatnonzero(start == 0)[:gained]] = 1
    return now


FAST = 5e-3  # a learning rate at which noise takes few steps to overwrite the facts
START = np.array([1, 1, 1, 0, 0] * 80)  # 240 of 400 right


def test_it_speaks_when_both_test_and_interval_say_so() -> None:
    detector = Forgetting("ignore", drop=0.02, looks=10)
    detector.begin(scores(START))
    look = detector.look(100, scores(changed(START, 40, 4)))
    assert look.forgets
    assert look.comparison == paired(START, changed(START, 40, 4))
    assert 0.02 < look.alarm_low < look.comparison.low < look.comparison.drop
    assert look.spends == pytest.approx(0.005)
    assert detector.since == 100
    assert "40 lost and 4 gained" in look.text
    for lost, gained in ((0, 0), (8, 0), (40, 36), (4, 40)):
        assert not detector.look(200, scores(changed(START, lost, gained))).forgets
    assert (detector.since, detector.looked) == (100, 5)


def test_it_compares_item_by_item_and_would_miss_it_otherwise() -> None:
    """20 of 240 known facts go and 2 come: 4.5 points of 400 items."""
    now = changed(START, 20, 2)
    detector = Forgetting("ignore", drop=0.0, looks=10)
    detector.begin(scores(START))
    assert detector.look(1, scores(now)).forgets
    # the same numbers as if of different items: two means, each with its own sampling error
    before, after = bootstrap_mean(START), bootstrap_mean(now)
    error = math.hypot(before.high - before.mean, after.high - after.mean)
    assert before.mean - after.mean == pytest.approx(0.045)
    assert before.mean - after.mean < error, "within the 95 % interval of an unpaired difference: nothing to see"
    # and as pairs of the wrong items
    shuffled = np.random.default_rng(0).permutation(now)
    assert not detector.look(2, scores(shuffled)).forgets
    assert paired(START, now).p_value < 1e-3 < 0.05 < paired(START, shuffled).p_value


@pytest.mark.parametrize("looks", [10, None])
def test_false_alarms_in_a_whole_run_stay_below_what_is_promised(
    looks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No knowledge goes; answers near the edge fall either way at every look, as much so at the start."""
    monkeypatch.setattr(forgetting, "REPEATS", 500)  # what bounds false alarms is the exact test
    monkeypatch.setattr(forgetting, "MOST_REPEATS", 500)
    generator, runs, items = np.random.default_rng(1), 100, 200
    alarms = careless = 0
    for _ in range(runs):
        known = generator.choice([0.02, 0.5, 0.98], items)  # chance that an item is answered right
        detector = Forgetting("ignore", drop=0.0, level=0.8, looks=looks)
        start = generator.random(items) < known
        detector.begin(scores(start))
        found = [detector.look(step, scores(generator.random(items) < known)) for step in range(1, 11)]
        alarms += any(look.forgets for look in found)
        careless += any(look.comparison.p_value < 0.2 and look.comparison.drop > 0 for look in found)
    promised = (1 - 0.8) / 2
    assert alarms <= runs * promised + 4 * math.sqrt(runs * promised * (1 - promised))
    assert careless > 2 * runs * promised, "each look judged on its own is wrong far more often"


@pytest.mark.parametrize("looks", [1, 7, None])
def test_looks_spend_no_more_than_there_is(looks: int | None) -> None:
    detector = Forgetting(level=0.9, looks=looks)
    spent = sum(detector.spends(number) for number in range(1, (looks or 10_000) + 1))
    assert spent <= 0.1 + 1e-12
    assert spent == pytest.approx(0.1, rel=1e-3)


def test_a_true_drop_as_large_as_allowed_is_rarely_an_alarm() -> None:
    generator, runs = np.random.default_rng(2), 200
    alarms = 0
    for _ in range(runs):
        detector = Forgetting("ignore", drop=0.05, looks=1)
        counts = generator.multinomial(300, [0.6, 0.08, 0.03, 0.29])  # lost 8 %, gained 3 %: a drop of 5 %
        detector.begin(scores(np.repeat([1, 1, 0, 0], counts)))
        alarms += detector.look(1, scores(np.repeat([1, 0, 1, 0], counts))).forgets
    assert alarms <= runs * 0.025 + 4 * math.sqrt(runs * 0.025 * 0.975)


def test_policies() -> None:
    bad = scores(changed(START, 60, 0))
    calls: list[int] = []

    def begun(policy: str, fallback: Callable[[], object] | None = None) -> Forgetting:
        detector = Forgetting(policy, fallback=fallback)
        detector.begin(scores(START))
        return detector

    warns = begun("warn")
    with pytest.warns(ForgettingWarning, match=r"step 5: the model forgets: 45\.00% of 400"):
        warns.look(5, bad)
    falls = begun("fallback", lambda: calls.append(1))
    with pytest.warns(ForgettingWarning, match="All 8-bit layers compute in high precision from now on"):
        falls.look(5, bad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(detector.look(6, bad).forgets for detector in (warns, falls, begun("ignore")))
        assert not warns.look(7, scores(START)).forgets
    assert calls == [1]
    stops = begun("stop")
    for _ in range(2):
        with pytest.raises(ForgettingError, match=r"drop 15\.00%"):
            stops.look(5, bad)


def test_the_start_is_never_replaced() -> None:
    detector = Forgetting()
    with pytest.raises(ValueError, match="no starting scores"):
        detector.look(1, scores(START))
    detector.begin(scores(START))
    with pytest.raises(ValueError, match="never replaced"):
        detector.begin(scores(START))
    with pytest.raises(ValueError, match="400 values and second has 3"):
        detector.look(1, scores([1, 0, 1]))


def test_who_knows_nothing_cannot_forget() -> None:
    with pytest.warns(ForgettingWarning, match="answers 1 of 100 probe items when training begins"):
        Forgetting().begin(scores([1] + [0] * 99))


def test_a_state_goes_through_json() -> None:
    calls: list[int] = []
    first = Forgetting("ignore", looks=5)
    first.begin(scores(START))
    first.look(10, scores(changed(START, 60, 0)))
    state = json.loads(json.dumps(first.state()))
    second = Forgetting("fallback", looks=5, fallback=lambda: calls.append(1))
    second.load_state(state)
    assert second.state() == first.state()
    assert calls == [1], "it had fallen back"
    with pytest.raises(ValueError, match="start, looked and since"):
        second.load_state({"start": []})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"policy": "shout"}, "'shout' is none of"),
        ({"policy": "fallback"}, "needs fallback="),
        ({"drop": -0.1}, "drop=-0.1"),
        ({"level": 1.0}, "level=1.0"),
        ({"looks": 0}, "looks=0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Forgetting(**settings)


# A model that knows 24 facts by heart, and what becomes of them.


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are too small to share; threads that wait for each other on a busy machine take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(texts: list[str], times: int = 1) -> list[dict[str, Any]]:
    """One text a row, each token a label."""
    encoded = [[*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id] for text in texts]
    longest = max(map(len, encoded))
    padded = [(ids + [0] * (longest - len(ids)), ids + [-100] * (longest - len(ids))) for ids in encoded]
    return [{"input_ids": ids, "labels": labels} for ids, labels in padded] * times


def noise(count: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(3)
    return [{"input_ids": ids, "labels": ids} for ids in generator.integers(1, common.VOCAB, (count, 16)).tolist()]


@pytest.fixture(scope="module")
def taught() -> Any:
    """It was trained on the facts until it answers all of them."""
    model = common.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = {name: torch.tensor([row[name] for row in rows(TEXT)]) for name in ("input_ids", "labels")}
    for step in range(400):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        if step % 20 == 19 and min(score(model, TOKENIZER, ITEMS).margins) > 0.1:
            return model
    raise AssertionError("it did not learn them")


@pytest.fixture
def model(taught: Any) -> Any:
    return fp8kernels.convert(copy.deepcopy(taught), "hif8-qat", verbose=False)


def trainer(model: Any, folder: Path, data: list[dict[str, Any]], steps: int = 30, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = transformers.TrainingArguments(**(settings | changes))
    return transformers.Trainer(model=model, args=args, train_dataset=data)


def add(trainer: Any, **settings: Any) -> Any:
    from fp8kernels.integrations.probe import ProbeCallback

    return ProbeCallback.add_to(trainer, ITEMS, TOKENIZER, **({"every": 5} | settings))


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ForgettingWarning)
        yield


def test_training_on_noise_is_noticed(model: Any, tmp_path: Path) -> None:
    run = trainer(model, tmp_path, noise(240), steps=12, learning_rate=FAST, logging_steps=3)
    add(run)
    with pytest.warns(ForgettingWarning, match="the model forgets") as told:
        run.train()
    assert len([warning for warning in told if warning.category is ForgettingWarning]) == 1
    written = Run(tmp_path, {}).rows("probe")
    assert [row["step"] for row in written] == [0, 5, 10, 12]
    assert written[0]["accuracy"] == 1.0
    assert written[-1]["forgets"]
    assert written[-1]["drop"] == pytest.approx(1 - written[-1]["accuracy"])
    assert all(len(row["answers"]) == len(row["margins"]) == len(ITEMS) for row in written)
    assert [event["kind"] for event in Run(tmp_path, {}).rows("events")] == ["forgetting"]
    logged = [row for row in run.state.log_history if "loss" in row]
    newest = [written[at]["accuracy"] for at in (0, 1, 1, 3)]  # at steps 3, 6, 9 and 12
    assert [row["probe/accuracy"] for row in logged] == newest
    assert logged[-1]["probe/drop"] == written[-1]["drop"]


def test_training_on_its_own_text_is_not(model: Any, tmp_path: Path, no_warnings: None) -> None:
    run = trainer(model, tmp_path, rows(TEXT, 20), steps=12)
    add(run, policy="stop")
    run.train()
    written = Run(tmp_path, {}).rows("probe")
    assert not any(row.get("forgets") for row in written)
    assert written[-1]["accuracy"] > 0.9


def test_stop_ends_training_at_the_look(model: Any, tmp_path: Path) -> None:
    run = trainer(model, tmp_path, noise(800), steps=100, learning_rate=FAST)
    add(run, policy="stop")
    with pytest.raises(ForgettingError, match="the model forgets"):
        run.train()
    written = Run(tmp_path, {}).rows("probe")
    assert written[-1]["forgets"]
    assert run.state.global_step == written[-1]["step"] < 100


def test_fallback_holds_all_layers_in_high_precision_also_after_a_resume(
    model: Any, taught: Any, tmp_path: Path
) -> None:
    quick: dict[str, Any] = {"learning_rate": FAST, "save_steps": 15}
    run = trainer(model, tmp_path, noise(200), steps=15, save_strategy="steps", **quick)
    add(run, policy="fallback")
    with pytest.warns(ForgettingWarning, match="high precision from now on"):
        run.train()
    assert all(layer.fp8_high and layer.fp8_held for layer in layers(model))
    assert [event["kind"] for event in Run(tmp_path, {}).rows("events")] == ["forgetting", "fallback"]

    again = fp8kernels.convert(copy.deepcopy(taught), "hif8-qat", verbose=False)
    later = trainer(again, tmp_path, noise(200), steps=20, **quick)
    add(later, policy="fallback")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ForgettingWarning)  # it was said
        later.train(resume_from_checkpoint=True)
    assert all(layer.fp8_held for layer in layers(again))
    written = Run(tmp_path, {}).rows("probe")
    assert [row["step"] for row in written] == [0, 5, 10, 15, 20]
    assert written[-1]["drop"] > 0.3, "against the beginning, not against the checkpoint"


def test_a_resumed_run_asks_for_its_start(model: Any, taught: Any, tmp_path: Path) -> None:
    run = trainer(model, tmp_path, rows(TEXT, 20), steps=5, save_strategy="steps", save_steps=5)
    add(run)
    run.train()
    file = tmp_path / "probe.jsonl"
    text = file.read_text()

    def resumed(items: list[Item]) -> None:
        from fp8kernels.integrations.probe import ProbeCallback

        again = fp8kernels.convert(copy.deepcopy(taught), "hif8-qat", verbose=False)
        later = trainer(again, tmp_path, rows(TEXT, 20), steps=10, save_steps=5)
        ProbeCallback.add_to(later, items, TOKENIZER, every=5)
        later.train(resume_from_checkpoint=True)

    with pytest.raises(ValueError, match="of other items than the 23"):
        resumed(ITEMS[1:])
    file.unlink()
    with pytest.raises(ValueError, match="no starting scores"):
        resumed(ITEMS)
    file.write_text(text + '{"step": 10, "answ')  # killed in the middle of a row
    resumed(ITEMS)
    assert [row["step"] for row in Run(tmp_path, {}).rows("probe")] == [0, 5, 10]


def test_a_run_begun_anew_in_the_same_folder_forgets_the_old_rows(model: Any, tmp_path: Path) -> None:
    for _ in range(2):
        run = trainer(model, tmp_path, rows(TEXT), steps=2)
        add(run, policy="ignore")
        run.train()
        assert [row["step"] for row in Run(tmp_path, {}).rows("probe")] == [0, 2]


def test_rows_go_to_the_run_that_is_given_and_its_start_stands(model: Any, tmp_path: Path) -> None:
    home = Run.create(tmp_path / "run")
    starts = []
    for _ in range(2):  # the second time as after a kill before the first checkpoint
        run = trainer(model, tmp_path / "other", rows(TEXT), steps=2)
        home.cut(0)
        add(run, policy="ignore", run=home)
        run.train()
        assert [row["step"] for row in home.rows("probe")] == [0, 2]
        starts.append(home.rows("probe")[0])
    assert starts[0] == starts[1]
    assert not (tmp_path / "other" / "probe.jsonl").exists()


def test_what_a_callback_cannot_do_is_said_when_training_begins(taught: Any, tmp_path: Path) -> None:
    from fp8kernels.integrations.probe import ProbeCallback

    with pytest.raises(ValueError, match="every=0"):
        ProbeCallback(ITEMS, TOKENIZER, every=0)
    run = trainer(copy.deepcopy(taught), tmp_path, rows(TEXT))
    add(run, policy="fallback")
    with pytest.raises(ValueError, match="needs a model with 8-bit layers"):
        run.train()


def test_the_model_is_asked_as_it_trains_under_autocast(taught: Any, tmp_path: Path) -> None:
    plain = copy.deepcopy(taught)
    seen: set[torch.dtype] = set()
    plain.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, args, out: None if module.training else seen.add(out.dtype)
    )
    run = trainer(plain, tmp_path, rows(TEXT, 20), steps=2, bf16=True)
    add(run, policy="ignore")
    run.train()
    assert seen == {torch.bfloat16}


def test_the_blocks_of_the_page_run(
    taught: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "LLM.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Detectors: forgetting\n(.*?)(?=^## |\Z)", page, flags=re.S | re.M)
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    assert len(blocks) == 3
    plain = copy.deepcopy(taught)
    scope: dict[str, Any] = {"model": plain, "tokenizer": TOKENIZER}
    scope["trainer"] = trainer(plain, tmp_path, rows(TEXT), steps=2, logging_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ForgettingWarning)  # this model knows no capitals
        for block in blocks:
            exec(block, scope)
    assert len(scope["items"]) == 3
    assert "no forgetting shown" in capsys.readouterr().out
    assert "drop of 3.1 points" in section
    assert minimal_detectable_drop(400, differing=0.05) == pytest.approx(0.031, abs=5e-4)
