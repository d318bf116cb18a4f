"""evaluate: ask two models the same, keep what they answered, and write the comparison."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..export.atomic import write_file
from ..export.layout import file_stamp
from ..runs import Run
from ..runs.curve import LossCurve, loss_curve, unmatched
from ..runs.folder import now, plain
from . import answers as keeping
from .answers import Answers, Document, match
from .compare import MARGIN, Comparison, Score, compare, score, with_holm
from .subject import Subject, autocast_dtype

RESULT = "eval.json"
KEPT = "answers"  # folder of the answers that were given already
TRAIN_REFERENCE = "train the matched BF16 run (the same config with `recipe: null`) and name it"


@dataclass(frozen=True)
class Questions:
    """What both models are asked.

    tasks    names of lm-eval's tasks or groups, or of those in `include`
    include  task files of one's own, or folders of them
    items    JSON-lines files of exam items, scored by `probe.score`
    text     UTF-8 text files, in bits per byte
    shots    examples before each question, by task; None: as published, or as the task says
    metrics  by which a task is judged, where not by the best known
    limit    documents of each task, from the first: a quick look, not a result
    batch    prompts at once
    """

    tasks: Sequence[str] = ()
    include: Sequence[Path | str] = ()
    items: Sequence[Path | str] = ()
    text: Sequence[Path | str] = ()
    shots: Mapping[str, int] = field(default_factory=dict)
    all_shots: int | None = None
    metrics: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    batch: int = 8

    def __post_init__(self) -> None:
        if self.batch < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"batch={self.batch} and limit={self.limit} must be at least 1")


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    model, against            paths, and the precision each of them answered in; against is None without a pair
    comparisons               paired, by task
    scores                    of the model alone, where nothing was compared
    curve                     of the training losses, where both are runs
    warnings                  what a reader must know, in words
    level                     of all intervals
    documents                 by task: part, number and hash of each, and the values of both models by the task's metric
    """

    model: dict[str, Any]
    against: dict[str, Any] | None
    comparisons: list[Comparison]
    scores: list[Score]
    curve: LossCurve | None
    warnings: list[str]
    documents: dict[str, dict[str, Any]]
    level: float = 0.95

    def as_json(self) -> dict[str, Any]:
        """For eval.json, numbers that are not finite as null."""
        found: dict[str, Any] = {
            "model": self.model,
            "against": self.against,
            "paired": self.against is not None,
            "level": self.level,
            "finished": now(),
            "warnings": self.warnings,
            "loss_curve": None if self.curve is None else dataclasses.asdict(self.curve),
            "tasks": {},
        }
        results: list[Comparison | Score] = [*self.comparisons, *self.scores]
        for one in results:
            found["tasks"][one.task] = dataclasses.asdict(one) | self.documents[one.task]
        return plain(found)


def reference_of(run: Run | None) -> Path | None:
    """The run that a run names as the one to compare with, or None.

    raises   FileNotFoundError if the one it names is not there
    """
    named = None if run is None else run.info.get("baseline") or (run.info.get("config") or {}).get("baseline")
    if run is None or not named:
        return None
    for path in (Path(named), run.path / named, run.path.parent / named):
        if path.is_dir():
            return path
    raise FileNotFoundError(f"{run.path} names the baseline {named}, which is not there; give it as --against")


def evaluate(
    subject: Subject,
    against: Subject | None,
    questions: Questions,
    *,
    out: Path | str | None = None,
    level: float = 0.95,
    margin: float = MARGIN,
    say: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Ask a model and its reference the same documents, one model after the other, and compare them in pairs.

    Answers are kept, by the hash of the model's files and of the task, in the folder of the run they belong to (of
    other models: in `out`), so that a call that was interrupted goes on, and a reference is asked once for many runs.

    against  the reference; None: plain scores, which say little about small differences
    out      gets eval.json, whole or not at all; None: the run's folder, or nowhere. In a run's folder the name says so
             where it did not answer as it was trained: eval-bf16.json
    level    of the intervals
    margin   a relative drop of accuracy that would still count as no loss
    say      is told what is going on
    raises   ValueError, FileNotFoundError for questions that cannot be asked, before a model is loaded
    """
    out = Path(out) if out is not None else None if subject.run is None else subject.run.path
    curve, warnings = None, []
    if against is not None and against.run is not None and subject.run is not None:
        curve = loss_curve(subject.run, against.run, level=level)
        warnings += [
            f"the runs differ in more than precision, in {line}" for line in unmatched(subject.run, against.run)
        ]
    if questions.limit is not None:
        warnings.append(f"only the first {questions.limit} documents of each task were asked")
    with contextlib.ExitStack() as stack:
        asked = _prepare(questions, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        if not asked and curve is None:
            raise ValueError("nothing to ask: give tasks (--tasks), exam items (--items) or text (--text)")
        ours = _answers(subject, asked, questions, out, say)
        theirs = None if against is None else _answers(against, asked, questions, out, say)
    comparisons, scores, documents = [], [], {}
    for name, found in ours.items():
        metric = questions.metrics.get(name)
        if theirs is None:
            scores.append(score(found, metric))
            documents[name] = _listed([(d, d) for d in found.documents], scores[-1].metric, alone=True)
        else:
            comparisons.append(compare(theirs[name], found, metric=metric, level=level, margin=margin))
            documents[name] = _listed(match(theirs[name], found), comparisons[-1].metric, alone=False)
        if found.cut:
            warnings.append(f"{name}: {found.cut} prompts lost their beginning, since the model's context is short")
    evaluation = Evaluation(
        _described(subject),
        None if against is None else _described(against),
        with_holm(comparisons),
        scores,
        curve,
        warnings,
        documents,
        level,
    )
    if out is not None:
        path = out / _result_name(subject, out)
        text = json.dumps(evaluation.as_json()) + "\n"
        write_file(path, lambda staged: staged.write_text(text, encoding="utf-8"))
        say(f"wrote {path}")
    return evaluation


@dataclass(frozen=True)
class _Asked:
    """One task, or one file of items, with the hash of what it asks and the function that asks a model."""

    name: str
    stamp: str
    ask: Callable[[_Model, str], Answers]


class _Model:
    """A subject's model, loaded when the first question needs it."""

    def __init__(self, subject: Subject, batch: int, say: Callable[[str], None]) -> None:
        self.subject, self.batch, self.say = subject, batch, say
        self._loaded: tuple[Any, Any] | None = None
        self._lm: Any = None

    def loaded(self) -> tuple[Any, Any]:
        """Model and tokenizer."""
        if self._loaded is None:
            self.say(f"loading {self.subject.folder} ({self.subject.precision})")
            self._loaded = self.subject.load()
        return self._loaded

    def lm(self) -> Any:
        """lm-eval's view of it."""
        from .harness import language_model

        self._lm = self._lm or language_model(*self.loaded(), batch=self.batch)
        return self._lm


def _prepare(questions: Questions, folder: Path) -> list[_Asked]:
    """Everything that can go wrong without a model goes wrong here."""
    asked = [_items(Path(path), questions) for path in questions.items]
    if questions.tasks or questions.text:
        asked += _tasks(questions, folder)
    names = [one.name for one in asked]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} would be asked twice; give each name once")
    return asked


def _items(path: Path, questions: Questions) -> _Asked:
    from ..probe import read_items, score

    items = read_items(path)[: questions.limit]
    stamps = [hashlib.sha256(repr(item).encode()).hexdigest()[:16] for item in items]

    def ask(model: _Model, key: str) -> Answers:
        loaded, tokenizer = model.loaded()
        found = score(loaded, tokenizer, items, batch=questions.batch, autocast=autocast_dtype(loaded))
        documents = [
            Document(path.stem, number, stamp, {"correct": int(right), "margin": float(margin)})
            for number, (stamp, right, margin) in enumerate(zip(stamps, found.correct, found.margins, strict=True))
        ]
        return Answers(path.stem, key, 0, "1", tuple(documents))

    return _Asked(path.stem, repr((file_stamp(path), questions.limit)), ask)


def _tasks(questions: Questions, folder: Path) -> list[_Asked]:
    from .harness import ask, fingerprint
    from .local import write_text_task
    from .tasks import Catalogue

    texts = [write_text_task(path, folder) for path in questions.text]
    files = [name for name in questions.tasks if name.endswith((".yaml", ".yml")) or Path(name).is_dir()]
    catalogue = Catalogue([*questions.include, *files, *([folder] if texts else [])])
    names = [*(name for name in questions.tasks if name not in files), *texts]
    for file in files:
        names += Catalogue([file]).local()
    asked = []
    for name in names:
        task = catalogue.find(name, questions.shots.get(name, questions.all_shots))
        asked.append(
            _Asked(
                name,
                fingerprint(task, questions.limit),
                lambda model, key, task=task: ask(model.lm(), task, key=key, limit=questions.limit),  # type: ignore[misc]
            )
        )
    return asked


def _answers(
    subject: Subject, asked: list[_Asked], questions: Questions, out: Path | None, say: Callable[[str], None]
) -> dict[str, Answers]:
    """By task, from what is kept or from the model; each is kept as soon as it is there."""
    home = out if subject.run is None else subject.run.path
    files = subject.key
    model = _Model(subject, questions.batch, say)
    found = {}
    for one in asked:
        key = hashlib.sha256(f"{files} {one.stamp}".encode()).hexdigest()
        name = re.sub(r"[^\w.-]+", "_", one.name)
        path = None if home is None else home / KEPT / f"{name}-{key[:12]}.json"
        kept = None if path is None else keeping.load(path, key)
        if kept is None:
            say(f"{subject.path} answers {one.name}")
            kept = one.ask(model, key)
            if path is not None:
                keeping.save(kept, path)
        else:
            say(f"{subject.path} has answered {one.name} before")
        found[one.name] = kept
    return found


def _result_name(subject: Subject, out: Path) -> str:
    """A run keeps the result of the precision it was trained in apart from those of others."""
    if subject.run is None or out != subject.run.path or subject.as_trained:
        return RESULT
    return f"{Path(RESULT).stem}-{'bf16' if subject.recipe is None else subject.recipe.name}.json"


def _listed(pairs: list[tuple[Document, Document]], metric: str, *, alone: bool) -> dict[str, Any]:
    both = {"second": [b.values[metric] for _, b in pairs]}
    if not alone:
        both = {"first": [a.values[metric] for a, _ in pairs]} | both
    return {"documents": [[a.part, a.number, a.stamp] for a, _ in pairs], "answers": both}


def _described(subject: Subject) -> dict[str, Any]:
    return {"path": str(subject.path), "precision": subject.precision, "key": subject.key}
