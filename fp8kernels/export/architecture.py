"""The modules that config.json stands for, without weights and without code of the folder."""

from __future__ import annotations

from typing import Any

MOST_PARTS = 1024  # layers or experts of a model that has fewer tensors than that


def module_classes(config: dict[str, Any], tensors: int) -> dict[str, str] | str:
    """The class of each module by its name, or why they are not known, in words.

    config   of config.json
    tensors  how many the files hold: a config that promises more layers than that is not believed
    """
    if "auto_map" in config:
        return "config.json names code of its own (auto_map), which is never run"
    parts = _largest_count(config, 0)
    if parts > max(tensors, MOST_PARTS):
        return f"config.json speaks of {parts:,} layers or experts, the files hold {tensors:,} tensors"
    try:
        import torch
        import transformers
    except ImportError:
        return "transformers is not installed"
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if name is None:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
    build = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(build, type) and issubclass(build, transformers.PreTrainedModel)):
        said = str(name)[:100]
        return f"config.json names no model of transformers {transformers.__version__} (architectures: {said!r})"
    try:
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        settings: Any = build.config_class
        with torch.device("meta"):
            model = build._from_config(settings.from_dict(plain))
    except Exception as error:  # anything that a constructor makes of a config that somebody wrote
        return f"config.json does not build a {name} ({type(error).__name__}: {str(error)[:200]})"
    return {name: type(module).__name__ for name, module in model.named_modules()}


def _largest_count(config: Any, depth: int) -> int:
    """The largest number that a config gives as a count of layers, experts or blocks."""
    found = 0
    if isinstance(config, dict) and depth < 8:
        for key, value in config.items():
            counts = any(word in key for word in ("layer", "expert", "block", "depth", "stage"))
            if counts and isinstance(value, int | float) and "size" not in key:
                found = max(found, int(min(value, 2**62)))
            found = max(found, _largest_count(value, depth + 1))
    return found
