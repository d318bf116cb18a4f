"""One shift between tokens and labels on every way to a loss, and labels that were moved already are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llm import common
from torch import Tensor, nn
from torch.nn import functional

from fp8kernels.training.llm.data import load_data
from fp8kernels.training.llm.documents import Document
from fp8kernels.training.llm.labels import IGNORED, check_labels, check_shift, next_token_loss
from fp8kernels.training.llm.packing import pack

pytest.importorskip("accelerate")

SEQUENCE, BATCH = 16, 4
IDS = torch.tensor([[5, 6, 7, 8, 9, 3], [4, 4, 2, 1, 6, 0]])
SHIFTED = torch.tensor([[6, 7, 8, 9, 3, 1], [4, 2, 1, 6, 0, 9]])  # the last ones are from beyond the row


def masked(labels: Tensor, places: slice) -> Tensor:
    labels = labels.clone()
    labels[:, places] = IGNORED
    return labels


@pytest.mark.parametrize("places", [slice(0), slice(3), slice(2, 4), slice(5, 6), slice(None)])
def test_the_tokens_themselves_are_taken_masked_or_not(places: slice) -> None:
    check_labels(IDS, masked(IDS, places))
    check_labels(IDS[0].tolist(), masked(IDS, places)[0].tolist())


def test_a_row_of_one_token_over_and_over_is_its_own_shift() -> None:
    check_labels([7] * 9, [7] * 9)
    check_labels([7] * 9, [7] * 8 + [IGNORED])


@pytest.mark.parametrize("places", [slice(0), slice(3), slice(2, 4), slice(5, 6)])
def test_labels_that_were_moved_by_one_are_refused_with_the_reason(places: slice) -> None:
    with pytest.raises(ValueError, match=r"row 3: the labels are shifted by one already .* the token after the next\."):
        check_labels(IDS, masked(SHIFTED, places), "row 3")
    with pytest.raises(ValueError, match="shifted by one already"):
        check_labels(IDS[0].tolist(), masked(SHIFTED, places)[0].tolist())
    with pytest.raises(ValueError, match="shifted by one already"):
        check_labels(IDS, IDS.roll(-1, dims=1))


def test_the_published_mistake_is_refused() -> None:
    """Chunks of one token more than a block, the input without the last and the labels without the first."""
    chunks = torch.randint(300, (4, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"\(60 of 60 are the token that follows\)"):
        check_labels(chunks[:, :-1], chunks[:, 1:])


def test_other_tokens_and_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 of 12 labels are other tokens .* first at \[0, 2\]: input 7, label 8"):
        check_labels(IDS, IDS.index_put((torch.tensor(0), torch.tensor(2)), torch.tensor(8)))
    with pytest.raises(ValueError, match="labels are other tokens"):
        check_labels(IDS, IDS.roll(1, dims=1))  # the wrong way
    with pytest.raises(ValueError, match="labels are other tokens"):
        check_labels(IDS, torch.where(IDS == 0, -1, IDS))  # -1 is no mask
    with pytest.raises(ValueError, match=r"input_ids are \[2, 6\] and labels \[2, 5\]"):
        check_labels(IDS, IDS[:, 1:])


def test_a_document_with_shifted_labels_is_named(tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS.tolist()]
    rows.append({"input_ids": IDS[0].tolist(), "labels": SHIFTED[0].tolist()})
    path = tmp_path / "tokens.jsonl"
    path.write_text("".join(f"{row}\n".replace("'", '"') for row in rows))
    with pytest.raises(ValueError, match=r"tokens\.jsonl, line 3: the labels are shifted by one already"):
        load_data(path, common.tokenizer(), sequence=4)


def blocks() -> Any:
    return pack(common.texts(12), common.tokenizer(), SEQUENCE)


def by_hand(model: nn.Module, ids: Tensor, labels: Tensor, shift: int = 1) -> float:
    """Cross-entropy of the logits at i against the label at i + shift, written out."""
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.double()
    losses = [
        -functional.log_softmax(logits[row, place], dim=-1)[labels[row, place + shift]]
        for row in range(len(ids))
        for place in range(ids.shape[1] - shift)
        if labels[row, place + shift] != IGNORED
    ]
    return torch.stack(losses).mean().item()


def trainer(folder: Path, model: nn.Module, data: Any, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments, default_data_collator

    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": BATCH,
            "max_steps": 1,
            "logging_steps": 1,
            "learning_rate": 0.0,
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }
        | options,
    )
    return Trainer(model=model, args=arguments, train_dataset=data, data_collator=default_data_collator)


class Batches:
    """Keeps what the Trainer hands to the model."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[dict[str, Tensor]] = []
        model.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, module: nn.Module, positional: Any, named: dict[str, Any]) -> None:
        self.seen.append({key: value.clone() for key, value in named.items() if torch.is_tensor(value)})

    def all(self, key: str) -> Tensor:
        return torch.cat([batch[key] for batch in self.seen])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("masks", ["none", "some"])
def test_the_loss_of_the_trainer_is_that_of_the_next_token(tmp_path: Path, accumulate: int, masks: str) -> None:
    model = common.model()
    data = blocks()
    if masks == "some":
        rows = [Document("here", ids=list(row), labels=[IGNORED] * 5 + list(row)[5:]) for row in data.ids.tolist()]
        data = pack(rows, common.tokenizer(), SEQUENCE + 1)  # an end token more
    run = trainer(tmp_path, model, data, gradient_accumulation_steps=accumulate)
    seen = Batches(model)
    run.train()
    ids, labels = seen.all("input_ids"), seen.all("labels")
    assert len(ids) == BATCH * accumulate
    logged = run.state.log_history[0]["loss"]
    assert logged == pytest.approx(by_hand(model, ids, labels), rel=1e-4)  # it logs four decimals
    assert logged != pytest.approx(by_hand(model, ids, labels, shift=2), rel=1e-3)
    assert ((labels == ids) | (labels == IGNORED)).all()
    assert (labels == IGNORED).any() == (masks == "some")


def test_label_smoothing_of_the_trainer_shifts_once_too(tmp_path: Path) -> None:
    model = common.model()
    run = trainer(tmp_path, model, blocks(), label_smoothing_factor=0.2)
    batch = next(iter(run.get_train_dataloader()))
    with torch.no_grad():
        loss = run.compute_loss(model, dict(batch)).item()
        logs = functional.log_softmax(model(input_ids=batch["input_ids"]).logits[:, :-1].double(), dim=-1)
    nll = by_hand(model, batch["input_ids"], batch["labels"])
    assert loss == pytest.approx(0.8 * nll + 0.2 * -logs.mean().item(), rel=1e-5)


def test_a_loop_of_accelerate_and_the_collator_of_trl_see_the_same_loss() -> None:
    accelerate = pytest.importorskip("accelerate")
    trl = pytest.importorskip("trl.trainer.sft_trainer")
    from transformers import default_data_collator

    model, data = common.model(), blocks()
    collators = {
        "transformers": default_data_collator,
        "trl": trl.DataCollatorForLanguageModeling(pad_token_id=0),
    }
    for name, collate in collators.items():
        rows = [data[n] for n in range(BATCH)]
        if name == "trl":
            rows = [{key: value.tolist() for key, value in row.items()} for row in rows]
        loader = torch.utils.data.DataLoader(rows, batch_size=BATCH, collate_fn=collate)  # type: ignore[arg-type]
        prepared, loader = accelerate.Accelerator(cpu=True).prepare(model, loader)
        (batch,) = loader
        assert batch["labels"].equal(batch["input_ids"]), name
        loss = prepared(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
        assert loss == pytest.approx(by_hand(model, batch["input_ids"], batch["labels"]), rel=1e-5), name


def test_what_a_model_learns_is_the_next_token(tmp_path: Path) -> None:
    """On a stream that goes round ten tokens the next one is certain, and it is not the one after it."""
    model = common.model()
    round_and_round = Document("here", ids=[10 + n % 10 for n in range(SEQUENCE * 40)])
    data = pack([round_and_round], common.tokenizer(), SEQUENCE)
    trainer(tmp_path, model, data, max_steps=16, learning_rate=1e-2).train()
    ids = data[0]["input_ids"][None]
    with torch.no_grad():
        guesses = model.eval()(input_ids=ids).logits.argmax(dim=-1)
    assert guesses[:, :-1].equal(ids[:, 1:])


class Twice(nn.Module):
    """A model around a model that moves the labels before it hands them on, `by` places."""

    def __init__(self, inner: nn.Module, by: int) -> None:
        super().__init__()
        self.inner, self.by = inner, by

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool = False) -> Any:  # noqa: FBT001, FBT002
        return self.inner(input_ids=input_ids, labels=labels.roll(-self.by, dims=1), use_cache=use_cache)


def test_a_model_that_shifts_twice_or_not_at_all_is_refused() -> None:
    ids = torch.stack([blocks()[n]["input_ids"] for n in range(2)])
    model = common.model().train()
    check_shift(model, ids)
    assert model.training
    for by in (1, -1):
        with pytest.raises(ValueError, match=r"Twice does not shift labels once: its loss on \[2, 16\] tokens is"):
            check_shift(Twice(model, by), ids)
    check_shift(Twice(model, 0), ids)
    check_shift(model.bfloat16(), ids)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_the_loss_written_here_is_the_one_written_out() -> None:
    model, row = common.model(), blocks()[2]
    ids, labels = row["input_ids"][None], row["labels"][None].clone()
    labels[:, 3:9] = IGNORED
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert next_token_loss(logits, labels).item() == pytest.approx(by_hand(model, ids, labels), rel=1e-5)
