"""Exam items, their files, and scores: against a forward by hand, at any batch size, with nothing left changed."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from llm import common
from torch import nn

import fp8kernels
from fp8kernels.nn.step import layers
from fp8kernels.probe import Item, cloze_from_text, read_items, score, write_items

TOKENIZER = common.tokenizer()
ITEMS = [
    Item("Ada sells", (" maps", " clocks", " bells on", "  x"), 2),
    Item("Bruno sells maps on day ", ("4.", "5."), 1),
    Item("Clara sells maps on day 4. Esme sells ropes on day", (" 3.",), 0, "cloze"),
    Item("Dmitri", (" sells",), 0, "cloze"),
    Item("", ("Ada", "kites"), 0),
    Item("a", ("b", "cd"), 1),
    Item("Bruno sells\n", ("maps", "clocks"), 0),
    Item("Bruno sells \n ", ("maps",), 0, "cloze"),
]


def by_hand(model: nn.Module, prompt: str, choice: str) -> tuple[float, bool]:
    """(log-probability in fp32, greedy) of one choice, in a forward of its own."""
    context = TOKENIZER(prompt.rstrip())["input_ids"] or [TOKENIZER.bos_token_id]
    whole = TOKENIZER(prompt + choice)["input_ids"]
    ids = whole if prompt else [TOKENIZER.bos_token_id, *whole]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0].float()
    places = range(len(context), len(ids))
    log_probability = sum(float(logits[at - 1].log_softmax(-1)[ids[at]]) for at in places)
    return log_probability, all(int(logits[at - 1].argmax()) == ids[at] for at in places)


def rounding(model: nn.Module) -> float:
    """How far sums of log-probabilities may differ between two orders of summation in fp32.

    Dot products of up to 96 terms in 2 layers of 7 products, and one for the logits: 15 * 96 * 2**-24 relative, on
    activations and logits of at most 16; 8 tokens.
    """
    return 15 * 96 * 2**-24 * 16 * 8


def test_scores_are_those_of_a_forward_by_hand() -> None:
    model = common.model()
    got = score(model, TOKENIZER, ITEMS)
    for at, item in enumerate(ITEMS):
        each = [by_hand(model, item.prompt, choice) for choice in item.choices]
        assert got.log_probabilities[at] == pytest.approx(each[item.answer][0], abs=rounding(model))
        if item.kind == "choice":
            per_character = [value / len(choice) for (value, _), choice in zip(each, item.choices, strict=True)]
            wrong = max(value for place, value in enumerate(per_character) if place != item.answer)
            assert got.margins[at] == pytest.approx(per_character[item.answer] - wrong, abs=rounding(model))
            assert got.correct[at] == (max(per_character) == per_character[item.answer])
        else:
            assert got.correct[at] == each[0][1] == (got.margins[at] >= 0)
    assert got.accuracy == sum(got.correct) / len(ITEMS)


def test_scores_are_those_of_lm_evaluation_harness(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = common.model()
    items = [item for item in ITEMS if item.prompt]
    theirs = HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=4, device="cpu")
    asked = [(item.prompt, item.choices[item.answer]) for item in items]
    requests = [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(asked)]
    got = score(model, TOKENIZER, items)
    answers = theirs.loglikelihood(requests, disable_tqdm=True)
    for item, ours, right, (expected, greedy) in zip(items, got.log_probabilities, got.correct, answers, strict=True):
        assert ours == pytest.approx(expected, abs=rounding(model))
        assert item.kind == "choice" or right == greedy


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_the_size_of_a_batch_changes_nothing(batch: int) -> None:
    model = common.model()
    one, many = score(model, TOKENIZER, ITEMS), score(model, TOKENIZER, ITEMS, batch=batch)
    assert one.correct == many.correct
    assert one.margins == pytest.approx(many.margins, abs=rounding(model))
    assert one.log_probabilities == pytest.approx(many.log_probabilities, abs=rounding(model))
    assert many == score(model, TOKENIZER, ITEMS, batch=batch), "the same batches give the same bits"


def test_a_plain_module_is_asked_as_well() -> None:
    """Any int64 [B, T] -> [B, T, V] will do: here one that always expects the token after the last one."""

    class Next(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.scale * nn.functional.one_hot((ids + 1) % common.VOCAB, common.VOCAB).float()

    ids = [TOKENIZER(letter)["input_ids"][0] for letter in "abc"]
    assert ids == [ids[0], ids[0] + 1, ids[0] + 2]
    got = score(Next(), TOKENIZER, [Item("a", ("b", "c"), 0), Item("a", ("b", "c"), 1), Item("x", ("yz",), 0, "cloze")])
    assert got.correct == [True, False, True]
    # one logit of 1 among 299 of 0
    expected = 1 - math.log(math.e + common.VOCAB - 1)
    assert got.log_probabilities[0] == pytest.approx(expected, abs=1e-5)
    assert got.margins == pytest.approx([1, -1, 1], abs=1e-5)


def test_adapters_and_compiled_models_are_asked_like_the_model_inside() -> None:
    peft = pytest.importorskip("peft")
    model = common.model()
    plain = score(model, TOKENIZER, ITEMS, batch=1)
    short: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, out: short.append(out.shape[1]))
    few = ITEMS[3:4]  # each length is compiled
    assert score(torch.compile(model, backend="eager"), TOKENIZER, few) == score(model, TOKENIZER, few)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert score(adapted, TOKENIZER, ITEMS, batch=1) == plain, "adapters begin as nothing"
    longest = max(len(TOKENIZER(choice)["input_ids"]) for item in ITEMS for choice in item.choices)
    assert max(short) <= longest, "logits are made only where a choice may stand"


@pytest.fixture
def converted() -> Any:
    model = common.model()
    fp8kernels.convert(model, "hif8-qat", verbose=False)
    return model.train()


def step(model: Any) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(64).reshape(2, 32)
    loss = model(ids, labels=ids).loss
    model.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_the_model_is_left_as_it_was(converted: Any) -> None:
    step(converted)
    converted.model.layers[1].eval()  # a part that its owner has frozen
    twin = copy.deepcopy(converted)
    modes = [module.training for module in converted.modules()]
    state = {key: value.clone() for key, value in converted.state_dict().items()}
    random = torch.get_rng_state()
    score(converted, TOKENIZER, ITEMS)
    assert [module.training for module in converted.modules()] == modes
    assert layers(converted)
    assert all(torch.equal(value, state[key]) for key, value in converted.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert [step(converted) for _ in range(3)] == [step(twin) for _ in range(3)], "training goes on to the bit"


def test_it_is_the_8_bit_model_that_is_asked(converted: Any) -> None:
    step(converted)
    plain = fp8kernels.convert(common.model(), "hif8-qat", verbose=False)
    plain.load_state_dict({k: v for k, v in converted.state_dict().items() if "fp8_" not in k}, strict=False)
    from fp8kernels.nn.hold import hold_high

    in_8_bits = score(converted, TOKENIZER, ITEMS)
    assert in_8_bits == score(converted, TOKENIZER, ITEMS)
    hold_high(plain)
    assert in_8_bits.log_probabilities != score(plain, TOKENIZER, ITEMS).log_probabilities


def test_modes_come_back_after_an_error(converted: Any) -> None:
    def fails(*args: Any, **rest: Any) -> None:
        raise RuntimeError("in the middle")

    handle = converted.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        score(converted, TOKENIZER, ITEMS)
    handle.remove()
    assert all(module.training for module in converted.modules())


def test_autocast_computes_in_that_dtype() -> None:
    model = common.model()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    plain = score(model, TOKENIZER, ITEMS)
    rounded = score(model, TOKENIZER, ITEMS, autocast=torch.bfloat16)
    assert set(seen) == {torch.float32, torch.bfloat16}
    assert plain != rounded


def test_a_model_that_is_not_finite_knows_nothing() -> None:
    model = common.model()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    got = score(model, TOKENIZER, ITEMS)
    assert not any(got.correct)
    assert all(math.isnan(margin) for margin in got.margins)


def test_what_does_not_fit_is_named() -> None:
    model = common.model()
    long = Item("Ada sells maps. " * 40, (" x", " y"))
    with pytest.raises(ValueError, match=r"item 1 \('Ada sells maps.*at most 64"):
        score(model, TOKENIZER, [ITEMS[0], long])
    model.config.vocab_size = 10
    with pytest.raises(ValueError, match="the model knows 10: the tokenizer is not that of the model"):
        score(model, TOKENIZER, ITEMS)
    with pytest.raises(ValueError, match="0 items"):
        score(model, TOKENIZER, [])
    with pytest.raises(ValueError, match="batches of 0"):
        score(model, TOKENIZER, ITEMS, batch=0)


def test_a_context_that_is_just_full_is_asked() -> None:
    model = common.model()
    word = " maps"
    prompt = "Ada"
    while len(TOKENIZER(prompt + word)["input_ids"]) < common.CONTEXT:
        prompt += " a"
    length = len(TOKENIZER(prompt + word)["input_ids"])
    item = Item(prompt, (word, " ropes"), 0)
    assert length == common.CONTEXT
    assert len(score(model, TOKENIZER, [item]).correct) == 1


def test_special_tokens_of_the_tokenizer_stand_before_the_prompt_only() -> None:
    from tokenizers.processors import TemplateProcessing

    model, special = common.model(), common.tokenizer()
    end = special.eos_token
    special._tokenizer.post_processor = TemplateProcessing(single=f"{end} $A {end}", special_tokens=[(end, 0)])
    assert special("a")["input_ids"][0] == special("a")["input_ids"][-1] == special.eos_token_id
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    score(model, special, [Item("Ada", (" x",), 0, "cloze")])
    begun = [special.bos_token_id, *TOKENIZER("Ada x")["input_ids"]]
    assert seen[0].tolist() == [begun[:-1]]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"prompt": 3, "choices": ["a", "b"]}, "prompt is 3"),
        ({"prompt": "", "choices": "ab"}, "choices is 'ab'"),
        ({"prompt": "", "choices": ["a", ""]}, r"choices\[1\] is ''"),
        ({"prompt": "", "choices": ["a"]}, "two texts or more"),
        ({"prompt": "", "choices": ["a", "a"]}, "none of them twice"),
        ({"prompt": "", "choices": ["a", "b"], "answer": 2}, "answer is 2; it must be between 0 and 1"),
        ({"prompt": "", "choices": ["a", "b"], "answer": True}, "answer is True"),
        ({"prompt": "", "choices": ["a", "b"], "kind": "cloze"}, "choices holds 2 texts"),
        ({"prompt": "", "choices": ["a", "b"], "kind": "quiz"}, "kind is 'quiz'"),
    ],
)
def test_items_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Item(**fields)


def test_items_are_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "items.jsonl"
    items = [*ITEMS, Item("line\u2028break \x85 ü\n", ("→", "←"), 1)]
    write_items(path, items)
    assert read_items(path) == items
    path.write_text('\ufeff{"prompt": "a", "choices": [" b"], "kind": "cloze"}\n\n', encoding="utf-8")
    assert read_items(path) == [Item("a", (" b",), 0, "cloze")]


def test_every_bad_line_is_named_with_its_field(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    lines = [
        json.dumps({"prompt": "a", "choices": ["b", "c"], "answer": 0}),
        "{",
        "[1]",
        json.dumps({"prompt": "a", "choices": ["b", "c"]}),
        json.dumps({"prompt": "a", "choices": ["b", "c"], "answer": 7}),
        json.dumps({"prompt": "a", "choices": ["b", "c"], "answer": 0, "answr": 1}),
        json.dumps({"choices": ["b", "c"], "answer": 0}),
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_items(path)
    told = str(caught.value).splitlines()
    assert told[0] == f"{path}: 6 bad of 7 items"
    assert [line.split(":")[0].strip() for line in told[1:]] == [f"line {n}" for n in range(2, 8)]
    for line, what in zip(told[1:], ("no JSON", "list", "'answer'", "answer is 7", "'answr'", "'prompt'"), strict=True):
        assert what in line
    path.write_text("{\n" * 30, encoding="utf-8")
    with pytest.raises(ValueError, match="and 20 more"):
        read_items(path)


def test_files_that_hold_no_items(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_items(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no items"):
        read_items(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\x93\x00\xff")
    with pytest.raises(ValueError, match=r"no text in UTF-8 \(byte 0\)"):
        read_items(tmp_path / "binary.jsonl")


def test_cloze_items_come_from_any_text() -> None:
    prose = "The old man went down to the sea. He saw it. Then the two of them walked back to the town!\n"
    code = "def total(values):\n    for value in values: result = combine(result, value, other)\n    return result\n"
    items = cloze_from_text([prose, code, prose])
    assert {(item.prompt[-12:], item.choices[0]) for item in items} == {
        (" down to the", " sea"),
        (" back to the", " town"),
        ("sult, value,", " other"),
    }
    assert all(item.kind == "cloze" and item.answer == 0 for item in items)
    assert items == cloze_from_text([code, prose]), "they depend on the sentences alone"
    assert cloze_from_text([prose, code], count=2) == items[:2]
    for item in items:
        assert item.prompt + item.choices[0] in prose + "\0" + code


def test_a_cut_context_begins_at_a_word() -> None:
    text = "alphabet " * 50 + "and then the very last word"
    (item,) = cloze_from_text([text], context=40)
    assert item.choices == (" word",)
    assert len(item.prompt) <= 40
    assert item.prompt.startswith("alphabet ")
    assert text.endswith(item.prompt + " word")


def test_text_without_sentences_gives_no_items() -> None:
    with pytest.raises(ValueError, match="none of 2 documents"):
        cloze_from_text(["1 2 3 4 5 6 7 8", "too short."])
    with pytest.raises(ValueError, match="count=0"):
        cloze_from_text(["x"], count=0)
