"""Dialogues as text: Jinja templates, built in or a tokenizer's own, and which of the text the assistant says.

A template is a Jinja program over `messages`, as HF tokenizers carry it. It writes control tokens by their names; what
a message says never becomes one: a name in a message is hidden before the template sees it, and is text afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..config import ConfigError

# A dialogue: {"role": "user" | "assistant" | "system", "content": str} for each turn
Messages = list[dict[str, str]]

# `bos_token` is here what the tokenizer puts in front of any text, which may be nothing.
_CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_HH = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '\n\nAssistant: ' + m.content + eos_token }}{% else %}"
    "{{ ('\n\nHuman: ' if m.role == 'user' else '') + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
BUILT_IN = {"hh": _HH, "internlm2": _CHATML, "llama3": _LLAMA3, "chatml": _CHATML}

CONTROL_NAME = re.compile(r"<([|｜])[^<>|｜\s]+\1>")  # what is surely meant as a control token: <|im_end|>
_HIDDEN = "\ufdd0"  # a noncharacter: Unicode keeps it out of text, so that we may use it within
_STAND_IN = re.compile(f"{_HIDDEN}(\\d+){_HIDDEN}")
_QUESTION = {"role": "user", "content": "?"}


def text_of(messages: Messages) -> str:
    """A dialogue up to where the assistant is to speak, as hh-rlhf writes it."""
    speakers = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    return "".join(speakers[m["role"]] + m["content"] for m in messages) + "\n\nAssistant:"


def clean(text: str) -> str:
    """Text that has bytes: lone surrogates and the noncharacter that is used here become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8").replace(_HIDDEN, "?")


class Template:
    """A chat template for a vocabulary.

    Args:
        source: the Jinja program.
        name: how errors call it.
        variables: what it may use besides the messages: `bos_token`, `eos_token` and the like.
        controls: the vocabulary's control tokens, name to id.
        pattern: finds any of them in text, its one group the name.

    Attributes:
        end: name of the control token that ends what the assistant says.

    Raises:
        ConfigError: it is not Jinja, uses a control token that the vocabulary lacks, or ends no turn with one.
    """

    def __init__(
        self, source: str, name: str, variables: Mapping[str, Any], controls: Mapping[str, int], pattern: re.Pattern
    ):
        self.name, self.variables, self.controls, self.pattern = name, variables, controls, pattern
        self._names = list(controls)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        try:
            self._program = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"{name} is not a chat template: {error}") from None
        start = len(self._text([_QUESTION], True))
        text = self._text([_QUESTION, {"role": "assistant", "content": _HIDDEN}], False)
        for found in CONTROL_NAME.finditer(text):
            if found[0] not in controls:
                raise ConfigError(f"{name} needs the control token {found[0]}, which the vocabulary does not have")
        end = pattern.search(text[start:].partition(_HIDDEN)[2])
        if end is None:
            raise ConfigError(f"{name} ends the assistant's turns with no control token of the vocabulary")
        self.end = end[end.lastindex or 0]

    def parts(self, messages: Messages, prompt: bool) -> list[tuple[str | int, bool]]:
        """A dialogue as runs of text and ids of control tokens, each with whether the assistant says it.

        Nothing follows the end of the assistant's last turn, and no run goes over the beginning of a turn of the
        assistant: a dialogue's parts begin with those of its prompt.

        Args:
            prompt: ends where the assistant is to speak.

        Raises:
            ConfigError: the template refuses the dialogue, or a dialogue does not begin with its prompt.
        """
        messages = [{**m, "content": self._hide(m["content"])} for m in messages]
        text = self._text(messages, prompt)
        spans = self._spoken(messages, text)
        if spans and not prompt and messages[-1]["role"] == "assistant":
            text = text[: spans[-1][1]]
        parts: list[tuple[str | int, bool]] = []
        position = 0
        for control in [*self.pattern.finditer(text), None]:
            stop = control.start() if control else len(text)
            cuts = [position, *(start for start, _ in spans if position < start < stop), stop]
            parts += [(self._reveal(text[a:b]), _within(a, spans)) for a, b in pairwise(cuts) if a < b]
            if control:
                group = control.lastindex or 0
                parts.append((self.controls[control[group]], _within(control.start(group), spans)))
                position = control.end()
        return parts

    def _text(self, messages: Messages, prompt: bool) -> str:
        try:
            return self._program.render(messages=messages, add_generation_prompt=prompt, **self.variables)
        except Exception as error:  # a template is a program from a file, and may fail in any way
            raise ConfigError(f"{self.name} refuses a dialogue: {error}") from None

    def _spoken(self, messages: Messages, text: str) -> list[tuple[int, int]]:
        """Where in `text` the assistant speaks: from behind each of its prompts to behind the end token."""
        spans: list[tuple[int, int]] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:i], True)
            end = text.find(self.end, len(before)) + len(self.end)
            if not text.startswith(before) or end < len(self.end) or (spans and len(before) < spans[-1][1]):
                raise ConfigError(
                    f"{self.name} writes a dialogue that does not begin with its prompt, or does not end turn {i + 1}"
                    f" with {self.end}"
                )
            spans.append((len(before), end))
        return spans

    def _hide(self, text: str) -> str:
        return self.pattern.sub(lambda m: m[0].replace(name := m[m.lastindex or 0], self._stand_in(name)), clean(text))

    def _stand_in(self, name: str) -> str:
        return f"{_HIDDEN}{self._names.index(name)}{_HIDDEN}"

    def _reveal(self, text: str) -> str:
        return _STAND_IN.sub(lambda m: self._names[int(m[1])], text) if _HIDDEN in text else text


class _Generation(Extension):
    """`{% generation %}`, with which some templates mark the assistant's words: its content, unmarked."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str):
    raise jinja2.TemplateError(message)


def _within(position: int, spans: list[tuple[int, int]]) -> bool:
    return any(start <= position < end for start, end in spans)
