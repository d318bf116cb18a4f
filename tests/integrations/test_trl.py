"""TRL's SFTTrainer from its own entry point: text in, 8-bit training out, with packing, recomputation and LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.common import ACCUMULATED, RATE, STEPS, common, logged, texts, tokenizer
from safetensors.torch import load_file
from setups.models import TOKENS
from setups.runs import RECOMPUTED, Ledger, converted, same, same_models, state
from torch import nn

from fp8kernels.nn.step import layers

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")


def sft(net: nn.Module, folder: Path, *, callbacks: Any = None, peft_config: Any = None, **changes: Any) -> Any:
    """TRL's trainer as its users make it: a model, texts, a tokenizer; bf16 and recomputation are its defaults."""
    return trl.SFTTrainer(
        model=net,
        args=trl.SFTConfig(**(common(folder) | {"max_length": TOKENS, "dataset_num_proc": None} | changes)),
        train_dataset=texts(32),
        processing_class=tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


def by_hand(trainer: Any) -> list[float]:
    """A loop over the trainer's batches with the trainer's loss, and torch's optimizer."""
    net, losses = trainer.model, []
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    queue = iter(trainer.get_train_dataloader())
    net.train()
    for _ in range(STEPS):
        parts = [next(queue) for _ in range(ACCUMULATED)]
        labels = [part["shift_labels"] if "shift_labels" in part else part["labels"][..., 1:] for part in parts]
        count = sum(given.ne(-100).sum() for given in labels)
        total = torch.zeros(())
        for part in parts:
            with torch.autocast("cpu", torch.bfloat16):
                loss = trainer.compute_loss(net, part, num_items_in_batch=count)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
    return losses


@pytest.mark.parametrize("packing", [False, True])
def test_bits_of_a_bare_loop(tmp_path: Path, *, packing: bool) -> None:
    how = {"packing": packing, "packing_strategy": "wrapped", "gradient_checkpointing": False}
    plain, trainer = (sft(converted("llama"), tmp_path, **how) for _ in range(2))
    losses = by_hand(plain)
    trainer.train()
    assert logged(trainer) == losses
    same_models(plain.model, trainer.model)
    assert {int(layer.fp8_step) for layer in layers(trainer.model)} == {STEPS}


def test_default_arguments_keep_the_step_law(tmp_path: Path) -> None:
    """bf16 and recomputation, as TRL sets them; a ledger that looks on says what histories and scales must be."""
    import transformers

    net = converted("qwen3", fuse=False)
    ledger = Ledger(net)

    class Look(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ledger.commit()

    trainer = sft(net, tmp_path, callbacks=[Look()])
    assert trainer.args.bf16 and trainer.args.gradient_checkpointing
    trainer.train()
    assert set(ledger.steps.values()) == {STEPS}


def test_recomputation_changes_no_bit(tmp_path: Path) -> None:
    plain, again = (
        sft(converted("llama"), tmp_path, gradient_checkpointing=recomputed) for recomputed in (False, True)
    )
    plain.train()
    again.train()
    assert logged(plain) == logged(again)
    same_models(plain.model, again.model, but=RECOMPUTED)


def test_lora_by_the_trainer(tmp_path: Path) -> None:
    """The trainer puts adapters into a converted model, trains them, saves them and resumes."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    how = {"save_strategy": "steps", "save_steps": STEPS // 2}
    trainer = sft(converted("llama"), tmp_path, peft_config=config, **how)
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert frozen and all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if n in frozen)
    assert {int(layer.fp8_step) for layer in layers(trainer.model)} == {STEPS}
    assert all("lora_" in n for n, p in trainer.model.named_parameters() if p.requires_grad)
    saved = load_file(tmp_path / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    assert saved and not any("fp8_" in key for key in saved)


def test_lora_resumes_with_the_scales_beside_the_adapter(tmp_path: Path) -> None:
    """An adapter's file has no scales of the model it was trained on; with them a resumed run has the same bits."""
    import transformers

    class Keep(transformers.TrainerCallback):
        def on_save(self, args: Any, status: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
            torch.save(state(model), tmp_path / f"checkpoint-{status.global_step}" / "scales.pt")

    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    how = {"save_strategy": "steps", "save_steps": STEPS // 2, "peft_config": config, "callbacks": [Keep()]}
    whole, again = (sft(converted("llama"), tmp_path, **how) for _ in range(2))
    whole.train()
    middle = tmp_path / f"checkpoint-{STEPS // 2}"
    again.model.load_state_dict(torch.load(middle / "scales.pt", weights_only=True), strict=False)
    again.train(resume_from_checkpoint=str(middle))
    assert logged(again) == logged(whole)
    same_models(whole.model, again.model, but=RECOMPUTED)


def test_resuming_gives_the_same_bits(tmp_path: Path) -> None:
    how = {"save_strategy": "steps", "save_steps": STEPS // 2}
    whole, again = sft(converted("llama"), tmp_path, **how), sft(converted("llama", seed=1), tmp_path, **how)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert logged(again) == logged(whole)
    same(state(whole.model), state(again.model), but=RECOMPUTED)
    same_models(whole.model, again.model, but=RECOMPUTED)
