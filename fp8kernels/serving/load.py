"""load: an exported folder to a model that holds codes only."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..export import load_into
from ..export.config import QUANT_METHOD, kv_cache_format
from ..export.kv_cache import cache_scales
from ..export.layout import MANIFEST
from ..export.read import check
from ..formats import get_format
from ..headers import CONFIG, read_json
from .fuse import fuse_for_serving
from .head import give_dense_rows, use_eight_bit_head

logger = logging.getLogger(__name__)


def load(
    folder: str | Path, *, head: str | None = None, kv_cache: str | None = None, model: nn.Module | None = None
) -> Any:
    """A model in eval mode whose 8-bit layers hold codes only, from a folder on disk.

    folder    one that `fp8kernels.export` wrote, in any of its formats, or that another tool wrote as
              compressed-tensors FP8 or "fp8" (static, dynamic, or blocks of 128x128): the bytes of the weights become
              the codes, nothing is decoded. Where fp8kernels.json is there, every file is checked in full before any is
              read. A plain checkpoint is loaded in bf16
    head      "hif8" or "e4m3": round the weights of the head, a scale a row, while loading, and with them those of an
              embedding that shares them (serving/head.py); None leaves both as they are stored
    kv_cache  the format of an 8-bit cache of keys and values; None goes by config.json
    model     the plain model to fill from a native folder, where transformers does not build it from config.json

    Layers that read one value (q, k and v; gate and up) become one product with the same bits (serving/fuse.py).

    Nothing is fetched, nothing is unpickled, and no code of the folder is run.

    raises   FileNotFoundError, ValueError naming the file, layer or tensor at fault; ImportError where transformers is
             absent
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the one that export wrote")
    settings = _settings(folder)
    if model is not None:
        loaded: Any = load_into(model, folder)
    elif (folder / MANIFEST).is_file() or settings:
        loaded = _load_eight_bit(folder, settings)
    else:
        loaded = _load_plain(folder)
    if head is not None:
        use_eight_bit_head(loaded, head)
    for fused in fuse_for_serving(loaded):
        logger.info("%s", fused)
    asked = kv_cache_format(settings) if settings.get("quant_method") == QUANT_METHOD else None
    fmt = kv_cache or asked
    if fmt is not None:
        from .kv_cache import use_eight_bit_cache

        calibrated = asked is not None and get_format(fmt).name == asked  # scales are those of one format
        use_eight_bit_cache(loaded, fmt, scales=cache_scales(settings["kv_cache"]) if calibrated else None)
    give_dense_rows(loaded)
    _give_back_memory()
    return loaded.eval().requires_grad_(False)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer saved beside the model.

    raises   ValueError if the folder holds none
    """
    _transformers()
    from transformers import AutoTokenizer

    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"{folder} holds no tokenizer.json; export with tokenizer=…")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _give_back_memory() -> None:
    """Let the system have what loading freed: glibc keeps holes between tensors that stay, a quarter of a 1B model.

    Elsewhere nothing happens.
    """
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _settings(folder: Path) -> dict[str, Any]:
    """`quantization_config` of config.json; empty where there is none."""
    if not (folder / CONFIG).is_file():
        return {}
    found = read_json(folder / CONFIG).get("quantization_config") or {}
    if not isinstance(found, dict):
        raise ValueError(f"{folder / CONFIG}: quantization_config is {str(found)[:100]!r}, it is a JSON object")
    return found


def _load_eight_bit(folder: Path, settings: dict[str, Any]) -> Any:
    manifest = check(folder) if (folder / MANIFEST).is_file() else None
    transformers = _transformers()
    from .eight_bit import load_eight_bit

    config = _config(folder)
    if manifest is not None:
        model_class: Any = getattr(transformers, manifest.model_class, None)
        if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
            raise ValueError(
                f"{folder}: the manifest names {manifest.model_class!r}, which is no model of transformers "
                f"{transformers.__version__}; build the model yourself and give it as load(folder, model=…)"
            )
    else:
        model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if model_class is None:
            raise ValueError(f"{folder}: model_type {config.model_type!r} is no causal language model in transformers")
    return load_eight_bit(folder, config, model_class, settings, manifest)


def _load_plain(folder: Path) -> nn.Module:
    _transformers()
    from transformers import AutoModelForCausalLM

    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder} holds neither {MANIFEST} nor safetensors files; export a model to it")
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json; build the model yourself and give it as load(folder, model=…)"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each config has its own checks and errors; ValueError where one brings code of its own
        raise ValueError(f"{folder}/config.json is not a config that transformers itself knows: {error}") from error


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise ImportError("serving needs transformers: pip install 'fp8kernels[demo]'") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers
