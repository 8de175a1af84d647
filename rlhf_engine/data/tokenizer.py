"""Token ids of text and of dialogues, and back.

What a user writes never becomes a control token: the vocabulary gives ids of text alone, and control tokens come from
the chat template.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from ..config import ConfigError, nearest
from .chat import BUILT_IN, Messages, Template, clean
from .vocabulary import HFVocabulary, PieceVocabulary, read_json


class Tokenizer:
    """A vocabulary and a chat template.

    Args:
        path: an HF folder, read by transformers where it has tokenizer.json and by sentencepiece where it has
            only tokenizer.model; or a sentencepiece model.
        template: name of a built-in template, or a Jinja program; None takes the folder's own, and hh where it has
            none.
        end_id: the one token that is to end responses; None: every one of `end_ids`.

    Attributes:
        vocab_size: number of ids.
        end_id: the token that ends the assistant's turn under the template.
        end_ids: every token that ends a response, `end_id` first and then what the folder's files say.

    Raises:
        ConfigError: there is no tokenizer at `path`, or it lacks what the template needs.
    """

    def __init__(self, path: str, template: str | None = None, end_id: int | None = None):
        folder = Path(path)
        config = read_json(folder / "tokenizer_config.json")
        self._vocabulary = vocabulary = _read_vocabulary(folder, config)
        self.vocab_size = vocabulary.size
        self._names = {i: name for name, i in vocabulary.controls.items()}
        # a prompt's turns come back with each of its answers
        self._encode = functools.lru_cache(maxsize=256)(vocabulary.encode)
        # a marker that cannot merge with what follows, in front of text that continues other text
        self._marker = vocabulary.encode("\n")

        ends = _end_ids(folder, self.vocab_size)
        variables = dict(vocabulary.variables)
        if not variables.get("eos_token") and ends:
            variables["eos_token"] = self._names.get(ends[0], "")
        source = None if template else _own_template(folder, config)
        name = f"the chat template of {path}"
        if template and template not in BUILT_IN:
            if "{" not in template:
                raise ConfigError(f"tokenizer.template={template}: {nearest(template, BUILT_IN)}")
            source, name = template, "tokenizer.template"
        if source is None:
            template = template or "hh"
            source, name = BUILT_IN[template], f"tokenizer.template={template}"
            variables["bos_token"] = "".join(self._names[i] for i in vocabulary.begin)
            variables.setdefault("eos_token", "")
        self.template = Template(source, name, variables, vocabulary.controls, vocabulary.pattern)
        self.end_id = vocabulary.controls[self.template.end]
        eos = vocabulary.controls.get(variables.get("eos_token") or "")
        self.end_ids = tuple(dict.fromkeys([self.end_id, *ends, *([] if eos is None else [eos])]))
        if end_id is not None:
            if end_id not in self.end_ids:
                found = " or ".join(f"{i} ({self._names.get(i, '?')})" for i in self.end_ids)
                raise ConfigError(f"tokenizer.end_id={end_id}: by {name}, {path} ends a response with {found}")
            self.end_ids = (end_id,)
        for control, i in vocabulary.controls.items():
            if i in vocabulary.encode(control):
                raise ConfigError(f"{path}: text can become the control token {control}")

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Token ids of `text`: from the beginning of a sequence, its begin token in front, or continuing one."""
        text = clean(text)
        return self._continue(text) if continues else [*self._vocabulary.begin, *self._vocabulary.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, control tokens left out."""
        return self._vocabulary.decode([i for i in ids if 0 <= i < self.vocab_size and i not in self._names])

    def render(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """A dialogue's token ids, and for each whether the assistant says it (its end tokens included).

        Nothing follows the end token of the assistant's last turn.

        Raises:
            ConfigError: the chat template refuses the dialogue.
        """
        return self._tokens(messages, prompt=False)

    def render_prompt(self, messages: Messages) -> list[int]:
        """A dialogue up to where the assistant is to speak: the beginning of what `render` makes with its answer.

        Raises:
            ConfigError: the chat template refuses the dialogue.
        """
        return self._tokens(messages, prompt=True)[0]

    def _tokens(self, messages: Messages, prompt: bool) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        spoken: list[bool] = []
        behind_text = False
        for part, said in self.template.parts(messages, prompt):
            if isinstance(part, int):
                new = [part]
            elif behind_text or (ids and not self._vocabulary.restarts):
                new = self._continue(part)
            else:
                new = self._encode(part)
            behind_text = isinstance(part, str)
            ids += new
            spoken += [said] * len(new)
        return ids, spoken

    def _continue(self, text: str) -> list[int]:
        ids = self._encode("\n" + text)
        if ids[: len(self._marker)] == self._marker:
            return ids[len(self._marker) :]
        return self._encode(text)


def _read_vocabulary(path: Path, config: dict[str, Any]) -> PieceVocabulary | HFVocabulary:
    """The vocabulary of an HF folder or a sentencepiece file."""
    if path.is_file():
        return PieceVocabulary(path, {})
    if any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return HFVocabulary(path)
    if (path / "tokenizer.model").is_file():
        return PieceVocabulary(path / "tokenizer.model", config)
    raise ConfigError(f"tokenizer.path={path}: neither tokenizer.json nor tokenizer.model is there")


def _own_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template of an HF folder; of several, the default one."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


def _end_ids(folder: Path, vocab_size: int) -> list[int]:
    """`eos_token_id` of generation_config.json, or of config.json."""
    for name in ("generation_config.json", "config.json"):
        found = read_json(folder / name).get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            for i in ids:
                if not 0 <= i < vocab_size:
                    raise ConfigError(f"{folder / name}: eos_token_id={i} is outside the vocabulary of {vocab_size}")
            return ids
    return []


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
