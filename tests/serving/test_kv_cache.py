"""generate with an 8-bit cache: the error is that of the format, the tokens are those of bf16, nothing is silent."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from serving.test_code_store import half_steps
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import fp8kernels
from fp8kernels.formats import FORMATS, Format
from fp8kernels.serving import kv_attention
from fp8kernels.serving.kv_attention import MOST_QUERIES, CachedTensor, attention_forward
from fp8kernels.serving.kv_cache import EightBitCache, EightBitLayer, use_eight_bit_cache

FMTS = ("hif8", "e4m3")
VOCAB, LAYERS = 40, 2
SIZE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


def counting(batch: int, length: int) -> Tensor:
    """Sequences that a small model learns: each token is the one before plus a step that the second token tells."""
    start, step = torch.randint(1, VOCAB, (batch, 1)), torch.randint(1, 4, (batch, 1))
    return (start + step * torch.arange(length)) % (VOCAB - 1) + 1


@pytest.fixture(scope="module")
def trained() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZE))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        ids = counting(16, 24)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.6, f"the model should have learnt to count: {loss.item()}"
    return model.eval()


@pytest.fixture
def model(trained: LlamaForCausalLM) -> Iterator[LlamaForCausalLM]:
    """The trained model, put back as it was afterwards."""
    yield trained
    trained.__dict__.pop("_prepare_cache_for_generation", None)
    trained.set_attn_implementation("sdpa")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(queries, tokens) of every call of the verb from attention."""
    found: list[tuple[int, int]] = []

    def noted(q: Tensor, key_codes: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append((q.shape[2], key_codes.shape[2]))
        return fp8kernels.decode_attention(q, key_codes, *args, **kwargs)

    monkeypatch.setattr(kv_attention, "decode_attention", noted)
    return found


def generated(model: Any, ids: Tensor, **more: Any) -> Any:
    settings = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(ids, **{"attention_mask": torch.ones_like(ids), **settings, **more})


# ---- the error ----


@pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=lambda fmt: fmt.name)
def test_attention_is_wrong_by_the_steps_of_the_format_at_most(fmt: Format) -> None:
    """A score is wrong by |q| times the half steps of its key, weights by exp of twice the largest of these."""
    layer = EightBitLayer(fmt)
    k, v = torch.randn(2, 2, 90, 64), torch.randn(2, 2, 90, 64)
    layer.update(k[:, :, :89], v[:, :, :89])
    keys, values = layer.update(k[:, :, 89:], v[:, :, 89:])
    q, scaling = torch.randn(2, 4, 1, 64), 64**-0.5
    got = attention_forward(nn.Module(), q, keys, values, None, scaling=scaling)[0].transpose(1, 2)

    q, k2, v2 = q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    steps = [
        half_steps(x, store.scale, fmt).repeat_interleave(2, 1) for x, store in zip((k, v), layer.stores, strict=True)
    ]
    weights = (q @ k2.transpose(-1, -2) * scaling).softmax(-1)
    wrong = torch.expm1(2 * (q.abs() @ steps[0].transpose(-1, -2) * scaling).amax(-1, keepdim=True))
    bound = (1 + wrong) * (weights @ steps[1]) + wrong * (weights @ v2.abs())
    assert ((got - weights @ v2).abs() <= bound + 1e-5).all()  # 1e-5: fp32 sums of 90 numbers near 1


@pytest.mark.parametrize("fmt", FMTS)
def test_logits_stay_close_where_the_past_is_in_8_bits(model: LlamaForCausalLM, fmt: str) -> None:
    ids = counting(3, 40)
    with torch.no_grad():
        want, prompt = model(ids).logits, model(ids[:, :20]).logits
        use_eight_bit_cache(model, fmt)
        cache = EightBitCache(model.config, fmt)
        got = [model(ids[:, :20], past_key_values=cache).logits]
        got += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 40)]
    got = torch.cat(got, 1)
    assert torch.equal(got[:, :20], prompt)  # the prompt is attended to as it came
    noise = (got - want)[:, 20:].pow(2).mean()
    sqnr = 10 * math.log10(float(want[:, 20:].pow(2).mean() / noise))
    assert sqnr > 20, f"{sqnr:.1f} dB"  # keys and values alone have 31 dB in E4M3 and in HiF8


# ---- generate ----


@pytest.mark.parametrize("fmt", FMTS)
def test_generate_gives_the_tokens_of_the_plain_cache(
    model: LlamaForCausalLM, calls: list[tuple[int, int]], fmt: str
) -> None:
    ids = counting(8, 12)
    plain = generated(model, ids)
    assert use_eight_bit_cache(model, fmt) is model
    out = generated(model, ids)
    same = (out.sequences == plain.sequences).float().mean()
    assert same > 0.9, f"{same:.0%} of the tokens"
    assert isinstance(out.past_key_values, EightBitCache) and isinstance(plain.past_key_values, DynamicCache)
    assert calls == [(1, tokens) for tokens in range(13, 32) for _ in range(LAYERS)]
    assert out.past_key_values.get_seq_length() == 31 and out.past_key_values.recoded == 0


@pytest.mark.parametrize("fmt", FMTS)
def test_left_padding_changes_no_sequence(model: LlamaForCausalLM, fmt: str) -> None:
    use_eight_bit_cache(model, fmt)
    ids = counting(2, 12)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
    mask = (torch.arange(17) >= 5).long().expand(2, -1).contiguous()
    padded[1], mask[1] = counting(1, 17)[0], 1
    alone = generated(model, ids[:1]).sequences
    together = generated(model, padded, attention_mask=mask).sequences
    assert torch.equal(together[0, 5:], alone[0])


def test_beams_are_reordered(model: LlamaForCausalLM) -> None:
    ids = counting(3, 12)
    plain = generated(model, ids, num_beams=3, output_scores=True)
    use_eight_bit_cache(model, "e4m3")
    out = generated(model, ids, num_beams=3, output_scores=True)
    assert (out.sequences == plain.sequences).float().mean() > 0.9
    assert torch.allclose(out.sequences_scores, plain.sequences_scores, atol=0.1)  # 0.1 of log-probability a token


def test_a_cache_that_is_asked_for_is_used(model: LlamaForCausalLM) -> None:
    use_eight_bit_cache(model)
    ids = counting(1, 12)
    given = DynamicCache(config=model.config)
    assert generated(model, ids, past_key_values=given).past_key_values is given
    static = generated(model, ids, cache_implementation="static").past_key_values
    assert type(static).__name__ == "StaticCache"
    assert generated(model, ids, use_cache=False).past_key_values is None


def test_a_copy_keeps_a_cache_of_its_own(model: LlamaForCausalLM) -> None:
    use_eight_bit_cache(model, "e4m3")
    ids, file = counting(1, 12), io.BytesIO()
    want = generated(model, ids).sequences
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        out = generated(other, ids)
        assert isinstance(out.past_key_values, EightBitCache) and torch.equal(out.sequences, want)
        assert other._prepare_cache_for_generation.args[0] is other


def test_prompt_lookup_checks_several_tokens_at_once(model: LlamaForCausalLM, calls: list[tuple[int, int]]) -> None:
    use_eight_bit_cache(model, "e4m3")
    ids = counting(1, 50)
    one_by_one = generated(model, ids).sequences
    calls.clear()
    together = generated(model, ids, prompt_lookup_num_tokens=4).sequences
    assert max(queries for queries, _ in calls) > 1
    assert (together == one_by_one).float().mean() > 0.9


# ---- the past, and many queries ----


@pytest.mark.parametrize("chunk", [3, MOST_QUERIES, MOST_QUERIES + 1, 30])
def test_a_prompt_in_chunks(model: LlamaForCausalLM, calls: list[tuple[int, int]], chunk: int) -> None:
    use_eight_bit_cache(model, "e4m3")
    ids = counting(2, 10 + chunk)
    cache = EightBitCache(model.config, "e4m3")
    with torch.no_grad():
        want = model(ids).logits[:, 10:]
        model(ids[:, :10], past_key_values=cache)
        got = model(ids[:, 10:], past_key_values=cache).logits
    assert bool(calls) == (chunk <= MOST_QUERIES)
    assert 10 * math.log10(float(want.pow(2).mean() / (got - want).pow(2).mean())) > 20


def test_crop_reset_repeat_and_select() -> None:
    cache = EightBitCache(LlamaConfig(**SIZE))
    k = torch.randn(2, 2, 9, 16)
    cache.update(k, k, 0)
    cache.update(k[:, :, :1], k[:, :, :1], 0)
    assert cache.get_seq_length() == 10 and cache.get_mask_sizes(3, 0) == (13, 0)
    with pytest.raises(ValueError, match="below zero"):
        cache.layers[0].crop(4)
    cache.crop(-3)
    assert cache.get_seq_length() == 7
    keys, _ = cache.update(k[:, :, 7:8], k[:, :, 7:8], 0)
    assert (keys[:, :, :8] - k[:, :, :8]).abs().max() < 0.3
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    one = k[[1, 0], :, 8:]
    keys, _ = cache.update(one, one, 0)
    assert (keys - k[[1, 0]]).abs().max() < 0.3
    with pytest.raises(ValueError, match="begin a new cache"):
        cache.update(k[:1], k[:1], 0)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    cache.update(k[:1], k[:1], 0)


def test_calibrated_scales_are_used(model: LlamaForCausalLM) -> None:
    scales = {1: (torch.tensor([0.5, 1.0]), torch.tensor([0.25, 0.125]))}
    use_eight_bit_cache(model, "e4m3", scales=scales)
    cache = generated(model, counting(2, 12)).past_key_values
    assert torch.equal(cache.layers[1].stores[1].scale, scales[1][1].expand(2, 2))
    assert not torch.equal(cache.layers[0].stores[1].scale, scales[1][1].expand(2, 2))


def test_bytes_are_half_of_bf16() -> None:
    config = LlamaConfig(**{**SIZE, "head_dim": 128})
    ours, plain = EightBitCache(config), DynamicCache(config=config)
    k = torch.randn(1, 2, 1024, 128).bfloat16()
    for layer in range(LAYERS):
        ours.update(k, k, layer)
        plain.update(k, k, layer)
    assert ours.nbytes <= 0.52 * sum(x.nbytes for layer in plain.layers for x in (layer.keys, layer.values))


# ---- other models ----


def tiny(name: str, **more: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**SIZE, **more})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Phi3", "Mistral", "OPT", "GPTNeoX", "Granite"])
def test_architectures(name: str, calls: list[tuple[int, int]]) -> None:
    more: dict[str, Any] = {"sliding_window": None} if name in ("Mistral", "Phi3") else {}
    if name == "OPT":
        more = {"ffn_dim": 96, "word_embed_proj_dim": 64}
    model = use_eight_bit_cache(tiny(name, **more), "e4m3")
    ids = torch.randint(1, VOCAB, (2, 9))
    with torch.no_grad():
        want = model(ids).logits[:, -1]
        cache = EightBitCache(model.config, "e4m3")
        model(ids[:, :8], past_key_values=cache)
        got = model(ids[:, 8:], past_key_values=cache).logits[:, -1]
    assert calls == [(1, 9)] * LAYERS
    assert 10 * math.log10(float(want.pow(2).mean() / (got - want).pow(2).mean())) > 20
    assert isinstance(generated(model, ids).past_key_values, EightBitCache)


def test_layers_with_a_sliding_window_keep_their_cache() -> None:
    kinds = ["full_attention", "sliding_attention"]
    model = tiny("Qwen2", use_sliding_window=True, sliding_window=6, layer_types=kinds)
    ids = torch.randint(1, VOCAB, (1, 10))
    plain = generated(model, ids).sequences
    with pytest.warns(UserWarning, match="1 of 2 layers of Qwen2ForCausalLM keep transformers' own cache"):
        use_eight_bit_cache(model, "e4m3")
    out = generated(model, ids)
    assert out.past_key_values.plain == {1: "DynamicSlidingWindowLayer"}
    assert out.past_key_values.nbytes > 0 and out.sequences.shape == plain.shape

    model = tiny("Mistral", sliding_window=6)
    with pytest.warns(UserWarning, match="2 of 2 layers"):
        use_eight_bit_cache(model)
    assert model.config._attn_implementation == "sdpa"
    assert isinstance(generated(model, ids).past_key_values, DynamicCache)


def test_models_that_cannot_say_why() -> None:
    import transformers

    with pytest.raises(TypeError, match="Linear is no model of transformers"):
        use_eight_bit_cache(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unknown format"):
        use_eight_bit_cache(tiny("Llama"), "int8")
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="does not go through transformers' AttentionInterface"):
        use_eight_bit_cache(bloom)
    with pytest.raises(ValueError, match="capped"):
        use_eight_bit_cache(tiny("Gemma2"))
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="encoder and a decoder"):
        use_eight_bit_cache(t5)


def test_another_attention_reads_the_decoded_numbers(model: LlamaForCausalLM) -> None:
    ids = counting(2, 14)
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        cache = EightBitCache(model.config, "e4m3")
        with torch.no_grad():
            want = model(ids).logits[:, -1]
            model(ids[:, :13], past_key_values=cache)
            got = model(ids[:, 13:], past_key_values=cache).logits[:, -1]
        assert 10 * math.log10(float(want.pow(2).mean() / (got - want).pow(2).mean())) > 20


def test_attention_says_what_it_decodes() -> None:
    def reason(queries: int = 1, mask: Tensor | None = None, dropout: float = 0.0, **more: Any) -> str | None:
        x = CachedTensor(torch.zeros(1, 2, 5, 8, dtype=torch.uint8), torch.ones(1, 2), FORMATS["e4m3"], torch.float32)
        q = more.pop("q", torch.ones(1, 4, queries, 8))
        return kv_attention.why_not(q, x, x, mask, dropout, more, causal=more.pop("causal", True))

    assert reason() is None and reason(MOST_QUERIES, torch.ones(1, 1, MOST_QUERIES, 5).bool(), softcap=None) is None
    assert "17 queries" in reason(MOST_QUERIES + 1)
    assert "dropout" in reason(dropout=0.1)
    assert "gradient" in reason(q=torch.ones(1, 4, 1, 8, requires_grad=True))
    assert "mask is torch.float32" in reason(mask=torch.zeros(1, 1, 1, 5))
    assert "every query" in reason(2, causal=False)
    assert "softcap, s_aux is given" in reason(softcap=30.0, s_aux=torch.ones(4))
    assert "no kernel for meta" in reason(q=torch.ones(1, 4, 1, 8, device="meta"))


def test_a_forward_that_wants_gradients_takes_the_decoded_past(model: LlamaForCausalLM) -> None:
    use_eight_bit_cache(model, "e4m3")
    cache, ids = EightBitCache(model.config, "e4m3"), counting(1, 12)
    model(ids[:, :8], past_key_values=cache)
    model(ids[:, 8:], past_key_values=cache).logits.sum().backward()
    grad = model.model.layers[0].self_attn.q_proj.weight.grad
    assert grad is not None and grad.isfinite().all() and grad.ne(0).any()
    model.zero_grad()


def test_codes_of_the_cache_are_not_written() -> None:
    codes = torch.randint(0, 100, (1, 2, 5, 8), dtype=torch.uint8)
    x = CachedTensor(codes, torch.ones(1, 2), FORMATS["hif8"], torch.bfloat16)
    assert torch.equal(x + 0, FORMATS["hif8"].decode(codes).bfloat16()) and x.detach().codes is codes
    with pytest.raises(RuntimeError, match="would write into the 8-bit cache"):
        x.add_(1)
