"""What a user of another library brings along: data, arguments, a tokenizer; and the plain loop to compare with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from setups.models import WORDS, batch
from torch import Tensor, nn

STEPS = 4  # optimizer steps
ACCUMULATED = 2  # micro-batches each
RATE = 1e-2
IGNORED = -100  # torch's label of a token without a loss


def rows(family: str, batches: int) -> Any:
    """A dataset whose consecutive pairs of rows are the batches of seeds 0, 1, 2, …"""
    import datasets

    parts = [batch(family, seed) for seed in range(batches)]
    columns = {key: torch.cat([part[key] for part in parts]).tolist() for key in parts[0]}
    return datasets.Dataset.from_dict(columns).with_format("torch")


def arguments(folder: Path, **changes: Any) -> Any:
    """TrainingArguments of a run of STEPS optimizer steps over micro-batches of two rows, in the dataset's order."""
    import transformers

    return transformers.TrainingArguments(**(common(folder) | changes))


def common(folder: Path) -> dict[str, Any]:
    """What the tests fix in the arguments of any of HF's trainers."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATED,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def bare(net: nn.Module, batches: Iterable[dict[str, Tensor]], *, shifted: bool, autocast: bool = False) -> list[float]:
    """The loop that HF's Trainer stands for, in torch alone; returns the loss of each optimizer step.

    shifted  whether the model's loss is that of the next token, so that the first of a row has none
    """
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    precision: Any = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    net.train()
    queue, losses = list(batches), []
    assert len(queue) == STEPS * ACCUMULATED
    for start in range(0, len(queue), ACCUMULATED):
        step = queue[start : start + ACCUMULATED]
        count = sum((part["labels"][..., 1:] if shifted else part["labels"]).ne(IGNORED).sum() for part in step)
        total = torch.zeros(())
        for part in step:
            with precision:
                loss = net(**part, num_items_in_batch=count).loss
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
    return losses


def logged(trainer: Any, what: str = "loss") -> list[float]:
    """What a trainer wrote into its log, step by step."""
    return [entry[what] for entry in trainer.state.log_history if what in entry]


def tokenizer() -> Any:
    """Words "w0" … and what a tokenizer needs besides, as many as the models know."""
    import tokenizers
    import transformers

    special = ["<pad>", "<eos>", "<unk>"]
    words = [f"w{n}" for n in range(WORDS - len(special))]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: n for n, word in enumerate(special + words)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def texts(count: int) -> Any:
    """A dataset of a column "text": sentences of three to nine words."""
    import datasets

    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 10, (count,), generator=draw).tolist()
    ids = [torch.randint(WORDS - 3, (n,), generator=draw).tolist() for n in lengths]
    return datasets.Dataset.from_dict({"text": [" ".join(f"w{n}" for n in row) for row in ids]})
