"""Asking a model the documents of a task, by lm-evaluation-harness."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .answers import Answers, Document
from .subject import autocast_dtype
from .tasks import Task, quiet

PLACES = ("dataset_kwargs", "metadata")  # of a task's config: where its data lie; what they are is hashed itself
SEED = 1234  # of the choice of examples, lm-eval's own default
STAMP = 16  # hex digits of a document's hash that are kept


def language_model(model: Any, tokenizer: Any, *, batch: int) -> Any:
    """lm-eval's view of a model that is loaded: log-probabilities in FP32, matrix products as in training.

    batch   prompts at once
    raises  ValueError if the tokenizer has neither a first nor a last token, which an empty prompt begins with
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    class Quieter(HFLM):  # type: ignore[misc]
        """Shows one bar a task: lm-eval shows another for each batch of a text."""

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
            if options.get("override_bs") is not None:
                options["disable_tqdm"] = True
            return super()._loglikelihood_tokens(requests, **options)

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has neither a bos_token nor an eos_token, and a text's first token is predicted from one of "
            "them; set one in tokenizer_config.json"
        )
    with quiet():
        return Quieter(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch,
            softmax_dtype=torch.float32,  # BF16 keeps two digits of a log-probability, and answers would tie
            mixed_precision_dtype=autocast_dtype(model),
        )


def ask(lm: Any, task: Task, *, key: str, limit: int | None = None) -> Answers:
    """The model's answers to all documents of a task; greedy where it generates, the same shots for every model.

    key    kept with the answers
    limit  documents of each part, from the first; None: all
    """
    from jinja2 import TemplateError
    from lm_eval import evaluate

    documents, versions, shots = [], set(), task.shots
    with quiet() as kept:
        for name, part in task.parts.items():
            part.set_fewshot_seed(seed=SEED)
            try:
                found = evaluate(lm, {"tasks": {name: part}}, limit=limit, bootstrap_iters=0)
            except AssertionError as error:
                raise ValueError(
                    f"task {name!r}: lm-eval cannot ask one of its documents: an answer adds no token to its prompt, "
                    f"or is longer than the model's context of {lm.max_length} tokens ({error})"
                ) from error
            except TemplateError as error:
                raise ValueError(f"task {name!r}: its template does not fit its documents: {error}") from error
            samples = found["samples"][name]
            if not samples:
                raise ValueError(f"task {name!r} has no documents")
            documents += _documents(name, samples)
            versions.add(str(found["versions"].get(name)))
            shots = found["n-shot"].get(name)
    return Answers(task.name, key, shots, ",".join(sorted(versions)), tuple(documents), cut=kept.cut)


def fingerprint(task: Task, limit: int | None) -> str:
    """Hash of what a task asks: config and version, documents and examples, shots; and of lm-eval's version."""
    import importlib.metadata

    digest = hashlib.sha256(repr((importlib.metadata.version("lm_eval"), task.name, task.shots, limit)).encode())
    for name, part in task.parts.items():
        digest.update(f"{name} {part.VERSION}".encode())
        config = {key: value for key, value in part.dump_config().items() if key not in PLACES}
        digest.update(json.dumps(config, sort_keys=True, default=_name_of).encode())
        for split, rows in sorted((part.dataset or {}).items(), key=lambda item: str(item[0])):
            digest.update(str(split).encode())
            for row in rows:
                digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _documents(part: str, samples: list[dict[str, Any]]) -> list[Document]:
    """One document for each that was asked; the same one under several filters gathers their metrics."""
    values: dict[int, dict[str, Any]] = {}
    stamps: dict[int, str] = {}
    for sample in samples:
        number = int(sample["doc_id"])
        text = sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"]
        stamps[number] = hashlib.sha256(text.encode()).hexdigest()[:STAMP]
        kept = values.setdefault(number, {})
        for metric in sample["metrics"]:
            kept[metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"] = _plain(sample[metric])
    return [Document(part, number, stamps[number], found) for number, found in sorted(values.items())]


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _name_of(value: Any) -> str:
    """Functions of a task count by their name: their address is another in every process."""
    return getattr(value, "__qualname__", None) or type(value).__name__
