"""What turns text into token ids and back: a sentencepiece model, or a tokenizer of transformers.

Both give ids of text alone. Control tokens have names and ids here, and no text reaches them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from ..config import ConfigError
from .chat import CONTROL_NAME

# InternLM2's model file names its chat tokens as pieces of text; only its Python files give them their names.
_ALIASES = {"<|im_start|>": "[UNUSED_TOKEN_146]", "<|im_end|>": "[UNUSED_TOKEN_145]"}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file.

    Raises:
        ConfigError: the file holds something else.
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} is not a JSON object")
    return found


class PieceVocabulary:
    """A sentencepiece model.

    Args:
        file: the model.
        config: tokenizer_config.json beside it.

    Attributes:
        size: number of ids.
        controls: name to id of every control token.
        pattern: finds their names in text.
        begin: the control tokens that text begins with.
        variables: what chat templates know of it.
        restarts: text behind a control token is encoded as at the beginning.

    Raises:
        ConfigError: the file is not a sentencepiece model.
    """

    def __init__(self, file: Path, config: dict[str, Any]):
        try:
            self.model = sentencepiece.SentencePieceProcessor(str(file))
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"{file} is not a sentencepiece model: {str(error).splitlines()[0]}") from None
        model = self.model
        named = {name: i for name, piece in _ALIASES.items() if (i := model.piece_to_id(piece)) != model.unk_id()}
        for i, token in config.get("added_tokens_decoder", {}).items():
            if token.get("special") or CONTROL_NAME.fullmatch(token["content"]):
                named[token["content"]] = int(i)
        named = {name: i for name, i in named.items() if i != model.unk_id()}
        reachable = [i for i in named.values() if i < model.vocab_size() and not model.is_control(i)]
        if reachable:
            self.model = model = _with_controls(file, reachable)
        size = model.vocab_size()
        self.controls = {model.id_to_piece(i): i for i in range(size) if model.is_control(i) and i not in reachable}
        self.controls |= named
        self.pattern = _pattern((name, False, False) for name in self.controls)
        self.size = max(size, *(i + 1 for i in named.values()), 0)
        adds_begin = model.bos_id() >= 0 and config.get("add_bos_token", True)
        self.begin = [model.bos_id()] if adds_begin else []
        self.variables = {
            name: model.id_to_piece(i) if i >= 0 else ""
            for name, i in (("bos_token", model.bos_id()), ("eos_token", model.eos_id()))
        } | {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in config.items()
            if name.endswith("_token") and isinstance(value, str | dict)
        }
        self.restarts = True

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([i for i in ids if i < self.model.vocab_size()])


def _with_controls(file: Path, ids: list[int]) -> sentencepiece.SentencePieceProcessor:
    """The model with some pieces of text made control pieces, which text does not reach."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    for i in ids:
        proto.pieces[i].type = sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


class HFVocabulary:
    """A tokenizer of transformers; attributes as `PieceVocabulary` has them.

    Added tokens are control tokens where the files call them special, or where their names leave no doubt
    (`<|name|>`). Others, such as Qwen3's `<think>`, are text.

    Args:
        folder: in HF format.

    Raises:
        ConfigError: transformers is not installed, or does not read the folder with its own code alone.
    """

    def __init__(self, folder: Path):
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise ConfigError(f"{folder} needs transformers to be read: pip install rlhf-engine[hf]") from None
        try:
            hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            model = hf.backend_tokenizer
        except Exception as error:  # of whatever kind transformers and tokenizers raise
            raise ConfigError(f"{folder}: transformers does not read its tokenizer: {error}") from None
        added = hf.added_tokens_decoder
        doubtless = [token for token in added.values() if CONTROL_NAME.fullmatch(token.content)]
        model.add_special_tokens([token for token in doubtless if not token.special])
        tokens = {i: token for i, token in added.items() if token.special or token in doubtless}
        model.no_truncation()
        model.no_padding()
        self.model = model
        self.controls = {token.content: i for i, token in tokens.items()}
        self.pattern = _pattern((token.content, token.lstrip, token.rstrip) for token in tokens.values())
        self.size = 1 + max(model.get_vocab(with_added_tokens=True).values())
        self.variables = hf.special_tokens_map

        behind = model.encode(next(iter(self.controls), "") + "a", add_special_tokens=False).ids
        model.encode_special_tokens = True  # from here on names of control tokens are text
        alone = self.encode("a")
        self.restarts = behind[-len(alone) :] == alone
        whole = model.encode("a").ids
        self.begin = whole[: next(i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)]

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=False)


def _pattern(tokens: Iterable[tuple[str, bool, bool]]) -> re.Pattern:
    """Finds names of control tokens, longest first; some take the white space before or behind them along.

    Args:
        tokens: name, takes what is before, takes what is behind.
    """
    space = r"\s*"
    alike: dict[tuple[bool, bool], list[str]] = {}  # one group for each kind: many groups would be slow
    for name, before, behind in sorted(tokens, key=lambda token: -len(token[0])):
        alike.setdefault((before, behind), []).append(re.escape(name))
    found = (space * before + f"({'|'.join(names)})" + space * behind for (before, behind), names in alike.items())
    return re.compile("|".join(found) or "(?!)")  # the latter matches nothing
