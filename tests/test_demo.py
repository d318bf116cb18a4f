"""The main job end to end, tiny: every file is there, and every number lies where arithmetic says it must."""

from __future__ import annotations

import json
import math

import pytest

from fp8kernels.export import check
from fp8kernels.training import text
from fp8kernels.training.demo import QUICK, run_demo
from fp8kernels.training.demo.train import prepare
from fp8kernels.training.pair import Curves, cosine_schedule
from fp8kernels.training.text import library_files, sentences, split_text


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("demo") / "run"
    return run_demo(out, quick=True), out


def test_it_leaves_what_it_says(demo) -> None:
    found, out = demo
    assert sorted(path.name for path in out.iterdir()) == ["loss.png", "model-bf16", "model-hif8", "results.json"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(found))
    assert len(check(out / "model-hif8").layers) == 7 * QUICK.llama.layers


def test_eight_bits_keep_the_embeddings_and_quarter_the_weights(demo) -> None:
    fp32, bf16, *eight = demo[0]["sentences"]
    assert (fp32["cosine_min"], fp32["nearest"], fp32["nearest_ten"]) == (pytest.approx(1.0, abs=1e-6), 1.0, 1.0)
    assert [result["precision"] for result in eight] == ["HiF8 W8A8", "E4M3 W8A8"]
    for result in eight:
        # three mantissa bits: a relative error of at most 2**-4 in weights and inputs alike, so a cosine of at least
        # 1 - 2 * 2**-4 even if no error cancelled
        assert 1 - 2 * 2**-4 < result["cosine_min"] <= result["cosine_mean"] < 1
        assert result["cosine_mean"] < bf16["cosine_mean"]
        assert 0.5 < result["nearest"] <= 1
        assert result["nearest_ten"] > 0.5
        assert result["bytes_linear"] == pytest.approx(fp32["bytes_linear"] / 4, rel=1e-3)
        assert result["bytes_rest"] == fp32["bytes_rest"] / 2


def test_both_runs_learn_and_stay_together(demo) -> None:
    training = demo[0]["training"]
    curves = training["curves"]
    assert len(training["pretrain_loss"]) == QUICK.pretrain_steps
    assert len(curves["plain_loss"]) == len(curves["other_loss"]) == QUICK.paired_steps
    assert training["pretrain_loss"][0] == pytest.approx(math.log(QUICK.llama.vocab), rel=0.05)  # uniform guesses
    assert training["validation_plain"] < training["validation_start"]
    assert training["validation_qat"] < training["validation_start"]
    errors = [100 * (b - a) / a for a, b in zip(curves["plain_loss"], curves["other_loss"], strict=True)]
    assert training["error_max"] == pytest.approx(max(map(abs, errors)))
    assert 0 < training["error_mean"] <= training["error_max"] < 2, "8-bit codes change the loss, and by little"
    assert abs(training["error_bias"]) <= training["error_mean"]
    assert training["time_ratio"] > 0


def test_every_layer_reports(demo) -> None:
    rows = demo[0]["training"]["layers"]
    assert len(rows) == 2 * 7 * QUICK.llama.layers
    for row in rows:
        assert row["saturated"] == 0, "with a target of 15, overflow at 40960 is out of reach"
        assert row["scale"] > 0
        assert 25 < row["sqnr_db"] < 45, f"three mantissa bits give about 31 dB, this is {row}"


def test_serving_answers_for_both(demo) -> None:
    plain, coded = demo[0]["serving"]
    assert plain["tokens"] == coded["tokens"] == QUICK.new_tokens
    assert coded["weight_bytes"] < plain["weight_bytes"]
    assert coded["model_bytes"] < plain["model_bytes"]
    assert plain["tokens_per_second"] > 0
    assert coded["tokens_per_second"] > 0


def test_text_is_the_same_each_time_and_split_by_file() -> None:
    training, held_out = split_text(200_000)
    assert not set(training) & set(held_out)
    first, second = (next(prepare(QUICK).training) for _ in range(2))
    assert first.tolist() == second.tolist()


def test_sentences_are_whole_and_different() -> None:
    some = sentences(70)
    assert len(set(some)) == 70
    assert sentences(50) == some[:50]
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in some)


def test_a_library_without_enough_sentences_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    few = library_files()[:3]
    monkeypatch.setattr(text, "library_files", lambda: few)
    with pytest.raises(ValueError, match="1000 were asked for"):
        sentences(1000)


def test_curves_are_read_as_they_should() -> None:
    curves = Curves([4.0, 2.0], [4.4, 1.9], [1.0, 2.0], [1.5, 2.0])
    assert curves.error_percent() == pytest.approx([10.0, -5.0])
    assert curves.time_ratio() == pytest.approx(1.25)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = cosine_schedule(1.0, 100, warmup=10)
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
