"""Token ids of text and of dialogues, and back.

What a user writes never becomes a control token: the vocabulary gives ids of text alone, and control tokens come from
the chat template.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, pairwise, takewhile
from pathlib import Path

import sentencepiece

from ..config import ConfigError
from ..surviving import durable
from .calls import format_of
from .chat import Messages, Part, Template, clean, shared_start
from .templates import choose, read_json
from .tools import Tools
from .vocabulary import read_vocabulary


class Tokenizer:
    """A vocabulary and a chat template.

    Args:
        path: an HF folder, or a sentencepiece model.
        template: as `templates.choose` takes it.
        end_id: the one token that is to end responses; None: every one of `end_ids`.
        date: that the template writes, YYYY-MM-DD; None: today's.

    Attributes:
        vocabulary: without a template.
        vocab_size: number of ids.
        end_id: the token that ends the assistant's turn under the template.
        end_ids: every token that ends a response, `end_id` first and then what the folder's files say.
        call_format: of `calls.FORMATS`, in which the model calls tools; None: it is not known.

    Raises:
        ConfigError: there is no tokenizer at `path`, or it lacks what the template needs.
    """

    def __init__(self, path: str, template: str | None = None, end_id: int | None = None, date: str | None = None):
        folder = Path(path)
        self._arguments = (path, template, end_id)
        config = read_json(folder / "tokenizer_config.json")
        source, ends = choose(folder, config, template), _end_ids(folder)
        self.vocabulary = vocabulary = read_vocabulary(folder)
        self.path, self.vocab_size, self._limit = path, vocabulary.size, vocabulary.size
        self._names = {i: name for name, i in vocabulary.controls.items()}
        # a prompt's turns come back with each of its answers
        self._encode = functools.lru_cache(maxsize=256)(vocabulary.encode)
        # a marker that cannot merge with what follows, in front of text that continues other text
        self._marker = vocabulary.encode("\n")

        for i in ends:
            if not 0 <= i < self.vocab_size:
                raise ConfigError(f"{folder}: eos_token_id={i} is outside the vocabulary of {self.vocab_size}")
        variables = dict(vocabulary.variables)
        if not source.is_own and not variables.get("eos_token") and ends:
            variables["eos_token"] = self._names.get(ends[0], "")
        if source.is_ours:
            variables["bos_token"] = "".join(self._names[i] for i in vocabulary.begin)
            variables.setdefault("eos_token", "")
        self.template = Template(source, variables, vocabulary.controls, vocabulary.pattern)
        self.call_format = format_of(source.program)
        self.date = date
        turn, eos = (vocabulary.controls.get(name or "") for name in (self.template.end, variables.get("eos_token")))
        self.end_ids = tuple(dict.fromkeys(i for i in (turn, *ends, eos) if i is not None))
        if not self.end_ids:
            raise ConfigError(
                f"{source.name} ends the assistant's turns with no control token, and no file of {path} names an"
                " eos_token_id: nothing would end a response"
            )
        self.end_id = self.end_ids[0]
        if end_id is not None:
            if end_id not in self.end_ids:
                found = " or ".join(f"{i} ({self._names.get(i, '?')})" for i in self.end_ids)
                raise ConfigError(f"tokenizer.end_id={end_id}: by {source.name}, {path} ends a response with {found}")
            self.end_ids = (end_id,)
        for control, i in vocabulary.controls.items():
            is_unknown = control == variables.get("unk_token") and i not in (*vocabulary.begin, *self.end_ids)
            if i in vocabulary.encode(control) and not is_unknown:  # which stands for any text
                raise ConfigError(f"{path}: text can become the control token {control}")

    def __reduce__(self):
        return _rebuilt, (*self._arguments, self.date, self._limit)

    def digest(self) -> str:
        """Of all that decides which tokens a dialogue has."""
        template, vocabulary = self.template, self.vocabulary
        parts = [template.source.program, template.variables, vocabulary.controls, vocabulary.begin, self._limit]
        parts += [(self.date or str(datetime.date.today())) if template.is_dated else None, vocabulary.restarts]
        return hashlib.sha256(
            json.dumps(parts, sort_keys=True, default=str).encode() + vocabulary.content()
        ).hexdigest()

    @property
    def date(self) -> str | None:
        """That the template writes; None: today's."""
        return self.template.date

    @date.setter
    def date(self, date: str | None) -> None:
        try:
            self.template.date = date and str(datetime.date.fromisoformat(date))
        except ValueError:
            raise ConfigError(f"tokenizer.date={date}: a date is YYYY-MM-DD") from None

    def fit(self, num_ids: int, what: str) -> None:
        """Keeps to the first `num_ids` ids. Control tokens beyond, such as a pad token that was added without a row
        in the embeddings, are no harm where nothing writes them.

        Args:
            what: has so many, for errors.

        Raises:
            ConfigError: text reaches an id beyond, or a token that begins a text or ends a response is one.
        """
        self._limit = min(self._limit, num_ids)
        beyond = self.vocabulary.texts - 1, *self.vocabulary.begin, *self.end_ids
        if (worst := max(beyond)) >= num_ids:
            raise ConfigError(
                f"the tokenizer ({self.path}) has {max(self.vocabulary.texts, worst + 1)} ids, and {what} {num_ids}"
            )

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Token ids of `text`: from the beginning of a sequence, its begin token in front, or continuing one."""
        text = clean(text)
        return self._continue(text) if continues else [*self.vocabulary.begin, *self.vocabulary.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, control tokens left out."""
        return self.vocabulary.decode([i for i in ids if 0 <= i < self.vocab_size and i not in self._names])

    def spell(self, ids: Sequence[int]) -> str:
        """Text of token ids, control tokens by their names."""
        runs = groupby((i for i in ids if 0 <= i < self.vocab_size), self._names.get)
        return "".join(name * len(list(run)) if name else self.decode(list(run)) for name, run in runs)

    def without_end(self, ids: Sequence[int]) -> Sequence[int]:
        """A turn without the tokens that end it."""
        while ids and ids[-1] in self.end_ids:
            ids = ids[:-1]
        return ids

    def said(self, ids: Sequence[int]) -> str:
        """What the assistant says in a turn that was sampled."""
        return self.decode(self.without_end(ids)).removeprefix(self.template.opening)

    def render(self, messages: Messages, marks: bool = True, tools: Tools = None) -> tuple[list[int], list[bool]]:
        """A dialogue's token ids, and for each whether the assistant says it (its end tokens included).

        Nothing follows the end token of the assistant's last turn.

        Args:
            marks: of all turns of the assistant; False: of the last one alone.
            tools: that are offered.

        Raises:
            ConfigError: the chat template refuses the dialogue, or does not show where the assistant speaks.
        """
        return self._tokens(self.template.parts(messages, prompt=False, marks=marks, tools=tools))

    def render_prompt(self, messages: Messages, tools: Tools = None) -> list[int]:
        """A dialogue up to where the assistant is to speak. What `render` makes of it with an answer begins with the
        same, but for what the template opens in prompts alone.

        Raises:
            ConfigError: the chat template refuses the dialogue.
        """
        return self._tokens(self.template.parts(messages, prompt=True, tools=tools))[0]

    def render_answer(self, messages: Messages, before: Sequence[int], tools: Tools = None) -> list[int]:
        """What a dialogue's last turn, of the assistant, adds to the ids of what stands before it."""
        parts = self.template.parts(messages, prompt=False, marks=False, answer=True, tools=tools)
        return self._tokens(parts, before)[0]

    def render_observation(
        self, messages: Messages, observation: Messages, before: Sequence[int], tools: Tools = None
    ) -> list[int]:
        """What an observation and the assistant's next prompt add to the ids of a trajectory.

        Args:
            messages: so far, the last one of the assistant.
            observation: the messages that follow.
            before: ids so far; where they lack the token that ends the assistant's turn, it comes first.

        Raises:
            ConfigError: the chat template refuses the dialogue, or leaves out what is observed.
        """
        ends = {self._names[i] for i in self.end_ids if i in self._names}
        parts = self.template.behind(messages, observation, ends, tools)
        if self.template.end and before[-1] in self.end_ids:  # which was sampled
            names = {*ends, self.template.end}
            at = (i for i, part in enumerate(parts) if isinstance(part.what, int) and self._names[part.what] in names)
            parts = parts[next(at, -1) + 1 :]
        return self._tokens(parts, before)[0]

    def _tokens(self, parts: Sequence[Part], before: Sequence[int] = ()) -> tuple[list[int], list[bool]]:
        """Of parts, behind the ids of others."""
        ids: list[int] = []
        spoken: list[bool] = []
        behind_text = bool(before) and before[-1] not in self._names
        for i, part in enumerate(parts):
            if isinstance(part.what, int):
                if part.what >= self._limit:
                    raise ConfigError(
                        f"{self.template.source.name} writes {self._names[part.what]}, id {part.what}, and the model's"
                        f" vocabulary has {self._limit}"
                    )
                new, said = [part.what], [part.said]
            elif part.joins:
                continue  # came with the part before
            else:
                run = [part, *takewhile(lambda other: other.joins, parts[i + 1 :])]
                is_first = not behind_text and (not (ids or before) or self.vocabulary.restarts)
                new, said = self._run(run, self._encode if is_first else self._continue)
            behind_text = isinstance(part.what, str)
            ids += new
            spoken += said
        return ids, spoken

    def _run(self, run: Sequence[Part], encode: Callable[[str], list[int]]) -> tuple[list[int], list[bool]]:
        """A run of text, tokenised as one. A token that holds the end of one's words and the beginning of another's is
        the other's."""
        text = "".join(str(part.what) for part in run)
        ids = encode(text)
        said = [run[0].said] * len(ids)
        position = 0
        for before, part in pairwise(run):
            position += len(str(before.what))
            start = shared_start(ids, encode(text[:position]))
            said[start:] = [part.said] * (len(ids) - start)
        return ids, said

    def _continue(self, text: str) -> list[int]:
        ids = self._encode("\n" + text)
        if ids[: len(self._marker)] == self._marker:
            return ids[len(self._marker) :]
        return self._encode(text)


def _rebuilt(path: str, template: str | None, end_id: int | None, date: str | None, limit: int) -> Tokenizer:
    """The tokenizer of another process."""
    tokenizer = Tokenizer(path, template, end_id, date)
    tokenizer.fit(limit, "the model's vocabulary")
    return tokenizer


def _end_ids(folder: Path) -> list[int]:
    """`eos_token_id` of generation_config.json, or of config.json."""
    for name in ("generation_config.json", "config.json"):
        found = read_json(folder / name).get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            for i in ids:
                if type(i) is not int:
                    raise ConfigError(
                        f"{folder / name}: eos_token_id={json.dumps(found)!s:.60} is neither a token's id nor a list of"
                        " such whole numbers"
                    )
            return ids
    return []


def train_tokenizer(texts: Iterable[str], path: Path, vocab_size: int) -> None:
    """Trains a sentencepiece model on `texts`: unigram, text kept as it is, unknown characters as bytes."""
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
            split_digits=True,
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(f"tokenizer.vocab_size={vocab_size}: {str(error).splitlines()[-1]}") from None
    durable.make_folder(path.parent)
    durable.write(path, trained.getvalue())
