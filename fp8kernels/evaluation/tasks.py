"""Tasks of lm-evaluation-harness, by name or from files: which there are, their shots, and where their data are."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INSTALL = "evaluation needs lm-evaluation-harness: pip install 'fp8kernels[eval]'"
SHOTS = {"mmlu": 5, "hellaswag": 10, "arc_easy": 25, "arc_challenge": 25, "gsm8k": 5}  # as published for HiF8 QAT
LOCAL = ("json", "csv", "parquet", "text", "arrow")  # builders of `datasets` that read files given in the task
CUTS = ("Combined length of context", "Left truncation applied")  # how lm-eval says that a prompt was cut
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


@dataclass(frozen=True)
class Task:
    """What was asked for by one name: a task, or a group of them whose documents count together.

    parts  lm-eval's task objects, with their data, by name
    shots  examples in front of each question; None: what the task itself says
    """

    name: str
    parts: dict[str, Any]
    shots: int | None


class Catalogue:
    """The tasks that are known: lm-eval's own, and those of local files and folders.

    include  YAML files, or folders of them, beside lm-eval's own tasks; they win over a task of the same name
    raises   ImportError where lm-eval is not installed; FileNotFoundError for a path that is not there
    """

    def __init__(self, include: Iterable[Path | str] = ()) -> None:
        offline()
        self.include = [Path(path) for path in include]
        for path in self.include:
            if not path.exists():
                raise FileNotFoundError(f"{path} is not there; include a task's YAML file, or a folder of them")
        self._local = _manager(self.include, defaults=False)
        self._all: Any = None

    def find(self, name: str, shots: int | None = None) -> Task:
        """A task or group by its name, with its data.

        shots    None: as published for MMLU, HellaSwag, ARC and GSM8K, as the task says for others
        raises   ValueError for a name that there is not, with near ones, or a task that cannot be read;
                 FileNotFoundError if its data are not there, with what was looked for and how to get it
        """
        manager = self._local
        if name not in manager.task_index:  # lm-eval's own ten thousand files take seconds to read
            self._all = self._all or _manager(self.include, defaults=True)
            manager = self._all
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, [*manager.task_index], n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"there is no task {name!r} in lm-eval or in the files included{hint}")
        entry = manager.task_index[name]
        try:
            with quiet():
                loaded = manager.load([name])
        except Exception as error:  # a task file may hold anything, and lm-eval and datasets raise anything
            raise _no_data(name, entry, manager, error) from None
        wanted = SHOTS.get(name) if shots is None else shots
        for part in loaded["tasks"].values():
            given = part.get_config("num_fewshot")
            if given is None or (wanted is not None and given != 0):  # a task that says 0 cannot have any
                part.set_config(key="num_fewshot", value=wanted or 0)
        return Task(name, dict(loaded["tasks"]), wanted)

    def local(self) -> list[str]:
        """The names of the tasks in the files included; groups and tags not.

        raises   ValueError if there are none
        """
        names = [name for name, entry in self._local.task_index.items() if entry.kind.name in ("TASK", "PY_TASK")]
        if not names:
            raise ValueError(
                f"{', '.join(map(str, self.include))} holds no task: a YAML file with the key task is needed"
            )
        return names


def offline() -> None:
    """Nothing is fetched, unless the user's environment says otherwise; to be called before datasets is imported.

    raises   ImportError where lm-eval is not installed
    """
    for name in OFFLINE:
        os.environ.setdefault(name, "1")
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(INSTALL) from error
    import datasets

    datasets.disable_progress_bars()
    if os.environ["HF_DATASETS_OFFLINE"] not in ("0", ""):
        datasets.config.HF_DATASETS_OFFLINE = True  # it reads its environment once, and may be imported already


def parse_shots(given: Iterable[str]) -> tuple[int | None, dict[str, int]]:
    """ "5" for all tasks, "mmlu=5" for one: (of all, by name).

    raises   ValueError for anything else
    """
    everywhere, named = None, {}
    for word in given:
        name, equals, number = word.rpartition("=")
        if not number.strip().isdigit():
            raise ValueError(f"shots {word!r}: give a number, or task=number")
        if equals:
            named[name.strip()] = int(number)
        else:
            everywhere = int(number)
    return everywhere, named


def parse_metrics(given: Iterable[str]) -> dict[str, str]:
    """ "task=metric" words, by task.

    raises   ValueError for anything else
    """
    found = {}
    for word in given:
        task, equals, metric = word.partition("=")
        if not (task.strip() and equals and metric.strip()):
            raise ValueError(f"metric {word!r}: give task=metric, such as arc_easy=acc")
        found[task.strip()] = metric.strip()
    return found


def _manager(include: list[Path], *, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    folders = [path for path in include if path.is_dir()]
    with quiet():
        manager = TaskManager(include_path=folders or None, include_defaults=defaults)
    for path in include:
        if path.is_file():
            _add_file(manager, path)
    for entry in manager.task_index.values():
        own = None if entry.yaml_path is None else entry.yaml_path.resolve()
        if own is not None and any(path.resolve() in (own, *own.parents) for path in include):
            _anchor(entry)
    return manager


def _add_file(manager: Any, path: Path) -> None:
    """One YAML file, without the others in its folder."""
    from lm_eval.tasks import TaskManager

    neighbours = TaskManager(include_path=path.parent, include_defaults=False).task_index
    found = {name: entry for name, entry in neighbours.items() if entry.yaml_path and entry.yaml_path.samefile(path)}
    if not found:
        raise ValueError(f"{path} is no task: a YAML file with the keys task, dataset_path, output_type, … is needed")
    manager.task_index.update(found)


def _anchor(entry: Any) -> None:
    """Data files of a task are found beside its own file too, and not only from where the command runs.

    A task with functions of its own, or that includes another file, is left as it is: lm-eval reads that file again.
    """
    config = dict(entry.cfg or {})
    options = dict(config.get("dataset_kwargs") or {})
    path = entry.yaml_path
    if config.get("dataset_path") not in LOCAL or "data_files" not in options or path is None:
        return
    if re.search(r"!function|^include:", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
        return

    def place(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {split: place(file) for split, file in value.items()}
        if isinstance(value, list | tuple):
            return [place(file) for file in value]
        near = path.parent / str(value)
        return str(near.resolve()) if near.is_file() and not Path(str(value)).is_file() else value

    entry.cfg = config | {"dataset_kwargs": options | {"data_files": place(options["data_files"])}}
    entry.yaml_path = None


def _no_data(name: str, entry: Any, manager: Any, error: Exception) -> Exception:
    """The error for a task that does not load, with the way out."""
    cause = error.__cause__ or error.__context__ or error  # datasets wraps what it found in "an error occurred"
    words = str(error if isinstance(error, OSError) else cause).strip().splitlines()
    reason = f"{type(cause).__name__}: {words[0] if words else ''}".removesuffix(": ")
    config = _first_config(entry, manager)
    source = config.get("dataset_path")
    if not isinstance(error, OSError):
        return ValueError(f"task {name!r} does not load; its file or its data are not what lm-eval reads ({reason})")
    if source in LOCAL:
        files = (config.get("dataset_kwargs") or {}).get("data_files")
        return FileNotFoundError(
            f"task {name!r}: its data {files!r} are not there ({reason}); paths count from where the command runs, "
            f"or from the folder of the task's own file"
        )
    import datasets

    subset = config.get("dataset_name")
    given = repr(source) + (f", {subset!r}" if subset else "")
    return FileNotFoundError(
        f"task {name!r}: its data set {source or '(several)'} is not on this machine ({reason}). Looked for in "
        f"{datasets.config.HF_DATASETS_CACHE}. Where there is a network, run the same command with HF_HUB_OFFLINE=0 "
        f'HF_DATASETS_OFFLINE=0, or `python -c "import datasets; datasets.load_dataset({given})"`, and copy that '
        f"folder here (HF_DATASETS_CACHE names another place); or write a task file for local files, and --include it"
    )


def _first_config(entry: Any, manager: Any) -> Mapping[str, Any]:
    """The config of a task, or of the first task in a group or tag."""
    seen = set()
    while entry is not None and entry.name not in seen:
        seen.add(entry.name)
        config = entry.cfg or {}
        if config.get("dataset_path"):
            return config
        members = config.get("task")
        first = members[0] if isinstance(members, list) and members else None
        if first is None:
            tagged = [e for e in manager.task_index.values() if entry.name in (e.tags or ())]
            entry = tagged[0] if tagged else None
        else:
            entry = manager.task_index.get(first if isinstance(first, str) else first.get("task") or first.get("group"))
    return {}


class Kept(logging.Handler):
    """Counts prompts that were cut and lets errors through."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = 0

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(CUTS):
            self.cut += 1
        elif record.levelno >= logging.ERROR and logging.lastResort is not None:
            logging.lastResort.handle(record)


@contextmanager
def quiet() -> Iterator[Kept]:
    """Keep lm-eval's log off the screen; it says much that is not about the answers."""
    logger, kept = logging.getLogger("lm_eval"), Kept()
    before = logger.propagate
    logger.propagate = False
    logger.addHandler(kept)
    try:
        yield kept
    finally:
        logger.removeHandler(kept)
        logger.propagate = before
