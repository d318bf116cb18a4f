"""The head in 8 bits: half the bytes, the numbers that its codes mean, and one table where the embedding shares it."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from fp8kernels import quantize
from fp8kernels.formats import get_format
from fp8kernels.models.llama import LlamaSize, llama
from fp8kernels.nn.inference import InferenceLinear, nbytes
from fp8kernels.nn.inference_embedding import InferenceEmbedding
from fp8kernels.serving.head import use_eight_bit_head

SIZE = LlamaSize(vocab=300, hidden=64, intermediate=128, layers=1, heads=2, context=64)
TOKENS = torch.tensor([[1, 5, 299, 0, 7]])
FORMATS = ["hif8", "e4m3"]


def model(*, tied: bool, pad: int | None = 3) -> nn.Module:
    torch.manual_seed(0)
    made = llama(SIZE, tie_word_embeddings=tied, pad_token_id=pad, bos_token_id=1, eos_token_id=2)
    made.get_output_embeddings().weight.data.mul_(torch.rand(SIZE.vocab, 1) + 0.1)  # rows of different sizes
    return made.to(torch.bfloat16).eval()


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_shared_matrix_becomes_one_table_of_codes(fmt: str) -> None:
    made = model(tied=True)
    weight = made.get_output_embeddings().weight.detach().clone()
    before = nbytes(made)
    report = use_eight_bit_head(made, fmt)
    head, embedding = made.get_output_embeddings(), made.get_input_embeddings()
    assert isinstance(head, InferenceLinear)
    assert isinstance(embedding, InferenceEmbedding)
    assert head.weight_codes.data_ptr() == embedding.weight_codes.data_ptr()
    assert before - nbytes(made) == weight.nbytes // 2 - 4 * SIZE.vocab - 4, "a byte a weight, 4 a row, and input_scale"
    assert report.embedding
    wanted = quantize(weight, fmt, block="row").dequantize(torch.bfloat16)
    assert torch.equal(embedding(TOKENS), wanted[TOKENS])
    logits = made(TOKENS).logits
    assert logits.shape == (1, 5, SIZE.vocab)
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_head_computes_with_its_rows_scales_and_those_of_its_inputs(fmt: str) -> None:
    made = model(tied=False)
    weight = made.get_output_embeddings().weight.detach().clone()
    embedding = made.get_input_embeddings()
    use_eight_bit_head(made, fmt)
    assert made.get_input_embeddings() is embedding, "an embedding of its own stays as it is"
    x = torch.randn(4, SIZE.hidden)
    decoded = quantize(weight, fmt, block="row").dequantize().double()
    inputs = quantize(x, fmt, block="row").dequantize().double()
    wanted = inputs @ decoded.T  # [4, V] fp64
    bound = (SIZE.hidden + 2) * 2.0**-24 * (inputs.abs() @ decoded.abs().T)  # fp32 sums (Higham 2002, 3.1)
    bound = bound + 2.0**-24 * wanted.abs()
    found = made.get_output_embeddings()(x).double()
    assert bool(((found - wanted).abs() <= bound).all()), f"worst {(found - wanted).abs().max():.3g}"


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_rounding_costs_is_reported(fmt: str, caplog: pytest.LogCaptureFixture) -> None:
    made = model(tied=False)
    weight = made.get_output_embeddings().weight.detach().double()
    caplog.set_level(logging.INFO, "fp8kernels")
    report = use_eight_bit_head(made, fmt)
    noise = weight - quantize(weight.float(), fmt, block="row").dequantize().double()
    wanted = 10 * math.log10(float(weight.square().sum() / noise.square().sum()))
    assert report.sqnr_db == pytest.approx(wanted, abs=1e-3)
    assert f"SQNR {wanted:.1f} dB" in caplog.text
    assert fmt in str(report)


def test_generation_goes_on_with_an_8_bit_head() -> None:
    made = model(tied=True)
    use_eight_bit_head(made, "hif8")
    out = made.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=4, min_new_tokens=4)
    assert out.shape == (1, 9)
    assert made.device == torch.device("cpu")
    assert made.dtype == torch.bfloat16


def test_a_model_with_such_a_head_is_not_saved(tmp_path: Path) -> None:
    made = model(tied=True)
    made.save_pretrained(tmp_path / "before")
    use_eight_bit_head(made, "hif8")
    with pytest.raises(ValueError, match="without head="):
        made.save_pretrained(tmp_path / "after")
    assert not (tmp_path / "after").exists()


def test_a_table_keeps_its_codes_and_changes_the_dtype_of_its_rows() -> None:
    made = model(tied=True)
    use_eight_bit_head(made, "e4m3")
    table = made.get_input_embeddings()
    codes = table.weight_codes.clone()
    made.float()
    assert table.weight_codes.dtype == torch.uint8
    assert table.weight_scale.dtype == torch.float32
    assert table(TOKENS).dtype == torch.float32
    assert torch.equal(table.weight_codes, codes)
    with pytest.raises(IndexError):
        table(torch.tensor([SIZE.vocab]))


def test_an_embedding_that_scales_its_rows_stays(caplog: pytest.LogCaptureFixture) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    made = transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    ).eval()
    embedding = made.get_input_embeddings()
    assert made.get_output_embeddings().weight is embedding.weight
    ids = torch.arange(6)[None]
    before = made(ids).logits
    caplog.set_level(logging.INFO, "fp8kernels")
    report = use_eight_bit_head(made, "e4m3")
    assert made.get_input_embeddings() is embedding
    assert isinstance(made.get_output_embeddings(), InferenceLinear)
    assert not report.embedding
    assert "does more than look up rows" in caplog.text
    after = made(ids).logits
    assert float(((after - before).norm() / before.norm()).detach()) < 2.0**-4, (
        "E4M3 rounds to a sixteenth at the worst"
    )


def test_max_norm_stays_and_the_head_of_another_class_is_left_alone() -> None:
    made = model(tied=True)
    made.get_input_embeddings().max_norm = 1.0
    assert "max_norm" in use_eight_bit_head(made, "e4m3").reason
    again = use_eight_bit_head(made, "e4m3")
    assert again.sqnr_db is None
    assert "already" in str(again)
    assert use_eight_bit_head(nn.Sequential(nn.Linear(4, 4)), "e4m3").sqnr_db is None
    with pytest.raises(ValueError, match="int8"):
        use_eight_bit_head(made, "int8")


def test_a_bias_and_a_row_of_zeros_are_kept() -> None:
    made = model(tied=False)
    head = nn.Linear(SIZE.hidden, SIZE.vocab).to(torch.bfloat16)
    with torch.no_grad():
        head.weight[7] = 0
    made.set_output_embeddings(head)
    use_eight_bit_head(made, "hif8")
    out = made.get_output_embeddings()(torch.randn(2, SIZE.hidden, dtype=torch.bfloat16))
    assert torch.equal(out[:, 7], head.bias[7].expand(2))
    assert get_format("hif8").target == made.get_output_embeddings().input_target
