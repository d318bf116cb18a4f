"""The settings of a run as transformers.TrainingArguments."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from .baseline import near
from .config import Config

INSTEAD = {  # fields of TrainingArguments that the configuration has a word of its own for
    "output_dir": "--out",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "per_device_train_batch_size": "batch",
    "gradient_accumulation_steps": "accumulate",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "scheduler",
    "warmup_steps": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "weight_decay": "weight_decay",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "max_grad_norm": "clip",
    "seed": "seed",
    "data_seed": "seed",
    "fsdp": "fsdp",
    "save_strategy": "save_every",
    "save_steps": "save_every",
    "save_total_limit": "keep",
    "eval_strategy": "validate_every",
    "eval_steps": "validate_every",
    "logging_steps": "log_every",
    "logging_strategy": "log_every",
}
OURS = {  # what other parts of a run rely on, with the reason
    "train_sampling_strategy": "the order of the data follows from the seed, so that runs can be compared",
    "logging_nan_inf_filter": "a loss that is not finite must be seen",
    "save_only_model": "a checkpoint must hold what resuming needs",
    "ignore_data_skip": "a resumed run must see the data that comes next",
    "load_best_model_at_end": "model/ is the last step's; the best checkpoint is kept beside it",
    "remove_unused_columns": "the data have the columns that the model takes",
    "auto_find_batch_size": "runs with other batch sizes cannot be compared",
    "model_init": "the model comes from the section model",
}


def training_arguments(config: Config, folder: Path, *, validates: bool) -> Any:
    """transformers.TrainingArguments of a run; with torchrun this also joins the processes.

    folder     where the trainer writes its checkpoints
    validates  whether there is validation data
    raises     ValueError naming a key of `trainer` that is no field of TrainingArguments, or that the configuration
               or this library decides
    """
    from transformers import TrainingArguments

    known = [field.name for field in dataclasses.fields(TrainingArguments)]
    for key in config.trainer:
        if key in INSTEAD:
            raise ValueError(f"trainer.{key}: set {INSTEAD[key]} instead")
        if key in OURS:
            raise ValueError(f"trainer.{key} is not to be set: {OURS[key]}")
        if key not in known:
            raise ValueError(f"trainer.{key} is no field of transformers.TrainingArguments{near(key, known)}")
    if config.fsdp and config.trainer.get("label_smoothing_factor"):
        raise ValueError("trainer.label_smoothing_factor does not go with fsdp: its labels would not be shifted")
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch,
        "per_device_eval_batch_size": config.batch,
        "gradient_accumulation_steps": config.accumulate,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.scheduler,
        "warmup_steps": config.warm_up(),
        "weight_decay": config.weight_decay,
        "adam_beta1": config.betas[0],
        "adam_beta2": config.betas[1],
        "max_grad_norm": config.clip,
        "seed": config.seed,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "train_sampling_strategy": "sequential",  # order.py made the order
        "dataloader_drop_last": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if config.save_every else "no",
        "eval_strategy": "steps" if validates and config.validate_every else "no",
        "disable_tqdm": True,
        "report_to": [],
    }
    if config.save_every:
        values["save_steps"] = config.save_every
    if config.validate_every:
        values["eval_steps"] = config.validate_every
    if config.fsdp:
        values |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
    try:
        arguments = TrainingArguments(**(values | config.trainer))
    except (TypeError, ValueError) as error:
        raise ValueError(f"transformers refuses the settings: {error}") from None
    if arguments.n_gpu > 1:  # torch's DataParallel copies the model each step, and what the copies see is lost
        raise ValueError(
            f"one process sees {arguments.n_gpu} GPUs; start {arguments.n_gpu} of them (torchrun --nproc-per-node=…, "
            "accelerate launch), or let this one see a single GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    return arguments


def shards(arguments: Any) -> bool:
    """Whether accelerate shards a model over these processes; on CPUs it keeps whole copies and says nothing."""
    kind = arguments.distributed_state.distributed_type.name
    return kind not in ("NO", "MULTI_CPU")
