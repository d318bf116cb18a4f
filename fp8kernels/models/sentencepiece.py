"""A sentencepiece tokenizer.model as a stock tokenizer of transformers, where its own class is code that we do not run.

Text is split at the added tokens of tokenizer_config.json; what lies between goes, piece by piece, through the rules
that the file itself states: its character map, its treatment of spaces, its leading space, its merges, its fallback to
bytes. The result is compared at load with the sentencepiece library on sample texts, and on every symbol that the file
keeps whole and tokenizer_config.json does not list.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

SPACE = "▁"  # how sentencepiece writes a space
BPE, UNIGRAM = 2, 1  # model_type in the file
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # types of a piece in the file
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
SAMPLES = (
    "The patient was seen on 12/03/2024, at 08:15.",
    "  two  leading spaces,\ttab\nand a new line\r\n  ",
    "开源盘古模型，中文与English混排。",
    "for i in range(10):\n    print(x[i]**2)  # ½ ﬁne café 😀",
    "",
)


def sentencepiece_tokenizer(path: Path, settings: dict[str, Any]) -> Any:
    """The tokenizer that a sentencepiece file (BPE or unigram) and a tokenizer_config.json describe.

    settings  of tokenizer_config.json are used: added_tokens_decoder, bos_token, eos_token, unk_token, pad_token,
              add_bos_token, add_eos_token, chat_template

    raises    ValueError if the file is of another kind or is split here in another way than by the library, with the
              text; ImportError naming the extra to install
    """
    proto, processor = _open(path)
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(_model(proto))
    inner.normalizer = _normalizer(proto.normalizer_spec)
    inner.decoder = _decoder(leading_space=proto.normalizer_spec.add_dummy_prefix)
    named = {name: _text(settings[name]) for name in NAMED if settings.get(name) is not None}
    inner.add_special_tokens([piece.piece for piece in proto.pieces if piece.type == CONTROL])
    inner.add_special_tokens([text for text in named.values() if processor.piece_to_id(text) != processor.unk_id()])
    added = settings.get("added_tokens_decoder") or {}
    _add(inner, added, path)
    listed = {entry["content"] for entry in added.values()}
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED and piece.piece not in listed]
    _compare(inner, processor, path, (*SAMPLES, *(f"a{symbol}b" for symbol in symbols)))
    ends = {name: named.get(name) if settings.get(f"add_{name}") else None for name in ("bos_token", "eos_token")}
    if any(ends.values()):
        inner.post_processor = processors.TemplateProcessing(
            single=[text for text in (ends["bos_token"], "$A", ends["eos_token"]) if text],
            special_tokens=[(text, inner.token_to_id(text)) for text in ends.values() if text],
        )
    template = settings.get("chat_template")
    extra = {"chat_template": template} if isinstance(template, str) else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **named, **extra)


def _open(path: Path) -> tuple[Any, Any]:
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ImportError(f"{path.name} needs sentencepiece and protobuf: pip install 'fp8kernels[train]'") from error
    messages: Any = sentencepiece_model_pb2
    proto = messages.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
        return proto, sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except Exception as error:  # protobuf and the library each have errors of their own
        raise ValueError(f"{path} is no sentencepiece file ({error})") from None


def _model(proto: Any) -> Any:
    from tokenizers import models
    from transformers.tokenization_utils_base import generate_merges

    kind, pieces = proto.trainer_spec.model_type, proto.pieces
    fallback = bool(proto.trainer_spec.byte_fallback)
    if kind == UNIGRAM:
        unknown = next(number for number, piece in enumerate(pieces) if piece.type == UNKNOWN)
        return models.Unigram([(piece.piece, piece.score) for piece in pieces], unknown, byte_fallback=fallback)
    if kind != BPE:
        raise ValueError(f"model_type {kind} of sentencepiece is neither BPE nor unigram")
    ids = {piece.piece: number for number, piece in enumerate(pieces)}
    scores = {piece.piece: piece.score for piece in pieces}
    unknown = proto.trainer_spec.unk_piece
    return models.BPE(ids, generate_merges(ids, scores), unk_token=unknown, fuse_unk=True, byte_fallback=fallback)


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(*, leading_space: bool) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if leading_space else steps)


def _add(inner: Any, added: dict[str, Any], path: Path) -> None:
    """The added tokens, in the order of their ids, each of which must come out as the file says."""
    from tokenizers import AddedToken

    for number, entry in sorted(added.items(), key=lambda item: int(item[0])):
        flags = {name: bool(entry.get(name)) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        token = AddedToken(entry["content"], **flags)
        (inner.add_special_tokens if flags["special"] else inner.add_tokens)([token])
        if inner.token_to_id(entry["content"]) != int(number):
            raise ValueError(
                f"tokenizer_config.json gives {entry['content']!r} the id {number}, beside {path.name} it has "
                f"{inner.token_to_id(entry['content'])}"
            )


def _compare(inner: Any, processor: Any, path: Path, texts: Iterable[str]) -> None:
    for text in texts:
        ours, wanted = inner.encode(text, add_special_tokens=False).ids, processor.encode(text)
        if ours != wanted:
            raise ValueError(
                f"{path}: {text!r} becomes {ours[:12]}…, with the sentencepiece library {wanted[:12]}…; put a "
                "tokenizer.json made by the model's authors beside it, or give another folder as tokenizer=…"
            )


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
