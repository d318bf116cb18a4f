"""Tokenizers from local folders, and whether one fits a model; no code of a folder is run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..headers import AGAIN, check_folder, read_json, some
from .sentencepiece import sentencepiece_tokenizer

FILES = (  # of which one holds the vocabulary
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "tiktoken.model",
)
SENTENCEPIECE = "tokenizer.model"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
MOST_WITHOUT_TOKEN = 0.25  # of the rows of an embedding; models pad theirs to round lengths, by far less than this


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer that lies in a folder, in a class of transformers itself.

    folder   with tokenizer.json, tokenizer.model or the files of an older tokenizer. If tokenizer_config.json names a
             class that comes as code (openPangu's), stock classes read the files: tokenizer.json as it is, a
             sentencepiece tokenizer.model as models/sentencepiece.py says. What that code does beyond text to ids and
             back is not covered

    raises   FileNotFoundError if the folder holds no tokenizer; ValueError if its files are broken or need code of its
             own; ImportError naming the extra to install
    """
    _transformers()
    folder = check_folder(folder)
    found = [name for name in FILES if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no tokenizer (none of {', '.join(FILES)}); give the folder of another as tokenizer=…"
        )
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    if "tokenizer.json" in found:
        read_json(folder / "tokenizer.json")
    try:
        with quiet():
            tokenizer = _read(folder, found, settings)
    except ImportError:
        raise
    except Exception as error:  # the parsers of these files are many, and so are their errors
        raise ValueError(f"the tokenizer in {folder} cannot be read ({str(error).strip()[:300]}); {AGAIN}") from error
    if len(tokenizer) == 0:
        raise ValueError(f"the tokenizer in {folder} has no tokens; {AGAIN}")
    return tokenizer


def check_tokenizer(tokenizer: Any, model: Any, *, where: str = "the tokenizer") -> None:
    """Refuse a tokenizer that the model cannot have been trained with, and warn of one that it probably was not.

    raises   ValueError if an id has no row in the embedding, or a special id of the model's config or generation_config
             has none
    warns    UserWarning if both sides name a bos or eos id and they differ, or a quarter of the embedding has no token
    """
    rows = model.get_input_embeddings().weight.shape[0]
    last = max(tokenizer.get_vocab().values())
    if last >= rows:
        raise ValueError(
            f"{where} has ids up to {last} ({len(tokenizer)} tokens), the model embeds {rows}: it is not this model's "
            "tokenizer. If tokens were added to it on purpose, give them rows first "
            "(model.resize_token_embeddings(len(tokenizer)), save_pretrained)"
        )
    named = {name: _special_ids(model, name) for name in SPECIAL}
    for name, ids in named.items():
        outside = sorted(token for token in ids if not 0 <= token < rows)
        if outside:
            raise ValueError(
                f"the model's config has {name} = {outside[0]}, and its embedding the rows 0 to {rows - 1}; "
                "correct config.json and generation_config.json (null where there is no such token)"
            )
    for name in SPECIAL[:2]:  # padding differs in many good folders, and labels leave it out
        own = getattr(tokenizer, name, None)
        if own is not None and named[name] and own not in named[name]:
            warnings.warn(
                f"{where} has {name} {own} ({tokenizer.convert_ids_to_tokens(own)!r}), the model's config "
                f"{sorted(named[name])}: one of them may belong to another model",
                stacklevel=3,
            )
    if len(tokenizer) < rows * (1 - MOST_WITHOUT_TOKEN):
        warnings.warn(
            f"{where} has {len(tokenizer)} tokens, the model embeds {rows}: it may belong to another model",
            stacklevel=3,
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own reports and progress bars: what matters of them is an error or a warning here."""
    logging = _transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _special_ids(model: Any, name: str) -> set[int]:
    ids: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        value = getattr(config, name, None)
        ids.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return ids


def _is_stock(name: Any) -> bool:
    """Whether a tokenizer class is one that transformers itself has; None is for older folders, which name none."""
    import transformers

    return name is None or (isinstance(name, str) and isinstance(getattr(transformers, name, None), type))


def _read(folder: Path, found: list[str], settings: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if _is_stock(settings.get("tokenizer_class")):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if "tokenizer.json" in found:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if SENTENCEPIECE in found:
        return sentencepiece_tokenizer(folder / SENTENCEPIECE, settings)
    raise ValueError(f"its class comes as code of the folder, which is not run, and {some(found)} alone do not say how")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("language models need transformers: pip install 'fp8kernels[train]'") from error
    return transformers
