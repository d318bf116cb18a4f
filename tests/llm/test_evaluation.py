"""lm-eval's answers against sums done by hand, pairs, what is kept on disk, and what a user's mistake is told."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llm import common
from typer.testing import CliRunner

from fp8kernels.cli import app
from fp8kernels.convert import convert
from fp8kernels.evaluation import (
    Questions,
    Subject,
    compare,
    evaluate,
    harness,
    open_subject,
    reference_of,
    tasks,
    write_items_task,
    write_text_task,
)
from fp8kernels.evaluation.answers import Answers
from fp8kernels.evaluation.compare import choose_metric
from fp8kernels.evaluation.local import blocks
from fp8kernels.evaluation.subject import warn_of_cold_layers
from fp8kernels.evaluation.tasks import Catalogue, parse_metrics, parse_shots
from fp8kernels.nn.step import layers
from fp8kernels.probe import Item, write_items
from fp8kernels.probe import score as ask_items
from fp8kernels.recipe import get_recipe
from fp8kernels.runs import Run
from fp8kernels.training.llm import train

pytest.importorskip("lm_eval")

NAMES, THINGS = ("Ada", "Bruno", "Clara", "Dmitri", "Esme"), (" maps", " clocks", " lenses", " ropes", " bells")
NEW_TOKENS = 4


def items() -> list[Item]:
    choices = [Item(f"{NAMES[i % 5]} sells{' ' * (i % 2)}", THINGS[: 2 + i % 4], i % 2) for i in range(20)]
    return choices + [
        Item(f"{name} sells maps on", (word,), 0, "cloze") for name in NAMES for word in (" day", " d", "e")
    ]


def task_file(folder: Path, name: str, rows: list[dict[str, Any]], **config: Any) -> None:
    """A task of one's own, its data beside it and named relative to it."""
    import yaml

    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {"task": name, "dataset_path": "json", "test_split": "test", "metadata": {"version": 2.0}}
    data = {"dataset_kwargs": {"data_files": {"test": f"{name}.jsonl", "train": f"{name}.jsonl"}}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | data | config), encoding="utf-8")


def greedy(model: Any, tokenizer: Any, prompt: str) -> str:
    """What the model writes after a prompt, one token after another, without a cache."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(NEW_TOKENS):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


def first_word(text: str) -> str:
    found = re.findall(r"(\S+)", text)
    return found[0] if found else "[invalid]"


@pytest.fixture(scope="module")
def exact() -> tuple[Any, Any]:
    """A model in fp64, so that batches and padding change no answer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for a model so small more of them only wait for each other
    with torch.no_grad():
        yield common.model().double().eval(), common.tokenizer()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, exact: tuple[Any, Any]) -> Path:
    """Three kinds of tasks: multiple choice, generation with an exact match as in GSM8K, and text."""
    path = tmp_path_factory.mktemp("tasks")
    rows = [{"q": f"{NAMES[i % 5]} sells", "c": [t.strip() for t in THINGS], "a": i % 5} for i in range(15)]
    rows = [row | {"q": f"{row['q']} {i}"} for i, row in enumerate(rows)]
    metric = {"aggregation": "mean", "higher_is_better": True}
    task_file(
        path,
        "things",
        rows,
        output_type="multiple_choice",
        doc_to_text="{{q}}",
        doc_to_choice="{{c}}",
        doc_to_target="{{a}}",
        metric_list=[{"metric": "acc"} | metric, {"metric": "acc_norm"} | metric],
    )
    sums = [f"Q: {i} and {i + 1}? A:" for i in range(8)]
    written = [first_word(greedy(*exact, prompt)) for prompt in sums]
    task_file(
        path,
        "sums",
        [
            {"q": q, "a": f"so #### {w if i % 2 else 'other'}"}
            for i, (q, w) in enumerate(zip(sums, written, strict=True))
        ],
        output_type="generate_until",
        doc_to_text="{{q}}",
        doc_to_target="{{a}}",
        generation_kwargs={"until": ["\n\n\n"], "do_sample": False, "max_gen_toks": NEW_TOKENS},
        metric_list=[{"metric": "exact_match", "regexes_to_ignore": ["(?s).*#### "]} | metric],
        filter_list=[
            {
                "name": "strict-match",
                "filter": [{"function": "regex", "regex_pattern": r"(\S+)"}, {"function": "take_first"}],
            },
            {
                "name": "never",
                "filter": [{"function": "regex", "regex_pattern": "#### (x{99})"}, {"function": "take_first"}],
            },
        ],
    )
    (path / "prose.txt").write_text("\n".join(common.texts(12)), encoding="utf-8")
    write_text_task(path / "prose.txt", path, "prose")
    assert write_items_task(items(), path, "exam") == ["exam", "exam_cloze"]
    return path


@pytest.fixture(scope="module")
def asked(folder: Path, exact: tuple[Any, Any]) -> dict[str, Answers]:
    catalogue, lm = Catalogue([folder]), harness.language_model(*exact, batch=4)
    return {name: harness.ask(lm, catalogue.find(name), key="k") for name in catalogue.local()}


def values(answers: Answers, metric: str) -> list[Any]:
    return [document.values[metric] for document in answers.documents]


def log_likelihood(model: Any, ids: list[int], start: int) -> float:
    """Of the tokens from `start` on, each after those before it, nats."""
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(start, len(ids)))


def test_multiple_choice_is_what_a_sum_by_hand_gives(asked: dict[str, Answers], folder: Path, exact: Any) -> None:
    model, tokenizer = exact
    plain, normal = [], []
    for line in (folder / "things.jsonl").read_text().splitlines():
        row = json.loads(line)
        start = len(tokenizer(row["q"])["input_ids"])
        logs = [log_likelihood(model, tokenizer(f"{row['q']} {choice}")["input_ids"], start) for choice in row["c"]]
        plain.append(float(np.argmax(logs) == row["a"]))
        normal.append(float(np.argmax([value / len(c) for value, c in zip(logs, row["c"], strict=True)]) == row["a"]))
    assert values(asked["things"], "acc") == plain
    assert values(asked["things"], "acc_norm") == normal
    assert 0 < sum(normal) < len(normal), "the test needs both right and wrong answers"
    assert asked["things"].version == "2.0" and asked["things"].shots == 0


def test_generation_is_what_greedy_decoding_by_hand_gives(asked: dict[str, Answers]) -> None:
    assert values(asked["sums"], "exact_match,strict-match") == [float(i % 2) for i in range(8)]
    assert values(asked["sums"], "exact_match,never") == [0.0] * 8
    assert choose_metric(asked["sums"]) == "exact_match,strict-match", "the task's first filter counts"


def test_text_is_the_sum_of_all_its_tokens(asked: dict[str, Answers], folder: Path, exact: Any) -> None:
    model, tokenizer = exact
    pieces = blocks((folder / "prose.txt").read_text())
    for piece, (nats, size) in zip(pieces, values(asked["prose"], "bits_per_byte"), strict=True):
        ids = tokenizer(piece)["input_ids"]
        total = 0.0
        led = [tokenizer.bos_token_id, *ids]
        for at in range(
            1, len(led), common.CONTEXT
        ):  # windows that predict each token once; the last looks back further
            end = min(at + common.CONTEXT, len(led))
            begin = max(0, end - common.CONTEXT - 1)
            total += log_likelihood(model, led[begin:end], at - begin)
        assert size == len(piece.encode())
        assert nats == pytest.approx(total, rel=1e-5)


def test_items_get_the_same_answers_from_the_probe_and_from_lm_eval(asked: dict[str, Answers], exact: Any) -> None:
    found = ask_items(*exact, items())
    of_kind = {
        kind: [right for right, item in zip(found.correct, items(), strict=True) if item.kind == kind]
        for kind in ("choice", "cloze")
    }
    assert [bool(v) for v in values(asked["exam"], "acc_norm")] == of_kind["choice"]
    assert [bool(v) for v in values(asked["exam_cloze"], "acc")] == of_kind["cloze"]
    assert 0 < sum(of_kind["choice"]) < 20


def test_the_metric_can_be_chosen_and_must_exist(asked: dict[str, Answers]) -> None:
    assert compare(asked["things"], asked["things"], metric="acc").metric == "acc"
    assert choose_metric(asked["things"]) == "acc_norm"
    with pytest.raises(ValueError, match=r"task 'things' has no metric 'f1'; it has acc, acc_norm"):
        compare(asked["things"], asked["things"], metric="f1")
    assert parse_metrics(["a=acc"]) == {"a": "acc"} and parse_shots(["5", "mmlu=2"]) == (5, {"mmlu": 2})
    for word in ("x", "x=", "=y"):
        with pytest.raises(ValueError, match="task=metric"):
            parse_metrics([word])
    with pytest.raises(ValueError, match="give a number"):
        parse_shots(["mmlu=many"])


def test_shots_are_the_same_for_every_model_and_change_the_questions(folder: Path, exact: Any) -> None:
    lm, catalogue = harness.language_model(*exact, batch=4), Catalogue([folder])
    none, one = (catalogue.find("things", shots) for shots in (0, 1))
    stamps = [[d.stamp for d in harness.ask(lm, task, key="k", limit=4).documents] for task in (one, one, none)]
    assert stamps[0] == stamps[1] and not set(stamps[0]) & set(stamps[2])
    assert harness.fingerprint(one, None) != harness.fingerprint(none, None)
    assert harness.fingerprint(catalogue.find("things", 1), None) == harness.fingerprint(one, None)
    assert tasks.SHOTS == {"mmlu": 5, "hellaswag": 10, "arc_easy": 25, "arc_challenge": 25, "gsm8k": 5}


def test_prompts_that_lose_their_beginning_are_counted(folder: Path, exact: Any, tmp_path: Path) -> None:
    lm = harness.language_model(*exact, batch=4)
    write_items_task(
        [Item("Ada sells maps " * 40, (" maps", " clocks")), Item("Ada", (" maps", " clocks"))], tmp_path, "long"
    )
    assert harness.ask(lm, Catalogue([tmp_path]).find("long"), key="k").cut == 1, "both choices share one prompt"


def test_a_group_is_one_task_with_its_parts(folder: Path, exact: Any, tmp_path: Path) -> None:
    write_items_task(items()[:4], tmp_path, "left")
    write_items_task(items()[4:10], tmp_path, "right")
    (tmp_path / "both.yaml").write_text("group: both\ntask: [left, right]\nmetadata: {version: 1.0}\n")
    answers = harness.ask(harness.language_model(*exact, batch=4), Catalogue([tmp_path]).find("both"), key="k")
    found = compare(answers, answers)
    assert found.items == 10 and found.parts is not None
    assert {name: part["items"] for name, part in found.parts.items()} == {"left": 4, "right": 6}


def test_data_that_are_not_there_are_told_of_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "hub.yaml").write_text(
        "task: far\ndataset_path: nobody/nothing\ndataset_name: small\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: q\ndoc_to_target: a\ndoc_to_choice: [x, y]\n"
    )
    task_file(
        tmp_path, "near", [], output_type="multiple_choice", doc_to_text="q", doc_to_target="a", doc_to_choice=["x"]
    )
    (tmp_path / "near.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="nobody/nothing is not on this machine") as error:
        Catalogue([tmp_path]).find("far")
    assert all(
        word in str(error.value)
        for word in ("HF_HUB_OFFLINE=0", "load_dataset('nobody/nothing', 'small')", "--include")
    )
    with pytest.raises(FileNotFoundError, match=r"its data .*near\.jsonl.* are not there"):
        Catalogue([tmp_path / "near.yaml"]).find("near")
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        Catalogue([tmp_path / "nowhere"])
    (tmp_path / "no.yaml").write_text("a: b\n")
    with pytest.raises(ValueError, match="is no task"):
        Catalogue([tmp_path / "no.yaml"])


@pytest.mark.parametrize(
    "row, told",
    [
        ('{"q": "x", "a": 0}', "UndefinedError"),
        ('{"q": "x", "c": ["y"', "JSON parse error"),
        ("", "StopIteration"),
        ('{"q": "x", "c": ["y", "z"], "a": 7}', "IndexError"),
    ],
)
def test_a_task_file_that_does_not_fit_its_data_is_told_of(tmp_path: Path, row: str, told: str) -> None:
    kind = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "{{a}}",
    }
    task_file(tmp_path, "odd", [], **kind)
    (tmp_path / "odd.jsonl").write_text(row)
    with pytest.raises(ValueError, match=rf"task 'odd' does not load; .*{told}"):
        Catalogue([tmp_path]).find("odd")


def test_a_field_that_only_some_documents_have_is_told_of(tmp_path: Path, exact: Any) -> None:
    kind = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q.strip()}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "{{a}}",
    }
    task_file(tmp_path, "odd", [{"q": "x", "c": ["y", "z"], "a": 0}, {"c": ["y", "z"], "a": 0}], **kind)
    with pytest.raises(ValueError, match="task 'odd': its template does not fit its documents"):
        harness.ask(harness.language_model(*exact, batch=4), Catalogue([tmp_path]).find("odd"), key="k")


@pytest.mark.slow
def test_the_published_tasks_are_known_by_name() -> None:
    catalogue = Catalogue()
    for name in tasks.SHOTS:
        with pytest.raises(FileNotFoundError, match=rf"task '{name}': its data set .*/.* is not on this machine"):
            catalogue.find(name)
    with pytest.raises(ValueError, match=r"no task 'helaswag'.*did you mean 'hellaswag'"):
        catalogue.find("helaswag")


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'fp8kernels\[eval\]'"):
        Catalogue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """A run in 8 bits and the BF16 run that it names as its baseline."""
    base = tmp_path_factory.mktemp("runs")
    model, text = common.model_folder(base / "m"), common.text_file(base)
    config = {"model": {"path": str(model)}, "data": {"train": str(text), "sequence": 32}, "steps": 4, "batch": 2}
    config |= {"learning_rate": 1e-3, "warmup_steps": 0}
    with torch.enable_grad():
        plain = train(config | {"recipe": None}, base / "bf16")
        return train(config | {"recipe": "hif8-qat", "baseline": str(plain.path)}, base / "hif8"), plain


@pytest.fixture
def questions(folder: Path, tmp_path: Path) -> Questions:
    write_items(tmp_path / "quiz.jsonl", items())
    return Questions(
        tasks=["things"], include=[folder], items=[tmp_path / "quiz.jsonl"], text=[folder / "prose.txt"], batch=4
    )


def test_a_run_is_compared_with_its_baseline(runs: tuple[Run, Run], questions: Questions, monkeypatch: Any) -> None:
    run, plain = runs
    subject, reference = open_subject(run.path), open_subject(reference_of(run) or "")
    assert reference.path == plain.path and reference.recipe is None
    assert subject.trained and subject.precision == "hif8-qat, as trained"
    found = evaluate(subject, reference, questions)
    assert [c.task for c in found.comparisons] == ["quiz", "things", "text_prose"]
    quiz, _, prose = found.comparisons
    assert (quiz.items, quiz.unit, prose.unit) == (35, "accuracy", "bits per byte")
    assert quiz.p_holm is not None and prose.drop != 0, "8 bits change the loss of a text"
    assert found.curve is not None and found.curve.steps == 4 and found.warnings == []
    kept = json.loads((run.path / "eval.json").read_text())
    assert kept["paired"] is True and kept["tasks"]["quiz"]["answers"].keys() == {"first", "second"}
    assert len(kept["tasks"]["quiz"]["documents"]) == 35
    assert kept["loss_curve"]["mean"] == found.curve.mean

    def never(self: Subject) -> Any:
        raise AssertionError("the answers were there already")

    monkeypatch.setattr(Subject, "load", never)
    again = evaluate(open_subject(run.path), open_subject(plain.path), questions)
    assert again.comparisons == found.comparisons


def test_what_was_answered_before_a_kill_is_not_asked_again(
    runs: tuple[Run, Run], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, ask = [], harness.ask

    def interrupted(lm: Any, task: Any, **rest: Any) -> Answers:
        if not asked or asked[-1] == "killed":
            asked.append(task.name)
            return ask(lm, task, **rest)
        asked.append("killed")
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "ask", interrupted)
    subject = open_subject(runs[1].path / "model")
    plain = dataclasses.replace(subject, run=None)  # a folder: its answers go where the result goes
    two = Questions(tasks=["exam", "exam_cloze"], include=[folder], batch=4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(plain, None, two, out=tmp_path)
    assert not (tmp_path / "eval.json").exists() and len(list((tmp_path / "answers").iterdir())) == 1
    found = evaluate(plain, None, two, out=tmp_path)
    assert asked == ["exam", "killed", "exam_cloze"]
    assert [s.task for s in found.scores] == ["exam", "exam_cloze"] and found.against is None


def test_a_models_files_and_its_precision_are_its_key(tmp_path: Path, runs: tuple[Run, Run]) -> None:
    folder = common.model_folder(tmp_path / "m")
    before = open_subject(folder).key
    assert open_subject(folder).key == before
    assert open_subject(runs[0].path).key != open_subject(runs[0].path, fmt="bf16").key
    common.model(1).save_pretrained(folder)
    assert open_subject(folder).key != before


def test_precisions(runs: tuple[Run, Run], tmp_path: Path) -> None:
    run, plain = runs
    trained, _ = open_subject(run.path).load()
    assert layers(trained) and all(layer.fp8_on and float(layer.fp8_scale[0]) > 0 for layer in layers(trained))
    assert layers(open_subject(run.path / "model").load()[0]), "a run's model folder is the run"
    assert not layers(open_subject(run.path, fmt="bf16").load()[0])
    text = tmp_path / "text.txt"
    text.write_text("\n".join(common.texts(4)))
    quantized, _ = open_subject(plain.path, recipe="hif8-qat", calibrate=text).load()
    assert layers(quantized) and all(float(layer.fp8_scale[0]) > 0 for layer in layers(quantized))
    assert not quantized.training and not any(layer.training for layer in layers(quantized))
    assert layers(open_subject(plain.path, recipe="e4m3-row").load()[0]), "scales of the tensor itself need no text"


def test_layers_that_do_not_compute_in_8_bits_are_warned_of(tmp_path: Path) -> None:
    model = convert(common.model(), get_recipe("hif8-qat").replace(warmup_steps=9), verbose=False)
    with pytest.warns(UserWarning, match=r"14 of 14 8-bit layers compute in high precision \(model.layers.0"):
        warn_of_cold_layers(model, tmp_path)


def test_what_cannot_be_evaluated_is_told_of_before_anything_is_loaded(runs: tuple[Run, Run], tmp_path: Path) -> None:
    run, plain = runs
    for arguments, error, words in (
        ((tmp_path / "none",), FileNotFoundError, "is not a folder"),
        ((run.path, "bf16", "hif8-qat"), ValueError, "give one of them"),
        ((run.path, None, "hif8-qat"), ValueError, "was trained with 'hif8-qat'"),
        ((plain.path, None, "hif8-qat"), ValueError, "give text that sets them"),
        ((plain.path, None, "hif8-qat", tmp_path / "none.txt"), FileNotFoundError, "none.txt is not a file"),
        ((plain.path, "fp4"), ValueError, "known is 'bf16'"),
        ((plain.path, None, "hif9"), ValueError, "unknown recipe 'hif9'"),
    ):
        names = ("path", "fmt", "recipe", "calibrate")
        with pytest.raises(error, match=words):
            open_subject(**dict(zip(names, arguments, strict=False)))  # type: ignore[arg-type]
    unfinished = Run.create(tmp_path / "unfinished")
    with pytest.raises(FileNotFoundError, match=r"'running' and has not saved its model.*--resume"):
        open_subject(unfinished.path)
    subject = open_subject(plain.path)
    with pytest.raises(ValueError, match="nothing to ask"):
        evaluate(subject, None, Questions())
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(ValueError, match="holds no text"):
        evaluate(subject, None, Questions(text=[empty]))
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        evaluate(subject, None, Questions(text=[binary]))
    with pytest.raises(ValueError, match="batch=0"):
        Questions(batch=0)
    unfinished.update(baseline=str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match=r"names the baseline .*gone, which is not there"):
        reference_of(unfinished)


def test_the_command(runs: tuple[Run, Run], questions: Questions, folder: Path) -> None:
    run, plain = runs
    quiz = str(questions.items[0])
    done = CliRunner().invoke(app, ["eval", "llm", str(run.path), "--items", quiz, "--batch", "4"])
    assert done.exit_code == 0, done.output
    assert re.search(r"quiz: no worse than 1.00% .*35 items", " ".join(done.output.split()))
    assert all(
        word in done.output for word in ("quiz", "hif8-qat, as trained", "unpaired", "Training loss over 4 steps")
    )
    done = CliRunner().invoke(app, ["eval", "llm", str(run.path), "--format", "bf16", "--items", quiz, "--json"])
    found = json.loads(done.stdout)
    assert found["model"]["precision"] == "bf16" and found["tasks"]["quiz"]["items"] == 35
    assert (run.path / "eval-bf16.json").is_file()
    alone = CliRunner().invoke(app, ["eval", "llm", str(plain.path), "--items", quiz, "--unpaired"])
    assert alone.exit_code == 0 and "warning: unpaired scores" in alone.output


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "recipe: null"),
        (["--unpaired"], "nothing to ask"),
        (["--unpaired", "--items", "none.jsonl"], "none.jsonl"),
        (["--unpaired", "--tasks", "none.yaml"], "none.yaml is not there"),
        (["--unpaired", "--shots", "many"], "give a number"),
        (["--against", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_a_mistake_is_one_line(runs: tuple[Run, Run], words: list[str], told: str) -> None:
    done = CliRunner().invoke(app, ["eval", "llm", str(runs[1].path), *words])
    assert done.exit_code == 2
    assert done.output.startswith("error: ") and told in done.output and "Traceback" not in done.output
