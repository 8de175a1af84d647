"""Text to token ids and back: sentencepiece models, and the template that makes text of messages.

Text of a user never becomes a control token: sentencepiece gives ids to pieces of text alone, and the engine adds
the begin and end tokens itself.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from ..config import ConfigError
from .sources import Messages

# How the hh template introduces each speaker.
_SPEAKERS = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant:"}


class Tokenizer:
    """A sentencepiece model and the hh-rlhf template.

    Args:
        path: `tokenizer.model`, or an HF folder that holds one.

    Raises:
        ConfigError: there is no such model, or it has no end token.
    """

    def __init__(self, path: str):
        file = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ConfigError(f"tokenizer.path={path}: there is no sentencepiece model {file}")
        try:
            self.model = sentencepiece.SentencePieceProcessor(str(file))
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"{file} is not a sentencepiece model: {str(error).splitlines()[0]}") from None
        if self.model.eos_id() < 0:
            raise ConfigError(f"{file} has no end token")
        self.vocab_size = self.model.vocab_size()
        self.end_id = self.model.eos_id()
        # a marker that cannot merge with what follows, in front of text that continues other text
        self._marker = self.model.encode("\n")

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Token ids of `text`: from the beginning of a sequence, its begin token in front, or continuing one."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no bytes
        if continues:
            ids = self.model.encode("\n" + text)
            if ids[: len(self._marker)] == self._marker:
                return ids[len(self._marker) :]
            return self.model.encode(text)
        ids = self.model.encode(text)
        return [self.model.bos_id(), *ids] if self.model.bos_id() >= 0 else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, control tokens left out."""
        return self.model.decode([i for i in ids if 0 <= i < self.vocab_size])

    def render(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """A dialogue's token ids, and for each whether it was said by the assistant (the end tokens included)."""
        ids: list[int] = []
        spoken: list[bool] = []

        def append(text: str, said: bool, end: bool = False) -> None:
            new = self.encode(text, continues=bool(ids)) + [self.end_id] * end
            ids.extend(new)
            spoken.extend([said] * len(new))

        for message in messages:
            speaker = _SPEAKERS[message["role"]]
            if message["role"] == "assistant":
                append(speaker, False)
                append(" " + message["content"], True, end=True)
            else:
                append(speaker + message["content"], False)
        return ids, spoken

    def render_prompt(self, messages: Messages) -> list[int]:
        """A dialogue up to where the assistant is to speak."""
        ids, _ = self.render(messages)
        return ids + self.encode(_SPEAKERS["assistant"], continues=True)


def text_of(messages: Messages) -> str:
    """A dialogue up to where the assistant is to speak, as hh-rlhf writes it."""
    turns = (_SPEAKERS[m["role"]] + (" " if m["role"] == "assistant" else "") + m["content"] for m in messages)
    return "".join(turns) + _SPEAKERS["assistant"]


def train_tokenizer(texts: Iterable[str], path: Path, vocab_size: int) -> None:
    """Trains a sentencepiece model on `texts`: unigram, text kept as it is, unknown characters as bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    trained = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=trained,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type="unigram",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            user_defined_symbols=["\n"],
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(f"tokenizer.vocab_size={vocab_size}: {str(error).splitlines()[-1]}") from None
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(trained.getvalue())
    temporary.replace(path)
