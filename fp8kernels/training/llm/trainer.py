"""transformers.Trainer, but numbers that are not finite end it before they reach a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, default_data_collator

from .checkpoints import CheckpointError
from .nonfinite import NonFiniteError, gradients_are_finite, trace
from .ranks import any_rank


class LanguageTrainer(Trainer):
    """A Trainer that keeps the step's micro-batches, to count their tokens and to trace a failure.

    raises   NonFiniteError from train(), before the optimizer steps; CheckpointError if a checkpoint cannot be written
    """

    def __init__(self, *, model: nn.Module, arguments: Any, train: Any, validation: Any, tokenizer: Any) -> None:
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            data_collator=default_data_collator,
        )
        self.remove_callback(PrinterCallback)
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = sharded_precision()
        self.micro_batches: list[dict[str, Any]] = []
        self.losses: list[Tensor] = []
        self.add_callback(Finite(self))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's, and remembers what it was of."""
        self.micro_batches.append(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss)
        return loss

    def tokens(self) -> int:
        """The tokens of this process's step, padding left out."""
        return sum(
            int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
            for batch in self.micro_batches
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except Exception as error:
            step = self.state.global_step
            raise CheckpointError(f"checkpoint {step} could not be written: {error}") from error


def sharded_precision() -> Any:
    """FSDP2's precision: bf16 products, and gradients and losses in fp32. accelerate's own rounds a loss to bf16, whose
    steps of 0.4% are wider than what a comparison with a baseline is to show."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


class Finite(TrainerCallback):
    """Looks at losses and gradients before the optimizer steps."""

    def __init__(self, trainer: LanguageTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """A step's micro-batches are its own."""
        self.trainer.micro_batches, self.trainer.losses = [], []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """The weights are still good here."""
        model = self.trainer.model
        assert isinstance(model, nn.Module)
        losses = bool(torch.stack(self.trainer.losses).isfinite().all())
        if any_rank(not losses or not gradients_are_finite(model), args.device):
            what = "a gradient" if losses else "the loss"
            batches = [self.trainer._prepare_inputs(batch) for batch in self.trainer.micro_batches]
            with self.trainer.accelerator.autocast():
                where = trace(model, batches)
            raise NonFiniteError(state.global_step + 1, what, where)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any) -> None:
        """A norm that is too large for fp32, of gradients that are not."""
        norm = (logs or {}).get("grad_norm")
        if norm is not None and not torch.isfinite(torch.tensor(norm)):
            raise NonFiniteError(state.global_step, "the norm of the gradient", "each gradient by itself is")
