"""load: an exported folder to a model that holds codes only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..export import check, load_into
from ..export.layout import MANIFEST
from ..models.linears import as_linears


def load(folder: str | Path, *, model: nn.Module | None = None) -> Any:
    """A model in eval mode from a folder that `fp8kernels.export` wrote, or that transformers' save_pretrained wrote.

    folder   with fp8kernels.json: 8-bit weights, checked in full before any is touched. Without: a plain checkpoint,
             loaded in bf16 from safetensors files alone
    model    the plain model to fill, where it is not one that transformers builds from config.json

    Nothing is fetched, nothing is unpickled, and no code of the folder is run.

    raises   FileNotFoundError, ValueError naming the file or tensor at fault; ImportError where transformers is absent
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the one that export wrote")
    if model is not None:
        return load_into(model, folder)
    if not (folder / MANIFEST).is_file():
        return _load_plain(folder)
    manifest = check(folder)
    transformers = _transformers()
    config = _config(folder)
    model_class = getattr(transformers, manifest.model_class, None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(
            f"{folder}: the manifest names {manifest.model_class!r}, which is no model of transformers "
            f"{transformers.__version__}; build the model yourself and give it as load(folder, model=…)"
        )
    try:
        plain = cast(Any, model_class)._from_config(config, dtype=getattr(torch, manifest.dtype))
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder}/config.json does not build a {manifest.model_class}: {error}") from error
    as_linears(plain)  # GPT-2's layers were converted as torch's
    return load_into(plain, folder)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer saved beside the model.

    raises   ValueError if the folder holds none
    """
    _transformers()
    from transformers import AutoTokenizer

    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"{folder} holds no tokenizer.json; export with tokenizer=…")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _load_plain(folder: Path) -> nn.Module:
    _transformers()
    from transformers import AutoModelForCausalLM

    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder} holds neither {MANIFEST} nor safetensors files; export a model to it")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    return model.eval().requires_grad_(False)


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json; build the model yourself and give it as load(folder, model=…)"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, KeyError, ValueError) as error:  # ValueError also where a config brings code of its own
        raise ValueError(f"{folder}/config.json is not a config that transformers itself knows: {error}") from error


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise ImportError("serving needs transformers: pip install 'fp8kernels[demo]'") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers
