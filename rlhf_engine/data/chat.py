"""Dialogues as text: a chat template rendered as transformers does, and which of the text the assistant says.

A template is a Jinja program over `messages`. It writes control tokens by their names; what a message says never
becomes one: a name in a message is marked before the template sees it, and is text afterwards.
"""

from __future__ import annotations

import bisect
import datetime
import functools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..config import ConfigError
from .templates import Source
from .tools import Tools

# A dialogue: {"role": "user" | "assistant" | "system" | "tool", "content": str} for each turn. One of the assistant may
# have `tool_calls`, a list of {"id", "type": "function", "function": {"name", "arguments": object}}, and one of a tool
# the `tool_call_id` of the call that it answers.
Message = dict[str, Any]
Messages = list[Message]

CONTROL_NAME = re.compile(r"<([|｜])[^<>|｜\s]+\1>")  # what is surely meant as a control token: <|im_end|>
# Noncharacters: Unicode keeps them out of text, so that we may use them within. The first two stand around names of
# control tokens in what is said, the third for an answer of which nothing is known.
_OPEN, _CLOSE, _ANSWER = "\ufdd0", "\ufdd1", "\ufdd2"
_MARKS = str.maketrans(dict.fromkeys(_OPEN + _CLOSE, ""))
_UNCLEAN = re.compile(f"[\ud800-\udfff{_OPEN}{_CLOSE}{_ANSWER}]")
_NONE_OF_OURS = str.maketrans(dict.fromkeys(_OPEN + _CLOSE + _ANSWER, "?"))
# a mark as Python's repr and ASCII JSON write it, around what a template made text of
_ESCAPED = re.compile(rf"\\ufdd0([^\\{_OPEN}]*)\\ufdd1")
_NOT_AHEAD = {"first", "index", "index0", "previtem"}  # of jinja's `loop`
_QUESTION = {"role": "user", "content": "?"}
_PROBE = {"role": "assistant", "content": _ANSWER}


def text_of(messages: Messages) -> str:
    """A dialogue up to where the assistant is to speak, as hh-rlhf writes it."""
    speakers = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "tool": "\n\nTool: "}
    return "".join(speakers[m["role"]] + said_in(m) for m in messages) + "\n\nAssistant:"


def said_in(message: Message) -> str:
    """What a message says, the calls of tools as JSON."""
    calls = (json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ())
    return "\n".join(filter(None, (message["content"], *calls)))


def clean(text: str) -> str:
    """Text that has bytes: lone surrogates and the noncharacters that are used here become question marks."""
    if _UNCLEAN.search(text) is None:
        return text
    return text.encode("utf-8", "replace").decode("utf-8").translate(_NONE_OF_OURS)


def shared_start(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How long the two are alike from their beginning on."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Part(NamedTuple):
    """A piece of a rendered dialogue.

    Args:
        what: text, or the id of a control token.
        said: the assistant says it.
        joins: text that is one run with the text before, cut here because another speaks.
    """

    what: str | int
    said: bool
    joins: bool = False


class _Turns(Messages):
    """Messages that note how much a template has written whenever it asks for the next of them."""

    def __init__(self, messages: Messages):
        super().__init__(messages)
        self.written: list[str] = []
        self.edges: list[int] = []  # of the text, where each turn begins

    def __iter__(self) -> Iterator[Message]:
        for message in super().__iter__():
            self.edges.append(sum(map(len, self.written)))
            yield message


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
        writes_tools: that are offered.
        writes_calls: of tools.

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
        self.writes_tools, self.writes_calls = "tools" in self.needs, "tool_calls" in source.program
        text = self._first_answer()
        said = text.partition(_ANSWER)[2]
        self.as_text = [found[0] for found in CONTROL_NAME.finditer(text) if found[0] not in controls]
        if self.as_text and not source.is_own:
            raise ConfigError(
                f"{source.name} needs the control token {self.as_text[0]}, which the vocabulary does not have"
            )
        end = pattern.search(said)
        self.end = end[end.lastindex or 0] if end else None
        # what every prompt ends with behind the text of its turns, and every answer begins with; None: that may differ
        self._header = self._first_header() if _goes_turn_by_turn(program) else None

    @property
    def goes_turn_by_turn(self) -> bool:
        """Whether every dialogue so far has begun with its prompt, and the next will as far as the program tells."""
        return self._header is not None

    @property
    def about(self) -> str:
        """What a run says of it at its start."""
        dated = f"; writes the date, {self.date or 'of today'} (tokenizer.date)" * self.is_dated
        return "; ".join(
            [self.source.about + dated, *(f"writes {name} as text" for name in dict.fromkeys(self.as_text))]
        )

    def parts(
        self, messages: Messages, prompt: bool, marks: bool = True, answer: bool = False, tools: Tools = None
    ) -> list[Part]:
        """A dialogue as runs of text and ids of control tokens.

        Nothing follows the end of the assistant's last turn, and no run goes over its beginning, so that a dialogue
        begins with its prompt where the template writes it so.

        Args:
            prompt: ends where the assistant is to speak, and nothing is said of who says what.
            marks: of each turn of the assistant; False: of the last one alone.
            answer: that one alone is wanted.
            tools: that are offered.

        Raises:
            ConfigError: the template refuses the dialogue, leaves out something of tools, or does not show where the
                assistant speaks.
        """
        self._check_tools(messages, tools)
        messages, tools = self._hidden(messages), self._hidden(tools)
        turns = _Turns(messages)
        text = self._text(turns, prompt, tools)
        self._check_written([m for m in messages if m["role"] == "tool" or "tool_calls" in m], text)
        is_answered = not prompt and messages[-1]["role"] == "assistant"
        spans = self._spoken(turns, text, marks, tools) if is_answered or (marks and not prompt) else []
        last = -1
        if is_answered:
            last, end = spans[-1]
            text = text[:end]
        return self._parts(text, last if answer else 0, [edge for span in spans for edge in span], last)

    def behind(self, messages: Messages, observation: Messages, ends: Collection[str], tools: Tools) -> list[Part]:
        """What the template writes from the end of what the assistant says last to where it is to speak again.

        It stands behind whatever the assistant said, so a template that writes earlier turns otherwise changes nothing
        here. The end token is the first part, where the template ends turns with one.

        Args:
            messages: end with a turn of the assistant.
            observation: what follows it.
            ends: names of control tokens that end a turn, besides the template's.

        Raises:
            ConfigError: the template refuses the dialogue, or leaves out what is observed.
        """
        *earlier, said = self._hidden(messages)
        observation = self._hidden(observation)
        text = self._text([*earlier, _probe_like(said), *observation], True, self._hidden(tools))
        start = text.rfind(_ANSWER) + 1
        if not start:
            raise ConfigError(
                f"{self.source.name} does not write what the assistant says before {observation[0]['role']}"
            )
        self._check_written(observation, text[start:])
        if said.get("tool_calls"):  # behind the mark is still the call
            names = {*ends, self.end}
            found = (m.start(m.lastindex or 0) for m in self._written(text, start) if m[m.lastindex or 0] in names)
            start = next(found, start)
        return self._parts(text, start, [], -1)

    def _check_tools(self, messages: Messages, tools: Tools) -> None:
        lacking = "tools that are offered" * bool(tools and not self.writes_tools)
        if not self.writes_calls and any(message.get("tool_calls") for message in messages):
            lacking = "calls of tools"
        if lacking:
            raise ConfigError(
                f"{self.source.name} does not write {lacking}: choose one that does (tokenizer.template), or have them"
                " as text in the messages"
            )

    def _check_written(self, observation: Messages, text: str) -> None:
        """What is called is in the text, or else the content, as it is or as JSON."""
        for message in observation:
            calls = message.get("tool_calls")
            if calls and not all(call["function"]["name"] in text for call in calls):
                raise ConfigError(f"{self.source.name} leaves out a call of {_shown(calls[0]['function']['name'])}")
            content = message["content"].strip()
            if not calls and content not in text and json.dumps(content, ensure_ascii=False)[1:-1] not in text:
                raise ConfigError(f"{self.source.name} leaves out what a {message['role']} message says")

    def _parts(self, text: str, position: int, edges: list[int], last: int) -> list[Part]:
        """A text from `position` on; the assistant speaks between every second pair of `edges`."""
        parts: list[Part] = []
        for found in self._written(text, position):
            group = found.lastindex or 0
            if position < found.start():
                parts += _runs(text, position, found.start(), edges, last)
            parts.append(Part(self.controls[found[group]], _is_said(found.start(group), edges)))
            position = found.end()
        return [*parts, *_runs(text, position, len(text), edges, last)]

    def _text(self, messages: Messages, prompt: bool, tools: Tools = None) -> str:
        written = messages.written if isinstance(messages, _Turns) else []
        try:
            for piece in self._program.generate(
                messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **self.variables
            ):
                written.append(_ESCAPED.sub(self._hidden_again, piece) if "\\ufdd0" in piece else piece)
            return "".join(written)
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

    @functools.cached_property
    def opening(self) -> str:
        """Text between a prompt and what the assistant says, which templates write themselves, as the space of hh."""
        try:
            prompt, answered = self._text([_QUESTION], True), self._text([_QUESTION, _PROBE], False)
        except ConfigError:  # some want a system message before
            return ""
        return answered[len(prompt) :].partition(_ANSWER)[0] if answered.startswith(prompt) else ""

    def _first_header(self) -> str | None:
        try:
            prompt, answered = self._text([_QUESTION], True), self._text([_QUESTION, _PROBE], False)
            return prompt[len(self._text([_QUESTION], False)) :] if answered.startswith(prompt) else None
        except ConfigError:  # some want a system message before
            return None

    def _spoken(self, messages: _Turns, text: str, marks: bool, tools: Tools) -> list[tuple[int, int]]:
        """Where in `text` the assistant speaks: from behind each of its prompts to behind the end token.

        A prompt may open what an answer is written without, such as a block of thought; then the answer begins where
        the two part.
        """
        spans: list[tuple[int, int]] = []
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in turns if marks else turns[-1:]:
            prompt = self._prompt(messages, i, text, tools)
            start = len(prompt)
            if not text.startswith(prompt):
                self._header = None
                probe = {**messages[i], "content": _ANSWER}
                blank = self._text([*messages[:i], probe, *messages[i + 1 :]], False, tools)
                start = shared_start(prompt, blank)
                header = shared_start(prompt, self._text(messages[:i], False, tools))  # where the assistant's begins
                if start < header or not text.startswith(blank[:start]):
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

    def _prompt(self, messages: _Turns, i: int, text: str, tools: Tools) -> str:
        """What turn `i` answers, of a dialogue whose text is known."""
        if i == 0 or self._header is None:
            return self._text(messages[:i], True, tools)
        return text[: messages.edges[i]] + self._header

    def _written(self, text: str, start: int = 0) -> Iterator[re.Match]:
        """The control tokens that the template wrote, from `start` on: names without a mark on either side."""
        for found in self._names.finditer(text, start):
            first, stop = found.span(found.lastindex or 0)
            if text[first - 1 : first] != _OPEN and text[stop : stop + 1] != _CLOSE:
                yield found

    def _hidden(self, value: Any) -> Any:
        """A value with marks around the names of control tokens in all its texts."""
        if isinstance(value, str):
            return self._hide(value)
        if isinstance(value, Mapping):
            return {self._hidden(key): self._hidden(item) for key, item in value.items()}
        return [self._hidden(item) for item in value] if isinstance(value, list | tuple) else value

    def _hidden_again(self, found: re.Match) -> str:
        return f"{_OPEN}{found[1]}{_CLOSE}" if self._names.search(found[1]) else found[0]

    def _hide(self, text: str) -> str:
        return self._names.sub(
            lambda m: m[0].replace(name := m[m.lastindex or 0], f"{_OPEN}{name}{_CLOSE}"), clean(text)
        )

    def _strftime(self, form: str) -> str:
        day = datetime.date.fromisoformat(self.date) if self.date else datetime.date.today()
        return datetime.datetime(day.year, day.month, day.day).strftime(form)


def _probe_like(message: Message) -> Message:
    """A turn of the assistant of which nothing is known but the tools that it calls."""
    if not message.get("tool_calls"):
        return {**message, "content": _ANSWER}
    calls = [
        {**call, "function": {**call["function"], "arguments": {_ANSWER: _ANSWER}}} for call in message["tool_calls"]
    ]
    return {**message, "content": _ANSWER, "tool_calls": calls}


class _Generation(Extension):
    """`{% generation %}`, with which some templates mark the assistant's words: a scope of its own, and no mark."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller):
        return caller()


def _goes_turn_by_turn(program: nodes.Template) -> bool:
    """Whether a template is one loop over the messages that never looks ahead, and what it writes for a prompt behind
    the loop is always the same: then a dialogue begins with the text of its first turns."""
    loops = [node for node in program.body if isinstance(node, nodes.For)]
    if len(loops) != 1 or next(program.find_all(nodes.Break), None) is not None:
        return False
    (loop,) = loops
    behind = program.body[program.body.index(loop) + 1 :]
    ends = [node for node in behind if isinstance(node, nodes.If) and _is_name(node.test, "add_generation_prompt")]
    firsts = [n for n in program.find_all(nodes.Getitem) if _is_name(n.node, "messages") and n.arg == nodes.Const(0)]
    places = [n for n in program.find_all(nodes.Getattr) if _is_name(n.node, "loop") and n.attr in _NOT_AHEAD]
    known = {"add_generation_prompt", "bos_token", "eos_token"}
    return (
        _is_name(loop.iter, "messages")
        and not (loop.test or loop.recursive or loop.else_)
        and _count(program, "messages") == 1 + len(firsts)
        and _count(program, "loop") == len(places)
        and _count(program, "add_generation_prompt") == len(ends) == len(behind)
        and all(name.name in known for node in ends for name in node.find_all(nodes.Name))
        and not any(node.elif_ or node.else_ for node in ends)
    )


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name


def _count(program: nodes.Template, name: str) -> int:
    return sum(found.name == name for found in program.find_all(nodes.Name))


def _shown(text: str) -> str:
    return text.translate(_MARKS) if _OPEN in text or _CLOSE in text else text


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


def _runs(text: str, start: int, stop: int, edges: list[int], last: int) -> list[Part]:
    """A run of text, cut where the assistant begins and ends to speak.

    Args:
        edges: where it does, in turn.
        last: where it does for the last time; there a run ends.
    """
    cuts = [start, *edges[bisect.bisect_right(edges, start) : bisect.bisect_left(edges, stop)], stop]
    return [Part(_shown(text[a:b]), _is_said(a, edges), a not in (start, last)) for a, b in pairwise(cuts) if a < b]


def _is_said(position: int, edges: list[int]) -> bool:
    return bisect.bisect_right(edges, position) % 2 == 1
