"""A sentencepiece model as tokenizer.json, which transformers and vLLM read without sentencepiece."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SPACE = "▁"  # sentencepiece's mark of a space


def tokenizer_json(file: Path, controls: Mapping[str, int], begin: Mapping[str, int]) -> dict[str, Any] | None:
    """A tokenizer.json that gives the ids of a sentencepiece model; None for one of words or of characters, which
    transformers does not have.

    Args:
        controls: name to id of the control tokens; a model's piece of that id may have another name.
        begin: those that a text begins with.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    kinds, trainer, normalizer = proto.SentencePiece, proto.trainer_spec, proto.normalizer_spec
    names = [piece.piece for piece in proto.pieces]
    for name, i in controls.items():
        if i < len(names):
            names[i] = name
    text = {p.piece: p.score for i, p in enumerate(proto.pieces) if p.type == kinds.NORMAL and p.piece == names[i]}
    if trainer.model_type == trainer.UNIGRAM:
        scores = [[name, p.score] for name, p in zip(names, proto.pieces, strict=True)]
        model = {"type": "Unigram", "unk_id": trainer.unk_id, "vocab": scores, "byte_fallback": trainer.byte_fallback}
    elif trainer.model_type == trainer.BPE:
        model = {
            "type": "BPE", "unk_token": names[trainer.unk_id], "fuse_unk": True, "byte_fallback": trainer.byte_fallback,
            "vocab": {name: i for i, name in enumerate(names)}, "merges": _merges(text),
        }  # fmt: skip
    else:
        return None
    symbols = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == kinds.USER_DEFINED and p.piece == names[i]}
    added = [(i, name, name in controls) for name, i in [*symbols.items(), *controls.items()]]
    decoders: list[dict[str, Any]] = [_replace({"String": _SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if normalizer.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **added_token(name, special)} for i, name, special in sorted(added)],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(normalizer)},
        "pre_tokenizer": None,
        "post_processor": _begins(begin) if begin else None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def added_token(name: str, special: bool = True) -> dict[str, Any]:
    """A token beside the model's, as transformers writes it."""
    options = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": name, **options, "special": special}


def _merges(scores: Mapping[str, float]) -> Sequence[str]:
    """Pairs that become one piece, in the order in which they do: the best piece first."""
    found = [
        (-score, piece[:i], piece[i:])
        for piece, score in scores.items()
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
    return [f"{left} {right}" for _, left, right in sorted(found, key=lambda pair: pair[0])]


def _normalizers(spec: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps += [{"type": "Strip", "strip_left": True, "strip_right": True}, _replace({"Regex": " {2,}"}, " ")]
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    if spec.escape_whitespaces:
        steps.append(_replace({"String": " "}, _SPACE))
    return steps


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _begins(begin: Mapping[str, int]) -> dict[str, Any]:
    """What puts tokens in front of every text."""
    front = [{"SpecialToken": {"id": name, "type_id": 0}} for name in begin]
    first, second = ([*front, {"Sequence": {"id": which, "type_id": i}}] for i, which in enumerate("AB"))
    tokens = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in begin.items()}
    return {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": tokens}
