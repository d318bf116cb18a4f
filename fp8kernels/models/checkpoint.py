"""config.json of a folder with a model that can be trained, read before anything large is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..headers import CONFIG, read_json, some


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with a model_type; the config of weights that can be trained.

    raises   FileNotFoundError if there is none; ValueError if it is no JSON object, names no model_type, or says that
             the weights are quantized already
    """
    path = folder / CONFIG
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json); load its base model, put the adapter on with "
            "peft.PeftModel.from_pretrained, and save merge_and_unload() to a new folder"
        )
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} holds no {CONFIG}; give the folder that save_pretrained or hf download wrote{_or_below(folder)}"
        )
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path} names no model_type; it is not the config of a transformers model")
    if (folder / "fp8kernels.json").exists():
        raise ValueError(
            f"{folder} holds 8-bit codes for serving (fp8kernels.json): fp8kernels.serving.load reads those; "
            "to train or compare, give the folder that it was exported from"
        )
    if config.get("quantization_config"):
        settings = config["quantization_config"]
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise ValueError(f"{path}: the weights are quantized already ({method}); give the model in BF16, FP16 or FP32")
    return config


def _or_below(folder: Path) -> str:
    """Where it is one folder further down: checkpoints of a run, a hub cache."""
    below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    return f" (there is one in {some(below)})" if below else ""
