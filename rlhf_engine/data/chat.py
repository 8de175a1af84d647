"""Dialogues as text: a chat template rendered as transformers does, and which of the text the assistant says.

A template is a Jinja program over `messages`. It writes control tokens by their names; what a message says never
becomes one: a name in a message is marked before the template sees it, and is text afterwards.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..config import ConfigError
from .templates import Source

# A dialogue: {"role": "user" | "assistant" | "system", "content": str} for each turn
Messages = list[dict[str, str]]

CONTROL_NAME = re.compile(r"<([|｜])[^<>|｜\s]+\1>")  # what is surely meant as a control token: <|im_end|>
# Noncharacters: Unicode keeps them out of text, so that we may use them within. The first two stand around names of
# control tokens in what is said, the third for an answer of which nothing is known.
_OPEN, _CLOSE, _ANSWER = "\ufdd0", "\ufdd1", "\ufdd2"
_MARKS = str.maketrans(dict.fromkeys(_OPEN + _CLOSE, ""))
_NONE_OF_OURS = str.maketrans(dict.fromkeys(_OPEN + _CLOSE + _ANSWER, "?"))
_QUESTION = {"role": "user", "content": "?"}
_PROBE = {"role": "assistant", "content": _ANSWER}


def text_of(messages: Messages) -> str:
    """A dialogue up to where the assistant is to speak, as hh-rlhf writes it."""
    speakers = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    return "".join(speakers[m["role"]] + m["content"] for m in messages) + "\n\nAssistant:"


def clean(text: str) -> str:
    """Text that has bytes: lone surrogates and the noncharacters that are used here become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8").translate(_NONE_OF_OURS)


def shared_start(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How long the two are alike from their beginning on."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass(frozen=True)
class Part:
    """A piece of a rendered dialogue.

    Args:
        what: text, or the id of a control token.
        said: the assistant says it.
        joins: text that is one run with the text before, cut here because another speaks.
    """

    what: str | int
    said: bool
    joins: bool = False


class Template:
    """A chat template for a vocabulary.

    Args:
        source: its program.
        variables: what it may use besides the messages: `bos_token`, `eos_token` and the like.
        controls: the vocabulary's control tokens, name to id.
        pattern: finds any of them in text, its one group the name.

    Attributes:
        end: name of the control token that ends what the assistant says; None where there is none.
        needs: names that it uses and does not set.
        is_dated: it writes the date.
        date: that it writes, YYYY-MM-DD; None: today's.
        as_text: names like those of control tokens that it writes and the vocabulary does not have.

    Raises:
        ConfigError: it is not Jinja, leaves out what is said, or is not the folder's own and uses a control token that
            the vocabulary lacks.
    """

    def __init__(self, source: Source, variables: Mapping[str, Any], controls: Mapping[str, int], pattern: re.Pattern):
        self.source, self.variables, self.controls = source, variables, controls
        self._names = pattern
        self.date: str | None = None
        try:
            program = _ENVIRONMENT.parse(source.program)
            self._program = _ENVIRONMENT.from_string(program, {"strftime_now": self._strftime})
        except jinja2.TemplateError as error:
            raise ConfigError(f"{source.name} is not a chat template: {error}") from None
        if not source.is_own and any("\\n" in data.data for data in program.find_all(nodes.TemplateData)):
            raise ConfigError(f"{source.name} has a \\n outside of its quoted strings: write {{{{ '\\n' }}}} there")
        self.needs = jinja2.meta.find_undeclared_variables(program)
        self.is_dated = "strftime_now" in self.needs
        text = self._first_answer()
        said = text.partition(_ANSWER)[2]
        self.as_text = [found[0] for found in CONTROL_NAME.finditer(text) if found[0] not in controls]
        if self.as_text and not source.is_own:
            raise ConfigError(
                f"{source.name} needs the control token {self.as_text[0]}, which the vocabulary does not have"
            )
        end = pattern.search(said)
        self.end = end[end.lastindex or 0] if end else None

    @property
    def about(self) -> str:
        """What a run says of it at its start."""
        dated = f"; writes the date, {self.date or 'of today'} (tokenizer.date)" * self.is_dated
        return "; ".join(
            [self.source.about + dated, *(f"writes {name} as text" for name in dict.fromkeys(self.as_text))]
        )

    def parts(self, messages: Messages, prompt: bool, marks: bool = True) -> list[Part]:
        """A dialogue as runs of text and ids of control tokens.

        Nothing follows the end of the assistant's last turn, and no run goes over its beginning, so that a dialogue
        begins with its prompt where the template writes it so.

        Args:
            prompt: ends where the assistant is to speak, and nothing is said of who says what.
            marks: of each turn of the assistant; False: of the last one alone.

        Raises:
            ConfigError: the template refuses the dialogue, or does not show where the assistant speaks.
        """
        messages = [{**m, "content": self._hide(m["content"])} for m in messages]
        text = self._text(messages, prompt)
        is_answered = not prompt and messages[-1]["role"] == "assistant"
        spans = self._spoken(messages, text, marks) if is_answered or (marks and not prompt) else []
        last = -1
        if is_answered:
            last, end = spans[-1]
            text = text[:end]
        parts: list[Part] = []
        position, turns = 0, sorted({edge for span in spans for edge in span})
        for found in self._written(text):
            group = found.lastindex or 0
            parts += self._runs(text, [position, *turns, found.start()], spans, last)
            parts.append(Part(self.controls[found[group]], _within(found.start(group), spans)))
            position = found.end()
        return parts + self._runs(text, [position, *turns, len(text)], spans, last)

    def _runs(self, text: str, edges: list[int], spans: list[tuple[int, int]], last: int) -> list[Part]:
        """A run of text, from the first edge to the last, cut at those between."""
        start, *_, stop = edges
        cuts = [start, *(edge for edge in edges[1:-1] if start < edge < stop), stop]
        return [
            Part(text[a:b].translate(_MARKS), _within(a, spans), joins=a not in (start, last))
            for a, b in pairwise(cuts)
            if a < b
        ]

    def _text(self, messages: Messages, prompt: bool) -> str:
        try:
            return self._program.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **self.variables
            )
        except Exception as error:  # a template is a program from a file, and may fail in any way
            raise ConfigError(f"{self.source.name} refuses a dialogue: {error}") from None

    def _first_answer(self) -> str:
        """A question and an answer of which nothing is known; some templates want a system message before."""
        try:
            text = self._text([_QUESTION, _PROBE], False)
        except ConfigError as error:
            try:
                text = self._text([{"role": "system", "content": "?"}, _QUESTION, _PROBE], False)
            except ConfigError:
                raise error from None
        if _ANSWER not in text:
            raise ConfigError(f"{self.source.name} does not write what the assistant says")
        return text

    def _spoken(self, messages: Messages, text: str, marks: bool) -> list[tuple[int, int]]:
        """Where in `text` the assistant speaks: from behind each of its prompts to behind the end token.

        A prompt may open what an answer is written without, such as a block of thought; then the answer begins where
        the two part.
        """
        spans: list[tuple[int, int]] = []
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in turns if marks else turns[-1:]:
            prompt = self._text(messages[:i], True)
            start = len(prompt)
            if not text.startswith(prompt):
                blank = self._text([*messages[:i], _PROBE, *messages[i + 1 :]], False)
                start = shared_start(prompt, blank)
                least = shared_start(prompt, self._text(messages[:i], False))  # where the assistant's header begins
                if start < least or not text.startswith(blank[:start]):
                    start = -1
            if start < 0 or (spans and start < spans[-1][1]):
                raise ConfigError(
                    f"{self.source.name} writes a dialogue that does not begin with its prompt, so that nothing shows"
                    f" where turn {i + 1}, of the assistant, begins"
                )
            ends = (m.end(group) for m in self._written(text, start) if m[group := m.lastindex or 0] == self.end)
            if (end := next(ends, None)) is None:
                raise ConfigError(f"{self.source.name} does not end turn {i + 1} with {self.end or 'a control token'}")
            spans.append((start, end))
        return spans

    def _written(self, text: str, start: int = 0) -> Iterator[re.Match]:
        """The control tokens that the template wrote, from `start` on: names without a mark on either side."""
        for found in self._names.finditer(text, start):
            first, stop = found.span(found.lastindex or 0)
            if text[first - 1 : first] != _OPEN and text[stop : stop + 1] != _CLOSE:
                yield found

    def _hide(self, text: str) -> str:
        return self._names.sub(
            lambda m: m[0].replace(name := m[m.lastindex or 0], f"{_OPEN}{name}{_CLOSE}"), clean(text)
        )

    def _strftime(self, form: str) -> str:
        day = datetime.date.fromisoformat(self.date) if self.date else datetime.date.today()
        return datetime.datetime(day.year, day.month, day.day).strftime(form)


class _Generation(Extension):
    """`{% generation %}`, with which some templates mark the assistant's words: a scope of its own, and no mark."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller):
        return caller()


def _raise(message: str):
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Without the HTML escapes of Jinja's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates are written for: transformers' `utils/chat_template_utils.py`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    return environment


_ENVIRONMENT = _environment()


def _within(position: int, spans: list[tuple[int, int]]) -> bool:
    return any(start <= position < end for start, end in spans)
