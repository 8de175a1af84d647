"""What turns text into token ids and back: a sentencepiece model, or a tokenizer of transformers.

Both give ids of text alone. Control tokens have names and ids here, and no text reaches them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from ..config import ConfigError
from .chat import CONTROL_NAME
from .templates import read_json

# InternLM2's model file names its chat tokens as pieces of text; only its Python files give them their names.
_ALIASES = {"<|im_start|>": "[UNUSED_TOKEN_146]", "<|im_end|>": "[UNUSED_TOKEN_145]"}


_FAST, _BPE, _PIECES = "tokenizer.json", ("vocab.json", "merges.txt"), "tokenizer.model"
# what transformers leaves beside a tokenizer.model that it saves
_OF_TRANSFORMERS = ("added_tokens.json", "special_tokens_map.json")
MADE_FROM = "made_from"  # the file that a tokenizer_config.json of ours stands beside, to be read as it is
_FOREIGN = ("tekken.json", "*.tiktoken", "tiktoken.model", "tokenizer.model.*", "vocab.txt", "spiece.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer that can be read."""
    return any((folder / name).is_file() for name in (_FAST, _BPE[0], _PIECES))


def read_vocabulary(path: Path) -> PieceVocabulary | HFVocabulary:
    """The vocabulary of an HF folder, or of a sentencepiece model.

    transformers reads the folders that it knows: those with tokenizer.json or vocab.json, and a tokenizer.model that
    it has saved, with the tokens that were added. A tokenizer.model alone, or one of a class that transformers has not,
    goes to sentencepiece.

    Raises:
        ConfigError: there is none, or it is not read.
    """
    if path.is_file():
        return PieceVocabulary(path, {})
    config = read_json(path / "tokenizer_config.json")
    here = [name for name in (_FAST, *_BPE, _PIECES) if (path / name).is_file()]
    if config.get(MADE_FROM) == _PIECES and _PIECES in here:
        return PieceVocabulary(path / _PIECES, config)
    if _FAST in here or set(_BPE) <= set(here):
        return HFVocabulary(path)
    if _PIECES in here:
        check_pieces(path / _PIECES)
        if _is_known(path, config):
            return HFVocabulary(path)
        added = read_json(path / _OF_TRANSFORMERS[0])  # from before there was an added_tokens_decoder
        tokens = {str(i): {"content": name, "special": True} for name, i in added.items()}
        return PieceVocabulary(path / _PIECES, {"added_tokens_decoder": tokens, **config})
    found = here or [file.name for pattern in _FOREIGN for file in sorted(path.glob(pattern))]
    raise ConfigError(
        f"tokenizer.path={path}: neither tokenizer.json nor tokenizer.model is there"
        + (f", and {found[0]} alone is not read: {_advice(path, found[0])}" if found else "")
    )


def check_pieces(file: Path) -> None:
    """Raises:
    ConfigError: a tokenizer.model is tiktoken's, as Llama 3 has it beside its own tokenizer.json.
    """
    with file.open("rb") as opened:
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", opened.readline(1000)):
            raise ConfigError(f"{file} is a file of tiktoken, which is not read: {_advice(file.parent, file.name)}")


def _is_known(path: Path, config: dict[str, Any]) -> bool:
    """Whether transformers saved the tokenizer.model of a folder, and reads it with its own code."""
    name = config.get("tokenizer_class")
    if "AutoTokenizer" in (config.get("auto_map") or {}):
        return False
    if not isinstance(name, str):
        return any((path / file).is_file() for file in _OF_TRANSFORMERS)
    try:
        from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
    except ImportError:
        return True  # and that is what is said then
    return tokenizer_class_from_name(name) is not None


def _advice(folder: Path, name: str) -> str:
    if name in _BPE:
        return f"{' and '.join(_BPE)} belong together"
    if name.startswith(f"{_PIECES}."):
        return f"tokenizer.path={folder / name} reads it"
    return (
        "put the tokenizer.json of the same model beside it, or make one with transformers:"
        " AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    )


class PieceVocabulary:
    """A sentencepiece model.

    Args:
        file: the model.
        config: tokenizer_config.json beside it.

    Attributes:
        size: number of ids.
        controls: name to id of every control token.
        pattern: finds their names in text.
        texts: number of ids up to the last that text reaches.
        begin: the control tokens that text begins with.
        variables: what chat templates know of it.
        unknown: name and id of what stands for text that has no ids; None: there is no such token.
        restarts: text behind a control token is encoded as at the beginning.

    Raises:
        ConfigError: the file is not a sentencepiece model.
    """

    def __init__(self, file: Path, config: dict[str, Any]):
        self.file, self.config = file, config
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
        self.texts = 1 + max(set(range(size)) - set(self.controls.values()))
        adds_begin = model.bos_id() >= 0 and config.get("add_bos_token", True)
        self.begin = [model.bos_id()] if adds_begin else []
        self.variables = {
            name: model.id_to_piece(i) if i >= 0 else ""
            for name, i in (("bos_token", model.bos_id()), ("eos_token", model.eos_id()))
        } | {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in config.items()
            if name.endswith("_token") and isinstance(value, str | dict) and value
        }
        self.unknown = (model.id_to_piece(model.unk_id()), model.unk_id())
        self.restarts = True

    def name(self, i: int) -> str | None:
        """Of a token; None where it has none."""
        named = {i: name for name, i in self.controls.items()}
        return named.get(i) or (self.model.id_to_piece(i) if i < self.model.vocab_size() else None)

    def content(self) -> bytes:
        """All that decides which ids a text has."""
        return self.model.serialized_model_proto()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
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
        self.folder = folder
        try:
            import transformers  # noqa: F401
        except ImportError:
            raise ConfigError(f"{folder} needs transformers to be read: pip install -e '.[hf]'") from None
        try:
            hf = self.loaded()
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
        ids = set(model.get_vocab(with_added_tokens=True).values())
        self.size, self.texts = 1 + max(ids), 1 + max(ids - set(tokens))
        self.variables = hf.special_tokens_map
        unknown = hf.unk_token_id
        self.unknown = None if unknown is None else (str(hf.unk_token), unknown)

        behind = model.encode(next(iter(self.controls), "") + "a", add_special_tokens=False).ids
        model.encode_special_tokens = True  # from here on names of control tokens are text
        alone = self.encode("a")
        self.restarts = behind[-len(alone) :] == alone
        whole = model.encode("a").ids
        self.begin = whole[: next(i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)]

    def loaded(self) -> Any:
        """As transformers has it."""
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        is_ours = read_json(self.folder / "tokenizer_config.json").get(MADE_FROM) == _FAST
        reader: Any = PreTrainedTokenizerFast if is_ours else AutoTokenizer
        return reader.from_pretrained(str(self.folder), local_files_only=True, trust_remote_code=False)

    def name(self, i: int) -> str | None:
        """Of a token; None where it has none."""
        return self.model.id_to_token(i)

    def content(self) -> bytes:
        """All that decides which ids a text has."""
        return self.model.to_str().encode()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.model.encode_batch_fast([text], add_special_tokens=False)[0].ids  # which looks for no offsets

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
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
