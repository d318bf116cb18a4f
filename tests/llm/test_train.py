"""A run from its configuration to its folder: what is in it, what stops it, and what is refused before it begins."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.plain import one_thread
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import fp8kernels
from fp8kernels.integrations.trained import load_trained
from fp8kernels.nn.step import layers
from fp8kernels.runs import Run
from fp8kernels.training.llm import train

from .settings import config, probe_file, untimed


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def test_a_run_beside_its_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = train(config(tmp_path, recipe=None, recipe_changes={}), tmp_path / "bf16")
    run = train(config(tmp_path, baseline=str(tmp_path / "bf16")), tmp_path / "hif8")
    assert plain.info["status"] == run.info["status"] == "done" and run.info["reason"] is None
    rows, base = run.rows("log"), plain.rows("log")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"     6/6  loss {rows[-1]['loss']:.4f}") and f"APE {rows[-1]['ape']:.2f} %" in last
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, other in zip(rows, base, strict=True):
        assert row["ape"] == pytest.approx(100 * abs(row["loss"] - other["loss"]) / other["loss"])
        assert row["tokens"] == 2 * 2 * 16 and row["tokens_per_second"] == row["tokens"] / row["seconds"]
        assert "fp8/total/saturated" in row and "ape" not in other and "fp8/total/saturated" not in other
    assert rows[0]["loss"] == base[0]["loss"] and rows[1]["loss"] != base[1]["loss"]  # one step of warm-up
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    info = run.info
    assert info["parameters"]["eight_bit_layers"] == len(info["layers"]) == 14
    assert info["data"]["train"]["blocks"] > 0 and "hif8-qat" in info["recipe"]
    assert {"torch", "transformers", "fp8kernels"} <= info["versions"].keys()
    measured = run.rows("layers")
    assert {row["step"] for row in measured} == {2, 4, 6} and {row["layer"] for row in measured} == set(info["layers"])
    assert len(list((run.path / "tensorboard").glob("events*"))) == 1


def test_tensorboard_has_the_numbers_of_8_bits_and_the_ape(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(tmp_path, steps=3, recipe=None, recipe_changes={}), tmp_path / "bf16")
    run = train(config(tmp_path, steps=3, baseline=str(tmp_path / "bf16"), log_every=2), tmp_path / "run")
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    for tag in ("train/loss", "train/ape", "train/tokens_per_second", "train/fp8/total/saturated", "eval/loss"):
        assert tag in tags, tags
    assert [event.step for event in events.Scalars("train/loss")] == [2]
    assert events.Scalars("train/loss")[0].value == pytest.approx(run.rows("log")[1]["loss"])


def test_the_schedule_is_cosine_to_zero_after_a_rise(tmp_path: Path) -> None:
    run = train(config(tmp_path, warmup_steps=2, recipe=None, recipe_changes={}, save_every=0), tmp_path / "run")
    rates = [row["learning_rate"] for row in run.rows("log")]
    expected = [0.0, 0.5, *(0.5 * (1 + math.cos(math.pi * n / 4)) for n in range(4))]
    assert rates == pytest.approx([1e-3 * value for value in expected])
    assert not (run.path / "checkpoints").exists()


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["weights", "lora"])
def test_what_was_trained_loads_plain_and_in_8_bits(
    tmp_path: Path, lora: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(config(tmp_path, steps=3, lora=lora), tmp_path / "run")
    folder = run.path / "model"
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert "fp8" not in caplog.text and type(plain).__name__ == "LlamaForCausalLM"
    assert plain.config.use_cache  # generation is not to pay for training
    assert not layers(plain) and AutoTokenizer.from_pretrained(folder).vocab_size == 300
    model, tokenizer = load_trained(run.path)
    assert [layer.fp8_name for layer in layers(model)] == run.info["layers"] and not model.training
    assert all(int(layer.fp8_step) == 3 and bool((layer.fp8_scale[:2] > 0).all()) for layer in layers(model))
    ids = torch.tensor([tokenizer("Ada sells maps")["input_ids"]])
    with torch.no_grad():
        eight_bit, high = model(ids).logits, plain(ids).logits
    error = (eight_bit - high).norm() / high.norm()
    assert 0 < error < 0.1
    same, _ = load_trained(folder, eight_bit=False)
    with torch.no_grad():
        assert torch.equal(same(ids).logits, high)
    by_hand = fp8kernels.convert(AutoModelForCausalLM.from_pretrained(folder), recipe_of_run(run), verbose=False)
    from safetensors.torch import load_file

    missing = by_hand.load_state_dict(load_file(folder / "fp8_state.safetensors"), strict=False)
    assert not missing.unexpected_keys
    with torch.no_grad():
        assert torch.equal(by_hand.eval()(ids).logits, eight_bit)
    assert (folder / "adapter" / "adapter_config.json").is_file() == (lora is not None)
    if lora is None:
        start = AutoModelForCausalLM.from_pretrained(tmp_path / "source").state_dict()
        assert not torch.equal(start["lm_head.weight"], plain.state_dict()["lm_head.weight"])


def recipe_of_run(run: Run) -> Any:
    from fp8kernels.runs.precision import recipe_of

    return recipe_of(run.info["config"]["recipe"], run.info["config"]["recipe_changes"])


def test_a_loss_that_is_not_finite_stops_before_a_weight_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp8kernels.training.llm.trainer import LanguageTrainer

    real = LanguageTrainer.training_step

    def poison(self: Any, model: Any, inputs: Any, items: Any = None) -> Any:
        if self.state.global_step + 1 == 4:
            norm = model.model.layers[1].input_layernorm
            norm.variance_epsilon = float("nan")
        return real(self, model, inputs, items)

    monkeypatch.setattr(LanguageTrainer, "training_step", poison)
    run = train(config(tmp_path), tmp_path / "run")
    assert run.info["status"] == "stopped"
    reason = run.info["reason"]
    assert "step 4: the loss is not finite" in reason and "model.layers.1.input_layernorm" in reason
    assert "The last finite checkpoint is" in reason and "checkpoint-2; go on from it with --resume" in reason
    assert [row["step"] for row in run.rows("log")] == [1, 2, 3]
    assert [row["kind"] for row in run.rows("events")] == ["saved", "nan"]
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert not (run.path / "model").exists()


def test_weights_that_overflow_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8kernels.training.llm.record import Recorder

    real = Recorder.on_log

    def overflow(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        real(self, args, state, control, logs, **rest)
        if state.global_step == 4:
            with torch.no_grad():
                rest["model"].model.norm.weight[3] = float("inf")

    monkeypatch.setattr(Recorder, "on_log", overflow)
    run = train(config(tmp_path, validate_every=0), tmp_path / "run")
    assert "step 4: a weight is not finite; the first one is model.norm.weight" in run.info["reason"]
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_saturation_stops_the_run(tmp_path: Path) -> None:
    options = {"stale": 1e-6}  # every tensor is over this
    run = train(config(tmp_path, saturation={"every": 3, "policy": "stop", "options": options}), tmp_path / "run")
    assert run.info["status"] == "stopped" and run.info["reason"].startswith("saturation: ")
    assert "checkpoint-2; go on from it" in run.info["reason"]
    assert [row["step"] for row in run.rows("log")] == [1, 2, 3]
    assert "saturation" in {row["kind"] for row in run.rows("events")}
    assert not (run.path / "model").exists()


def test_saturation_falls_back_and_says_so(tmp_path: Path) -> None:
    settings = {"every": 2, "policy": "fallback", "options": {"stale": 1e-6}}
    with pytest.warns(fp8kernels.FallbackWarning):
        run = train(config(tmp_path, steps=4, save_every=0, saturation=settings), tmp_path / "run")
    assert run.info["status"] == "done"
    events = [row for row in run.rows("events") if row["kind"] == "fallback"]
    assert events and "14 layers compute in high precision from now on" in events[0]["text"]
    assert run.rows("log")[-1]["fp8/total/high_precision"] == 14


def test_the_published_recipe_trains_the_mlps_of_the_middle_blocks(tmp_path: Path) -> None:
    size = {"vocab": 300, "hidden": 32, "intermediate": 48, "layers": 7, "heads": 2, "context": 64}
    settings = config(tmp_path, steps=2, save_every=0, model={"size": size}, recipe="hif8-qat-mlp")
    with pytest.raises(ValueError, match="within the 500 warm-up steps"):
        train(settings | {"recipe_changes": {}}, tmp_path / "run")
    run = train(settings | {"recipe_changes": {"warmup_steps": 1}}, tmp_path / "run")
    linears = ("gate_proj", "up_proj", "down_proj")
    assert run.info["layers"] == [f"model.layers.{block}.mlp.{name}" for block in (3, 4) for name in linears]


def test_forgetting_stops_the_run_and_names_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp8kernels.integrations import probe
    from fp8kernels.probe.score import Scores

    asked: list[int] = []

    def score(model: Any, tokenizer: Any, items: Any, **rest: Any) -> Scores:
        asked.append(len(asked))
        right = len(asked) <= 2  # at the start and at step 2, then nothing any more
        return Scores([right] * 60, [float(right)] * 60, [-1.0] * 60)

    monkeypatch.setattr(probe, "score", score)
    settings = config(tmp_path, probe={"items": str(probe_file(tmp_path)), "every": 2, "policy": "stop"})
    run = train(settings | {"save_every": 1}, tmp_path / "run")
    assert run.info["status"] == "stopped" and run.info["reason"].startswith("forgetting: ")
    assert "checkpoint-2; go on from it with --resume (remove the 1 later ones first)" in run.info["reason"]
    assert [row["step"] for row in run.rows("probe")] == [0, 2, 4]
    assert [row["step"] for row in run.rows("log")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"recipe": "hif8-qatt"}, ValueError, "did you mean 'hif8-qat'"),
        ({"recipe_changes": {"warmup_steps": 500}}, ValueError, "nothing would be trained in 8 bits"),
        ({"trainer": {"max_steps": 3}}, ValueError, "trainer.max_steps: set steps instead"),
        ({"trainer": {"gradient_checkpointin": True}}, ValueError, "did you mean 'gradient_checkpointing'"),
        ({"trainer": {"logging_nan_inf_filter": True}}, ValueError, "a loss that is not finite must be seen"),
        ({"model": {"path": "/nowhere"}}, FileNotFoundError, "/nowhere"),
        ({"tokenizer": "/nowhere"}, FileNotFoundError, "/nowhere"),
        ({"baseline": "/nowhere"}, FileNotFoundError, "holds no run"),
        ({"probe": {"items": "/nowhere"}}, FileNotFoundError, "/nowhere"),
        ({"lora": {"target_modules": "nothing"}}, ValueError, "lora: "),
        ({"saturation": {"options": {"stall": 3}}}, ValueError, "saturation.options: .*stall"),
        ({"saturation": {"options": {"steps": 0}}}, ValueError, "steps=0"),
        ({"recipe": None, "recipe_changes": {}, "probe": {"policy": "fallback"}}, ValueError, "recipe is null"),
    ],
)
def test_what_cannot_begin_leaves_no_folder(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    if changes.get("probe", {}).get("policy"):
        changes = changes | {"probe": changes["probe"] | {"items": str(probe_file(tmp_path))}}
    with pytest.raises(error, match=message):
        train(config(tmp_path, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sequences_must_fit_the_model_and_baselines_the_run(tmp_path: Path) -> None:
    settings = config(tmp_path, steps=2, save_every=0)
    long = settings | {"data": settings["data"] | {"sequence": 128}}
    with pytest.raises(ValueError, match=r"data.sequence=128 is longer than the model's context of 64"):
        train(long, tmp_path / "long")
    plain = settings | {"recipe": None, "recipe_changes": {}}
    train(plain, tmp_path / "bf16")
    against = {"baseline": str(tmp_path / "bf16")}
    with pytest.raises(ValueError, match=r"differ in more than the precision[\s\S]*seed: 0 and 1"):
        train(settings | against | {"seed": 1}, tmp_path / "other")
    train(settings, tmp_path / "hif8")
    with pytest.raises(ValueError, match="a baseline is a BF16 run"):
        train(settings | {"baseline": str(tmp_path / "hif8")}, tmp_path / "other")


def test_options_of_the_trainer_pass_through_and_change_no_number(tmp_path: Path) -> None:
    """Recomputing forwards must not change a loss or a scale; the other optimizer must."""
    settings = config(tmp_path, steps=3, save_every=0, data=config(tmp_path)["data"] | {"packing": False})
    plain = train(settings, tmp_path / "plain")
    again = train(settings | {"trainer": {"gradient_checkpointing": True}}, tmp_path / "again")
    assert [row["loss"] for row in plain.rows("log")] == [row["loss"] for row in again.rows("log")]
    other = train(settings | {"trainer": {"optim": "sgd"}}, tmp_path / "sgd")
    assert other.rows("log")[2]["loss"] != plain.rows("log")[2]["loss"]


def test_bf16_weights_on_request(tmp_path: Path) -> None:
    path = config(tmp_path)["model"]["path"]
    run = train(config(tmp_path, steps=2, save_every=0, model={"path": path, "dtype": "bfloat16"}), tmp_path / "run")
    model, _ = load_trained(run.path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and run.info["status"] == "done"


def test_a_new_model_by_its_size_from_the_command_line(tmp_path: Path) -> None:
    from fp8kernels.cli.app import app

    settings = config(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(
        "model:\n"
        "  size: {vocab: 300, hidden: 64, intermediate: 96, layers: 2, heads: 4, context: 64}\n"
        f"data: {{train: {json.dumps(settings['data']['train'])}, sequence: 16}}\n"
        "recipe: hif8-qat\nsteps: 9\nbatch: 2\nlearning_rate: 1e-3\n",
        encoding="utf-8",
    )
    out = tmp_path / "run"
    arguments = ["train", "llm", str(file), "--out", str(out), "--set", "steps=2", "--set", "save_every=1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert len(untimed(Run.open(out))) == 2
    assert "2/2  loss" in result.output, "a log or a pipe gets lines in place of the bar"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "holds a run already" in result.output
    result = CliRunner().invoke(app, [*arguments, "--set", "stepps=2"])
    assert result.exit_code == 2 and "did you mean 'steps'" in result.output
